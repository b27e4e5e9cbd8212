"""Options in the name of a score: parsed, checked by the score's own function, and used wherever a name is."""

import inspect

import jax
import numpy as np
import pytest

from helpers.features import C, as_features, gaussians
from jax_transfer.analysis import (
    SCORES,
    knn_accuracy,
    nleep,
    score_all,
    score_gigaflops,
    score_named,
    split_options,
    transrate,
    why_undefined,
)
from jax_transfer.analysis.nleep import nleep_gigaflops
from jax_transfer.records import InputError

X, Y = gaussians(n=80, d=6, separation=0.5)
ONE = as_features(X, Y)
ALL = jax.tree.map(lambda leaf: leaf[None], ONE)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("knn", {}),
        ("knn?k=5", {"k": 5}),
        ("nleep?energy=0.5&components_per_class=2", {"energy": 0.5, "components_per_class": 2}),
        ("transrate?eps=1e-4", {"eps": 1e-4}),
        ("transrate?eps=.5", {"eps": 0.5}),
        ("nleep?seed=-1", {"seed": -1}),
    ],
)
def test_options_are_numbers(name, expected):
    base, options = split_options(name)
    assert base == name.partition("?")[0] and options == expected
    assert [type(value) for value in options.values()] == [type(value) for value in expected.values()]


@pytest.mark.parametrize("name", SCORES)
def test_a_name_without_options_is_the_entry_itself(name):
    assert score_named(name) is SCORES[name]


WITH_OPTIONS = {
    "knn?k=3": lambda x, y: knn_accuracy(x, y, C, k=3),
    "transrate?eps=0.1": lambda x, y: transrate(x, y, C, eps=0.1),
    "nleep?energy=0.5&components_per_class=2": lambda x, y: nleep(x, y, C, energy=0.5, components_per_class=2),
}


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_options_are_arguments_of_the_function(name):
    expected = float(WITH_OPTIONS[name](ONE.features, ONE.labels))
    np.testing.assert_allclose(score_all(name, ALL, C), [expected], rtol=1e-5)
    assert float(score_named(name)(ONE, C)) == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(float(score_all(name.partition("?")[0], ALL, C)[0]), rel=1e-4)


def test_work_is_that_of_the_options():
    few, many = (score_gigaflops(f"nleep?energy=0.5&components_per_class={m}", ONE, C) for m in (1, 4))
    assert many > 2 * few > 0
    assert list(inspect.signature(nleep_gigaflops).parameters) == list(inspect.signature(nleep).parameters)


def test_too_few_samples_for_the_options_are_explained():
    name = "nleep?components_per_class=17"
    assert np.isnan(score_all(name, ALL, C)).all()
    assert "80 samples for 85 Gaussians (17 for each class" in why_undefined(name, ONE, C)


INVALID = {
    "nlep?energy=0.5": r"^Unknown score \(name\): 'nlep'\. Did you mean 'nleep'\? Valid: .*transrate",
    "nleep?energie=0.5": r"^Unknown option \(in 'nleep\?energie=0\.5'\): .* Valid: components_per_class, energy",
    "nleep?num_classes=3": "Unknown option .*Valid: components_per_class, energy, max_dimension, seed",
    "linear_1?held_out=3": r"Unknown option .*Valid: batch_size, l2, learning_rate, seed\.$",
    "linear_1?epochs=3": "Unknown option .*'epochs'",  # the name says 1
    "mi_alpha_0.5?energy=0.5": "Unknown option .*'energy'.* Valid: batch_size, seed, steps",
    "nleep?energy=1.5": r"^'nleep\?energy=1\.5': energy is 1\.5: expected a static fraction",
    "nleep?energy=0.5&components_per_class=0": r"^'nleep.*': components_per_class is 0: expected a whole number",
    "knn?k=2.5": r"^'knn\?k=2\.5': k is 2\.5: expected a whole number of at least 1",
    "knn?k=2.0": "k is 2.0: expected a whole number",
    "transrate?eps=-1": "eps is -1: expected a positive number",
    "knn?k=few": r"^'knn\?k=few': k must be a number, such as 5 or 0\.5, got 'few'\.$",
    "knn?k=nan": "k must be a number",
    "knn?k=１": "k must be a number",
    "knn?k=1_0": "k must be a number",
    "knn?k=": "k must be a number",
    "knn?k=5&k=6": r"^'knn\?k=5&k=6': k is given twice; give each option once\.$",
    "knn?k": "'k' is not an option: expected KEY=NUMBER",
    "knn?=5": "'=5' is not an option",
    "knn?": "'' is not an option",
    "knn?k=5&": "'' is not an option",
    "logme?seed=1": r"^'logme\?seed=1': this score has no options: write 'logme'\.$",
    "leep?seed=1": "this score has no options",
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_options_are_refused_in_one_line(name):
    score_named("knn?k=2")  # equal to 2.0, but a whole number
    for function in (score_named, lambda name: score_all(name, ALL, C), lambda name: why_undefined(name, ONE, C)):
        with pytest.raises(InputError, match=INVALID[name]) as error:
            function(name)
        assert "\n" not in str(error.value)


def test_knn_and_effective_rank_are_the_measures_of_representations():
    assert score_all("knn", ALL, C)[0] == pytest.approx(float(knn_accuracy(ONE.features, ONE.labels, C, k=20)))
    renamed = jax.tree.map(lambda leaf: leaf[None], as_features(X, np.roll(Y, 7)))
    ranks = [score_all("effective_rank", features, C)[0] for features in (ALL, renamed)]
    s = np.linalg.svd(X, compute_uv=False)
    p = s / s.sum() + 1e-7
    np.testing.assert_allclose(ranks, np.exp(-(p * np.log(p)).sum()), rtol=1e-5)
