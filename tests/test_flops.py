"""Operations in loops and branches count as often as they run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_transfer import devices, flops
from jax_transfer.analysis import SCORES
from jax_transfer.records import Features

SQUARE = jnp.eye(100)
PRODUCT = 2e-3  # gigaflops of the product of two 100 x 100 matrices


def test_straight_line_code_equals_the_compilers_count():
    def network(x, w, kernel):
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.sum(jax.nn.relu(y.reshape(4, -1)) @ w)

    args = jnp.ones((4, 8, 8, 16)), jnp.ones((8 * 8 * 32, 10)), jnp.ones((1, 1, 16, 32))
    np.testing.assert_allclose(flops.gigaflops(network, *args), devices.gigaflops(network, *args), rtol=0.02)


@pytest.mark.parametrize("turns", (0, 1, 7))
def test_loop_bodies_count_once_per_iteration(turns):
    @jax.jit
    def scanned(x):
        return jax.lax.scan(lambda c, _: (c @ x, None), x, length=turns)[0]

    def until(x, limit):  # the number of iterations is known only at run time
        return jax.lax.while_loop(lambda state: state[1] < limit, lambda state: (state[0] @ x, state[1] + 1), (x, 0))

    nested = jax.vmap(lambda x: jax.lax.fori_loop(0, turns, lambda i, c: scanned(c), x))
    np.testing.assert_allclose(flops.gigaflops(scanned, SQUARE), turns * PRODUCT, rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(flops.gigaflops(until, SQUARE, jnp.array(turns)), turns * PRODUCT, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(
        flops.gigaflops(nested, jnp.stack([SQUARE, SQUARE])), 2 * turns**2 * PRODUCT, rtol=1e-3, atol=1e-9
    )


def test_only_the_taken_branch_counts():
    def either(x, yes):
        return jax.lax.cond(yes, lambda: x @ x @ x, lambda: x @ x)

    np.testing.assert_allclose(flops.gigaflops(either, SQUARE, True), 2 * PRODUCT, rtol=1e-3)
    np.testing.assert_allclose(flops.gigaflops(either, SQUARE, False), PRODUCT, rtol=1e-3)


def test_factorisations_count():
    tall = jnp.ones((400, 100))
    qr = flops.gigaflops(lambda x: jnp.linalg.qr(x, mode="r"), tall)
    np.testing.assert_allclose(qr, 2e-9 * 100**2 * (400 - 100 / 3), rtol=0.05)
    np.testing.assert_allclose(flops.gigaflops(jnp.linalg.cholesky, SQUARE), 1e-9 * 100**3 / 3, rtol=0.2)
    assert flops.gigaflops(jnp.linalg.svd, SQUARE) > flops.gigaflops(lambda x: jnp.linalg.qr(x, mode="r"), SQUARE)


# Each differs from another score only in a number.
VARIANTS = ("mi_alpha_0.01", "mi_pca_alpha_0.01", "linear_5")
CASES = [pytest.param(name, marks=pytest.mark.slow) if name in VARIANTS else name for name in SCORES]


@pytest.mark.parametrize("name", CASES)
def test_gigaflops_of_every_score_grow_with_samples(name):
    def work(n):
        x, y = np.random.default_rng(0).normal(size=(n, 8)).astype(np.float32), np.arange(n) % 3
        features = Features(jnp.asarray(x), jnp.asarray(x), jnp.asarray(y, jnp.int32))
        return flops.gigaflops(functools.partial(SCORES[name], num_classes=3), features)

    assert work(400) > work(200) > 0
