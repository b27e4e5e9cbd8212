"""Finds the checkpoint that transfers best to your data, and explains why. See README.md."""

from jax_transfer import xla_flags

__version__ = "0.1.0"  # read by pyproject.toml; kept here so that an uninstalled checkout has a version too

xla_flags.set_flags()


def __getattr__(name: str):
    """Imports `rank`, `load_checkpoint` or `export` on first use, because importing JAX takes several seconds."""
    if name == "rank":
        from jax_transfer.ranking.rank import rank

        return rank
    if name in ("load_checkpoint", "export"):
        from jax_transfer import checkpoints

        return getattr(checkpoints, name)
    raise AttributeError(f"module 'jax_transfer' has no attribute {name!r}")
