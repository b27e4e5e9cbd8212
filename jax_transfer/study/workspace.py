"""The context that the stages of a study share: config, working directory, data, nets, checkpoints and features."""

import functools
import math
import pathlib
import reprlib
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import jax
import numpy as np

from jax_transfer import devices, logs
from jax_transfer.checkpoints import Checkpoint, with_classes
from jax_transfer.checkpoints.checkpoint import Model
from jax_transfer.checkpoints.trajectory import Trajectory
from jax_transfer.data.batches import Feed, ResidentCrops, Streamed, make_feed, steps_per_epoch
from jax_transfer.data.crops import Crop
from jax_transfer.data.source import Source, of_classes, subset
from jax_transfer.data.sources import load_source
from jax_transfer.data.subsets import stratified_split
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.features.cache import FeatureCache
from jax_transfer.fields import StudyConfig
from jax_transfer.logs import log
from jax_transfer.models import Net
from jax_transfer.ranking.candidates import Candidate, load
from jax_transfer.records import Features, InputError
from jax_transfer.results import Rows, TransferRow
from jax_transfer.study import epochs, given, settings, text
from jax_transfer.study.epochs import Pretraining, Saved, Snapshot
from jax_transfer.study.settings import Recipe
from jax_transfer.training.objectives import OBJECTIVES, Objective

P = ParamSpec("P")
T = TypeVar("T")


def kept(most: int | None = None):
    """Caches up to `most` results of a method of `Workspace`, until the workspace is closed."""

    def decorate(method: Callable[Concatenate["Workspace", P], T]) -> Callable[Concatenate["Workspace", P], T]:
        name = method.__name__

        @functools.wraps(method)
        def call(self: "Workspace", *args: P.args, **kwargs: P.kwargs) -> T:
            if name not in self.caches:
                self.caches[name] = functools.lru_cache(most)(functools.partial(method, self))
            return self.caches[name](*args, **kwargs)

        return call

    return decorate


class Workspace:
    """The context of a study, which all stages share.

    Attributes:
      results: the folder of the result files.
      preprocessing: the preprocessing of the models that the study pre-trains; a given checkpoint has its own.
      models: label of each model to pre-train -> its name in MODELS and its settings.
      sources: the data sets to pre-train on.
      recipes: label of each way to pre-train -> its objective and settings.
      snapshots: the checkpoints to evaluate.
      features_of: the cache of features, called with a checkpoint and a source.
      caches: the cached results of the methods decorated with `kept`.
    """

    def __init__(self, config: StudyConfig, workdir: pathlib.Path):
        self.config, self.workdir, self.results = config, workdir, workdir / "results"
        self.caches: dict[str, Callable] = {}
        self.preprocessing: Preprocessing = settings.preprocessing(config)
        self.mesh = devices.make_mesh()
        started = any((workdir / "checkpoints").glob("[0-9]*"))
        self.pretrainings: list[Pretraining] = epochs.pretrainings(config, started)
        self.models: dict[str, dict] = settings.models(config) if self.pretrainings else {}
        self.sources: list[str] = settings.sources(config) if self.pretrainings else []
        self.recipes: dict[str, Recipe] = settings.recipes(config) if self.pretrainings else {}
        recorded = given.names(Rows(self.results, "checkpoints")) if config.checkpoints else {}
        self.snapshots: list[Snapshot] = epochs.evaluated_snapshots(config, started, recorded)
        self.features_of = FeatureCache(
            workdir / "features",
            lambda source, preprocessing: self._feed(source, preprocessing.reading, False),
            self.mesh,
            config.data.eval_batch_size,
        )

    @kept()
    def source(self, dataset: str, split: str) -> Source:
        """Returns a split of a data set: "train" or "test", or a part of "train" ("fit" or "held_out").

        Scores that need training train on "fit" and test on "held_out".
        """
        if split in ("fit", "held_out"):
            train = self.source(dataset, "train")
            fit, held_out = stratified_split(train.labels)
            return subset(train, fit if split == "fit" else held_out)
        return load_source(dataset, split, seed=self.config.seed, on_corrupt=self.config.data.on_corrupt)

    @kept(4)
    def part(self, dataset: str, indices: bytes, renumber: bool) -> Source:
        """Returns the training images at `indices`, the bytes of an int64 array [m], of a data set.

        Equal arguments give the same object, so that its feed is read once.

        Args:
          renumber: whether the classes that occur are numbered 0, 1, ..., instead of as in the data set.
        """
        part = subset(self.source(dataset, "train"), np.frombuffer(indices, np.int64))
        return of_classes(part, np.unique(part.labels).tolist()) if renumber else part

    def metric(self, target: str) -> str:
        """Returns the metric of a target, a key of `records.METRICS`: the one in the config, or else the usual one."""
        return self.config.metrics.get(target) or self.source(target, "train").metric

    @property
    def metrics(self) -> dict[str, str]:
        """Metric of each target."""
        return {target: self.metric(target) for target in self.config.targets}

    def feed(
        self,
        dataset: str,
        split: str,
        preprocessing: Preprocessing,
        everywhere: bool = False,
        crops: tuple[Crop | None, ...] = (),
    ) -> Feed:
        """Returns the feed of a split, with images of the size that a preprocessing needs.

        Args:
          everywhere: whether to place it on the devices of all processes, all of which must then call this method.
          crops: the crop of each view (`crops_of`).
        """
        return self.feed_of(self.source(dataset, split), preprocessing, crops, everywhere)

    def feed_of(
        self,
        source: Source,
        preprocessing: Preprocessing,
        crops: tuple[Crop | None, ...] = (),
        everywhere: bool = False,
    ) -> Feed:
        """Returns the feed of a part of a data set; the arguments are those of `feed`."""
        everywhere = everywhere and jax.process_count() > 1
        return self._feed(source, preprocessing.reading, everywhere, crops if any(crops) else ())

    @kept(4)
    def _feed(
        self, source: Source, preprocessing: Preprocessing, everywhere: bool, crops: tuple[Crop | None, ...] = ()
    ) -> Feed:
        data = self.config.data
        with logs.progress(len(source), f"read {source.name} {source.split}", "images") as bar:
            feed = make_feed(
                source,
                preprocessing,
                devices.make_global_mesh() if everywhere else self.mesh,
                data.resident_gigabytes,
                data.num_threads,
                progress=lambda done: bar.update(done - bar.n),
                crops=crops,
            )
        if isinstance(feed, ResidentCrops):
            more = "; a larger config.data.resident_gigabytes keeps more, and 0 streams every pixel from disk"
            log.info("%s %s: %s for random crops%s.", source.name, source.split, feed, more if feed.is_reduced else "")
        if isinstance(feed, Streamed):
            log.info(
                "%s %s exceeds config.data.resident_gigabytes = %g: it is streamed from disk.",
                source.name,
                source.split,
                data.resident_gigabytes,
            )
        return feed

    def model(self, pretraining: Pretraining) -> dict:
        """Returns the name and the settings of the model of a pre-training."""
        return settings.model_of(self.models[pretraining.model], self.recipe(pretraining))

    def net(self, pretraining: Pretraining, num_classes: int) -> Net:
        """Builds the net of a pre-training with a head for `num_classes` classes, in the precision of the device."""
        return settings.make_net(self.config, self.model(pretraining), num_classes, devices.compute_dtype())

    @kept()
    def source_net(self, pretraining: Pretraining) -> Net:
        """Returns the net to pre-train, without a head if the objective does not train one."""
        net = self.net(pretraining, self.source(pretraining.source, "train").num_classes)
        return net if self._make_objective(pretraining, net).has_head else self.net(pretraining, 0)

    @kept()
    def objective(self, pretraining: Pretraining) -> Objective:
        """Returns the objective that a pre-training minimises."""
        return self._make_objective(pretraining, self.source_net(pretraining))

    def _make_objective(self, pretraining: Pretraining, net: Net) -> Objective:
        where, section, *_ = self.recipe(pretraining)
        try:
            return OBJECTIVES[section.objective](net, tuple(section.augment), **settings.objective_settings(section))
        except InputError as error:
            raise InputError(f"{where}: {error}") from error

    def recipe(self, pretraining: Pretraining) -> Recipe:
        """Returns the objective and the settings of a pre-training."""
        return self.recipes[pretraining.objective]

    @kept()
    def trained_on(self, pretraining: Pretraining) -> Source:
        """Returns the images on which a pre-training trains, with what its objective reads of them in `extra`.

        Raises:
          InputError: if the objective reads captions and the data set has none.
        """
        source = self.source(pretraining.source, "train")
        if "tokens" not in self.objective(pretraining).extra:
            return source
        section = self.recipe(pretraining).section
        return text.with_language(source, self.folder(pretraining), settings.objective_settings(section))

    def folder(self, pretraining: Pretraining) -> pathlib.Path:
        """Returns the folder of a pre-training's `checkpoints/`, which for the first one is the working directory."""
        first = pretraining == self.pretrainings[0]
        return self.workdir if first else self.workdir / "others" / pretraining.name

    def steps_per_epoch(self, pretraining: Pretraining) -> int:
        """Returns the number of training steps in an epoch of a pre-training.

        Raises:
          InputError: if its data set has fewer images than a batch.
        """
        source, recipe = self.source(pretraining.source, "train"), self.recipe(pretraining)
        return steps_per_epoch(len(source), recipe.section.batch_size, f"{pretraining.source} ({recipe.where})")

    def step(self, saved: Saved) -> int:
        """Returns the training step at which an entry of a trajectory is saved."""
        is_step = epochs.length(self.config).unit == "step"
        return saved.number * (1 if is_step else self.steps_per_epoch(saved.pretraining))

    def epoch(self, snapshot: Snapshot) -> float | None:
        """Returns the epoch of a checkpoint, which is not whole if it was saved within one; None for a given one."""
        if isinstance(snapshot.origin, Candidate):
            return None
        saved = snapshot.origin
        if epochs.length(self.config).unit == "epoch":
            return saved.number
        return epochs.epochs_after(saved.number, self.steps_per_epoch(saved.pretraining))

    @kept()
    def _trajectory(self, pretraining: Pretraining) -> Trajectory:
        return Trajectory(self.folder(pretraining) / "checkpoints", alone=True)

    @kept()
    def checkpoint(self, snapshot: Snapshot) -> Checkpoint:
        """Returns a checkpoint of the study. Its weights are read only when they are needed.

        Its net computes in the precision of the device.

        Raises:
          InputError: if a given checkpoint cannot be read. An epoch that is not there yet raises it when its weights or
            its fingerprint are read.
        """
        read_model = functools.partial(self._model, snapshot)
        if isinstance(snapshot.origin, Candidate):
            return given.without_weights(snapshot, self._load(snapshot.origin), read_model)
        saved, pretraining = snapshot.origin, snapshot.origin.pretraining
        arguments = settings.net_arguments(self.config, self.model(pretraining))
        return Checkpoint.stored(
            snapshot.name,
            self.source_net(pretraining),
            read_model,
            self.preprocessing,
            lambda: self.trajectory_with(saved).fingerprint(saved.number) or "",
            settings={name: value for name, value in arguments.items() if name != "name"},
            has_head=self.objective(pretraining).has_head,
        )

    @kept(1)
    def _model(self, snapshot: Snapshot) -> Model:
        """Reads the weights of a checkpoint, replicated to every device."""
        if isinstance(snapshot.origin, Candidate):
            with logs.muted():  # `checkpoint` has read it and logged what there is to say
                loaded = self._load(snapshot.origin)
            if loaded.fingerprint != self.checkpoint(snapshot).fingerprint:
                raise InputError(f"{snapshot.origin.path} has changed while the study ran: restore it, and run again.")
            return devices.replicate(loaded.model, self.mesh)
        saved, net = snapshot.origin, self.source_net(snapshot.origin.pretraining)
        return self.trajectory_with(saved).restore_model(saved.number, net, devices.replicated(self.mesh))

    def _load(self, candidate: Candidate, keep_projection: bool = False) -> Checkpoint:
        """Loads a given checkpoint with its weights."""
        replaced = {k: v for k, v in self.config.checkpoint_preprocessing.items() if v is not None}
        return load(candidate, replaced, self.config.seed, keep_projection)

    @kept(1)
    def with_projection(self, snapshot: Snapshot) -> Checkpoint:
        """Loads a checkpoint of the study with its weights and its projection.

        Raises:
          InputError: if it has none.
        """
        if not isinstance(snapshot.origin, Candidate):
            objective = self.recipe(snapshot.origin.pretraining).section.objective
            raise InputError(
                f"checkpoint {snapshot.name}: {objective} pre-training has no projection; use "
                'config.select.representation = "features".'
            )
        with logs.muted():
            return self._load(snapshot.origin, keep_projection=True)

    @property
    def reused(self) -> str:
        """The data set of source images from which the stage "select" selects."""
        return self.config.select.dataset or self.config.source.dataset

    def trajectory_with(self, saved: Saved) -> Trajectory:
        """Returns the trajectory that holds an entry.

        Raises:
          InputError: if the entry is not there.
        """
        trajectory = self._trajectory(saved.pretraining)
        numbers = trajectory.epochs()
        if saved.number not in numbers:
            raise InputError(
                f"{trajectory.folder} holds no checkpoint of {epochs.length(self.config).unit} {saved.number} (it has "
                f"{reprlib.repr(numbers) if numbers else 'none'}): run the pretrain stage first, or name the "
                "checkpoints to evaluate in config.checkpoints."
            )
        return trajectory

    def tuned_net(self, snapshot: Snapshot, target: str) -> Net:
        """Returns the net of a checkpoint with a head for the classes of a target."""
        num_classes = self.source(target, "train").num_classes
        return with_classes(self.checkpoint(snapshot), num_classes, devices.compute_dtype())

    def features(self, snapshot: Snapshot, dataset: str, split: str) -> Features:
        """Returns a checkpoint's features of a split of a data set, from the cache if it contains them."""
        return self.features_of(self.checkpoint(snapshot), self.source(dataset, split))

    def gigaflops_per_image(self, snapshot: Snapshot) -> float:
        """Computes the work of a forward pass on one image, in GFLOP."""
        checkpoint = self.checkpoint(snapshot)
        return self.features_of.gigaflops_per_image(checkpoint.net, checkpoint.preprocessing)

    def transfer_row(self, snapshot: Snapshot, target: str, method: str, seed: int, **measured) -> TransferRow:
        """Makes a row of results/transfer.jsonl. Numbers that are not in `measured` are NaN."""
        numbers = ("learning_rate", "accuracy", "mean_class_accuracy", "seconds", "gflops")
        return TransferRow(
            checkpoint=snapshot.name,
            epoch=self.epoch(snapshot),
            target=target,
            method=method,
            seed=seed,
            **{
                **dict.fromkeys(numbers, math.nan),
                "num_train": len(self.source(target, "train")),
                "num_test": len(self.source(target, "test")),
                **measured,
            },
        )

    def close(self) -> None:
        """Closes the trajectories and releases all sources, feeds and compiled programs."""
        for pretraining in self.pretrainings if "_trajectory" in self.caches else ():
            self._trajectory(pretraining).close()
        self.caches.clear()
        self.features_of.clear()
