"""Batches on the device from a source: resident in device memory, or streamed through Grain.

A `Feed` serves training and evaluation. For training it yields the items of each compiled call (indices if the data is
resident, batches if it is streamed), and inside the call `fetch` turns the item of a step into the batch of the step.
For evaluation it yields padded and masked batches. Both kinds of feed give the same batches for the same seed:
`epoch_order` alone determines the order, `data.crops` the windows of views with a crop, and augmentation runs later, on
the device. Training reads from a `Joined`: one or several feeds.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_transfer import devices
from jax_transfer.choose import choose
from jax_transfer.data import crops as cropping
from jax_transfer.data.crops import Crop
from jax_transfer.data.source import Source, subset
from jax_transfer.data.sources import each_image, materialize
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
    fetch: the function fetch(held, item) -> the batch of one step, given the item of the step (leaves [...]); runs
      inside jit and captures no data.
    """

    @property
    def source(self) -> Source: ...
    @property
    def held(self) -> Any: ...
    @property
    def fetch(self) -> Callable[[Any, Any], Batch]: ...

    def max_steps(self, batch_size: int) -> int:
        """Returns the maximum number of training steps in one compiled call."""
        ...

    def items(self, steps: range, count: int, seed: int, batch_size: int) -> Iterator[Any]:
        """Yields the items of training steps, `count` steps at a time, as a pytree with leaves [count, ...].

        Args:
          steps: consecutive step numbers, counted from the start of training; they may span several epochs.
          count: steps in one compiled call; divides len(steps).
          seed: determines the order of each epoch.
          batch_size: images per step.
        """
        ...

    def on(self, mesh: Mesh) -> "Feed":
        """Returns the same feed on another mesh over the same devices."""
        ...

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        """Yields every image once, in order, in batches of `batch_size`; the last one is padded and masked."""
        ...


def abstract_batch(
    preprocessing: Preprocessing,
    batch_size: int,
    extra: Mapping[str, np.ndarray] | None = None,
    crops: Sequence[Crop | None] = (),
) -> Batch:
    """Returns the shapes and dtypes of the batches of a feed.

    Args:
      extra: `extra` of the feed's source; each array [n, ...] adds an array [batch_size, ...] to the batches.
      crops: as in `make_feed`.

    >>> abstract_batch(Preprocessing(image_size=32), batch_size=8).images
    ShapeDtypeStruct(shape=(8, 32, 32, 3), dtype=uint8)
    """
    size, side = preprocessing.host_size, preprocessing.image_size
    shape: Any = jax.ShapeDtypeStruct  # traced functions accept it in place of an array
    return Batch(
        images=shape((batch_size, size, size, 3), np.uint8) if _needs_squares(crops) else None,
        windows=tuple(shape((batch_size, side, side, 3), np.uint8) for _ in filter(None, crops)),
        labels=shape((batch_size,), np.int32),
        mask=shape((batch_size,), bool),
        extra={name: shape((batch_size, *array.shape[1:]), array.dtype) for name, array in (extra or {}).items()},
    )


def _needs_squares(crops: Sequence[Crop | None]) -> bool:
    """Returns whether a view shows the central square, or there are no views."""
    return None in crops or not crops


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

    def max_steps(self, batch_size):
        return devices.MAX_STEPS_PER_CALL

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
class ResidentCrops:
    """A data set whose full images are kept as uint8 in device memory; windows are cut from them inside the step.

    A side longer than `most` pixels is kept as `most` pixels. The item of a step is the indices of its examples and
    the boxes of their windows.

    Attributes:
      held: "batch", as in `Resident` but without images if all views have a crop; "whole", uint8 [n, h, w, 3], in which
        an image occupies the upper left corner.
      sides: int [n, 2], height and width of the original images.
      most: number of pixels to which longer sides are resized.
      squares: the feed without crops, for evaluation.
    """

    source: Source
    held: dict[str, Any]
    mesh: Mesh
    sides: np.ndarray
    most: int
    preprocessing: Preprocessing
    crops: tuple[Crop, ...]
    squares: Feed

    @property
    def is_reduced(self) -> bool:
        """Whether some images are kept with fewer pixels than they have."""
        return self.most < int(self.sides.max())

    def __str__(self) -> str:
        """Says which pixels are kept."""
        (_, height, width, _), (most_height, most_width) = self.held["whole"].shape, self.sides.max(0)
        return f"keeps {height} x {width} of up to {most_height} x {most_width} pixels"

    def max_steps(self, batch_size):
        return devices.MAX_STEPS_PER_CALL

    def items(self, steps, count, seed, batch_size):
        order = epochs_order(len(self.source), steps, seed, batch_size)
        scale = np.minimum(self.sides, self.most) / self.sides
        for first in range(0, len(steps), count):
            indices = order[first : first + count]
            boxes = [
                [
                    cropping.boxes(crop, cropping.draws(seed, step, batch_size, window), *self.sides[chosen].T)
                    * np.tile(scale[chosen], 2)
                    for window, crop in enumerate(self.crops)
                ]
                for step, chosen in enumerate(indices, steps.start + first)
            ]
            yield devices.replicate({"indices": indices, "boxes": np.asarray(boxes, np.float32)}, self.mesh)

    @property
    def fetch(self):
        return functools.partial(
            _fetch_windows, size=self.preprocessing.image_size, interpolation=self.preprocessing.interpolation
        )

    def on(self, mesh):
        held = devices.replicate(self.held, mesh)
        return dataclasses.replace(self, held=held, mesh=mesh, squares=self.squares.on(mesh))

    def evaluation_batches(self, batch_size):
        return self.squares.evaluation_batches(batch_size)


def _fetch_windows(held, item, size: int, interpolation: str) -> Batch:
    """Cuts the windows of a step from the full images that a `ResidentCrops` holds."""
    batch = jax.tree.map(lambda x: x[item["indices"]], held["batch"])
    images = held["whole"][item["indices"]]
    windows = tuple(cropping.windows(images, boxes, size, interpolation) for boxes in item["boxes"])
    return dataclasses.replace(batch, windows=windows)


# A compiled call of a streamed data set holds at most this many bytes of images, but at least one step.
CALL_BYTES = 2**26
MOST_STREAMED_STEPS = 16
READ_AT_A_TIME = 16  # images that a thread holds decoded; reading one at a time is slow for TFDS


@dataclasses.dataclass(frozen=True)
class Streamed:
    """A data set read, decoded, and resized or cropped in Grain's threads while the device computes.

    The item of a step is its batch.

    Attributes:
      crops: for each view its crop, or None for the central square.
      ahead: number of compiled calls whose batches are put on the device in advance.
    """

    source: Source
    preprocessing: Preprocessing
    mesh: Mesh
    num_threads: int
    crops: tuple[Crop | None, ...] = ()
    ahead: int = 2
    held: None = None

    def max_steps(self, batch_size):
        shapes = abstract_batch(self.preprocessing, batch_size, crops=self.crops)
        step = sum(x.size for x in jax.tree.leaves((shapes.images, shapes.windows)))
        return max(1, min(MOST_STREAMED_STEPS, CALL_BYTES // step))

    def _read(self, row: "_Row") -> dict[str, Any]:
        """Reads one batch; an index of -1 is padding."""
        indices, crops = row.indices, list(filter(None, self.crops))
        real = indices[indices >= 0]
        shapes = abstract_batch(self.preprocessing, len(indices), crops=self.crops)
        images, windows = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), (shapes.images, shapes.windows))
        for start in range(0, len(real), READ_AT_A_TIME):
            read = self.source.read(real[start : start + READ_AT_A_TIME].tolist())
            part = slice(start, start + len(read))
            if images is not None:
                images[part] = [self.preprocessing.square(image) for image in read]
            sides = np.array([image.shape[:2] for image in read]).T
            for crop, uniforms, cut in zip(crops, row.draws, windows, strict=True):
                boxes = cropping.boxes(crop, uniforms[part], *sides)
                size, interpolation = cut.shape[1], self.preprocessing.interpolation
                for i, (image, box) in enumerate(zip(read, boxes, strict=True), start):
                    cut[i] = cropping.window(image, box, size, interpolation)
        labels = np.zeros(len(indices), np.int32)
        labels[: len(real)] = self.source.labels[real]
        extra = {name: _padded(array[real], len(indices)) for name, array in self.source.extra.items()}
        arrays = {"labels": labels, "mask": indices >= 0, "extra": extra, "windows": windows}
        return arrays if images is None else {**arrays, "images": images}

    def _load(self, rows: "_Rows", count: int) -> Iterator[Batch]:
        """Yields the batches of rows on the device, `count` at a time as arrays [count, b, ...]."""
        batches = (
            grain.MapDataset.source(rows)
            .map(self._read)
            .batch(count)
            .to_iter_dataset(grain.ReadOptions(num_threads=self.num_threads, prefetch_buffer_size=2 * self.num_threads))
        )
        waiting: collections.deque[Batch] = collections.deque()
        for arrays in batches:
            waiting.append(devices.split(Batch(**{"images": None, **arrays}), self.mesh, "data", dimension=1))
            if len(waiting) > self.ahead:
                yield waiting.popleft()
        yield from waiting

    def items(self, steps, count, seed, batch_size):
        order = epochs_order(len(self.source), steps, seed, batch_size)
        num_windows = len(list(filter(None, self.crops)))
        yield from self._load(_Rows(order, self.mesh, num_windows, seed, steps.start), count)

    @staticmethod
    def fetch(held, item):
        return item

    def on(self, mesh):
        return dataclasses.replace(self, mesh=mesh)

    def evaluation_batches(self, batch_size):
        indices = np.arange(len(self.source))
        padded = np.concatenate([indices, np.full(-len(indices) % batch_size, -1)])
        squares = dataclasses.replace(self, crops=())
        for batch in squares._load(_Rows(padded.reshape(-1, batch_size), self.mesh), 1):
            yield jax.tree.map(lambda x: x[0], batch)


class _Row(NamedTuple):
    """What this process reads for one step: the indices of images [b], and the draws [b, 22] of each window."""

    indices: np.ndarray
    draws: tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class _Rows(Sequence):
    """The part of the batches that this process reads, as a sequence over which Grain maps.

    Attributes:
      order: int [steps, b], the indices of the images in the global batches.
      num_windows: number of windows of each image.
      seed: seed of the windows.
      first_step: number of the first step.
    """

    order: np.ndarray
    mesh: Mesh
    num_windows: int = 0
    seed: int = 0
    first_step: int = 0

    def __len__(self):
        return len(self.order)

    def __getitem__(self, i):
        batch_size = self.order.shape[1]
        draws = (cropping.draws(self.seed, self.first_step + i, batch_size, w) for w in range(self.num_windows))
        return _Row(self._own(self.order[i]), tuple(map(self._own, draws)))

    def _own(self, array: np.ndarray) -> np.ndarray:
        if not devices.spans_processes(self.mesh):
            return array
        return np.split(array, jax.process_count())[jax.process_index()]


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
        return min(feed.max_steps(self.batch_sizes[name]) for name, feed in self.feeds.items())

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
    crops: Sequence[Crop | None] = (),
) -> Feed:
    """Makes a feed: resident if the decoded data set fits into `resident_gigabytes`, streamed otherwise.

    With crops, a resident data set keeps full images, with sides as long as fit and at least `host_size`.

    Args:
      source: the data set.
      preprocessing: determines the size (`host_size`) and the interpolation of the images.
      mesh: the devices that hold or receive the data.
      resident_gigabytes: device memory that a resident data set may use, in 1e9 bytes.
      num_threads: Grain's threads for a streamed data set.
      progress: called as progress(number_done) while a resident data set is being read.
      crops: for each view its crop, or None for a view of the central square (`crops.crops_of`). Batches have a window
        for each crop, and squares only if a view needs them. Empty: batches have squares.

    Raises:
      InputError: if an image cannot be read, all images of a training set are equal, or the interpolation is not one of
        those for crops.

    >>> from jax_transfer import devices
    >>> from jax_transfer.data.sources import load_source
    >>> source = load_source("embedded:digits?test=20", "test")
    >>> feed = make_feed(source, Preprocessing(image_size=8), devices.make_mesh(), resident_gigabytes=1, num_threads=1)
    >>> [int(batch.mask.sum()) for batch in feed.evaluation_batches(16)]  # the second batch has 12 rows of padding
    [16, 4]
    """
    crops = tuple(crops) if any(crops) else ()
    if crops:
        choose(cropping.FILTERS, preprocessing.interpolation, "interpolation of crops (preprocessing.interpolation)")
    squares = 3 * len(source) * preprocessing.host_size**2
    room = resident_gigabytes * 1e9 - sum(array.nbytes for array in source.extra.values())
    if crops and _needs_squares(crops):
        room -= squares
    if squares > room or devices.spans_processes(mesh):
        require_different(source, (preprocessing.square(source.read([i])[0]) for i in range(len(source))))
    if squares > room:
        return Streamed(source, preprocessing, mesh, num_threads, crops)
    if not crops:
        return _resident(source, preprocessing, mesh, progress)
    # The smallest usual window, with 8 % of the area, of a side of 4 image_size still has more pixels than the result.
    # More would only slow down each step, which resizes from the whole side.
    enough = max(preprocessing.host_size, 4 * preprocessing.image_size, 512)
    most = min(int((room / len(source) / 3) ** 0.5), enough)
    return _resident_crops(source, preprocessing, mesh, crops, most, num_threads, progress)


def _resident(source: Source, preprocessing: Preprocessing, mesh: Mesh, progress) -> Resident:
    """Reads the central squares of a data set into device memory."""
    part = _own_part(source, mesh)
    size, image_size = preprocessing.host_size, preprocessing.image_size
    images, labels = materialize(part, size, preprocessing.interpolation, image_size, progress)
    if part is source:
        require_different(source, images)
    return Resident(
        source, _whole(Batch(images, labels, np.ones(len(labels), bool), dict(part.extra)), source, mesh), mesh
    )


def _resident_crops(
    source: Source, preprocessing: Preprocessing, mesh: Mesh, crops, most: int, num_threads: int, progress
) -> ResidentCrops:
    """Reads the full images of a data set into device memory, with sides of at most `most` pixels."""
    part = _own_part(source, mesh)
    sides, images = np.zeros((len(part), 2), np.int32), [np.zeros((0, 0, 3), np.uint8)] * len(part)

    def keep(i: int, image: np.ndarray) -> None:
        sides[i], images[i] = image.shape[:2], cropping.shrink(image, most, preprocessing.interpolation)

    each_image(part, keep, progress)
    if part is source:
        require_different(source, images)
    largest = np.minimum(sides, most).max(0).tolist()
    height, width = np.max(devices.gather(largest), 0) if devices.spans_processes(mesh) else largest
    pixels = np.zeros((len(part), height, width, 3), np.uint8)
    for i, image in enumerate(images):
        pixels[i, : image.shape[0], : image.shape[1]] = image
        images[i] = image[:0]  # the full images would otherwise be in memory twice
    plain = Batch(None, part.labels, np.ones(len(part), bool), dict(part.extra))
    plain, whole, sides = _whole((plain, pixels, sides), source, mesh)
    sides = np.asarray(jax.device_get(sides))
    if (sides == preprocessing.host_size).all():  # the full images are the squares
        squares = Resident(source, dataclasses.replace(plain, images=whole), mesh)
    elif _needs_squares(crops):
        squares = _resident(source, preprocessing, mesh, progress=None)
    else:
        squares = Streamed(source, preprocessing, mesh, num_threads)
    held = {"batch": squares.held if _needs_squares(crops) else plain, "whole": whole}
    return ResidentCrops(source, held, mesh, sides, most, preprocessing, tuple(filter(None, crops)), squares)


def _own_part(source: Source, mesh: Mesh) -> Source:
    """Returns the images that this process reads, padded to equal numbers if the mesh spans several processes."""
    if not devices.spans_processes(mesh):
        return source
    n, count = len(source), mesh.size
    own_indices = np.arange(-(-n // count) * count).reshape(jax.process_count(), -1)[jax.process_index()]
    return subset(source, np.minimum(own_indices, n - 1))


def _whole(tree, source: Source, mesh: Mesh):
    """Puts arrays of this process's part on every device, as arrays of the whole data set without the padding."""
    if not devices.spans_processes(mesh):
        return devices.replicate(tree, mesh)
    n = len(source)
    gather = jax.jit(lambda tree: jax.tree.map(lambda x: x[:n], tree), out_shardings=devices.replicated(mesh))
    return gather(devices.split(tree, mesh, "data"))


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
