"""The vocabulary of captions: deterministic training, rows of tokens, and the file."""

import dataclasses
import logging
import random
import subprocess
import sys

import numpy as np
import pytest

from helpers.source_files import REPOSITORY
from jax_transfer.data.source import from_arrays, subset
from jax_transfer.data.templates import TEMPLATES, captions_of
from jax_transfer.data.vocabulary import END, PADDING, SMALLEST, START, read_vocabulary, train_vocabulary, with_tokens
from jax_transfer.records import InputError

CAPTIONS = [caption for name in ("tree frog", "fire engine", "jellyfish") for caption in captions_of(name)]


@pytest.fixture(scope="module")
def vocabulary():
    return train_vocabulary(CAPTIONS, 400)


def test_same_captions_give_same_file_in_any_order_and_process(vocabulary, tmp_path):
    shuffled = random.Random(0).sample(CAPTIONS, len(CAPTIONS))
    code = (
        "import sys, pathlib; from jax_transfer.data.vocabulary import train_vocabulary; "
        f"train_vocabulary({shuffled!r}, 400).save(pathlib.Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "other.json"], check=True, cwd=REPOSITORY)
    vocabulary.save(tmp_path / "own.json")
    assert (tmp_path / "own.json").read_bytes() == (tmp_path / "other.json").read_bytes()
    assert len(vocabulary) == 400


def test_rows_are_start_caption_end_and_padding(vocabulary):
    row, longer = vocabulary.encode(["a tree frog.", "a picture of a jellyfish seen from above."], 40)
    assert row.dtype == np.int32 and row.shape == longer.shape == (np.count_nonzero(longer),)
    for tokens in (row, longer):
        length = np.count_nonzero(tokens)
        assert tokens[0] == START and tokens[length - 1] == END and (tokens[length:] == PADDING).all()
        assert (tokens[1 : length - 1] > END).all()
    assert vocabulary.tokenizer.decode(row.tolist()).strip() == "a tree frog."


@pytest.mark.parametrize("caption", ["", "Größe 東京 🐸", "[PAD] [END]", "A  TREE\tfrog"])
def test_any_text_can_be_encoded_and_decoded(vocabulary, caption):
    (row,) = vocabulary.encode([caption], 60)
    assert row[0] == START and len(row) < 60 and (row < len(vocabulary)).all()
    ids = [token for token in row.tolist() if token > END]
    if "[" not in caption:
        assert vocabulary.tokenizer.decode(ids, skip_special_tokens=False).strip() == caption.lower().strip()


def test_a_caption_cannot_hold_a_special_token(vocabulary):
    """Text that looks like the name of a special token is text."""
    (row,) = vocabulary.encode(["a frog [END] of it"], 40)
    assert (row == END).sum() == 1 and row[np.count_nonzero(row) - 1] == END


def test_long_captions_are_cut_and_counted(vocabulary, caplog):
    with caplog.at_level(logging.WARNING):
        rows = vocabulary.encode(["frog", "jellyfish " * 50], 8)
    assert "1 of 2 captions are longer than 8 tokens and are cut" in caplog.text
    assert rows[1, -1] == END and np.count_nonzero(rows[1]) == 8


def test_saved_vocabulary_encodes_equally(vocabulary, tmp_path):
    vocabulary.save(tmp_path / "vocabulary.json")
    read = read_vocabulary(tmp_path / "vocabulary.json")
    np.testing.assert_array_equal(read.encode(CAPTIONS, 20), vocabulary.encode(CAPTIONS, 20))


def test_fewer_captions_are_repeated_and_a_subset_keeps_its_tokens(vocabulary):
    source = from_arrays(np.zeros((3, 8, 8), np.uint8), [0, 0, 1])
    source = dataclasses.replace(source, captions=(("a frog", "b"), ("a", "b", "c"), ("tree",)))
    tokens = with_tokens(source, vocabulary, 77).extra["tokens"]
    for captions, row in zip((("a frog", "b", "a frog"), ("a", "b", "c"), ("tree",) * 3), tokens, strict=True):
        own = vocabulary.encode(captions, 77)
        np.testing.assert_array_equal(row[:, : own.shape[1]], own)
        assert (row[:, own.shape[1] :] == PADDING).all()
    assert tokens.shape[:2] == (3, 3) and (tokens[..., -1] != PADDING).any()
    part = with_tokens(subset(source, np.array([2, 0])), vocabulary, 77)
    np.testing.assert_array_equal(part.extra["tokens"][:, 0], tokens[[2, 0], 0][:, : part.extra["tokens"].shape[-1]])
    assert with_tokens(source, vocabulary, 3).extra["tokens"].shape == (3, 3, 3)


@pytest.mark.parametrize("content", ["", "{", '{"a": 1}', "\x00"])
def test_a_damaged_file_is_named(content, tmp_path):
    path = tmp_path / "vocabulary.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"vocabulary\.json .*(cannot be read|is not)") as caught:
        read_vocabulary(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_foreign_vocabulary_are_named(vocabulary, tmp_path):
    with pytest.raises(InputError, match=r"absent\.json cannot be read"):
        read_vocabulary(tmp_path / "absent.json")
    foreign = tmp_path / "foreign.json"
    foreign.write_text(vocabulary.tokenizer.to_str().replace("[END]", "[EOS]"))
    with pytest.raises(InputError, match=r"foreign\.json is not a vocabulary of captions"):
        read_vocabulary(foreign)


def test_a_small_size_and_a_source_without_captions_are_refused(vocabulary):
    with pytest.raises(InputError, match=f"expected at least {SMALLEST}"):
        train_vocabulary(CAPTIONS, SMALLEST - 1)
    with pytest.raises(InputError, match=r"mine\?train=2 has no captions.*captions:DIR.*&captions=templates"):
        with_tokens(from_arrays(np.zeros((1, 8, 8), np.uint8), [0], name="mine?train=2"), vocabulary, 7)


def test_templates_are_eighty_and_each_has_one_place():
    assert len(set(TEMPLATES)) == 80 and all(template.count("{}") == 1 for template in TEMPLATES)
