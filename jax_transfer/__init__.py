"""Which checkpoint transfers best to my data, and why. See README.md."""

import importlib.metadata

__version__ = importlib.metadata.version("jax_transfer")
