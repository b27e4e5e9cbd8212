"""Image-text retrieval from a checkpoint: PVSE is trained on captioned images, and its embeddings are ranked.

The compiled functions of one kind of net serve all checkpoints with it. What is kept between two runs, and which epoch
is the best, is up to the caller.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from jax_transfer import devices
from jax_transfer.checkpoints.checkpoint import Model
from jax_transfer.data import augment
from jax_transfer.data.batches import Feed, Joined
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.data.word_vectors import WordVectors
from jax_transfer.fields import (
    Count,
    Few,
    Listed,
    NotNegative,
    OneOf,
    Positive,
    Probability,
    Rule,
    between,
    check_itself,
)
from jax_transfer.models import Net
from jax_transfer.models.net import without_head, without_projection
from jax_transfer.records import InputError
from jax_transfer.training.objectives.pvse import Pvse, pvse, recurrent_gigaflops
from jax_transfer.training.optimizers import OptimizerSettings, make_optimizer
from jax_transfer.training.state import init_state
from jax_transfer.training.steps import make_train_step, many_steps, train_step_gigaflops
from jax_transfer.transfer.finetune import Augmentations
from jax_transfer.transfer.retrieval import Retrieval, retrieval

Share = Annotated[float, Rule(lambda x: 0 < x <= 1, "lie in (0, 1]")]


@dataclasses.dataclass(frozen=True)
class PaperRecalls:
    """The recalls that a paper prints for an epoch, in percent, and their sum as printed.

    Attributes:
      epoch: the epoch of the checkpoint.
      fraction: share of the training images.
      where: where the paper prints them, such as "Table 2".
      i2t, t2i: recalls at 1, 5 and 10 of captions for images, and of images for captions.
      rsum: the sum as printed, which need not be the sum of the recalls.
      split: the images that are ranked, "test" or "validation".
      note: what to say about these numbers, such as a misprint.
    """

    epoch: int
    fraction: float
    where: str
    i2t: tuple[float, ...]
    t2i: tuple[float, ...]
    rsum: float
    split: Annotated[str, OneOf({"test": None, "validation": None}, "split")] = "test"
    note: str = ""


@dataclasses.dataclass(frozen=True)
class RetrievalSettings:
    """The fields of `config.retrieval`. The defaults are those of PVSE's release on COCO, except where it says so."""

    # Data sets with captions: "tfds:coco_captions", "captions:DIR" or, with made captions,
    # "tfds:cifar10?captions=attributes". A fifth of the training images serves for validation where a data set has no
    # validation split. (The release chooses the best epoch on the test images.)
    datasets: Annotated[tuple[str, ...], Listed(unique=True)] = ()
    # Shares of the training images on which PVSE is trained, each from every checkpoint. The smallest one shows which
    # checkpoint would be chosen without the others.
    fractions: Annotated[tuple[Share, ...], Listed(filled=True, unique=True)] = (0.25, 1.0)
    # Numbers of folds into which the images are divided for the ranking: (1, 5) are COCO's 5K and 1K protocols. The
    # first one judges the epochs.
    folds: Annotated[tuple[Few, ...], Listed(filled=True, unique=True)] = (1,)
    # An epoch shows every image once, with one of its captions. (In the release, it shows every caption once.)
    epochs: Count = 30
    # Global: over all devices.
    batch_size: Count = 256
    # As in config.pretrain.augment.
    augment: Augmentations = ("resized_crop", "flip")
    # Whether the checkpoint's net is trained too.
    tune_backbone: bool = False
    embedding_dim: Annotated[int, between(2, 100_000)] = 1024
    # Embeddings of an image or a caption, and heads of attention.
    num_embeddings: Few = 2
    # Size of a word vector.
    word_dim: Annotated[int, between(2, 100_000)] = 300
    # A text file of GloVe, whose vectors stay as they are; words that it lacks are learned. Unset: all are learned.
    word_vectors: str | None = None
    # How often a word occurs in the training captions to be in the vocabulary.
    min_count: Count = 1
    # Most words of a caption; longer ones are cut. Ours.
    caption_length: Count = 64
    dropout: Probability = 0.0
    margin: Positive = 0.1
    # Weights of the maximum mean discrepancy and of the diversity of the attentions in the loss.
    mmd: NotNegative = 0.01
    diversity: NotNegative = 0.1
    # The learning rate is halved after more than this number of epochs in which the sum of the validation recalls
    # (rsum) has not grown. (The release's scheduler waits for it to fall, so that it halves while it grows.)
    patience: Annotated[int, between(0, 100_000)] = 10
    optimizer: OptimizerSettings = OptimizerSettings(name="amsgrad", learning_rate=2e-4, clip_norm=2.0)  # noqa: RUF009
    # Recalls from the paper, which the report shows beside ours; see `PaperRecalls`.
    paper: tuple[PaperRecalls, ...] = ()

    def __post_init__(self):
        check_itself(self)


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """Images and captions to rank.

    Attributes:
      feed: the n images.
      tokens: the words of the m captions.
      owner: index of the image of each caption.
    """

    feed: Feed
    tokens: Int[np.ndarray, "m l"]
    owner: Int[np.ndarray, "m"]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """PVSE on one kind of net: functions that are compiled once, whatever the checkpoint.

    Attributes:
      net: a net without a head.
      preprocessing: that of the images.
      settings: of the training.
      vocabulary_size: number of words, with the padding and the unknown word.
      word_vectors: given ones, or None.
      mesh: the devices, over which batches are split.
    """

    net: Net
    preprocessing: Preprocessing
    settings: RetrievalSettings
    vocabulary_size: int
    word_vectors: WordVectors | None
    mesh: Mesh

    @functools.cached_property
    def pvse(self) -> Pvse:
        """The objective and the embeddings."""
        settings = self.settings
        names = ("tune_backbone", "embedding_dim", "num_embeddings", "word_dim", "dropout", "margin", "mmd")
        return pvse(
            self.net,
            settings.augment,
            vocabulary_size=self.vocabulary_size,
            word_vectors=self.word_vectors,
            diversity=settings.diversity,
            **{name: getattr(settings, name) for name in names},
        )

    def start(self, model: Model, seed: int) -> dict:
        """Makes the state at step 0 from a checkpoint's model; "learning_rate" is a part of it.

        The head and the projection of the checkpoint are left out.
        """
        params = without_head(without_projection(model["params"]), self.net)
        return self._start(devices.replicate({"params": params, "stats": model["stats"]}, self.mesh), seed)

    @functools.cached_property
    def _start(self) -> Callable:
        def start(model, seed):
            model = jax.tree.map(jnp.copy, model)  # the training step donates the state, and so what it shares
            optimizer = make_optimizer(self.settings.optimizer, 1, self.pvse.objective.groups)
            state = init_state(self.pvse.objective, optimizer, seed, model)
            return {**state, "learning_rate": jnp.float32(self.settings.optimizer.learning_rate)}

        return jax.jit(start, out_shardings=devices.replicated(self.mesh), static_argnums=1)

    @functools.cached_property
    def abstract(self) -> dict:
        """Shapes and dtypes of the state."""
        model = dict(zip(("params", "stats"), jax.eval_shape(self.net.init, jax.random.key(0)), strict=True))
        return jax.eval_shape(functools.partial(self._start, seed=0), model)

    @functools.cached_property
    def kept(self) -> Callable[[dict], dict]:
        """Function that copies from a state what its embeddings depend on: {"params", "stats"}."""

        def copy(state):
            return jax.tree.map(jnp.copy, {"params": state["params"], "stats": state["aux"]["stats"]})

        return jax.jit(copy, out_shardings=devices.replicated(self.mesh))

    def make_step(self, num_classes: dict[str, int], total_steps: int) -> Callable:
        """Makes the training step, not yet compiled, whose learning rate is that in the state."""

        def step(state, batches):
            rate, settings = state["learning_rate"], self.settings.optimizer
            optimizer = make_optimizer(settings, total_steps, self.pvse.objective.groups, learning_rate=rate)
            return make_train_step(self.pvse.objective, optimizer, self.preprocessing, num_classes)(state, batches)

        return step

    def many_steps(self, feed: Joined) -> Callable:
        """Compiles the training on a feed, see `steps.many_steps`."""
        total = self.settings.epochs * feed.steps_per_epoch
        return many_steps(self.make_step(feed.num_classes, total), feed.fetch, self.mesh)

    def step_gigaflops(self, sizes, num_classes: dict[str, int]) -> float:
        """Computes the work of one training step, in GFLOP; `sizes` are those of `Joined.sizes`."""
        views, step = self.pvse.objective.views, self.make_step(num_classes, 1)
        source, batch_size = sizes["train"]
        words = source.extra["tokens"].shape[-1]
        counted = train_step_gigaflops(step, self.abstract, sizes, views, self.preprocessing)
        return counted + recurrent_gigaflops(batch_size, words, self.settings.embedding_dim)

    @functools.cached_property
    def _embed_images(self) -> Callable:
        def embed(params, aux, images):
            images = devices.constrain(images, self.mesh, "data")
            return self.pvse.images(params, aux, augment.evaluation_view(images, self.preprocessing)).embeddings

        return jax.jit(devices.on_mesh(embed, self.mesh), out_shardings=devices.replicated(self.mesh))

    @functools.cached_property
    def _embed_captions(self) -> Callable:
        def embed(params, tokens):
            return self.pvse.captions(params, devices.constrain(tokens, self.mesh, "data")).embeddings

        return jax.jit(devices.on_mesh(embed, self.mesh), out_shardings=devices.replicated(self.mesh))

    def embeddings(
        self, kept: dict, aux: dict, pairs: Pairs, batch_size: int, stop: Callable[[], bool] = lambda: False
    ) -> tuple[Float[np.ndarray, "n k e"], Float[np.ndarray, "m k e"]] | None:
        """Embeds images and captions in evaluation mode; None if `stop`, called after each batch, returns True.

        Args:
          kept: the result of `kept`.
          aux: the rest of the state that does not change, such as a net that is not trained.
        """
        params, aux, images, captions = kept["params"], {**aux, "stats": kept["stats"]}, [], []
        for batch in pairs.feed.evaluation_batches(batch_size):
            images.append(np.asarray(self._embed_images(params, aux, batch.images)))
            if stop():
                return None
        for start in range(0, len(pairs.tokens), batch_size):
            tokens = pairs.tokens[start : start + batch_size]
            padded = np.pad(tokens, ((0, batch_size - len(tokens)), (0, 0)))
            captions.append(np.asarray(self._embed_captions(params, devices.replicate(padded, self.mesh))))
            if stop():
                return None
        return np.concatenate(images)[: len(pairs.feed.source)], np.concatenate(captions)[: len(pairs.tokens)]


def rankings(
    embeddings: tuple[Float[np.ndarray, "n k e"], Float[np.ndarray, "m k e"]],
    owner: Int[np.ndarray, "m"],
    folds: Sequence[int],
) -> dict[int, Retrieval] | None:
    """Ranks embeddings of images and captions with each number of folds; None if one of them is not finite.

    >>> x = np.eye(4, dtype=np.float32)[:, None]
    >>> {folds: result.rsum for folds, result in rankings((x, x), np.arange(4), (1, 2)).items()}
    {1: 6.0, 2: 6.0}
    >>> rankings((x, x * np.nan), np.arange(4), (1,)) is None
    True
    """
    images, captions = embeddings
    if not (np.isfinite(images).all() and np.isfinite(captions).all()):
        return None
    return {count: retrieval(images, captions, owner, count) for count in folds}


def flat_captions(captions: Sequence[Sequence[str]]) -> tuple[list[str], Int[np.ndarray, "m"]]:
    """Returns the captions of all images in one list, and the index of the image of each.

    Raises:
      InputError: if an image has no caption.

    >>> flat_captions([["a cat", "one cat"], ["a dog"]])[1].tolist()
    [0, 0, 1]
    """
    counts = [len(own) for own in captions]
    if bare := counts.count(0):
        raise InputError(f"{bare:,} of {len(counts):,} images have no caption: leave these images out.")
    return [caption for own in captions for caption in own], np.repeat(np.arange(len(counts)), counts)
