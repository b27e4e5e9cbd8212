"""The plan of a study, shown before anything is compiled: what will run, and roughly how long it will take."""

import math

import jax
from clu import parameter_overview
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jax_transfer import devices
from jax_transfer.logs import duration
from jax_transfer.records import METRICS
from jax_transfer.report import tables
from jax_transfer.study import estimates
from jax_transfer.study.stages import STAGES
from jax_transfer.study.workspace import Workspace


def show(work: Workspace) -> None:
    """Prints the parameters of the first model, and each stage with a description and an estimate of its time."""
    console = Console(stderr=True, quiet=not devices.is_first_process())
    params, _ = jax.eval_shape(work.checkpoint(work.snapshots[0]).net.init, jax.random.key(0))
    overview = parameter_overview.get_parameter_overview(params, include_stats=False)
    console.print(overview, highlight=False, markup=False, soft_wrap=True)
    config = work.config
    rate = devices.sustained_gigaflops_per_second()
    start = f"{' and '.join(work.models)}, {' and '.join(work.sources)}" if work.models else estimates.checkpoints(work)
    table = Table(title=f"{config.name}: {start} to {len(config.targets)} target(s)")
    table.add_column("stage")
    table.add_column("what")
    table.add_column("about", justify="right")
    gigaflops = {name: STAGES[name].gigaflops(work) for name in STAGES if name in config.stages}
    seconds = {name: count / rate for name, count in gigaflops.items() if math.isfinite(count)}
    for name in gigaflops:
        table.add_row(name, STAGES[name].describe(work), duration(seconds[name]) if name in seconds else "")
    table.add_section()
    for target in config.targets:
        table.add_row("target", Text(_describe_target(work, target)), "")
    table.caption = (
        f"About {duration(sum(seconds.values()))} of computation, not including compilation; estimated from a timed "
        f"convolution ({rate:,.0f} GFLOP/s). Work that is already done is skipped."
    )
    console.print(table)


def _describe_target(work: Workspace, target: str) -> str:
    """Describes a target's images, metric and classes, so that a misread folder is noticed."""
    train, test = (work.source(target, split) for split in ("train", "test"))
    images = f"{len(train):,} train, {len(test):,} test images"
    classes = tables.class_list(train.class_names, train.num_classes)
    return f"{target}: {images}; by {METRICS[work.metric(target)]}; classes: {classes}"
