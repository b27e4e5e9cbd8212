"""Checkpoints as training code saves them with torch, and the weights that must be loaded from them."""

import jax
import numpy as np
import pytest

from helpers.checkpoint_files import NET, state
from jax_transfer.checkpoints import load_checkpoint, torch_weights

PARAMS, STATS, _ = torch_weights.from_torch(state(), NET, "x")


def tensors(weights=None, prefix="", **more):
    """Returns torch tensors of `weights` (by default the state of NET), with a prefix before their names."""
    torch = pytest.importorskip("torch")
    named = {prefix + name: x for name, x in (weights or state()).items()} | more
    return {name: torch.as_tensor(np.array(x)) for name, x in named.items()}


def other_tensors(prefix=""):
    """Returns weights with the same names and shapes that must not be loaded."""
    return tensors({name: np.full_like(x, 9) for name, x in state().items()}, prefix)


def save_and_load(tmp_path, contents, name="resnet10.pth", model="resnet10", **options):
    torch = pytest.importorskip("torch")
    torch.save(contents, tmp_path / name)
    return load_checkpoint(tmp_path / name, model, **options)


def assert_holds_state(checkpoint, head=True):
    """Asserts that the weights are the state of NET; without `head`, those of the head are not compared."""
    expected, params = (
        tree if head else {name: x for name, x in tree.items() if name != "fc"} for tree in (PARAMS, checkpoint.params)
    )
    jax.tree.map(np.testing.assert_array_equal, (params, checkpoint.stats), (expected, STATS))
    assert checkpoint.has_head == head
