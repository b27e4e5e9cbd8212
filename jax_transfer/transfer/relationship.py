"""The relationship of categories of Co-Tuning: how probable each source class is, given a class of the target."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression

from jax_transfer.records import InputError

# Inverse strengths of the L2 penalty, in ascending order; the grid of the public code.
PENALTIES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 1e1, 3e1, 1e2, 3e2, 1e3, 3e3, 1e4)
# Smallest and largest magnitude of the calibrated logits between which the temperature is searched. At the largest, a
# source class that always leads to the same target class on the validation images does so for certain.
MAGNITUDES = (1e-3, 1e3)


def category_relationship(
    train_logits: Float[np.ndarray, "n s"],
    train_labels: Int[np.ndarray, " n"],
    validation_logits: Float[np.ndarray, "m s"],
    validation_labels: Int[np.ndarray, " m"],
    num_classes: int,
    scale: float = 1.0,
) -> Float[np.ndarray, "t s"]:
    """Estimates p(source class | target class) from the source's logits for the images of a target.

    You et al., "Co-Tuning for Transfer Learning", NeurIPS 2020, and their public code. Multinomial logistic regression
    without an intercept predicts the target class from the source's probabilities of the training images. Its L2
    penalty is the one with the highest accuracy on the validation images (the weakest of equals), and a temperature T,
    which minimises their cross-entropy, calibrates it. With the coefficients w [t, s] and p(s) the mean of the source's
    probabilities of all images,

        p(t | s) = softmax_t(w[t, s] / T),   p(s | t) = p(t | s) p(s) / sum_s' p(t | s') p(s').

    A target class without training images has the mean of the source's probabilities of its validation images (the
    paper's direct approach), or p(s) if it has none either.

    Args:
      train_logits: logits of the checkpoint's own head.
      train_labels: labels in [0, num_classes).
      validation_logits, validation_labels: images that are not among the training images.
      num_classes: t.
      scale: factor of the logits that calibrates the source's own probabilities. The public code has 0.884 for its
        ImageNet ResNet-50, and there is no such constant for others.

    Returns:
      The probabilities; each row sums to 1.

    Raises:
      InputError: if logits are not finite, or if no validation image has a class of a training image.

    Example:
      >>> source = np.array([0, 0, 1, 2])  # the source class that the checkpoint is sure of
      >>> logits, labels = 100 * np.eye(3)[source], np.array([0, 0, 0, 1])
      >>> category_relationship(logits, labels, logits, labels, num_classes=2).astype(float).round(2).tolist()
      [[0.67, 0.33, 0.0], [0.0, 0.0, 1.0]]
    """
    labels = [np.asarray(part) for part in (train_labels, validation_labels)]
    logits = [np.asarray(part, np.float64) for part in (train_logits, validation_logits)]
    if not all(np.isfinite(part).all() for part in logits):
        raise InputError(
            "the category relationship needs finite logits of the checkpoint's head: it may have diverged."
        )
    train, validation = (softmax(scale * part, axis=1) for part in logits)
    known = np.unique(labels[0])
    held_out = np.isin(labels[1], known)
    if not held_out.any():
        raise InputError(
            "the category relationship needs validation images of the classes of the training images, and there are "
            f"none among {len(held_out)}: hold out more images."
        )
    prior = np.concatenate([train, validation]).mean(0)
    relationship = np.tile(prior, (num_classes, 1))
    for label in np.setdiff1d(labels[1], known):
        relationship[label] = validation[labels[1] == label].mean(0)
    predicted = np.searchsorted(known, labels[0]), np.searchsorted(known, labels[1][held_out])
    coefficients = _calibrated_coefficients(train, predicted[0], validation[held_out], predicted[1], len(known))
    with np.errstate(divide="ignore"):  # a source class whose probability is 0 for all images keeps it
        log_joint = log_softmax(coefficients, axis=0) + np.log(prior)
    relationship[known] = softmax(log_joint, axis=1)
    return relationship.astype(np.float32)


def _calibrated_coefficients(x, y, x_validation, y_validation, num_classes: int) -> Float[np.ndarray, "t s"]:
    """Returns the coefficients of the logistic regression divided by its temperature; labels in [0, num_classes)."""
    if num_classes == 1:
        return np.zeros((1, x.shape[1]))
    best, best_accuracy = np.zeros((num_classes, x.shape[1])), -1.0
    # For two classes, scikit-learn fits w of +-w/2 with the penalty of w, which is twice that of both of them.
    factor = 2 if num_classes == 2 else 1
    regression = LogisticRegression(fit_intercept=False, tol=1e-6, max_iter=1000, warm_start=True)
    for penalty in PENALTIES:
        w = regression.set_params(C=factor * penalty).fit(x, y).coef_
        w = np.concatenate([-w / 2, w / 2]) if num_classes == 2 else w
        accuracy = ((x_validation @ w.T).argmax(1) == y_validation).mean()
        if accuracy >= best_accuracy:
            best, best_accuracy = w.copy(), accuracy
    magnitude = np.abs(best).max()
    if magnitude == 0:
        return best
    logits, rows = x_validation @ best.T, np.arange(len(y_validation))

    def cross_entropy(log_scale):
        return -log_softmax(np.exp(log_scale) * logits, axis=1)[rows, y_validation].mean()

    # The cross-entropy is convex in the inverse of the temperature, so it has a single minimum.
    bounds = np.log(MAGNITUDES) - np.log(magnitude)
    minimum: Any = minimize_scalar(cross_entropy, bounds=bounds, method="bounded")
    return np.exp(minimum.x) * best
