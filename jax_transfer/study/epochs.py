"""The checkpoints of a study: which epochs of its pre-training runs, and which given ones, are evaluated and tuned."""

import dataclasses
import re
import reprlib
from collections.abc import Collection, Sequence

from jax_transfer.fields import StudyConfig
from jax_transfer.ranking.candidates import Candidate, list_candidates
from jax_transfer.records import InputError
from jax_transfer.study import settings


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """One model trained on one source, which gives one trajectory.

    Attributes:
      model: label of the model in the study, see `settings.models`.
      source: name of the data set.
      name: identifies this pre-training in a study with several; "" if it is the only one.
    """

    model: str
    source: str
    name: str


@dataclasses.dataclass(frozen=True)
class Saved:
    """An entry in the trajectory of a pre-training. `number` is the name of its folder, the epoch."""

    pretraining: Pretraining
    number: int


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A checkpoint to evaluate.

    Attributes:
      origin: where it comes from: a pre-training of the study, or a given checkpoint.
      epoch: the epoch of the pre-training; None for a given checkpoint.
      name: identifies the checkpoint in rows and messages.
    """

    origin: Saved | Candidate
    epoch: int | None
    name: str


def pretrainings(config: StudyConfig) -> list[Pretraining]:
    """Lists the pre-training runs of a study: one for every model on every source.

    A study with given checkpoints and without the stage "pretrain" has none.

    >>> from jax_transfer.study.config import default_config
    >>> config = default_config()
    >>> config.source.others = ("tfds:cifar100",)
    >>> [pretraining.name for pretraining in pretrainings(config)]
    ['cifar10', 'cifar100']
    """
    if config.checkpoints and "pretrain" not in config.stages:
        return []
    models, sources = settings.models(config), settings.sources(config)
    short = _short_names(sources)
    result = []
    for model in models:
        for source in sources:
            parts = [*([model] if len(models) > 1 else []), *([short[source]] if len(sources) > 1 else [])]
            result.append(Pretraining(model, source, "/".join(parts)))
    return result


def snapshot(pretraining: Pretraining, epoch: int) -> Snapshot:
    """Returns the checkpoint of an epoch, named "5", or "resnet18/cifar10/5" with several models and sources.

    >>> snapshot(Pretraining("resnet18", "tfds:cifar10", "resnet18/cifar10"), 5).name
    'resnet18/cifar10/5'
    """
    return Snapshot(Saved(pretraining, epoch), epoch, f"{pretraining.name}/{epoch}".lstrip("/"))


def evaluated_snapshots(config: StudyConfig) -> list[Snapshot]:
    """Lists the checkpoints to evaluate: those of the study, ordered by pre-training and epoch, then the given ones.

    >>> from jax_transfer.study.config import default_config
    >>> config = default_config()
    >>> config.pretrain.epochs, config.trajectory.epochs = 10, "every:5"
    >>> config.checkpoints = ("random:resnet18",)
    >>> [snapshot.name for snapshot in evaluated_snapshots(config)]
    ['0', '5', '10', 'random resnet18']
    """
    epochs = evaluated_epochs(config.trajectory.epochs, config.pretrain.epochs)
    own = [snapshot(pretraining, epoch) for pretraining in pretrainings(config) for epoch in epochs]
    return [*own, *given_snapshots(config, {snapshot.name for snapshot in own})]


def given_snapshots(config: StudyConfig, taken: Collection[str] = ()) -> list[Snapshot]:
    """Lists the checkpoints in `config.checkpoints`, with names that differ from those `taken`.

    >>> from jax_transfer.study.config import default_config
    >>> config = default_config()
    >>> config.checkpoints = ("a.safetensors=resnet18",)
    >>> [snapshot.name for snapshot in given_snapshots(config, taken=["a"])]
    ['given/a']
    """
    candidates = list_candidates(config.checkpoints, model=None) if config.checkpoints else []
    return [Snapshot(c, None, f"given/{c.name}" if c.name in taken else c.name) for c in candidates]


def finetuned_snapshots(config: StudyConfig, target: str) -> list[Snapshot]:
    """Lists the checkpoints to fine-tune on a target: all evaluated ones, or only some of the study's own epochs.

    >>> from jax_transfer.study.config import default_config
    >>> config = default_config()
    >>> config.finetune.checkpoints = "0,8"
    >>> [snapshot.name for snapshot in finetuned_snapshots(config, "tfds:mnist")]
    ['0', '8']
    """
    snapshots = evaluated_snapshots(config)
    rule = settings.finetune_settings(config, target).checkpoints
    chosen = evaluated_epochs(rule, config.pretrain.epochs) if rule else None
    return [s for s in snapshots if chosen is None or s.epoch is None or s.epoch in chosen]


def evaluated_epochs(rule: str | Sequence[int], last: int, field: str = "config.trajectory.epochs") -> list[int]:
    """Lists the epochs that a rule selects, in ascending order.

    >>> evaluated_epochs("log", last=10), evaluated_epochs("every:4", last=10), evaluated_epochs("0,5", last=10)
    ([0, 1, 2, 4, 8, 10], [0, 4, 8, 10], [0, 5])

    Args:
      rule: "all"; "every:K"; "log" (0, 1, 2, 4, 8, ...); or a list such as "0,1,5" or (0, 1, 5).
        "every:K" and "log" always include epoch 0 and the last one.
      last: number of the last epoch of pre-training.
      field: the config field that holds the rule, for error messages.

    Raises:
      InputError: if the rule is not valid, or lists an epoch after the last one.
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
