"""A small checkpoint in torch's names, and files with it, for the tests of checkpoints."""

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
DESCRIBED = {"model": {"name": "resnet10", "stem": "cifar", "width": 8, "num_classes": 5},
             "preprocessing": {"image_size": 16}, "source_accuracy": 0.5}  # fmt: skip
METADATA = {"jax_transfer": json.dumps(DESCRIBED)}
# The config.json of timm's hub, for NET.
TIMMS = {
    "architecture": "resnet10",
    "num_classes": 5,
    "pretrained_cfg": {
        "input_size": [3, 24, 24], "crop_pct": 0.9, "interpolation": "bicubic",
        "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6],
    },
}  # fmt: skip


def state():
    """A torch state dict of NET, with statistics that are not the initial ones."""
    rng = np.random.default_rng(1)
    stats = jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.5, 1.5, x.shape), jnp.float32), STATS)
    return torch_weights.to_torch(PARAMS, stats)


def zeros(net):
    """A torch state dict of zeros; compiling `init` of a deep net takes seconds."""
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    return torch_weights.to_torch(*jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes))


def saved(path, found=None, metadata=None):
    safetensors.numpy.save_file(found or state(), path, metadata=metadata)
    return path


def hub(folder, name="model.safetensors", config=TIMMS):
    """A file with weights in a folder of its own, and a config.json beside it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return saved(folder / name)
