"""The checkpoints of a study: which epochs or steps of its pre-training runs, and which given ones, are evaluated."""

import dataclasses
import itertools
import pathlib
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from jax_transfer.fields import StudyConfig
from jax_transfer.ranking.candidates import Candidate, list_candidates
from jax_transfer.records import InputError
from jax_transfer.study import settings

# The most steps that a rule may select, and the most epochs that pre-training by steps may take.
MOST_CHECKPOINTS = 100_000
SUFFIXES = {"k": 1_000, "m": 1_000_000}
EXPECTED = {
    "epoch": "'all', 'every:K', 'log' or a list such as '0,1,5'",
    "step": "'every:30k', 'log' or a list such as '0,90k,300k'",
}


class Length(NamedTuple):
    """How long a pre-training is, in the unit by which its checkpoints are named."""

    last: int
    unit: Literal["epoch", "step"]


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """One model trained on one source with one objective, which gives one trajectory.

    Attributes:
      model: label of the model in the study, see `settings.models`.
      source: name of the data set.
      objective: label of the recipe in the study, see `settings.recipes`.
      name: identifies this pre-training in a study with several; "" if it is the only one.
    """

    model: str
    source: str
    objective: str
    name: str


@dataclasses.dataclass(frozen=True)
class Saved:
    """An entry in the trajectory of a pre-training. `number` is the name of its folder: the epoch or the step."""

    pretraining: Pretraining
    number: int


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A checkpoint to evaluate.

    Attributes:
      origin: where it comes from: a pre-training of the study, or a given checkpoint.
      name: identifies the checkpoint in rows and messages.
    """

    origin: Saved | Candidate
    name: str


def pretrainings(config: StudyConfig, started: bool = False) -> list[Pretraining]:
    """Lists the pre-training runs of a study: one for every model on every source with every objective.

    A study with given checkpoints has none, unless it runs the stage "pretrain", now or in an earlier run (`started`).

    >>> from jax_transfer.study.config import default_config
    >>> config = default_config()
    >>> config.source.others = ("tfds:cifar100",)
    >>> [pretraining.name for pretraining in pretrainings(config)]
    ['cifar10', 'cifar100']
    """
    if config.checkpoints and "pretrain" not in config.stages and not started:
        return []
    models, sources, recipes = settings.models(config), settings.sources(config), settings.recipes(config)
    short = _short_names(sources)
    result = []
    for model, source, (label, recipe) in itertools.product(models, sources, recipes.items()):
        parts = ((model, models), (short[source], sources), (label, recipes))
        if source in recipe.sources:
            result.append(Pretraining(model, source, label, "/".join(part for part, all_ in parts if len(all_) > 1)))
    return result


def snapshot(pretraining: Pretraining, number: int) -> Snapshot:
    """Returns the checkpoint of an epoch or step: "5", or "resnet18/cifar10/5" with several models and sources.

    >>> snapshot(Pretraining("resnet18", "tfds:cifar10", "supervised", "resnet18/cifar10"), 5).name
    'resnet18/cifar10/5'
    """
    return Snapshot(Saved(pretraining, number), f"{pretraining.name}/{number}".lstrip("/"))


def length(config: StudyConfig) -> Length:
    """Returns how long each pre-training is.

    >>> from jax_transfer.study.config import default_config
    >>> length(default_config())
    Length(last=200, unit='epoch')
    """
    steps = config.pretrain.steps
    return Length(config.pretrain.epochs, "epoch") if steps is None else Length(steps, "step")


def evaluated_numbers(config: StudyConfig) -> list[int]:
    """Lists the epochs that `config.trajectory` selects, or the steps if pre-training counts steps.

    >>> from jax_transfer.study.config import default_config
    >>> config = default_config()
    >>> config.pretrain.steps, config.trajectory.steps = 300_000, "90k,180k,270k,300k"
    >>> evaluated_numbers(config)
    [90000, 180000, 270000, 300000]

    Raises:
      InputError: if the rule is not valid, or is not given in the unit of `length`.
    """
    last, unit = length(config)
    steps = config.trajectory.steps
    if unit == "epoch" and steps is not None:
        raise InputError(
            f"config.trajectory.steps = {steps!r}: pre-training counts epochs; set config.pretrain.steps, or select "
            "epochs with config.trajectory.epochs."
        )
    if unit == "step" and steps is None:
        raise InputError(
            f"config.pretrain.steps = {last}: select the steps to evaluate with config.trajectory.steps, such as 'log' "
            f"or '0,{last}'."
        )
    return selected(config.trajectory[f"{unit}s"], last, f"config.trajectory.{unit}s", unit)


def saved_at(config: StudyConfig, steps_per_epoch: int) -> dict[int, int]:
    """Returns the number of each checkpoint that a pre-training saves -> its step, in ascending order.

    Every epoch is saved. If pre-training counts steps, the selected steps and the last one are saved too.

    >>> from jax_transfer.study.config import default_config
    >>> config = default_config()
    >>> config.pretrain.epochs = 2
    >>> saved_at(config, steps_per_epoch=100)
    {0: 0, 1: 100, 2: 200}
    >>> config.pretrain.steps, config.trajectory.steps = 250, "50"
    >>> list(saved_at(config, steps_per_epoch=100))
    [0, 50, 100, 200, 250]
    """
    last, unit = length(config)
    if unit == "epoch":
        return {epoch: epoch * steps_per_epoch for epoch in range(last + 1)}
    steps = {*range(0, last, steps_per_epoch), *evaluated_numbers(config), last}
    return {step: step for step in sorted(steps)}


def epochs_after(step: int, steps_per_epoch: int) -> float:
    """Returns the number of epochs after a step, with so many decimals that no two steps have the same number.

    >>> epochs_after(90_000, steps_per_epoch=5004), epochs_after(10_008, steps_per_epoch=5004)
    (17.9856, 2)
    """
    epochs, rest = divmod(step, steps_per_epoch)
    return round(step / steps_per_epoch, max(2, len(str(steps_per_epoch)))) if rest else epochs


def evaluated_snapshots(
    config: StudyConfig, started: bool = False, recorded: Mapping[str, str] | None = None
) -> list[Snapshot]:
    """Lists the checkpoints to evaluate: those of the study, ordered by pre-training and step, then the given ones.

    Args:
      started: see `pretrainings`.
      recorded: see `given_snapshots`.

    >>> from jax_transfer.study.config import default_config
    >>> config = default_config()
    >>> config.pretrain.epochs, config.trajectory.epochs = 10, "every:5"
    >>> config.checkpoints = ("random:resnet18",)
    >>> [snapshot.name for snapshot in evaluated_snapshots(config)]
    ['0', '5', '10', 'random resnet18']
    """
    numbers = evaluated_numbers(config)
    own = [snapshot(pretraining, number) for pretraining in pretrainings(config, started) for number in numbers]
    return [*own, *given_snapshots(config, recorded)]


def given_snapshots(config: StudyConfig, recorded: Mapping[str, str] | None = None) -> list[Snapshot]:
    """Lists the checkpoints in `config.checkpoints`.

    A name depends on the other paths in the list. A checkpoint that an earlier run has evaluated keeps its name, so
    its rows stay valid when the list changes. The epoch of a trajectory is never named like an epoch of the study.

    >>> from jax_transfer.study.config import default_config
    >>> config = default_config()
    >>> config.checkpoints = ("a.safetensors=resnet18", "run/5")
    >>> [snapshot.name for snapshot in given_snapshots(config)]
    ['a', 'given/run/5']

    Args:
      recorded: `identity` of a checkpoint -> its name in an earlier run.
    """
    candidates = list_candidates(config.checkpoints, model=None) if config.checkpoints else []
    new = {c: f"given/{c.name}" if c.name.rpartition("/")[2].isdecimal() else c.name for c in candidates}
    return [Snapshot(c, (recorded or {}).get(identity(c.path or c.name), new[c])) for c in candidates]


def identity(path: str | pathlib.Path) -> str:
    """Returns what identifies a given checkpoint: its resolved path, or the name of a random initialisation.

    >>> identity("random resnet18")
    'random resnet18'
    """
    path = pathlib.Path(path)
    return str(path.resolve()) if path.exists() else str(path)


def finetuned_snapshots(config: StudyConfig, snapshots: Sequence[Snapshot], target: str) -> list[Snapshot]:
    """Selects the checkpoints to fine-tune on a target: all evaluated ones, or only some of the study's own.

    >>> from jax_transfer.study.config import default_config
    >>> config = default_config()
    >>> config.finetune.checkpoints = "0,8"
    >>> [snapshot.name for snapshot in finetuned_snapshots(config, evaluated_snapshots(config), "tfds:mnist")]
    ['0', '8']
    """
    rule, (last, unit) = settings.finetune_settings(config, target).checkpoints, length(config)
    chosen = selected(rule, last, "config.finetune.checkpoints", unit) if rule else None
    return [s for s in snapshots if chosen is None or isinstance(s.origin, Candidate) or s.origin.number in chosen]


def selected(
    rule: str | Sequence[int],
    last: int,
    field: str = "config.trajectory.epochs",
    unit: Literal["epoch", "step"] = "epoch",
) -> list[int]:
    """Lists the epochs or steps that a rule selects, in ascending order.

    >>> selected("log", last=10), selected("every:4", last=10), selected("0,5", last=10)
    ([0, 1, 2, 4, 8, 10], [0, 4, 8, 10], [0, 5])
    >>> selected("every:1k", last=2500, unit="step")
    [0, 1000, 2000, 2500]

    Args:
      rule: "all", of epochs only; "every:K"; "log" (0, 1, 2, 4, 8, ...); or a list such as "0,1,5" or (0, 1, 5).
        "every:K" and "log" always include 0 and the last one. Steps may end in k (thousand) or m (million).
      last: number of the last epoch or step of pre-training.
      field: the config field that holds the rule, for error messages.
      unit: what the numbers count.

    Raises:
      InputError: if the rule is not valid, selects too many steps, or lists one after the last.
    """
    try:
        if not isinstance(rule, str):
            numbers = [int(number) for number in rule]
        elif rule == "all" and unit == "epoch":
            numbers = range(last + 1)
        elif rule == "log":
            numbers = [0, *(2**i for i in range(last.bit_length())), last]
        elif rule.startswith("every:"):
            numbers = range(0, last, _number(rule.removeprefix("every:"), unit))
            if numbers.step < 1:
                raise ValueError(rule)
        else:
            numbers = [_number(number, unit) for number in rule.split(",")]
    except ValueError as error:
        raise InputError(f"{field} = {rule!r}: expected {EXPECTED[unit]}.") from error
    if len(numbers) > MOST_CHECKPOINTS + 1:
        raise InputError(
            f"{field} = {rule!r} selects {len(numbers):,} {unit}s, more than {MOST_CHECKPOINTS:,}: select fewer."
        )
    outside = sorted(number for number in numbers if not 0 <= number <= last)
    if outside or not numbers:
        raise InputError(f"{field} = {rule!r}: the {unit}s are 0 to {last}; there is no {reprlib.repr(outside)}.")
    return sorted({*numbers, last} if isinstance(numbers, range) else {*numbers})


def _number(text: str, unit: Literal["epoch", "step"]) -> int:
    """Reads a number; one that counts steps may end in a suffix."""
    factor = SUFFIXES.get(text.strip()[-1:].lower(), 1) if unit == "step" else 1
    return factor * int(text.strip()[:-1] if factor > 1 else text)


def _short_names(sources: Sequence[str]) -> dict[str, str]:
    """Returns a unique folder name for each source, such as cifar10 for tfds:cifar10?train=500."""
    names: dict[str, str] = {}
    for source in sources:
        address = source.partition("?")[0].rstrip("/")
        name = base = re.sub(r"\W+", "_", re.split("[:/]", address)[-1]).strip("_") or "source"
        number = 1
        while name in names.values():
            number += 1
            name = f"{base}_{number}"
        names[source] = name
    return names
