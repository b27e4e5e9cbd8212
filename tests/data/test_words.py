"""Vocabularies of whole words: what a word is, what is unknown, and captions that nothing can find."""

import random

import pytest

from jax_transfer.data.words import PADDING, UNKNOWN, collect_words, read_words, words_of
from jax_transfer.records import InputError

CAPTIONS = ["A cat's toy.", "a toy, half-eaten", "two cats", "a cat"]


def test_words_are_lower_case_without_punctuation():
    assert words_of("  A Café’s sign: “No. 7”!_x ") == ["a", "café’s", "sign", "no", "7", "x"]
    assert words_of("...") == []


def test_the_vocabulary_does_not_depend_on_the_order_and_counts_words():
    vocabulary = collect_words(CAPTIONS)
    assert vocabulary.words[:4] == ("[PAD]", "[UNKNOWN]", "a", "toy")
    assert collect_words(random.Random(0).sample(CAPTIONS, len(CAPTIONS))) == vocabulary
    assert collect_words(CAPTIONS, min_count=2).words[2:] == ("a", "toy")
    with pytest.raises(InputError, match="of 8 words in the training captions, none occurs 9 times"):
        collect_words(CAPTIONS, min_count=9)


def test_captions_are_encoded_padded_and_cut():
    vocabulary = collect_words(CAPTIONS)
    token = vocabulary.words.index
    rows = vocabulary.encode(["a dog", "two cats", "a cat a toy a"], length=4)
    assert rows.tolist() == [
        [token("a"), UNKNOWN, PADDING, PADDING],
        [token("two"), token("cats"), PADDING, PADDING],
        [token("a"), token("cat"), token("a"), token("toy")],
    ]
    assert vocabulary.encode(["[PAD] [UNKNOWN]"], 4).tolist() == [[UNKNOWN, UNKNOWN]]


def test_captions_of_unknown_words_alone_are_counted_and_shown():
    vocabulary = collect_words(CAPTIONS)
    vocabulary.check_known(["a dog", "one toy"], "mine, test")
    with pytest.raises(
        InputError, match=r"^mine, test: 2 of 3 captions have no word .* \(such as 'one dog'\)"
    ) as caught:
        vocabulary.check_known(["a dog", "one dog", "..."], "mine, test")
    assert "\n" not in str(caught.value)


def test_the_file_holds_the_words(tmp_path):
    vocabulary, path = collect_words(CAPTIONS), tmp_path / "words.json"
    vocabulary.save(path)
    assert read_words(path) == vocabulary
    for content in ("", "[]", '{"words": ["a"]}', '{"words": ["[PAD]", "[UNKNOWN]", 3]}'):
        path.write_text(content)
        with pytest.raises(InputError, match=r"words\.json cannot be read .*: restore it") as caught:
            read_words(path)
        assert "\n" not in str(caught.value)
