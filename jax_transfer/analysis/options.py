"""Options in the name of a score: "nleep?energy=0.5&components_per_class=2" is N-LEEP with these arguments."""

import functools
import inspect
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jax_transfer.choose import choose
from jax_transfer.records import InputError

NUMBER = re.compile(r"[+-]?(\d+|(\d+\.\d*|\.\d+)(e[+-]?\d+)?|\d+e[+-]?\d+)", re.ASCII | re.IGNORECASE)


def split_options(name: str) -> tuple[str, dict[str, int | float]]:
    """Splits the name of a score into the name without options, and the options.

    Raises:
      InputError: if the text after the question mark is not KEY=NUMBER&KEY=NUMBER..., or a key is given twice.

    Example:
      >>> split_options("nleep?energy=0.5&components_per_class=2")
      ('nleep', {'energy': 0.5, 'components_per_class': 2})
      >>> split_options("nleep")
      ('nleep', {})
    """
    base, mark, text = name.partition("?")
    options: dict[str, int | float] = {}
    for pair in text.split("&") if mark else ():
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise InputError(f"{name!r}: {pair!r} is not an option: expected KEY=NUMBER, as in 'knn?k=5'.")
        if not NUMBER.fullmatch(value):
            raise InputError(f"{name!r}: {key} must be a number, such as 5 or 0.5, got {value!r}.")
        if key in options:
            raise InputError(f"{name!r}: {key} is given twice; give each option once.")
        options[key] = float(value) if set(value.lower()) & set(".e") else int(value)
    return base, options


def with_options(function: Callable, options: Mapping[str, int | float], name: str) -> Callable:
    """Returns function(x, y, num_classes, **options), after checking the options with the function itself.

    Args:
      function: function(x [n, d], y [n], num_classes), with further arguments that have defaults.
      options: argument -> value.
      name: name of the score, used in messages.

    Raises:
      InputError: if the function has no such argument, or does not take the value.

    Example:
      >>> from jax_transfer.analysis.representation import knn_accuracy
      >>> x = jnp.array([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [0.1, 3.0], [1.0, 0.1]])
      >>> score = with_options(knn_accuracy, {"k": 1}, "knn?k=1")
      >>> round(float(score(x, jnp.array([0, 0, 1, 1, 1]), 2)), 2)
      0.6
    """
    valid = _settable(function)
    if not valid:
        raise InputError(f"{name!r}: this score has no options: write {name.partition('?')[0]!r}.")
    for key, value in options.items():
        choose(valid, key, f"option (in {name!r})")
        try:
            _check(function, key, value)
        except InputError as error:
            raise InputError(f"{name!r}: {error}") from error
    return functools.partial(function, **options)


def _check(function: Callable, key: str, value: int | float) -> None:
    """Traces the function, which checks its arguments, without computing anything."""
    x, y = jax.ShapeDtypeStruct((16, 2), jnp.float32), jax.ShapeDtypeStruct((16,), jnp.int32)
    jax.eval_shape(lambda x, y: function(x, y, 2, **{key: value}), x, y)


def _settable(function: Callable) -> dict[str, inspect.Parameter]:
    """Returns the arguments with defaults, but for `held_out` and those that the entry in SCORES has set."""
    fixed = {"held_out", *(function.keywords if isinstance(function, functools.partial) else ())}
    return {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not parameter.empty and name not in fixed
    }
