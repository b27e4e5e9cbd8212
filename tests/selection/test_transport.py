"""Selection by transport against POT, the authors' values on the paper's data, and its own invariances."""

import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_transfer.records import InputError
from jax_transfer.selection import greedy_ot_selection, recall, transport, uot_selection

TARGETS = ("CUB", "dogs", "pets")


def means_of(rng, s=60, t=25, d=16):
    """Returns means with a common offset, as features after a ReLU have."""
    return (rng.normal(size=(n, d)).astype(np.float32) + 1.5 for n in (s, t))


@pytest.fixture
def paper(reference_dir):
    """Returns function(target) -> (means of ImageNet's classes, means of the target's, expected values)."""
    folder = reference_dir / "uot"

    def load(name):
        with np.load(folder / f"{name}.npz") as file:
            return dict(file)

    source = load("resnet18_ImageNet_means")
    return lambda target: (source, load(f"resnet18_{target}_means")["means"], load(f"expected_resnet18_{target}"))


def birds(paper):
    source, target, _ = paper("CUB")
    return source["means"], target, np.flatnonzero(source["is_bird"])


def test_selections_find_as_many_of_the_bird_classes_as_in_the_paper(paper):
    source, target, relevant = birds(paper)
    assert len(relevant) == 59
    found = {
        "uot cosine": uot_selection(source, target),
        "uot l2": uot_selection(source, target, metric="l2"),
        "greedy l2": greedy_ot_selection(source, target),
        "greedy cosine": greedy_ot_selection(source, target, metric="cosine"),
    }
    counts = {name: round(59 * recall(each.indices, relevant)) for name, each in found.items()}
    assert counts == {"uot cosine": 58, "uot l2": 56, "greedy l2": 51, "greedy cosine": 56}


@pytest.mark.parametrize(
    ("metric", "scale", "name"),
    (
        ("cosine", None, "cos_0p01"),
        ("cosine", 0.1, "cos_0p1"),
        ("l2", None, "l2raw_0p1"),
        ("l2", 1.0, "l2raw_1p0"),
    ),
)
@pytest.mark.parametrize("target", TARGETS)
def test_marginals_and_selected_classes_equal_those_of_the_authors_code(paper, target, metric, scale, name):
    source, means, expected = paper(target)
    selection = uot_selection(source["means"], means, metric=metric, cost_scale=scale)
    assert selection.converged and selection.iterations <= 30
    assert set(selection.indices.tolist()) == set(expected[f"top100_{name}"].tolist())
    marginal = expected[f"P1_{name}"]
    is_normal = marginal > np.finfo(np.float32).tiny  # those of dogs and l2 go down to 1e-41
    np.testing.assert_allclose(np.asarray(selection.similarity)[is_normal], marginal[is_normal], rtol=1e-4)
    assert np.all(np.asarray(selection.similarity)[~is_normal] <= np.finfo(np.float32).tiny)
    # The whole ranking, by the logarithm of the marginal; gaps below the rounding error may swap.
    assert np.all(np.diff(np.log(marginal[selection.ranking])) < 1e-4)


@pytest.mark.parametrize("metric", ("cosine", "l2"))
@pytest.mark.parametrize("target", TARGETS)
def test_greedy_selection_equals_that_of_the_authors_code(paper, target, metric):
    source, means, expected = paper(target)
    expected = {name: expected[f"{name}_got_{'cos' if metric == 'cosine' else metric}"] for name in ("dist", "top100")}
    # The authors weight a target class by its number of training images, which the values of 1,000 classes determine.
    each = np.stack([-greedy_ot_selection(source["means"], mean[None], 1, metric).similarity for mean in means], axis=1)
    weights = np.linalg.lstsq(each.astype(float), expected["dist"])[0]
    counts = np.round(weights / weights.max() * {"CUB": 30, "dogs": 100, "pets": 100}[target])
    assert counts.sum() == {"CUB": 5_994, "dogs": 12_000, "pets": 3_680}[target]
    selection = greedy_ot_selection(source["means"], means, metric=metric, target_counts=counts)
    np.testing.assert_allclose(-selection.similarity, expected["dist"], rtol=1e-5)
    assert set(selection.indices.tolist()) == set(expected["top100"].tolist())
    equal = greedy_ot_selection(source["means"], means, metric=metric)
    np.testing.assert_allclose(-equal.similarity, each.mean(axis=1), rtol=1e-5)


@pytest.mark.parametrize("metric", ("cosine", "l2"))
def test_selection_is_stable_for_cost_scales_from_0_001_to_1(paper, metric):
    source, target, _ = paper("pets")
    source = source["means"][::4]
    scales = jnp.array([0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0])

    def select(scale):
        return uot_selection(source, target, metric=metric, cost_scale=scale, max_iterations=50)

    selections = jax.jit(jax.vmap(select))(scales)  # one program for Figure 4a
    assert np.all(selections.converged)
    assert np.all(np.isfinite(selections.similarity)) and np.all(selections.similarity >= 0)
    one = uot_selection(source, target, metric=metric, cost_scale=0.1)
    np.testing.assert_allclose(selections.similarity[4], one.similarity, rtol=1e-4, atol=1e-30)
    with jax.enable_x64(True):
        exact = uot_selection(source.astype(float), target.astype(float), metric=metric, cost_scale=0.001)
    # Even at costs of thousands, and similarities of e^-thousands, only neighbours may swap.
    places = np.argsort(exact.ranking)[selections.ranking[0]]
    assert np.abs(places - np.arange(len(source))).max() <= 1


@pytest.mark.parametrize("metric", ("cosine", "l2"))
@pytest.mark.parametrize(
    ("epsilon", "tau_source", "tau_target"), ((1.0, 1.0, 100.0), (0.5, 3.0, 3.0), (2.0, 0.1, 10.0), (1.0, 50.0, 50.0))
)
def test_marginal_equals_that_of_pot(monkeypatch, metric, epsilon, tau_source, tau_target):
    monkeypatch.setenv("POT_BACKEND_DISABLE_PYTORCH", "1")  # takes seconds to import
    ot = pytest.importorskip("ot")
    for seed in range(3):
        source, target = means_of(np.random.default_rng(seed))
        cost = ot.dist(*(x.astype(float) for x in (source, target)), metric={"l2": "euclidean"}.get(metric, metric))
        plan = ot.unbalanced.sinkhorn_unbalanced(
            np.ones(60), np.ones(25), cost / 0.1, epsilon, (tau_source, tau_target), numItermax=20_000, stopThr=1e-12
        )
        selection = uot_selection(source, target, 10, metric, 0.1, epsilon, tau_source, tau_target)
        assert selection.converged
        np.testing.assert_allclose(selection.similarity, plan.sum(axis=1), rtol=1e-4)
        assert selection.indices.tolist() == np.argsort(-plan.sum(axis=1))[:10].tolist()


def test_similarity_is_the_marginal_of_a_fixed_point():
    source, target = means_of(np.random.default_rng(0))
    cost = np.array([[1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in target] for a in source]) / 0.01
    marginal = np.asarray(uot_selection(source, target, 5).similarity, float)
    # P = diag(u) K diag(v), where u^-1 = P 1 for tau = 1, and v^-100 = P' 1, which gives v from u.
    kernel = np.exp(-cost)
    v = (kernel.T @ (1 / marginal)) ** (-100 / 101)
    np.testing.assert_allclose(marginal, kernel @ v / marginal, rtol=1e-4)


@pytest.mark.parametrize("select", (uot_selection, greedy_ot_selection))
@pytest.mark.parametrize("metric", ("cosine", "l2"))
def test_selection_does_not_depend_on_the_order_of_the_classes(select, metric):
    rng = np.random.default_rng(0)
    source, target = means_of(rng)
    first = select(source, target, 20, metric)
    order, target_order = rng.permutation(len(source)), rng.permutation(len(target))
    second = select(source[order], target[target_order], 20, metric)
    assert order[second.indices].tolist() == first.indices.tolist()
    np.testing.assert_allclose(second.similarity, first.similarity[order], rtol=1e-4)


@pytest.mark.parametrize("select", (uot_selection, greedy_ot_selection))
def test_equal_classes_are_ranked_by_index(select):
    source, target = means_of(np.random.default_rng(0), s=6)
    selection = select(np.concatenate([source, source, source]), target, 18)
    assert selection.indices.reshape(6, 3).tolist() == [[i, i + 6, i + 12] for i in selection.indices[::3].tolist()]


def test_a_class_of_the_target_itself_is_the_most_similar():
    source, target = means_of(np.random.default_rng(0))
    source[17] = 3 * target[0]
    assert uot_selection(source, target[:1], 5).indices[0] == 17
    source[23] = target[0]
    assert greedy_ot_selection(source, target[:1], 5).indices[0] == 23
    assert greedy_ot_selection(source, target[:1], 5).similarity[23] == 0


def test_cosine_does_not_depend_on_the_lengths_of_the_means():
    rng = np.random.default_rng(0)
    source, target = means_of(rng)
    lengths = np.float32(10) ** rng.integers(-30, 30, size=(60, 1))
    expected, selection = (uot_selection(each, target, 10) for each in (source, source * lengths))
    np.testing.assert_allclose(selection.similarity, expected.similarity, rtol=1e-4)


def test_large_and_small_means_neither_overflow_nor_vanish():
    source, target = means_of(np.random.default_rng(0))
    for factor in (1e-25, 1e25):
        scaled = greedy_ot_selection(source * np.float32(factor), target * np.float32(factor), 10)
        expected = greedy_ot_selection(source, target, 10)
        np.testing.assert_allclose(scaled.similarity / factor, expected.similarity, rtol=1e-5)


@pytest.mark.parametrize("select", (uot_selection, greedy_ot_selection))
def test_jit_equals_eager(select):
    source, target = means_of(np.random.default_rng(0))
    jitted = jax.jit(lambda source, target: select(source, target, 10))(source, target)
    eager = select(source, target, 10)
    np.testing.assert_array_equal(jitted.indices, eager.indices)
    np.testing.assert_allclose(jitted.similarity, eager.similarity, rtol=1e-5)
    assert jitted.indices.dtype == jnp.int32 and jitted.similarity.dtype == jnp.float32


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_traced_means_that_are_not_finite_are_not_said_to_converge(value):
    source, target = means_of(np.random.default_rng(0))
    source[3, 2] = value
    for metric in ("cosine", "l2"):
        selection = jax.jit(lambda source, metric=metric: uot_selection(source, target, 10, metric))(source)
        assert not selection.converged and np.all(np.isnan(selection.similarity))


def test_too_few_iterations_are_said_not_to_converge():
    source, target = means_of(np.random.default_rng(0))
    few, enough = (uot_selection(source, target, 10, max_iterations=n) for n in (5, 100))
    assert not few.converged and few.iterations == 5
    assert enough.converged and enough.iterations < 40


def test_similarity_is_within_the_tolerance_of_the_limit_at_convergence(monkeypatch):
    source, target = means_of(np.random.default_rng(0))

    def similarities(source, target):
        taus = np.array([0.2, 1.0, 5.0])
        return jax.vmap(lambda tau: uot_selection(source, target, 10, "l2", 1.0, tau_source=tau, tau_target=5.0))(taus)

    stopped = similarities(source, target)
    monkeypatch.setattr(transport, "TOLERANCE", 1e-13)
    with jax.enable_x64(True):
        exact = jax.tree.map(np.asarray, similarities(source.astype(float), target.astype(float)))
    assert np.all(stopped.converged) and np.all(exact.converged) and exact.similarity.dtype == np.float64
    assert np.all(exact.iterations > stopped.iterations)
    np.testing.assert_allclose(stopped.similarity, exact.similarity, rtol=1.5e-5)


def test_a_cost_that_overflows_is_not_said_to_converge():
    source, target = (np.float32(1e38) * np.sign(x) for x in means_of(np.random.default_rng(0)))
    selection = uot_selection(source, target, 10, "l2", cost_scale=0.01)
    assert not selection.converged and np.all(np.isnan(selection.similarity))


def test_recall_counts_each_class_once():
    assert recall(jnp.array([1, 2, 3, 4]), np.array([4, 9, 1, 8])) == 0.5
    assert recall([], [1]) == 0
    assert recall([1, 1], [1, 1, 2]) == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (([1], []), "relevant is empty"),
        (([True, False], [1]), "flatnonzero"),
        (([1], [0.5]), "relevant holds float64"),
        (([[1]], [1]), r"indices holds int64 of shape \[1, 1\]"),
    ),
)
def test_recall_refuses_what_are_no_classes(arguments, message):
    with pytest.raises(InputError, match=message):
        recall(*arguments)


def changed(index, value, name="source"):
    def change(source, target):
        (source if name == "source" else target)[index] = value

    return change


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    (
        (changed(7, math.nan), {}, r"source_means\[7\] holds NaN \(1 of 60 rows do\): a class without images"),
        (changed((2, 3), math.nan, "target"), {}, r"target_means\[2\] holds NaN"),
        (changed((2, 3), math.inf), {}, r"source_means\[2\] holds an infinite value"),
        (changed(slice(4, 6), 0), {}, r"source_means\[4\] is a zero vector \(2 of 60 rows are\).*metric=\"l2\""),
        (changed(0, 0, "target"), {}, r"target_means\[0\] is a zero vector"),
        (None, {"num_selected": 61}, "num_selected = 61, but source_means holds 60 classes: select at most 60"),
        (None, {"num_selected": 0}, "num_selected is 0: expected a whole number of at least 1"),
        (None, {"num_selected": 2.5}, "num_selected is 2.5"),
        (None, {"metric": "cosin"}, "Unknown metric: 'cosin'. Did you mean 'cosine'"),
    ),
)
@pytest.mark.parametrize("select", (uot_selection, greedy_ot_selection))
def test_wrong_arguments_are_refused(select, change, settings, message):
    source, target = means_of(np.random.default_rng(0))
    if change:
        change(source, target)
    with pytest.raises(InputError, match=message) as error:
        select(source, target, **{"num_selected": 10, "metric": "cosine"} | settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("counts", "message"),
    (
        (np.ones(24), "target_counts holds 24 numbers: expected one for each of 25 target classes"),
        (np.arange(25), r"target_counts\[0\] is 0: expected a positive number"),
        (np.full(25, math.nan), r"target_counts\[0\] is nan"),
        (np.ones((25, 1)), r"target_counts has the shape \[25, 1\]"),
    ),
)
def test_wrong_counts_are_refused(counts, message):
    source, target = means_of(np.random.default_rng(0))
    with pytest.raises(InputError, match=message):
        greedy_ot_selection(source, target, 10, target_counts=counts)


def test_means_of_different_widths_are_refused():
    with pytest.raises(InputError, match="source_means has 16 features and target_means 15: expected the same"):
        uot_selection(np.ones((5, 16)), np.ones((5, 15)), 2)
    with pytest.raises(InputError, match=r"target_means has the shape \[16\]: expected \[t, d\]"):
        uot_selection(np.ones((5, 16)), np.ones(16), 2)


@pytest.mark.parametrize("name", ("cost_scale", "epsilon", "tau_source", "tau_target"))
@pytest.mark.parametrize("value", (0, -1.0, math.nan, math.inf, "1", True))
def test_numbers_out_of_range_are_refused(name, value):
    source, target = means_of(np.random.default_rng(0))
    with pytest.raises(InputError, match=f"{name} is .*: expected a positive number"):
        uot_selection(source, target, 10, **{name: value})
    with pytest.raises(InputError, match="max_iterations is 0"):
        uot_selection(source, target, 10, max_iterations=0)


def test_zero_vectors_have_distances():
    source, target = means_of(np.random.default_rng(0))
    source[0] = 0
    assert greedy_ot_selection(source, target, 10).converged
    assert uot_selection(source, target, 10, "l2").converged


def test_import_does_not_import_ott():
    code = "import sys, jax_transfer.selection; sys.exit(any(name.split('.')[0] == 'ott' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
