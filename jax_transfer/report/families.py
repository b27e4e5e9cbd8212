"""Finds the selections of source images, and the targets, that differ in one setting only: what a figure varies."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from jax_transfer.report.tables import showable, split_target
from jax_transfer.selection.strategies import KINDS, STRATEGIES, USUAL_METRICS, SelectionSettings
from jax_transfer.selection.transport import COST_SCALES

# Strategy of a selection -> its name on the page, where that is another one.
NAMES = {"uot": "UOT", "greedy_ot": "greedy-OT", "labels": "label-based"}
NUMBERS = ("num_selected", "first")

USUAL = dataclasses.asdict(SelectionSettings())  # values of the settings that a selection leaves unset

Selections = Mapping[str, Mapping[str, Any]]  # config.select.selections


class Family(NamedTuple):
    """Selections that differ in one setting only.

    Attributes:
      label: what they have in common.
      members: value of the setting -> name of the selection, by ascending value.
    """

    label: str
    members: dict[float, str]


def settled(selection: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings on which a selection depends, with the usual values of those that it leaves unset.

    >>> settled({"strategy": "greedy_ot", "num_selected": 50, "epsilon": 1.0})
    {'strategy': 'greedy_ot', 'kind': 'class', 'num_selected': 50, 'first': 1, 'metric': 'l2'}
    """
    strategy, usual = selection["strategy"], usual_values(selection)
    given = {name: value for name, value in selection.items() if value is not None}
    uses = STRATEGIES[strategy].uses if strategy in STRATEGIES else (*given, "num_clusters")
    used = dict.fromkeys(("strategy", "kind", *uses))
    if given.get("kind") != "cluster":
        used.pop("num_clusters", None)
    return {name: (usual | given).get(name) for name in used}


def usual_values(selection: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values that the settings of a selection have unless they are set.

    >>> usual_values({"strategy": "uot", "metric": "l2"})["cost_scale"]
    0.1
    """
    metric = USUAL_METRICS.get(selection["strategy"])
    return {**USUAL, "metric": metric, "cost_scale": COST_SCALES.get(selection.get("metric") or metric or "")}


def words(selection: Mapping[str, Any], without: Collection[str] = (), with_metric: bool = False) -> str:
    """Describes a selection by its strategy, the number of classes or clusters, and its unusual settings.

    Args:
      selection: an entry of `config.select.selections`.
      without: settings that are left out.
      with_metric: whether the metric is named even if it is the usual one of the strategy.

    >>> words({"strategy": "uot", "metric": "l2"}), words({"strategy": "random", "kind": "cluster"})
    ('UOT, l2, 100 classes', 'random, 100 of 2,000 clusters')
    >>> words({"strategy": "uot", "first": 101}), words({"strategy": "uot", "num_selected": 50}, ["num_selected"])
    ('UOT, classes 101 to 200', 'UOT')
    """
    values, usual = settled(selection), usual_values(selection)
    parts = [NAMES.get(values["strategy"], showable(values["strategy"]))]
    if "metric" in values and "metric" not in without and (with_metric or values["metric"] != usual["metric"]):
        parts.append(showable(values["metric"]))
    if "num_selected" in values and not set(NUMBERS) & set(without):
        parts.append(_numbers(values, without))
    elif values["kind"] == "cluster":
        of = f"{values['num_clusters']:,} " if "num_clusters" not in without else ""
        parts.append(f"{of}clusters")
    for name in ("cost_scale", "epsilon", "tau_source", "tau_target"):
        if name in values and values[name] != usual[name] and name not in without:
            parts.append(f"{name.replace('_', ' ')} {values[name]:g}")
    return ", ".join(parts)


def _numbers(values: Mapping[str, Any], without: Collection[str]) -> str:
    """Says which classes or clusters a selection takes."""
    number, first, kind = values["num_selected"], values["first"], KINDS.get(values["kind"], values["kind"])
    of = f"of {values['num_clusters']:,}" if "num_clusters" in values and "num_clusters" not in without else ""
    if first == 1:
        return " ".join(filter(None, (f"{number:,}", of, kind)))
    return " ".join(filter(None, (f"{kind} {first:,} to {first + number - 1:,}", of)))


def number_of(number: int, kind: str) -> str:
    """Returns a number of classes or clusters in words.

    >>> number_of(1, "class"), number_of(1300, "cluster")
    ('1 class', '1,300 clusters')
    """
    return f"{number:,} {kind if number == 1 else KINDS.get(kind, kind)}"


def families(selections: Selections, field: str) -> list[Family]:
    """Returns the selections that differ in `field` only, for each choice of the other settings with several values.

    >>> selections = {str(n): {"strategy": "uot", "num_selected": n} for n in (100, 50)}
    >>> families({**selections, "random": {"strategy": "random"}}, "num_selected")
    [Family(label='UOT', members={50: '50', 100: '100'})]
    """
    groups: dict[tuple, dict[float, str]] = {}
    for name, selection in selections.items():
        values = settled(selection)
        if field in values:
            key = tuple((other, value) for other, value in values.items() if other != field)
            groups.setdefault(key, {}).setdefault(values[field], name)
    return [
        Family(words(selections[next(iter(members.values()))], [field]), dict(sorted(members.items())))
        for members in groups.values()
        if len(members) > 1
    ]


def by_fraction(targets: Iterable[str]) -> dict[str, dict[float, str]]:
    """Returns the targets that differ only in the fraction of their training images, if any of them has a fraction.

    Returns:
      Target without the fraction -> fraction -> target, by ascending fraction.

    >>> by_fraction(["tfds:dtd", "tfds:pets?fraction=0.2", "tfds:pets"])
    {'tfds:pets': {0.2: 'tfds:pets?fraction=0.2', 1.0: 'tfds:pets'}}
    """
    groups: dict[str, dict[float, str]] = {}
    for target in targets:
        address, options = split_target(target)
        others = "&".join(f"{name}={value}" for name, value in options.items() if name != "fraction")
        base = f"{address}?{others}" if others else address
        groups.setdefault(base, {})[float(options.get("fraction", 1))] = target
    return {base: dict(sorted(found.items())) for base, found in groups.items() if set(found.values()) != {base}}


def condition(target: str) -> str:
    """Returns the option that makes a target harder than the whole data set: "imbalance", "fraction" or "".

    >>> condition("tfds:cub200?imbalance=10"), condition("tfds:cub200")
    ('imbalance', '')
    """
    _, options = split_target(target)
    return next((name for name in ("imbalance", "fraction") if name in options), "")
