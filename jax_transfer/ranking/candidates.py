"""Lists what can be ranked (files, epochs, trajectories, folders, random initialisations), and loads each one later."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Sequence

import jax

from jax_transfer.checkpoints import Checkpoint, at_image_size, describes_itself, expand, load_checkpoint
from jax_transfer.checkpoints.released import named, released_preprocessing
from jax_transfer.checkpoints.torch_files import ALSO_READ, ENDINGS
from jax_transfer.choose import choose
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.fields import Count, Positive
from jax_transfer.models import MODELS, Net
from jax_transfer.records import InputError

# FILE=MODEL, FILE=MODEL?setting=value
FILE_AND_MODEL = re.compile(r"(?P<path>.+?)=(?P<model>\w+(\?[\w.=&]*)?)")
RANDOM = "random:"  # random:resnet18 is an untrained ResNet-18, a baseline for the checkpoints


@dataclasses.dataclass(frozen=True)
class Replaced:
    """Preprocessing fields that replace those of the checkpoints. Fields that are not set replace nothing."""

    image_size: Count | None = None
    crop_fraction: Positive | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[Positive, ...] | None = None
    interpolation: str | None = None


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A checkpoint to rank, which has not been read yet.

    Attributes:
      name: display name.
      path: file or folder, or None for a random initialisation.
      model: the model, as in `load_checkpoint`, such as "vit_small_patch16_224?num_heads=12".
    """

    name: str
    path: pathlib.Path | None
    model: str | None


def list_candidates(given: str | os.PathLike | Sequence[str | os.PathLike], model: str | None) -> list[Candidate]:
    """Expands the argument `checkpoints` of `rank`, and names each checkpoint by the part of its path that is distinct.

    Args:
      given: files, epochs, trajectories, folders, `FILE=MODEL` and `random:MODEL`; a single one need not be in a list.
      model: key of MODELS, for files that do not name their model.

    Raises:
      InputError: if there is no checkpoint, if one is given twice, or if a model is not in MODELS.

    >>> [candidate.name for candidate in list_candidates(["a.safetensors=resnet18", "random:resnet18"], None)]
    ['a', 'random resnet18']
    """
    if model is not None:
        choose(MODELS, named(model)[0], "model (model)")
    expanded: list[tuple[pathlib.Path | None, str | None]] = []
    for text in map(str, [given] if isinstance(given, str | os.PathLike) else given):
        match = FILE_AND_MODEL.fullmatch(text)
        if text.startswith(RANDOM):
            expanded.append((None, _known_model(text.removeprefix(RANDOM), text)))
        elif match and named(match["model"])[0] in MODELS:
            expanded += [(path, match["model"]) for path in expand(match["path"])]
        else:
            expanded += [(path, None if describes_itself(path) else model) for path in expand(text)]
    if not expanded:
        raise InputError("checkpoints is empty: name at least one file or folder.")
    identities = [path.resolve() if path else name for path, name in expanded]
    if duplicates := [identity for identity in dict.fromkeys(identities) if identities.count(identity) > 1]:
        raise InputError(f"checkpoints lists {duplicates[0]} twice; remove one of them.")
    paths = [path.absolute() for path, _ in expanded if path]
    common = pathlib.Path(os.path.commonpath([path.parent for path in paths])) if paths else pathlib.Path()
    long_names = [str(path.absolute().relative_to(common)) if path else f"random {name}" for path, name in expanded]
    short_names = [
        _short_name(path.absolute(), name) if path else name
        for (path, _), name in zip(expanded, long_names, strict=True)
    ]
    names = short_names if len(set(short_names)) == len(short_names) else long_names
    return [Candidate(name, path, model) for name, (path, model) in zip(names, expanded, strict=True)]


def _short_name(path: pathlib.Path, name: str) -> str:
    """Returns a file's name without its ending or, in a hub's cache, its repository (timm/resnet50.a1_in1k)."""
    repository = next((part for part in path.parts if part.startswith("models--")), None)
    if repository and "snapshots" in path.parts:
        return repository.removeprefix("models--").replace("--", "/")
    endings = sorted((*ENDINGS, *ALSO_READ), key=len, reverse=True)
    ending = next((ending for ending in endings if name.lower().endswith(ending)), "")
    return name[: len(name) - len(ending)]


def _known_model(text: str, given: str) -> str:
    """Returns the model if it is in MODELS; raises an `InputError` otherwise."""
    choose(MODELS, named(text)[0], f"model (checkpoint {given!r})")
    return text


def load(candidate: Candidate, overrides: dict, seed: int, keep_projection: bool = False) -> Checkpoint:
    """Loads a candidate.

    Args:
      candidate: the checkpoint to load.
      overrides: fields of `Preprocessing` that replace those of the checkpoint.
      seed: seed of a random initialisation.
      keep_projection: as in `load_checkpoint`.

    Raises:
      InputError: if the checkpoint cannot be read, the preprocessing does not fit its model, or it lacks a projection
        that is to be kept.
    """
    if candidate.path is None:
        if keep_projection:
            raise InputError(f"{candidate.name}: a random initialisation has no projection.")
        name, settings = named(candidate.model or "")
        net, preprocessing = _make_net(candidate, name, settings), released_preprocessing(name)
        if MODELS[name].takes("image_size"):  # the settings may contain image_size
            preprocessing = dataclasses.replace(preprocessing, image_size=net.min_image_size)
        params, stats = net.init(jax.random.key(seed))
        checkpoint = Checkpoint(candidate.name, net, params, stats, preprocessing, settings=settings, has_head=False)
    else:
        checkpoint = load_checkpoint(candidate.path, candidate.model, keep_projection=keep_projection)
    if "image_size" in overrides:
        checkpoint = at_image_size(checkpoint, overrides["image_size"])
    changed = Preprocessing.from_json({**checkpoint.preprocessing.to_json(), **overrides})
    if changed.image_size < checkpoint.net.min_image_size:
        raise InputError(
            f"{candidate.name}: image_size {changed.image_size} is too small; {checkpoint.net.name} needs at least "
            f"{checkpoint.net.min_image_size} pixels."
        )
    is_guess = checkpoint.preprocessing_is_guess and not changed.to_json().keys() <= overrides.keys()
    return dataclasses.replace(checkpoint, preprocessing=changed, preprocessing_is_guess=is_guess)


def _make_net(candidate: Candidate, name: str, settings: dict) -> Net:
    """Builds the model of a random initialisation."""
    try:
        return MODELS[name](num_classes=1000, **settings)
    except (InputError, TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"{candidate.name}: {name} does not take the settings {settings} ({error}).") from error
