"""`Checkpoint`: a common form for models from files, trajectories, fine-tuning and random initialisations."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from jax_transfer import trees
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models import MODELS, Net, with_projection
from jax_transfer.models.vit import resize_position_embedding
from jax_transfer.records import InputError

Model = dict[str, Any]  # {"params", "stats"} of a net


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """A net, its weights, and the preprocessing that it expects.

    >>> import jax
    >>> net = MODELS["resnet10"](num_classes=3, width=4)
    >>> params, stats = jax.eval_shape(net.init, jax.random.key(0))  # net.init(key) for real weights
    >>> checkpoint = Checkpoint("mine", net, params, stats, Preprocessing(image_size=32))
    >>> checkpoint.params["fc"]["kernel"].shape
    (32, 3)

    Attributes:
      name: the name of the checkpoint in result rows and messages.
      net: the architecture, including the head to which the weights belong.
      params, stats: the weights, as `net.apply` takes them.
      preprocessing: how images are resized, cropped and normalised.
      source_accuracy: accuracy in [0, 1] on the test images of the pre-training data; None if unknown.
      settings: the arguments with which `MODELS[net.name]` makes `net`, except for its projection.
      has_head: False if the logits do not stand for classes, or if they come from an untrained head.
      notes: sentences on what was assumed, guessed or left out.
      preprocessing_is_guess: whether the preprocessing was inferred from a name because nothing states it.
      known_fingerprint: the `trees.fingerprint` of the weights if it is known without reading the weights, else "".
    """

    name: str
    net: Net
    params: dict = dataclasses.field(repr=False)
    stats: dict = dataclasses.field(repr=False)
    preprocessing: Preprocessing
    source_accuracy: float | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    has_head: bool = True
    notes: tuple[str, ...] = ()
    preprocessing_is_guess: bool = False
    known_fingerprint: str = ""

    @classmethod
    def stored(
        cls,
        name: str,
        net: Net,
        read_model: Callable[[], Model],
        preprocessing: Preprocessing,
        read_fingerprint: Callable[[], str] = str,
        **others,
    ) -> "Checkpoint":
        """Makes a checkpoint whose weights `read_model()` -> {"params", "stats"} reads when they are needed.

        The weights are read again at each access, unless `read_model` caches them. They are never read if all features
        are cached and `read_fingerprint()` knows their fingerprint; it returns "" if it does not.
        """
        checkpoint = cls(name, net, {}, {}, preprocessing, **others)
        for field in ("params", "stats"):
            object.__delattr__(checkpoint, field)
        object.__setattr__(checkpoint, "_read_model", read_model)
        object.__setattr__(checkpoint, "_read_fingerprint", read_fingerprint)
        return checkpoint

    def __getattr__(self, name: str):
        # Only called for attributes that do not exist, such as the weights of a stored checkpoint.
        if name in ("params", "stats") and "_read_model" in vars(self):
            return vars(self)["_read_model"]()[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def model(self) -> Model:
        """The weights, {"params", "stats"}."""
        if "_read_model" in vars(self):
            return vars(self)["_read_model"]()
        return {"params": self.params, "stats": self.stats}

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the weights, which is part of the key under which features are cached."""
        read = vars(self).get("_read_fingerprint", str)
        return self.known_fingerprint or read() or trees.fingerprint(self.model)


def at_image_size(checkpoint: Checkpoint, image_size: int) -> Checkpoint:
    """Returns the same checkpoint for images of another size.

    The preprocessing keeps its crop fraction. A transformer is rebuilt with its position embedding resized, see
    `vit.resize_position_embedding`; a convolutional net is unchanged.

    Args:
      image_size: side of the images in pixels.

    Raises:
      InputError: if the net cannot take images of that size, which is too small or not a multiple of the patch size.

    >>> import jax
    >>> import numpy as np
    >>> net = MODELS["vit_tiny_patch4_32"](num_classes=5)
    >>> shapes = jax.eval_shape(net.init, jax.random.key(0))
    >>> params, stats = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    >>> larger = at_image_size(Checkpoint("mine", net, params, stats, Preprocessing(32)), 64)
    >>> larger.preprocessing.image_size, params["pos_embed"].shape, larger.params["pos_embed"].shape
    (64, (1, 65, 192), (1, 257, 192))
    """
    if not isinstance(image_size, int) or image_size < 1:
        raise InputError(f"{checkpoint.name}: image_size is {image_size!r}; expected a number of pixels, such as 224.")
    net, model, settings = checkpoint.net, checkpoint.model, checkpoint.settings
    preprocessing = dataclasses.replace(checkpoint.preprocessing, image_size=image_size)
    table = model["params"].get("pos_embed", model["stats"].get("pos_embed"))
    if table is None:
        if image_size < net.min_image_size:
            raise InputError(
                f"{checkpoint.name}: image_size {image_size} is too small; {net.name} needs at least "
                f"{net.min_image_size}."
            )
    elif image_size != net.min_image_size:
        patch = MODELS[net.name].patch or 1
        if image_size % patch:
            raise InputError(
                f"{checkpoint.name}: image_size {image_size} is not a multiple of {patch}, the patch size of "
                f"{net.name}."
            )
        grid, new_grid = net.min_image_size // patch, image_size // patch
        settings = {"num_classes": net.num_classes, **settings, "image_size": image_size}
        resized_net = MODELS[net.name](**settings)
        net = with_projection(resized_net, net.projection) if net.projection else resized_net
        resized = {"pos_embed": resize_position_embedding(table, (grid, grid), (new_grid, new_grid))}
        model = {name: {**tree, **resized} if "pos_embed" in tree else tree for name, tree in model.items()}
    return dataclasses.replace(
        checkpoint,
        net=net,
        params=model["params"],
        stats=model["stats"],
        preprocessing=preprocessing,
        settings=settings,
        known_fingerprint="",
    )


def with_classes(checkpoint: Checkpoint, num_classes: int, dtype=None) -> Net:
    """Builds the net of a checkpoint with a head for another number of classes and, if given, in another precision.

    Checkpoints with equal settings get the same net, so that they share compiled programs.

    >>> net = MODELS["resnet10"](num_classes=10, width=8)
    >>> with_classes(Checkpoint("a", net, {}, {}, Preprocessing(32), settings={"width": 8}), 3).num_classes
    3
    """
    arguments = {**checkpoint.settings, "num_classes": num_classes}
    return MODELS[checkpoint.net.name](**arguments, **({} if dtype is None else {"dtype": dtype}))
