"""What the stages of a study share: a config, a working directory, and the data, nets, models and features."""

import fcntl
import functools
import json
import math
import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict

from jax_transfer import config as settings
from jax_transfer import devices, logs, trees
from jax_transfer.data.batches import Feed, make_feed
from jax_transfer.data.sources import Source, load_source
from jax_transfer.features import extract
from jax_transfer.logs import log
from jax_transfer.models import Net
from jax_transfer.records import Features, InputError
from jax_transfer.training.trajectory import Trajectory, abstract, evaluated_epochs


class Workspace:
    """A config, a working directory, and what several stages need of them: data, nets, models, features."""

    def __init__(self, config: ConfigDict, workdir: pathlib.Path):
        self.config, self.workdir = config, workdir
        self.preprocessing = settings.preprocessing(config)
        self.mesh = devices.make_mesh()
        self.results = workdir / "results"
        self.source = functools.cache(self._source)
        self.feed = functools.lru_cache(maxsize=4)(self._feed)
        self.model = functools.lru_cache(maxsize=1)(self._model)
        self.model_fingerprint = functools.cache(lambda epoch: trees.fingerprint(self.model(epoch)))

    def _source(self, dataset: str, split: str) -> Source:
        return load_source(dataset, split, seed=self.config.seed, on_corrupt=self.config.data.on_corrupt)

    def _feed(self, dataset: str, split: str) -> Feed:
        source, data = self.source(dataset, split), self.config.data
        with logs.progress(len(source), f"read {dataset} {split}", "images") as bar:
            return make_feed(
                source,
                self.preprocessing,
                self.mesh,
                data.resident_gigabytes,
                data.num_threads,
                progress=lambda done: bar.update(done - bar.n),
            )

    def net(self, num_classes: int) -> Net:
        return settings.make_net(self.config, num_classes, devices.compute_dtype())

    @functools.cached_property
    def source_net(self) -> Net:
        return self.net(self.source(self.config.source.dataset, "train").num_classes)

    @functools.cached_property
    def epochs(self) -> list[int]:
        """The epochs to evaluate."""
        return evaluated_epochs(self.config.trajectory.epochs, self.config.pretrain.epochs)

    @functools.cached_property
    def trajectory(self) -> Trajectory:
        return Trajectory(self.workdir / "checkpoints")

    def close(self) -> None:
        if "trajectory" in self.__dict__:
            self.trajectory.close()

    def _model(self, epoch: int) -> dict:
        """{"params", "stats"} of an epoch, on every device."""
        saved = self.trajectory.epochs()
        if epoch not in saved:
            raise InputError(
                f"{self.trajectory.folder} holds no checkpoint of epoch {epoch} (it has {saved or 'none'}): "
                "run the pretrain stage first."
            )
        params, stats = jax.eval_shape(self.source_net.init, jax.random.key(0))
        target = abstract({"params": params, "stats": stats}, devices.replicated(self.mesh))
        return self.trajectory.restore_model(epoch, target)

    @functools.cached_property
    def forward(self):
        return extract.make_forward(self.source_net, self.preprocessing, self.mesh)

    def features(self, epoch: int, dataset: str, split: str) -> Features:
        """Of one checkpoint and data set: from the cache, or computed and cached."""
        source, model_settings = self.source(dataset, split), self.config.model.to_dict()
        key = extract.cache_key(self.model_fingerprint(epoch), model_settings, self.preprocessing, source)
        path = self.workdir / "features" / f"{key}.npz"
        found = extract.load(path)
        if found is None:
            feed = self.feed(dataset, split)
            found = extract.extract(self.forward, self.model(epoch), feed, self.config.data.eval_batch_size)
            extract.save(path, found)
        return found

    def groups(self, epochs: list[int], dataset: str) -> list[list[int]]:
        """Splits epochs so that the stacked features of a group fit the budget; as equal as possible."""
        images = sum(len(self.source(dataset, split)) for split in ("train", "test"))
        bytes_each = images * self.source_net.feature_dim * 4
        largest = max(1, int(self.config.data.features_gigabytes * 1e9 // bytes_each))
        count = math.ceil(len(epochs) / largest)
        if count > 1:
            log.info(
                "The features of %d checkpoints on %s exceed config.data.features_gigabytes = %g: worked off in "
                "%d groups.",
                len(epochs),
                dataset,
                self.config.data.features_gigabytes,
                count,
            )
        return [list(map(int, group)) for group in np.array_split(epochs, count)] if epochs else []


def open_workdir(config: ConfigDict, workdir: pathlib.Path):
    """Creates or reopens a working directory and locks it for this process; returns the lock to hold.

    Raises:
      InputError: if another process uses it, or if it was made by a config whose results would differ.
    """
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
    path, new = workdir / "config.json", settings.to_json(config)
    if path.exists():
        different = settings.differences(json.loads(path.read_text(encoding="utf-8")), new)
        if different:
            raise InputError(
                f"--workdir={workdir} was made by another config: {'; '.join(different)}. "
                "Use that config again, or another --workdir."
            )
    logs.write_atomically(path, json.dumps(new, indent=1, ensure_ascii=False).encode())
    return lock
