"""Damage to files of weights; loading them must give finite weights or a one-line error that names the file."""

import contextlib
import pathlib
import resource
import warnings

import jax
import numpy as np
from hypothesis import strategies as st

from helpers.hostile import accepted_or_refused
from jax_transfer.checkpoints import describes_itself, load_checkpoint

GIGABYTE = 2**30
WHERE = st.floats(0, 0.9999)
MASK = st.integers(1, 255)


@contextlib.contextmanager
def bounded_memory(more=2 * GIGABYTE):
    """Limits further memory to `more` bytes: a file of a few kilobytes must not need more."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def load(kind, path, model="resnet10", limit=True):
    """Returns the checkpoint, or None if it is refused."""

    def use():
        describes_itself(path)
        with warnings.catch_warnings(), bounded_memory() if limit else contextlib.nullcontext():
            warnings.simplefilter("ignore")  # torch warns about unexpected contents
            return load_checkpoint(path, model)

    found = accepted_or_refused(kind, use, str(path), str(path.parent / "config.json"))
    if found is not None:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((found.params, found.stats)))
        assert found.preprocessing.image_size >= 1
    return found


def damaged(data, how, place, mask):
    """Returns the data truncated, with flipped bits, a piece repeated or overwritten, or longer."""
    at = int(place * len(data))
    return {
        "cut": data[:at],
        "turned": data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :],
        "doubled": data[:at] + data[at : at + mask] + data[at:],
        "filled": data[:at] + bytes([mask]) * mask + data[at + mask :],
        "longer": data + bytes([mask]) * mask,
    }[how]


HOW = st.sampled_from(("cut", "turned", "doubled", "filled", "longer"))
# Half of the damage is in the first hundredth, which contains the headers.
PLACE = st.one_of(WHERE, WHERE.map(lambda x: x / 100))
