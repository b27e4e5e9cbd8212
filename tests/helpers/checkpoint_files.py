"""A small checkpoint with the names of torch, and files that contain it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from jax_transfer.checkpoints import torch_weights
from jax_transfer.models import MODELS

NET = MODELS["resnet10"](num_classes=5, stem="cifar", width=8)
PARAMS, STATS = NET.init(jax.random.key(3))
IMAGES = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
DESCRIBED = {
    "model": {"name": "resnet10", "stem": "cifar", "width": 8, "num_classes": 5},
    "preprocessing": {"image_size": 16},
    "source_accuracy": 0.5,
}
METADATA = {"jax_transfer": json.dumps(DESCRIBED)}
# A config.json for NET in the format of timm.
TIMM_CONFIG = {
    "architecture": "resnet10",
    "num_classes": 5,
    "pretrained_cfg": {
        "input_size": [3, 24, 24], "crop_pct": 0.9, "interpolation": "bicubic",
        "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6],
    },
}  # fmt: skip


def state():
    """Returns a torch state dict of NET with random statistics."""
    rng = np.random.default_rng(1)
    stats = jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.5, 1.5, x.shape), jnp.float32), STATS)
    return torch_weights.to_torch(PARAMS, stats)


def zeros(net):
    """Returns a torch state dict of zeros; compiling `init` of a deep net would take seconds."""
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    return torch_weights.to_torch(*jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes))


def saved(path, weights=None, metadata=None):
    """Writes weights (by default the state of NET) as .safetensors and returns the path."""
    safetensors.numpy.save_file(weights or state(), path, metadata=metadata)
    return path


def hub(folder, name="model.safetensors", config=TIMM_CONFIG):
    """Writes a folder with weights and a config.json; returns the path of the weights."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return saved(folder / name)
