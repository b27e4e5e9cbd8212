"""Selects the source classes that are most similar to a target by unbalanced or greedy optimal transport.

"Improved Fine-Tuning by Better Leveraging Pre-Training Data" (UOT selection), section 3.3. A class, or a cluster of
images without labels, is represented by the mean of its features. Unbalanced transport moves the target classes to the
source classes that are near: every target class must be covered, but not every source class, so the mass that a source
class receives is its similarity to the target.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jax_transfer.analysis.arguments import as_count, as_features, as_number, is_traced
from jax_transfer.choose import choose
from jax_transfer.numerics import positive, unit
from jax_transfer.records import InputError
from jax_transfer.selection.vectors import as_vectors

# Metric -> usual scale of the cost, epsilon_c in the paper. Its scale for l2 is that of the authors' scripts.
COST_SCALES = {"cosine": 0.01, "l2": 0.1}
TOLERANCE = 1e-5  # largest relative error of a similarity at convergence, if rounding allows it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selection:
    """Source classes, or clusters, in the order of their similarity to a target.

    Attributes:
      indices: the selected classes, most similar first: the beginning of `ranking`.
      similarity: similarity of every source class to the target, higher is more similar. Its scale depends on the
        strategy; NaN if the strategy has none.
      ranking: all source classes, most similar first; equally similar ones by index.
      converged: whether the solver converged; True for a strategy without iterations.
      iterations: number of iterations of the solver, 0 for a strategy without.
    """

    indices: Int[Array | np.ndarray, "k"]
    similarity: Float[Array | np.ndarray, "s"]
    ranking: Int[Array | np.ndarray, "s"]
    converged: Bool[Array, ""] | bool = True
    iterations: Int[Array, ""] | int = 0


def uot_selection(
    source_means: Float[Array, "s d"],
    target_means: Float[Array, "t d"],
    num_selected: int = 100,
    metric: str = "cosine",
    cost_scale: float | None = None,
    epsilon: float = 1.0,
    tau_source: float = 1.0,
    tau_target: float = 100.0,
    *,
    max_iterations: int = 2_000,
) -> Selection:
    """Selects source classes by unbalanced optimal transport: those with the largest marginal of the plan P [s, t].

        min_P <P, C> - epsilon H(P) + tau_source KL(P 1 | 1) + tau_target KL(P' 1 | 1)

    "Improved Fine-Tuning by Better Leveraging Pre-Training Data", equation 5, with unit weights for all classes. The
    cost C is (1 - cos) / cost_scale, or the Euclidean distance / cost_scale of the means as they are. Sinkhorn's
    iterations run in the log domain through `ott`. Each brings the logarithms of the marginals closer to the solution
    by the factor q = tau_source / (tau_source + epsilon) * tau_target / (tau_target + epsilon) or better, which bounds
    the remaining error by the last change: q / (1 - q) times. The iterations stop when this bound is a relative error
    of 1e-5 in the similarity, or the changes are as small as the rounding of the cost. A q close to 1 needs many.

    Args:
      source_means: mean features of the source classes.
      target_means: mean features of the target classes.
      num_selected: number of classes to select, static.
      metric: "cosine" or "l2", static.
      cost_scale: the cost is divided by it. None: 0.01 for cosine, 0.1 for l2. A small one gives the similarity to the
        nearest target classes alone.
      epsilon: weight of the entropy.
      tau_source: weight of the deviation of the source marginal. Small, so that dissimilar classes receive no mass.
      tau_target: weight of the deviation of the target marginal. Large, so that every target class is covered.
      max_iterations: maximum number of iterations.

    Returns:
      A `Selection` with the source marginal P 1 as similarity. It can be below the smallest float32, so the ranking is
      that of its logarithm. `converged` is False if max_iterations did not suffice. If a traced mean is not finite or,
      with the metric cosine, 0, it is False as well and the similarity is NaN.

    Raises:
      InputError: if the means have the wrong type or shape or differ in d, a mean is not finite or, with the metric
        cosine, 0, there are fewer than num_selected source classes, the metric is unknown, or a number is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> source = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]])
      >>> selection = uot_selection(source, jnp.array([[1.0, 0.2]]), num_selected=2)
      >>> selection.indices.tolist(), bool(selection.converged)
      ([2, 0], True)
    """
    usual_scale = choose(COST_SCALES, metric, "metric")
    source, target, num_selected = _checked(source_means, target_means, num_selected, metric)
    scale = usual_scale if cost_scale is None else cost_scale
    weights = {"cost_scale": scale, "epsilon": epsilon, "tau_source": tau_source, "tau_target": tau_target}
    for name, value in weights.items():
        as_number(value, name, lambda value: 0 < value < float("inf"), "a positive number")
    max_iterations = as_count(max_iterations, "max_iterations", least=1)
    cost = _distances(source, target, metric) / scale
    log_marginal, converged, iterations = _sinkhorn(cost, epsilon, tau_source, tau_target, max_iterations)
    valid = jnp.all(jnp.isfinite(cost))  # ott takes a log-sum that is not finite for 0
    # NaN last, because XLA on CPU does not define the exponential of a constant NaN.
    similarity = jnp.where(valid, jnp.exp(log_marginal), jnp.nan)
    return _ranked(log_marginal, similarity, num_selected, converged & valid, iterations)


def greedy_ot_selection(
    source_means: Float[Array, "s d"],
    target_means: Float[Array, "t d"],
    num_selected: int = 100,
    metric: str = "l2",
    *,
    target_counts: Int[Array, "t"] | None = None,
) -> Selection:
    """Selects the source classes with the smallest mean distance to all target classes.

    This is the exact transport cost between a source class alone and the target, after which Cui et al., "Large Scale
    Fine-Grained Categorization and Domain-Specific Transfer Learning", CVPR 2018, select classes one by one; the paper
    on UOT selection compares with it.

    Args:
      source_means: mean features of the source classes.
      target_means: mean features of the target classes.
      num_selected: number of classes to select, static.
      metric: "l2" for the Euclidean distance, as in both papers, or "cosine" for 1 - cos; static.
      target_counts: number of images of each target class, its weight in the mean; None: equal weights. The authors'
        scripts use the counts.

    Returns:
      A `Selection` with the negative mean distance as similarity.

    Raises:
      InputError: as in `uot_selection`, or if target_counts is not a positive number for each target class.

    Example:
      >>> import jax.numpy as jnp
      >>> selection = greedy_ot_selection(jnp.array([[0.0], [2.0], [5.0]]), jnp.array([[2.0], [3.0]]), num_selected=2)
      >>> selection.indices.tolist(), selection.similarity.round(2).tolist()
      ([1, 0], [-2.5, -0.5, -2.5])
    """
    choose(COST_SCALES, metric, "metric")
    source, target, num_selected = _checked(source_means, target_means, num_selected, metric)
    weights = jnp.ones(len(target), source.dtype) if target_counts is None else _as_weights(target_counts, len(target))
    # Not a matrix product, whose rounding may differ between equal rows, nor in lower precision on accelerators.
    similarity = -jnp.sum(_distances(source, target, metric) * (weights / jnp.sum(weights)), axis=1)
    return _ranked(similarity, similarity, num_selected, True, 0)


def recall(indices: Int[Array | np.ndarray, "k"], relevant: Int[Array | np.ndarray, "r"]) -> float:
    """Returns the share of the relevant classes that are selected, in [0, 1] (table 4 and figure 4a of the paper).

    Args:
      indices: the selected classes.
      relevant: the classes that should be selected, such as those of birds.

    Raises:
      InputError: if an argument does not hold whole numbers, or no class is relevant.

    Example:
      >>> recall([3, 1, 7], relevant=[1, 2, 3])
      0.666...
    """
    selected, wanted = (_as_classes(value, name) for name, value in (("indices", indices), ("relevant", relevant)))
    if len(wanted) == 0:
        raise InputError("relevant is empty: expected at least one class, since the recall is a share of them.")
    return len(wanted & selected) / len(wanted)


def _as_classes(value, name: str) -> set[int]:
    classes = np.asarray(value)
    if classes.ndim != 1 or (classes.size and classes.dtype.kind not in "iu"):
        hint = f" Pass np.flatnonzero({name}) if it is a mask." if classes.dtype == bool else ""
        raise InputError(
            f"{name} holds {classes.dtype} of shape {list(classes.shape)}: expected indices of classes (whole numbers) "
            f"of shape [k].{hint}"
        )
    return set(classes.tolist())


def _checked(source_means, target_means, num_selected, metric: str):
    """Validates the arguments that the strategies share."""
    advice = "a class without images has no mean. Leave it out, and number the others without gaps"
    source = as_vectors(source_means, "source_means", "s d", metric, advice)
    target = as_vectors(target_means, "target_means", "t d", metric, advice)
    if source.shape[1] != target.shape[1]:
        raise InputError(
            f"source_means has {source.shape[1]:,} features and target_means {target.shape[1]:,}: expected the same "
            "features, those of one checkpoint."
        )
    return source, target, as_num_selected(num_selected, len(source), "source_means holds")


def _as_weights(target_counts, t: int) -> Float[Array, "t"]:
    weights = as_features(target_counts, "target_counts", "t")
    if len(weights) != t:
        raise InputError(
            f"target_counts holds {len(weights):,} numbers: expected one for each of {t:,} target classes."
        )
    if not is_traced(weights):
        wrong = np.flatnonzero(~(np.isfinite(weights) & (np.asarray(weights) > 0)))
        if len(wrong):
            raise InputError(
                f"target_counts[{wrong[0]}] is {weights[wrong[0]]:g}: expected a positive number of images."
            )
    return weights


def as_num_selected(num_selected, num_source: int, holder: str) -> int:
    """Converts the number of classes to select to a Python int.

    Args:
      num_selected: the argument.
      num_source: number of source classes.
      holder: what holds the classes, with a verb, used in the message.

    Raises:
      InputError: if it is not a whole number from 1 to num_source.

    Example:
      >>> as_num_selected(3, 2, "source_means holds")
      Traceback (most recent call last):
      jax_transfer.records.InputError: num_selected = 3, but source_means holds 2 classes: select at most 2.
    """
    number = as_count(num_selected, "num_selected", least=1)
    if number > num_source:
        raise InputError(
            f"num_selected = {number:,}, but {holder} {num_source:,} classes: select at most {num_source:,}."
        )
    return number


@functools.partial(jax.jit, static_argnames="metric")
def _distances(source: Float[Array, "s d"], target: Float[Array, "t d"], metric: str) -> Float[Array, "s t"]:
    """Computes 1 - cos, or the Euclidean distance, from differences, which stay accurate where vectors are close."""
    if metric == "cosine":
        source, target = unit(source), unit(target)
    # Scaled first, because the squares of large values would overflow.
    scale = positive(jnp.maximum(jnp.max(jnp.abs(source)), jnp.max(jnp.abs(target))))
    source, target = source / scale, target / scale
    squares = jax.lax.map(lambda one: jnp.sum((source - one) ** 2, axis=1), target).T
    return squares * scale**2 / 2 if metric == "cosine" else jnp.sqrt(squares) * scale


@jax.jit
def _sinkhorn(
    cost: Float[Array, "s t"], epsilon: float, tau_source: float, tau_target: float, max_iterations: int
) -> tuple[Float[Array, "s"], Bool[Array, ""], Int[Array, ""]]:
    """Solves the unbalanced problem with unit weights.

    ott's own stopping rule adds up the errors of the marginals, which hides those of classes that receive little mass.

    Returns:
      (logarithm of the source marginal; whether it converged; number of iterations).
    """
    from ott.geometry import geometry  # here, because importing ott takes seconds
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import sinkhorn

    s, t = cost.shape
    ratios = tau_source / (tau_source + epsilon), tau_target / (tau_target + epsilon)  # ott's tau
    problem = linear_problem.LinearProblem(
        geometry.Geometry(cost_matrix=cost, epsilon=epsilon),
        jnp.ones(s, cost.dtype),
        jnp.ones(t, cost.dtype),
        tau_a=ratios[0],
        tau_b=ratios[1],
    )
    solver = sinkhorn.Sinkhorn(lse_mode=True)
    q = ratios[0] * ratios[1]
    largest_change = TOLERANCE * tau_source * (1 - q) / q

    def iteration(carry):
        state, count, _ = carry
        updated = solver.lse_step(problem, state, count)
        change = jnp.max(jnp.abs(updated.fu - state.fu))
        magnitude = jnp.max(cost) + jnp.max(jnp.abs(updated.fu)) + jnp.max(jnp.abs(updated.gv))
        rounding = jnp.finfo(cost.dtype).eps * magnitude
        return updated, count + 1, change <= jnp.maximum(largest_change, rounding)

    start = sinkhorn.SinkhornState((jnp.zeros(s, cost.dtype), jnp.zeros(t, cost.dtype)))
    state, count, converged = jax.lax.while_loop(
        lambda carry: ~carry[2] & (carry[1] < max_iterations), iteration, (start, jnp.array(0), jnp.array(False))
    )
    return -state.fu / tau_source, converged, count  # equation 5 at its minimum, exact after each update of f


def _ranked(order, similarity, num_selected: int, converged, iterations) -> Selection:
    """Ranks the classes by decreasing `order`, ties by index."""
    ranking = jnp.argsort(-order, stable=True)
    return Selection(ranking[:num_selected], similarity, ranking, converged, iterations)
