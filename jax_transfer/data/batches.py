"""From a source to batches on the device: resident, or streamed through Grain.

A feed gives the training loop the items of its compiled calls, from which a batch is fetched inside of them, and gives
evaluation its padded and masked batches. Both kinds give the same batches for the same seed: the order of an epoch
comes from one function, and augmentation happens later, on the device. A training takes its batches from a `Joined`: one
feed, or several side by side.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_transfer import devices
from jax_transfer.data.source import Source, subset
from jax_transfer.data.sources import materialize
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
    """What training and evaluation ask of a data set.

    held: what every compiled call needs of it, on the device. max_steps: how many steps' items a call should take at most.
    """

    source: Source
    held: Any
    max_steps: int

    def items(self, steps: range, count: int, seed: int, batch_size: int) -> Iterator[Any]:
        """Yields the items of training steps, leaves [count, ...], `count` steps at a time; epoch follows on epoch.

        steps: consecutive numbers, from 0 at the beginning of the training; `count` divides how many there are.
        """

    @staticmethod
    def fetch(held, item) -> Batch:
        """Inside jit: the batch of one step from its item, leaves [...]."""

    def on(self, mesh: Mesh) -> "Feed":
        """The same feed for another mesh over the same devices."""

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        """Yields every image once, in order, in batches of one size; the last is padded and masked."""


def abstract_batch(
    preprocessing: Preprocessing, batch_size: int, extra: Mapping[str, np.ndarray] | None = None
) -> Batch:
    """The shapes and dtypes of a batch that a feed gives; extra: that of its source."""
    size, shape = preprocessing.host_size, jax.ShapeDtypeStruct
    return Batch(
        images=shape((batch_size, size, size, 3), np.uint8),
        labels=shape((batch_size,), np.int32),
        mask=shape((batch_size,), bool),
        extra={name: shape((batch_size, *array.shape[1:]), array.dtype) for name, array in (extra or {}).items()},
    )


def epochs_order(num_examples: int, steps: range, seed: int, batch_size: int) -> np.ndarray:
    """The examples of training steps, which may lie in several epochs: int32 [len(steps), batch_size]."""
    an_epoch = num_examples // batch_size
    first = steps.start // an_epoch
    orders = [
        np.asarray(epoch_order(_scalar(seed), _scalar(epoch), num_examples, batch_size))
        for epoch in range(first, -(-steps.stop // an_epoch))
    ]
    return np.concatenate(orders)[steps.start - first * an_epoch :][: len(steps)]


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
    max_steps: int = devices.MAX_STEPS_PER_CALL

    def items(self, steps, count, seed, batch_size):
        order = epochs_order(len(self.source), steps, seed, batch_size)
        for first in range(0, len(steps), count):
            yield devices.replicate(order[first : first + count], self.mesh)

    @staticmethod
    def fetch(held, item):
        return jax.tree.map(lambda x: x[item], held)

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
    max_steps: int = 16
    held: None = None

    def _read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """One batch; an index of -1 is padding."""
        real = indices[indices >= 0]
        size = self.preprocessing.host_size
        images = np.zeros((len(indices), size, size, 3), np.uint8)
        for i, image in enumerate(self.source.read(real.tolist())):
            images[i] = self.preprocessing.square(image)
        labels = np.zeros(len(indices), np.int32)
        labels[: len(real)] = self.source.labels[real]
        extra = {name: _padded(array[real], len(indices)) for name, array in self.source.extra.items()}
        return {"images": images, "labels": labels, "mask": indices >= 0, "extra": extra}

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

    def items(self, steps, count, seed, batch_size):
        yield from self._load(epochs_order(len(self.source), steps, seed, batch_size), count)

    @staticmethod
    def fetch(held, item):
        return item

    def on(self, mesh):
        return dataclasses.replace(self, mesh=mesh)

    def evaluation_batches(self, batch_size):
        indices = np.arange(len(self.source))
        padded = np.concatenate([indices, np.full(-len(indices) % batch_size, -1)])
        for batch in self._load(padded.reshape(-1, batch_size), 1):
            yield jax.tree.map(lambda x: x[0], batch)


def _padded(array: np.ndarray, size: int) -> np.ndarray:
    """array [m, ...] with zeros behind, [size, ...]."""
    return np.concatenate([array, np.zeros((size - len(array), *array.shape[1:]), array.dtype)])


@dataclasses.dataclass(frozen=True)
class Joined:
    """Feeds side by side: a training step takes a batch of each.

    The first one's length is an epoch. The others go round by themselves: an epoch of theirs ends wherever it ends.
    """

    feeds: Mapping[str, Feed]
    batch_sizes: Mapping[str, int]

    @property
    def steps_per_epoch(self) -> int:
        name, feed = next(iter(self.feeds.items()))
        return len(feed.source) // self.batch_sizes[name]

    @property
    def sizes(self) -> dict[str, tuple[Source, int]]:
        """feed -> (its source, images a step)."""
        return {name: (feed.source, self.batch_sizes[name]) for name, feed in self.feeds.items()}

    @property
    def batch_size(self) -> int:
        """Images a step, over all feeds."""
        return sum(self.batch_sizes.values())

    @property
    def num_classes(self) -> dict[str, int]:
        return {name: feed.source.num_classes for name, feed in self.feeds.items()}

    @property
    def held(self) -> dict[str, Any]:
        return {name: feed.held for name, feed in self.feeds.items()}

    @property
    def max_steps(self) -> int:
        return min(feed.max_steps for feed in self.feeds.values())

    def items(self, steps: range, count: int, seed: int) -> Iterator[dict[str, Any]]:
        """Yields the items of training steps, as `Feed.items` does, of all feeds."""
        each = [
            # A seed of its own, or two feeds of one size would have the same order.
            feed.items(steps, count, seed + (place << 24), self.batch_sizes[name])
            for place, (name, feed) in enumerate(self.feeds.items())
        ]
        for items in zip(*each, strict=True):
            yield dict(zip(self.feeds, items, strict=True))

    @property
    def fetch(self) -> Callable[[dict, dict], dict[str, Batch]]:
        """Inside jit, fetch(held, item): feed -> the batch of one step. It holds no data."""
        fetch = {name: feed.fetch for name, feed in self.feeds.items()}
        return lambda held, item: {name: fetch[name](held[name], item[name]) for name in fetch}

    def on(self, mesh: Mesh) -> "Joined":
        """The same feeds for another mesh over the same devices."""
        return dataclasses.replace(self, feeds={name: feed.on(mesh) for name, feed in self.feeds.items()})


def joined(feeds: Mapping[str, tuple[Feed, int]]) -> Joined:
    """Joins feeds, each with the number of images that a step takes of it; the first one's length is an epoch.

    >>> joined({"target": (target, 256), "source": (source, 256)})  # doctest: +SKIP

    Raises:
      InputError: for a feed with fewer images than one batch.
    """
    for name, (feed, batch_size) in feeds.items():
        steps_per_epoch(len(feed.source), batch_size, f"{feed.source.name} (feed {name})")
    sizes = {name: batch_size for name, (_, batch_size) in feeds.items()}
    return Joined({name: feed for name, (feed, _) in feeds.items()}, sizes)


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
        held = Batch(images, labels, np.ones(len(labels), bool), dict(source.extra))
        return Resident(source, devices.replicate(held, mesh), mesh)
    require_different(source, (preprocessing.square(source.read([i])[0]) for i in range(len(source))))
    if not fits:
        return Streamed(source, preprocessing, mesh, num_threads)
    # Each process reads its own part, and the devices tell each other; the last part is filled up and cut off again.
    n, count = len(source), mesh.size
    mine = np.arange(-(-n // count) * count).reshape(jax.process_count(), -1)[jax.process_index()]
    part = subset(source, np.minimum(mine, n - 1))
    images, labels = read(part, progress=progress)
    held = Batch(images, labels, np.ones(len(labels), bool), dict(part.extra))
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
