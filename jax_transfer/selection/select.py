"""Selects source classes without their features: at random, or by the names of their labels."""

import difflib
from collections.abc import Sequence

import numpy as np

from jax_transfer.analysis.arguments import as_count, as_seed
from jax_transfer.records import InputError, printable
from jax_transfer.selection.transport import Selection, as_num_selected


def random_selection(num_source: int, num_selected: int = 100, seed: int = 0) -> Selection:
    """Selects classes, or clusters, uniformly at random, whatever their sizes.

    A smaller selection with the same seed is the beginning of a larger one.

    Args:
      num_source: number of source classes or clusters.
      num_selected: number of classes to select.
      seed: seed of the draw.

    Returns:
      A `Selection` whose ranking is the order of the draw; its similarity is NaN.

    Raises:
      InputError: if an argument is not a whole number, or num_selected is not between 1 and num_source.

    Example:
      >>> random_selection(1_000, 4, seed=1).indices.tolist()
      [705, 649, 543, 927]
    """
    num_source = as_count(num_source, "num_source", least=1)
    num_selected = as_num_selected(num_selected, num_source, "there are")
    # numpy takes no negative seed, which as_seed allows.
    ranking = np.random.default_rng(int(as_seed(seed)) % 2**32).permutation(num_source).astype(np.int32)
    return Selection(ranking[:num_selected], np.full(num_source, np.nan, np.float32), ranking)


def label_selection(source_names: Sequence[str], wanted: Sequence[str]) -> Selection:
    """Selects the source classes with the wanted names.

    Names are compared as in `shared_names`. If several source classes have a wanted name, all of them are selected.
    For the names that a source and a target have in common, pass the result of `shared_names`.

    Args:
      source_names: names of the source classes, in their order.
      wanted: names of the classes to select, such as those of birds.

    Returns:
      A `Selection` with the indices in the order of the source. The similarity is 1 for selected classes, 0 for others.

    Raises:
      InputError: if no name is wanted, or no source class has a wanted name; the message gives the nearest names.

    Example:
      >>> label_selection(["tench, Tinca tinca", "cock", "Brambling"], ["brambling", "tench"]).indices.tolist()
      [0, 2]
    """
    names = [_synonyms(name, "source_names") for name in _as_names(source_names, "source_names")]
    known = set().union(*names)
    wanted_names: set[str] = set()
    for name in _as_names(wanted, "wanted"):
        found = _synonyms(name, "wanted") & known
        if not found:
            close = difflib.get_close_matches(_normalised(name), sorted(known), n=3)
            hint = f"; similar names: {', '.join(map(repr, close))}" if close else ""
            raise InputError(
                f"wanted holds {printable(name)!r}, but none of the {len(names):,} source classes has that name: "
                f"expected names of source classes{hint}."
            )
        wanted_names |= found
    if not wanted_names:
        raise InputError("wanted is empty: expected at least one name of a source class.")
    is_selected = np.array([bool(each & wanted_names) for each in names])
    ranking = np.argsort(~is_selected, kind="stable").astype(np.int32)
    return Selection(ranking[: is_selected.sum()], is_selected.astype(np.float32), ranking)


def shared_names(source_names: Sequence[str], target_names: Sequence[str]) -> list[str]:
    """Returns the names of the source classes that are also names of a target class, in the order of the source.

    Case does not matter, and spaces, `_` and `-` are equal. A name with commas is a list of synonyms, as in ImageNet;
    one in common is enough. Nothing else is guessed: "dog" is neither "dogs" nor "hot dog". Names with several
    meanings, such as "crane", are equal too, so look at the result.

    Raises:
      InputError: if an argument is not a list of names.

    Example:
      >>> shared_names(["great white shark, white shark", "Sea-Lion", "crane"], ["sea_lion", "white shark", "dog"])
      ['great white shark, white shark', 'Sea-Lion']
    """
    of_target = set().union(*(_synonyms(name, "target_names") for name in _as_names(target_names, "target_names")))
    names = _as_names(source_names, "source_names")
    return [name for name in names if _synonyms(name, "source_names") & of_target]


def _as_names(value: Sequence[str], name: str) -> list[str]:
    if isinstance(value, str):
        raise InputError(f"{name} is {printable(repr(value))}: expected a list of names.")
    for each in value:
        if not isinstance(each, str):
            raise InputError(f"{name} holds {printable(repr(each))}: expected a list of names.")
    return list(value)


def _synonyms(name: str, argument: str) -> set[str]:
    """Returns the normalised synonyms of a name such as "tench, Tinca tinca"."""
    synonyms = {_normalised(part) for part in name.split(",")} - {""}
    if not synonyms:
        raise InputError(f"{argument} holds {printable(name)!r}: expected names with a letter or digit.")
    return synonyms


def _normalised(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())
