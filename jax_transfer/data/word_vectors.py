"""Word vectors of a GloVe text file for the words of a vocabulary."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from jax_transfer.records import InputError, printable


@dataclasses.dataclass(frozen=True, eq=False)
class WordVectors:
    """Vectors of the words of a vocabulary.

    Attributes:
      table: float32, a row for each word; 0 for a word that the file lacks.
      found: whether the file has the word.
    """

    table: Float[np.ndarray, "v d"]
    found: Bool[np.ndarray, "v"]

    @property
    def num_found(self) -> int:
        """Number of words of the vocabulary that the file has."""
        return int(self.found.sum())

    @property
    def num_missing(self) -> int:
        """Number of words of the vocabulary that the file lacks."""
        return len(self.found) - self.num_found


def read_word_vectors(path: pathlib.Path, words: Sequence[str], dim: int = 300) -> WordVectors:
    """Reads the vectors of the given words from a file of GloVe (Pennington et al., 2014), in one pass.

    A line holds a word and its numbers, with one space between them. Only the vectors of the given words are kept in
    memory, and only their numbers are read, while every line must have enough of them. Words are compared as they are:
    in files from lower-case text, give words in lower case. Of several lines of a word, the first one counts.

    Args:
      path: the text file, in UTF-8.
      words: the vocabulary, by row of the table.
      dim: numbers of a vector.

    Returns:
      The `WordVectors`, from which a network's own table is made: np.where(found[:, None], table, own).

    Raises:
      InputError: if the file cannot be read, its vectors have another dimension, a line has too few numbers, a number
        of a word cannot be read or is not finite, or no word is found.

    Example:
      >>> import tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "glove.txt"
      >>> _ = path.write_text("the 0.1 0.2\\ncat 1 -2\\n")
      >>> vectors = read_word_vectors(path, ["cat", "axolotl"], dim=2)
      >>> vectors.table.tolist(), vectors.num_found, vectors.num_missing
      ([[1.0, -2.0], [0.0, 0.0]], 1, 1)
    """
    wanted = {word.encode() for word in words}
    vectors: dict[bytes, np.ndarray] = {}
    try:
        with pathlib.Path(path).expanduser().open("rb") as file:
            for number, line in enumerate(file, 1):
                line = line.rstrip()
                spaces = line.count(b" ")
                if spaces < dim or (number == 1 and spaces > dim):
                    raise InputError(_wrong_count(path, number, spaces, dim))
                # A few words of the largest files have spaces in them.
                word = line.split(b" ", 1)[0] if spaces == dim else line.rsplit(b" ", dim)[0]
                if word in wanted and word not in vectors:
                    vectors[word] = _numbers(path, number, word, line[len(word) + 1 :].split(b" "))
    except (OSError, RuntimeError) as error:  # RuntimeError: ~name without such a user
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{printable(path)} cannot be read ({reason}): expected a text file of GloVe.") from error
    if not vectors:
        such = f", such as {printable(words[0])!r}" if words else ""
        raise InputError(
            f"{printable(path)} has none of {len(words):,} words{such}: expected a text file of GloVe in the language "
            "and the case of the captions."
        )
    found = np.array([word.encode() in vectors for word in words])
    zeros = np.zeros(dim, np.float32)
    return WordVectors(np.stack([vectors.get(word.encode(), zeros) for word in words]), found)


def _wrong_count(path, number: int, count: int, dim: int) -> str:
    """Returns the message for a line with too few or too many numbers."""
    if number == 1:
        return (
            f"{printable(path)} has {count:,} numbers in its first line: expected a word and {dim:,} "
            "(config.retrieval.word_dim); use a file of GloVe with vectors of this size, without a header line."
        )
    return (
        f"{printable(path)}, line {number:,}, has {count:,} numbers: expected a word and {dim:,}; the file may be "
        "incomplete, so download it again."
    )


def _numbers(path, number: int, word: bytes, fields: Sequence[bytes]) -> Float[np.ndarray, "d"]:
    """Reads the numbers of a line."""
    try:
        vector = np.array([float(field) for field in fields], np.float32)
    except ValueError as error:
        vector, reason = None, printable(error)
    else:
        reason = "a number is not finite"
    if vector is None or not np.isfinite(vector).all():
        raise InputError(
            f"{printable(path)}, line {number:,} ({printable(word.decode(errors='replace'))}): {reason}; expected a "
            "word and its numbers, so download the file again."
        )
    return vector
