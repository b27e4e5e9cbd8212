"""Models as pure functions on dictionaries of arrays: `MODELS[name](num_classes=..., dtype=...) -> Net`."""

from jax_transfer.models.net import Net, Output, gaussian, make_net, with_new_head
from jax_transfer.models.spec import Spec
from jax_transfer.models.zoo import MODELS

__all__ = ["MODELS", "Net", "Output", "Spec", "gaussian", "make_net", "with_new_head"]
