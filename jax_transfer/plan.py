"""Before the first compile: check what needs the data, and say what will happen and about how long it takes."""

import functools
import math

import jax
from clu import parameter_overview
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jax_transfer import config as settings
from jax_transfer import devices
from jax_transfer.checks import check_early_stops
from jax_transfer.data.batches import steps_per_epoch
from jax_transfer.features import extract
from jax_transfer.logs import Rows, log
from jax_transfer.records import METRICS, InputError, TargetRow
from jax_transfer.report import tables
from jax_transfer.training.objectives import OBJECTIVES, Objective
from jax_transfer.training.optimizers import OptimizerSettings, make_optimizer
from jax_transfer.training.state import init_state
from jax_transfer.training.steps import make_train_step, train_step_gigaflops
from jax_transfer.transfer.finetune import early_epochs, total_steps
from jax_transfer.workspace import Workspace

NUM_NAMES = 10  # how many names of classes a row holds


def check_data(work: Workspace) -> None:
    """Opens every data set the study names and checks it against the config.

    Raises:
      InputError: a data set that is missing or unusable, a batch that does not divide or is too large.
    """
    config = work.config
    device_batch = devices.check_batch_size(config.pretrain.batch_size, work.mesh, "config.pretrain.batch_size")
    devices.check_batch_size(config.data.eval_batch_size, work.mesh, "config.data.eval_batch_size")
    log.info("%s; global batch %d, %d on each device", devices.description(), config.pretrain.batch_size, device_batch)
    for dataset in dict.fromkeys((*work.sources, *config.targets)):
        train, test = work.source(dataset, "train"), work.source(dataset, "test")
        for source in (train, test):
            if not len(source):
                raise InputError(f"{dataset} has no images in its {source.split} split.")
            if source.labels.min() < 0 or source.labels.max() >= source.num_classes:
                raise InputError(
                    f"{dataset} {source.split}: labels lie in [{source.labels.min()}, {source.labels.max()}], "
                    f"outside of its {source.num_classes} classes (0 to {source.num_classes - 1})."
                )
        if train.class_names != test.class_names:
            raise InputError(f"{dataset}: the train and test splits have different classes.")
        if train.num_classes < 2:
            raise InputError(f"{dataset} has a single class ({train.class_names[0]!r}): at least two are needed.")
    if "pretrain" in config.stages:
        for source in work.sources:
            train = work.source(source, "train")
            steps_per_epoch(len(train), config.pretrain.batch_size, f"{source} (config.pretrain)")
    for target in config.targets:
        tuning = settings.finetune_settings(config, target)
        if "finetune" in config.stages:
            steps_per_epoch(len(work.source(target, "train")), tuning.batch_size, f"{target} (config.finetune)")
        if "scores" in config.stages and early_epochs(config.scores):
            what = f"The part of {target} for early stopping (config.scores)"
            steps = steps_per_epoch(len(work.source(target, "fit")), tuning.batch_size, what)
            check_early_stops(config, target, steps)


def record_targets(work: Workspace) -> None:
    """Writes results/targets.jsonl: what the report needs to know of the targets, for it does not open their data.

    Rows of targets that an earlier run evaluated stay as they are.
    """
    new = []
    for target in work.config.targets:
        train, test = (work.source(target, split) for split in ("train", "test"))
        row = TargetRow(
            target,
            work.metric(target),
            train.num_classes,
            list(train.class_names[:NUM_NAMES]),
            len(train),
            len(test),
            list(dict.fromkeys((*train.notes, *test.notes))),
        )
        new.append(row)
    rows = Rows(work.results, "targets")
    rows.replace([*new, *(row for row in rows.rows if row.target not in work.config.targets)])


def show(work: Workspace) -> None:
    """Prints the parameters, and the stages with what they do and a rough estimate of their time."""
    console = Console(stderr=True, quiet=not devices.is_first_process())
    params, _ = jax.eval_shape(work.source_net(work.pretrainings[0]).init, jax.random.key(0))
    overview = parameter_overview.get_parameter_overview(params, include_stats=False)
    console.print(overview, highlight=False, markup=False, soft_wrap=True)
    config = work.config
    rate = devices.sustained_gigaflops_per_second()
    table = Table(
        title=f"{config.name}: {' and '.join(work.models)}, {' and '.join(work.sources)} to {len(config.targets)} target(s)"
    )
    for column, justify in (("stage", "left"), ("what", "left"), ("about", "right")):
        table.add_column(column, justify=justify)
    images = " and ".join(f"{len(work.source(source, 'train')):,}" for source in work.sources)
    many = [what for what, of in (("model", work.models), ("source", work.sources)) if len(of) > 1]
    each = f" of each {' and '.join(many)}" if many else ""
    epochs = f"{len(work.snapshots)} checkpoints (epochs {_list(work.epochs)}{each})"
    what = {
        "pretrain": f"{config.pretrain.epochs} epochs of {images} images",
        "features": epochs,
        "probe": f"{', '.join(config.probe.methods)}: {epochs}",
        "finetune": epochs,
        "scores": ", ".join(config.scores),
        "spectral": f"components, spectra and t-SNE: {epochs}",
        "report": "report/index.html",
    }
    seconds = {name: gigaflops / rate for name, gigaflops in _gigaflops(work).items() if name in config.stages}
    for name in config.stages:
        table.add_row(name, what[name], duration(seconds[name]) if name in seconds else "")
    table.add_section()
    for target in config.targets:
        table.add_row("target", Text(_in_words(work, target)), "")
    table.caption = (
        f"In all about {duration(sum(seconds.values()))} and compilation, from a timed convolution "
        f"({rate:,.0f} GFLOP/s); what is already done is skipped."
    )
    console.print(table)


def _in_words(work: Workspace, target: str) -> str:
    """A target's images, metric and classes: what a misread folder shows in."""
    train, test = (work.source(target, split) for split in ("train", "test"))
    images = f"{len(train):,} train, {len(test):,} test images"
    classes = tables.class_list(train.class_names, train.num_classes)
    return f"{target}: {images}; by {METRICS[work.metric(target)]}; classes: {classes}"


def _gigaflops(work: Workspace) -> dict[str, float]:
    """The convolutional work of each stage: the sum over the models."""
    each = [_gigaflops_of(work, model) for model in work.models]
    total = {stage: sum(found[stage] for found in each) for stage in each[0]}
    return {name: value for name, value in total.items() if math.isfinite(value)}


def _gigaflops_of(work: Workspace, model: str) -> dict[str, float]:
    """By the compiler's cost analysis; as if all sources had the first one's head."""
    config = work.config
    own = [pretraining for pretraining in work.pretrainings if pretraining.model == model]
    net = work.source_net(own[0])
    params, stats = jax.eval_shape(net.init, jax.random.key(0))
    weights = {"params": params, "stats": stats}
    image = extract.forward_gigaflops(work.forward(own[0]), weights, work.preprocessing, config.data.eval_batch_size)
    snapshots = [snapshot for snapshot in work.snapshots if snapshot.pretraining in own]
    sizes = {d: [len(work.source(d, s)) for s in ("train", "test")] for d in (*work.sources, *config.targets)}

    batch = config.pretrain.batch_size
    objective = work.objective(own[0])
    one = _step_gigaflops(work, objective, settings.pretrain_optimizer(config), work.pretrain_sizes(own[0]))
    epoch = sum(sizes[source][0] // batch * one + sizes[source][1] * image for source in work.sources)
    total = {
        "pretrain": config.pretrain.epochs * epoch,
        "features": len(snapshots) * sum(sum(sizes[target]) for target in config.targets) * image,
        "finetune": 0.0,
        "scores": 0.0,
    }
    early = max(early_epochs(config.scores), default=0)
    for target in config.targets:
        tuning = settings.finetune_settings(config, target)
        if sizes[target][0] < tuning.batch_size:
            continue
        target_net = work.net(model, work.source(target, "train").num_classes)
        objective = OBJECTIVES["supervised"](target_net, tuning.augment)
        one = _step_gigaflops(work, objective, tuning.optimizer, {"train": (target, tuning.batch_size)})
        tuned = total_steps(tuning, sizes[target][0], target) * one + sizes[target][1] * image
        tuned_snapshots = [snapshot for snapshot in work.tuned_snapshots(target) if snapshot in snapshots]
        total["finetune"] += len(tuned_snapshots) * tuning.num_seeds * tuned
        total["scores"] += len(snapshots) * early * sizes[target][0] // tuning.batch_size * one
    return total


def _step_gigaflops(
    work: Workspace, objective: Objective, optimizer: OptimizerSettings, sizes: dict[str, tuple[str, int]]
) -> float:
    """The work of one training step. sizes: feed -> (data set, images a step)."""
    transformation = make_optimizer(optimizer, 1, objective.groups)
    sources = {feed: (work.source(dataset, "train"), size) for feed, (dataset, size) in sizes.items()}
    num_classes = {feed: source.num_classes for feed, (source, _) in sources.items()}
    step = make_train_step(objective, transformation, work.preprocessing, num_classes)
    state = jax.eval_shape(functools.partial(init_state, objective, transformation, 0))
    return train_step_gigaflops(step, state, sources, work.preprocessing)


def _list(epochs: list[int]) -> str:
    return ", ".join(map(str, epochs)) if len(epochs) <= 12 else f"{epochs[0]}, {epochs[1]}, ... {epochs[-1]}"


def duration(seconds: float) -> str:
    """In words: 35 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
