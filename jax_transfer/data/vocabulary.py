"""Byte-pair encoding of captions: a vocabulary that is trained from captions, and captions as rows of tokens."""

import dataclasses
import logging
import pathlib
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from jax_transfer.data.source import Source
from jax_transfer.records import InputError
from jax_transfer.results import write_atomically

logger = logging.getLogger(__name__)

PADDING, START, END = 0, 1, 2  # tokens
SPECIAL = ("[PAD]", "[START]", "[END]")  # their names in the file
CHUNK = 10_000  # captions that are encoded at a time
SMALLEST = len(SPECIAL) + 256  # every byte is a token, so that any text can be encoded


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """A byte-pair encoding (Sennrich et al., 2016, arXiv:1508.07909) of lower-case text, as in CLIP.

    Attributes:
      tokenizer: the trained encoding.
    """

    tokenizer: tokenizers.Tokenizer

    def __post_init__(self):
        self.tokenizer.encode_special_tokens = True  # "[END]" in a caption is text, not the token

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def encode(self, captions: Sequence[str], length: int) -> Int[np.ndarray, "n l"]:
        """Encodes captions as int32 tokens: START, the caption, END, and PADDING to the length l of the longest one.

        Captions of more than `length` tokens are cut, so that END is always there; the log says how many.
        """
        encoded = [
            np.asarray(tokens.ids, np.int32)
            for start in range(0, len(captions), CHUNK)
            for tokens in self.tokenizer.encode_batch(captions[start : start + CHUNK], add_special_tokens=False)
        ]
        longest = max(map(len, encoded), default=0) + 2
        rows = np.full((len(encoded), min(longest, length)), PADDING, np.int32)
        for row, ids in zip(rows, encoded, strict=True):
            kept = ids[: length - 2]
            row[: len(kept) + 2] = START, *kept, END
        if long := sum(len(ids) > length - 2 for ids in encoded):
            logger.warning("%d of %d captions are longer than %d tokens and are cut.", long, len(encoded), length)
        return rows

    def save(self, path: pathlib.Path) -> None:
        """Writes the vocabulary as JSON, in the format of the library `tokenizers`."""
        write_atomically(path, self.tokenizer.to_str(pretty=True).encode())


def train_vocabulary(captions: Iterable[str], size: int) -> Vocabulary:
    """Trains a vocabulary of at most `size` tokens; the same captions give the same one, whatever their order.

    Equal captions count once.

    Raises:
      InputError: if `size` is less than SMALLEST.

    >>> vocabulary = train_vocabulary(["a photo of a cat", "a photo of a dog"], size=300)
    >>> vocabulary.encode(["a photo of a cat", "a cat"], length=77).shape
    (2, 7)
    """
    if size < SMALLEST:
        raise InputError(f"a vocabulary of {size} tokens: expected at least {SMALLEST}, one for each byte and 3 more.")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(set(captions)), trainer)
    return Vocabulary(tokenizer)


def read_vocabulary(path: pathlib.Path) -> Vocabulary:
    """Reads a vocabulary that `Vocabulary.save` wrote.

    Raises:
      InputError: if the file cannot be read or is not such a vocabulary.
    """
    try:
        tokenizer = tokenizers.Tokenizer.from_str(path.read_text())
    except Exception as error:  # tokenizers raises plain ones
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} cannot be read ({reason}): restore it, or use another --workdir.") from error
    if [tokenizer.token_to_id(name) for name in SPECIAL] != [PADDING, START, END]:
        raise InputError(f"{path} is not a vocabulary of captions: restore it, or use another --workdir.")
    return Vocabulary(tokenizer)


class Encoding(Protocol):
    """A vocabulary of tokens, such as `Vocabulary`, or of words."""

    def encode(self, captions: Sequence[str], length: int) -> Int[np.ndarray, "n l"]:
        """Encodes captions as int32 tokens, at most `length` each, with 0 for padding at the end."""
        ...


def with_tokens(source: Source, vocabulary: Encoding, length: int) -> Source:
    """Returns a source with the tokens of its captions in `extra`: "tokens", int32 [n, k, l].

    k is the largest number of captions of an image; images with fewer captions repeat them. l is the number of tokens
    of the longest caption, at most `length`.

    Raises:
      InputError: if the source has no captions.

    >>> from jax_transfer.data.source import from_arrays
    >>> source = from_arrays(np.zeros((2, 8, 8), np.uint8), [0, 1])
    >>> source = dataclasses.replace(source, captions=(("a cat", "one cat"), ("a dog",)))
    >>> vocabulary = train_vocabulary(["a cat", "one cat", "a dog"], size=300)
    >>> with_tokens(source, vocabulary, length=77).extra["tokens"].shape
    (2, 2, 4)
    """
    check_has_captions(source)
    number: dict[str, int] = {}  # captions from class names are few
    most = max(map(len, source.captions))
    rows = np.empty((len(source), most), np.int64)
    for row, captions in zip(rows, source.captions, strict=True):
        numbers = [number.setdefault(caption, len(number)) for caption in captions]
        row[:] = np.resize(numbers, most)
    tokens = vocabulary.encode(list(number), length)[rows]
    return dataclasses.replace(source, extra={**source.extra, "tokens": tokens})


def check_has_captions(source: Source) -> None:
    """Checks that a source has captions.

    Raises:
      InputError: if it has none.
    """
    if not source.captions:
        mark = "&" if "?" in source.name else "?"
        raise InputError(
            f"{source.name} has no captions: use captions:DIR, or make captions from the names of the classes with "
            f"{source.name}{mark}captions=templates."
        )
