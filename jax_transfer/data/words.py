"""Captions as rows of words: a vocabulary of whole words, as retrieval with word vectors needs it."""

import collections
import dataclasses
import functools
import json
import logging
import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int

from jax_transfer.records import InputError, printable
from jax_transfer.results import write_atomically

logger = logging.getLogger(__name__)

PADDING, UNKNOWN = 0, 1  # tokens
SPECIAL = ("[PAD]", "[UNKNOWN]")  # their names in the file; no word has brackets
WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")


def words_of(caption: str) -> list[str]:
    """Returns the words of a caption in lower case: letters and digits, with apostrophes inside a word.

    >>> words_of("A cat's toy, half-eaten.")
    ['a', "cat's", 'toy', 'half', 'eaten']
    """
    return WORD.findall(caption.lower())


@dataclasses.dataclass(frozen=True)
class WordVocabulary:
    """A vocabulary of whole words.

    Attributes:
      words: SPECIAL, then the words; the index of a word is its token.
    """

    words: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.words)

    @functools.cached_property
    def _tokens(self) -> dict[str, int]:
        return {word: token for token, word in enumerate(self.words) if token >= len(SPECIAL)}

    def encode(self, captions: Sequence[str], length: int) -> Int[np.ndarray, "n l"]:
        """Encodes captions as int32 tokens, with UNKNOWN for other words and PADDING to the length of the longest one.

        Captions of more than `length` words are cut; the log says how many.
        """
        encoded = [[self._tokens.get(word, UNKNOWN) for word in words_of(caption)] for caption in captions]
        longest = max(map(len, encoded), default=0)
        rows = np.full((len(encoded), max(1, min(longest, length))), PADDING, np.int32)
        for row, tokens in zip(rows, encoded, strict=True):
            row[: len(tokens)] = tokens[:length]
        if long := sum(len(tokens) > length for tokens in encoded):
            logger.warning("%d of %d captions are longer than %d words and are cut.", long, len(encoded), length)
        return rows

    def check_known(self, captions: Iterable[str], what: str) -> None:
        """Checks that every caption has a word of the vocabulary, without which it could not be found.

        Args:
          what: names the captions in the message.

        Raises:
          InputError: if some have none; the message counts them and shows one.
        """
        captions = list(captions)
        if unknown := [caption for caption in captions if self._tokens.keys().isdisjoint(words_of(caption))]:
            raise InputError(
                f"{what}: {len(unknown):,} of {len(captions):,} captions have no word of the vocabulary of "
                f"{len(self) - len(SPECIAL):,} words (such as {printable(unknown[0])[:80]!r}): correct or leave out "
                "these captions, or use a smaller min_count."
            )

    def save(self, path: pathlib.Path) -> None:
        """Writes the vocabulary as JSON: {"words": [...]}."""
        write_atomically(path, json.dumps({"words": self.words}, ensure_ascii=False, indent=0).encode())


def collect_words(captions: Iterable[str], min_count: int = 1) -> WordVocabulary:
    """Makes the vocabulary of the words that occur at least `min_count` times, the most frequent ones first.

    The same captions give the same vocabulary, whatever their order.

    Raises:
      InputError: if no word occurs so often.

    >>> vocabulary = collect_words(["a cat", "a dog"])
    >>> vocabulary.words, vocabulary.encode(["a dog and a cat"], length=9).tolist()
    (('[PAD]', '[UNKNOWN]', 'a', 'cat', 'dog'), [[2, 4, 1, 2, 3]])
    """
    counts = collections.Counter(word for caption in captions for word in words_of(caption))
    words = [word for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if count >= min_count]
    if not words:
        raise InputError(
            "the training captions have no words: correct them."
            if not counts
            else f"of {len(counts):,} words in the training captions, none occurs {min_count} times: use a smaller "
            "config.retrieval.min_count."
        )
    return WordVocabulary((*SPECIAL, *words))


def read_words(path: pathlib.Path) -> WordVocabulary:
    """Reads a vocabulary that `WordVocabulary.save` wrote.

    Raises:
      InputError: if the file cannot be read or is not such a vocabulary.
    """
    try:
        words = json.loads(path.read_text(encoding="utf-8"))["words"]
        if tuple(words[: len(SPECIAL)]) != SPECIAL or not all(isinstance(word, str) for word in words):
            raise ValueError("it is no list of words")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} cannot be read ({reason}): restore it, or use another --workdir.") from error
    return WordVocabulary(tuple(words))
