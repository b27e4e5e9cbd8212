"""Models as pure functions on dictionaries of arrays: `MODELS[name](num_classes=..., dtype=...) -> Net`."""

from jax_transfer.models.checkpoints import (
    Checkpoint,
    at_image_size,
    describes_itself,
    export,
    load_checkpoint,
)
from jax_transfer.models.folders import expand
from jax_transfer.models.net import Net, Output, gaussian, make_net, with_new_head
from jax_transfer.models.spec import Spec
from jax_transfer.models.zoo import MODELS, named, released_preprocessing

__all__ = [
    "MODELS",
    "Checkpoint",
    "Net",
    "Output",
    "Spec",
    "at_image_size",
    "describes_itself",
    "expand",
    "export",
    "gaussian",
    "load_checkpoint",
    "make_net",
    "named",
    "released_preprocessing",
    "with_new_head",
]
