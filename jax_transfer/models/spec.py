"""What is known of a model beside its network: a `Spec`, and the preprocessing that several releases share."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping

import numpy as np

from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models.net import Net

# Images resized to a side and cut to 224 pixels; a fraction of 0.9 is 248 in timm, which rounds down.
IMAGENET = Preprocessing(224, 224 / 256)
BICUBIC = Preprocessing(224, 224 / 256, interpolation="bicubic")
BICUBIC_248 = Preprocessing(224, 224 / 248, interpolation="bicubic")
TORCHVISION_V2 = Preprocessing(224, 224 / 232)  # torchvision's second recipe ("IMAGENET1K_V2")
HALF = (0.5, 0.5, 0.5)
VIT = Preprocessing(224, 224 / 248, HALF, HALF, "bicubic")


@dataclasses.dataclass(frozen=True, eq=False)
class Spec:
    """A model: how its net is made, and what is known of it beside the weights.

    Call it as `make`: `MODELS["resnet18"](num_classes=10, width=8) -> Net`. `inspect.signature` gives the parameters of
    `make`.

    Attributes:
      make: takes num_classes (0: a net without a head), dtype ("float32" or "bfloat16") and the settings of its family
        (`stem`, `width`, `image_size`, ...), all but the first optional; gives the identical Net for equal arguments.
      min_image_size: smallest height and width, in pixels, under the default settings.
      patch: side of a patch, in pixels; None for a convolutional net.
      released: how the name of a released file begins, in lower case and with "_" for other characters -> the
        preprocessing of that release. The model's own name is the release to assume.
      architectures: what training code calls the model, such as the `arch` of DINO, where no file is named so.
      network: the key in MODELS of the model that has the same network, such as ViT's for a DeiT.
      settings_from_shapes: arguments of `make` that weights (with our names) show by their shapes.
      timm_pools: what timm's `global_pool` may be, for its features to be those of this model.
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
        """Whether `setting` is one of its arguments."""
        return setting in self.__signature__.parameters
