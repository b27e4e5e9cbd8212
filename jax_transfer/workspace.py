"""What the stages of a study share: a config, a working directory, and the data, nets, models and features."""

import contextlib
import fcntl
import functools
import math
import pathlib
import re
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jax_transfer import devices, logs, settings, trees
from jax_transfer.data.batches import Feed, Streamed, make_feed
from jax_transfer.data.source import Source, subset
from jax_transfer.data.sources import load_source
from jax_transfer.data.subsets import stratified_split
from jax_transfer.features import extract
from jax_transfer.logs import log
from jax_transfer.models import Net
from jax_transfer.models.trajectory import Trajectory, abstract, evaluated_epochs
from jax_transfer.records import Features, InputError, Pretraining, ScoreRow, Snapshot, TransferRow
from jax_transfer.training.objectives import OBJECTIVES, Objective


class Workspace:
    """A config, a working directory, and what several stages need of them: data, nets, models, features."""

    def __init__(self, config: ConfigDict, workdir: pathlib.Path):
        self.config, self.workdir = config, workdir
        self.preprocessing = settings.preprocessing(config)
        self.mesh = devices.make_mesh()
        self.results = workdir / "results"
        self.source = functools.cache(self._source)
        self.source_net = functools.cache(self._source_net)
        self.objective = functools.cache(self._objective)
        self.trajectory = functools.cache(self._trajectory)
        self.forward = functools.cache(self._forward)
        self.image_gigaflops = functools.cache(self._image_gigaflops)
        self.feed = functools.lru_cache(maxsize=4)(self._feed)
        self.model = functools.lru_cache(maxsize=1)(self._model)
        self.model_fingerprint = functools.cache(self._model_fingerprint)
        self._opened: list[Trajectory] = []

    def _source(self, dataset: str, split: str) -> Source:
        """A split; "fit" and "held_out" are the parts of "train" that scores by training learn from and are tested on."""
        if split in ("fit", "held_out"):
            train = self.source(dataset, "train")
            fit, held_out = stratified_split(train.labels)
            return subset(train, fit if split == "fit" else held_out)
        return load_source(dataset, split, seed=self.config.seed, on_corrupt=self.config.data.on_corrupt)

    def metric(self, target: str) -> str:
        """Returns what counts on a target, a key of `records.METRICS`: as the config says, else as the field reports it."""
        return self.config.metrics.get(target) or self.source(target, "train").metric

    @property
    def metrics(self) -> dict[str, str]:
        """The metric of each target."""
        return {target: self.metric(target) for target in self.config.targets}

    def _feed(self, dataset: str, split: str, everywhere: bool = False) -> Feed:
        """`everywhere`: on the devices of all processes, which must then all ask for it."""
        source, data = self.source(dataset, split), self.config.data
        with logs.progress(len(source), f"read {dataset} {split}", "images") as bar:
            feed = make_feed(
                source,
                self.preprocessing,
                devices.make_global_mesh() if everywhere and jax.process_count() > 1 else self.mesh,
                data.resident_gigabytes,
                data.num_threads,
                progress=lambda done: bar.update(done - bar.n),
            )
        if isinstance(feed, Streamed):
            log.info(
                "%s %s exceeds config.data.resident_gigabytes = %g: it is streamed from disk.",
                dataset,
                split,
                data.resident_gigabytes,
            )
        return feed

    def net(self, model: str, num_classes: int) -> Net:
        return settings.make_net(self.config, self.models[model], num_classes, devices.compute_dtype())

    @functools.cached_property
    def models(self) -> dict[str, dict]:
        """The models to pre-train, by what they are called."""
        return settings.models(self.config)

    @property
    def sources(self) -> list[str]:
        """The data sets to pre-train on, each for itself."""
        return settings.sources(self.config)

    @functools.cached_property
    def pretrainings(self) -> list[Pretraining]:
        """Every model on every source."""
        short = _short_names(self.sources)
        models = [[model] if len(self.models) > 1 else [] for model in self.models]
        sources = [[short[source]] if len(self.sources) > 1 else [] for source in self.sources]
        return [
            Pretraining(model, source, "/".join(a + b))
            for model, a in zip(self.models, models, strict=True)
            for source, b in zip(self.sources, sources, strict=True)
        ]

    def _source_net(self, pretraining: Pretraining) -> Net:
        """What is pre-trained: without a head where the objective trains none."""
        net = self.net(pretraining.model, self.source(pretraining.source, "train").num_classes)
        return net if self._make_objective(net).has_head else self.net(pretraining.model, 0)

    def _objective(self, pretraining: Pretraining) -> Objective:
        return self._make_objective(self.source_net(pretraining))

    def _make_objective(self, net: Net) -> Objective:
        config = self.config.pretrain
        return OBJECTIVES[config.objective](net, tuple(config.augment), **settings.objective_settings(self.config))

    def pretrain_sizes(self, pretraining: Pretraining) -> dict[str, tuple[str, int]]:
        """feed -> (data set, images a step) of what a pre-training sees: its source, then config.pretrain.feeds.

        Raises:
          InputError: if these are not the feeds that the objective reads.
        """
        config = self.config.pretrain
        main, *others = self.objective(pretraining).views
        if set(others) != set(config.feeds):
            raise InputError(
                f"config.pretrain.feeds has {', '.join(config.feeds) or 'no feeds'}; the objective {config.objective} reads, "
                f"beside the source ({main}), {', '.join(others) or 'none'}: name them, each with its dataset and batch_size."
            )
        further = {name: (config.feeds[name].dataset, config.feeds[name].batch_size) for name in others}
        return {main: (pretraining.source, config.batch_size), **further}

    @functools.cached_property
    def epochs(self) -> list[int]:
        """The epochs to evaluate."""
        return evaluated_epochs(self.config.trajectory.epochs, self.config.pretrain.epochs)

    @functools.cached_property
    def snapshots(self) -> list[Snapshot]:
        """The checkpoints to evaluate: "5", or "resnet18/cifar10/5" where there are several models and sources."""
        return [self.snapshot(pretraining, epoch) for pretraining in self.pretrainings for epoch in self.epochs]

    def tuned_snapshots(self, target: str) -> list[Snapshot]:
        """Those to fine-tune on a target."""
        rule = settings.finetune_settings(self.config, target).checkpoints
        chosen = evaluated_epochs(rule, self.config.pretrain.epochs) if rule else self.epochs
        return [snapshot for snapshot in self.snapshots if snapshot.epoch in chosen]

    def snapshot(self, pretraining: Pretraining, epoch: int) -> Snapshot:
        return Snapshot(pretraining, epoch, f"{pretraining.name}/{epoch}".lstrip("/"))

    def folder(self, pretraining: Pretraining) -> pathlib.Path:
        """What holds the `checkpoints/` of a pre-training: for the first one the working directory itself."""
        first = pretraining == self.pretrainings[0]
        return self.workdir if first else self.workdir / "others" / pretraining.name

    def _trajectory(self, pretraining: Pretraining) -> Trajectory:
        """To read from, once the pre-training is over."""
        trajectory = Trajectory(self.folder(pretraining) / "checkpoints", alone=True)
        self._opened.append(trajectory)
        return trajectory

    def close(self) -> None:
        """Closes the trajectories, and lets go of the data: a closed workspace holds neither sources nor feeds."""
        for trajectory in self._opened:
            trajectory.close()
        for kept in (
            self.source,
            self.source_net,
            self.objective,
            self.trajectory,
            self.forward,
            self.image_gigaflops,
            self.feed,
            self.model,
        ):
            kept.cache_clear()

    def _model(self, snapshot: Snapshot) -> dict:
        """{"params", "stats"} of a checkpoint, on every device."""
        params, stats = jax.eval_shape(self.source_net(snapshot.pretraining).init, jax.random.key(0))
        target = abstract({"params": params, "stats": stats}, devices.replicated(self.mesh))
        return self._saved(snapshot).restore_model(snapshot.epoch, target)

    def _model_fingerprint(self, snapshot: Snapshot) -> str:
        """Identifies the weights of a checkpoint; where the trajectory has its fingerprint, they need not be read."""
        return self._saved(snapshot).fingerprint(snapshot.epoch) or trees.fingerprint(self.model(snapshot))

    def _saved(self, snapshot: Snapshot) -> Trajectory:
        """The trajectory that holds a checkpoint."""
        trajectory = self.trajectory(snapshot.pretraining)
        saved = trajectory.epochs()
        if snapshot.epoch not in saved:
            raise InputError(
                f"{trajectory.folder} holds no checkpoint of epoch {snapshot.epoch} (it has {saved or 'none'}): "
                "run the pretrain stage first."
            )
        return trajectory

    def _forward(self, pretraining: Pretraining):
        return extract.make_forward(self.source_net(pretraining), self.preprocessing, self.mesh)

    def _image_gigaflops(self, pretraining: Pretraining) -> float:
        """The work of a forward pass of one image."""
        params, stats = jax.eval_shape(self.source_net(pretraining).init, jax.random.key(0))
        model, forward = {"params": params, "stats": stats}, self.forward(pretraining)
        return extract.forward_gigaflops(forward, model, self.preprocessing, self.config.data.eval_batch_size)

    def features(self, snapshot: Snapshot, dataset: str, split: str) -> Features:
        """Returns the features of a split of a data set, from the cache if they are there."""
        source = self.source(dataset, split)
        key = extract.cache_key(
            self.model_fingerprint(snapshot), self.models[snapshot.pretraining.model], self.preprocessing, source
        )
        path = self.workdir / "features" / f"{key}.npz"
        found = extract.load(path)
        if found is None:
            feed, forward = self.feed(dataset, split), self.forward(snapshot.pretraining)
            found = extract.extract(forward, self.model(snapshot), feed, self.config.data.eval_batch_size)
            extract.save(path, found)
        return found

    def problem(self, snapshot: Snapshot, dataset: str, load: Callable[[Snapshot, str], Features] | None = None) -> str:
        """What is wrong with a checkpoint's features of a data set; "" for nothing. `load`: (checkpoint, split) -> other ones."""
        load = load or (lambda snapshot, split: self.features(snapshot, dataset, split))
        num_classes = self.source(dataset, "train").num_classes
        for split in ("train", "test"):
            found = extract.problem(load(snapshot, split), num_classes)
            if found:
                return f"{split} {found}"
        return ""

    def stacked_features(self, snapshots: list[Snapshot], dataset: str, split: str) -> Features:
        """Features [k, n, d], logits [k, n, s], labels [k, n]: source classes that a checkpoint lacks have probability 0."""
        found = [self.features(snapshot, dataset, split) for snapshot in snapshots]
        s = max(features.logits.shape[1] for features in found)
        padded = [np.pad(f.logits, ((0, 0), (0, s - f.logits.shape[1])), constant_values=-np.inf) for f in found]
        return Features(
            features=jnp.asarray(np.stack([f.features for f in found])),
            logits=jnp.asarray(np.stack(padded)),
            labels=jnp.asarray(np.stack([f.labels for f in found])),
        )

    def transfer_row(self, snapshot: Snapshot, target: str, method: str, seed: int, **measured) -> TransferRow:
        """A row of results/transfer.jsonl; what was not measured is NaN."""
        numbers = ("learning_rate", "accuracy", "mean_class_accuracy", "seconds", "gflops")
        return TransferRow(
            checkpoint=snapshot.name,
            epoch=snapshot.epoch,
            target=target,
            method=method,
            seed=seed,
            num_train=len(self.source(target, "train")),
            num_test=len(self.source(target, "test")),
            **{**dict.fromkeys(numbers, math.nan), **measured},
        )

    def counted(self, rows: Iterable[TransferRow | ScoreRow]) -> dict[int, float]:
        """Feature dimension -> gflops, as rows have it. The work of what runs until it converges is that of the first
        checkpoint, whichever are missing when a run is resumed."""
        dims = {s.name: self.source_net(s.pretraining).feature_dim for s in self.snapshots}
        found: dict[int, float] = {}
        for row in rows:
            if row.checkpoint in dims and not row.error:
                found.setdefault(dims[row.checkpoint], row.gflops)
        return found

    def groups(self, snapshots: list[Snapshot], dataset: str, copies: int = 1) -> list[list[Snapshot]]:
        """Splits checkpoints into those of equal feature dimension, and these so that `copies` of the stacked features of a
        group fit the budget; as equal as possible."""
        by_dim: dict[int, list[Snapshot]] = {}
        for snapshot in snapshots:
            by_dim.setdefault(self.source_net(snapshot.pretraining).feature_dim, []).append(snapshot)
        images = sum(len(self.source(dataset, split)) for split in ("train", "test"))
        widest = max(self.source(source, "train").num_classes for source in self.sources)
        return [
            group
            for dim, alike in by_dim.items()
            for group in self.tiles(alike, images * (dim + widest) * 4 * copies, "features", dataset)
        ]

    def tiles(self, snapshots: list[Snapshot], bytes_each: int, what: str, dataset: str) -> list[list[Snapshot]]:
        """Splits checkpoints so that `bytes_each` of each in a part fit the budget for features; says so if it must."""
        largest = max(1, int(self.config.data.features_gigabytes * 1e9 // bytes_each))
        count = math.ceil(len(snapshots) / largest)
        if count > 1:
            log.info(
                "The %s of %d checkpoints on %s exceed config.data.features_gigabytes = %g: processed in %d groups.",
                what,
                len(snapshots),
                dataset,
                self.config.data.features_gigabytes,
                count,
            )
        places = np.array_split(np.arange(len(snapshots)), count)
        return [[snapshots[i] for i in group] for group in places]


def _short_names(sources: list[str]) -> dict[str, str]:
    """A folder name for each source, different for each: tfds:cifar10?train=500 -> cifar10."""
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


def lock_workdir(workdir: pathlib.Path):
    """Creates a working directory if need be and locks it for this run; returns the lock to hold until `close`.

    Raises:
      InputError: if it cannot be written, or another process uses it.
    """
    if not devices.is_first_process():
        return contextlib.ExitStack()  # the first process holds it for all
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / ".lock", "w")  # noqa: SIM115  held as long as the study runs
    except OSError as error:
        raise InputError(f"--workdir={workdir} cannot be written: {error.strerror}.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(
            f"--workdir={workdir} is in use by another run: wait for it, or choose another one."
        ) from error
    return lock
