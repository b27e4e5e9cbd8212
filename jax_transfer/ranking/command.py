"""Ranks checkpoints from the command line: python -m jax_transfer.main --config=configs/rank_checkpoints.py"""

import dataclasses
import json
import pathlib
from typing import Annotated

import rich

from jax_transfer import devices, fields
from jax_transfer.analysis import score_named
from jax_transfer.data.sources import ON_CORRUPT
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.fields import Count, Few, Listed, OneOf, Parsed, StudyConfig, between, to_json
from jax_transfer.logs import log
from jax_transfer.ranking import page, result
from jax_transfer.ranking.candidates import Replaced
from jax_transfer.ranking.rank import DEFAULT_SCORES, rank
from jax_transfer.records import METRICS, InputError
from jax_transfer.results import lock_workdir, write_atomically


@dataclasses.dataclass(frozen=True)
class RankingFields:
    """Fields of configs/rank_checkpoints.py."""

    # Comma-separated files, folders, FILE=MODEL and random:MODEL, as in `rank`.
    checkpoints: str = ""
    # "source:name?option=value", such as folder:/my/images; see jax_transfer.data.sources.
    target: str = ""
    # A key of jax_transfer.models.MODELS, for files that do not name their model.
    model: str | None = None
    # Keys of jax_transfer.analysis.SCORES, with or without options ("knn?k=5").
    scores: tuple[Annotated[str, Parsed(score_named, "score")], ...] = DEFAULT_SCORES
    preprocessing: Replaced = Replaced()  # noqa: RUF009  frozen
    # "accuracy" or "mean_class_accuracy". Unset: the metric usually reported for the target, or accuracy if none is
    # known.
    metric: Annotated[str, OneOf(METRICS, "metric")] | None = None
    # Number of the best checkpoints to fine-tune as well, on the training images of the target.
    finetune: Annotated[int, between(0, 1000)] = 0
    # Numbers of training images of a class from which classifiers are made without training: (1, 5).
    shots: Annotated[tuple[Few, ...], Listed(unique=True)] = ()
    seed: Annotated[int, between(0, 2**31 - 1)] = 0
    batch_size: Count = 64
    # skip: damaged images are logged and skipped; error: stop at the first one.
    on_corrupt: Annotated[str, OneOf(dict.fromkeys(ON_CORRUPT), "treatment of corrupt images")] = "skip"


def default_config() -> StudyConfig:
    """Returns the config of a ranking with its default values.

    >>> default_config().batch_size
    64
    """
    return fields.section(fields.schema(RankingFields()))


def check(config: StudyConfig) -> None:
    """Checks all fields that can be checked without the checkpoints and images.

    Raises:
      InputError: if a field is invalid. The message names the field and says what was expected and what to do.

    >>> check(default_config())
    Traceback (most recent call last):
    jax_transfer.records.InputError: config.checkpoints is empty: ...
    """
    fields.check(config.to_dict(), fields.schema(RankingFields()), "config")
    if not _split_list(config.checkpoints):
        raise InputError("config.checkpoints is empty: set --config.checkpoints=a.safetensors,b.pth,run/checkpoints.")
    if not config.target:
        raise InputError(
            "config.target is empty: set --config.target=folder:/my/images, with one folder of images per class."
        )
    Preprocessing.from_json({"image_size": 224, **_replaced(config)})


def _split_list(checkpoints: str) -> list[str]:
    """Splits a comma-separated list."""
    return [part.strip() for part in checkpoints.split(",") if part.strip()]


def _replaced(config: StudyConfig) -> dict:
    """Returns the fields of `Preprocessing` that are set."""
    return {name: value for name, value in config.preprocessing.items() if value is not None}


def run(config: StudyConfig, workdir: pathlib.Path) -> None:
    """Ranks the checkpoints of a config, prints the table and writes the page and the CSV file to `workdir/report`.

    Raises:
      InputError: if the config is invalid (see `check`), or the ranking fails (see `rank`).
    """
    check(config)
    checkpoints = _split_list(config.checkpoints)
    lock = lock_workdir(workdir)
    devices.use_compilation_cache(workdir / "compilation_cache")
    try:
        write_atomically(workdir / "config.json", json.dumps(to_json(config), indent=1).encode())
        ranking = rank(
            checkpoints, config.target, config.model or None, config.scores, _replaced(config), config.seed,
            config.batch_size, config.on_corrupt, workdir, config.metric or None, config.finetune, tuple(config.shots),
        )  # fmt: skip
        written = page.write_page(ranking, workdir / "report")
        rich.print(result.table(ranking))
        log.info("Page: %s; table: %s", written, written.with_name("ranking.csv"))
    finally:
        lock.close()
