"""Look a name up in a dictionary, or say which names exist."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

from jax_transfer.records import InputError

T = TypeVar("T")


def choose(options: Mapping[str, T], name: str, what: str) -> T:
    """Returns `options[name]`.

    Raises:
      InputError: if there is no such name; the message lists the valid ones. `what` says what was
        looked up and where the name came from, such as "model (config.model.name)".
    """
    if name in options:
        return options[name]
    close = difflib.get_close_matches(str(name), list(options), n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise InputError(f"Unknown {what}: {name!r}.{hint} Valid: {', '.join(sorted(options))}.")
