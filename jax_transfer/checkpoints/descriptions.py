"""Determines the model, settings and preprocessing of a file, from its metadata, its name and its shapes."""

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

# File names that do not identify a model; the folder's name does, as in resnet50.a1_in1k/model.safetensors.
NAMELESS = ("model", "pytorch_model")
# The largest number of classes, channels or pixels that is accepted. Without this limit, a small file could request any
# amount of memory.
MOST_OF_A_SETTING = 100_000
# Keys under which training scripts save their options beside the weights, and keys of the model's name in the options.
OPTIONS = ("args", "opt", "options", "hparams", "hyper_parameters", "config", "cfg")
ARCHITECTURE = ("arch", "architecture", "model_name", "model", "backbone")
# Anti-aliased networks (Zhang, 2019, arXiv:1904.11486) have the same names and shapes as plain ones.
ANTI_ALIASED = re.compile(r"resne(t|xt|st)(aa|blur)|anti_?alias|blur_?pool|lpf\d", re.IGNORECASE)
# Arguments of timm's models in a config.json that are ignored: the weights' shapes show them, or only training uses
# them.
HARMLESS = ("img_size", "num_classes", "in_chans", "patch_size", "embed_dim", "depth", "drop_rate", "drop_path_rate",
            "proj_drop_rate", "attn_drop_rate", "patch_drop_rate", "drop_block_rate", "zero_init_last")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Description:
    """What a file states about itself; fields that it does not state are None or empty.

    Attributes:
      where: the source of the statements, for messages.
      model: a key of MODELS, or a name unknown to it.
      settings: arguments of the model.
      preprocessing: how images are prepared.
      source_accuracy: accuracy on the pre-training data in [0, 1].
      has_head: False if the logits do not stand for classes.
      notes: sentences on what was assumed when the file was written, and on statements that are ignored.
    """

    where: str = ""
    model: str | None = None
    settings: Mapping = dataclasses.field(default_factory=dict)
    preprocessing: Preprocessing | None = None
    source_accuracy: float | None = None
    has_head: bool = True
    notes: tuple[str, ...] = ()


def describe(path: pathlib.Path) -> Description:
    """Reads the description of a file from its metadata, if it was exported, or from timm's config.json beside it.

    No weights are read.

    Raises:
      InputError: if the metadata or the config.json cannot be read.
    """
    if torch_files.has_ending(path, (".safetensors",)):
        metadata = torch_files.read_metadata(path)
        if "jax_transfer" in metadata:
            return _from_export(path, metadata["jax_transfer"])
    beside = path.parent / "config.json"
    return _from_timm_config(path, beside) if beside.is_file() else Description()


def released_as(path: pathlib.Path) -> tuple[str, Preprocessing] | None:
    """Returns (model, preprocessing) of the release that a file's or its folder's name refers to, or None."""
    return released(identifying_name(path))


def identifying_name(path: pathlib.Path) -> str:
    """Returns the name that identifies a file.

    It is usually the name of the file. For a model.safetensors, it is the name of the folder or, in the cache of a hub
    (models--timm--resnet50.a1_in1k/snapshots/.../model.safetensors), the name of the repository.

    >>> identifying_name(pathlib.Path("resnet50.a1_in1k/model.safetensors"))
    'resnet50.a1_in1k'
    """
    if not is_nameless(path):
        return path.name
    parents = path.absolute().parents
    cached = [parent.name for parent in parents if parent.name.startswith("models--")]
    return cached[0].rpartition("--")[2] if cached else parents[0].name


def is_nameless(path: pathlib.Path) -> bool:
    """Returns whether a file has a name that does not identify a model, such as model.safetensors."""
    return path.name.partition(".")[0] in NAMELESS


def options(contents: object) -> dict:
    """Returns the options that a training script saved beside the weights; top-level keys override nested ones."""
    if not isinstance(contents, Mapping):
        return {}
    nested = [contents[name] for name in OPTIONS if isinstance(contents.get(name), Mapping)]
    top = {name: value for name, value in contents.items() if not isinstance(value, Mapping)}  # "model" may be weights
    return {name: value for mapping in (*reversed(nested), top) for name, value in mapping.items()}


def architecture_in_options(contents: object) -> str:
    """Returns the name of the model in the options of a file, or "" if there is none.

    >>> architecture_in_options({"args": {"arch": "resnet50"}, "state_dict": {}})
    'resnet50'
    """
    values = options(contents)
    return next((values[name] for name in ARCHITECTURE if isinstance(values.get(name), str)), "")


def check_plain(path: pathlib.Path, contents: object) -> None:
    """Checks that a network has no anti-aliased or dilated convolutions, which could not be seen in its weights.

    Raises:
      InputError: if its name or its options say that it has.
    """
    for name in (identifying_name(path), architecture_in_options(contents)):
        if ANTI_ALIASED.search(name):
            raise InputError(
                f"{path}: {name!r} is anti-aliased, which no model here is; use the weights of a plain network."
            )
    dilated = options(contents).get("replace_stride_with_dilation")
    if isinstance(dilated, list) and any(value is True for value in dilated):
        raise InputError(f"{path}: was trained with dilated stages ({dilated}), which no model here has.")


def settings_from_shapes(net: Net, state: State, contrastive: bool = False) -> dict:
    """Infers arguments of MODELS[net.name] from the shapes of the weights.

    These are num_classes, for every model, and the settings that its `Spec.settings_from_shapes` returns.

    Args:
      net: the model, with any settings.
      state: name -> array, with our names (see `renamings.to_ours`).
      contrastive: whether the head belongs to a contrastive method and does not classify.
    """
    settings = {}
    head = state.get(".".join((*net.classifier, "bias")))
    if head is not None and head.ndim == 1 and len(head) and not contrastive:
        settings["num_classes"] = len(head)
    return {**settings, **MODELS[net.name].settings_from_shapes(state)}


def settings_in_options(path: pathlib.Path, model: str, contents: object, where: str) -> tuple[dict, str]:
    """Returns the settings that the options of a file state and its shapes do not show, and a note on them (or "").

    Args:
      where: keys and prefix of the weights, see `state_dicts.Found`.

    Raises:
      InputError: if the options are timm's and describe a network that differs from the model here.
    """
    values = options(contents)
    arguments, pools = values.get("model_kwargs") or {}, (values.get("gp"), values.get("global_pool"))
    timm_settings = _timm_settings(f"{path} (its options)", model, "model_kwargs", arguments, pools)
    heads = timm_settings.get("num_heads", values.get("num_heads"))
    if MODELS[model].takes("num_heads") and type(heads) is int and heads > 0:
        return {"num_heads": heads}, f"Its options specify {heads} attention heads."
    if model == "vit_small_patch16_224" and is_moco_v3(contents, where):
        return {"num_heads": 12}, (
            "It is read as MoCo v3's ViT-S, which has 12 attention heads where timm's has 6; the weights do not show "
            "the number (for 6, give settings={'num_heads': 6})."
        )
    return {}, ""


def is_moco_v3(contents: object, where: str) -> bool:
    """Returns whether a file has names that MoCo v3 uses: base_encoder, or the arch vit_small or vit_base."""
    arch = contents.get("arch") if isinstance(contents, Mapping) else None
    return "base_encoder" in where or "momentum_encoder" in where or arch in ("vit_small", "vit_base")


def assumptions(model: str, settings: Mapping, known: Mapping, segments: bool, is_known: bool) -> Iterator[str]:
    """Yields sentences on what is assumed about a network because its weights do not show it.

    Args:
      settings: all settings of the model.
      known: the settings that the file or the user specified.
      segments: whether the file also holds a segmentation head.
      is_known: whether the file is a release or states its model.
    """
    if MODELS[model].takes("stem") and "stem" not in known:
        if settings.get("stem") == "cifar":
            yield (
                "Its first convolution is 3x3: stride 1 and no max pool are assumed, but the weights do not show them; "
                "if that is wrong, give settings={'stem': ...}: '3x3_pool', '3x3_stride2' or '3x3_stride2_pool'."
            )
        elif not is_known:
            yield (
                "A max pool after the first convolution, no dilation and no anti-aliasing are assumed, as in "
                "torchvision; the weights do not show them (for no pool, give settings={'stem': '7x7'})."
            )
    if segments:
        yield "It also holds a segmentation head: networks with one are often dilated, but dilation is ignored here."
    if model == "vit_small_patch16_224" and "num_heads" not in known and not is_known:
        yield (
            "6 attention heads are assumed, as in timm; MoCo v3's ViT-S has 12, and the weights do not show the number "
            "(for 12, give settings={'num_heads': 12})."
        )


def guessed_preprocessing(
    path: pathlib.Path, model: str, settings: Mapping, is_moco: bool = False
) -> tuple[Preprocessing, str]:
    """Returns the preprocessing of the release that a file's name refers to, and a note if it is a guess (else "").

    If there is no such release, the preprocessing of the model's usual release is returned. The image size is taken
    from `settings`.
    """
    name, release = identifying_name(path), released_as(path)
    if settings.get("stem", "").startswith(("cifar", "3x3")):
        return Preprocessing(image_size=32), (
            "It does not state its preprocessing: 32 pixels, and the mean and std of ImageNet, are a guess."
        )
    same = release is not None and _network(release[0]) == _network(model)
    guess = release[1] if release and same else IMAGENET if is_moco else released_preprocessing(model)
    guess = dataclasses.replace(guess, image_size=settings.get("image_size", guess.image_size))
    if same and is_release(name):
        return guess, ""
    source = f"the name of the file ({name})" if same else f"the name of the model ({model})"
    return guess, (
        f"It does not state its preprocessing: {guess.image_size} of {guess.host_size} pixels, {guess.interpolation}, "
        f"mean {_rounded(guess.mean)} and std {_rounded(guess.std)} are a guess from {source}."
    )


def _rounded(values) -> str:
    """Formats numbers for messages, as in 0.485/0.456/0.406."""
    return "/".join(f"{value:.3g}" for value in values)


def _network(model: str) -> str:
    """Returns the name of the model with the same network; for example, DeiT is a ViT that is trained differently."""
    return (model in MODELS and MODELS[model].network) or model


def is_another(model: str, other: str | None) -> bool:
    """Returns whether `other` is given and is a different network."""
    return other is not None and _network(model) != _network(other)


def _from_export(path, text) -> Description:
    """Reads the metadata of an exported file."""
    try:
        return from_metadata(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: its metadata under 'jax_transfer' cannot be used ({_first_line(error)}); export it again."
        ) from error


def from_metadata(metadata: object) -> Description:
    """Reads the metadata of an exported file or an epoch: {"model", "preprocessing", "source_accuracy", "has_head",
    "notes"}.

    "has_head" is false if the logits do not stand for classes but are, for example, a contrastive projection. It is
    true by default.

    Raises:
      InputError: if a field has the wrong type or a number that no model can have.

    >>> from_metadata({"model": {"name": "resnet18", "num_classes": 10}}).model
    'resnet18'
    """
    if not isinstance(metadata, Mapping) or not isinstance(metadata.get("model", {}), Mapping):
        raise InputError(f"expected a mapping from fields to values, got {reprlib.repr(metadata)}")
    settings = dict(metadata.get("model", {}))
    model = settings.pop("name", None)
    if not isinstance(model, str | None):
        raise InputError(f"the name of its model is {reprlib.repr(model)}")
    for name, value in settings.items():
        if not isinstance(value, str | int | float | None) or not (
            isinstance(value, str | None) or 0 <= value <= MOST_OF_A_SETTING
        ):
            raise InputError(f"its model's {name} is {reprlib.repr(value)}")
    preprocessing = Preprocessing.from_json(metadata["preprocessing"]) if metadata.get("preprocessing") else None
    accuracy = metadata.get("source_accuracy")
    if not isinstance(accuracy, int | float | None):
        raise InputError(f"the source accuracy is {reprlib.repr(accuracy)}")
    has_head = metadata.get("has_head", True)
    if not isinstance(has_head, bool):
        raise InputError(f"has_head is {reprlib.repr(has_head)}")
    notes = metadata.get("notes", [])
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise InputError(f"the notes are {reprlib.repr(notes)}")
    return Description("its metadata", model, settings, preprocessing, accuracy, has_head, tuple(notes))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _from_timm_config(path, beside) -> Description:
    """Reads the config.json in a folder from timm's hub, unless the name of the file refers to another model."""
    try:
        config_json = json.loads(beside.read_text())
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{beside}: cannot be read as JSON ({_first_line(error)}); repair or remove it.") from error
    name = config_json.get("architecture") if isinstance(config_json, dict) else None
    if not isinstance(name, str):
        return Description()
    model = (released(name) or (name,))[0]
    release = released_as(path)
    if release and release[0] != model and not is_nameless(path):
        return Description()
    config = config_json.get("pretrained_cfg", config_json)  # older files are flat
    try:
        mode = config.get("crop_mode", "center")
        preprocessing = _timm_preprocessing(config) if "input_size" in config else None
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise InputError(
            f"{beside}: its pretrained_cfg cannot be used ({_first_line(error)}); repair or remove it."
        ) from error
    pools = (config_json.get("global_pool"), config.get("global_pool"))
    settings = _timm_settings(beside, model, "model_args", config_json.get("model_args") or {}, pools)
    notes = (f"{beside} asks for crop_mode {mode!r}; a centre crop is used instead.",) * (mode != "center")
    return Description(str(beside), model, settings, preprocessing, notes=notes)


def _timm_settings(where: object, model: str, field: str, arguments: object, pools: Collection[object]) -> dict:
    """Returns the settings of a model that correspond to arguments of timm's model, such as those in a config.json.

    Args:
      where, field: the file and the field that hold the arguments, for messages.
      pools: further values of `global_pool`.

    Raises:
      InputError: if they describe a network that differs from the model here.
    """
    if not isinstance(arguments, Mapping):
        raise InputError(f"{where}: its {field} are {reprlib.repr(arguments)}; repair or remove it.")
    if model not in MODELS:  # `load_checkpoint` rejects it
        return {}
    spec = MODELS[model]
    for pool in (arguments.get("global_pool"), *pools):
        if isinstance(pool, str) and pool and pool not in spec.timm_pools:
            expected = spec.timm_pools[0]
            raise InputError(f"{where}: asks for global_pool {pool!r}; the features of {model} here are {expected!r}.")
    settings = {"num_heads": arguments["num_heads"]} if "num_heads" in arguments and spec.takes("num_heads") else {}
    others = set(arguments) - {*HARMLESS, *settings, "global_pool"}
    if others := sorted(str(name) for name in others if (name, arguments[name]) != ("output_stride", 32)):
        raise InputError(f"{where}: its {field} change the network by {', '.join(others)}, which {model} here lacks.")
    return settings


def _timm_preprocessing(config: Mapping) -> Preprocessing:
    """Converts timm's pretrained_cfg to a `Preprocessing`."""
    height, size = (int(side) for side in config["input_size"][-2:])
    if height != size:
        raise ValueError(f"input_size {config['input_size']} is not square")
    resized = math.floor(size / config.get("crop_pct", 0.875))  # timm rounds down
    mean, std = tuple(config["mean"]), tuple(config["std"])
    return Preprocessing(size, size / resized, mean, std, config.get("interpolation", "bilinear"))
