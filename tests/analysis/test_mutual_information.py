"""I_alpha: the bound against slow numpy and known mutual information, and the trained estimate against the truth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_transfer.analysis.mutual_information import interpolated_bound, mutual_information
from jax_transfer.records import InputError


def score(x, y, num_classes, seed=0, **static):
    return float(
        mutual_information(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32), num_classes, seed=seed, **static)
    )


def log_posteriors(x, means):
    """Returns log p(c | x) for equally likely classes N(mean_c, 1)."""
    joint = x @ means.T - 0.5 * np.sum(means**2, axis=1)
    top = joint.max(axis=-1, keepdims=True)
    return joint - top - np.log(np.sum(np.exp(joint - top), axis=-1, keepdims=True))


def gaussians(n, means, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, len(means), n)
    return means[y] + rng.normal(size=(n, means.shape[1])), y


def information_of_classes(means):
    x, y = gaussians(200_000, means, seed=99)
    return np.mean(log_posteriors(x, means)[np.arange(len(y)), y]) + np.log(len(means))


def information_of_two(distance):
    """Returns I(x; y) of N(0, 1) and N(distance, 1), equally likely, by quadrature."""
    x = np.linspace(-10, 10 + distance, 20_001)
    p, q = (np.exp(-0.5 * (x - m) ** 2) / np.sqrt(2 * np.pi) for m in (0, distance))
    mixture = (p + q) / 2
    return np.trapezoid((p * np.log(p / mixture) + q * np.log(q / mixture)) / 2, x)


FIVE = 0.4 * np.random.default_rng(5).normal(size=(5, 12))
FIVE_INFORMATION = information_of_classes(FIVE)
CLOSE = np.zeros((2, 12))  # three classes are missing: the shapes equal those of FIVE, which saves a compilation
CLOSE[1, 0] = 2
FAR = 12 * np.eye(64)  # 64 classes that x determines: log 64 = 4.16 nats
FAR_X, FAR_Y = gaussians(1500, FAR)


@pytest.mark.parametrize("alpha", (0.01, 0.5, 1.0))
def test_bound_equals_slow_numpy(alpha):
    rng = np.random.default_rng(0)
    f, y, log_q = 3 * rng.normal(size=(7, 4)), rng.integers(0, 4, 7), rng.normal(size=4)
    independent_labels = (0, 1, 1, 3)

    def a(c):
        return alpha * np.mean([np.exp(f[i, c]) for i in range(7)]) + (1 - alpha) * np.exp(log_q[c])

    joint = np.mean([np.log(np.exp(f[i, y[i]]) / a(y[i])) for i in range(7)])
    marginal = np.mean([np.exp(f[i, c]) / a(c) for i in range(7) for c in independent_labels])
    shares = jnp.asarray(np.bincount(independent_labels, minlength=4) / 4)
    value = interpolated_bound(jnp.asarray(f), jnp.asarray(y), jnp.asarray(log_q), shares, alpha)
    np.testing.assert_allclose(value, 1 + joint - marginal, rtol=1e-5)


@functools.cache
def mean_bound(k, alpha, temperature=1.0, blocks=20_000):
    """Returns the mean and standard error of the bound, and I(x; y).

    The critic is the true log density ratio times `temperature`.
    """
    means = 4.0 * np.arange(16)[:, None]
    x, y = gaussians(blocks * (k + 1), means, seed=1)
    ratio = log_posteriors(x, means) + np.log(16)
    information = np.mean(ratio[np.arange(len(y)), y])
    scores = jnp.asarray(temperature * ratio.reshape(blocks, k + 1, 16), jnp.float32)
    y = jnp.asarray(y.reshape(blocks, k + 1))
    shares = jax.nn.one_hot(y[:, k], 16)  # the label of a sample outside the block
    bound = jax.vmap(lambda scores, y, shares: interpolated_bound(scores, y, jnp.zeros(16), shares, alpha))
    values = np.asarray(bound(scores[:, :k], y[:, :k], shares), np.float64)
    return values.mean(), values.std() / np.sqrt(blocks), information


@pytest.mark.parametrize("temperature", (0.5, 1.0, 1.5))
@pytest.mark.parametrize("alpha", (0.01, 0.5, 1.0))
@pytest.mark.parametrize("k", (4, 16))
def test_bound_is_below_the_information_for_any_critic(k, alpha, temperature):
    value, error, information = mean_bound(k, alpha, temperature)
    assert value <= information + 4 * error + 1e-4


def test_bound_is_tight_for_true_critic_and_small_alpha():
    value, error, information = mean_bound(16, 0.01)
    assert abs(value - information) < 0.01 + 4 * error


def test_bound_may_exceed_log_k_over_alpha_below_alpha_1():  # as documented, unlike in the paper
    value, error, information = mean_bound(4, 0.5)
    assert np.log(4 / 0.5) + 0.1 < value - 4 * error < information


@pytest.mark.parametrize("alpha", (0.01, 0.5, 1.0))
def test_bound_stays_below_its_documented_limits(alpha):
    rng = np.random.default_rng(2)
    for scale in (1, 10, 1000):
        for _ in range(20):
            f, y = jnp.asarray(scale * rng.normal(size=(8, 5)), jnp.float32), rng.integers(0, 5, 8)
            value = interpolated_bound(f, y, jnp.zeros(5), jnp.full(5, 0.2), alpha)
            best = interpolated_bound(scale * jax.nn.one_hot(y, 5), y, jnp.zeros(5), jax.nn.one_hot(0, 5), alpha)
            assert max(value, best) <= np.log(8 / alpha) + (alpha < 1) + 1e-5


@pytest.mark.parametrize("alpha", (0.01, pytest.param(0.5, marks=pytest.mark.slow)))
def test_estimate_is_close_to_and_below_the_information(alpha):
    for means, information in ((CLOSE, information_of_two(2.0)), (FIVE, FIVE_INFORMATION)):
        values = [score(*gaussians(1500, means, seed), 5, seed, alpha=alpha) for seed in range(4)]
        # The mean log ratio of 1,500 samples has a standard deviation of 0.02.
        assert np.max(values) <= information + 0.08
        assert 0.75 * information <= np.mean(values) <= information + 0.02


@pytest.mark.slow
def test_larger_batches_are_tighter_and_log_k_limits_infonce():
    values = [score(FAR_X, FAR_Y, 64, alpha=1.0, batch_size=k) for k in (4, 16, 128)]
    assert np.all(np.array(values) <= np.log([4, 16, 128]) + 1e-5)
    assert values[0] > 0.8 * np.log(4) and values[1] > 1.5 * values[0] and values[2] > 1.2 * values[1]


def test_smaller_alpha_has_less_bias_where_log_k_limits():
    values = [score(FAR_X, FAR_Y, 64, alpha=alpha, batch_size=4) for alpha in (1.0, 0.5, 0.01)]
    assert values[0] < values[1] - 0.3 and values[1] < values[2] - 0.3
    assert values[2] <= np.log(64) + 0.1


@pytest.mark.parametrize("alpha", (0.01, 0.5))
def test_independent_features_and_labels_score_zero(alpha):
    values = []
    for seed in range(5):
        x, y = gaussians(1500, FIVE, seed)
        values.append(score(x, np.random.default_rng(seed).permutation(y), 5, seed, alpha=alpha))
    assert -0.03 < np.mean(values) < 0.01 and np.max(values) < 0.03


def test_value_is_determined_by_the_seed():
    x, y = gaussians(200, 2 * FIVE)
    values = [score(x, y, 5, seed, alpha=0.5) for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]
    assert abs(values[0] - values[2]) < 0.2


def test_scale_and_offset_change_the_estimate_little():
    x, y = gaussians(1500, FIVE)
    values = [score(v, y, 5, alpha=0.5) for v in (x, 1e-18 * x, 1e18 * x, x + 100)]
    assert np.ptp(values) < 0.06 and np.min(values) > 0.3


@pytest.mark.parametrize("case", ("constant features", "one class"))
def test_constant_features_or_a_single_class_score_zero(case):
    x, y = gaussians(200, 2 * FIVE)
    x, y = (np.full_like(x, 0.1), y) if case == "constant features" else (x, 0 * y)
    assert abs(score(x, y, 5, alpha=0.5)) < 0.02


@pytest.mark.parametrize("n", (12, 17))
def test_smallest_sample_sizes_give_a_finite_value(n):
    x, y = gaussians(n, 4 * FIVE)
    assert np.isfinite(mutual_information(jnp.asarray(x, jnp.float32), jnp.asarray(y), 5, steps=32))


@pytest.mark.parametrize("bad", (np.nan, np.inf))
@pytest.mark.parametrize("energy", (None, 0.8))
def test_non_finite_features_give_nan(energy, bad):
    x, y = gaussians(200, 2 * FIVE)
    x[3, 4] = bad
    assert np.isnan(score(x, y, 5, alpha=0.5, energy=energy))


def test_pca_drops_directions_of_low_variance():
    x, y = gaussians(1500, CLOSE)
    x[:, 0] *= 0.3  # the informative column: 2 percent of the variance
    nearly_all, most, plain = (score(x, y, 5, alpha=0.5, energy=energy) for energy in (1 - 1e-6, 0.8, None))
    assert most < 0.05 and plain > 0.2
    assert abs(nearly_all - plain) < 0.05


def test_float64_is_preserved():
    x, y = gaussians(200, 2 * FIVE)
    with jax.enable_x64(True):
        value = mutual_information(jnp.asarray(x), jnp.asarray(y), 5, alpha=0.5)
    assert value.dtype == np.float64
    assert abs(float(value) - score(x, y, 5, alpha=0.5)) < 0.2


@pytest.mark.parametrize(
    ("name", "settings"),
    (
        ("energy", {"energy": 1.0}),
        ("energy", {"energy": 0.0}),
        ("x has 11", {"n": 11}),
    ),
)
def test_error_names_invalid_arguments(name, settings):
    settings = dict(settings)
    n = settings.pop("n", 40)
    with pytest.raises(InputError, match=name):
        mutual_information(jnp.ones((n, 3)), jnp.zeros(n, int), 2, **settings)
