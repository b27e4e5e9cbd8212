"""Grids of a probe's settings: their points, the choice among them, and what is reported of each."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers.features import PROBE_SETTINGS, blobs
from jax_transfer.data.subsets import stratified_split
from jax_transfer.records import InputError
from jax_transfer.training.optimizers import SCHEDULES, OptimizerSettings, make_schedule
from jax_transfer.transfer import probe as probes
from jax_transfer.transfer.probe import PROTOCOLS, grid_points, probe
from jax_transfer.transfer.softmax_regression import CHOICES, ProbeSettings, cross_entropy, minibatch

# The first one of each is not the best.
GRIDS = {
    "probe": {"learning_rates": (1e-6, 1e-3, 0.1), "weight_decays": (0.0, 0.3)},
    "probe_converged": {"l2": (100.0, 1e-3, 0.3)},
}
each_protocol = pytest.mark.parametrize("name", PROTOCOLS)


def grid_settings(name, **changes):
    return dataclasses.replace(PROBE_SETTINGS, epochs=5, num_seeds=2, **GRIDS[name], **changes)


def test_points_are_the_product_with_the_learning_rate_outermost():
    settings = ProbeSettings(learning_rates=(0.1, 0.01), weight_decays=(0.0, 0.5), l2=(1.0, 2.0))
    pairs = [(point["learning_rate"], point["weight_decay"]) for point in grid_points(PROTOCOLS["probe"], settings)]
    assert pairs == [(0.1, 0.0), (0.1, 0.5), (0.01, 0.0), (0.01, 0.5)]
    assert grid_points(PROTOCOLS["probe_converged"], settings) == ({"l2": 1.0}, {"l2": 2.0})


def one_by_one(name, settings, train, test):
    """Returns accuracy(i, s, point): fits a single classifier to checkpoint i with seed s and tests it."""
    (x, y), (x_test, y_test) = train, test
    keys = jax.random.split(jax.random.key(0), settings.num_seeds)
    fit = jax.jit(functools.partial(PROTOCOLS[name].fit, indices=np.arange(len(y)), num_classes=3, settings=settings))

    def accuracy(i, s, point):
        weights = fit(x[i], jnp.asarray(y), key=keys[s], **point)
        predicted = (x_test[i] @ weights["w"] + weights["b"]).argmax(-1)
        return (predicted == y_test).mean(), np.mean([(predicted == y_test)[y_test == c].mean() for c in range(3)])

    return accuracy


@pytest.mark.parametrize("choose", CHOICES)
@each_protocol
def test_choice_equals_a_loop_over_single_fits(name, choose):
    """Each point is fitted by itself on the stratified split, and the best one again on all rows."""
    (x, y), test = blobs(spread=1.2)
    settings = grid_settings(name, choose=choose)
    found = probe(PROTOCOLS[name], (x, y), test, 3, settings, seed=0)
    rows, held_out = stratified_split(y)
    train, tested = ((x[:, rows], y[rows]), (x[:, held_out], y[held_out])) if choose == "validation" else ((x, y), test)
    sweep, refit = one_by_one(name, settings, train, tested), one_by_one(name, settings, (x, y), test)
    assert (found.grid.num_train, found.grid.num_test) == (len(train[1]), len(tested[1]))
    for i, s in np.ndindex(2, 2):
        accuracies, by_class = np.transpose([sweep(i, s, point) for point in found.points])
        np.testing.assert_allclose(found.grid.accuracy[i, s], accuracies, rtol=1e-6)
        np.testing.assert_allclose(found.grid.mean_class_accuracy[i, s], by_class, rtol=1e-6)
        assert found.chosen[i, s] == accuracies.argmax() > 0 and len(set(accuracies)) > 1
        result = found.accuracy[i, s], found.mean_class_accuracy[i, s]
        np.testing.assert_allclose(result, refit(i, s, found.points[accuracies.argmax()]), rtol=1e-6)


@each_protocol
def test_best_on_test_is_the_largest_accuracy_of_the_grid(name):
    train, test = blobs(spread=1.2)
    found = probe(PROTOCOLS[name], train, test, 3, grid_settings(name, choose="test"), seed=0, keep_weights=True)
    np.testing.assert_array_equal(found.accuracy, found.grid.accuracy.max(-1))
    with jax.default_matmul_precision("float32"):
        predicted = (test[0][:, None] @ found.weights["w"] + found.weights["b"][:, :, None]).argmax(-1)
    np.testing.assert_array_equal((predicted == test[1]).mean(-1), found.accuracy)


@each_protocol
def test_first_of_equal_points_is_chosen(name):
    train, test = blobs(spread=0.01)  # every classifier is perfect
    settings = dataclasses.replace(PROBE_SETTINGS, learning_rates=(0.03, 0.02), l2=(1e-3, 1e-2))
    found = probe(PROTOCOLS[name], train, test, 3, settings, seed=0)
    assert np.all(found.grid.accuracy == 1) and not found.chosen.any()


@each_protocol
def test_a_grid_takes_two_programs_and_a_choice_on_test_one(name):
    train, test = blobs(k=3, n=90)
    for choose, programs in (("validation", 2), ("test", 1)):
        before = probes._fit_and_count_jit._cache_size()
        probe(PROTOCOLS[name], train, test, 3, grid_settings(name, choose=choose), seed=0)
        assert probes._fit_and_count_jit._cache_size() == before + programs


@each_protocol
def test_single_point_has_no_grid(name):
    train, test = blobs(n=60)
    assert probe(PROTOCOLS[name], train, test, 3, PROBE_SETTINGS, seed=0).grid is None


def test_larger_validation_fraction_holds_out_more():
    train, test = blobs()
    grid = probe(PROTOCOLS["probe_converged"], train, test, 3, grid_settings("probe_converged"), 0).grid
    half = grid_settings("probe_converged", validation_fraction=0.5)
    other = probe(PROTOCOLS["probe_converged"], train, test, 3, half, 0).grid
    assert grid.num_train + grid.num_test == other.num_train + other.num_test == 300
    assert grid.num_test == pytest.approx(60, abs=2) and other.num_test == pytest.approx(150, abs=2)


def test_single_image_in_each_class_cannot_be_held_out():
    train, test = blobs(n=3)
    train = train[0], np.arange(3)
    with pytest.raises(InputError, match=r"No class has two training images.*give each setting a single value"):
        probe(PROTOCOLS["probe"], train, test, 3, grid_settings("probe"), seed=0)


# --- Adam's schedule and weight decay


SCHEDULED = {
    "constant": {},
    "cosine": {"min_learning_rate": 0.01},
    "step": {"milestones": (0.25, 0.5), "decay_factor": 0.2},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("weight_decay", (0.0, 0.1))
def test_minibatch_equals_a_loop_of_adam_with_the_schedule(schedule, weight_decay):
    """The whole training set is the batch, so that the order of the batches does not matter."""
    (x, y), _ = blobs(k=1, n=40)
    x, y, key = jnp.asarray(x[0]), jnp.asarray(y), jax.random.key(3)
    changes = {"schedule": schedule, **SCHEDULED[schedule]}
    settings = ProbeSettings(epochs=8, batch_size=40, learning_rates=(0.1,), **changes)
    found = minibatch(x, y, np.arange(40), 0.1, key, 3, settings, weight_decay=weight_decay)
    rates = make_schedule(OptimizerSettings(learning_rate=0.1, **changes), 8)
    adam = optax.scale_by_adam()
    weights = probes.gaussian_start(jax.random.split(key)[0], 6, 3)
    moments = adam.init(weights)
    for i in range(8):
        gradient = jax.tree.map(lambda g, w: g + weight_decay * w, jax.grad(cross_entropy)(weights, x, y), weights)
        update, moments = adam.update(gradient, moments)
        weights = jax.tree.map(lambda w, u, i=i: w - rates(i) * u, weights, update)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, weights)


def test_probe_uses_the_schedule_and_the_weight_decay():
    train, test = blobs(k=1, n=90)
    changed = ({}, {"schedule": "cosine"}, {"schedule": "cosine", "weight_decays": (0.5,)})
    results = [
        probe(
            PROTOCOLS["probe"], train, test, 3, dataclasses.replace(PROBE_SETTINGS, **one), 0, keep_weights=True
        ).weights["w"]
        for one in changed
    ]
    assert min(np.abs(a - b).max() for a, b in itertools.combinations(results, 2)) > 1e-2


def test_probe_equals_torch_with_weight_decay():
    torch = pytest.importorskip("torch")
    (x, y), _ = blobs(k=1, n=40)
    x, y, key = jnp.asarray(x[0]), jnp.asarray(y), jax.random.key(1)
    settings = ProbeSettings(epochs=9, batch_size=40, schedule="step", milestones=(1 / 3, 2 / 3))
    found = minibatch(x, y, np.arange(40), 0.1, key, 3, settings, weight_decay=0.05)
    start = probes.gaussian_start(jax.random.split(key)[0], 6, 3)
    layer = torch.nn.Linear(6, 3)
    with torch.no_grad():
        layer.weight[:] = torch.tensor(np.asarray(start["w"]).T.copy())
        layer.bias.zero_()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 6])
    for _ in range(9):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(layer(torch.tensor(np.array(x))), torch.tensor(np.array(y)).long()).backward()
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(found["w"], layer.weight.detach().numpy().T, rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(found["b"], layer.bias.detach().numpy(), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "linear"}, r"Unknown schedule .*'linear'.*Valid: constant, cosine, step"),
        ({"choose": "best"}, r"Unknown choice .*'best'.*Valid: test, validation"),
        ({"milestones": (1.5,)}, r"milestones\[0\] = 1\.5: must lie in \[0, 1\]"),
        ({"min_learning_rate": 0.05, "learning_rates": (0.1, 0.01)}, r"must lie between 0 and learning_rates = "),
        ({"weight_decays": ()}, r"weight_decays is empty"),
        ({"weight_decays": (-1.0,)}, r"weight_decays\[0\] = -1\.0: must not be negative"),
        ({"learning_rates": (0.1, 0.1)}, r"learning_rates lists 0\.1 twice"),
    ],
)
def test_invalid_settings_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        ProbeSettings(**changes)
