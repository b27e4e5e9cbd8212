"""Validates the arguments of the scores: features, labels, numbers of classes and held-out indices.

JAX clamps, wraps or drops indices out of range instead of raising, so a wrong label would give a plausible number.
Concrete labels take little memory, so they are copied to the host, and invalid values raise an error. Features stay on
their device: only their dtype and shape are checked, and values that are not finite make the score NaN. For a traced
array, only the dtype and shape are known; the compiled program checks traced labels with `in_range` and returns NaN if
they are invalid.
"""

import numbers
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from jax_transfer.records import InputError, printable

SUM_TOLERANCE = 0.01  # allowed error when a row of probabilities is summed; bfloat16 has a relative precision of 0.004


def is_traced(*values) -> bool:
    """Returns whether any value is a JAX tracer, whose contents are unknown at trace time.

    Example:
      >>> import jax.numpy as jnp
      >>> is_traced(jnp.ones(2), 3)
      False
    """
    return any(isinstance(value, Tracer) for value in values)


def as_features(x, name: str = "x", axes: str = "n d") -> Float[Array, "..."]:
    """Converts x to float32, or to float64 if x is float64 and JAX has 64-bit types enabled.

    Args:
      x: an array or nested lists of numbers.
      name: name of the argument, used in messages.
      axes: names of the expected axes.

    Raises:
      InputError: if x does not hold real numbers, has the wrong number of axes, or has an empty axis.

    Example:
      >>> as_features([[1, 2], [3, 4]]).dtype
      dtype('float32')
    """
    x = _as_array(x, name)
    if not (jnp.issubdtype(x.dtype, jnp.floating) or np.dtype(x.dtype).kind in "iub"):
        raise InputError(f"{name} holds {_kind(x.dtype)}: expected real numbers, such as float32.")
    expected = axes.split()
    if x.ndim != len(expected) or 0 in x.shape:
        hint = ""
        if x.ndim > len(expected) and 0 not in x.shape:
            hint = " Reshape it or average over the extra axes."
        raise InputError(
            f"{name} has the shape {list(x.shape)}: expected [{', '.join(expected)}] without an empty axis.{hint}"
        )
    has_x64 = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue] - JAX adds its flags at run time
    dtype = np.float64 if x.dtype == np.float64 and has_x64 else np.float32
    with np.errstate(over="ignore"):  # values beyond float32 become infinite, and the score NaN
        return jnp.asarray(x.astype(dtype))


def as_labels(
    y, num_classes: int | None, n: int | None, name: str = "y", count: str = "num_classes"
) -> Int[Array, "n"]:
    """Converts labels to int32.

    Args:
      y: whole numbers in [0, num_classes), [n].
      num_classes: the result of `as_count`; None allows any number of classes.
      n: expected number of labels; None allows any number except 0.
      name: name of the argument y, used in messages.
      count: name of the argument num_classes, used in messages.

    Raises:
      InputError: if the type, shape or length is wrong, or concrete labels are out of range.

    Example:
      >>> as_labels([0, 2, 1], num_classes=3, n=3).dtype
      dtype('int32')
      >>> as_labels([1, 2, 3], num_classes=3, n=3)
      Traceback (most recent call last):
      jax_transfer.records.InputError: y holds the label 3 (1 of 3 are out of range): expected 0 to 2 ...
    """
    y, expected = _as_array(y, name), "at least 0" if num_classes is None else f"0 to {num_classes - 1}"
    if y.ndim != 1:
        hint = ""
        if y.ndim == 2 and y.shape[1] == 1:
            hint = f" Pass {name}[:, 0]."
        elif y.ndim == 2 and y.shape[1] == num_classes:
            hint = f" Pass {name}.argmax(axis=1) if it is one-hot."
        raise InputError(f"{name} has the shape {list(y.shape)}: expected [n], one label per sample.{hint}")
    if len(y) == 0 or (n is not None and len(y) != n):
        how_many = "at least one" if n is None else f"{n:,}, one per sample"
        raise InputError(f"{name} holds {len(y):,} labels: expected {how_many}.")
    if np.dtype(y.dtype).kind not in "iu":
        raise InputError(
            f"{name} holds {_kind(y.dtype)}{_fraction(y)}: expected whole numbers of an integer type, {expected}."
            f"{_conversion(y, name)}"
        )
    if not is_traced(y):
        values = np.asarray(y)  # checked before the cast, which could wrap them
        low, high = int(values.min()), int(values.max())
        limit = 2**31 if num_classes is None else num_classes
        if low < 0 or high >= limit:
            wrong = (values < 0) | (values >= limit)
            reason = "" if num_classes is None else f" ({count} = {num_classes})"
            raise InputError(
                f"{name} holds the label {low if low < 0 else high} ({int(wrong.sum()):,} of {len(values):,} are out "
                f"of range): expected {expected}{reason}. {_renumbering(values, limit, name, count)}."
            )
    return jnp.asarray(y).astype(jnp.int32)


def as_count(value, name: str = "num_classes", least: int = 2) -> int:
    """Converts a count, such as the number of classes, to a Python int.

    Raises:
      InputError: if the value is traced, not a whole number, or less than `least`.

    Example:
      >>> import numpy as np
      >>> as_count(np.int64(10))
      10
    """
    if is_traced(value):
        raise InputError(
            f"{name} is traced: expected a whole number. Make it static, as in jax.jit(..., static_argnames={name!r})."
        )
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool | np.bool_) or number < least:
        shown = f"an array of shape {list(np.shape(value))}" if getattr(value, "ndim", 0) else repr(value)
        raise InputError(f"{name} is {printable(shown)}: expected a whole number of at least {least}.")
    return number


def as_number(value, name: str, fits: Callable[[float], bool], expected: str):
    """Returns `value` if it is a real number for which `fits` is true; a traced value is not checked.

    Args:
      value: the argument.
      name: name of the argument, used in messages.
      fits: function that returns whether a number is in range.
      expected: description of the valid values, used in messages.

    Raises:
      InputError: if `value` is not a real number or does not fit; the message contains `expected`.

    Example:
      >>> as_number(0.8, "energy", lambda energy: 0 < energy <= 1, "a fraction in (0, 1]")
      0.8
    """
    if not is_traced(value) and not (_is_real(value) and fits(value)):
        shown = f"an array of shape {list(value.shape)}" if getattr(value, "ndim", 0) else repr(value)
        raise InputError(f"{name} is {printable(shown)}: expected {expected}.")
    return value


def _is_real(value) -> bool:
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return np.ndim(value) == 0 and (jnp.issubdtype(value.dtype, jnp.floating) or value.dtype.kind in "iu")
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def as_seed(seed) -> Int[Array, ""]:
    """Converts a seed to an integer array that `jax.random.key` accepts.

    Raises:
      InputError: if the seed is not a whole number of at most 32 bits.

    Example:
      >>> int(as_seed(7.0))
      7
    """
    if not is_traced(seed):
        whole = "a whole number, such as 0, of at most 32 bits"
        as_number(seed, "seed", lambda value: float(value).is_integer() and -(2**31) <= value < 2**31, whole)
        seed = int(seed)
    return jnp.asarray(seed)


def as_held_out(held_out, n: int, least: int = 1, name: str = "held_out") -> Int[Array, "m"]:
    """Converts the indices of held-out samples to int32.

    Args:
      held_out: distinct whole numbers in [0, n), [m].
      n: number of samples. At least one must remain to fit on.
      least: minimum number of indices, m.
      name: name of the argument, used in messages.

    Raises:
      InputError: if the type or shape is wrong, there are too few or too many indices, or concrete indices are out of
        range or duplicated.

    Example:
      >>> as_held_out([4, 1], n=5).tolist()
      [4, 1]
    """
    held_out = _as_array(held_out, name)
    if held_out.ndim != 1 or np.dtype(held_out.dtype).kind not in "iu":
        hint = f" Pass np.flatnonzero({name}) if it is a mask." if held_out.dtype == bool else ""
        raise InputError(
            f"{name} holds {_kind(held_out.dtype)} of shape {list(held_out.shape)}: expected sample indices "
            f"(whole numbers) of shape [m].{hint}"
        )
    m = len(held_out)
    if not least <= m < n:
        raise InputError(
            f"{name} holds {m:,} of {n:,} samples: expected at least {least} and at most {n - 1:,}, since at least one "
            "sample must remain to fit on."
        )
    if not is_traced(held_out):
        values = np.asarray(held_out)
        if values.min() < 0 or values.max() >= n:
            wrong = values.min() if values.min() < 0 else values.max()
            raise InputError(f"{name} holds the index {wrong}: expected 0 to {n - 1}.")
        if len(np.unique(values)) < m:
            raise InputError(f"{name} holds an index more than once: expected distinct indices.")
    return jnp.asarray(held_out).astype(jnp.int32)


def as_probabilities(p, name: str = "source_probs") -> Float[Array, "n s"]:
    """Converts probabilities as `as_features` does.

    Raises:
      InputError: if the type or shape is wrong, or a concrete row has an entry below 0 or does not sum to 1. Rows that
        contain values that are not finite are accepted.

    Example:
      >>> as_probabilities([[0.25, 0.75]]).tolist()
      [[0.25, 0.75]]
    """
    p = as_features(p, name, "n s")
    if not is_traced(p):
        wrong = np.flatnonzero(~np.asarray(are_probabilities(p)))
        if len(wrong):
            row = np.asarray(p[int(wrong[0])])
            raise InputError(
                f"{name} holds {len(wrong):,} rows that are not probabilities (row {wrong[0]} has values in "
                f"[{row.min():.3g}, {row.max():.3g}] and sums to {row.sum():.3g}): expected non-negative rows that sum "
                "to 1. Pass jax.nn.softmax(logits) if they are logits."
            )
    return p


def are_probabilities(p: Float[Array, "n s"]) -> Bool[Array, "n"]:
    """Returns a mask of the rows that are probabilities up to rounding, or whose sum is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> are_probabilities(jnp.array([[0.5, 0.5], [2.0, -1.0], [0.5, jnp.nan]])).tolist()
      [True, False, True]
    """
    total = jnp.sum(p, axis=1)
    return ~jnp.isfinite(total) | ((jnp.min(p, axis=1) >= -SUM_TOLERANCE) & (jnp.abs(total - 1) <= SUM_TOLERANCE))


def in_range(y: Int[Array, "n"], num_classes: int) -> Bool[Array, ""]:
    """Returns whether all labels (or indices) lie in [0, num_classes).

    Example:
      >>> import jax.numpy as jnp
      >>> bool(in_range(jnp.array([0, 2]), 3)), bool(in_range(jnp.array([0, 3]), 3))
      (True, False)
    """
    return jnp.all((y >= 0) & (y < num_classes))


def where_valid(valid: Bool[Array, ""], value: Float[Array, ""]) -> Float[Array, ""]:
    """Returns `value` if `valid`, else NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> float(where_valid(jnp.array(False), jnp.array(0.5)))
      nan
    """
    return jnp.where(valid, value, jnp.nan)


def scored(
    score: Callable[[Float[Array, "n d"], Int[Array, "n"]], Float[Array, ""]],
    x: Float[Array, "n d"],
    y: Int[Array, "n"],
    num_classes: int,
) -> Float[Array, ""]:
    """Returns score(x, y), or NaN if y is traced and holds a label out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> score = lambda x, y: jnp.mean(x[y])
      >>> jitted = jax.jit(lambda x, y: scored(score, x, y, num_classes=2))
      >>> x = jnp.ones((2, 1))
      >>> float(jitted(x, jnp.array([0, 1]))), float(jitted(x, jnp.array([0, 2])))
      (1.0, nan)
    """
    if not is_traced(y):
        return score(x, y)
    return where_valid(in_range(y, num_classes), score(x, jnp.clip(y, 0, num_classes - 1)))


def _as_array(value, name):
    """Returns `value` as a JAX or numpy array; lists and arrays of other libraries become numpy arrays."""
    if isinstance(value, jax.Array | np.ndarray):
        return value
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(
            f"{name} is not an array ({str(error).splitlines()[0]}): expected numbers in a rectangular array."
        ) from error


def _kind(dtype) -> str:
    """Describes the contents of an array of this dtype in messages."""
    return {"O": "objects", "U": "text", "S": "text"}.get(np.dtype(dtype).kind, np.dtype(dtype).name)


def _fraction(y) -> str:
    """Returns a message part that names a float label that is not a whole number, or "" if there is none."""
    if is_traced(y) or not jnp.issubdtype(y.dtype, jnp.floating):
        return ""
    values = np.asarray(y, np.float64)
    wrong = values[~np.isfinite(values) | (values != np.floor(values))]
    return f" ({wrong[0]} among them)" if len(wrong) else ""


def _conversion(y, name: str) -> str:
    """Returns the part of a message that says how to convert labels to integers."""
    if np.dtype(y.dtype).kind in "OUS":
        return f" Number the classes with np.unique({name}, return_inverse=True)[1]."
    return "" if _fraction(y) else f" Pass {name}.astype(int)."


def _renumbering(values: np.ndarray, num_classes: int, name: str, count: str) -> str:
    """Returns the part of a message that says how to correct labels that are out of range."""
    low, high = int(values.min()), int(values.max())
    different = len(np.unique(values))
    if low < 0:
        return "Remove the samples without a label"
    if low == 1 and high == num_classes:
        return "Subtract 1 if they count from 1"
    if different <= num_classes:
        return f"Number the classes without gaps: np.unique({name}, return_inverse=True)[1]"
    return f"{different} different classes occur, so pass a larger {count}"
