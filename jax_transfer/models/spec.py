"""`Spec`, which describes how a model is made and its releases, and the preprocessings that several releases share."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping

import numpy as np

from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models.net import Net

# Each denominator is the side in pixels to which images are resized before the crop to 224 pixels. timm's crop fraction
# of 0.9 gives 248, since timm rounds down.
IMAGENET = Preprocessing(224, 224 / 256)
BICUBIC = Preprocessing(224, 224 / 256, interpolation="bicubic")
BICUBIC_248 = Preprocessing(224, 224 / 248, interpolation="bicubic")
TORCHVISION_V2 = Preprocessing(224, 224 / 232)  # torchvision's second recipe ("IMAGENET1K_V2")
HALF = (0.5, 0.5, 0.5)
VIT = Preprocessing(224, 224 / 248, HALF, HALF, "bicubic")


@dataclasses.dataclass(frozen=True, eq=False)
class Spec:
    """A model: how to make its net, and facts about its releases that the weights do not show.

    It is callable as `make`, and `inspect.signature` shows the parameters of `make`.

    Attributes:
      make: takes num_classes (0: a net without a head), dtype ("float32" or "bfloat16") and the settings of its family
        (`stem`, `width`, `image_size`, ...). Only num_classes is required. Calls with equal arguments return the same
        Net object.
      min_image_size: smallest height and width, in pixels, with the default settings.
      patch: side of a patch, in pixels; None for a convolutional net.
      released: maps the beginning of the name of a released file, in lower case and with all other characters replaced
        by "_", to the preprocessing of that release. The key that equals the name of the model is the default release.
      architectures: other names of the model that training scripts use, such as the values of `arch` in DINO.
      network: key in MODELS of another model with the same network, such as the ViT with the network of a DeiT.
      settings_from_shapes: returns the arguments of `make` that can be inferred from the shapes of weights, given under
        the parameter names of this package.
      timm_pools: values of timm's `global_pool` for which timm computes the same features.

    >>> from jax_transfer.models.resnet import resnet18
    >>> net = resnet18(num_classes=10, width=8)
    >>> net.name, net.feature_dim, net is resnet18(10, width=8), resnet18.takes("stem")
    ('resnet18', 64, True, True)
    """

    make: Callable[..., Net]
    min_image_size: int
    patch: int | None = None
    released: Mapping[str, Preprocessing] = dataclasses.field(default_factory=dict)
    architectures: tuple[str, ...] = ()
    network: str | None = None
    settings_from_shapes: Callable[[Mapping[str, np.ndarray]], dict] = lambda state: {}
    timm_pools: tuple[str, ...] = ("avg", "fast", "fastavg")

    def __post_init__(self):
        object.__setattr__(self, "__signature__", inspect.signature(self.make))

    def __call__(self, *arguments, **settings) -> Net:
        return self.make(*arguments, **settings)

    def takes(self, setting: str) -> bool:
        """Returns whether `setting` is an argument of `make`."""
        return setting in inspect.signature(self).parameters
