"""Batches on the device from a source: resident in device memory, or streamed through Grain.

A `Feed` serves training and evaluation. For training it yields the items of each compiled call (indices if the data is
resident, batches if it is streamed), and inside the call `fetch` turns the item of a step into the batch of the step.
For evaluation it yields padded and masked batches. Both kinds of feed give the same batches for the same seed:
`epoch_order` alone determines the order, and augmentation runs later, on the device. Training reads from a `Joined`:
one or several feeds.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    """Returns the order in which an epoch visits the examples: int32 [num_examples // batch_size, batch_size].

    The last, incomplete batch of an epoch is dropped; each epoch has its own permutation and drops different examples.

    >>> order = epoch_order(0, 0, 10, 4)
    >>> order.shape, len(set(order.ravel().tolist()))  # no example twice
    ((2, 4), 8)
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0x0D), epoch)
    steps = num_examples // batch_size
    return jax.random.permutation(key, num_examples)[: steps * batch_size].reshape(steps, batch_size)


class Feed(Protocol):
    """A data set that yields batches for training and evaluation.

    source: the data set.
    held: the part of the data that stays on the device, an argument of every compiled call; None if there is none.
    max_steps: the maximum number of training steps in one compiled call.
    """

    @property
    def source(self) -> Source: ...
    @property
    def held(self) -> Any: ...
    @property
    def max_steps(self) -> int: ...

    def items(self, steps: range, count: int, seed: int, batch_size: int) -> Iterator[Any]:
        """Yields the items of training steps, `count` steps at a time, as a pytree with leaves [count, ...].

        Args:
          steps: consecutive step numbers, counted from the start of training; they may span several epochs.
          count: steps in one compiled call; divides len(steps).
          seed: determines the order of each epoch.
          batch_size: images per step.
        """
        ...

    @staticmethod
    def fetch(held, item) -> Batch:
        """Returns the batch of one step, given the item of the step (leaves [...]); runs inside jit."""
        ...

    def on(self, mesh: Mesh) -> "Feed":
        """Returns the same feed on another mesh over the same devices."""
        ...

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        """Yields every image once, in order, in batches of `batch_size`; the last one is padded and masked."""
        ...


def abstract_batch(
    preprocessing: Preprocessing, batch_size: int, extra: Mapping[str, np.ndarray] | None = None
) -> Batch:
    """Returns the shapes and dtypes of the batches of a feed.

    Args:
      extra: `extra` of the feed's source; each array [n, ...] adds an array [batch_size, ...] to the batches.

    >>> abstract_batch(Preprocessing(image_size=32), batch_size=8).images
    ShapeDtypeStruct(shape=(8, 32, 32, 3), dtype=uint8)
    """
    size = preprocessing.host_size
    shape: Any = jax.ShapeDtypeStruct  # traced functions accept it in place of an array
    return Batch(
        images=shape((batch_size, size, size, 3), np.uint8),
        labels=shape((batch_size,), np.int32),
        mask=shape((batch_size,), bool),
        extra={name: shape((batch_size, *array.shape[1:]), array.dtype) for name, array in (extra or {}).items()},
    )


def epochs_order(num_examples: int, steps: range, seed: int, batch_size: int) -> np.ndarray:
    """Returns the indices of the examples that training steps use: int32 [len(steps), batch_size].

    The steps may span several epochs.

    >>> epochs_order(10, range(1, 5), seed=0, batch_size=4).shape  # step 1 of the first epoch to step 0 of the third
    (4, 4)
    """
    steps_in_epoch = num_examples // batch_size
    first_epoch = steps.start // steps_in_epoch
    orders = [
        np.asarray(epoch_order(_scalar(seed), _scalar(epoch), num_examples, batch_size))
        for epoch in range(first_epoch, -(-steps.stop // steps_in_epoch))
    ]
    return np.concatenate(orders)[steps.start - first_epoch * steps_in_epoch :][: len(steps)]


def steps_per_epoch(num_examples: int, batch_size: int, what: str) -> int:
    """Returns the number of whole batches in an epoch.

    Args:
      what: the name of the data set, for the error message.

    Raises:
      InputError: if there are fewer examples than in one batch.

    >>> steps_per_epoch(1000, 128, "tfds:mnist")
    7
    """
    if num_examples < batch_size:
        raise InputError(
            f"{what} has {num_examples} training images, fewer than one batch of {batch_size}: use a smaller "
            "batch_size."
        )
    return num_examples // batch_size


@dataclasses.dataclass(frozen=True)
class Resident:
    """A data set kept as uint8 in device memory, replicated on every device; the host does no work during training.

    The item of a step is the array of the indices of its examples.
    """

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
    """A data set read, decoded and resized in Grain's threads while the device computes.

    The item of a step is its batch.
    """

    source: Source
    preprocessing: Preprocessing
    mesh: Mesh
    num_threads: int
    ahead: int = 2  # number of compiled calls whose batches are put on the device in advance
    max_steps: int = 16
    held: None = None

    def _read(self, indices: np.ndarray) -> dict[str, Any]:
        """Reads one batch; an index of -1 is padding."""
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
        """Yields batches on the device, `count` at a time as arrays [count, b, ...], in the given order [steps, b]."""
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
    """Pads an array [m, ...] with zeros at the end, to [size, ...]."""
    return np.concatenate([array, np.zeros((size - len(array), *array.shape[1:]), array.dtype)])


@dataclasses.dataclass(frozen=True)
class Joined:
    """Several feeds read together: a training step takes one batch from each.

    An epoch of the joined feeds is an epoch of the first feed. Each of the other feeds starts
    its next epoch when its current one ends.
    """

    feeds: Mapping[str, Feed]
    batch_sizes: Mapping[str, int]

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in an epoch of the first feed."""
        name, feed = next(iter(self.feeds.items()))
        return len(feed.source) // self.batch_sizes[name]

    @property
    def sizes(self) -> dict[str, tuple[Source, int]]:
        """Source and images per step of each feed."""
        return {name: (feed.source, self.batch_sizes[name]) for name, feed in self.feeds.items()}

    @property
    def batch_size(self) -> int:
        """Images per step, over all feeds."""
        return sum(self.batch_sizes.values())

    @property
    def num_classes(self) -> dict[str, int]:
        """Number of classes of each feed."""
        return {name: feed.source.num_classes for name, feed in self.feeds.items()}

    @property
    def held(self) -> dict[str, Any]:
        """Data of each feed on the device."""
        return {name: feed.held for name, feed in self.feeds.items()}

    @property
    def max_steps(self) -> int:
        """The maximum number of training steps in one compiled call: the smallest `max_steps` of the feeds."""
        return min(feed.max_steps for feed in self.feeds.values())

    def items(self, steps: range, count: int, seed: int) -> Iterator[dict[str, Any]]:
        """Yields the items of training steps as {feed: item}, as `Feed.items` does for one feed."""
        iterators = [
            # Each feed has its own seed: with the same seed, two feeds of the same size would have the same order.
            feed.items(steps, count, seed + (position << 24), self.batch_sizes[name])
            for position, (name, feed) in enumerate(self.feeds.items())
        ]
        for items in zip(*iterators, strict=True):
            yield dict(zip(self.feeds, items, strict=True))

    @property
    def fetch(self) -> Callable[[dict, dict], dict[str, Batch]]:
        """The function fetch(held, item) -> {feed: batch of one step}, to be called inside jit; captures no data."""
        fetch = {name: feed.fetch for name, feed in self.feeds.items()}
        return lambda held, item: {name: fetch[name](held[name], item[name]) for name in fetch}

    def on(self, mesh: Mesh) -> "Joined":
        """Returns the same feeds on another mesh over the same devices."""
        return dataclasses.replace(self, feeds={name: feed.on(mesh) for name, feed in self.feeds.items()})


def joined(feeds: Mapping[str, tuple[Feed, int]]) -> Joined:
    """Joins feeds that are read together; an epoch of the result is an epoch of the first feed.

    Args:
      feeds: name -> (feed, number of images that each step takes from the feed).

    Raises:
      InputError: if a feed has fewer images than are in one of its batches.

    >>> from jax_transfer import devices
    >>> from jax_transfer.data.sources import load_source
    >>> def feed(name):
    ...     source, mesh = load_source(name, "train"), devices.make_mesh()
    ...     return make_feed(source, Preprocessing(image_size=8), mesh, resident_gigabytes=1, num_threads=1)
    >>> both = joined({"target": (feed("embedded:digits?train=64"), 8), "source": (feed("embedded:digits"), 16)})
    >>> both.steps_per_epoch, both.batch_size
    (8, 24)
    """
    for name, (feed, batch_size) in feeds.items():
        steps_per_epoch(len(feed.source), batch_size, f"{feed.source.name} (feed {name})")
    sizes = {name: batch_size for name, (_, batch_size) in feeds.items()}
    return Joined({name: feed for name, (feed, _) in feeds.items()}, sizes)


class _Rows(Sequence):
    """The rows of a matrix as a sequence, which Grain maps over."""

    def __init__(self, matrix: np.ndarray):
        self.matrix = matrix

    def __len__(self):
        return len(self.matrix)

    def __getitem__(self, i):
        return self.matrix[i]


# Default values for `config.data` and for rankings.
RESIDENT_GIGABYTES = 4.0
NUM_THREADS = 16


def make_feed(
    source: Source,
    preprocessing: Preprocessing,
    mesh: Mesh,
    resident_gigabytes: float = RESIDENT_GIGABYTES,
    num_threads: int = NUM_THREADS,
    progress: Callable[[int], object] | None = None,
) -> Feed:
    """Makes a feed: resident if the decoded data set fits into `resident_gigabytes`, streamed otherwise.

    Args:
      source: the data set.
      preprocessing: determines the size (`host_size`) and the interpolation of the images.
      mesh: the devices that hold or receive the data.
      resident_gigabytes: device memory that a resident data set may use, in 1e9 bytes.
      num_threads: Grain's threads for a streamed data set.
      progress: called as progress(number_done) while a resident data set is being read.

    Raises:
      InputError: if an image cannot be read, or all images of a training set are equal.

    >>> from jax_transfer import devices
    >>> from jax_transfer.data.sources import load_source
    >>> source = load_source("embedded:digits?test=20", "test")
    >>> feed = make_feed(source, Preprocessing(image_size=8), devices.make_mesh(), resident_gigabytes=1, num_threads=1)
    >>> [int(batch.mask.sum()) for batch in feed.evaluation_batches(16)]  # the second batch has 12 rows of padding
    [16, 4]
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
    # Each process reads a part of the data and the devices exchange the parts. Padding in the last part is cut off.
    n, count = len(source), mesh.size
    own_indices = np.arange(-(-n // count) * count).reshape(jax.process_count(), -1)[jax.process_index()]
    part = subset(source, np.minimum(own_indices, n - 1))
    images, labels = read(part, progress=progress)
    held = Batch(images, labels, np.ones(len(labels), bool), dict(part.extra))
    gather = jax.jit(lambda held: jax.tree.map(lambda x: x[:n], held), out_shardings=devices.replicated(mesh))
    return Resident(source, gather(devices.split(held, mesh, "data")), mesh)


def require_different(source: Source, images: Iterable[np.ndarray]) -> None:
    """Checks that the `images` of a training set are not all equal; stops at the first image that differs.

    Raises:
      InputError: if all images are equal.
    """
    images = iter(images)
    first = next(images, np.zeros(0))
    if source.split == "train" and len(source) > 1 and all(np.array_equal(first, image) for image in images):
        raise InputError(
            f"{source.name}: all {len(source)} training images are equal after resizing, so nothing can be learned "
            "from them. Check the files."
        )


def _scalar(value: int):
    """Puts an int on the device by an explicit transfer, since the training loop runs under a transfer guard."""
    return jax.device_put(np.uint32(value))
