"""Which model a file holds and what it expects of an image: what the file says of itself, its name and its shapes tell."""

import dataclasses
import json
import math
import pathlib
import re
import reprlib
from collections.abc import Collection, Iterator, Mapping

from jax_transfer.checkpoints import torch_files
from jax_transfer.checkpoints.released import is_release, released, released_preprocessing
from jax_transfer.checkpoints.renamings import State
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models.net import Net
from jax_transfer.models.spec import IMAGENET
from jax_transfer.models.zoo import MODELS
from jax_transfer.records import InputError

# Names of files that say nothing: their folder's name does, as in resnet50.a1_in1k/model.safetensors.
NAMELESS = ("model", "pytorch_model")
# The largest number of classes, channels or pixels that is believed: a small file could ask for any amount of memory.
MOST_OF_A_SETTING = 100_000
# Where training code keeps its options beside the weights, and what it calls the model in them.
OPTIONS = ("args", "opt", "options", "hparams", "hyper_parameters", "config", "cfg")
ARCHITECTURE = ("arch", "architecture", "model_name", "model", "backbone")
# Anti-aliased networks (Zhang, 2019, arXiv:1904.11486) have the names and shapes of the plain ones.
ANTI_ALIASED = re.compile(r"resne(t|xt|st)(aa|blur)|anti_?alias|blur_?pool|lpf\d", re.IGNORECASE)
# Arguments of timm's models in a config.json that change nothing here, for shapes tell them or training alone heeds them.
HARMLESS = ("img_size", "num_classes", "in_chans", "patch_size", "embed_dim", "depth", "drop_rate", "drop_path_rate",
            "proj_drop_rate", "attn_drop_rate", "patch_drop_rate", "drop_block_rate", "zero_init_last")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Description:
    """What a file says of itself; None or {} where it says nothing. `where` is where it says it, for messages."""

    where: str = ""
    model: str | None = None  # a key of MODELS, or another name that no model has
    settings: Mapping = dataclasses.field(default_factory=dict)
    preprocessing: Preprocessing | None = None
    source_accuracy: float | None = None
    has_head: bool = True
    notes: tuple[str, ...] = ()  # what it says that is not heeded here


def describe(path: pathlib.Path) -> Description:
    """What an exported file (metadata "jax_transfer") or timm's config.json beside a file says; reads headers alone.

    Raises:
      InputError: if either cannot be read.
    """
    if torch_files.has_ending(path, (".safetensors",)):
        metadata = torch_files.read_metadata(path)
        if "jax_transfer" in metadata:
            return _ours(path, metadata["jax_transfer"])
    beside = path.parent / "config.json"
    return _timms(path, beside) if beside.is_file() else Description()


def released_as(path: pathlib.Path) -> tuple[str, Preprocessing] | None:
    """(model, preprocessing) of the release that a file's name, or else its folder's, is known to be of."""
    return released(telling_name(path))


def telling_name(path: pathlib.Path) -> str:
    """The name that tells what a file is: its own; that of the folder of a model.safetensors; in the cache of timm's hub,
    models--timm--resnet50.a1_in1k/snapshots/.../model.safetensors, that of the repository."""
    if not is_nameless(path):
        return path.name
    parents = path.absolute().parents
    cached = [parent.name for parent in parents if parent.name.startswith("models--")]
    return cached[0].rpartition("--")[2] if cached else parents[0].name


def is_nameless(path: pathlib.Path) -> bool:
    return path.name.partition(".")[0] in NAMELESS


def options(contents: object) -> dict:
    """What a file of training code says beside the weights: its own keys before those of its options."""
    if not isinstance(contents, Mapping):
        return {}
    inner = [contents[name] for name in OPTIONS if isinstance(contents.get(name), Mapping)]
    own = {name: value for name, value in contents.items() if not isinstance(value, Mapping)}  # "model" may be weights
    return {name: value for found in (*reversed(inner), own) for name, value in found.items()}


def said_architecture(contents: object) -> str:
    """The name of the model among the options of a file, "" if there is none."""
    said = options(contents)
    return next((said[name] for name in ARCHITECTURE if isinstance(said.get(name), str)), "")


def check_plain(path: pathlib.Path, contents: object) -> None:
    """Raises InputError for what weights do not show and no model here has: anti-aliased or dilated convolutions."""
    for name in (telling_name(path), said_architecture(contents)):
        if ANTI_ALIASED.search(name):
            raise InputError(f"{path}: {name!r} is anti-aliased, which no model here is; use plain weights.")
    dilated = options(contents).get("replace_stride_with_dilation")
    if isinstance(dilated, list) and any(value is True for value in dilated):
        raise InputError(f"{path}: was trained with dilated stages ({dilated}), which no model here has.")


def settings_from_shapes(net: Net, state: State, contrastive: bool = False) -> dict:
    """Arguments of MODELS[net.name] that the shapes of the weights tell, where they do.

    num_classes of every model, and what its `Spec.settings_from_shapes` finds.

    Args:
      net: the model with any settings.
      state: with our names, see `renamings.to_ours`.
      contrastive: the head is none of classes.
    """
    settings = {}
    head = state.get(".".join((*net.classifier, "bias")))
    if head is not None and head.ndim == 1 and len(head) and not contrastive:
        settings["num_classes"] = len(head)
    return {**settings, **MODELS[net.name].settings_from_shapes(state)}


def told_settings(path: pathlib.Path, model: str, contents: object, where: str) -> tuple[dict, str]:
    """(settings that a file of training code tells although shapes do not, a note on them or "").

    Args:
      where: the mappings and the prefix of the weights, as `state_dicts.Found` has them.

    Raises:
      InputError: if it was trained by timm as a network that the model here is not.
    """
    said = options(contents)
    arguments, pools = said.get("model_kwargs") or {}, (said.get("gp"), said.get("global_pool"))
    timms = _timms_settings(f"{path} (its options)", model, "model_kwargs", arguments, pools)
    heads = timms.get("num_heads", said.get("num_heads"))
    if MODELS[model].takes("num_heads") and type(heads) is int and heads > 0:
        return {"num_heads": heads}, f"Its options say {heads} attention heads."
    if model == "vit_small_patch16_224" and is_moco_v3(contents, where):
        return {"num_heads": 12}, (
            "It is read as MoCo v3's ViT-S, which has 12 attention heads where timm's has 6; the weights do not show it "
            "(for 6, give settings={'num_heads': 6})."
        )
    return {}, ""


def is_moco_v3(contents: object, where: str) -> bool:
    """Whether names are those of MoCo v3's training: base_encoder, and vit_small or vit_base in its linear evaluation."""
    arch = contents.get("arch") if isinstance(contents, Mapping) else None
    return "base_encoder" in where or "momentum_encoder" in where or arch in ("vit_small", "vit_base")


def assumptions(model: str, settings: Mapping, known: Mapping, segments: bool, is_known: bool) -> Iterator[str]:
    """What is assumed of a network because its weights do not show it, in sentences.

    Args:
      settings: all, of which `known` were said by the file or the user.
      segments: the file also holds a head for segmentation.
      is_known: the file is a release, or says which model it is.
    """
    if MODELS[model].takes("stem") and "stem" not in known:
        if settings.get("stem") == "cifar":
            yield (
                "Its first convolution is 3x3: stride 1 and no max pool are assumed, which the weights do not show; "
                "if that is wrong, give settings={'stem': ...}: '3x3_pool', '3x3_stride2' or '3x3_stride2_pool'."
            )
        elif not is_known:
            yield (
                "A max pool after the first convolution, no dilation and no anti-aliasing are assumed, as in torchvision; "
                "the weights do not show it (for no pool, give settings={'stem': '7x7'})."
            )
    if segments:
        yield "It also holds a head for segmentation: such networks are often dilated, which is not heeded here."
    if model == "vit_small_patch16_224" and "num_heads" not in known and not is_known:
        yield (
            "6 attention heads are assumed, as in timm; MoCo v3's ViT-S has 12, and the weights do not show it "
            "(for 12, give settings={'num_heads': 12})."
        )


def guessed_preprocessing(
    path: pathlib.Path, model: str, settings: Mapping, is_moco: bool = False
) -> tuple[Preprocessing, str]:
    """(what a release of that name expects, of the settings' image size; a note if that is a guess, else "")."""
    name, named = telling_name(path), released_as(path)
    if settings.get("stem", "").startswith(("cifar", "3x3")):
        guess = Preprocessing(image_size=32)
        return (
            guess,
            "It does not say how its images were prepared: 32 pixels, and ImageNet's mean and std, are a guess.",
        )
    same = named is not None and _network(named[0]) == _network(model)
    found = named[1] if same else IMAGENET if is_moco else released_preprocessing(model)
    found = dataclasses.replace(found, image_size=settings.get("image_size", found.image_size))
    if same and is_release(name):
        return found, ""
    source = f"the file's name ({name})" if same else f"the name of the model ({model})"
    return found, (
        f"It does not say how its images were prepared: {found.image_size} pixels of {found.host_size}, {found.interpolation}, "
        f"mean {_rounded(found.mean)} and std {_rounded(found.std)} are a guess from {source}."
    )


def _rounded(values) -> str:
    return "/".join(f"{value:.3g}" for value in values)


def _network(model: str) -> str:
    """The model whose network it is: DeiT is ViT, trained otherwise."""
    return (model in MODELS and MODELS[model].network) or model


def is_another(model: str, other: str | None) -> bool:
    """Whether `other` is a different network."""
    return other is not None and _network(model) != _network(other)


def _ours(path, text) -> Description:
    try:
        return from_metadata(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: its metadata under 'jax_transfer' cannot be used ({_said(error)}); export it again."
        ) from error


def from_metadata(said: object) -> Description:
    """What metadata say, of an exported file or an epoch: {"model", "preprocessing", "source_accuracy", "has_head"}.

    "has_head": false says that the logits are of no classes, such as a contrastive projection; true if it is absent.

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
    has_head = said.get("has_head", True)
    if not isinstance(has_head, bool):
        raise InputError(f"has_head is {reprlib.repr(has_head)}")
    return Description("its metadata", model, settings, preprocessing, accuracy, has_head)


def _said(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _timms(path, beside) -> Description:
    """The config.json of a folder in the layout of timm's hub, unless the file's name says that it is another model."""
    try:
        said = json.loads(beside.read_text())
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{beside}: cannot be read as JSON ({_said(error)}); repair or remove it.") from error
    name = said.get("architecture") if isinstance(said, dict) else None
    if not isinstance(name, str):
        return Description()
    model = (released(name) or (name,))[0]
    named = released_as(path)
    if named and named[0] != model and not is_nameless(path):
        return Description()
    config = said.get("pretrained_cfg", said)  # older ones are flat
    try:
        mode = config.get("crop_mode", "center")
        preprocessing = _timms_preprocessing(config) if "input_size" in config else None
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise InputError(
            f"{beside}: its pretrained_cfg cannot be used ({_said(error)}); repair or remove it."
        ) from error
    pools = (said.get("global_pool"), config.get("global_pool"))
    settings = _timms_settings(beside, model, "model_args", said.get("model_args") or {}, pools)
    notes = (f"{beside} asks for crop_mode {mode!r}; images are cut to their centre instead.",) * (mode != "center")
    return Description(str(beside), model, settings, preprocessing, notes=notes)


def _timms_settings(where: object, model: str, called: str, arguments: object, pools: Collection[object]) -> dict:
    """Settings of a model that arguments of timm's give, such as those in a config.json.

    Args:
      where, called: the file that they are in and their name there, for messages.
      pools: what is said besides of `global_pool`.

    Raises:
      InputError: if they describe a network that the model here is not.
    """
    if not isinstance(arguments, Mapping):
        raise InputError(f"{where}: its {called} are {reprlib.repr(arguments)}; repair or remove it.")
    if model not in MODELS:  # `load_checkpoint` refuses it
        return {}
    spec = MODELS[model]
    for pool in (arguments.get("global_pool"), *pools):
        if isinstance(pool, str) and pool and pool not in spec.timm_pools:
            expected = spec.timm_pools[0]
            raise InputError(f"{where}: asks for global_pool {pool!r}; the features of {model} here are {expected!r}.")
    settings = {"num_heads": arguments["num_heads"]} if "num_heads" in arguments and spec.takes("num_heads") else {}
    others = set(arguments) - {*HARMLESS, *settings, "global_pool"}
    if others := sorted(str(name) for name in others if (name, arguments[name]) != ("output_stride", 32)):
        raise InputError(f"{where}: its {called} change the network by {', '.join(others)}, which {model} here lacks.")
    return settings


def _timms_preprocessing(config: Mapping) -> Preprocessing:
    height, size = (int(side) for side in config["input_size"][-2:])
    if height != size:
        raise ValueError(f"input_size {config['input_size']} is no square")
    resized = math.floor(size / config.get("crop_pct", 0.875))  # timm rounds down
    mean, std = tuple(config["mean"]), tuple(config["std"])
    return Preprocessing(size, size / resized, mean, std, config.get("interpolation", "bilinear"))
