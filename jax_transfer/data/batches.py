"""From a source to batches on the device: resident, or streamed through Grain.

A feed gives the training loop, for each epoch, the inputs of its compiled calls, and gives evaluation
its padded and masked batches. Both kinds give the same batches for the same seed: the order of an epoch
comes from one function, and augmentation happens later, on the device.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_transfer import devices
from jax_transfer.data.sources import Source, materialize, subset
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.records import Batch, InputError


@functools.partial(jax.jit, static_argnums=(2, 3))
def epoch_order(seed, epoch, num_examples: int, batch_size: int):
    """The order in which an epoch visits the examples: int32 [steps, batch_size].

    The last, incomplete batch of an epoch is left out; other examples fall into it in the next epoch.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0x0D), epoch)
    steps = num_examples // batch_size
    return jax.random.permutation(key, num_examples)[: steps * batch_size].reshape(steps, batch_size)


class Feed(Protocol):
    """What training and evaluation ask of a data set."""

    source: Source

    def training_calls(
        self, epoch: int, start: int, seed: int, batch_size: int, max_steps: int = devices.MAX_STEPS_PER_CALL
    ) -> Iterator[tuple[Any, Any, int]]:
        """Yields (held, items, steps) for `steps.many_steps`, from step `start` of the epoch on."""

    @staticmethod
    def fetch(held, step, item) -> Batch:
        """Inside jit: the batch of one step."""

    def on(self, mesh: Mesh) -> "Feed":
        """The same feed for another mesh over the same devices."""

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        """Yields every image once, in order, in batches of one size; the last is padded and masked."""


def steps_per_epoch(num_examples: int, batch_size: int, what: str) -> int:
    """Whole batches in an epoch.

    Raises:
      InputError: if there is not even one.
    """
    if num_examples < batch_size:
        raise InputError(
            f"{what} has {num_examples} training images, fewer than one batch of {batch_size}: use a smaller batch_size."
        )
    return num_examples // batch_size


@dataclasses.dataclass(frozen=True)
class Resident:
    """A data set held as uint8 in device memory, a copy on every device. Nothing happens on the host."""

    source: Source
    held: Batch  # [n, ...]
    mesh: Mesh

    def training_calls(self, epoch, start, seed, batch_size, max_steps=devices.MAX_STEPS_PER_CALL):
        steps = len(self.source) // batch_size
        order = epoch_order(_scalar(seed), _scalar(epoch), len(self.source), batch_size)
        order = devices.replicate(order, self.mesh)
        count = devices.steps_per_call(steps, start, max_steps)
        for _ in range(start, steps, count):
            yield (self.held, order), None, count

    @staticmethod
    def fetch(held, step, item):
        data, order = held
        indices = order[step % order.shape[0]]
        return jax.tree.map(lambda x: x[indices], data)

    def on(self, mesh):
        return dataclasses.replace(self, held=devices.replicate(self.held, mesh), mesh=mesh)

    def evaluation_batches(self, batch_size):
        for start in range(0, len(self.source), batch_size):
            yield _slice(self.held, _scalar(start), batch_size)


@functools.partial(jax.jit, static_argnums=2)
def _slice(held: Batch, start, size: int) -> Batch:
    n = held.labels.shape[0]
    indices = start + jnp.arange(size, dtype=start.dtype)
    batch = jax.tree.map(lambda x: x[jnp.minimum(indices, n - 1)], held)
    return dataclasses.replace(batch, mask=batch.mask & (indices < n))


@dataclasses.dataclass(frozen=True)
class Streamed:
    """A data set read, decoded and resized in Grain's threads while the device computes."""

    source: Source
    preprocessing: Preprocessing
    mesh: Mesh
    num_threads: int
    ahead: int = 2  # calls whose batches are already on the device

    def _read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """One batch; an index of -1 is padding."""
        real = indices[indices >= 0]
        size = self.preprocessing.host_size
        images = np.zeros((len(indices), size, size, 3), np.uint8)
        for i, image in enumerate(self.source.read(real.tolist())):
            images[i] = self.preprocessing.square(image)
        labels = np.zeros(len(indices), np.int32)
        labels[: len(real)] = self.source.labels[real]
        return {"images": images, "labels": labels, "mask": indices >= 0}

    def _load(self, order: np.ndarray, count: int) -> Iterator[Batch]:
        """Batches [count, b, ...] on the device, read in the order given [steps, b], `count` steps at a time."""
        rows = order
        if devices.spans_processes(self.mesh):
            rows = np.split(order, jax.process_count(), axis=1)[jax.process_index()]
        batches = (
            grain.MapDataset.source(_Rows(rows))
            .map(self._read)
            .batch(count)
            .to_iter_dataset(grain.ReadOptions(num_threads=self.num_threads, prefetch_buffer_size=2 * self.num_threads))
        )
        waiting: collections.deque[Batch] = collections.deque()
        for arrays in batches:
            waiting.append(devices.split(Batch(**arrays), self.mesh, "data", dimension=1))
            if len(waiting) > self.ahead:
                yield waiting.popleft()
        yield from waiting

    def training_calls(self, epoch, start, seed, batch_size, max_steps=devices.MAX_STEPS_PER_CALL):
        order = np.asarray(epoch_order(_scalar(seed), _scalar(epoch), len(self.source), batch_size))
        count = devices.steps_per_call(len(order), start, min(max_steps, 16))
        for batch in self._load(order[start:], count):
            yield None, batch, count

    @staticmethod
    def fetch(held, step, item):
        return item

    def on(self, mesh):
        return dataclasses.replace(self, mesh=mesh)

    def evaluation_batches(self, batch_size):
        indices = np.arange(len(self.source))
        padded = np.concatenate([indices, np.full(-len(indices) % batch_size, -1)])
        for batch in self._load(padded.reshape(-1, batch_size), 1):
            yield jax.tree.map(lambda x: x[0], batch)


class _Rows(collections.abc.Sequence):
    """A matrix as a sequence of its rows: what Grain maps over."""

    def __init__(self, matrix: np.ndarray):
        self.matrix = matrix

    def __len__(self):
        return len(self.matrix)

    def __getitem__(self, i):
        return self.matrix[i]


def make_feed(
    source: Source, preprocessing: Preprocessing, mesh: Mesh, resident_gigabytes: float, num_threads: int, progress=None
) -> Feed:
    """Resident where the decoded data set fits into `resident_gigabytes`, streamed otherwise.

    Raises:
      InputError: for an image that cannot be read, and a training set whose images are all equal.
    """
    size = preprocessing.host_size
    fits = len(source) * size * size * 3 <= resident_gigabytes * 1e9
    read = functools.partial(
        materialize, size=size, interpolation=preprocessing.interpolation, image_size=preprocessing.image_size
    )
    if fits and not devices.spans_processes(mesh):
        images, labels = read(source, progress=progress)
        require_different(source, images)
        held = Batch(images=images, labels=labels, mask=np.ones(len(labels), bool))
        return Resident(source, devices.replicate(held, mesh), mesh)
    require_different(source, (preprocessing.square(source.read([i])[0]) for i in range(len(source))))
    if not fits:
        return Streamed(source, preprocessing, mesh, num_threads)
    # Each process reads its own part, and the devices tell each other; the last part is filled up and cut off again.
    n, count = len(source), mesh.size
    mine = np.arange(-(-n // count) * count).reshape(jax.process_count(), -1)[jax.process_index()]
    part = subset(source, np.minimum(mine, n - 1))
    images, labels = read(part, progress=progress)
    held = Batch(images=images, labels=labels, mask=np.ones(len(labels), bool))
    join = jax.jit(lambda held: jax.tree.map(lambda x: x[:n], held), out_shardings=devices.replicated(mesh))
    return Resident(source, join(devices.split(held, mesh, "data")), mesh)


def require_different(source: Source, images: Iterable[np.ndarray]) -> None:
    """Raises InputError if all `images` of a training set are equal; it looks no further than to the first that differs."""
    images = iter(images)
    first = next(images, None)
    if source.split == "train" and len(source) > 1 and all(np.array_equal(first, image) for image in images):
        raise InputError(
            f"{source.name}: all {len(source)} training images are equal once they are resized: there is nothing to "
            "learn from; look at the files."
        )


def _scalar(value: int):
    """An int on the device by an explicit transfer: the hot loops run under a transfer guard."""
    return jax.device_put(np.uint32(value))
