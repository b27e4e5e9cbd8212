"""How well a score ranks checkpoints: correlations, Recall@k, Rel@k and regret against the final accuracies.

The functions take the scores [k] and accuracies [k] of one target, with one entry per checkpoint; higher is better in
both. They return a Python float, which is NaN if the quantity is undefined: for fewer than two checkpoints, a constant
input (correlations) or a value that is not finite. "Ranking Neural Checkpoints" reports Recall@k over several targets,
which is the mean of `recall_at_k` over the targets.

A score gets no credit for the order in which tied checkpoints are listed. Kendall's tau-b and the weighted tau correct
for ties; Recall@k, Rel@k and regret are expectations over a uniformly random order of tied checkpoints.
"""

import functools
import math
import reprlib

import numpy as np
import scipy.stats
from jaxtyping import Float
from numpy.typing import ArrayLike

from jax_transfer.analysis.arguments import as_number
from jax_transfer.records import InputError, printable

# A rank correlation over fewer checkpoints says little. For a score that is unrelated to accuracy, Kendall's tau has
# the standard deviation sqrt(2 (2k + 5) / (9 k (k - 1))): 0.25 for k = 10 and 0.41 for k = 5. A |tau| below twice the
# standard deviation may be due to chance.
MIN_CHECKPOINTS = 10


def pearson(scores: ArrayLike, accuracies: ArrayLike) -> float:
    """Computes Pearson's linear correlation, in [-1, 1].

    Args:
      scores, accuracies: [k], one entry per checkpoint.

    Raises:
      InputError: if the arguments are not two lists of numbers of the same length.

    Example:
      >>> round(pearson([1, 2, 3], [0.5, 0.7, 0.8]), 2)
      0.98
    """
    scores, accuracies = paired(scores, accuracies)
    if not _correlation_is_defined(scores, accuracies):
        return math.nan
    scores, accuracies = _standardised(scores), _standardised(accuracies)
    return float(np.clip(scores @ accuracies, -1, 1))


def kendall(scores: ArrayLike, accuracies: ArrayLike) -> float:
    """Computes Kendall's tau-b, in [-1, 1]: concordant minus discordant pairs, corrected for ties.

    Kendall, "The treatment of ties in ranking problems", Biometrika 1945; `scipy.stats.kendalltau`.

    Args:
      scores, accuracies: [k], one entry per checkpoint.

    Raises:
      InputError: if the arguments are not two lists of numbers of the same length.

    Example:
      >>> round(kendall([1, 2, 3], [0.5, 0.8, 0.7]), 2)
      0.33
    """
    scores, accuracies = paired(scores, accuracies)
    if not _correlation_is_defined(scores, accuracies):
        return math.nan
    result = scipy.stats.kendalltau(scores, accuracies, variant="b")
    return float(result.statistic)  # pyright: ignore[reportAttributeAccessIssue] - scipy declares no result fields


def weighted_kendall(scores: ArrayLike, accuracies: ArrayLike) -> float:
    """Computes the weighted Kendall tau, in [-1, 1], in which errors among the best checkpoints cost more.

    Vigna, "A weighted correlation index for rankings with ties", WWW 2015; `scipy.stats.weightedtau`. A pair with the
    ranks r and q, counted from 0 (best), has the weight 1 / (r + 1) + 1 / (q + 1). The result is the mean of two
    taus: one ranks the checkpoints by decreasing score (ties broken by accuracy), the other by decreasing accuracy
    (ties broken by score). The result is therefore symmetric in its arguments and does not depend on the order of the
    checkpoints.

    Args:
      scores, accuracies: [k], one entry per checkpoint.

    Raises:
      InputError: if the arguments are not two lists of numbers of the same length.

    Example:
      >>> round(weighted_kendall([1, 2, 3], [0.5, 0.8, 0.7]), 2)
      0.18
    """
    scores, accuracies = paired(scores, accuracies)
    if not _correlation_is_defined(scores, accuracies):
        return math.nan
    result = scipy.stats.weightedtau(scores, accuracies, rank=True, weigher=None, additive=True)
    return float(result.statistic)  # pyright: ignore[reportAttributeAccessIssue] - scipy declares no result fields


def weighted_kendall_without_each(scores: ArrayLike, accuracies: ArrayLike) -> Float[np.ndarray, "k"]:
    """Computes the weighted Kendall tau without each checkpoint in turn.

    It equals `weighted_kendall` of the others. As the weight of a pair is a sum over its two checkpoints, all of them
    take O(k^2) operations together.

    Args:
      scores, accuracies: [k], one entry per checkpoint.

    Returns:
      Entry i is the tau without checkpoint i; NaN if it is undefined.

    Raises:
      InputError: if the arguments are not two lists of numbers of the same length.

    Example:
      >>> weighted_kendall_without_each([1, 2, 3], [0.5, 0.8, 0.7]).tolist()
      [-1.0, 1.0, 1.0]
    """
    scores, accuracies = paired(scores, accuracies)
    k = len(scores)
    if not _ranking_is_defined(scores, accuracies, 1):
        return np.full(k, math.nan)
    order, truth = _signs(scores), _signs(accuracies)
    taus = []
    for first, second in ((scores, accuracies), (accuracies, scores)):
        rank = np.empty(k)
        rank[np.lexsort((second, first))[::-1]] = np.arange(k)
        weights = 1 / (1 + rank[None, :] - (rank[None, :] > rank[:, None]))  # [without, k]
        np.fill_diagonal(weights, 0)

        def sums(pairs: Float[np.ndarray, "k k"], weights=weights) -> Float[np.ndarray, "k"]:
            """Sums over the pairs of the others, weighted."""
            return np.sum(weights * (pairs.sum(1)[None, :] - pairs), axis=1)

        distinct = sums(np.abs(order)) * sums(np.abs(truth))
        taus.append(np.where(distinct > 0, sums(order * truth) / np.sqrt(np.where(distinct > 0, distinct, 1)), np.nan))
    return np.clip(np.mean(taus, axis=0), -1, 1)


def recall_at_k(scores: ArrayLike, accuracies: ArrayLike, k: int) -> float:
    """Returns 1 if a checkpoint with the highest accuracy is among the k with the highest scores, else 0.

    "Ranking Neural Checkpoints", section 2.3. If scores are tied at rank k, the result is the probability, in [0, 1],
    that a best checkpoint is among the k. If accuracies are tied, any of the best checkpoints counts.

    Args:
      scores, accuracies: [n], one entry per checkpoint.
      k: number of checkpoints to choose, at least 1.

    Raises:
      InputError: if the arguments are not two lists of numbers of the same length, or k is out of range.

    Example:
      >>> recall_at_k([3, 2, 1], [0.7, 0.8, 0.5], k=1), recall_at_k([3, 2, 1], [0.7, 0.8, 0.5], k=2)
      (0.0, 1.0)
    """
    scores, accuracies = paired(scores, accuracies)
    if not _ranking_is_defined(scores, accuracies, k):
        return math.nan
    return _expected_best(scores, (accuracies == accuracies.max()).astype(float), k)


def relative_accuracy_at_k(scores: ArrayLike, accuracies: ArrayLike, k: int) -> float:
    """Computes Rel@k: the best accuracy among the k checkpoints with the highest scores, divided by the best of all.

    "Ranking Neural Checkpoints", section 2.3. The result is in [0, 1], or NaN if the best accuracy is 0. If scores are
    tied at rank k, it is the expected value over a random choice among the tied checkpoints.

    Args:
      scores, accuracies: [n], one entry per checkpoint.
      k: number of checkpoints to choose, at least 1.

    Raises:
      InputError: if the arguments are not two lists of numbers of the same length, or k is out of range.

    Example:
      >>> round(relative_accuracy_at_k([3, 2, 1], [0.6, 0.8, 0.5], k=1), 2)
      0.75
    """
    scores, accuracies = paired(scores, accuracies)
    if not _ranking_is_defined(scores, accuracies, k) or accuracies.max() <= 0:
        return math.nan
    return _expected_best(scores, accuracies, k) / float(accuracies.max())


def regret(scores: ArrayLike, accuracies: ArrayLike) -> float:
    """Computes the accuracy lost by choosing the checkpoint with the highest score instead of the best one.

    The regret is at least 0. If the highest score is tied, the result is the mean over the tied checkpoints.

    Args:
      scores, accuracies: [k], one entry per checkpoint.

    Raises:
      InputError: if the arguments are not two lists of numbers of the same length.

    Example:
      >>> round(regret([3, 2, 1], [0.6, 0.8, 0.5]), 2)
      0.2
    """
    scores, accuracies = paired(scores, accuracies)
    if not _ranking_is_defined(scores, accuracies, 1):
        return math.nan
    return max(float(accuracies.max()) - _expected_best(scores, accuracies, 1), 0.0)


def kendall_interval(
    scores: ArrayLike, accuracies: ArrayLike, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Computes a bootstrap interval of Kendall's tau-b: percentiles over checkpoints drawn with replacement.

    The interval shows how much tau would vary with other checkpoints of the same kind. A checkpoint drawn twice is tied
    with itself; tau-b corrects for this as for any other tie. Draws in which all checkpoints are tied are ignored. Both
    bounds are NaN if tau is NaN, or if there are fewer than MIN_CHECKPOINTS checkpoints and every draw gives the same
    tau, since an interval of width 0 would overstate the certainty.

    Args:
      scores, accuracies: [k], one entry per checkpoint.
      confidence: fraction of the draws inside the interval, in (0, 1).
      resamples: number of draws.
      seed: seed of the draws.

    Returns:
      (low, high).

    Raises:
      InputError: if the first two arguments are not lists of numbers of the same length, or another argument is out of
        range.

    Example:
      >>> scores = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
      >>> low, high = kendall_interval(scores, [1, 3, 2, 4, 5, 7, 6, 8, 10, 9])
      >>> low < kendall(scores, [1, 3, 2, 4, 5, 7, 6, 8, 10, 9]) < high
      True
    """
    as_number(confidence, "confidence", lambda share: 0 < share < 1, "a fraction in (0, 1), such as 0.95")
    as_number(
        resamples,
        "resamples",
        lambda number: number >= 1 and float(number).is_integer(),
        "a whole number of at least 1",
    )
    as_number(seed, "seed", lambda seed: seed >= 0 and float(seed).is_integer(), "a whole number of at least 0")
    scores, accuracies = paired(scores, accuracies)
    if not _correlation_is_defined(scores, accuracies):
        return math.nan, math.nan
    taus = kendall_of_draws(scores, accuracies, draw_checkpoints(len(scores), int(resamples), int(seed)))
    taus = taus[np.isfinite(taus)]
    low, high = np.quantile(taus, [(1 - confidence) / 2, (1 + confidence) / 2])
    if low == high and len(scores) < MIN_CHECKPOINTS:
        return math.nan, math.nan
    return float(low), float(high)


@functools.lru_cache(maxsize=8)
def draw_checkpoints(k: int, resamples: int = 2000, seed: int = 0) -> Float[np.ndarray, "b k"]:
    """Draws k of k checkpoints with replacement, and returns how often each was drawn, for a bootstrap.

    All calls with the same arguments return the same read-only array.

    Example:
      >>> draw_checkpoints(4, resamples=2).sum(axis=1).tolist()
      [4.0, 4.0]
    """
    draws = np.random.default_rng(seed).multinomial(k, np.full(k, 1 / k), size=resamples).astype(float)
    draws.setflags(write=False)
    return draws


def kendall_of_draws(
    scores: Float[np.ndarray, "k"], accuracies: Float[np.ndarray, "k"], draws: Float[np.ndarray, "b k"]
) -> Float[np.ndarray, "b"]:
    """Computes Kendall's tau-b of each draw of checkpoints.

    A checkpoint drawn twice is tied with itself; tau-b corrects for this as for any other tie.

    Args:
      scores, accuracies: finite values.
      draws: how often each checkpoint was drawn (`draw_checkpoints`).

    Returns:
      A tau for each draw; NaN if all checkpoints of the draw are tied.

    Example:
      >>> scores, accuracies = np.array([1.0, 2.0, 3.0]), np.array([0.5, 0.8, 0.7])
      >>> kendall_of_draws(scores, accuracies, np.ones((1, 3))).round(2).tolist()
      [0.33]
    """
    order, truth = _signs(scores), _signs(accuracies)

    def sum_over_pairs(values: Float[np.ndarray, "k k"]) -> Float[np.ndarray, "b"]:
        """Sums over the pairs in each draw, a quadratic form in how often each checkpoint was drawn."""
        return np.einsum("bi,bi->b", draws @ values, draws)

    concordant = sum_over_pairs(order * truth)
    distinct = sum_over_pairs(np.abs(order)) * sum_over_pairs(np.abs(truth))
    return np.where(distinct > 0, concordant / np.sqrt(np.where(distinct > 0, distinct, 1)), np.nan)


def fidelity(scores: ArrayLike, accuracies: ArrayLike, top: int | None = None) -> tuple[float, float]:
    """Computes how well differences of scores tell differences of accuracies: correlations over pairs of checkpoints.

        corr(|s_i - s_j|, |a_i - a_j|)   over the pairs i < j

    "How NOT to benchmark your SITE metric" (arXiv 2510.06448): a score whose gaps say nothing about gaps in accuracy
    cannot tell whether the better checkpoint is worth its cost.

    Args:
      scores, accuracies: [k], one entry per checkpoint.
      top: if given, only the pairs with at least one of the `top` most accurate checkpoints count; among equally
        accurate ones at the limit, all do.

    Returns:
      (Pearson's, Spearman's) correlation, each in [-1, 1]; NaN if it is undefined.

    Raises:
      InputError: if the first two arguments are not two lists of numbers of the same length, or top is out of range.

    Example:
      >>> [round(value, 2) for value in fidelity([1, 2, 4], [0.5, 0.6, 0.9])]
      [0.98, 1.0]
    """
    scores, accuracies = paired(scores, accuracies)
    if not _ranking_is_defined(scores, accuracies, 1 if top is None else top):
        return math.nan, math.nan
    first, second = np.triu_indices(len(scores), 1)
    if top is not None:
        among = accuracies >= np.sort(accuracies)[-min(top, len(accuracies))]
        counts = among[first] | among[second]
        first, second = first[counts], second[counts]
    gaps = [np.abs(values[first] - values[second]) for values in (scores, accuracies)]
    ranks = [scipy.stats.rankdata(gap) for gap in gaps]
    return pearson(*gaps), pearson(*ranks)


def paired(
    scores: ArrayLike, accuracies: ArrayLike, names: tuple[str, str] = ("scores", "accuracies")
) -> tuple[Float[np.ndarray, "k"], Float[np.ndarray, "k"]]:
    """Converts both lists to float64 arrays and checks that they match; None becomes NaN.

    Args:
      scores, accuracies: [k], one entry per checkpoint.
      names: their names in messages.

    Raises:
      InputError: if the arguments are not two lists of numbers of the same length.

    Example:
      >>> [array.tolist() for array in paired([1, None], [0.5, 0.7])]
      [[1.0, nan], [0.5, 0.7]]
    """
    scores, accuracies = as_numbers(scores, names[0]), as_numbers(accuracies, names[1])
    if scores.ndim != 1 or scores.shape != accuracies.shape:
        raise InputError(
            f"{names[0]} {list(scores.shape)} and {names[1]} {list(accuracies.shape)} do not match: expected two lists "
            "of the same length, one entry per checkpoint. Pass only checkpoints that have both."
        )
    return scores, accuracies


def as_numbers(values: ArrayLike, name: str) -> Float[np.ndarray, "..."]:
    """Converts `values` to float64; None marks a missing value and becomes NaN.

    Raises:
      InputError: if they are not real numbers.

    Example:
      >>> as_numbers([[1, None]], "accuracies").tolist()
      [[1.0, nan]]
    """
    try:
        array = np.asarray(values)
        if array.dtype.kind not in "USc":
            return array.astype(np.float64)
    except (TypeError, ValueError, RuntimeError):
        pass  # the error below shows the value
    raise InputError(f"{name} is {printable(reprlib.repr(values))}: expected a list of real numbers.")


def _signs(values: Float[np.ndarray, "k"]) -> Float[np.ndarray, "k k"]:
    """Returns 1 where the first of a pair is larger, -1 where the second is, and 0 where they are equal."""
    return np.sign(values[:, None] - values[None, :])


def _correlation_is_defined(scores: Float[np.ndarray, "k"], accuracies: Float[np.ndarray, "k"]) -> bool:
    return _ranking_is_defined(scores, accuracies, 1) and np.ptp(scores) > 0 and np.ptp(accuracies) > 0


def _ranking_is_defined(scores: Float[np.ndarray, "n"], accuracies: Float[np.ndarray, "n"], k: int) -> bool:
    as_number(k, "k", lambda k: k >= 1 and float(k).is_integer(), "a whole number of checkpoints, at least 1")
    return len(scores) >= 2 and bool(np.all(np.isfinite(scores)) and np.all(np.isfinite(accuracies)))


def _standardised(values: Float[np.ndarray, "k"]) -> Float[np.ndarray, "k"]:
    """Centres the values and scales them to unit length."""
    values = values / np.max(np.abs(values))  # so that the squares neither underflow nor overflow
    values = values - values.mean()
    return values / np.linalg.norm(values)


def _expected_best(scores: Float[np.ndarray, "n"], gains: Float[np.ndarray, "n"], k: int) -> float:
    """Returns the expected largest gain among the k highest scores if ties are ordered uniformly at random."""
    k = min(int(k), len(scores))
    threshold = np.sort(scores)[-k]  # the score at rank k
    certain, tied = gains[scores > threshold], np.sort(gains[scores == threshold])
    drawn = k - len(certain)  # number of tied entries among the k
    floor = certain.max() if len(certain) else -np.inf
    total = math.comb(len(tied), drawn)
    # tied[i] is the largest entry drawn in comb(i, drawn - 1) of the `total` possible draws.
    return float(sum(math.comb(i, drawn - 1) / total * max(floor, gain) for i, gain in enumerate(tied)))
