"""What may be ranked: files, epochs, trajectories, folders and random initialisations, named but not read yet."""

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
from jax_transfer.models import MODELS, Net
from jax_transfer.records import InputError

# FILE=MODEL, FILE=MODEL?setting=value
FILE_AND_MODEL = re.compile(r"(?P<path>.+?)=(?P<model>\w+(\?[\w.=&]*)?)")
RANDOM = "random:"  # random:resnet18 is that model as it is initialised: what a checkpoint must beat


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One of the checkpoints to rank, not read yet.

    path: None for a random initialisation. model: as `load_checkpoint` takes it, such as "vit_small_patch16_224?num_heads=12".
    """

    name: str
    path: pathlib.Path | None
    model: str | None


def list_candidates(given: str | os.PathLike | Sequence[str | os.PathLike], model: str | None) -> list[Candidate]:
    """Lists what `checkpoints` of `rank` stands for, each named by the part of its path that tells it from the others.

    Raises:
      InputError: if there is none, one is given twice, or a name is not one of MODELS.
    """
    if model is not None:
        choose(MODELS, named(model)[0], "model (model)")
    found: list[tuple[pathlib.Path | None, str | None]] = []
    for one in map(str, [given] if isinstance(given, str | os.PathLike) else given):
        says = FILE_AND_MODEL.fullmatch(one)
        if one.startswith(RANDOM):
            found.append((None, _known_model(one.removeprefix(RANDOM), one)))
        elif says and named(says["model"])[0] in MODELS:
            found += [(p, says["model"]) for p in expand(says["path"])]
        else:
            found += [(p, None if describes_itself(p) else model) for p in expand(one)]
    if not found:
        raise InputError("checkpoints is empty: name at least one file or folder.")
    same = [path.resolve() if path else name for path, name in found]
    if twice := [place for place in dict.fromkeys(same) if same.count(place) > 1]:
        raise InputError(f"checkpoints names {twice[0]} twice.")
    paths = [path.absolute() for path, _ in found if path]
    common = pathlib.Path(os.path.commonpath([path.parent for path in paths])) if paths else None
    whole = [str(path.absolute().relative_to(common)) if path else f"random {name}" for path, name in found]
    short = [_short_name(path.absolute(), name) if path else name for (path, _), name in zip(found, whole, strict=True)]
    names = short if len(set(short)) == len(short) else whole
    return [Candidate(name, path, model) for name, (path, model) in zip(names, found, strict=True)]


def _short_name(path: pathlib.Path, name: str) -> str:
    """A file's name without its ending; the repository's name, such as timm/resnet50.a1_in1k, in the cache of a hub."""
    repository = next((part for part in path.parts if part.startswith("models--")), None)
    if repository and "snapshots" in path.parts:
        return repository.removeprefix("models--").replace("--", "/")
    endings = sorted((*ENDINGS, *ALSO_READ), key=len, reverse=True)
    ending = next((ending for ending in endings if name.lower().endswith(ending)), "")
    return name[: len(name) - len(ending)]


def _known_model(text: str, given: str) -> str:
    choose(MODELS, named(text)[0], f"model (checkpoint {given!r})")
    return text


def load(candidate: Candidate, overrides: dict, seed: int) -> Checkpoint:
    """Loads a candidate. `overrides` replace fields of its preprocessing; `seed` draws a random initialisation.

    Raises:
      InputError: if it cannot be read, or the preprocessing does not suit it.
    """
    if candidate.path is None:
        name, settings = named(candidate.model)
        net, preprocessing = _made(candidate, name, settings), released_preprocessing(name)
        if MODELS[name].takes("image_size"):  # which may be among the settings
            preprocessing = dataclasses.replace(preprocessing, image_size=net.min_image_size)
        params, stats = net.init(jax.random.key(seed))
        found = Checkpoint(candidate.name, net, params, stats, preprocessing, settings=settings, has_head=False)
    else:
        found = load_checkpoint(candidate.path, candidate.model)
    if "image_size" in overrides:
        found = at_image_size(found, overrides["image_size"])
    changed = Preprocessing.from_json({**found.preprocessing.to_json(), **overrides})
    if changed.image_size < found.net.min_image_size:
        raise InputError(
            f"{candidate.name}: image_size {changed.image_size} is too small; {found.net.name} needs at least "
            f"{found.net.min_image_size} pixels."
        )
    is_guess = found.preprocessing_is_guess and not changed.to_json().keys() <= overrides.keys()
    return dataclasses.replace(found, preprocessing=changed, preprocessing_is_guess=is_guess)


def _made(candidate: Candidate, name: str, settings: dict) -> Net:
    try:
        return MODELS[name](num_classes=1000, **settings)
    except (InputError, TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"{candidate.name}: {name} does not take the settings {settings} ({error}).") from error
