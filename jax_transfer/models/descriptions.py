"""Which model a file holds and what it expects of an image: what the file says of itself, its name and its shapes tell."""

import dataclasses
import json
import math
import pathlib
import reprlib
from collections.abc import Mapping

from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models import torch_weights
from jax_transfer.models.renamings import State
from jax_transfer.models.zoo import released, released_preprocessing
from jax_transfer.records import InputError

# Names of files that say nothing: their folder's name does, as in resnet50.a1_in1k/model.safetensors.
NAMELESS = ("model", "pytorch_model")
# The largest number of classes, channels or pixels that is believed: a small file could ask for any amount of memory.
MOST_OF_A_SETTING = 100_000
# The bias of the classification head, in the models that have it under this name.
HEADS = (
    "fc.bias",
    "head.fc.bias",
    "head.bias",
    "classifier.bias",
    "classifier.1.bias",
    "last_linear.bias",
    "classif.bias",
)


@dataclasses.dataclass(frozen=True)
class Description:
    """What a file says of itself; None or {} where it says nothing. `where` is where it says it, for messages."""

    where: str = ""
    model: str | None = None  # a key of MODELS, or another name that no model has
    settings: Mapping = dataclasses.field(default_factory=dict)
    preprocessing: Preprocessing | None = None
    source_accuracy: float | None = None


def describe(path: pathlib.Path) -> Description:
    """What an exported file (metadata "jax_transfer") or timm's config.json beside a file says; reads headers alone.

    Raises:
      InputError: if either cannot be read.
    """
    if path.suffix == ".safetensors":
        metadata = torch_weights.read_metadata(path)
        if "jax_transfer" in metadata:
            return _ours(path, metadata["jax_transfer"])
    beside = path.parent / "config.json"
    return _timms(path, beside) if beside.is_file() else Description()


def released_as(path: pathlib.Path) -> tuple[str, Preprocessing] | None:
    """(model, preprocessing) of the release that a file's name, or else its folder's, is known to be of."""
    nameless = path.name.partition(".")[0] in NAMELESS
    return released(path.absolute().parent.name if nameless else path.name)


def settings_from_shapes(model: str, state: State, contrastive: bool = False) -> dict:
    """Arguments of MODELS[model] that the shapes of the weights tell, where they do.

    num_classes of every model; width and stem of ResNets; image_size of transformers.

    Args:
      state: with our names, see `renamings.to_ours`.
      contrastive: the head is none of classes.
    """
    settings = {}
    head = next((state[name] for name in HEADS if name in state), None)
    if head is not None and head.ndim == 1 and len(head) and not contrastive:
        settings["num_classes"] = len(head)
    stem = state.get("stem.conv.weight" if model.endswith("_v2") else "conv1.weight")
    if model.startswith("resnet") and stem is not None and stem.ndim == 4:
        settings |= {"width": len(stem), "stem": "cifar" if stem.shape[2] == 3 else "imagenet"}
    table, patches = state.get("pos_embed"), state.get("patch_embed.proj.weight")
    if model.startswith(("vit", "deit", "t2t")) and table is not None and table.ndim == 3 and table.shape[1] > 1:
        side = math.isqrt(table.shape[1] - 1)
        patch = 16 if patches is None or patches.ndim != 4 else patches.shape[2]  # of T2T-ViT: three strides, 4 2 2
        if side**2 == table.shape[1] - 1:
            settings["image_size"] = side * patch
    return settings


def guessed_preprocessing(path: pathlib.Path, model: str, settings: Mapping) -> tuple[Preprocessing, str]:
    """(what the release of that name expects, and of the settings' image size; a note on what is not known or "")."""
    if settings.get("stem") == "cifar":
        guess = Preprocessing(image_size=32)
        return guess, "does not say how its images were prepared: 32 pixels, and ImageNet's mean and std, are a guess"
    named = released_as(path)
    found = named[1] if named and named[0] == model else released_preprocessing(model)
    return dataclasses.replace(found, image_size=settings.get("image_size", found.image_size)), ""


def _ours(path, text) -> Description:
    try:
        return from_metadata(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: its metadata under 'jax_transfer' cannot be used ({_said(error)}); export it again."
        ) from error


def from_metadata(said: object) -> Description:
    """What metadata say, of an exported file or an epoch: {"model", "preprocessing", "source_accuracy"}.

    Raises:
      InputError: if they are of other types, or have numbers that no model has.
    """
    if not isinstance(said, Mapping) or not isinstance(said.get("model", {}), Mapping):
        raise InputError(f"expected fields, got {reprlib.repr(said)}")
    settings = dict(said.get("model", {}))
    model = settings.pop("name", None)
    if not isinstance(model, str | None):
        raise InputError(f"the name of its model is {reprlib.repr(model)}")
    for name, value in settings.items():
        if not isinstance(value, str | int | float | None) or not (
            isinstance(value, str | None) or 0 <= value <= MOST_OF_A_SETTING
        ):
            raise InputError(f"its model's {name} is {reprlib.repr(value)}")
    preprocessing = Preprocessing.from_json(said["preprocessing"]) if said.get("preprocessing") else None
    accuracy = said.get("source_accuracy")
    if not isinstance(accuracy, int | float | None):
        raise InputError(f"the source accuracy is {reprlib.repr(accuracy)}")
    return Description("its metadata", model, settings, preprocessing, accuracy)


def _said(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _timms(path, beside) -> Description:
    """The config.json of a folder in the layout of timm's hub, unless the file's name says that it is another model."""
    try:
        said = json.loads(beside.read_text())
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{beside}: cannot be read as JSON ({_said(error)}); repair or remove it.") from error
    architecture = said.get("architecture") if isinstance(said, dict) else None
    if not isinstance(architecture, str):
        return Description()
    model = (released(architecture) or (architecture,))[0]
    named = released_as(path)
    if named and named[0] != model and path.name.partition(".")[0] not in NAMELESS:
        return Description()
    config = said.get("pretrained_cfg", {})
    try:
        preprocessing = _timms_preprocessing(config) if "input_size" in config else None
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise InputError(
            f"{beside}: its pretrained_cfg cannot be used ({_said(error)}); repair or remove it."
        ) from error
    return Description(str(beside), model, {}, preprocessing)


def _timms_preprocessing(config: Mapping) -> Preprocessing:
    size = int(config["input_size"][-1])
    resized = math.floor(size / config.get("crop_pct", 0.875))  # timm rounds down
    mean, std = tuple(config["mean"]), tuple(config["std"])
    return Preprocessing(size, size / resized, mean, std, config.get("interpolation", "bilinear"))
