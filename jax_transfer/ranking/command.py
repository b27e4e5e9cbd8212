"""Ranking by the command: python -m jax_transfer.main --config=configs/rank_checkpoints.py"""

import dataclasses
import json
import pathlib
from typing import Annotated

import rich
from ml_collections import ConfigDict

from jax_transfer import devices, fields
from jax_transfer.analysis import SCORES
from jax_transfer.data.sources import ON_CORRUPT
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.fields import Count, OneOf, Positive, between, to_json
from jax_transfer.logs import log
from jax_transfer.ranking import page, result
from jax_transfer.ranking.rank import DEFAULT_SCORES, rank
from jax_transfer.records import METRICS, InputError
from jax_transfer.results import lock_workdir, write_atomically


@dataclasses.dataclass(frozen=True)
class Replaced:
    """What is set here replaces what comes with the checkpoints; the fields are those of a study."""

    image_size: Count | None = None
    crop_fraction: Positive | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[Positive, ...] | None = None
    interpolation: str | None = None


@dataclasses.dataclass(frozen=True)
class RankingFields:
    """The fields of configs/rank_checkpoints.py."""

    # Separated by commas: files, folders, FILE=MODEL and random:MODEL, as `rank` takes them.
    checkpoints: str = ""
    # "source:name?option=value", such as folder:/my/images; see jax_transfer.data.sources.
    target: str = ""
    # A key of jax_transfer.models.MODELS, for files that do not say which model they are.
    model: str | None = None
    # Keys of jax_transfer.analysis.SCORES.
    scores: tuple[Annotated[str, OneOf(SCORES, "score")], ...] = DEFAULT_SCORES
    preprocessing: Replaced = Replaced()
    # "accuracy" or "mean_class_accuracy"; unset: what the field reports for the target, accuracy where nothing is known.
    metric: Annotated[str, OneOf(METRICS, "metric")] | None = None
    seed: Annotated[int, between(0, 2**31 - 1)] = 0
    batch_size: Count = 64
    # skip: damaged images are named and left out; error: stop at the first.
    on_corrupt: Annotated[str, OneOf(dict.fromkeys(ON_CORRUPT), "treatment of corrupt images")] = "skip"


def default_config() -> ConfigDict:
    """The fields of configs/rank_checkpoints.py."""
    return fields.section(fields.schema(RankingFields()))


def check(config: ConfigDict) -> None:
    """Checks every field, name and number that needs neither the checkpoints nor the images.

    Raises:
      InputError: naming the field, what was expected and what to do.
    """
    fields.check(config.to_dict(), fields.schema(RankingFields()), "config")
    if not _listed(config.checkpoints):
        raise InputError("config.checkpoints is empty: --config.checkpoints=a.safetensors,b.pth,run/checkpoints")
    if not config.target:
        raise InputError(
            "config.target is empty: --config.target=folder:/my/images, with a folder of images per class."
        )
    Preprocessing.from_json({"image_size": 224, **_replaced(config)})


def _listed(checkpoints: str) -> list[str]:
    return [part.strip() for part in checkpoints.split(",") if part.strip()]


def _replaced(config: ConfigDict) -> dict:
    """The fields of `Preprocessing` that are set."""
    return {name: value for name, value in config.preprocessing.items() if value is not None}


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Ranks what the config names, prints the table and writes the page and the CSV file into `workdir/report`.

    Raises:
      InputError: as `rank` and `check`.
    """
    check(config)
    checkpoints = _listed(config.checkpoints)
    lock = lock_workdir(workdir)
    devices.use_compilation_cache(workdir / "compilation_cache")
    try:
        write_atomically(workdir / "config.json", json.dumps(to_json(config), indent=1).encode())
        found = rank(
            checkpoints, config.target, config.model or None, config.scores, _replaced(config), config.seed,
            config.batch_size, config.on_corrupt, workdir, config.metric or None,
        )  # fmt: skip
        written = page.write_page(found, workdir / "report")
        rich.print(result.table(found))
        log.info("Page: %s; the table: %s", written, written.with_name("ranking.csv"))
    finally:
        lock.close()
