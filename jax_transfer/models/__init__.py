"""Models as pure functions on dictionaries of arrays: `MODELS[name](num_classes=..., dtype=...) -> Net`."""

from collections.abc import Callable

from jax_transfer.models import resnet, resnet_v2
from jax_transfer.models.net import Net, Output, gaussian, make_net, with_new_head

# A model takes num_classes, dtype, stem and width, all but the first optional, and gives the identical Net for
# equal arguments.
MODELS: dict[str, Callable[..., Net]] = {
    "resnet10": resnet.resnet10,
    "resnet18": resnet.resnet18,
    "resnet34": resnet.resnet34,
    "resnet50": resnet.resnet50,
    "resnet101": resnet.resnet101,
    "resnet152": resnet.resnet152,
    "resnet18_v2": resnet_v2.resnet18_v2,
    "resnet34_v2": resnet_v2.resnet34_v2,
    "resnet50_v2": resnet_v2.resnet50_v2,
    "resnet101_v2": resnet_v2.resnet101_v2,
    "resnet152_v2": resnet_v2.resnet152_v2,
}

__all__ = ["MODELS", "Net", "Output", "gaussian", "make_net", "with_new_head"]
