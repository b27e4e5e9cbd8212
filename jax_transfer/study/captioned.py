"""The data sets of the "retrieval" stage: three splits with captions, a vocabulary, and the words of the captions."""

import dataclasses
import functools
import pathlib

import numpy as np

from jax_transfer.data.source import NoValidation, Source, content_hash, subset
from jax_transfer.data.subsets import fraction
from jax_transfer.data.vocabulary import check_has_captions, with_tokens
from jax_transfer.data.word_vectors import WordVectors, read_word_vectors
from jax_transfer.data.words import WordVocabulary, collect_words, read_words
from jax_transfer.logs import log
from jax_transfer.results import TEST, VALIDATION
from jax_transfer.study import settings
from jax_transfer.study.workspace import Workspace
from jax_transfer.transfer.pvse import flat_captions
from jax_transfer.transfer.retrieval import shared_captions

FOLDER, WORDS = "retrieval", "words.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Captions:
    """The captions of a split: their words [m, l], the image of each [m], and how many another image has too."""

    tokens: np.ndarray
    owner: np.ndarray
    num_duplicates: int


@dataclasses.dataclass(frozen=True, eq=False)
class Captioned:
    """A data set with captions, ready for training.

    Attributes:
      words: the words of all training captions, whatever the share on which is trained.
      word_vectors: those of the file in the config; None without one.
      train: the training images, with "tokens" in `extra`.
      held_out: VALIDATION and TEST -> the images to rank.
      captions: the same -> their captions.
    """

    words: WordVocabulary
    word_vectors: WordVectors | None
    train: Source
    held_out: dict[str, Source]
    captions: dict[str, Captions]


def folder(work: Workspace, dataset: str) -> pathlib.Path:
    return work.workdir / FOLDER / content_hash(dataset)[:12]


def captioned(work: Workspace, dataset: str) -> Captioned:
    """Returns a data set of `config.retrieval`, which is read once.

    Raises:
      InputError: if a split has no captions, or captions without a word of the vocabulary, or the file of word vectors
        cannot be used.
    """
    cached = work.caches.setdefault("captioned", functools.cache(functools.partial(_captioned, work)))
    return cached(dataset)


def _captioned(work: Workspace, dataset: str) -> Captioned:
    wanted, sources = settings.retrieval_settings(work.config), _splits(work, dataset)
    for source in sources.values():
        check_has_captions(source)
    texts = {split: flat_captions(source.captions) for split, source in sources.items()}
    path = folder(work, dataset) / WORDS
    words = read_words(path) if path.exists() else collect_words(texts["train"][0], wanted.min_count)
    for split, (captions, _) in texts.items():
        words.check_known(captions, f"{dataset}, {split}")
    vectors = None
    if wanted.word_vectors:
        vectors = read_word_vectors(pathlib.Path(wanted.word_vectors), words.words, wanted.word_dim)
        log.info("%s has vectors of %d of %d words.", wanted.word_vectors, vectors.num_found, len(words))
    captions = {}
    for split in (VALIDATION, TEST):
        own, owner = texts[split]
        captions[split] = Captions(words.encode(own, wanted.caption_length), owner, shared_captions(own, owner))
        log.info(
            "%s, %s: %d images, %d captions, of which %d are captions of another image too.",
            *(dataset, split, len(sources[split]), len(own), captions[split].num_duplicates),
        )
    held_out = {split: sources[split] for split in captions}
    return Captioned(words, vectors, with_tokens(sources["train"], words, wanted.caption_length), held_out, captions)


def _splits(work: Workspace, dataset: str) -> dict[str, Source]:
    """Returns the three splits; without a validation split, a fifth of the training images is held out for it."""
    try:
        parts = {"train": "train", VALIDATION: "validation"}
        work.source(dataset, "validation")
    except NoValidation:
        parts = {"train": "fit", VALIDATION: "held_out"}
        log.info("%s has no validation split: a fifth of its training images is held out for it.", dataset)
    return {split: work.source(dataset, part) for split, part in {**parts, TEST: "test"}.items()}


def share_of(work: Workspace, data: Captioned, share: float) -> Source:
    """Returns a share of the training images; a smaller share is contained in a larger one."""
    return subset(data.train, fraction(data.train.labels, share, work.config.seed))
