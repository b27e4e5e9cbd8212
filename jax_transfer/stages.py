"""The stages of a study, in their order. They talk only through the working directory, so each can run alone."""

import math
from collections.abc import Callable
from typing import NamedTuple

from jax_transfer import estimates
from jax_transfer.finetuning import finetunes
from jax_transfer.pretraining import pretrain
from jax_transfer.probing import describe_features, describe_probes, features, features_gigaflops, probes
from jax_transfer.reporting import report
from jax_transfer.scoring import scores
from jax_transfer.spectra import describe_spectral, spectral
from jax_transfer.workspace import Workspace


class Stage(NamedTuple):
    """A part of a study.

    run: does what is missing in the working directory.
    writes: the files in `results/` that it adds rows to, keys of `records.ROWS`.
    describe: what the plan says of it.
    gigaflops: its work as far as it is convolutions, for the time that the plan names; NaN where it is not known.
    """

    run: Callable[[Workspace], None]
    writes: tuple[str, ...]
    describe: Callable[[Workspace], str]
    gigaflops: Callable[[Workspace], float] = lambda work: math.nan


def written_by() -> dict[str, tuple[str, ...]]:
    """Returns result file -> the stages that write it, in the order of the stages."""
    files = dict.fromkeys(file for stage in STAGES.values() for file in stage.writes)
    return {file: tuple(name for name, stage in STAGES.items() if file in stage.writes) for file in files}


STAGES: dict[str, Stage] = {
    "pretrain": Stage(pretrain, ("pretrain",), estimates.describe_pretrain, estimates.pretrain_gigaflops),
    "features": Stage(features, (), describe_features, features_gigaflops),
    "probe": Stage(probes, ("transfer",), describe_probes),
    "finetune": Stage(finetunes, ("transfer",), estimates.checkpoints, estimates.finetune_gigaflops),
    "scores": Stage(scores, ("scores",), estimates.describe_scores, estimates.scores_gigaflops),
    "spectral": Stage(spectral, ("spectral", "spectrum", "similarity", "embedding"), describe_spectral),
    "report": Stage(lambda work: report(work, written_by()), ("ranking", "targets"), lambda work: "report/index.html"),
}
