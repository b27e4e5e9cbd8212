"""Studies: `run(config, workdir)` runs a study from its config to its report."""

from jax_transfer.study.runner import run

__all__ = ["run"]
