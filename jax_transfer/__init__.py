"""Which checkpoint transfers best to my data, and why. See README.md."""

import importlib.metadata

__version__ = importlib.metadata.version("jax_transfer")


def __getattr__(name: str):
    """`jax_transfer.rank`, imported when it is asked for: JAX and the data sets take seconds to import."""
    if name == "rank":
        from jax_transfer.rank_checkpoints import rank  # not rank.py: the module would hide the function

        return rank
    raise AttributeError(f"module 'jax_transfer' has no attribute {name!r}")
