"""What a study's config trains and evaluates: its pre-trainings, and the checkpoints of their trajectories."""

import dataclasses
import re
import reprlib
from collections.abc import Sequence

from ml_collections import ConfigDict

from jax_transfer.records import InputError
from jax_transfer.study import settings


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """One model trained on one source: a trajectory. `name` distinguishes it in a study of several; "" if it is the only one."""

    model: str
    source: str
    name: str


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """One epoch of a pre-training. `name` is what rows and messages call the checkpoint."""

    pretraining: Pretraining
    epoch: int
    name: str


def pretrainings(config: ConfigDict) -> list[Pretraining]:
    """Lists every model on every source."""
    models, sources = settings.models(config), settings.sources(config)
    short = _short_names(sources)
    found = []
    for model in models:
        for source in sources:
            parts = [*([model] if len(models) > 1 else []), *([short[source]] if len(sources) > 1 else [])]
            found.append(Pretraining(model, source, "/".join(parts)))
    return found


def snapshot(pretraining: Pretraining, epoch: int) -> Snapshot:
    """Names an epoch: "5", or "resnet18/cifar10/5" where there are several models and sources.

    >>> snapshot(Pretraining("resnet18", "tfds:cifar10", "resnet18/cifar10"), 5).name
    'resnet18/cifar10/5'
    """
    return Snapshot(pretraining, epoch, f"{pretraining.name}/{epoch}".lstrip("/"))


def evaluated_snapshots(config: ConfigDict) -> list[Snapshot]:
    """Lists the checkpoints to evaluate, by pre-training and epoch."""
    epochs = evaluated_epochs(config.trajectory.epochs, config.pretrain.epochs)
    return [snapshot(pretraining, epoch) for pretraining in pretrainings(config) for epoch in epochs]


def finetuned_snapshots(config: ConfigDict, target: str) -> list[Snapshot]:
    """Lists the checkpoints to fine-tune on a target: all that are evaluated, or those that the config chooses among them."""
    found = evaluated_snapshots(config)
    rule = settings.finetune_settings(config, target).checkpoints
    chosen = evaluated_epochs(rule, config.pretrain.epochs) if rule else None
    return [each for each in found if chosen is None or each.epoch in chosen]


def evaluated_epochs(rule: str | Sequence[int], last: int, field: str = "config.trajectory.epochs") -> list[int]:
    """Lists the epochs that a rule selects, in ascending order.

    >>> evaluated_epochs("log", last=10), evaluated_epochs("every:4", last=10), evaluated_epochs("0,5", last=10)
    ([0, 1, 2, 4, 8, 10], [0, 4, 8, 10], [0, 5])

    Args:
      rule: "all"; "every:K"; "log" (0, 1, 2, 4, 8, ...); or a list such as "0,1,5" or (0, 1, 5).
        "every:K" and "log" always include epoch 0 and the last one.
      last: the last epoch of the pre-training.
      field: what an error calls the rule.

    Raises:
      InputError: for any other rule, or one that names an epoch after the last.
    """
    try:
        if not isinstance(rule, str):
            epochs = {int(epoch) for epoch in rule}
        elif rule == "all":
            epochs = set(range(last + 1))
        elif rule == "log":
            epochs = {0, last} | {2**i for i in range(last.bit_length()) if 2**i <= last}
        elif rule.startswith("every:"):
            step = int(rule.removeprefix("every:"))
            if step < 1:
                raise ValueError(rule)
            epochs = {last, *range(0, last + 1, step)}
        else:
            epochs = {int(epoch) for epoch in rule.split(",")}
    except ValueError as error:
        raise InputError(f"{field} = {rule!r}: expected 'all', 'every:K', 'log' or a list such as '0,1,5'.") from error
    outside = sorted(epoch for epoch in epochs if not 0 <= epoch <= last)
    if outside or not epochs:
        raise InputError(f"{field} = {rule!r}: the epochs are 0 to {last}; there is no {reprlib.repr(outside)}.")
    return sorted(epochs)


def _short_names(sources: Sequence[str]) -> dict[str, str]:
    """A folder name for each source, unique among them: tfds:cifar10?train=500 -> cifar10."""
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
