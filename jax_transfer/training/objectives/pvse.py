"""Polysemous visual-semantic embedding, PVSE (Song and Soleymani, CVPR 2019, arXiv:1906.04402), from a checkpoint."""

from collections.abc import Callable
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jax_transfer import devices
from jax_transfer.data.word_vectors import WordVectors
from jax_transfer.fields import Count, Few, NotNegative, Positive, Probability, between
from jax_transfer.models.net import Net, map_dim
from jax_transfer.models.pvse import Embedded, image_embedding, text_embedding
from jax_transfer.training.objectives.objective import Objective
from jax_transfer.training.objectives.parts import check_compared, check_unmixed
from jax_transfer.training.objectives.pvse_losses import multi_instance_similarities, pvse_loss

GAMMA = 0.5  # of the radial basis function in the maximum mean discrepancy, as in the training of the release


class Pvse(NamedTuple):
    """PVSE on a net: its objective, and the embeddings of images and captions in evaluation mode.

    Attributes:
      objective: what is trained, see `pvse`.
      images: `images(params, aux, images [b, h, w, 3]) -> Embedded`, images normalised as for the net.
      captions: `captions(params, tokens [b, n]) -> Embedded`.
    """

    objective: Objective
    images: Callable[..., Embedded]
    captions: Callable[..., Embedded]


def pvse(
    net: Net,
    augment: tuple[str, ...],
    *,
    vocabulary_size: Count,
    word_vectors: WordVectors | None = None,
    tune_backbone: bool = False,
    embedding_dim: Annotated[int, between(2, 100_000)] = 1024,
    num_embeddings: Few = 2,
    word_dim: Annotated[int, between(2, 100_000)] = 300,
    dropout: Probability = 0.0,
    margin: Positive = 0.1,
    mmd: NotNegative = 0.01,
    diversity: NotNegative = 0.1,
) -> Pvse:
    """Makes the objective "which caption belongs to which image of the batch", with several embeddings of each.

    `image_embedding` reads the features and the maps of the net, `text_embedding` the words of a caption, and
    `pvse_loss` compares them over the global batch. At each step one of the captions of an image is drawn.

    The feed is "train", with "tokens" int [b, k, l] (`data.words`) in `extra`. Its labels are not used.

    Args:
      net: a net without a head, which returns maps.
      augment: names of the augmentations.
      vocabulary_size: number of words, with the padding and the unknown word.
      word_vectors: vectors of the words of the vocabulary, which stay as they are, as in the authors' command; words
        that it lacks are learned. None: all are learned.
      tune_backbone: whether the net is trained too, and BatchNorm normalises with the statistics of the batch.
        Otherwise it is in evaluation mode and gets no gradient. (In the authors' code, a net that is not trained
        normalises with the statistics of the batch, and updates the running ones.)
      embedding_dim, num_embeddings: size and number of the embeddings of an image or a caption.
      word_dim: size of a word vector.
      dropout: of word vectors, of features of the whole, and of what attention adds to them.
      margin, mmd, diversity: see `pvse_loss`.

    Returns:
      The `Pvse`. Its objective starts from a model {"params", "stats"} of the net, or from a new one; its metrics are
      the terms of the loss, and "contrast", the share of images whose own caption is the most similar one. Its model is
      the net alone.

    Raises:
      InputError: if `augment` mixes images, the net returns no maps, or a size is not valid.

    Example:
      >>> from jax_transfer.models.resnet import resnet10
      >>> net = resnet10(num_classes=0, width=8)
      >>> objective, images, _ = pvse(net, ("flip",), vocabulary_size=50, embedding_dim=16, word_dim=8)
      >>> params, aux = objective.init(jax.random.key(0), None)
      >>> sorted(params), sorted(aux), images(params, aux, jnp.zeros((2, 32, 32, 3))).embeddings.shape
      (['images', 'text'], ['net', 'stats'], (2, 2, 16))
    """
    check_unmixed("pvse", augment)
    dtype = jnp.dtype(devices.compute_dtype()).name
    common = {"embedding_dim": embedding_dim, "num_embeddings": num_embeddings, "dropout": dropout, "dtype": dtype}
    of_images = image_embedding(feature_dim=net.feature_dim, map_dim=map_dim(net), **common)
    of_text = text_embedding(vocabulary_size=vocabulary_size, word_dim=word_dim, **common)

    def text_params(params):
        """Puts the given word vectors in the place of the learned ones."""
        if word_vectors is None:
            return params["text"]
        words = jnp.where(word_vectors.found[:, None], word_vectors.table, params["text"]["words"])
        return {**params["text"], "words": words}

    def images_of(params, aux, images) -> Embedded:
        net_params = params["net"] if tune_backbone else aux["net"]
        output = net.apply(net_params, aux["stats"], images)
        return of_images.apply(params["images"], {}, (output.features, output.maps))

    def captions_of(params, tokens: Int[Array, "b n"]) -> Embedded:
        return of_text.apply(text_params(params), {}, tokens)

    def init(key, model=None):
        own, stats = net.init(key) if model is None else (model["params"], model["stats"])
        images, _ = of_images.init(jax.random.fold_in(key, 1))
        text, _ = of_text.init(jax.random.fold_in(key, 2))
        trained, fixed = {"images": images, "text": text}, {"stats": stats}
        return ({**trained, "net": own}, fixed) if tune_backbone else (trained, {**fixed, "net": own})

    def loss(params, aux, views, key):
        (images,), tokens = views["train"].images, views["train"].extra["tokens"]
        key_net, key_images, key_text, key_caption = jax.random.split(key, 4)
        if tune_backbone:
            output, stats = net.apply_train(params["net"], aux["stats"], images, key_net)
            aux = {**aux, "stats": stats}
        else:
            output = net.apply(aux["net"], aux["stats"], images)
        drawn = jax.random.randint(key_caption, (len(tokens), 1, 1), 0, tokens.shape[1])
        caption = jnp.take_along_axis(tokens, drawn, axis=1)[:, 0]
        x, _ = of_images.apply_train(params["images"], {}, (output.features, output.maps), key_images)
        t, _ = of_text.apply_train(text_params(params), {}, caption, key_text)
        weights = {"margin": margin, "mmd_weight": mmd, "diversity_weight": diversity, "gamma": GAMMA}
        value, terms = pvse_loss(x.embeddings, t.embeddings, x.residuals, t.residuals, **weights)
        nearest = multi_instance_similarities(x.embeddings, t.embeddings).argmax(-1)
        return value, (aux, {**terms, "contrast": (nearest == jnp.arange(len(images))).mean()})

    objective = Objective(
        init,
        loss,
        model=lambda params, aux: {"params": params["net"] if tune_backbone else aux["net"], "stats": aux["stats"]},
        views={"train": (augment,)},
        has_head=False,
        extra=("tokens",),
        check=check_compared,
    )
    return Pvse(objective, images_of, captions_of)


def recurrent_gigaflops(batch_size: int, words: int, embedding_dim: int) -> float:
    """Returns the operations / 1e9 of a training step that the compiler's cost analysis misses.

    It counts the body of a loop once, and the recurrent unit is one over words. The products of a state with its
    kernel [e / 2, 3 e / 2] are counted here for the other words: in two directions, forward, and backward twice.

    >>> round(recurrent_gigaflops(256, 16, 1024), 1)
    36.2
    """
    unit = embedding_dim / 2
    return 3 * 2 * (words - 1) * 2 * batch_size * unit * 3 * unit / 1e9
