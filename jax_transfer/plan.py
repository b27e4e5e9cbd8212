"""Before the first compile: check what needs the data, and say what will happen and about how long it takes."""

import math

import jax
from clu import parameter_overview
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jax_transfer import devices, settings
from jax_transfer.checks import check_early_stops
from jax_transfer.data.batches import steps_per_epoch
from jax_transfer.logs import log
from jax_transfer.records import METRICS, InputError
from jax_transfer.report import tables
from jax_transfer.stages import STAGES
from jax_transfer.transfer.finetune import early_epochs
from jax_transfer.workspace import Workspace


def check_data(work: Workspace) -> None:
    """Opens every data set the study names and checks it against the config.

    Raises:
      InputError: a data set that is missing or unusable, a batch that does not divide or is too large.
    """
    config = work.config
    device_batch = devices.check_batch_size(config.pretrain.batch_size, work.mesh, "config.pretrain.batch_size")
    devices.check_batch_size(config.data.eval_batch_size, work.mesh, "config.data.eval_batch_size")
    log.info("%s; global batch %d, %d on each device", devices.description(), config.pretrain.batch_size, device_batch)
    feeds = [feed.dataset for feed in config.pretrain.feeds.values()]
    for dataset in dict.fromkeys((*work.sources, *feeds, *config.targets)):
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
        for pretraining in work.pretrainings:
            main, *others = work.pretrain_sizes(pretraining).items()
            for where, (_, (dataset, size)) in zip(
                ("", *(f".feeds.{feed}" for feed, _ in others)), (main, *others), strict=True
            ):
                devices.check_batch_size(size, work.mesh, f"config.pretrain{where}.batch_size")
                steps_per_epoch(len(work.source(dataset, "train")), size, f"{dataset} (config.pretrain{where})")
    for target in config.targets:
        tuning = settings.finetune_settings(config, target)
        if "finetune" in config.stages:
            steps_per_epoch(len(work.source(target, "train")), tuning.batch_size, f"{target} (config.finetune)")
        if "scores" in config.stages and early_epochs(config.scores):
            what = f"The part of {target} for early stopping (config.scores)"
            steps = steps_per_epoch(len(work.source(target, "fit")), tuning.batch_size, what)
            check_early_stops(config, target, steps)


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
    work_of = {name: STAGES[name].gigaflops(work) for name in STAGES if name in config.stages}
    seconds = {name: gigaflops / rate for name, gigaflops in work_of.items() if math.isfinite(gigaflops)}
    for name in work_of:
        table.add_row(name, STAGES[name].describe(work), duration(seconds[name]) if name in seconds else "")
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


def duration(seconds: float) -> str:
    """In words: 35 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
