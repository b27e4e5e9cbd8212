"""How well a score ranks checkpoints: correlations, Recall@k, Rel@k and regret against the final accuracies.

One target at a time: scores [k] and accuracies [k], one entry a checkpoint, higher is better in both. Each function
returns a Python float, NaN where the quantity is undefined: fewer than two checkpoints, a constant input (correlations)
or a value that is not finite. The paper's Recall@k over several targets is the mean of `recall_at_k` over them.

Ties: a score that cannot tell two checkpoints apart is given no credit for their order in the list. Kendall's tau-b and
the weighted tau correct for ties; Recall@k, Rel@k and regret are expectations over a uniformly random order of the tied.
"""

import math
import reprlib

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike

from jax_transfer.analysis.arguments import as_number
from jax_transfer.records import InputError, printable

# A rank correlation over fewer checkpoints says little: of k unrelated ones, Kendall's tau has the standard deviation
# sqrt(2 (2k + 5) / (9 k (k - 1))), 0.25 at k = 10 and 0.41 at k = 5, so that |tau| up to twice that is chance.
MIN_CHECKPOINTS = 10


def pearson(scores: ArrayLike, accuracies: ArrayLike) -> float:
    """Pearson's linear correlation, in [-1, 1]."""
    scores, accuracies = paired(scores, accuracies)
    if not _correlation_is_defined(scores, accuracies):
        return math.nan
    scores, accuracies = _standardised(scores), _standardised(accuracies)
    return float(np.clip(scores @ accuracies, -1, 1))


def kendall(scores: ArrayLike, accuracies: ArrayLike) -> float:
    """Kendall's tau-b, in [-1, 1]: concordant minus discordant pairs, corrected for ties (Kendall, 1945)."""
    scores, accuracies = paired(scores, accuracies)
    if not _correlation_is_defined(scores, accuracies):
        return math.nan
    return float(scipy.stats.kendalltau(scores, accuracies, variant="b").statistic)


def weighted_kendall(scores: ArrayLike, accuracies: ArrayLike) -> float:
    """Weighted Kendall tau, in [-1, 1]: errors among the best checkpoints cost more (Vigna, WWW 2015).

    A pair weighs 1 / (r + 1) + 1 / (q + 1), r and q its ranks from 0 (best). As in `scipy.stats.weightedtau` the result
    is the mean of two values: ranks by decreasing score, ties broken by accuracy; and by decreasing accuracy, ties
    broken by score. It is thus symmetric in its arguments; it does not depend on the order of the list.
    """
    scores, accuracies = paired(scores, accuracies)
    if not _correlation_is_defined(scores, accuracies):
        return math.nan
    return float(scipy.stats.weightedtau(scores, accuracies, rank=True, weigher=None, additive=True).statistic)


def recall_at_k(scores: ArrayLike, accuracies: ArrayLike, k: int) -> float:
    """1 if a checkpoint of the highest accuracy is among the k of highest score, else 0.

    "Ranking Neural Checkpoints", section 2.3. Tied scores at place k: the probability in [0, 1] that a best checkpoint
    is drawn. Tied accuracies: any of the best counts.
    """
    scores, accuracies = paired(scores, accuracies)
    if not _ranking_is_defined(scores, accuracies, k):
        return math.nan
    return _expected_best(scores, (accuracies == accuracies.max()).astype(float), k)


def relative_accuracy_at_k(scores: ArrayLike, accuracies: ArrayLike, k: int) -> float:
    """Rel@k: the best accuracy among the k checkpoints of highest score, over the best of all; in [0, 1].

    "Ranking Neural Checkpoints", section 2.3. Tied scores at place k: the expectation over which of them is drawn.
    NaN if the best accuracy is 0.
    """
    scores, accuracies = paired(scores, accuracies)
    if not _ranking_is_defined(scores, accuracies, k) or accuracies.max() <= 0:
        return math.nan
    return _expected_best(scores, accuracies, k) / float(accuracies.max())


def regret(scores: ArrayLike, accuracies: ArrayLike) -> float:
    """Accuracy lost by taking the checkpoint of highest score instead of the best one, >= 0; tied scores: its mean."""
    scores, accuracies = paired(scores, accuracies)
    if not _ranking_is_defined(scores, accuracies, 1):
        return math.nan
    return max(float(accuracies.max()) - _expected_best(scores, accuracies, 1), 0.0)


def kendall_interval(
    scores: ArrayLike, accuracies: ArrayLike, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval of Kendall's tau-b over checkpoints: percentiles of tau of the list drawn with replacement.

    It says how far tau would move with other checkpoints of the same kind; the pairs of a checkpoint with itself tie
    and are corrected for as other ties are. Draws in which all are tied are left out. NaN where tau is, and where all draws
    of fewer than MIN_CHECKPOINTS agree, which is luck rather than certainty.
    """
    as_number(confidence, "confidence", lambda share: 0 < share < 1, "a share in (0, 1), such as 0.95")
    as_number(
        resamples, "resamples", lambda number: number >= 1 and float(number).is_integer(), "a whole number, 1 or more"
    )
    as_number(seed, "seed", lambda seed: seed >= 0 and float(seed).is_integer(), "a whole number, 0 or more")
    scores, accuracies = paired(scores, accuracies)
    if not _correlation_is_defined(scores, accuracies):
        return math.nan, math.nan
    order, truth = (np.sign(v[:, None] - v[None, :]) for v in (scores, accuracies))
    k = len(scores)
    draws = np.random.default_rng(int(seed)).multinomial(k, np.full(k, 1 / k), size=int(resamples)).astype(float)

    def pairs(of):  # sum over drawn pairs: a quadratic form in how often each checkpoint was drawn
        return np.einsum("bi,bi->b", draws @ of, draws)

    concordant, distinct = pairs(order * truth), pairs(np.abs(order)) * pairs(np.abs(truth))
    taus = concordant[distinct > 0] / np.sqrt(distinct[distinct > 0])
    low, high = np.quantile(taus, [(1 - confidence) / 2, (1 + confidence) / 2])
    if low == high and k < MIN_CHECKPOINTS:
        return math.nan, math.nan
    return float(low), float(high)


def paired(scores, accuracies):
    scores, accuracies = _numbers(scores, "scores"), _numbers(accuracies, "accuracies")
    if scores.ndim != 1 or scores.shape != accuracies.shape:
        raise InputError(
            f"scores {list(scores.shape)} and accuracies {list(accuracies.shape)} do not match: expected two lists of the "
            "same length, one entry a checkpoint; pass the checkpoints that have both."
        )
    return scores, accuracies


def _numbers(values, name):
    """values, whatever holds them, as float64; None, which is NaN, marks what is missing."""
    try:
        found = np.asarray(values)
        if found.dtype.kind not in "USc":
            return found.astype(np.float64)
    except (TypeError, ValueError, RuntimeError):
        pass  # what it is, the message says
    raise InputError(f"{name} is {printable(reprlib.repr(values))}: expected a list of real numbers.")


def _correlation_is_defined(scores, accuracies):
    return _ranking_is_defined(scores, accuracies, 1) and np.ptp(scores) > 0 and np.ptp(accuracies) > 0


def _ranking_is_defined(scores, accuracies, k):
    as_number(k, "k", lambda k: k >= 1 and float(k).is_integer(), "a number of checkpoints, 1 or more")
    return len(scores) >= 2 and bool(np.all(np.isfinite(scores)) and np.all(np.isfinite(accuracies)))


def _standardised(values):
    values = values / np.max(np.abs(values))  # no underflow or overflow of the squares
    values = values - values.mean()
    return values / np.linalg.norm(values)


def _expected_best(scores, gains, k):
    """Mean of the largest gain among the k highest scores, over a uniformly random order of tied scores."""
    k = min(int(k), len(scores))
    threshold = np.sort(scores)[-k]  # the score at place k
    sure, tied = gains[scores > threshold], np.sort(gains[scores == threshold])
    drawn = k - len(sure)
    floor = sure.max() if len(sure) else -np.inf
    total = math.comb(len(tied), drawn)
    # tied[i] is the largest of the drawn in comb(i, drawn - 1) of the draws
    return float(sum(math.comb(i, drawn - 1) / total * max(floor, gain) for i, gain in enumerate(tied)))
