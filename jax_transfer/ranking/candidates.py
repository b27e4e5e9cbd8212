"""What may be ranked: files, epochs, trajectories, folders and random initialisations, named but not read yet."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import jax

from jax_transfer.choose import choose
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models import (
    MODELS,
    Checkpoint,
    at_image_size,
    describes_itself,
    expand,
    load_checkpoint,
    released_preprocessing,
)
from jax_transfer.models.torch_weights import ALSO_READ, ENDINGS
from jax_transfer.records import InputError

RANDOM = "random:"  # random:resnet18 is that model as it is initialised: what a checkpoint must beat


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One of the checkpoints to rank, not read yet. `path` is None for a random initialisation."""

    name: str
    path: pathlib.Path | None
    model: str | None


def list_candidates(given: str | os.PathLike | Sequence[str | os.PathLike], model: str | None) -> list[Candidate]:
    """Lists what `checkpoints` of `rank` stands for, each named by the part of its path that tells it from the others.

    Raises:
      InputError: if there is none, one is given twice, or a name is not one of MODELS.
    """
    if model is not None:
        choose(MODELS, model, "model (model)")
    found: list[tuple[pathlib.Path | None, str | None]] = []
    for one in map(str, [given] if isinstance(given, str | os.PathLike) else given):
        path, mark, named = one.rpartition("=")
        if one.startswith(RANDOM):
            found.append((None, _model_named(one.removeprefix(RANDOM), one)))
        elif mark and named in MODELS:
            found += [(p, named) for p in expand(path)]
        else:
            found += [(p, None if describes_itself(p) else model) for p in expand(one)]
    if not found:
        raise InputError("checkpoints is empty: name at least one file or folder.")
    same = [path.resolve() if path else named for path, named in found]
    if twice := [place for place in dict.fromkeys(same) if same.count(place) > 1]:
        raise InputError(f"checkpoints names {twice[0]} twice.")
    paths = [path.absolute() for path, _ in found if path]
    common = pathlib.Path(os.path.commonpath([path.parent for path in paths])) if paths else None
    whole = [path.absolute().relative_to(common) if path else pathlib.Path(f"random {named}") for path, named in found]
    plain = [str(name.with_suffix("")) if name.suffix in (*ENDINGS, *ALSO_READ) else str(name) for name in whole]
    names = plain if len(set(plain)) == len(plain) else list(map(str, whole))
    return [Candidate(name, path, named) for name, (path, named) in zip(names, found, strict=True)]


def _model_named(name: str, given: str) -> str:
    choose(MODELS, name, f"model (checkpoint {given!r})")
    return name


def load(candidate: Candidate, overrides: dict, seed: int) -> Checkpoint:
    """Loads a candidate. `overrides` replace fields of its preprocessing; `seed` draws a random initialisation.

    Raises:
      InputError: if it cannot be read, or the preprocessing does not suit it.
    """
    if candidate.path is None:
        net = MODELS[candidate.model](num_classes=1000)
        settings, preprocessing = {}, released_preprocessing(candidate.model)
        if candidate.model.startswith("vit_tiny_patch"):  # the small ones take other images than the released
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
    return dataclasses.replace(found, preprocessing=changed)
