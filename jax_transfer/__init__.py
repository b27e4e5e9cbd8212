"""Which checkpoint transfers best to my data, and why. See README.md."""

__version__ = "0.1.0"  # pyproject.toml reads it here, so a checkout that is not installed has one too


def __getattr__(name: str):
    """`rank`, `load_checkpoint` and `export`, imported when asked for: JAX and the data sets take seconds to import."""
    if name == "rank":
        from jax_transfer.ranking.rank import rank

        return rank
    if name in ("load_checkpoint", "export"):
        from jax_transfer import checkpoints

        return getattr(checkpoints, name)
    raise AttributeError(f"module 'jax_transfer' has no attribute {name!r}")
