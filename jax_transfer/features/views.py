"""Features of augmented views of images, in the order of a source."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jax_transfer import devices
from jax_transfer.data import augment
from jax_transfer.data.batches import Feed
from jax_transfer.data.crops import Crop, crops_of
from jax_transfer.data.source import Source, subset
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models.net import Net

Embed = Callable[[dict, Callable[[], bool]], list[Float[np.ndarray, "n d"]] | None]


def make_embed(
    net: Net,
    source: Source,
    views: Sequence[tuple[str, ...]],
    feed_of: Callable[[Source, tuple[Crop | None, ...]], Feed],
    preprocessing: Preprocessing,
    mesh: Mesh,
    seed: int,
    batch_size: int,
) -> Embed:
    """Reads the images of a source and compiles the forward pass on augmented views of them.

    Args:
      net: the net whose features are computed, in evaluation mode.
      source: the n images.
      views: names of the augmentations of each view; () for the image as it is. None may mix images.
      feed_of: (source, crop of each view) -> the feed of its images.
      mesh: the devices that compute.
      seed: seed of the views, which are the same for every model.
      batch_size: number of images in a forward pass, over all devices.

    Returns:
      embed(model, stop) -> the features of each view. The model is {"params", "stats"}. `stop` is called after each
      batch; if it returns True, the result is None. If `mesh` has the devices of several processes, all of them must
      call this function and `embed`, and all get the same result.
    """
    n, names = len(source), tuple(views)
    # Feeds leave out an incomplete batch and shuffle, so the images are repeated until they fill it, and are numbered.
    repeated = subset(source, np.resize(np.arange(n), -(-n // batch_size) * batch_size))
    numbered = dataclasses.replace(repeated, extra={"number": np.arange(len(repeated), dtype=np.int32)})
    feed = feed_of(numbered, crops_of(names))
    replicated, apply = devices.replicated(mesh), devices.on_mesh(net.apply, mesh)

    @jax.jit
    def see(held, item, step):
        batch = devices.constrain(feed.fetch(held, jax.tree.map(lambda x: x[0], item)), mesh, "data")
        key = jax.random.fold_in(jax.random.key(seed), step)
        seen = augment.views(key, {"": batch}, {"": names}, preprocessing, {"": source.num_classes})[""]
        return seen.images, jax.lax.with_sharding_constraint(batch.extra["number"], replicated)

    @jax.jit
    def features(model, images):
        x = apply(model["params"], model["stats"], images).features.astype(jnp.float32)
        return jax.lax.with_sharding_constraint(x, replicated)

    def embed(model: dict, stop: Callable[[], bool]):
        parts = []
        steps = range(len(numbered) // batch_size)
        for step, item in zip(steps, feed.items(steps, 1, seed, batch_size), strict=True):
            images, numbers = see(feed.held, item, step)
            parts.append(jax.device_get([numbers, *(features(model, view) for view in images)]))
            if stop():
                return None
        numbers, *embedded = (np.concatenate(part) for part in zip(*parts, strict=True))
        return [x[np.argsort(numbers)][:n] for x in embedded]

    return embed
