"""Reading GloVe files: the rows of a vocabulary, words with spaces, and damaged files in one line."""

import numpy as np
import pytest

from jax_transfer.data.word_vectors import read_word_vectors
from jax_transfer.records import InputError

LINES = ["the 0.1 0.2 0.3", "cat 1 -2 3e-1", ". . . 7 8 9", "naïve 4 5 6", "cat 0 0 0", "broken 1 x 3"]


@pytest.fixture
def write(tmp_path):
    def write(text, name="glove.txt"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_rows_follow_the_vocabulary_and_missing_words_are_zero(write):
    path = write("\n".join(LINES) + "\n")
    words = ["naïve", "axolotl", "cat", ". . .", "cat"]
    vectors = read_word_vectors(path, words, dim=3)
    expected = [[4, 5, 6], [0, 0, 0], [1, -2, 0.3], [7, 8, 9], [1, -2, 0.3]]
    np.testing.assert_array_equal(vectors.table, np.array(expected, np.float32))
    assert vectors.table.dtype == np.float32
    assert vectors.found.tolist() == [True, False, True, True, True]
    assert (vectors.num_found, vectors.num_missing) == (4, 1)


@pytest.mark.parametrize("ending", ["\r\n", " \n"])
def test_other_ends_of_lines_and_bytes_of_other_words_are_read(write, ending):
    path = write(ending.join(["the 1 2", "cat 3 4", ""]).encode() + b"\xff\xfe 5 6")
    assert read_word_vectors(path, ["cat", "the"], dim=2).table.tolist() == [[3, 4], [1, 2]]


BAD = {
    "fewer numbers": ("the 1 2\ncat 3 4\n", r"has 2 numbers in its first line: expected a word and 3 .*; use a file"),
    "more numbers": (
        "the 1 2 3 4\ncat 3 4 5 6\n",
        r"glove\.txt has 4 numbers in its first line: expected a word and 3",
    ),
    "a header": ("2 3\nthe 1 2 3\ncat 3 4 5\n", "has 1 numbers in its first line: .* without a header line"),
    "a torn line": ("the 1 2 3\ncat 3 4", r"glove\.txt, line 2, has 2 numbers: expected a word and 3"),
    "an empty line": ("the 1 2 3\n\ncat 3 4 5", "line 2, has 0 numbers"),
    "no number": ("the 1 2 3\ncat 3 x 5\n", r"line 2 \(cat\): could not convert.*'x'.*download the file again"),
    "not finite": ("the 1 2 3\ncat 3 nan 5\n", r"line 2 \(cat\): a number is not finite"),
    "other words": ("the 1 2 3\ndog 3 4 5\n", "has none of 2 words, such as 'cat'"),
    "an empty file": ("", "has none of 2 words"),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_files_are_named_in_one_line(write, case):
    content, message = BAD[case]
    with pytest.raises(InputError, match=message) as caught:
        read_word_vectors(write(content), ["cat", "axolotl"], dim=3)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(InputError, match=r"absent\.txt cannot be read \(No such file"):
        read_word_vectors(tmp_path / "absent.txt", ["cat"])
    with pytest.raises(InputError, match="cannot be read"):
        read_word_vectors(tmp_path, ["cat"])


def test_damage_of_a_word_that_is_not_wanted_is_not_read(write):
    assert read_word_vectors(write("\n".join(LINES)), ["the"], dim=3).num_found == 1
