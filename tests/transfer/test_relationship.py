"""The relationship of categories of Co-Tuning against closed forms and an independent solver."""

import numpy as np
import pytest
from scipy.optimize import minimize

from jax_transfer.records import InputError
from jax_transfer.transfer.relationship import PENALTIES, category_relationship

CERTAIN = 100.0  # logit with which the checkpoint is sure of a source class


def certain(counts):
    """Returns logits and labels for counts [s, t]: images of which the checkpoint is sure that they are of class s."""
    source, target = (
        np.repeat(index, np.asarray(counts).ravel()) for index in np.indices(np.shape(counts)).reshape(2, -1)
    )
    return CERTAIN * np.eye(len(counts))[source], target


def noisy(n, seed, s=6, t=3):
    """Returns logits of s source classes for n images of t target classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, t, n)
    return 2 * np.eye(t, s)[labels] + rng.normal(size=(n, s)), labels


def softmax(x, axis):
    exponents = np.exp(x - x.max(axis, keepdims=True))
    return exponents / exponents.sum(axis, keepdims=True)


def direct(logits, labels, t):
    """Returns the mean of the source's probabilities of each target class: the paper's direct approach."""
    return np.stack([softmax(logits, 1)[labels == label].mean(0) for label in range(t)])


@pytest.mark.parametrize(
    "counts",
    [
        [[30, 10], [5, 15], [20, 20]],
        [[30, 10, 5], [5, 15, 20], [20, 20, 20], [2, 1, 30]],
        [[40, 0, 0], [10, 0, 0], [0, 25, 0], [0, 0, 5]],  # the source class determines the target class
    ],
)
def test_certain_source_classes_give_their_share_of_each_target_class(counts):
    """p(s | t) is then count[s, t] / sum_s count[s, t], which is the direct estimate too."""
    logits, labels = certain(counts)
    found = category_relationship(logits, labels, logits, labels, len(counts[0]))
    counts = np.array(counts)
    np.testing.assert_allclose(found, (counts / counts.sum(0)).T, atol=3e-3)
    np.testing.assert_allclose(found, direct(logits, labels, counts.shape[1]), atol=3e-3)


def reference(train_logits, train_labels, validation_logits, validation_labels, t, scale):
    """Evaluates the formula with another solver and a grid of temperatures."""
    x, x_validation = (softmax(scale * logits, 1) for logits in (train_logits, validation_logits))
    targets, rows = np.eye(t)[train_labels], np.arange(len(x_validation))

    def fit(penalty):
        def objective(flat):
            w = flat.reshape(t, -1)
            p = softmax(x @ w.T, 1)
            value = 0.5 * (w**2).sum() - penalty * np.log(p[targets > 0]).sum()
            return value, (w + penalty * (p - targets).T @ x).ravel()

        return minimize(objective, np.zeros(t * x.shape[1]), jac=True, tol=1e-12, options={"maxiter": 5000}).x

    fits = [fit(penalty).reshape(t, -1) for penalty in PENALTIES[::-1]]
    correct = [((x_validation @ w.T).argmax(1) == validation_labels).sum() for w in fits]
    w = fits[int(np.argmax(correct))]
    scales = np.geomspace(1e-3, 1e3, 20_001) / np.abs(w).max()

    def loss(c):
        return -np.log(np.maximum(softmax(c * x_validation @ w.T, 1)[rows, validation_labels], 1e-300)).mean()

    near = int(np.argmin([loss(c) for c in scales[::20]])) * 20
    fine = scales[max(near - 20, 0) : near + 21]
    p_target = softmax(fine[int(np.argmin([loss(c) for c in fine]))] * w, 0)
    together = p_target * np.concatenate([x, x_validation]).mean(0)
    return together / together.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("t", "n", "seed", "scale"), [(3, 90, 0, 1.0), (3, 90, 0, 0.5), (2, 90, 0, 1.0), (2, 20, 12, 1.0)]
)
def test_relationship_equals_independent_solver(t, n, seed, scale):
    data = (*noisy(n, seed, t=t), *noisy(25, seed + 1, t=t))
    found = category_relationship(*data, t, scale)
    np.testing.assert_allclose(found, reference(*data, t, scale), atol=1e-3)
    assert found.dtype == np.float32


def test_scale_is_that_of_the_logits():
    data = (*noisy(90, 0), *noisy(40, 1))
    scaled = (0.5 * data[0], data[1], 0.5 * data[2], data[3])
    np.testing.assert_array_equal(category_relationship(*data, 3, scale=0.5), category_relationship(*scaled, 3))
    assert np.abs(category_relationship(*data, 3, scale=0.5) - category_relationship(*data, 3)).max() > 1e-2


def test_order_of_classes_does_not_matter():
    (x, y), (x_validation, y_validation) = noisy(90, 0), noisy(40, 1)
    found = category_relationship(x, y, x_validation, y_validation, 3)
    source, target = np.array([3, 0, 5, 1, 2, 4]), np.array([2, 0, 1])
    renamed = np.argsort(target)  # class target[i] becomes i
    other = category_relationship(x[:, source], renamed[y], x_validation[:, source], renamed[y_validation], 3)
    np.testing.assert_allclose(other, found[target][:, source], atol=2e-3)


def test_classes_without_images_get_the_direct_estimate_or_the_prior():
    (x, y), (x_validation, y_validation) = noisy(120, 0, t=4), noisy(60, 1, t=4)
    x, y = x[y != 2], y[y != 2]  # class 2: validation alone
    x_validation, y_validation = x_validation[y_validation != 1], y_validation[y_validation != 1]  # 1: training alone
    found = category_relationship(x, y, x_validation, y_validation, 6)  # 4 and 5: none
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    prior = softmax(np.concatenate([x, x_validation]), 1).mean(0)
    np.testing.assert_allclose(found[4:], [prior, prior], rtol=1e-5)
    np.testing.assert_allclose(found[2], softmax(x_validation[y_validation == 2], 1).mean(0), rtol=1e-5)
    assert found[1].argmax() == 1


HARD = {
    "one class": lambda logits, labels: (logits, 0 * labels),
    "equal logits": lambda logits, labels: (0 * logits, labels),
    "logits up to 1e4": lambda logits, labels: (1e4 * logits, labels),
    "a source class that never occurs": lambda logits, labels: (logits - 1e6 * np.eye(6)[5], labels),
    "labels without relation": lambda logits, labels: (logits, labels[::-1]),
    "float32": lambda logits, labels: (logits.astype(np.float32), labels.astype(np.int32)),
}


@pytest.mark.parametrize("case", HARD)
def test_rows_are_distributions_on_hard_inputs(case):
    found = category_relationship(*HARD[case](*noisy(60, 0)), *HARD[case](*noisy(30, 1)), 3)
    assert np.isfinite(found).all() and (found >= 0).all()
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)


def test_invalid_input_is_one_line():
    (x, y), (x_validation, y_validation) = noisy(60, 0), noisy(30, 1)
    for images, labels in ((x_validation[:0], y_validation[:0]), (x_validation, y_validation + 7)):
        with pytest.raises(InputError, match="needs validation images of the classes of the training images"):
            category_relationship(x, y, images, labels, 10)
    with pytest.raises(InputError, match="needs finite logits"):
        category_relationship(np.where(np.arange(6) == 2, np.nan, x), y, x_validation, y_validation, 3)
