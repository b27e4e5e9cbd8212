"""Lookup in a dictionary of named options, with an error message that lists the valid names."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

from jax_transfer.records import InputError

T = TypeVar("T")


def choose(options: Mapping[str, T], name: str, description: str) -> T:
    """Returns `options[name]`.

    >>> choose({"resnet18": 18, "vit": 12}, "resnet18", "model (config.model.name)")
    18
    >>> choose({"resnet18": 18, "vit": 12}, "resnet81", "model (config.model.name)")
    Traceback (most recent call last):
      ...
    jax_transfer.records.InputError: Unknown model (config.model.name): 'resnet81'. Did you mean 'resnet18'?
    Valid: resnet18, vit.

    Args:
      description: what is looked up and where the name comes from, for the error message.

    Raises:
      InputError: if the name is unknown. The message lists the valid names and suggests the closest one.
    """
    if name in options:
        return options[name]
    close = difflib.get_close_matches(str(name), list(options), n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise InputError(f"Unknown {description}: {name!r}.{hint} Valid: {', '.join(sorted(options))}.")
