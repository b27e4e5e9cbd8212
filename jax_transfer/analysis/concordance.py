"""How far targets agree on the order of checkpoints, and how far the noise of seeds lets any score agree with them.

The functions take accuracies alone; `agreement` compares scores with them.
"""

import math

import numpy as np
import scipy.stats
from jaxtyping import Float
from numpy.typing import ArrayLike

from jax_transfer.analysis.agreement import as_numbers
from jax_transfer.records import InputError


def kendall_w(accuracies: ArrayLike) -> float:
    """Computes Kendall's coefficient of concordance W: how far t targets order k checkpoints alike, in [0, 1].

        W = 12 S / (t^2 (k^3 - k) - t sum_j T_j),   S: sum of squared deviations of the k sums of ranks,
        T_j = sum over groups of u tied checkpoints on target j of (u^3 - u)

    Kendall and Babington Smith, "The problem of m rankings", 1939, with the correction for ties.

    Args:
      accuracies: one row per target; higher is better.

    Returns:
      W; NaN with fewer than two targets or checkpoints, if a value is not finite, or if each target has only ties.

    Raises:
      InputError: if `accuracies` is not a table of numbers.

    Example:
      >>> kendall_w([[0.5, 0.6, 0.7], [0.1, 0.2, 0.3]]), kendall_w([[0.5, 0.6, 0.7], [0.3, 0.2, 0.1]])
      (1.0, 0.0)
    """
    accuracies = as_numbers(accuracies, "accuracies")
    if accuracies.ndim != 2:
        raise InputError(f"accuracies has the shape {list(accuracies.shape)}: expected a row for each target.")
    t, k = accuracies.shape
    if t < 2 or k < 2 or not np.isfinite(accuracies).all():
        return math.nan
    ranks = scipy.stats.rankdata(accuracies, axis=1)
    ties = sum(float(np.sum(counts**3 - counts)) for counts in (np.unique(r, return_counts=True)[1] for r in ranks))
    most = t**2 * (k**3 - k) - t * ties
    return float(12 * np.sum((ranks.sum(0) - t * (k + 1) / 2) ** 2) / most) if most > 0 else math.nan


def average_ranks(accuracies: ArrayLike) -> Float[np.ndarray, "t k"]:
    """Ranks the checkpoints for each target by the others: minus the mean rank (1 is best) on all other targets.

    It is a fixed list that needs no data of the target, but accuracies on other targets.

    Args:
      accuracies: one row per target; NaN where a checkpoint was not evaluated.

    Returns:
      One row per target; higher is better. NaN for a checkpoint that lacks an accuracy on any target, and with one
      target.

    Example:
      >>> average_ranks([[0.5, 0.6], [0.9, 0.8], [0.7, 0.6]]).tolist()
      [[-1.0, -2.0], [-1.5, -1.5], [-1.5, -1.5]]
    """
    accuracies = as_numbers(accuracies, "accuracies")
    ranks = scipy.stats.rankdata(-accuracies, axis=1, nan_policy="omit")
    if len(accuracies) < 2:
        return np.full(accuracies.shape, math.nan)
    return -(ranks.sum(0) - ranks) / (len(accuracies) - 1)


def attainable_kendall(accuracies: ArrayLike, noise: float, resamples: int = 1000, seed: int = 0) -> float:
    """Estimates the tau that even the true accuracies would have with measured ones, given the noise of measurement.

    The measured accuracies vary more than the true ones, by the variance of the noise: the estimate shrinks them
    towards their mean until their variance is that of the true ones, adds normal noise, and averages tau over draws.

    Args:
      accuracies: measured accuracies [k].
      noise: standard deviation of a measured accuracy over seeds.
      resamples: number of draws.
      seed: seed of the draws.

    Returns:
      The mean tau; 1 without noise, near 0 if the checkpoints differ by no more than the noise. NaN if an accuracy or
      the noise is not finite, or all accuracies are equal.

    Example:
      >>> attainable_kendall([0.5, 0.6, 0.7], noise=0.0), attainable_kendall([0.5, 0.6, 0.7], noise=0.1)
      (1.0, 0.0)
    """
    accuracies = as_numbers(accuracies, "accuracies")
    if not math.isfinite(noise) or not np.isfinite(accuracies).all() or len(accuracies) < 2 or not np.ptp(accuracies):
        return math.nan
    variance, mean = float(np.var(accuracies, ddof=1)), accuracies.mean()
    truth = mean + (accuracies - mean) * math.sqrt(max(1 - noise**2 / variance, 0))
    if not np.ptp(truth):
        return 0.0
    measured = truth + noise * np.random.default_rng(seed).standard_normal((resamples, len(truth)))
    first, second = np.triu_indices(len(truth), 1)
    order = np.sign(truth[first] - truth[second])
    found = np.sign(measured[:, first] - measured[:, second])
    distinct = np.sum(order != 0) * np.sum(found != 0, axis=1)  # without noise, equal accuracies stay equal
    return float(np.mean((found * order).sum(1) / np.sqrt(distinct)))
