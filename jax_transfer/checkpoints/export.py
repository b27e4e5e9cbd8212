"""Writes a checkpoint as a file that timm and `load_checkpoint` can read."""

import json
import pathlib
from collections.abc import Sequence

from jax_transfer.checkpoints import torch_weights
from jax_transfer.checkpoints.checkpoint import Checkpoint
from jax_transfer.checkpoints.folders import expanded
from jax_transfer.models.net import without_head


def export(checkpoint: Checkpoint, path: str | pathlib.Path, notes: Sequence[str] = ()) -> None:
    """Writes a checkpoint as a .safetensors file with timm's names and shapes; `load_checkpoint` reads it back.

    The names are those of timm's resnet18 .. resnet152 (also for resnet10), resnetv2_18 .. resnetv2_152,
    mobilenetv1_100, mobilenetv2_100, inception_v3, inception_v4, inception_resnet_v2, vit_* and deit_*. Other models
    have the names that their releases use: torchvision's googlenet for inception_v1, pretrainedmodels' bninception for
    inception_v2 (whose first convolution takes the channels in the order blue, green, red), and the T2T-ViT repository
    for t2t_vit_14 and t2t_vit_t_14. An untrained head is left out. A projection is written as projection.0,
    projection.2, ..., which `load_checkpoint(..., keep_projection=True)` reads.

    The metadata hold the model, the preprocessing, the source accuracy and the notes as JSON under "jax_transfer".

    Args:
      checkpoint: the checkpoint.
      path: the file to write.
      notes: sentences on what was assumed, which `load_checkpoint` reports; the checkpoint's own are not written.

    >>> import jax, numpy as np, safetensors.numpy, tempfile
    >>> from jax_transfer.data.transforms import Preprocessing
    >>> from jax_transfer.models import MODELS
    >>> net = MODELS["resnet10"](num_classes=5, width=8)
    >>> shapes = jax.eval_shape(net.init, jax.random.key(0))
    >>> params, stats = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "mine.safetensors"
    ...     export(Checkpoint("mine", net, params, stats, Preprocessing(32), settings={"width": 8}), path)
    ...     safetensors.numpy.load_file(path)["layer1.0.conv1.weight"].shape
    (8, 8, 3, 3)
    """
    described = {
        "model": {**checkpoint.settings, "name": checkpoint.net.name, "num_classes": checkpoint.net.num_classes},
        "preprocessing": checkpoint.preprocessing.to_json(),
        "source_accuracy": checkpoint.source_accuracy,
        "has_head": checkpoint.has_head,
        **({"notes": list(notes)} if notes else {}),
    }
    model = checkpoint.model
    params = model["params"] if checkpoint.has_head else without_head(model["params"], checkpoint.net)
    metadata = {"format": "pt", "jax_transfer": json.dumps(described)}
    torch_weights.save_safetensors(expanded(path), params, model["stats"], metadata)
