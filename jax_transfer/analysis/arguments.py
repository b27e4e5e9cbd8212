"""What the scores accept: one check of features, labels, class counts and held-out indices for all public functions.

JAX clamps, wraps or drops an index out of range instead of raising, so a wrong label gives a plausible number. Concrete
labels are read on the host, where they are few, and what is wrong with them raises. Features stay where they are: their
type and shape are checked, and values that are not finite give NaN. Of a traced array only type and shape are known;
`in_range` tells the labels' values apart in the compiled program, where wrong ones give NaN.
"""

import numbers
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jax_transfer.records import InputError, printable

SUM_TOLERANCE = 0.01  # of a row of probabilities: bfloat16 rounds each to 0.004 of itself


def is_traced(*values) -> bool:
    return any(isinstance(value, jax.core.Tracer) for value in values)


def as_features(x, name: str = "x", axes: str = "n d") -> Float[Array, "..."]:
    """x as float32, or as float64 where JAX keeps float64.

    Args:
      x: an array, or lists of numbers.
      name: of the argument, for messages.
      axes: names of the axes that it must have.

    Raises:
      InputError: if x holds no real numbers, has other axes, or an empty one.
    """
    x = _as_array(x, name)
    if not (jnp.issubdtype(x.dtype, jnp.floating) or np.dtype(x.dtype).kind in "iub"):
        raise InputError(f"{name} holds {_kind(x.dtype)}: expected real numbers, such as float32.")
    expected = axes.split()
    if x.ndim != len(expected) or 0 in x.shape:
        hint = ""
        if x.ndim > len(expected) and 0 not in x.shape:
            hint = "; reshape or average the other axes away"
        raise InputError(
            f"{name} has the shape {list(x.shape)}: expected [{', '.join(expected)}], none of them 0{hint}."
        )
    dtype = np.float64 if x.dtype == np.float64 and jax.config.jax_enable_x64 else np.float32
    with np.errstate(over="ignore"):  # beyond float32 is infinite, and the result NaN
        return jnp.asarray(x.astype(dtype))


def as_labels(
    y, num_classes: int | None, n: int | None, name: str = "y", count: str = "num_classes"
) -> Int[Array, "n"]:
    """y as int32.

    Args:
      y: whole numbers in [0, num_classes), [n].
      num_classes: what `as_count` returned; None: any number of classes.
      n: how many there must be; None: any number but 0.
      name, count: of the two arguments, for messages.

    Raises:
      InputError: for another type, shape or length, and for concrete labels out of range.
    """
    y, expected = _as_array(y, name), "0 or more" if num_classes is None else f"0 to {num_classes - 1}"
    if y.ndim != 1:
        hint = ""
        if y.ndim == 2 and y.shape[1] == 1:
            hint = f"; pass {name}[:, 0]"
        elif y.ndim == 2 and y.shape[1] == num_classes:
            hint = f"; pass {name}.argmax(axis=1) if it is one-hot"
        raise InputError(f"{name} has the shape {list(y.shape)}: expected [n], one label for each sample{hint}.")
    if len(y) == 0 or (n is not None and len(y) != n):
        how_many = "at least one" if n is None else f"{n:,}, one for each sample"
        raise InputError(f"{name} holds {len(y):,} labels: expected {how_many}.")
    if np.dtype(y.dtype).kind not in "iu":
        raise InputError(
            f"{name} holds {_kind(y.dtype)}{_not_whole(y)}: expected whole numbers, {expected}, of an integer type"
            f"{_conversion(y, name)}."
        )
    if not is_traced(y):
        values = np.asarray(y)  # before a cast could wrap them
        low, high = int(values.min()), int(values.max())
        limit = 2**31 if num_classes is None else num_classes
        if low < 0 or high >= limit:
            wrong = (values < 0) | (values >= limit)
            said = "" if num_classes is None else f" ({count} {num_classes})"
            raise InputError(
                f"{name} holds the label {low if low < 0 else high} ({int(wrong.sum()):,} of {len(values):,} are out of "
                f"range): expected {expected}{said}; {_renumbering(values, limit, name, count)}."
            )
    return jnp.asarray(y).astype(jnp.int32)


def as_count(value, name: str = "num_classes", least: int = 2) -> int:
    """A number of classes as a Python int.

    Raises:
      InputError: if it is traced, no whole number, or below `least`.
    """
    if is_traced(value):
        raise InputError(
            f"{name} is traced: expected a whole number; make it static, as in jax.jit(..., static_argnames={name!r})."
        )
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool | np.bool_) or number < least:
        got = f"an array of the shape {list(np.shape(value))}" if hasattr(value, "ndim") and value.ndim else repr(value)
        raise InputError(f"{name} is {printable(got)}: expected a whole number, {least} or more.")
    return number


def as_number(value, name: str, fits: Callable[[float], bool], expected: str):
    """value, a real number that fits; a traced one is not looked at.

    Raises:
      InputError: saying what was expected.
    """
    if not is_traced(value) and not (_is_real(value) and fits(value)):
        got = f"an array of the shape {list(value.shape)}" if getattr(value, "ndim", 0) else repr(value)
        raise InputError(f"{name} is {printable(got)}: expected {expected}.")
    return value


def _is_real(value) -> bool:
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return np.ndim(value) == 0 and (jnp.issubdtype(value.dtype, jnp.floating) or value.dtype.kind in "iu")
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def as_seed(seed) -> Int[Array, ""]:
    """A seed as JAX takes it.

    Raises:
      InputError: if it is no whole number of 32 bits.
    """
    if not is_traced(seed):
        whole = "a whole number, such as 0, of at most 32 bits"
        as_number(seed, "seed", lambda value: float(value).is_integer() and -(2**31) <= value < 2**31, whole)
        seed = int(seed)
    return jnp.asarray(seed)


def as_held_out(held_out, n: int, least: int = 1, name: str = "held_out") -> Int[Array, "m"]:
    """Indices of the samples to test on, as int32.

    Args:
      held_out: different whole numbers in [0, n), [m].
      n: number of samples; at least one must be left to fit on.
      least: the smallest m.

    Raises:
      InputError: for another type or shape, too few or too many, and for concrete indices out of range or given twice.
    """
    held_out = _as_array(held_out, name)
    if held_out.ndim != 1 or np.dtype(held_out.dtype).kind not in "iu":
        hint = f"; pass np.flatnonzero({name}) if it is a mask" if held_out.dtype == bool else ""
        raise InputError(
            f"{name} holds {_kind(held_out.dtype)} of the shape {list(held_out.shape)}: expected indices of samples, "
            f"whole numbers [m]{hint}."
        )
    m = len(held_out)
    if not least <= m < n:
        raise InputError(
            f"{name} holds {m:,} of {n:,} samples: expected at least {least}, and fewer than all, so that some are left to fit on."
        )
    if not is_traced(held_out):
        values = np.asarray(held_out)
        if values.min() < 0 or values.max() >= n:
            wrong = values.min() if values.min() < 0 else values.max()
            raise InputError(f"{name} holds the index {wrong}: expected 0 to {n - 1}.")
        if len(np.unique(values)) < m:
            raise InputError(f"{name} holds an index more than once: expected different ones.")
    return jnp.asarray(held_out).astype(jnp.int32)


def as_probabilities(p, name: str = "source_probs") -> Float[Array, "n s"]:
    """p as `as_features` returns it.

    Raises:
      InputError: also for concrete rows with an entry below 0 or a sum that is not 1. Rows that are not finite pass.
    """
    p = as_features(p, name, "n s")
    if not is_traced(p):
        wrong = np.flatnonzero(~np.asarray(are_probabilities(p)))
        if len(wrong):
            row = np.asarray(p[int(wrong[0])])
            raise InputError(
                f"{name} holds {len(wrong):,} rows that are no probabilities (row {wrong[0]} lies in [{row.min():.3g}, "
                f"{row.max():.3g}] and sums to {row.sum():.3g}): expected rows of at least 0 that sum to 1; "
                "pass jax.nn.softmax(logits) if they are logits."
            )
    return p


def are_probabilities(p: Float[Array, "n s"]) -> Bool[Array, "n"]:
    """Which rows are probabilities up to rounding, or not finite."""
    total = jnp.sum(p, axis=1)
    return ~jnp.isfinite(total) | ((jnp.min(p, axis=1) >= -SUM_TOLERANCE) & (jnp.abs(total - 1) <= SUM_TOLERANCE))


def in_range(y: Int[Array, "n"], num_classes: int) -> Bool[Array, ""]:
    """Whether all labels, or indices, lie in [0, num_classes)."""
    return jnp.all((y >= 0) & (y < num_classes))


def where_valid(valid: Bool[Array, ""], value: Float[Array, ""]) -> Float[Array, ""]:
    """value, or NaN."""
    return jnp.where(valid, value, jnp.nan)


def scored(score, x: Float[Array, "n d"], y: Int[Array, "n"], num_classes: int) -> Float[Array, ""]:
    """score(x, y): NaN if y, which may be traced, holds a label out of range."""
    if not is_traced(y):
        return score(x, y)
    return where_valid(in_range(y, num_classes), score(x, jnp.clip(y, 0, num_classes - 1)))


def _as_array(value, name):
    """A JAX or numpy array; lists and other libraries' arrays become numpy's."""
    if isinstance(value, jax.Array | np.ndarray):
        return value
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(
            f"{name} is no array ({str(error).splitlines()[0]}): expected numbers of one shape."
        ) from error


def _kind(dtype):
    return {"O": "objects", "U": "text", "S": "text"}.get(np.dtype(dtype).kind, np.dtype(dtype).name)


def _not_whole(y):
    """What a message adds for float labels that are not whole."""
    if is_traced(y) or not jnp.issubdtype(y.dtype, jnp.floating):
        return ""
    values = np.asarray(y, np.float64)
    wrong = values[~np.isfinite(values) | (values != np.floor(values))]
    return f" ({wrong[0]} among them)" if len(wrong) else ""


def _conversion(y, name):
    if np.dtype(y.dtype).kind in "OUS":
        return f"; number the classes: np.unique({name}, return_inverse=True)[1]"
    return "" if _not_whole(y) else f"; pass {name}.astype(int)"


def _renumbering(values, num_classes, name, count):
    """What to do about labels out of range."""
    low, high = int(values.min()), int(values.max())
    different = len(np.unique(values))
    if low < 0:
        return "leave out the samples without a label"
    if low == 1 and high == num_classes:
        return "subtract 1 if they count from 1"
    if different <= num_classes:
        return f"number the classes without gaps: np.unique({name}, return_inverse=True)[1]"
    return f"{different} classes occur: pass a larger {count}"
