"""MoCo v2: a view of an image is told from a queue of other images by what a slow copy of the net makes of it."""

import jax
import jax.numpy as jnp
import optax

from jax_transfer import devices
from jax_transfer.fields import Count, Positive, Probability
from jax_transfer.models.net import Net, gaussian, with_projection, without_projection
from jax_transfer.numerics import unit
from jax_transfer.records import InputError
from jax_transfer.training.objectives.objective import Division, Objective
from jax_transfer.training.objectives.parts import check_compared, check_unmixed, moved_towards, similarities


def moco_v2(
    net: Net,
    augment: tuple[str, ...],
    *,
    queue_size: Count = 65_536,
    momentum: Probability = 0.999,
    temperature: Positive = 0.2,
    hidden_dim: Count = 2048,
    projection_dim: Count = 128,
) -> Objective:
    """Makes the objective of MoCo v2: which key, of the image's own one and those in the queue, belongs to a query.

    With unit vectors q of the first view, k of the second and n_j of the queue:

        loss = mean( -log( exp(q k / temperature) / (exp(q k / temperature) + sum_j exp(q n_j / temperature)) ) )

    Equation 1 of He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020, with the
    projection and the temperature of Chen et al., "Improved Baselines with Momentum Contrastive Learning", 2020. k
    comes from a copy of the net and of its projection that moves by 1 - momentum towards them before each step
    (equation 2), and has BatchNorm statistics of its own. The keys of a step then replace the oldest ones in the queue.

    Queries and keys of an image must not be normalised with the same images, or the net learns to recognise the
    statistics of its BatchNorm group instead of the image (section 3.3): keys are computed from the batch in a random
    order, the same on any number of devices. This needs groups that are smaller than the batch
    (`config.model.batch_norm_group`), since the keys in the queue come from other batches.

    The feed is "train"; its labels are not used.

    Args:
      net: a net without a head.
      augment: names of the augmentations of both views.
      queue_size: number of keys in the queue, a multiple of the batch size.
      momentum: as above.
      temperature: as above.
      hidden_dim, projection_dim: columns of the two layers of the projection, with a ReLU between them.

    Returns:
      The objective. Its metric "contrast" is the share of queries whose own key has the largest logit. Its model is the
      net of the queries, without the projection.

    Raises:
      InputError: if `augment` mixes images; from the loss, if the batch does not divide the queue.

    Example:
      >>> from jax_transfer.models.resnet import resnet10
      >>> objective = moco_v2(resnet10(num_classes=0, width=8), ("flip",), queue_size=64, projection_dim=16)
      >>> params, aux = jax.eval_shape(objective.init, jax.random.key(0), None)
      >>> sorted(aux), aux["queue"].shape
      (['key_params', 'key_stats', 'next', 'queue', 'stats'], (64, 16))
    """
    check_unmixed("moco_v2", augment)
    net = with_projection(net, (hidden_dim, projection_dim))

    def init(key, model=None):
        params, stats = net.init(key)
        params, stats = (params, stats) if model is None else ({**params, **model["params"]}, model["stats"])
        queue = unit(gaussian(jax.random.fold_in(key, 1), (queue_size, projection_dim), 1.0))
        aux = {"stats": stats, "key_params": params, "key_stats": stats, "queue": queue, "next": jnp.zeros((), int)}
        return params, aux

    def loss(params, aux, views, key):
        first, second = views["train"].images
        check_queue(len(first))
        key_query, key_key, key_order = jax.random.split(key, 3)
        key_params = moved_towards(aux["key_params"], params, momentum)
        output, stats = net.apply_train(params, aux["stats"], first, key_query)
        queries = unit(output.projection)
        order = jax.random.permutation(key_order, len(second))
        output, key_stats = net.apply_train(key_params, aux["key_stats"], devices.keep_split(second[order]), key_key)
        keys = jax.lax.stop_gradient(unit(output.projection)[jnp.argsort(order)])
        own, others = (queries * keys).sum(-1, keepdims=True), similarities(queries, aux["queue"])
        logits = jnp.concatenate([own, others], -1) / temperature
        value = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.zeros(len(first), int)).mean()
        queue = jax.lax.dynamic_update_slice_in_dim(aux["queue"], keys, aux["next"], axis=0)
        new_aux = {
            "stats": stats,
            "key_params": key_params,
            "key_stats": key_stats,
            "queue": queue,
            "next": (aux["next"] + len(keys)) % queue_size,
        }
        return value, (new_aux, {"contrast": (logits.argmax(-1) == 0).mean()})

    def check_queue(batch_size: int) -> None:
        if queue_size % batch_size:
            raise InputError(
                f"moco_v2.queue_size = {queue_size} is not a multiple of batch_size = {batch_size}: use "
                f"{max(1, round(queue_size / batch_size)) * batch_size}, or another batch_size."
            )

    def check(division: Division) -> None:
        check_compared(division)
        check_queue(division.batch_size)
        if division.batch_norm_group == division.batch_size:
            raise InputError(
                f"BatchNorm normalises all {division.batch_size} images of a batch together, which tells new keys from "
                "those in the queue: set config.model.batch_norm_group to a part of batch_size, such as "
                f"{max(1, division.batch_size // 8)}."
            )

    return Objective(
        init,
        loss,
        model=lambda params, aux: {"params": without_projection(params), "stats": aux["stats"]},
        views={"train": (augment, augment)},
        has_head=False,
        check=check,
    )
