"""`imbalance` and `exponential_imbalance`: the classes of the training images become smaller in their order."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_transfer.data.sources import load_source
from jax_transfer.data.subsets import exponential, long_tail, pareto
from jax_transfer.records import InputError
from jax_transfer.report.tables import short_target

EXPONENT = {
    pareto: lambda i, c: math.log(1 + 9 * i / (c - 1)) / math.log(10),
    exponential: lambda i, c: i / (c - 1),
}


def balanced(per_class, num_classes):
    return np.tile(np.arange(num_classes), per_class), [f"c{k}" for k in range(num_classes)]


def sizes(labels, ratio, names, shape=pareto, seed=0):
    return np.bincount(labels[long_tail(labels, ratio, seed, names, shape)], minlength=len(names))


@pytest.mark.parametrize("shape", EXPONENT)
@pytest.mark.parametrize(("per_class", "ratio"), [(30, 10), (500, 10), (100, 3.5), (40, 1), (20, 1000)])
def test_sizes_follow_the_closed_form(shape, per_class, ratio):
    labels, names = balanced(per_class, 102)
    exact = np.array([per_class * ratio ** -EXPONENT[shape](i, 102) for i in range(102)])
    kept = sizes(labels, ratio, names, shape)
    assert (np.abs(kept - np.maximum(1, exact)) <= 0.5 + 1e-9).all() and (np.diff(kept) <= 0).all()
    assert kept[0] == per_class and kept[-1] == max(1, round(per_class / ratio))


def test_largest_of_102_classes_has_ten_times_the_images_of_the_smallest():
    labels, names = balanced(30, 102)
    for shape in EXPONENT:
        kept = sizes(labels, 10, names, shape)
        assert kept[0] == 30 and kept[-1] == 3
    harmonic = sizes(labels, 10, names)  # 10^(-log10(1 + 9 x)) = 1 / (1 + 9 x)
    np.testing.assert_array_equal(harmonic, np.rint(30 / (1 + 9 * np.arange(102) / 101)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.floats(1, 50), st.floats(1, 4), st.integers(0, 3))
def test_subsets_are_nested_and_no_class_is_lost_or_grows(labels, ratio, factor, seed):
    labels, names = np.array(labels), "abcdef"
    wide, narrow = (set(long_tail(labels, r, seed, names).tolist()) for r in (ratio, ratio * factor))
    assert narrow <= wide <= set(long_tail(labels, ratio, seed, names, exponential).tolist())
    total, kept = np.bincount(labels, minlength=6), sizes(labels, ratio * factor, names, seed=seed)
    assert (kept <= total).all() and ((kept > 0) == (total > 0)).all()
    indices = long_tail(labels, ratio, seed, names)
    assert indices.tolist() == sorted(set(indices.tolist()))


def test_ratio_of_one_and_a_single_class_keep_every_image():
    labels, names = balanced(7, 5)
    np.testing.assert_array_equal(long_tail(labels, 1, 0, names), np.arange(35))
    np.testing.assert_array_equal(long_tail(np.zeros(9, int), 10, 0, ["only"]), np.arange(9))


def test_images_depend_on_the_seed_alone():
    labels, names = balanced(40, 5)
    first, again, other = (long_tail(labels, 10, seed, names) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert len(first) == len(other) and set(first) != set(other)


@pytest.mark.parametrize(("option", "shape"), [("imbalance", pareto), ("exponential_imbalance", exponential)])
def test_options_thin_out_the_training_split_only(option, shape):
    train, test = (load_source(f"embedded:digits?{option}=10", split) for split in ("train", "test"))
    whole, whole_test = (load_source("embedded:digits", split) for split in ("train", "test"))
    np.testing.assert_array_equal(np.bincount(train.labels), sizes(whole.labels, 10, whole.class_names, shape))
    assert test.fingerprint == whole_test.fingerprint and train.fingerprint != whole.fingerprint


def test_order_of_the_classes_option_is_that_of_the_tail():
    train = load_source("embedded:digits?imbalance=10&classes=7+2+4", "train")
    assert train.class_names == ("7", "2", "4") and np.bincount(train.labels)[[0, 2]].tolist() == [143, 14]


def test_largest_class_is_that_of_the_options_before_it():
    train = load_source("embedded:digits?per_class=40&imbalance=10", "train")
    assert np.bincount(train.labels).tolist() == [round(40 / (1 + i)) for i in range(10)]


@pytest.mark.parametrize("option", ("imbalance", "exponential_imbalance"))
@pytest.mark.parametrize("value", ("0", "0.5", "-10", "nan", "inf", "ten", ""))
def test_ratio_must_be_a_finite_number_of_at_least_1(option, value):
    with pytest.raises(InputError, match=f"{option} must be a finite number of at least 1, got '{value}'") as caught:
        load_source(f"embedded:digits?{option}={value}", "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("split", ("train", "test"))
def test_two_shapes_at_once_are_refused_in_one_line(split):
    name = "embedded:digits?exponential_imbalance=10&imbalance=10"
    with pytest.raises(InputError, match="imbalance and exponential_imbalance exclude each other; give one") as caught:
        load_source(name, split)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_tables_name_the_shape():
    assert short_target("tfds:caltech101?imbalance=10") == "caltech101 (imbalance 10)"
    assert short_target("tfds:caltech101?exponential_imbalance=10") == "caltech101 (exponential imbalance 10)"


# ---- Caltech101, the data of the paper


@pytest.mark.parametrize("option", ("imbalance", "exponential_imbalance"))
def test_caltech101_gets_a_tail_of_ten_to_one(tfds_dir, option):
    kept = np.bincount(load_source(f"tfds:caltech101?{option}=10", "train").labels)
    assert len(kept) == 102 and kept.max() == 30 and kept.min() == 3 and (np.diff(kept) <= 0).all()


@pytest.mark.parametrize("percent", (20, 40, 60, 80))
def test_fractions_of_caltech101_keep_the_same_share_of_each_class(tfds_dir, percent):
    source = load_source(f"tfds:caltech101?fraction={percent / 100}", "train")
    assert np.bincount(source.labels).tolist() == [30 * percent // 100] * 102
