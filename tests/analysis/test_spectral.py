"""Spectral components, similarities and t-SNE: against numpy, their properties, and a probe on planted signals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from jax_transfer.analysis import spectral
from jax_transfer.analysis.embedding import tsne
from jax_transfer.analysis.spectral import batched_spectral_components, similarities, spectral_components
from jax_transfer.records import InputError
from jax_transfer.transfer.probe import PROTOCOLS, ProbeSettings, probe


def power_law(n, d, decay=1.0, seed=0):
    """Returns features [n, d] float64, not centred, with singular values near i^-decay."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) * np.arange(1, d + 1) ** -decay @ rng.normal(size=(d, d)) / d**0.5 + 0.1


SHAPES = pytest.mark.parametrize("shape", [(300, 40), (40, 300), (64, 64), (1, 9), (9, 1)], ids=str)


def numpy_components(x, energy=0.8):
    u, s, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    k = int(np.argmax(np.cumsum(s) >= energy * s.sum() * (1 - 1e-6))) + 1
    return u[:, :k] * s[:k] @ vt[:k], k, s


@SHAPES
def test_components_equal_numpy_svd(shape):
    x = power_law(*shape)
    main, rank, s = numpy_components(x)
    found = spectral_components(jnp.asarray(x, jnp.float32))
    assert int(found.rank) == rank
    np.testing.assert_allclose(found.singular_values, s, rtol=1e-4, atol=1e-6 * s[0])
    np.testing.assert_allclose(found.main, main, atol=1e-4 * np.abs(x).max())
    np.testing.assert_allclose(found.main + found.residual, x.astype(np.float32), atol=1e-6 * np.abs(x).max())


@SHAPES
@pytest.mark.parametrize("energy", (0.3, 0.8, 1.0))
def test_rank_is_the_smallest_that_reaches_the_energy(shape, energy):
    found = spectral_components(jnp.asarray(power_law(*shape, decay=0.5, seed=1), jnp.float32), energy)
    s, k = np.asarray(found.singular_values, np.float64), int(found.rank)
    assert s[:k].sum() >= energy * s.sum() * (1 - 2e-6)
    assert k == 1 or s[: k - 1].sum() < energy * s.sum()


def test_eight_of_ten_equal_singular_values_hold_80_percent():
    assert int(spectral_components(3.7 * jnp.eye(10)).rank) == 8
    assert int(spectral.main_rank(jnp.full(1000, 0.1))) == 800


def test_components_are_orthogonal_and_main_is_best_of_its_rank():
    x = power_law(200, 30)
    found = spectral_components(jnp.asarray(x, jnp.float32))
    assert np.abs(np.asarray(found.main).T @ np.asarray(found.residual)).max() < 1e-4 * np.abs(x.T @ x).max()
    # Eckart and Young: the residual of the best matrix of this rank has the norm of the remaining singular values.
    s = np.linalg.svd(x, compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(found.residual), np.linalg.norm(s[int(found.rank) :]), rtol=1e-4)


def test_rotating_the_columns_rotates_the_components():
    x = power_law(200, 30)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(30, 30)))[0]
    plain, rotated = (spectral_components(jnp.asarray(v, jnp.float32)) for v in (x, x @ rotation))
    assert int(plain.rank) == int(rotated.rank)
    for name in ("main", "residual"):
        np.testing.assert_allclose(getattr(plain, name) @ rotation, getattr(rotated, name), atol=2e-5)


@pytest.mark.parametrize("n", (512, 500, 128, 100, 129))
@pytest.mark.parametrize("d", (20, 200))
def test_batches_equal_a_numpy_loop(n, d):
    x = power_law(n, d)
    found = batched_spectral_components(jnp.asarray(x, jnp.float32), batch_size=128)
    for i, start in enumerate(range(0, n, 128)):
        main, rank, s = numpy_components(x[start : start + 128])
        assert int(found.rank[i]) == rank
        np.testing.assert_allclose(found.main[start : start + 128], main, atol=1e-4 * np.abs(x).max())
        np.testing.assert_allclose(found.singular_values[i, : len(s)], s, rtol=1e-4, atol=1e-6 * s[0])
        assert not np.any(found.singular_values[i, len(s) :])
    assert len(found.rank) == -(-n // 128)
    np.testing.assert_allclose(found.main + found.residual, x.astype(np.float32), atol=1e-6 * np.abs(x).max())


def test_one_batch_equals_the_whole_matrix():
    x = jnp.asarray(power_law(90, 20), jnp.float32)
    whole, batch = spectral_components(x), batched_spectral_components(x, batch_size=1000)
    np.testing.assert_allclose(whole.main, batch.main, atol=1e-6)
    assert int(batch.rank[0]) == int(whole.rank)


def test_jit_and_vmap_equal_the_loop():
    x = jnp.stack([jnp.asarray(power_law(60, 20, seed=i), jnp.float32) for i in range(3)])
    together = jax.jit(jax.vmap(spectral_components))(x)
    for i in range(3):
        alone = spectral_components(x[i])
        assert int(alone.rank) == int(together.rank[i])
        np.testing.assert_allclose(alone.main, together.main[i], atol=1e-5)


@pytest.mark.parametrize("scale", (1e-30, 1e30))
def test_components_scale_with_the_features(scale):
    x = power_law(60, 20)
    plain, scaled = (spectral_components(jnp.asarray(v, jnp.float32)) for v in (x, x * scale))
    assert int(plain.rank) == int(scaled.rank)
    np.testing.assert_allclose(scaled.main / scale, plain.main, atol=1e-5)


def test_zeros_stay_finite_and_non_finite_features_give_nan():
    zeros = spectral_components(jnp.zeros((7, 3)))
    assert not np.any(zeros.main) and not np.any(zeros.residual) and int(zeros.rank) == 1
    for bad in (jnp.nan, jnp.inf):
        found = spectral_components(jnp.ones((7, 3)).at[2, 1].set(bad))
        assert np.isnan(found.main).all() and np.isnan(found.singular_values).all()


def test_probe_finds_residual_signal_but_not_in_main():
    """Large directions do not depend on the label, small ones do."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 1000).astype(np.int32)
    x = np.concatenate([rng.normal(size=(1000, 12)) * 8, np.eye(2)[y] * 2 + 0.5 * rng.normal(size=(1000, 2))], axis=1)
    x = (x @ np.linalg.qr(rng.normal(size=(14, 14)))[0]).astype(np.float32)
    found = spectral_components(jnp.asarray(x))
    stack = np.stack([x, found.main, found.residual])
    settings = ProbeSettings(epochs=50, batch_size=100)
    result = probe(PROTOCOLS["probe"], (stack[:, :600], y[:600]), (stack[:, 600:], y[600:]), 2, settings, seed=0)
    full, main, residual = result.accuracy[:, 0]
    assert residual > 0.9 and main < 0.65 and full > 0.9


# --- spectra and similarities


def test_singular_values_equal_numpy():
    x = power_law(50, 20)
    np.testing.assert_allclose(
        spectral.singular_values(jnp.asarray(x, jnp.float32)), np.linalg.svd(x, compute_uv=False), rtol=1e-4
    )


def test_effective_rank_counts_equal_directions():
    assert float(spectral.effective_rank(jnp.array([2.0, 0, 0]))) == pytest.approx(1)
    assert float(spectral.effective_rank(jnp.full(7, 0.3))) == pytest.approx(7, rel=1e-5)
    assert float(spectral.effective_rank(jnp.zeros(4))) == pytest.approx(1)
    between = float(spectral.effective_rank(jnp.array([3.0, 1, 0.1])))
    p = np.array([3.0, 1, 0.1]) / 4.1
    assert between == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5)


@pytest.mark.parametrize("exponent", (0.5, 2.0))
def test_decay_is_the_exponent_of_a_power_law(exponent):
    s = 5.0 * jnp.arange(1, 200) ** -exponent
    assert float(spectral.spectral_decay(s)) == pytest.approx(exponent, rel=1e-3)
    assert float(spectral.spectral_decay(jnp.concatenate([s, jnp.full(50, 1e-9)]))) == pytest.approx(exponent, rel=1e-3)
    assert float(spectral.spectral_decay(jnp.array([3.0, 0]))) == 0


def numpy_cka(a, b):
    a, b = a - a.mean(0), b - b.mean(0)
    norm = np.linalg.norm
    return norm(a.T @ b) ** 2 / (norm(a.T @ a) * norm(b.T @ b))


def test_similarities_equal_numpy():
    x = np.stack([power_law(80, 30, decay, seed) for seed, decay in enumerate((0.3, 1.0, 1.5))])
    found = similarities(jnp.asarray(x, jnp.float32))
    bases = [np.linalg.svd(one)[0][:, : numpy_components(one)[1]] for one in x]
    for i in range(3):
        for j in range(3):
            assert float(found.cka[i, j]) == pytest.approx(numpy_cka(x[i], x[j]), abs=1e-4)
            cosines = np.cos(scipy.linalg.subspace_angles(bases[i], bases[j]))
            assert float(found.overlap[i, j]) == pytest.approx((cosines**2).mean(), abs=1e-3)


def test_similarities_between_parts_equal_the_whole_matrix():
    x = jnp.stack([jnp.asarray(power_law(60, 20, decay), jnp.float32) for decay in (0.3, 0.8, 1.0, 1.2, 1.5)])
    whole, part = similarities(x), similarities(x[:2], x[2:])
    np.testing.assert_allclose(part.cka, whole.cka[:2, 2:], rtol=1e-5)
    np.testing.assert_allclose(part.overlap, whole.overlap[:2, 2:], rtol=1e-5)


def test_similarities_are_invariant_to_rotation_and_scale():
    a = power_law(40, 20)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(20, 20)))[0]
    narrow = np.concatenate([a[:, :10], 0 * a[:, 10:]], axis=1)
    x = jnp.asarray(np.stack([a, 1e6 * a @ rotation, narrow]), jnp.float32)
    found = similarities(x)
    for matrix in (found.cka, found.overlap):
        assert float(matrix[0, 1]) == pytest.approx(1, abs=1e-4)
        assert float(matrix[0, 2]) < 0.999
        np.testing.assert_allclose(np.diag(matrix), 1, atol=1e-4)


# --- t-SNE


def test_tsne_separates_classes_and_is_deterministic():
    rng = np.random.default_rng(0)
    y = np.arange(90) % 3
    x = 20 * np.eye(3)[y] @ rng.normal(size=(3, 8)) + rng.normal(size=(90, 8))
    points = tsne(x, seed=1)
    assert points.shape == (90, 2)
    centres = np.stack([points[y == c].mean(0) for c in range(3)])
    assert np.mean(np.linalg.norm(points[:, None] - centres, axis=2).argmin(1) == y) > 0.95
    np.testing.assert_array_equal(points, tsne(x, seed=1))


@pytest.mark.parametrize(("x", "message"), [(np.ones((3, 2)), "3 samples"), (np.full((9, 2), np.nan), "NaN")])
def test_tsne_rejects_too_few_samples_and_nan(x, message):
    with pytest.raises(InputError, match=message):
        tsne(x)
