"""What the plan of a study says of its stages before they run: in words, and their work in GFLOP.

The work is that of convolutions by the compiler's cost analysis; all sources of a model count as if they had the first
one's head.
"""

import functools
from collections.abc import Mapping

import jax

from jax_transfer import settings
from jax_transfer.records import Snapshot
from jax_transfer.training.objectives import OBJECTIVES, Objective
from jax_transfer.training.optimizers import OptimizerSettings, make_optimizer
from jax_transfer.training.state import init_state
from jax_transfer.training.steps import make_train_step, train_step_gigaflops
from jax_transfer.transfer.finetune import early_epochs, total_steps
from jax_transfer.workspace import Workspace


def own(work: Workspace, model: str) -> list[Snapshot]:
    """The evaluated checkpoints of a model."""
    return [snapshot for snapshot in work.snapshots if snapshot.pretraining.model == model]


def checkpoints(work: Workspace) -> str:
    """The evaluated checkpoints in words: "3 checkpoints (epochs 0, 1, 2)"."""
    many = [what for what, of in (("model", work.models), ("source", work.sources)) if len(of) > 1]
    each = f" of each {' and '.join(many)}" if many else ""
    epochs = work.epochs
    shown = ", ".join(map(str, epochs)) if len(epochs) <= 12 else f"{epochs[0]}, {epochs[1]}, ... {epochs[-1]}"
    return f"{len(work.snapshots)} checkpoints (epochs {shown}{each})"


def image(work: Workspace, model: str) -> float:
    """A forward pass of one image."""
    return work.image_gigaflops(next(p for p in work.pretrainings if p.model == model))


def _step(
    work: Workspace, objective: Objective, optimizer: OptimizerSettings, sizes: Mapping[str, tuple[str, int]]
) -> float:
    """One step of training. sizes: feed -> (data set, images a step)."""
    made = make_optimizer(optimizer, 1, objective.groups)
    sources = {feed: (work.source(dataset, "train"), size) for feed, (dataset, size) in sizes.items()}
    num_classes = {feed: source.num_classes for feed, (source, _) in sources.items()}
    step = make_train_step(objective, made, work.preprocessing, num_classes)
    state = jax.eval_shape(functools.partial(init_state, objective, made, 0))
    return train_step_gigaflops(step, state, sources, work.preprocessing)


def describe_pretrain(work: Workspace) -> str:
    images = " and ".join(f"{len(work.source(source, 'train')):,}" for source in work.sources)
    return f"{work.config.pretrain.epochs} epochs of {images} images"


def pretrain_gigaflops(work: Workspace) -> float:
    config = work.config.pretrain
    total = 0.0
    for model in work.models:
        pretraining = next(p for p in work.pretrainings if p.model == model)
        objective, sizes = work.objective(pretraining), work.pretrain_sizes(pretraining)
        step = _step(work, objective, settings.pretrain_optimizer(work.config), sizes)
        for source in work.sources:
            train, test = (len(work.source(source, split)) for split in ("train", "test"))
            total += config.epochs * (train // config.batch_size * step + test * image(work, model))
    return total


def _tuning_step(work: Workspace, model: str, target: str) -> float:
    tuning = settings.finetune_settings(work.config, target)
    net = work.net(model, work.source(target, "train").num_classes)
    objective = OBJECTIVES["supervised"](net, tuning.augment)
    return _step(work, objective, tuning.optimizer, {"train": (target, tuning.batch_size)})


def _tunable(work: Workspace) -> list[tuple[str, str]]:
    """Models and targets; a target smaller than a batch is refused when it comes to it."""
    sizes = {target: len(work.source(target, "train")) for target in work.config.targets}
    batches = {target: settings.finetune_settings(work.config, target).batch_size for target in sizes}
    return [(model, target) for model in work.models for target in sizes if sizes[target] >= batches[target]]


def finetune_gigaflops(work: Workspace) -> float:
    total = 0.0
    for model, target in _tunable(work):
        tuning = settings.finetune_settings(work.config, target)
        train, test = (len(work.source(target, split)) for split in ("train", "test"))
        one = total_steps(tuning, train, target) * _tuning_step(work, model, target) + test * image(work, model)
        tuned = [snapshot for snapshot in work.tuned_snapshots(target) if snapshot.pretraining.model == model]
        total += len(tuned) * tuning.num_seeds * one
    return total


def describe_scores(work: Workspace) -> str:
    return ", ".join(work.config.scores)


def scores_gigaflops(work: Workspace) -> float:
    """That of early-stopped fine-tuning; what is computed from features is little beside it."""
    early = max(early_epochs(work.config.scores), default=0)
    total = 0.0
    for model, target in _tunable(work) if early else []:
        steps = early * len(work.source(target, "train")) // settings.finetune_settings(work.config, target).batch_size
        total += len(own(work, model)) * steps * _tuning_step(work, model, target)
    return total
