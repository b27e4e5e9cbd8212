"""Loads an epoch of a trajectory (Orbax) or a file of torch weights as a `Checkpoint`, and exports checkpoints."""

from jax_transfer.checkpoints.checkpoint import Checkpoint, at_image_size, with_classes
from jax_transfer.checkpoints.export import export
from jax_transfer.checkpoints.folders import expand
from jax_transfer.checkpoints.load import describes_itself, load_checkpoint

__all__ = ["Checkpoint", "at_image_size", "describes_itself", "expand", "export", "load_checkpoint", "with_classes"]
