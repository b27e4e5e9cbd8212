"""A study, from its config to its report: `run(config, workdir)`."""

from jax_transfer.study.runner import run

__all__ = ["run"]
