"""Transferability scores of checkpoints, and measures of how well the scores rank them.

Every score has the signature SCORES[name](features: records.Features, num_classes: int, held_out=None) -> scalar;
higher is better. Under `jax.jit` num_classes is static; under `jax.vmap` the fields of Features are stacked over
checkpoints. Some scores train a classifier; `held_out` holds the indices [m] of the samples on which that classifier is
tested, the same for all checkpoints. The other scores ignore `held_out`. A name may have options, which are arguments
of the score's function: `score_named("knn?k=5")`.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jax_transfer import flops
from jax_transfer.analysis.agreement import (
    MIN_CHECKPOINTS,
    kendall,
    kendall_interval,
    pearson,
    recall_at_k,
    regret,
    relative_accuracy_at_k,
    weighted_kendall,
)
from jax_transfer.analysis.arguments import as_count, as_features, as_held_out, as_labels
from jax_transfer.analysis.embedding import tsne
from jax_transfer.analysis.hscore import h_score, h_score_shrunk
from jax_transfer.analysis.leep import leep, nce
from jax_transfer.analysis.linear import linear_accuracy
from jax_transfer.analysis.logme import logme
from jax_transfer.analysis.mutual_information import mutual_information
from jax_transfer.analysis.ncti import ncti, ncti_geometry, ncti_nearest, ncti_variability
from jax_transfer.analysis.nleep import Pca, nleep, nleep_gigaflops, pca
from jax_transfer.analysis.options import split_options, with_options
from jax_transfer.analysis.representation import alignment, knn_accuracy, rankme, uniformity
from jax_transfer.analysis.spectral import (
    Similarities,
    SpectralComponents,
    batched_spectral_components,
    effective_rank,
    main_rank,
    similarities,
    singular_values,
    spectral_components,
    spectral_decay,
)
from jax_transfer.analysis.split import stratified_fifth
from jax_transfer.analysis.transrate import transrate
from jax_transfer.choose import choose
from jax_transfer.records import Features, InputError


@dataclasses.dataclass(frozen=True)
class Score:
    """A transferability score of one checkpoint.

    Attributes:
      function: function(x, y [n], num_classes) -> scalar; higher is better.
      needs: the field of Features passed as x: "features" [n, d], or "logits" [n, s] of a classification head. "" for a
        score that needs neither; x is then None.
      learns: whether the function trains a classifier and takes `held_out`, the indices of the samples to test on.
      vmapped: whether one compiled program scores all checkpoints. If not, the shapes depend on the values and the
        checkpoints are scored one by one.
      gigaflops: gigaflops(x, y, num_classes) -> floating point operations / 1e9, for functions that `flops.gigaflops`
        cannot count. It takes the same further arguments as the function.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[1.0], [0.8], [0.1], [-0.1]])
      >>> features = Features(features=x, logits=jnp.zeros((4, 0)), labels=jnp.array([0, 0, 1, 1]))
      >>> round(float(Score(h_score)(features, num_classes=2)), 2)
      0.95
    """

    function: Callable
    needs: str = "features"
    learns: bool = False
    vmapped: bool = True
    gigaflops: Callable | None = None

    def __call__(self, features: Features, num_classes: int, held_out=None) -> Float[Array, ""]:
        """Returns the score of `features`.

        Raises:
          InputError: if the function raises it, or the score needs logits and `features.logits` has no columns.
        """
        held_out = {"held_out": held_out} if self.learns else {}
        return self.function(self.x(features), features.labels, num_classes, **held_out)

    def x(self, features: Features):
        """Returns the field of `features` that the score needs, or None."""
        if not self.needs:
            return None
        x = getattr(features, self.needs)
        if self.needs == "logits" and np.shape(x)[-1:] == (0,):
            raise InputError(
                f"logits has the shape {list(np.shape(x))}: this score needs a classification head. Leave this score "
                "out for a net without one."
            )
        return x


def _leep(logits: Float[Array, "n s"], y: Int[Array, "n"], num_classes: int) -> Float[Array, ""]:
    """Computes LEEP from logits."""
    return leep(jax.nn.softmax(as_features(logits, "logits", "n s")), y, num_classes)


def _nce(logits: Float[Array, "n s"], y: Int[Array, "n"], num_classes: int) -> Float[Array, ""]:
    """Computes NCE at the argmax of the logits; NaN if a logit is NaN or +inf, which the argmax would hide."""
    logits = as_features(logits, "logits", "n s")
    value = nce(jnp.argmax(logits, axis=-1), y, logits.shape[-1], num_classes)
    return jnp.where(jnp.isfinite(jnp.max(logits)), value, jnp.nan)


def _effective_rank(x: Float[Array, "n d"], y: Int[Array, "n"], num_classes: int) -> Float[Array, ""]:
    """Computes RankMe, which needs no labels (Garrido et al., ICML 2023, see `rankme`).

    It compares epochs of a pre-training within one pre-training method only, so trajectories, as in the paper: between
    methods, architectures and widths a higher rank says little. Labels change nothing, so it cannot tell targets apart
    whose images are the same.
    """
    x = as_features(x)
    as_labels(y, as_count(num_classes), len(x))
    return rankme(x)


SCORES: dict[str, Score] = {
    "logme": Score(logme),
    "leep": Score(_leep, needs="logits"),
    "nce": Score(_nce, needs="logits"),
    "nleep": Score(nleep, vmapped=False, gigaflops=nleep_gigaflops),
    "h_score": Score(h_score),
    "h_score_shrunk": Score(h_score_shrunk),
    "transrate": Score(transrate),
    "linear_1": Score(functools.partial(linear_accuracy, epochs=1), learns=True),
    "linear_5": Score(functools.partial(linear_accuracy, epochs=5), learns=True),
    "linear_converged": Score(functools.partial(linear_accuracy, epochs=None), learns=True),
    "mi_alpha_0.01": Score(functools.partial(mutual_information, alpha=0.01, energy=None)),
    "mi_alpha_0.5": Score(functools.partial(mutual_information, alpha=0.5, energy=None)),
    "mi_pca_alpha_0.01": Score(functools.partial(mutual_information, alpha=0.01, energy=0.8)),
    "mi_pca_alpha_0.5": Score(functools.partial(mutual_information, alpha=0.5, energy=0.8)),
    "knn": Score(knn_accuracy),
    "effective_rank": Score(_effective_rank),
    # Parts of NCTI, which `ncti` combines over a list of checkpoints.
    "ncti_variability": Score(ncti_variability),
    "ncti_geometry": Score(ncti_geometry),
    "ncti_nearest": Score(ncti_nearest),
}


def score_named(name: str, description: str = "score (name)") -> Score:
    """Returns the score of a name, with the options in the name: "nleep?energy=0.5&components_per_class=2".

    An option is an argument of the score's function that has a default, and its value is a number.

    Args:
      name: a key of SCORES, with or without options.
      description: what is looked up and where the name comes from, for the error message.

    Raises:
      InputError: if the name is not in SCORES, the score has no such option, or its function does not take the value.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [0.1, 3.0], [1.0, 0.1]])
      >>> features = Features(features=x, logits=jnp.zeros((5, 0)), labels=jnp.array([0, 0, 1, 1, 1]))
      >>> round(float(score_named("knn?k=1")(features, num_classes=2)), 2)
      0.6
    """
    score = choose(SCORES, name.partition("?")[0] if isinstance(name, str) else name, description)
    return score if name in SCORES else _with_options(name)


@functools.cache  # the options are checked once
def _with_options(name: str) -> Score:
    base, options = split_options(name)
    score = SCORES[base]
    function = with_options(score.function, options, name)
    gigaflops = score.gigaflops and functools.partial(score.gigaflops, **options)
    return dataclasses.replace(score, function=function, gigaflops=gigaflops)


def score_all(
    name: str, features: Features, num_classes: int, held_out: Int[Array | np.ndarray, "m"] | None = None
) -> np.ndarray:
    """Computes a score for k checkpoints at once.

    Args:
      name: a key of SCORES, with or without options; see `score_named`.
      features: stacked fields: features [k, n, d], logits [k, n, s] and labels [k, n]. s = 0 for nets without a head.
      num_classes: C, the number of target classes.
      held_out: indices of the samples on which a score that trains a classifier is tested; None: the score chooses
        them from the labels. Pass it if the labels differ between checkpoints, or to use the same test samples as
        other results.

    Returns:
      Values [k]; NaN where the score is undefined (`why_undefined` gives the reason).

    Raises:
      InputError: if the name or an option is unknown, or an argument has the wrong type, shape or range.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[[1.0], [0.8], [0.1], [-0.1]], [[0.1], [1.0], [-0.1], [0.8]]])
      >>> labels = jnp.array([[0, 0, 1, 1], [0, 0, 1, 1]])
      >>> values = score_all("h_score", Features(x, jnp.zeros((2, 4, 0)), labels), num_classes=2)
      >>> [round(float(value), 2) for value in values]
      [0.95, 0.05]
    """
    score = score_named(name)
    features, num_classes, held_out = _checked(features, num_classes, held_out)
    if score.vmapped:
        try:
            return np.asarray(_compiled(name, num_classes)(features, held_out))
        except InputError:  # every checkpoint has too few samples; `why_undefined` returns the message
            return np.full(len(features.labels), np.nan)
    values = []
    for i in range(len(features.labels)):
        try:
            values.append(float(score(jax.tree.map(lambda x, i=i: x[i], features), num_classes, held_out)))
        except InputError:  # the other checkpoints may still have values
            values.append(float("nan"))
    return np.array(values)


def _checked(features, num_classes, held_out):
    """Validates the arguments of `score_all`; a compiled program cannot raise errors for invalid labels or indices."""
    num_classes = as_count(num_classes)
    x, logits = as_features(features.features, "features", "k n d"), _as_logits(features.logits, "k n s")
    (k, n), labels = x.shape[:2], features.labels
    if logits.shape[:2] != (k, n) or len(labels) != k:
        raise InputError(
            f"features {list(x.shape)}, logits {list(logits.shape)} and labels for {len(labels)} checkpoints do not "
            "match: expected [k, n, d], [k, n, s] and [k, n]."
        )
    labels = jnp.stack([as_labels(one, num_classes, n, "labels") for one in labels])
    held_out = None if held_out is None else as_held_out(held_out, n)
    return Features(x, logits, labels), num_classes, held_out


def _as_logits(logits, axes: str):
    """Converts logits as `as_features` does, but also accepts the empty logits [n, 0] of a net without a head."""
    shape = np.shape(logits)
    if len(shape) == len(axes.split()) and shape[-1] == 0:
        return jnp.zeros(shape, jnp.float32)
    return as_features(logits, "logits", axes)


def _checked_one(features, num_classes, held_out):
    """Validates the arguments of `score_gigaflops` for one checkpoint."""
    num_classes = as_count(num_classes)
    x, logits = as_features(features.features, "features", "n d"), _as_logits(features.logits, "n s")
    if len(logits) != len(x):
        raise InputError(f"logits holds {len(logits):,} samples and features {len(x):,}: expected the same number.")
    labels = as_labels(features.labels, num_classes, len(x), "labels")
    held_out = None if held_out is None else as_held_out(held_out, len(x))
    return Features(x, logits, labels), num_classes, held_out


@functools.cache
def _compiled(name: str, num_classes: int):
    def score(features, held_out):
        return score_named(name)(features, num_classes, held_out)

    return jax.jit(jax.vmap(score, (0, None)))


def score_gigaflops(
    name: str, features: Features, num_classes: int, held_out: Int[Array | np.ndarray, "m"] | None = None
) -> float:
    """Counts the floating point operations / 1e9 of a score for one checkpoint, excluding the forward pass.

    Args:
      name: a key of SCORES, with or without options; see `score_named`.
      features: features [n, d], logits [n, s] and labels [n] of the checkpoint.
      num_classes: C, the number of target classes.
      held_out: as in `score_all`.

    Raises:
      InputError: if the name or an option is unknown, or an argument has the wrong type, shape or range.

    Example:
      >>> import jax.numpy as jnp
      >>> features = Features(jnp.ones((4, 2)), jnp.ones((4, 3)), jnp.array([0, 0, 1, 1]))
      >>> score_gigaflops("leep", features, num_classes=2) > 0
      True
    """
    score = score_named(name)
    features, num_classes, held_out = _checked_one(features, num_classes, held_out)
    if score.gigaflops is not None:
        return score.gigaflops(score.x(features), features.labels, num_classes)
    return flops.gigaflops(lambda features: score(features, num_classes, held_out), features)


def why_undefined(
    name: str, features: Features, num_classes: int, held_out: Int[Array | np.ndarray, "m"] | None = None
) -> str:
    """Returns the reason why a score has no finite value for one checkpoint.

    Args:
      name: a key of SCORES, with or without options; see `score_named`.
      features: features [n, d], logits [n, s] and labels [n] of the checkpoint.
      num_classes: C, the number of target classes.
      held_out: as in `score_all`.

    Raises:
      InputError: if the name or an option is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> features = Features(jnp.full((2, 1), jnp.nan), jnp.zeros((2, 0)), jnp.array([0, 1]))
      >>> why_undefined("h_score", features, num_classes=2)
      'the score is not a finite number for these features'
    """
    score = score_named(name)
    try:
        score(features, num_classes, held_out)
    except InputError as error:
        return str(error)
    return "the score is not a finite number for these features"


__all__ = [
    "MIN_CHECKPOINTS",
    "SCORES",
    "Pca",
    "Score",
    "Similarities",
    "SpectralComponents",
    "alignment",
    "batched_spectral_components",
    "effective_rank",
    "h_score",
    "h_score_shrunk",
    "kendall",
    "kendall_interval",
    "knn_accuracy",
    "leep",
    "linear_accuracy",
    "logme",
    "main_rank",
    "mutual_information",
    "nce",
    "ncti",
    "ncti_geometry",
    "ncti_nearest",
    "ncti_variability",
    "nleep",
    "pca",
    "pearson",
    "rankme",
    "recall_at_k",
    "regret",
    "relative_accuracy_at_k",
    "score_all",
    "score_gigaflops",
    "score_named",
    "similarities",
    "singular_values",
    "spectral_components",
    "spectral_decay",
    "split_options",
    "stratified_fifth",
    "transrate",
    "tsne",
    "uniformity",
    "weighted_kendall",
    "why_undefined",
]
