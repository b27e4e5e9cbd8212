"""Weight imprinting against a plain numpy loop and its closed form, on ties, missing classes and bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_transfer.records import InputError
from jax_transfer.transfer import fewshot
from jax_transfer.transfer.fewshot import (
    ClassSplit,
    FewShotProblem,
    draw_episodes,
    imprint,
    interval,
    prototypes,
    split_classes,
)

C, D = 7, 6


def embeddings(seed, n=70, num_test=61, copies=None, signs=False):
    """Returns a problem with all classes in training and test; `signs`: of axes, with many ties."""
    generator = np.random.default_rng(seed)
    y, y_test = (np.concatenate([np.arange(C), generator.integers(0, C, k - C)]) for k in (n, num_test))
    y = np.concatenate([y, np.repeat(np.arange(C), 5)])

    def draw(labels, *axes):
        shape = (len(labels), *axes, D)
        if signs:
            return np.eye(D, dtype=np.float32)[generator.integers(0, D, shape[:-1])]
        x = 1.5 * np.eye(C, D)[labels].reshape(len(labels), *[1] * len(axes), D) + generator.normal(size=shape)
        return (x * 10 ** generator.uniform(-1, 1, (*shape[:-1], 1))).astype(np.float32)

    x, x_test = draw(y, *([copies] if copies else [])), draw(y_test)
    return FewShotProblem(x, y, x_test, y_test, split_classes(C, seen=()))


def with_seen(problem, seen=(4, 1, 2), unseen=(6, 0, 5, 3), seed=9):
    """Returns the problem with learned weights: those of the images of the seen classes, disturbed and scaled."""
    generator = np.random.default_rng(seed)
    split = split_classes(C, seen, unseen)
    weights = np.stack([unit(problem.x)[problem.y == c].reshape(-1, D).mean(0) for c in split.seen])
    weights = (weights + 0.1 * generator.normal(size=weights.shape)) * generator.uniform(0.1, 9, (len(weights), 1))
    return dataclasses.replace(problem, split=split, weights=weights.astype(np.float32))


def unit(x):
    x = np.asarray(x, np.float64)
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(norm == 0, 1, norm)


def loop(problem, rows):
    """Returns the accuracies by one classifier an episode, built class by class."""
    seen, unseen = problem.split.seen, problem.split.unseen
    classes = np.concatenate([seen, unseen])
    is_seen = np.isin(problem.y_test, seen)
    learned = [] if problem.weights is None else list(unit(problem.weights))
    values = {"unseen": [], "seen": [], "all": [], "unseen_only": []}
    for episode in rows:
        imprinted = []
        for k in range(len(unseen)):
            directions = unit(problem.x[episode[k]]).reshape(-1, D)
            imprinted.append(unit(directions.mean(0)))
        cosines = np.round(unit(problem.x_test) @ np.stack(learned + imprinted).T, 6)  # equal ones stay equal
        right = classes[cosines.argmax(1)] == problem.y_test
        among_unseen = unseen[cosines[:, len(seen) :].argmax(1)] == problem.y_test
        values["unseen"].append(right[~is_seen].mean())
        values["seen"].append(right[is_seen].mean() if is_seen.any() else np.nan)
        values["all"].append(right.mean())
        values["unseen_only"].append(among_unseen[~is_seen].mean())
    return values


@pytest.fixture(params=["shared", "direct"])
def path(request, monkeypatch):
    """Runs a test with the similarities to training images, and with a matrix product an episode."""
    monkeypatch.setattr(fewshot, "READING", -1e9 if request.param == "shared" else 1e9)
    fewshot._sum_right.clear_cache()
    yield request.param
    fewshot._sum_right.clear_cache()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("copies", [None, 3])
def test_accuracies_equal_a_plain_loop(seed, copies, path):
    for problem in (embeddings(seed, copies=copies), with_seen(embeddings(seed, copies=copies))):
        rows = draw_episodes(problem.y, problem.split.unseen, 3, 5, seed)
        result, expected = imprint(problem, rows), loop(problem, rows)
        for name, values in expected.items():
            np.testing.assert_allclose(getattr(result, name), values, rtol=1e-6, err_msg=name)
        assert np.ptp(result.all) > 0


def test_a_test_image_opposite_to_every_class_goes_to_the_least_opposite(path):
    problem = embeddings(0)
    problem = dataclasses.replace(problem, x=np.abs(problem.x), x_test=-np.abs(problem.x_test))
    rows = draw_episodes(problem.y, problem.split.unseen, 2, 5, seed=0)
    for name, values in loop(problem, rows).items():
        np.testing.assert_allclose(getattr(imprint(problem, rows), name), values, rtol=1e-6, err_msg=name)
    assert imprint(problem, rows).all.min() > 0


@pytest.mark.parametrize("seed", range(5))
def test_ties_go_to_the_first_class_seen_classes_before_unseen_ones(seed, path):
    """The directions are axes, so classes often have the same prototypes, and their cosines no rounding."""
    problem = embeddings(seed, signs=True)
    weights = np.eye(D)[np.random.default_rng(seed).integers(0, 3, 3)]
    learned = dataclasses.replace(problem, split=split_classes(C, (4, 1, 2), (6, 0, 5, 3)), weights=weights)
    for each in (problem, learned):
        for shots in (1, 4):
            rows = draw_episodes(each.y, each.split.unseen, shots, 6, seed)
            for name, values in loop(each, rows).items():
                np.testing.assert_allclose(getattr(imprint(each, rows), name), values, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("images", [2, 7, 60, 61, 100])
def test_chunks_of_test_images_change_nothing(images, path, monkeypatch):
    problem = with_seen(embeddings(0))
    rows = draw_episodes(problem.y, problem.split.unseen, 2, 3, seed=1)
    whole = imprint(problem, rows)
    monkeypatch.setattr(fewshot, "SCORES_AT_A_TIME", 1)
    monkeypatch.setattr(fewshot, "LEAST_IMAGES", images)
    fewshot._sum_right.clear_cache()
    for name, values in dataclasses.asdict(imprint(problem, rows)).items():
        np.testing.assert_array_equal(values, getattr(whole, name))


def test_closed_form_of_the_imprinted_classifier():
    """With one image a class, the weights are its direction; with all images, its mean direction."""
    problem = embeddings(3)
    first = np.stack([np.flatnonzero(problem.y == c)[:1] for c in range(C)])
    nearest = (unit(problem.x_test) @ unit(problem.x[first[:, 0]]).T).argmax(1)
    assert imprint(problem, first[None]).all[0] == pytest.approx((nearest == problem.y_test).mean())
    weights = np.asarray(prototypes(problem.x, problem.y, C))
    expected = unit(np.stack([unit(problem.x)[problem.y == c].mean(0) for c in range(C)]))
    np.testing.assert_allclose(weights, expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(weights, axis=1), 1, rtol=1e-6)


def test_learned_weights_can_be_prototypes():
    """Imprinting the seen classes beforehand is the same as imprinting them in the episode."""
    problem = embeddings(4)
    counts = np.bincount(problem.y)
    balanced = np.concatenate([np.flatnonzero(problem.y == c)[: counts.min()] for c in range(C)])
    rows = balanced.reshape(1, C, -1)
    split = split_classes(C)
    weights = prototypes(problem.x[balanced], problem.y[balanced], C)[: len(split.seen)]
    learned = dataclasses.replace(problem, split=split, weights=weights)
    whole, parts = imprint(problem, rows), imprint(learned, rows[:, len(split.seen) :])
    assert whole.all[0] == pytest.approx(parts.all[0]) and np.isnan(whole.seen_only)
    assert parts.seen_only >= parts.seen[0] and parts.unseen_only[0] >= parts.unseen[0]
    is_seen = problem.y_test < len(split.seen)
    among = (unit(problem.x_test[is_seen]) @ np.asarray(weights).T).argmax(1)
    assert parts.seen_only == pytest.approx((among == problem.y_test[is_seen]).mean())


def test_prototypes_average_copies_and_leave_absent_classes_zero():
    problem = embeddings(5, copies=4)
    repeated = problem.x.reshape(-1, D), np.repeat(problem.y, 4)
    np.testing.assert_allclose(prototypes(problem.x, problem.y, C + 2), prototypes(*repeated, C + 2), atol=1e-6)
    assert not np.asarray(prototypes(problem.x, problem.y, C + 2))[C:].any()
    opposite = jnp.array([[2.0, 1.0], [-4.0, -2.0], [3.0, 4.0]])
    np.testing.assert_allclose(prototypes(opposite, jnp.array([0, 0, 1]), 2), [[0, 0], [0.6, 0.8]], atol=1e-6)
    jitted = jax.jit(prototypes, static_argnums=2)(problem.x, problem.y, C)
    np.testing.assert_allclose(jitted, prototypes(problem.x, problem.y, C), atol=1e-6)


@pytest.mark.parametrize("scale", [3e37, 1e-30])
def test_scale_of_embeddings_and_weights_changes_nothing(scale, path):
    problem = with_seen(embeddings(6))
    rows = draw_episodes(problem.y, problem.split.unseen, 2, 4, seed=0)
    scaled = {name: unit(getattr(problem, name)) * scale for name in ("x", "x_test", "weights")}
    expected = imprint(problem, rows)
    for name, values in dataclasses.asdict(imprint(dataclasses.replace(problem, **scaled), rows)).items():
        np.testing.assert_allclose(values, getattr(expected, name), rtol=1e-6)


def test_all_episodes_share_one_program_and_new_draws_too():
    problem = with_seen(embeddings(7))
    unseen = problem.split.unseen
    fewshot._sum_right.clear_cache()
    draws = [draw_episodes(problem.y, unseen, 2, 5, seed) for seed in range(3)]
    results = [imprint(problem, rows) for rows in draws]
    assert len({len(np.unique(rows)) for rows in draws}) > 1  # some draws use more images than others
    assert fewshot._sum_right._cache_size() == 1 and all(result.all.shape == (5,) for result in results)
    assert not np.array_equal(results[0].all, results[1].all)


def test_memory_does_not_grow_with_the_product_of_episodes_and_test_images():
    """100 episodes of 200 classes on 10,000 images have 800 MB of scores, and 100 times their prototypes 40 MB."""

    def shape(*axes, dtype=np.float32):
        return jax.ShapeDtypeStruct(axes, dtype)

    for pool in (6_000, 100_000):  # with the similarities to training images, and without
        arguments = (
            shape(pool, 512),
            shape(pool, dtype=np.int32),
            shape(100, 200, 5, dtype=np.int32),
            shape(10_000, 512),
            shape(10_000, dtype=np.int32),
            shape(10_000),
            shape(0, 512),
        )
        compiled = fewshot._sum_right.lower(*arguments).compile()
        inputs = 4 * 512 * (10_000 + pool)  # their directions are kept
        assert compiled.memory_analysis().temp_size_in_bytes < 2.5 * inputs + 60e6


@pytest.mark.parametrize("where", ["x", "x_test", "weights"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_embeddings_that_are_not_finite_give_nan(where, bad, path):
    problem = with_seen(embeddings(8))
    rows = draw_episodes(problem.y, problem.split.unseen, 2, 3, seed=0)
    values = getattr(problem, where).copy()
    values[rows[0, 0, 0] if where == "x" else 1, 2] = bad
    result = imprint(dataclasses.replace(problem, **{where: values}), rows)
    for name, value in dataclasses.asdict(result).items():
        assert np.isnan(value).all(), name
    if where == "x":
        weights = np.asarray(prototypes(values, problem.y, C))
        assert np.isnan(weights).any(1).tolist() == [c == problem.y[rows[0, 0, 0]] for c in range(C)]


def test_accuracies_without_test_images_are_nan():
    problem = with_seen(embeddings(10))
    rows = draw_episodes(problem.y, problem.split.unseen, 2, 3, seed=0)
    for kept, lost in (("seen", "unseen"), ("unseen", "seen")):
        images = np.isin(problem.y_test, getattr(problem.split, kept))
        part = dataclasses.replace(problem, x_test=problem.x_test[images], y_test=problem.y_test[images])
        result, whole = imprint(part, rows), imprint(problem, rows)
        np.testing.assert_array_equal(getattr(result, kept), getattr(whole, kept))
        np.testing.assert_array_equal(result.all, getattr(whole, kept))
        assert np.isnan(getattr(result, lost)).all() and np.isnan(getattr(result, f"{lost}_only")).all()


def test_an_embedding_of_zeros_goes_to_the_first_class(path):
    problem = with_seen(embeddings(11))
    problem = dataclasses.replace(problem, x_test=np.zeros_like(problem.x_test))
    result = imprint(problem, draw_episodes(problem.y, problem.split.unseen, 1, 2, seed=0))
    assert result.all == pytest.approx((problem.y_test == problem.split.seen[0]).mean())


def test_episodes_hold_distinct_images_of_their_classes():
    problem = embeddings(12)
    classes = [5, 0, 3]
    rows = draw_episodes(problem.y, classes, 5, 50, seed=3)
    assert rows.shape == (50, 3, 5) and (problem.y[rows] == np.array(classes)[:, None]).all()
    assert all(len(np.unique(episode)) == 15 for episode in rows)
    for k, c in enumerate(classes):  # every image has its turn
        assert set(rows[:, k].ravel()) == set(np.flatnonzero(problem.y == c))
    np.testing.assert_array_equal(rows, draw_episodes(problem.y, classes, 5, 50, seed=3))
    assert not np.array_equal(rows, draw_episodes(problem.y, classes, 5, 50, seed=4))
    np.testing.assert_array_equal(draw_episodes(problem.y, [3, 5], 2, 20, seed=3), rows[:20, [2, 0], :2])


def test_interval_equals_its_formula_and_covers_the_mean():
    values = np.random.default_rng(0).normal(0.6, 0.05, (1_000, 100))
    mean, half_width = interval(values[0])
    assert mean == pytest.approx(values[0].mean())
    assert half_width == pytest.approx(1.96 * np.sqrt(((values[0] - mean) ** 2).sum() / 99 / 100))
    covered = [abs(mean - 0.6) < half_width for mean, half_width in map(interval, values)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)
    mean, half_width = interval([0.5])
    assert mean == 0.5 and np.isnan(half_width)
    assert np.isnan(interval([0.5, np.nan])).all() and interval([1, 1]) == (1.0, 0.0)


def test_default_split_halves_the_classes():
    assert split_classes(7).seen.tolist() == [0, 1, 2] and split_classes(7).unseen.tolist() == [3, 4, 5, 6]
    assert split_classes(4, unseen=[2, 0]).seen.tolist() == [1, 3]
    assert split_classes(4, seen=[2, 0]).unseen.tolist() == [1, 3]
    assert split_classes(3, seen=()).unseen.tolist() == [0, 1, 2]


def bad(**changes):
    """Returns a call of `imprint` with a part of its input replaced."""
    problem = with_seen(embeddings(13))
    rows = changes.pop("rows", draw_episodes(problem.y, problem.split.unseen, 2, 3, seed=0))
    return lambda: imprint(dataclasses.replace(problem, **changes), rows)


GOOD = with_seen(embeddings(13))
ROWS = draw_episodes(GOOD.y, GOOD.split.unseen, 2, 3, seed=0)
ERRORS = {
    "shots": (lambda: draw_episodes([0, 0, 1], [0, 1], 2, 5, 0), "shots = 2, but class 1 has 1 training images"),
    "absent class": (lambda: draw_episodes([0, 0, 1], [0, 4], 1, 5, 0), "class 4 has 0 training images"),
    "no shots": (lambda: draw_episodes([0, 1], [0], 0, 5, 0), "shots is 0: expected a whole number of at least 1"),
    "seed": (lambda: draw_episodes([0, 1], [0], 1, 5, -1), "seed is -1: expected a whole number of at least 0"),
    "repeated class": (lambda: draw_episodes([0, 1], [0, 0], 1, 5, 0), "classes lists the class 0 more than once"),
    "overlap": (lambda: split_classes(4, [0, 1], [1, 2]), r"seen and unseen share the class 1 \(1 in all\)"),
    "overlap in a problem": (bad(split=ClassSplit(np.array([0, 1, 2]), np.array([2, 3]))), "share the class 2"),
    "nothing unseen": (lambda: split_classes(2, [0, 1]), "No class is unseen"),
    "class out of range": (lambda: split_classes(3, [3]), "seen holds the class 3: expected 0 to 2"),
    "names of classes": (lambda: split_classes(3, ["cat"]), "seen holds <U3 of shape"),
    "no weights": (bad(weights=None), r"weights is None, but 3 classes are seen: give .* \[3, 6\]"),
    "too few weights": (bad(weights=GOOD.weights[:2]), r"weights has the shape \[2, 6\]: expected \[3, 6\]"),
    "dimensions": (bad(x_test=GOOD.x_test[:, :4]), "x has 6 dimensions and x_test 4"),
    "copies of test images": (
        bad(x_test=GOOD.x_test[:, None]),
        r"x_test has the shape \[61, 1, 6\]: expected \[n, d\]",
    ),
    "labels": (bad(y=GOOD.y[:-1]), "y holds 104 labels: expected 105, one for each image"),
    "labels of test images": (bad(y_test=GOOD.y_test + 1), r"y_test holds the class 7 \(\d+ of 61 images\), which is"),
    "negative labels": (bad(y_test=GOOD.y_test - 1), "y_test holds -1: expected whole numbers of at least 0"),
    "floating-point labels": (bad(y=GOOD.y * 1.0), "y holds float64 .* expected whole numbers"),
    "rows of other classes": (bad(rows=ROWS[:, ::-1]), r"rows\[0, 0, 0\] is an image of class 3, not 6"),
    "rows of fewer classes": (bad(rows=ROWS[:, :2]), r"expected \[episodes, 4, shots\] for 4 unseen classes"),
    "rows out of range": (bad(rows=ROWS + 105), "rows holds the index .*: expected 0 to 104"),
    "flat rows": (bad(rows=ROWS[0]), "rows holds int64 of shape .* expected whole numbers with 3 axes"),
    "text": (bad(x=GOOD.x.astype(str)), "x holds <U32: expected real numbers"),
    "prototypes out of range": (lambda: prototypes(GOOD.x, GOOD.y, 5), "y holds the label 6: expected 0 to 4"),
    "no episodes": (lambda: interval([]), r"values has the shape \[0\]: expected one number for each"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line_that_says_what_was_expected(name):
    call, expected = ERRORS[name]
    with pytest.raises(InputError, match=expected) as error:
        call()
    assert "\n" not in str(error.value)
