"""Selection at random and by names."""

import numpy as np
import pytest

from jax_transfer.records import InputError
from jax_transfer.selection import label_selection, random_selection, shared_names

NAMES = (
    "tench, Tinca tinca",
    "great white shark, white shark, man-eater",
    "crane",
    "Sea-Lion",
    "hot_dog",
    "crane",
    "tiger cat",
)


def test_random_selection_is_a_function_of_its_seed():
    first, again, other = (random_selection(1_000, seed=seed) for seed in (3, 3, -3))
    np.testing.assert_array_equal(first.indices, again.indices)
    assert len(set(first.indices.tolist())) == 100 and first.indices.dtype == np.int32
    assert len(set(first.indices.tolist()) & set(other.indices.tolist())) < 30
    assert sorted(first.ranking.tolist()) == list(range(1_000))
    assert np.all(np.isnan(first.similarity)) and first.similarity.shape == (1_000,) and first.converged


def test_a_smaller_random_selection_begins_a_larger_one():
    np.testing.assert_array_equal(random_selection(1_000, 50).indices, random_selection(1_000, 300).indices[:50])


def test_random_selection_is_uniform_over_classes():
    counts = np.bincount(np.concatenate([random_selection(20, 5, seed).indices for seed in range(2_000)]), minlength=20)
    assert np.sum((counts - 500) ** 2 / 375) < 45  # chi-squared with 19 degrees of freedom, scaled: p = 0.0005


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ((50,), "num_selected = 100, but there are 50 classes: select at most 50"),
        ((0, 1), "num_source is 0"),
        ((10, 0), "num_selected is 0"),
        ((10, 5, 0.5), "seed is 0.5"),
    ),
)
def test_wrong_arguments_of_random_selection_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        random_selection(*arguments)


def test_label_selection_is_in_the_order_of_the_source():
    selection = label_selection(NAMES, ["tiger cat", "tench"])
    assert selection.indices.tolist() == [0, 6]
    assert selection.similarity.tolist() == [1, 0, 0, 0, 0, 0, 1]
    assert selection.ranking.tolist() == [0, 6, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("wanted", "indices"),
    (
        ("Tinca Tinca", [0]),
        ("TENCH", [0]),
        ("man_eater", [1]),
        ("sea lion", [3]),
        ("Hot-Dog", [4]),
        ("crane", [2, 5]),  # a bird and a machine: both have the name
        ("great white shark, white shark, man-eater", [1]),
        ("tench, something else", [0]),
    ),
)
def test_names_are_compared_by_synonym_without_case_and_separators(wanted, indices):
    assert label_selection(NAMES, [wanted]).indices.tolist() == indices


@pytest.mark.parametrize(
    ("source_names", "wanted", "message"),
    (
        (NAMES, ["tiger", "crane"], r"wanted holds 'tiger', but none of the 7 source.*similar names: 'tiger cat'"),
        (NAMES, ["cranes"], "similar names: 'crane'"),
        (NAMES, ["dog"], "wanted holds 'dog', but none"),
        (NAMES, ["xyzzy"], "expected names of source classes.$"),
        (NAMES, [], "wanted is empty"),
        (NAMES, "crane", "wanted is 'crane': expected a list of names"),
        (NAMES, [3], "wanted holds 3: expected a list of names"),
        (NAMES, [" , "], "wanted holds ' , ': expected names with a letter"),
        (["a", None], ["a"], "source_names holds None"),
    ),
)
def test_unknown_names_are_refused(source_names, wanted, message):
    with pytest.raises(InputError, match=message) as error:
        label_selection(source_names, wanted)
    assert "\n" not in str(error.value)


def test_shared_names_are_those_that_both_have():
    target = ["White Shark", "sea_lion", "dog", "crane", "cat", "unknown"]
    shared = shared_names(NAMES, target)
    assert shared == [NAMES[1], "crane", "Sea-Lion", "crane"]
    assert label_selection(NAMES, shared).indices.tolist() == [1, 2, 3, 5]
    assert shared_names(NAMES, ["unknown"]) == []
