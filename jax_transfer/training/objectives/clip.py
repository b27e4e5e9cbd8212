"""Contrastive language-image pre-training, CLIP (Radford et al., 2021, arXiv:2103.00020)."""

import math
from typing import Annotated

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jax_transfer import devices
from jax_transfer.fields import Count, Few, Positive, between
from jax_transfer.models.net import Net, gaussian
from jax_transfer.models.text import text_tower
from jax_transfer.training.objectives.objective import Objective
from jax_transfer.training.objectives.parts import check_compared, check_unmixed, similarities, unit

MOST_SCALE = 100.0  # section 2.5: logits are scaled by at most 100


def clip(
    net: Net,
    augment: tuple[str, ...],
    *,
    vocabulary_size: Annotated[int, between(300, 100_000)] = 49_408,
    context_length: Annotated[int, between(3, 1000)] = 77,
    embedding_dim: Count = 512,
    text_width: Count = 512,
    text_layers: Few = 12,
    text_heads: Few = 8,
    initial_temperature: Positive = 0.07,
) -> Objective:
    """Makes the objective "which caption belongs to which image of the batch, and which image to which caption".

    Figure 3 of the paper: with unit vectors x_i of the images, t_i of their captions and s = exp(log_scale), the loss
    is the mean of the cross-entropies of softmax_j(s x_i t_j) and softmax_j(s t_i x_j), both with the target j = i,
    over the global batch. x is a linear projection without bias of the features of the net, t the output of
    `text_tower`; s is learned and at most 100. At each step one of the captions of an image is drawn.

    The feed is "train", with "tokens" int [b, k, l] (`data.vocabulary`) in `extra`, l at most `context_length`. Its
    labels are not used. Equal captions of two images of a batch count as wrong matches of each other, as in the paper;
    captions that are the bare names of a few classes are mostly equal, so that the loss stays above log(b / classes).

    Args:
      net: a net without a head.
      augment: names of the augmentations.
      vocabulary_size: rows of the embedding of tokens, and the most tokens of the vocabulary.
      context_length: the most tokens of a caption, with its start and end; longer ones are cut.
      embedding_dim: dimension of x and t. The paper has 1024 for ResNet-50.
      text_width, text_layers, text_heads: size of the text tower.
      initial_temperature: 1 / s at the start.

    Returns:
      The objective. Its metric "contrast" is the share of images whose own caption has the largest logit. Its model is
      the net alone; `zero_shot_head` makes a head for it from captions of classes.

    Raises:
      InputError: if `augment` mixes images.

    Example:
      >>> from jax_transfer.models.resnet import resnet10
      >>> net = resnet10(num_classes=0, width=8)
      >>> objective = clip(net, ("flip",), vocabulary_size=300, context_length=16, text_width=64, text_layers=2)
      >>> params, aux = jax.eval_shape(objective.init, jax.random.key(0), None)
      >>> params["projection"]["kernel"].shape, sorted(params)
      ((64, 512), ['log_scale', 'net', 'projection', 'text'])
    """
    check_unmixed("clip", augment)
    tower = text_tower(
        vocabulary_size=vocabulary_size,
        context_length=context_length,
        embedding_dim=embedding_dim,
        width=text_width,
        layers=text_layers,
        heads=text_heads,
        dtype=jnp.dtype(devices.compute_dtype()).name,
    )

    def init(key, model=None):
        params, stats = net.init(key) if model is None else (model["params"], model["stats"])
        text, _ = tower.init(jax.random.fold_in(key, 1))
        kernel = gaussian(jax.random.fold_in(key, 2), (net.feature_dim, embedding_dim), net.feature_dim**-0.5)
        log_scale = jnp.array(-math.log(initial_temperature), jnp.float32)
        return {"net": params, "text": text, "projection": {"kernel": kernel}, "log_scale": log_scale}, {"stats": stats}

    def loss(params, aux, views, key):
        (images,), tokens = views["train"].images, views["train"].extra["tokens"]
        key_net, key_caption = jax.random.split(key)
        output, stats = net.apply_train(params["net"], aux["stats"], images, key_net)
        drawn = jax.random.randint(key_caption, (len(tokens), 1, 1), 0, tokens.shape[1])
        caption = jnp.take_along_axis(tokens, drawn, axis=1)[:, 0]
        x = unit(output.features.astype(jnp.float32) @ params["projection"]["kernel"])
        t = unit(tower.apply(params["text"], {}, caption))
        logits = scale(params["log_scale"]) * similarities(x, t)
        entropy, own = optax.softmax_cross_entropy_with_integer_labels, jnp.arange(len(images))
        value = (entropy(logits, own).mean() + entropy(logits.T, own).mean()) / 2
        return value, ({"stats": stats}, {"contrast": (logits.argmax(-1) == own).mean()})

    def zero_shot_head(params, tokens: Int[Array, "c k l"]):
        # One class after another, since all captions of a thousand classes do not fit into memory.
        means = jax.lax.map(lambda of_class: unit(tower.apply(params["text"], {}, of_class)).mean(0), tokens)
        kernel = scale(params["log_scale"]) * params["projection"]["kernel"] @ unit(means).T
        return {"kernel": kernel, "bias": jnp.zeros(len(tokens))}

    return Objective(
        init,
        loss,
        model=lambda params, aux: {"params": params["net"], "stats": aux["stats"]},
        views={"train": (augment,)},
        has_head=False,
        extra=("tokens",),
        check=check_compared,
        zero_shot_head=zero_shot_head,
    )


@jax.custom_vjp
def scale(log_scale: Float[Array, ""]) -> Float[Array, ""]:
    """Computes min(exp(log_scale), MOST_SCALE); at the limit, only a gradient that lowers the scale passes.

    With the gradient of the minimum, 0, a scale that once reaches the limit would never leave it.

    >>> float(scale(jnp.array(0.0))), round(float(scale(jnp.array(9.0))))
    (1.0, 100)
    """
    return jnp.minimum(jnp.exp(log_scale), MOST_SCALE)


def _scale_forward(log_scale):
    return scale(log_scale), log_scale


def _scale_backward(log_scale, gradient):
    limited = (log_scale >= math.log(MOST_SCALE)) & (gradient < 0)  # a step against the gradient would raise the scale
    return (jnp.where(limited, 0.0, gradient * scale(log_scale)),)


scale.defvjp(_scale_forward, _scale_backward)
