"""Uninformative features never score above informative ones, at any scale, and constant features are reported."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_transfer.analysis import SCORES, h_score, h_score_shrunk, score_all, transrate
from jax_transfer.features import extract
from jax_transfer.records import Features

SHAPES = {"n < d": (60, 80, 3), "n > d": (120, 16, 4)}
SCALES = (1, 1e-20, 1e20)
# The other scores differ from one of these only in a setting.
TESTED = [name for name in SCORES if name not in ("mi_alpha_0.01", "mi_pca_alpha_0.01", "mi_pca_alpha_0.5", "linear_5")]
LONG = ("mi_alpha_0.5", "nleep", "logme", "linear_converged")  # they train, iterate, or compile for each width


def labels(shape):
    n, _, num_classes = SHAPES[shape]
    return np.random.default_rng(1).permutation(np.arange(n) % num_classes).astype(np.int32)


def informative(shape, separation, seed=0):
    """Returns non-negative features, like a network's; their classes overlap for a separation of 1."""
    (n, d, num_classes), rng = SHAPES[shape], np.random.default_rng(seed)
    means = separation * rng.normal(size=(num_classes, d)) * (24 / d) ** 0.5
    return np.maximum(means[labels(shape)] + rng.normal(size=(n, d)) + 0.5, 0).astype(np.float32)


def one_ulp(x, size, rng):
    x = np.asarray(x, np.float32)
    return x + np.spacing(x) * rng.integers(-size, size + 1, x.shape).astype(np.float32)


def degenerate(shape):
    """Returns name -> features [n, d] float32 in which at most one direction varies by more than rounding or 1e-6."""
    (n, d, _), rng = SHAPES[shape], np.random.default_rng(2)
    row, noise = np.tile(rng.uniform(0.1, 1, d), (n, 1)), rng.normal(size=(n, d))
    direction, amount = rng.normal(size=(1, d)), rng.normal(size=(n, 1))
    # Both values are equally frequent, so that the shrinkage of h_score_shrunk is 0.
    two_values = np.where(np.arange(n)[:, None] % 2, 1, -1) * direction
    kinds = {
        "equal": row,
        "equal columns": np.full((n, d), 0.1),
        "equal, large": 1e4 * row,
        "equal, graded": row * np.logspace(-6, 6, d),
        "zero": 0 * row,
        "one unit in the last place": one_ulp(row, 1, rng),
        "two units in the last place": one_ulp(row, 2, rng),
        "noise of a millionth": row + 1e-6 * noise,
        "noise of a millionth of each": row * (1 + 1e-6 * noise),
        "noise below the rounding of the offset": 1e3 * row + 1e-5 * noise,
        "one direction": amount * direction,
        "one direction, two values": two_values,
        "one direction, two values, rounding": one_ulp(two_values, 1, rng),
        "one direction, offset": amount * direction + 100,
        "one direction, offset, rounding": one_ulp(amount * direction + 100, 1, rng),
        "one direction, noise of a millionth": amount * direction + 1e-6 * noise,
        "one column, others equal": np.where(np.arange(d) == 3, amount, row),
    }
    return {name: x.astype(np.float32) for name, x in kinds.items()}


WITHOUT_NOISE = ("equal", "equal columns", "equal, large", "equal, graded", "zero")
ROUNDING = ("one unit in the last place", "two units in the last place", "noise below the rounding of the offset")


def values(name, shape, x):
    """Returns the score of each of several features [n, d]; the logits of 7 classes are a linear map of them."""
    num_classes, weights = SHAPES[shape][2], np.random.default_rng(9).normal(size=(SHAPES[shape][1], 7))
    logits = [one / np.maximum(np.abs(one).max(), 1e-30) @ weights.astype(np.float32) for one in x]
    y = np.tile(labels(shape), (len(x), 1))
    return score_all(name, Features(np.stack(x), np.stack(logits), y), num_classes)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (name, shape)
        for name in TESTED
        for shape in SHAPES
        if (name, shape) != ("mi_alpha_0.5", "n < d")
        and name != "ncti_variability"  # a part, best for equal posteriors
    ],
)
def test_uninformative_features_never_score_above_informative_ones(name, shape):
    kinds, scales = degenerate(shape), SCALES
    if name in LONG:
        few = ("equal", "one unit in the last place", "noise of a millionth", "one direction, two values, rounding")
        kinds = {kind: kinds[kind] for kind in few}
        scales = (1, 1e20) if name != "mi_alpha_0.5" and shape == "n > d" else (1,)
    all_kinds = {f"{kind}, times {scale:g}": x * np.float32(scale) for kind, x in kinds.items() for scale in scales}
    found = values(name, shape, [informative(shape, 3.0), informative(shape, 1.0), *all_kinds.values()])
    assert np.isfinite(found).all()
    least = found[:2].min()
    above = {kind: value for kind, value in zip(all_kinds, found[2:], strict=True) if value > least + 1e-4 * abs(least)}
    assert not above, f"informative features score {found[:2]}"


@pytest.mark.parametrize("name", [name for name in TESTED if not name.startswith("mi_")])
def test_scores_are_finite_at_the_limits_of_float32(name):
    noise = np.random.default_rng(6).normal(size=SHAPES["n > d"][:2])
    kinds = [scale * np.ones_like(noise) for scale in (1e38, 3.4e38, -3.4e38, 1e-45)]
    kinds += [scale * noise for scale in (1e-44, 1e-38, 1.2e-38, 1e-37)]
    assert np.isfinite(values(name, "n > d", np.array(kinds, np.float32))).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ("h_score", "h_score_shrunk", "transrate"))
def test_constant_features_and_rounding_noise_score_zero(name, shape):
    kinds = degenerate(shape)
    x = [kinds[kind] * np.float32(scale) for kind in WITHOUT_NOISE + ROUNDING for scale in SCALES]
    np.testing.assert_allclose(values(name, shape, x), 0, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("score", (h_score, h_score_shrunk, transrate))
def test_uninformative_columns_do_not_change_scores(score, shape):
    x, y, num_classes = informative(shape, 1.0), labels(shape), SHAPES[shape][2]
    row = np.tile(np.random.default_rng(3).uniform(0.1, 1, 8), (len(y), 1))
    for extra in (1e4 * row, one_ulp(1e3 * row, 1, np.random.default_rng(4)), 0 * row):
        wide = np.concatenate([x, extra.astype(np.float32)], axis=1)
        if score is h_score_shrunk:  # the target of the shrinkage depends on the number of columns
            x_padded = np.concatenate([x, 0 * extra.astype(np.float32)], axis=1)
            np.testing.assert_allclose(score(wide, y, num_classes), score(x_padded, y, num_classes), rtol=1e-3)
        else:
            np.testing.assert_allclose(score(wide, y, num_classes), score(x, y, num_classes), rtol=1e-3)


def test_noise_above_rounding_scores_the_same_at_any_scale():
    """A scale-free score cannot tell noise of 1e-5 from noise of 1, so both must score the same."""
    n, d, num_classes = SHAPES["n > d"]
    noise, y = np.random.default_rng(5).normal(size=(n, d)), labels("n > d")
    for score in (h_score, h_score_shrunk):
        small, plain = (score(jnp.asarray(x, jnp.float32), y, num_classes) for x in (1 + 1e-5 * noise, noise))
        np.testing.assert_allclose(small, plain, atol=0.02)


def with_labels(x):
    return Features(x, np.ones((len(x), 2), np.float32), np.arange(len(x), dtype=np.int32) % 2)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", (*WITHOUT_NOISE, *ROUNDING[:2]))
def test_constant_features_are_reported(kind, scale):
    problem = extract.problem(with_labels(degenerate("n > d")[kind] * np.float32(scale)), 2)
    assert problem == "features [120, 16] do not vary: all images get the same ones"


def test_feature_of_rounding_errors_counts_as_constant():
    x = degenerate("n > d")["one unit in the last place"]
    x[:, 3] = 1e-8 * np.random.default_rng(0).normal(size=len(x))
    assert "do not vary" in extract.problem(with_labels(x), 2)


@pytest.mark.parametrize("change", ("", "large offset", "a large feature that is constant", "one feature", "small"))
def test_varying_features_are_not_reported(change):
    x = informative("n > d", 1.0)
    if change == "large offset":
        x = x + 1e4
    elif change == "a large feature that is constant":
        x[:, 0] = 1e12
    elif change == "one feature":
        x = np.where(np.arange(16) == 5, x, 1).astype(np.float32)
    elif change == "small":
        x = (1 + 1e-5 * x).astype(np.float32)
    assert extract.problem(with_labels(x), 2) == ""


def test_single_image_is_not_reported_as_constant():
    one = Features(np.ones((1, 3), np.float32), np.ones((1, 2), np.float32), np.zeros(1, int))
    assert extract.problem(one, 2) == ""
