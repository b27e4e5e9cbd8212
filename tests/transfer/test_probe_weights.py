"""The weights that a probe returns are those of the classifiers that it tested."""

import dataclasses

import jax
import numpy as np
import pytest

from helpers.features import PROBE_SETTINGS, blobs
from jax_transfer.transfer import probe as probes
from jax_transfer.transfer.probe import PROTOCOLS, probe


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("candidates", (1, 2))
def test_returned_weights_reproduce_the_accuracy(name, candidates):
    (x, y), (x_test, y_test) = blobs()
    several = {"learning_rates": (0.01, 1e-4), "l2": (1e3, 1e-3)} if candidates > 1 else {}
    settings = dataclasses.replace(PROBE_SETTINGS, num_seeds=2, **several)
    arguments = PROTOCOLS[name], (x, y), (x_test, y_test), 3, settings, 0
    without = probe(*arguments)
    programs = probes._fit_and_count_jit._cache_size()
    found = probe(*arguments, keep_weights=True)
    assert probes._fit_and_count_jit._cache_size() == programs and without.weights is None
    for field in ("accuracy", "mean_class_accuracy", "chosen"):
        np.testing.assert_array_equal(getattr(found, field), getattr(without, field))
    w, b = found.weights["w"], found.weights["b"]
    assert w.shape == (2, 2, 6, 3) and b.shape == (2, 2, 3) and isinstance(w, np.ndarray)
    with jax.default_matmul_precision("float32"):
        predicted = (x_test[:, None] @ w + b[:, :, None]).argmax(-1)
    np.testing.assert_array_equal((predicted == y_test).mean(-1), found.accuracy)
    assert np.array_equal(w[:, 0], w[:, 1]) == PROTOCOLS[name].exact
