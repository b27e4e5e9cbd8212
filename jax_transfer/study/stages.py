"""The stages of a study, in order. They communicate only through the working directory, so each can run alone."""

import math
from collections.abc import Callable
from typing import NamedTuple

from jax_transfer.study import (
    features,
    fewshot,
    finetune,
    pretrain,
    probe,
    report,
    retrieval,
    scores,
    select,
    spectral,
    trust,
)
from jax_transfer.study.workspace import Workspace


class Stage(NamedTuple):
    """The functions of a stage, and the files that it writes.

    Attributes:
      run: computes what is missing in the working directory.
      writes: the files in `results/` to which it adds rows, as keys of `results.ROWS`.
      describe: returns the description of the stage for the plan.
      gigaflops: returns the GFLOP of its forward passes and training steps, for the times in the plan; NaN if unknown.
    """

    run: Callable[[Workspace], None]
    writes: tuple[str, ...]
    describe: Callable[[Workspace], str]
    gigaflops: Callable[[Workspace], float] = lambda work: math.nan


def written_by() -> dict[str, tuple[str, ...]]:
    """Returns result file -> the stages that write it, in the order of the stages.

    >>> written_by()["transfer"]
    ('probe', 'finetune')
    """
    files = dict.fromkeys(file for stage in STAGES.values() for file in stage.writes)
    return {file: tuple(name for name, stage in STAGES.items() if file in stage.writes) for file in files}


STAGES: dict[str, Stage] = {
    "pretrain": Stage(pretrain.run, ("pretrain",), pretrain.describe, pretrain.gigaflops),
    "features": Stage(features.run, (), features.describe, features.gigaflops),
    "select": Stage(select.run, ("selection", "overlap"), select.describe, select.gigaflops),
    "probe": Stage(probe.run, ("transfer",), probe.describe),
    "finetune": Stage(finetune.run, ("transfer",), finetune.describe, finetune.gigaflops),
    "fewshot": Stage(fewshot.run, ("fewshot",), fewshot.describe, fewshot.gigaflops),
    "retrieval": Stage(retrieval.run, ("retrieval",), retrieval.describe, retrieval.gigaflops),
    "scores": Stage(scores.run, ("scores",), scores.describe, scores.gigaflops),
    "spectral": Stage(spectral.run, ("spectral", "spectrum", "similarity", "embedding"), spectral.describe),
    "report": Stage(
        lambda work: report.run(work, written_by()), (*trust.FILES, "targets", "checkpoints"), report.describe
    ),
}
