"""Estimates for the plan of a study, before its stages run: a description of the checkpoints, and work in GFLOP.

The estimates cover forward passes and training steps, and come from the compiler's cost analysis.
"""

import functools
from collections.abc import Mapping

import jax

from jax_transfer.data.source import Source
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models import Net
from jax_transfer.study import settings
from jax_transfer.study.epochs import Saved, Snapshot, length
from jax_transfer.study.workspace import Workspace
from jax_transfer.training.objectives import OBJECTIVES, Objective
from jax_transfer.training.optimizers import OptimizerSettings, make_optimizer
from jax_transfer.training.state import init_state
from jax_transfer.training.steps import make_train_step, train_step_gigaflops


def checkpoints(work: Workspace) -> str:
    """Describes the evaluated checkpoints in words, such as "3 checkpoints (epochs 0, 1, 2) and 2 given ones"."""
    own = [snapshot.origin.number for snapshot in work.snapshots if isinstance(snapshot.origin, Saved)]
    given = len(work.snapshots) - len(own)
    if not own:
        return f"{given} given checkpoint{'s' if given > 1 else ''}"
    many = [
        kind
        for kind, names in (("model", work.models), ("source", work.sources), ("objective", work.recipes))
        if len(names) > 1
    ]
    each = f" of each {' and '.join(many)}" if many else ""
    unit, numbers = length(work.config).unit, sorted(set(own))
    shown = ", ".join(map(str, numbers)) if len(numbers) <= 12 else f"{numbers[0]}, {numbers[1]}, ... {numbers[-1]}"
    also = f" and {given} given one{'s' if given > 1 else ''}" if given else ""
    return f"{len(own)} checkpoints ({unit}s {shown}{each}){also}"


def step_gigaflops(
    objective: Objective,
    optimizer: OptimizerSettings,
    sizes: Mapping[str, tuple[Source, int]],
    preprocessing: Preprocessing,
) -> float:
    """Computes the work of one training step, in GFLOP.

    Args:
      sizes: feed -> (source, number of images in a step).
      preprocessing: the preprocessing of the images.
    """
    transformation = make_optimizer(optimizer, 1, objective.groups)
    num_classes = {feed: source.num_classes for feed, (source, _) in sizes.items()}
    step = make_train_step(objective, transformation, preprocessing, num_classes)
    state = jax.eval_shape(functools.partial(init_state, objective, transformation, 0))
    return train_step_gigaflops(step, state, sizes, objective.views, preprocessing)


def finetune_step_gigaflops(work: Workspace, target: str) -> dict[Snapshot, float]:
    """Returns checkpoint -> work of one step of fine-tuning it on a target, in GFLOP.

    It is 0 for a target with fewer images than one batch, for which the finetune stage raises an error.
    """
    tuning, train = settings.finetune_settings(work.config, target), work.source(target, "train")
    if len(train) < tuning.batch_size:
        return dict.fromkeys(work.snapshots, 0.0)

    @functools.cache
    def count(net: Net, preprocessing: Preprocessing) -> float:
        objective = OBJECTIVES["supervised"](net, tuning.augment)
        sizes = {"train": (train, tuning.batch_size)}
        return step_gigaflops(objective, tuning.optimizer, sizes, preprocessing)

    return {s: count(work.tuned_net(s, target), work.checkpoint(s).preprocessing) for s in work.snapshots}
