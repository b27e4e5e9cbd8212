"""The "retrieval" stage: trains PVSE from every checkpoint on captioned images, and ranks images and captions.

With several processes, all of them train each model together. The state of a training is kept in
`retrieval/<data set>/<training>/` until its rows are written, after every epoch and where SIGTERM stops it.
"""

import contextlib
import dataclasses
import math
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_transfer import devices, preemption
from jax_transfer.checkpoints import with_classes
from jax_transfer.checkpoints.trajectory import Trajectory, abstract
from jax_transfer.choose import choose
from jax_transfer.data.batches import Joined, joined, steps_per_epoch
from jax_transfer.data.crops import FILTERS, crops_of
from jax_transfer.data.source import content_hash
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.fields import StudyConfig
from jax_transfer.logs import log
from jax_transfer.models import Net
from jax_transfer.preemption import Preempted
from jax_transfer.records import InputError
from jax_transfer.results import TEST, VALIDATION, RetrievalRow, Rows
from jax_transfer.study import captioned, estimates, settings
from jax_transfer.study.epochs import Snapshot
from jax_transfer.study.workspace import Workspace
from jax_transfer.training.loop import Epoch, train
from jax_transfer.training.objectives.objective import Division
from jax_transfer.training.plateau import halvings
from jax_transfer.training.state import divide, join
from jax_transfer.transfer.pvse import Pairs, Program, RetrievalSettings, rankings
from jax_transfer.transfer.retrieval import Retrieval

Kind = tuple[Net, Preprocessing]


class Run(NamedTuple):
    """A training: its checkpoint, the data set and the share of its training images."""

    snapshot: Snapshot
    dataset: str
    fraction: float


def run(work: Workspace) -> None:
    """Trains PVSE from each checkpoint on each share of each data set, and writes the rows of its best epoch."""
    rows, wanted = Rows(work.results, "retrieval"), settings.retrieval_settings(work.config)
    rows.forget_failures()
    devices.wait_for_all("retrieval: rows are read")
    for dataset in wanted.datasets:
        data = captioned.captioned(work, dataset)
        for snapshot in work.snapshots:  # a run that was killed after the last row of a training leaves its state
            for share in wanted.fractions:
                _delete_if_done(work, Run(snapshot, dataset, share), rows)
        if devices.is_first_process():
            data.words.save(captioned.folder(work, dataset) / captioned.WORDS)
        for kind, snapshots in _kinds(work).items():
            program = _program(work, data, kind)
            for share in wanted.fractions:
                runs = [Run(snapshot, dataset, share) for snapshot in snapshots]
                if todo := [own for own in runs if not _is_done(work, own, rows)]:
                    _run_share(work, data, program, todo, rows)


def _kinds(work: Workspace) -> dict[Kind, list[Snapshot]]:
    """Returns net without a head and preprocessing -> the checkpoints with them."""
    kinds: dict[Kind, list[Snapshot]] = {}
    for snapshot in work.snapshots:
        checkpoint = work.checkpoint(snapshot)
        kind = with_classes(checkpoint, 0, devices.compute_dtype()), checkpoint.preprocessing
        kinds.setdefault(kind, []).append(snapshot)
    return kinds


def _is_done(work: Workspace, own: Run, rows: Rows) -> bool:
    folds = settings.retrieval_settings(work.config).folds
    common = own.snapshot.name, own.dataset, own.fraction
    return all((*common, split, count, work.config.seed) in rows for split in (VALIDATION, TEST) for count in folds)


def _mesh(work: Workspace):
    return devices.make_global_mesh() if jax.process_count() > 1 else work.mesh


def _program(work: Workspace, data: captioned.Captioned, kind: Kind) -> Program:
    wanted = settings.retrieval_settings(work.config)
    return Program(*kind, wanted, len(data.words), data.word_vectors, _mesh(work))


@dataclasses.dataclass(frozen=True, eq=False)
class _Share:
    """What the trainings on a share of the images have in common."""

    work: Workspace
    data: captioned.Captioned
    program: Program
    feed: Joined
    pairs: dict[str, Pairs]
    many_steps: Callable
    step_gflops: float

    @property
    def wanted(self) -> RetrievalSettings:
        return self.program.settings

    @property
    def total_steps(self) -> int:
        return self.wanted.epochs * self.feed.steps_per_epoch

    def measure(self, kept: dict, state: dict, split: str, folds, stop=lambda: False) -> Any:
        """Ranks a split: folds -> result; None if an embedding is not finite, False if `stop` returned True."""
        pairs, size = self.pairs[split], self.work.config.data.eval_batch_size
        embeddings = self.program.embeddings(kept, state["aux"], pairs, size, stop)
        return False if embeddings is None else rankings(embeddings, pairs.owner, folds)


def _run_share(work: Workspace, data: captioned.Captioned, program: Program, todo: list[Run], rows: Rows) -> None:
    wanted = program.settings
    source, views = captioned.share_of(work, data, todo[0].fraction), program.pvse.objective.views
    feed = work.feed_of(source, program.preprocessing, crops_of(views["train"]), everywhere=True)
    pairs = {
        split: Pairs(work.feed_of(held, program.preprocessing, everywhere=True), own.tokens, own.owner)
        for (split, held), own in zip(data.held_out.items(), data.captions.values(), strict=True)
    }
    both = joined({"train": (feed, wanted.batch_size)})
    gflops = program.step_gigaflops(both.sizes, both.num_classes)
    share = _Share(work, data, program, both, pairs, program.many_steps(both), gflops)
    for own in todo:
        preemption.stop_if_requested()
        trained = _train(share, own)
        for row in _rows(share, own, trained):
            rows.append(row)
        devices.wait_for_all(f"{_label(own)} is recorded")
        _delete_if_done(work, own, rows)


def _delete_if_done(work: Workspace, own: Run, rows: Rows) -> None:
    """Deletes the state of a training whose rows are written, or that failed."""
    failed = any(
        row.error and (row.checkpoint, row.target, row.fraction) == (own.snapshot.name, own.dataset, own.fraction)
        for row in rows.rows
    )
    if devices.is_first_process() and (failed or _is_done(work, own, rows)):
        shutil.rmtree(_training_folder(work, own), ignore_errors=True)


def _label(own: Run) -> str:
    """Returns the name of a training for messages."""
    return f"retrieval checkpoint {own.snapshot.name} on {own.dataset}, {100 * own.fraction:g} % of the images"


def _training_folder(work: Workspace, own: Run) -> pathlib.Path:
    name = content_hash(own.snapshot.name, f"{own.fraction:g}", str(work.config.seed))[:12]
    return captioned.folder(work, own.dataset) / name


@dataclasses.dataclass
class _Progress:
    """How far a training has come, which is stored with its state.

    Attributes:
      history: the sum of recalls on the validation images after each epoch.
      seconds: of the epochs so far with their validation.
      begun: `Epoch.begun()` of an epoch that is not yet in the history.
    """

    history: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    begun: dict | None = None

    @property
    def best_epoch(self) -> int | None:
        """The first epoch with the largest sum, from 1; None before the first one."""
        return 1 + int(np.argmax(self.history)) if self.history else None


class _Trained(NamedTuple):
    """The state of a training after its last epoch, what is kept of its best epoch, and why it failed."""

    state: dict
    best: dict
    progress: _Progress
    error: str = ""


def _train(share: _Share, own: Run) -> _Trained:
    """Trains to the end, from the checkpoint or from where an earlier run was stopped."""
    work, program = share.work, share.program
    label = _label(own)
    with (
        contextlib.closing(Trajectory(_training_folder(work, own), most=1)) as trajectory,
        preemption.training(),
    ):
        state, best, progress = _initial(share, own, trajectory, label)
        while len(progress.history) < share.wanted.epochs:
            rate = share.wanted.optimizer.learning_rate * 0.5 ** halvings(progress.history, share.wanted.patience)
            state = {**state, "learning_rate": devices.replicate(np.float32(rate), program.mesh)}
            epoch = _one_epoch(share, state, progress, label)
            state, progress.begun = epoch.state, epoch.begun()
            if epoch.diverged_at[0] is not None:
                progress.seconds += epoch.seconds
                return _Trained(state, best, progress, f"the loss is not finite at step {epoch.diverged_at[0]}")
            started, kept = time.perf_counter(), program.kept(state)
            folds = share.wanted.folds[:1]
            found = not epoch.stopped and share.measure(kept, state, VALIDATION, folds, preemption.requested)
            if found is False:
                _save(share, trajectory, epoch.step, state, best, progress)
                log.warning("Stopping on request: %s is saved at step %d of %d.", label, epoch.step, share.total_steps)
                trajectory.wait()
                raise Preempted
            progress.seconds += epoch.seconds + time.perf_counter() - started
            if found is None:
                error = f"the embeddings are not finite after epoch {epoch.number}"
                return _Trained(state, best, progress, error)
            result: Retrieval = found[folds[0]]
            progress.history.append(result.rsum)
            progress.begun = None
            if progress.best_epoch == epoch.number:
                best = kept
            _save(share, trajectory, epoch.step, state, best, progress)
            log.info(
                "%s, epoch %d/%d: loss %.4f, validation rsum %.2f (best %.2f, chance %.2f), learning rate %.2g",
                *(label, epoch.number, share.wanted.epochs, epoch.means["loss"], 100 * result.rsum),
                *(100 * max(progress.history), 100 * result.chance_rsum, rate),
            )
        trajectory.wait()
    return _Trained(state, best, progress)


def _one_epoch(share: _Share, state: dict, progress: _Progress, label: str) -> Epoch:
    """Trains to the end of the epoch, or until a stop is requested."""
    work, mesh = share.work, share.program.mesh
    most = devices.max_steps_per_call(lambda: share.step_gflops / mesh.size)
    epochs = train(
        state,
        share.many_steps,
        share.feed,
        seed=work.config.seed,
        total_steps=share.total_steps,
        what=label,
        max_steps=min(devices.gather(most)),
        stop=preemption.requested,
        begun=progress.begun,
        advice="with another --workdir, use a smaller config.retrieval.batch_size.",
    )
    return next(epochs)


def _initial(share: _Share, own: Run, trajectory: Trajectory, label: str) -> tuple[dict, dict, _Progress]:
    """Returns the state from which to train, what is kept of the best epoch so far, and the progress."""
    work, program = share.work, share.program
    if saved := trajectory.epochs():
        log.info("Resuming %s after step %d of %d.", label, saved[-1], share.total_steps)
        whole = _with_best(program.abstract, jax.eval_shape(program.kept, program.abstract))
        target = abstract(whole, devices.replicated(program.mesh))
        objective = program.pvse.objective
        state = join(objective, target, *trajectory.restore(saved[-1], *divide(objective, target)))
        best = state.pop("best")
        return state, best, _Progress(**trajectory.metadata(saved[-1])["progress"])
    model = work.checkpoint(own.snapshot).model
    state = program.start(model if program.mesh is work.mesh else jax.device_get(model), work.config.seed)
    return state, program.kept(state), _Progress()


def _with_best(state: dict, best: dict) -> dict:
    return {**state, "best": best}


def _save(share: _Share, trajectory: Trajectory, step: int, state: dict, best: dict, progress: _Progress) -> None:
    """Saves the state of a step, unless it was saved when a stop was requested before its validation."""
    if step not in trajectory.epochs():
        parts = divide(share.program.pvse.objective, _with_best(state, best))
        trajectory.save(step, *parts, {"progress": dataclasses.asdict(progress)})


def _rows(share: _Share, own: Run, trained: _Trained) -> Iterator[RetrievalRow]:
    """Yields the rows of the best epoch: those of the validation images, then those of the test images."""
    work, failed = share.work, bool(trained.error)
    steps = share.feed.steps_per_epoch * len(trained.progress.history)
    for split in (TEST,) if failed else (VALIDATION, TEST):
        found = {} if failed else share.measure(trained.best, trained.state, split, share.wanted.folds)
        error = trained.error or ("" if found else f"the embeddings of {split} images are not finite")
        for folds in share.wanted.folds:
            columns: dict[str, Any] = _columns(found.get(folds) if found else None)
            row = RetrievalRow(
                checkpoint=own.snapshot.name,
                epoch=work.epoch(own.snapshot),
                target=own.dataset,
                fraction=own.fraction,
                split=split,
                folds=folds,
                seed=work.config.seed,
                **columns,
                best_epoch=trained.progress.best_epoch,
                num_train=len(share.feed.feeds["train"].source),
                num_images=len(share.data.held_out[split]) // folds,
                num_captions=len(share.pairs[split].tokens),
                num_duplicates=share.data.captions[split].num_duplicates,
                seconds=trained.progress.seconds,
                gflops=steps * share.step_gflops,
                error=error,
            )
            yield row
            if error:
                log.warning("%s failed: %s.", _label(own), row.error)
            else:
                log.info(
                    "%s, %s, %d x %d images: rsum %.2f (chance %.2f), recalls i2t %.2f %.2f %.2f, t2i %.2f %.2f %.2f, "
                    "after epoch %d",
                    *(_label(own), split, folds, row.num_images),
                    *(100 * row.rsum, 100 * row.chance_rsum),
                    *(100 * getattr(row, f"{way}_recall_at_{k}") for way in ("i2t", "t2i") for k in (1, 5, 10)),
                    row.best_epoch,
                )


def _columns(result: Retrieval | None) -> dict[str, float]:
    """Returns the columns of a row for the result of a ranking; NaN without one."""
    ways = {"i2t": result and result.image_to_text, "t2i": result and result.text_to_image}
    recalls = {f"{way}_recall_at_{k}": d.recalls[k] if d else math.nan for way, d in ways.items() for k in (1, 5, 10)}
    medians = {
        f"{way}_median_rank": direction.median_rank if direction else math.nan for way, direction in ways.items()
    }
    sums = {name: getattr(result, name) if result else math.nan for name in ("rsum", "chance_rsum")}
    return {**recalls, **medians, **sums}


def describe(work: Workspace) -> str:
    """Describes this stage for the plan."""
    wanted = settings.retrieval_settings(work.config)
    shares = " and ".join(f"{100 * share:g} %" for share in wanted.fractions)
    return f"{', '.join(wanted.datasets)}: {shares} of the training images, {estimates.checkpoints(work)}"


def gigaflops(work: Workspace) -> float:
    """Computes the work of all training, and of the forward passes of images that are ranked, in GFLOP."""
    wanted, total = settings.retrieval_settings(work.config), 0.0
    for dataset in wanted.datasets:
        data = captioned.captioned(work, dataset)
        validated, tested = (len(data.held_out[split]) for split in (VALIDATION, TEST))
        for kind, snapshots in _kinds(work).items():
            program = _program(work, data, kind)
            sizes = {"train": (data.train, wanted.batch_size)}
            step = program.step_gigaflops(sizes, {"train": data.train.num_classes})
            image = work.features_of.gigaflops_per_image(*kind)
            for share in wanted.fractions:
                steps = wanted.epochs * (len(captioned.share_of(work, data, share)) // wanted.batch_size)
                ranked = (wanted.epochs + 1) * validated + tested
                total += len(snapshots) * (steps * step + ranked * image)
    return total


def check(config: StudyConfig) -> None:
    """Checks what can be checked of `config.retrieval` without the data.

    Raises:
      InputError: if there is no data set, or a batch does not divide over the devices.
    """
    wanted = settings.retrieval_settings(config)
    if not wanted.datasets:
        raise InputError(
            'config.retrieval.datasets is empty: name a data set with captions, such as "tfds:coco_captions" or '
            '"captions:DIR", or leave "retrieval" out of config.stages.'
        )
    mesh = devices.make_global_mesh()  # all processes train together
    devices.check_batch_size(wanted.batch_size, mesh, "config.retrieval.batch_size")
    devices.check_batch_size(config.data.eval_batch_size, mesh, "config.data.eval_batch_size")


def check_data(work: Workspace) -> None:
    """Checks the data sets of `config.retrieval`, and that the checkpoints suit it.

    Raises:
      InputError: if images lack captions, captions have only unknown words, the images do not divide into the folds,
        there are fewer images than in a batch, or a net does not suit the settings.
    """
    wanted = settings.retrieval_settings(work.config)
    for dataset in wanted.datasets:
        data = captioned.captioned(work, dataset)
        for split, source in data.held_out.items():
            for folds in wanted.folds:
                if len(source) % folds:
                    raise InputError(
                        f"config.retrieval.folds = {wanted.folds}: {folds} does not divide the {len(source):,} images "
                        f"of {dataset}, {split}: use divisors, or other numbers of images with ?validation=N&test=N."
                    )
        for share in wanted.fractions:
            what = f"{share:g} of {dataset} (config.retrieval)"
            steps_per_epoch(len(captioned.share_of(work, data, share)), wanted.batch_size, what)
    for kind, snapshots in _kinds(work).items():
        if any(crops_of((wanted.augment,))):
            where = f"interpolation of random crops ({snapshots[0].name}; config.retrieval.augment)"
            choose(FILTERS, kind[1].interpolation, where)
        group = work.checkpoint(snapshots[0]).settings.get("batch_norm_group")
        if wanted.tune_backbone and group and wanted.batch_size % group:
            raise InputError(
                f"config.retrieval.batch_size = {wanted.batch_size} does not divide into the groups of "
                f"batch_norm_group = {group} images that {snapshots[0].name} normalises together: use a multiple of "
                f"{group}."
            )
        try:
            program = _program(work, captioned.captioned(work, wanted.datasets[0]), kind)
            program.pvse.objective.check(Division(wanted.batch_size, 1, group))
        except InputError as error:
            raise InputError(f"config.retrieval: {error}") from error
