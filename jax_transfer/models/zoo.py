"""The models by name, and what published weights of each expect of an image."""

from collections.abc import Callable

from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models import resnet
from jax_transfer.models.net import Net

# A model takes num_classes, dtype, stem and width, all but the first optional, and gives the identical Net for
# equal arguments.
MODELS: dict[str, Callable[..., Net]] = {
    "resnet10": resnet.resnet10,
    "resnet18": resnet.resnet18,
    "resnet34": resnet.resnet34,
    "resnet50": resnet.resnet50,
    "resnet101": resnet.resnet101,
    "resnet152": resnet.resnet152,
}

IMAGENET = Preprocessing(image_size=224, crop_fraction=0.875)
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
# Beginning of a model's name -> preprocessing of its released weights; the first that fits, otherwise IMAGENET.
RELEASED = {
    "vit_": Preprocessing(image_size=224, crop_fraction=0.9, interpolation="bicubic", **HALF),
    "deit_": Preprocessing(image_size=224, crop_fraction=0.9, interpolation="bicubic"),
    "t2t_": Preprocessing(image_size=224, crop_fraction=0.9, interpolation="bicubic"),
    "inception_v3": Preprocessing(image_size=299, crop_fraction=0.875, **HALF),
    "inception_resnet_v2": Preprocessing(image_size=299, crop_fraction=0.8975, interpolation="bicubic", **HALF),
}


def released_preprocessing(name: str) -> Preprocessing:
    """What released weights of a model expect."""
    return next((found for beginning, found in RELEASED.items() if name.startswith(beginning)), IMAGENET)
