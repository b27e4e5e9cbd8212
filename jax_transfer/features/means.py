"""Mean features of classes, summed on the device while images stream through, and all features held on the device."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jax_transfer.data.batches import Feed
from jax_transfer.devices import replicated
from jax_transfer.models.net import Output


def features(output: Output) -> Float[Array, "b d"]:
    """Returns the features of a batch.

    >>> features(Output(jnp.zeros((2, 0)), jnp.ones((2, 3)))).shape
    (2, 3)
    """
    return output.features


def projection(output: Output) -> Float[Array, "b d"]:
    """Returns the projection of a batch, by which contrastive pre-training compares images.

    >>> projection(Output(jnp.zeros((2, 0)), jnp.ones((2, 3)), projection=jnp.ones((2, 1)))).shape
    (2, 1)
    """
    assert output.projection is not None
    return output.projection


REPRESENTATIONS = {"features": features, "projection": projection}


def _zeros(mesh: Mesh, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    """Returns zeros that are made on the devices, with a copy on each."""
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=replicated(mesh))()


def class_means(
    forward: Callable,
    model: dict,
    feed: Feed,
    mesh: Mesh,
    batch_size: int,
    represent: Callable[[Output], Float[Array, "b d"]] = features,
) -> tuple[Float[np.ndarray, "c d"], Int[np.ndarray, " c"]]:
    """Computes the mean feature of each class of a feed. Only sums and counts are kept, on the device.

    Args:
      forward: the forward pass that `extract.make_forward` returns.
      model: the weights, on the devices that run the forward pass.
      feed: the images.
      mesh: the devices of the forward pass, which may be those of all processes.
      batch_size: number of images in a forward pass, over all devices.
      represent: a value of REPRESENTATIONS.

    Returns:
      (means, number of images) of each class. The mean of a class without images is NaN.

    >>> from jax_transfer import devices
    >>> from jax_transfer.data.batches import make_feed
    >>> from jax_transfer.data.sources import from_arrays
    >>> from jax_transfer.data.transforms import Preprocessing
    >>> images = np.repeat(np.array([10, 20, 60], np.uint8), 8 * 8).reshape(3, 8, 8)
    >>> feed = make_feed(from_arrays(images, [0, 1, 1]), Preprocessing(image_size=8), devices.make_mesh())
    >>> forward = lambda model, batch: Output(None, batch.images.astype(jnp.float32).mean((1, 2)))
    >>> class_means(forward, {}, feed, devices.make_mesh(), batch_size=2)[0][:, 0].tolist()
    [10.0, 40.0]
    """
    num_classes, totals = feed.source.num_classes, None

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=replicated(mesh))
    def add(totals, x, labels, mask):
        sums, counts = totals
        labels = jnp.where(mask, labels, num_classes)  # out of range: dropped
        return sums.at[labels].add(x, mode="drop"), counts.at[labels].add(1, mode="drop")

    for batch in feed.evaluation_batches(batch_size):
        x = represent(forward(model, batch))
        if totals is None:
            totals = _zeros(mesh, (num_classes, x.shape[1])), _zeros(mesh, (num_classes,), jnp.int32)
        totals = add(totals, x, batch.labels, batch.mask)
    assert totals is not None  # a source has at least one image
    sums, counts = jax.device_get(totals)
    with np.errstate(invalid="ignore"):
        return (sums / counts[:, None]).astype(np.float32), counts


def on_device(
    forward: Callable,
    model: dict,
    feed: Feed,
    mesh: Mesh,
    batch_size: int,
    represent: Callable[[Output], Float[Array, "b d"]] = features,
) -> Float[Array, "n d"]:
    """Extracts the features of every image of a feed and leaves them on one device of this process.

    The arguments are those of `class_means`.

    >>> from jax_transfer import devices
    >>> from jax_transfer.data.batches import make_feed
    >>> from jax_transfer.data.sources import from_arrays
    >>> from jax_transfer.data.transforms import Preprocessing
    >>> images = np.repeat(np.array([10, 20, 60], np.uint8), 8 * 8).reshape(3, 8, 8)
    >>> feed = make_feed(from_arrays(images, [0, 1, 1]), Preprocessing(image_size=8), devices.make_mesh())
    >>> forward = lambda model, batch: Output(None, batch.images.astype(jnp.float32).mean((1, 2)))
    >>> on_device(forward, {}, feed, devices.make_mesh(), batch_size=2)[:, 0].tolist()
    [10.0, 20.0, 60.0]
    """
    n, held = len(feed.source), None

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=replicated(mesh))
    def put(held, x, start):
        return jax.lax.dynamic_update_slice(held, x, (start, 0))

    for start, batch in zip(range(0, n, batch_size), feed.evaluation_batches(batch_size), strict=True):
        x = represent(forward(model, batch))
        if held is None:
            held = _zeros(mesh, (-(-n // batch_size) * batch_size, x.shape[1]))
        held = put(held, x, np.int32(start))
    assert held is not None  # a source has at least one image
    return held.addressable_data(0)[:n]
