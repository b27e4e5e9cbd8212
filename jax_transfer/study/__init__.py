"""Studies: `run(config, workdir)` does everything from the config to the report."""

from jax_transfer.study.runner import run

__all__ = ["run"]
