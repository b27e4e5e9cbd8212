"""Linear probes and fine-tuning."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from helpers.features import PROBE_SETTINGS, blobs
from helpers.training_parts import PREPROCESSING, assert_equal_trees, tiny_net
from jax_transfer import devices
from jax_transfer.checkpoints import Checkpoint
from jax_transfer.data.augment import AUGMENTATIONS
from jax_transfer.data.batches import joined, make_feed
from jax_transfer.data.crops import crops_of
from jax_transfer.data.sources import from_arrays
from jax_transfer.features import extract
from jax_transfer.models import MODELS
from jax_transfer.models.net import with_new_head, with_projection
from jax_transfer.records import InputError
from jax_transfer.training.evaluation import classification
from jax_transfer.training.loop import train
from jax_transfer.training.objectives import REUSE
from jax_transfer.training.objectives.supervised import supervised
from jax_transfer.training.optimizers import OptimizerSettings, make_optimizer
from jax_transfer.training.state import evaluated, init_state
from jax_transfer.training.steps import make_train_step, many_steps_of_many
from jax_transfer.transfer import probe as probes
from jax_transfer.transfer.finetune import Candidate, FinetuneSettings, finetune, grid, random_head, total_steps
from jax_transfer.transfer.probe import PROTOCOLS, probe


@pytest.mark.parametrize("name", PROTOCOLS)
def test_probe_of_a_stack_equals_single_probes(name):
    train, test = blobs()
    together = probe(PROTOCOLS[name], train, test, 3, PROBE_SETTINGS, seed=0)
    for i in range(2):
        alone = probe(
            PROTOCOLS[name], (train[0][i : i + 1], train[1]), (test[0][i : i + 1], test[1]), 3, PROBE_SETTINGS, seed=0
        )
        assert alone.accuracy[0] == pytest.approx(together.accuracy[i], abs=0.011)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_probe_ranks_clean_above_noisy_and_needs_labels(name):
    train, test = blobs()
    result = probe(PROTOCOLS[name], train, test, 3, PROBE_SETTINGS, seed=0)
    assert result.accuracy.shape == (2, 1)
    assert result.accuracy[0, 0] > result.accuracy[1, 0] + 0.05
    shuffled = np.random.default_rng(1).permutation(train[1])
    assert probe(PROTOCOLS[name], (train[0], shuffled), test, 3, PROBE_SETTINGS, seed=0).accuracy[0, 0] < 0.6


@pytest.mark.parametrize("name", PROTOCOLS)
def test_probe_gflops_count_the_steps_of_one_grid_point(name):
    train, test = blobs(k=1)
    one = dataclasses.replace(PROBE_SETTINGS, epochs=2)
    two = dataclasses.replace(one, learning_rates=(0.01, 0.02), l2=(1e-1, 1e-3))
    products = 2 * 2 * train[0].size * 3 / 1e9  # logits and gradient, in one pass over the data
    single, swept = (probe(PROTOCOLS[name], train, test, 3, settings, seed=0) for settings in (one, two))
    assert 2 * products * 0.9 < single.gflops < (6 * products if name == "probe" else 1000 * products)
    if name == "probe":  # of equal work, but for the rows that do not fill a batch
        assert swept.gflops == single.gflops and 0.7 * single.gflops < swept.grid.gflops < 0.9 * single.gflops
    else:  # the work depends on the regularisation
        assert 0.2 * single.gflops < swept.grid.gflops < 5 * single.gflops
    on_test = probe(PROTOCOLS[name], train, test, 3, dataclasses.replace(two, choose="test"), seed=0)
    assert on_test.gflops == on_test.grid.gflops > swept.grid.gflops


def test_converged_probe_equals_scikit_learn():
    (x, y), (x_test, _) = blobs(k=1)
    x = x[0]
    l2 = 0.01
    weights = jax.jit(functools.partial(probes.converged, num_classes=3, settings=PROBE_SETTINGS))(
        x, y, np.arange(len(y)), l2, jax.random.key(0)
    )
    scale = x.std(0).max()  # the probe regularises features divided by this scale
    peer = LogisticRegression(C=1 / (l2 * len(y)), tol=1e-8, max_iter=1000).fit((x - x.mean(0)) / scale, y)
    ours = jax.nn.softmax(x_test[0] @ weights["w"] + weights["b"])
    np.testing.assert_allclose(ours, peer.predict_proba((x_test[0] - x.mean(0)) / scale), atol=2e-3)


def _objective(w, b, x, y, l2):
    """Returns the mean cross-entropy + l2 / 2 ||w||^2 in float64."""
    logits = x @ w + b
    shifted = logits - logits.max(1, keepdims=True)
    loss = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(y)), y]
    return loss.mean() + 0.5 * l2 * (w**2).sum()


CONVERGED = {
    "overlapping": (0.7, lambda x: x),
    "separable": (0.05, lambda x: x),
    "offset by 100": (0.7, lambda x: x + 100),
    "rank 3": (0.7, lambda x: x[:, :3] @ np.random.default_rng(1).normal(size=(3, 6))),
    "d > n": (0.7, lambda x: np.random.default_rng(1).normal(size=(40, 90))),
    "scales 1e-2 to 1": (0.7, lambda x: x * np.logspace(-2, 0, 6)),
    "scale 1e18": (0.7, lambda x: 1e18 * x),
}


@pytest.mark.parametrize("case", CONVERGED)
def test_converged_probe_reaches_the_minimum_for_each_l2(case):
    spread, change = CONVERGED[case]
    (x, y), _ = blobs(k=1, spread=spread)
    x = change(x[0]).astype(np.float32)
    y = y[: len(x)]
    l2 = np.array([1e-3, 1e-5, 1e-1], np.float32)
    fit = jax.jit(functools.partial(probes.converged, num_classes=4, settings=PROBE_SETTINGS))  # class 3 has no samples
    weights = jax.tree.map(np.float64, fit(x, y, np.arange(len(y)), l2, jax.random.key(0)))
    x = x.astype(np.float64)
    scale = x.std(0).max()
    z = (x - x.mean(0)) / scale
    for i, value in enumerate(l2.tolist()):
        peer = LogisticRegression(C=1 / (value * len(y)), tol=1e-10, max_iter=100_000).fit(z, y)
        minimum = _objective(peer.coef_.T, peer.intercept_, z, y, value)
        w = weights["w"][i] * scale
        ours = _objective(w, weights["b"][i] + x.mean(0) @ weights["w"][i], z, y, value)
        assert minimum * (1 - 1e-5) < ours < minimum * (1 + 5e-6)
        assert not np.any(weights["w"][i][:, 3]) and (x @ weights["w"][i] + weights["b"][i]).argmax(1).max() < 3


def test_converged_probe_is_the_same_for_all_seeds():
    train, test = blobs()
    settings = dataclasses.replace(PROBE_SETTINGS, num_seeds=3, l2=(1e-1, 1e-4))
    result = probe(PROTOCOLS["probe_converged"], train, test, 3, settings, seed=0)
    assert result.accuracy.shape == result.mean_class_accuracy.shape == result.chosen.shape == (2, 3)
    for by_seed in (result.accuracy, result.mean_class_accuracy, result.chosen):
        assert np.all(by_seed == by_seed[:, :1])


@pytest.mark.parametrize(
    ("name", "field", "good", "bad"), [("probe", "learning_rates", 0.01, 1e-7), ("probe_converged", "l2", 1e-3, 1e4)]
)
def test_validation_chooses_the_better_candidate(name, field, good, bad):
    train, test = blobs()
    settings = dataclasses.replace(PROBE_SETTINGS, **{field: (bad, good)})
    result = probe(PROTOCOLS[name], train, test, 3, settings, seed=0)
    assert np.all(result.chosen == 1) and good in result.points[1].values()


@pytest.mark.parametrize("name", PROTOCOLS)
def test_chosen_candidate_does_not_depend_on_test_labels(name):
    train, test = blobs()
    settings = dataclasses.replace(PROBE_SETTINGS, learning_rates=(1e-3, 1e-2, 1e-1), l2=(1e-4, 1e-2, 1.0))
    chosen = probe(PROTOCOLS[name], train, test, 3, settings, seed=0).chosen
    relabelled = (test[0], (test[1] + 1) % 3)
    np.testing.assert_array_equal(chosen, probe(PROTOCOLS[name], train, relabelled, 3, settings, seed=0).chosen)


def test_seeds_differ_and_are_reproducible():
    train, test = blobs(spread=1.5)
    settings = dataclasses.replace(PROBE_SETTINGS, num_seeds=3, epochs=2)
    first = probe(PROTOCOLS["probe"], train, test, 3, settings, seed=0).accuracy
    np.testing.assert_array_equal(first, probe(PROTOCOLS["probe"], train, test, 3, settings, seed=0).accuracy)
    assert len(np.unique(first[0])) > 1


def test_mean_class_accuracy_weighs_classes_equally():
    x_test = np.concatenate([np.full((90, 1), -1.0), np.full((10, 1), -1.0)])[None].astype(np.float32)
    y_test = np.array([0] * 90 + [1] * 10, np.int32)
    x = np.array([[-1.0], [1.0]] * 50, np.float32)[None]
    result = probe(
        PROTOCOLS["probe"], (x, np.array([0, 1] * 50, np.int32)), (x_test, y_test), 2, PROBE_SETTINGS, seed=0
    )
    assert result.accuracy[0, 0] == pytest.approx(0.9) and result.mean_class_accuracy[0, 0] == pytest.approx(0.5)


@functools.cache
def _images(split):
    rng = np.random.default_rng(0 if split == "train" else 1)
    labels = np.arange(48) % 3
    images = rng.integers(0, 60, (48, 8, 8, 3)) + 70 * labels[:, None, None, None]
    return from_arrays(images.astype(np.uint8), labels.astype(np.int32), name="shades", split=split)


def _feed(split, mesh):
    return make_feed(_images(split), PREPROCESSING, mesh, 1.0, num_threads=2)


def _models(net, seeds):
    """Returns name -> checkpoint with random weights, one for each seed."""
    return {f"m{s}": Checkpoint(f"m{s}", net, *net.init(jax.random.key(s)), PREPROCESSING) for s in seeds}


def _finetune(net, checkpoints, settings, candidates=None, mesh=None, **options):
    mesh = mesh or devices.make_mesh(sweep=jax.device_count())
    feed = joined({"train": (_feed("train", mesh), settings.batch_size)})
    candidates = candidates or [Candidate(name, 2) for name in checkpoints]
    make_objective = functools.partial(supervised, net, settings.augment)
    options = {"eval_batch_size": 16, **options}
    test = _feed("test", mesh)
    return list(
        finetune(checkpoints, candidates, net, make_objective, feed, test, PREPROCESSING, settings, mesh, **options)
    )


def test_finetuning_learns_independently_of_other_candidates():
    net = MODELS["resnet10"](num_classes=3, stem="cifar", width=8)
    source = MODELS["resnet10"](num_classes=7, stem="cifar", width=8)  # its head will be replaced
    models = _models(source, range(3))
    settings = FinetuneSettings(epochs=12, batch_size=16, optimizer=OptimizerSettings(learning_rate=0.05))
    together = _finetune(net, models, settings, [Candidate(name, 0) for name in models])
    assert [r.index for r in together] == [0, 1, 2]
    assert all(r.metrics["accuracy"] > 0.8 and r.gflops > 0 for r in together)
    (alone,) = _finetune(net, models, settings, [Candidate("m2", 0)])
    assert alone.metrics == together[2].metrics
    assert_equal_trees(alone.model, together[2].model)


def test_a_projection_of_the_checkpoint_changes_nothing():
    net = _tuned_net()
    plain = _models(net, [5])["m5"]
    projected = with_projection(net, (16, 8))
    params = {**plain.params, "projection": projected.init(jax.random.key(1))[0]["projection"]}
    kept = Checkpoint("m5", projected, params, plain.stats, PREPROCESSING)
    settings = FinetuneSettings(steps=3, batch_size=16, optimizer=OptimizerSettings(learning_rate=0.05))
    (expected,), (found,) = (_finetune(net, {"m5": checkpoint}, settings) for checkpoint in (plain, kept))
    assert found.metrics == expected.metrics
    assert_equal_trees(found.model, expected.model)


_tuned_net = functools.cache(lambda: MODELS["resnet10"](num_classes=3, stem="cifar", width=4))


def _tune(settings, epochs=()):
    return _finetune(_tuned_net(), _models(_tuned_net(), [5]), settings, epochs=epochs)


def _whole_run(settings, seed=2):
    """Returns epoch -> (accuracy, parameters) of the whole schedule, run by the training loop alone."""
    net, mesh = _tuned_net(), devices.make_mesh(sweep=jax.device_count())
    feed, test = joined({"train": (_feed("train", mesh), settings.batch_size)}), _feed("test", mesh)
    total = total_steps(settings, 48, "")
    objective, optimizer = supervised(net, settings.augment), make_optimizer(settings.optimizer, total)
    memory = {"remat": settings.remat, "microbatches": settings.microbatches}
    step = make_train_step(objective, optimizer, PREPROCESSING, feed.num_classes, **memory)
    measure = classification(net, PREPROCESSING, mesh)
    params, stats = net.init(jax.random.key(5))
    head = jax.random.fold_in(jax.random.key(seed), 0x4EAD)
    params = jax.jit(lambda params: with_new_head(params, net, head))(params)
    state = init_state(objective, optimizer, seed, {"params": params, "stats": stats})
    state = devices.split(jax.tree.map(lambda x: np.stack([x] * jax.device_count()), state), mesh, "sweep")
    found = {}
    for epoch in train(state, many_steps_of_many(step, feed.fetch, mesh), feed, seed=seed, total_steps=total, what=""):
        model = evaluated(objective, epoch.state)
        params = jax.device_get(jax.tree.map(lambda x: x[0], model["params"]))
        found[epoch.number] = measure(model, test, 16)[0]["accuracy"], params
    return found


# With three steps per epoch; the schedule of 17 steps ends within its sixth epoch.
COSINE = OptimizerSettings(schedule="cosine", warmup=0.2)
STEP = OptimizerSettings(schedule="step", milestones=(0.1, 0.5))
SCHEDULES = {
    "cosine": FinetuneSettings(epochs=6, batch_size=16, augment=("flip",), optimizer=COSINE),
    "step": FinetuneSettings(steps=17, batch_size=16, optimizer=STEP),
    "parts": FinetuneSettings(epochs=6, batch_size=16, augment=("mixup",), optimizer=STEP, remat=True, microbatches=4),
}


@pytest.mark.parametrize(
    ("kind", "epochs"), [pytest.param("cosine", (1, 5), marks=pytest.mark.slow), ("step", (1, 2, 5)), ("parts", (1, 2))]
)
def test_early_stop_equals_the_full_schedule_at_that_epoch(kind, epochs):
    whole, stopped = _whole_run(SCHEDULES[kind]), _tune(SCHEDULES[kind], epochs)
    assert [done.epoch for done in stopped] == list(epochs)
    for done in stopped:
        accuracy, params = whole[done.epoch]
        assert done.metrics["accuracy"] == accuracy and done.diverged_at is None
        assert_equal_trees(done.model["params"], params)
    assert [done.gflops / stopped[0].gflops for done in stopped] == pytest.approx([e / epochs[0] for e in epochs])
    seconds = [done.seconds for done in stopped]
    assert seconds[0] > 0 and seconds == sorted(seconds)
    if epochs == (1, 5):
        (end,) = _tune(SCHEDULES[kind])
        assert (end.epoch, end.metrics["accuracy"]) == (6, whole[6][0])
        assert end.gflops == pytest.approx(6 * stopped[0].gflops)


def test_work_of_a_model_does_not_depend_on_how_memory_is_saved():
    settings = FinetuneSettings(steps=1, batch_size=16)
    (plain,), (saving,) = _tune(settings), _tune(dataclasses.replace(settings, remat=True, microbatches=4))
    assert plain.gflops == saving.gflops > 0


def test_too_short_schedule_is_rejected_before_training():
    for settings in (FinetuneSettings(epochs=4, batch_size=16), FinetuneSettings(steps=14, batch_size=16)):
        with pytest.raises(InputError, match=r"shades ends after 4(\.67)? epochs and cannot be tested after 5"):
            _tune(settings, (1, 5))


@pytest.mark.parametrize("explodes", [2, 3])
def test_later_divergence_does_not_invalidate_earlier_stops(explodes):
    """The learning rate is 1e30 in the update of one step (of three per epoch); then the loss is not finite."""
    optimizer = OptimizerSettings(learning_rate=0.01, schedule="step", milestones=(explodes / 9,), decay_factor=1e32)
    first, second = _tune(FinetuneSettings(epochs=3, batch_size=16, optimizer=optimizer), (1, 2))
    assert np.isnan(second.metrics["accuracy"]) and second.diverged_at == explodes + 1
    if explodes < 3:  # also if the last update of the epoch broke the model and no loss shows it yet
        assert np.isnan(first.metrics["accuracy"]) and first.diverged_at == explodes + 1
    else:
        assert first.diverged_at is None and 0 <= first.metrics["accuracy"] <= 1


@functools.cache
def _compilations():
    """Returns a list that grows by one entry with every compilation from now on."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    return compiled


def test_one_compilation_serves_all_checkpoints_seeds_and_rates():
    net, mesh = MODELS["resnet10"](num_classes=3, stem="cifar", width=8), devices.make_mesh(sweep=jax.device_count())
    settings = FinetuneSettings(epochs=3, batch_size=16, optimizer=OptimizerSettings(schedule="cosine", warmup=0.1))
    models, compiled = _models(net, range(2)), _compilations()
    changes = [{"learning_rate": rate, "weight_decay": decay} for rate in (0.05, 0.01) for decay in (0.0, 1e-3)]
    candidates = [Candidate(name, seed, change) for seed in (0, 1) for change in changes for name in models]
    feed = joined({"train": (_feed("train", mesh), 16)})
    make_objective, test = functools.partial(supervised, net, ()), _feed("test", mesh)
    counts, seen = [], set()
    arguments = (models, candidates, net, make_objective, feed, test, PREPROCESSING, settings, mesh)
    for done in finetune(*arguments, epochs=(1, 2), eval_batch_size=16):
        counts.append(len(compiled))
        seen.add((done.index, done.epoch))
    assert len(seen) == len(counts) == 32 and counts[0] > 0 and counts[0] == counts[-1]
    forward = extract.make_forward(net, PREPROCESSING, mesh)
    extract.extract(forward, models["m0"].model, test, 20)
    before = len(compiled)
    extract.extract(forward, models["m1"].model, test, 20)
    assert len(compiled) == before


def test_sweep_candidate_equals_single_run_with_its_settings():
    net = _tuned_net()
    models = _models(net, [5])
    plain = FinetuneSettings(epochs=4, batch_size=16, optimizer=OptimizerSettings(learning_rate=0.9, weight_decay=0.5))
    changes = [{"learning_rate": 0.02, "weight_decay": 0.0}, {"learning_rate": 0.05, "weight_decay": 0.01}]
    swept = _finetune(net, models, plain, [Candidate("m5", 2, change) for change in changes])
    for change, found in zip(changes, swept, strict=True):
        optimizer = dataclasses.replace(plain.optimizer, **change)
        (alone,) = _finetune(net, models, dataclasses.replace(plain, optimizer=optimizer))
        assert abs(alone.metrics["accuracy"] - found.metrics["accuracy"]) <= 1 / 48
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
            alone.model["params"],
            found.model["params"],
        )
    assert swept[0].metrics != swept[1].metrics or any(
        jax.tree.leaves(jax.tree.map(lambda a, b: (a != b).any(), swept[0].model["params"], swept[1].model["params"]))
    )


def test_objective_settings_may_differ_between_candidates():
    net, settings = _tuned_net(), FinetuneSettings(epochs=2, batch_size=16)
    candidates = [Candidate("m5", 2, {"label_smoothing": value}) for value in (0.0, 0.9)]
    sharp, smooth = _finetune(net, _models(net, [5]), settings, candidates)
    (alone,) = _finetune(net, _models(net, [5]), settings)
    kernel = [np.asarray(done.model["params"]["fc"]["kernel"]) for done in (sharp, alone, smooth)]
    np.testing.assert_allclose(kernel[0], kernel[1], rtol=1e-3, atol=1e-5)
    assert np.abs(kernel[2] - kernel[1]).max() > 1e-3
    with pytest.raises(ValueError, match="must change the same settings"):
        _finetune(net, _models(net, [5]), settings, [candidates[0], Candidate("m5", 2)])


# --- with pre-training data

SOURCE_CLASSES = 5


@functools.cache
def _source_images():
    rng = np.random.default_rng(7)
    labels = np.arange(40) % SOURCE_CLASSES
    images = rng.integers(0, 60, (40, 8, 8, 3)) + 40 * labels[:, None, None, None]
    return from_arrays(images.astype(np.uint8), labels.astype(np.int32), name="tints", split="train")


def _arrays(net, seed):
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(net.feature_dim, SOURCE_CLASSES)).astype(np.float32)
    return {
        "relationship": rng.dirichlet(np.ones(SOURCE_CLASSES), 3).astype(np.float32),
        "source_head": {"kernel": kernel, "bias": np.zeros(SOURCE_CLASSES, np.float32)},
    }


def _reuse(name, net, settings, candidates, epochs=(), **fixed):
    """Fine-tunes from one checkpoint with an objective of REUSE; `fixed` are arguments of the objective."""
    reuse, mesh = REUSE[name], devices.make_mesh(sweep=jax.device_count())
    given = {"num_source_classes": SOURCE_CLASSES, "head_std": settings.head_std}
    make = functools.partial(
        reuse.make, net, settings.augment, **{name: given[name] for name in reuse.settings}, **fixed
    )
    views = make(**{"source_weight": 0.0, **candidates[0].changes, **candidates[0].arrays}).views
    sources = {"train": (_images("train"), 16), "source": (_source_images(), 8)}
    feeds = {}
    for feed in views:
        source, batch_size = sources[feed]
        feeds[feed] = (make_feed(source, PREPROCESSING, mesh, 1.0, 2, crops=crops_of(views[feed])), batch_size)
    test = _feed("test", mesh)
    yield from finetune(
        _models(net, [5]), candidates, net, make, joined(feeds), test, PREPROCESSING, settings, mesh,
        epochs=epochs, eval_batch_size=16,
    )  # fmt: skip


REUSED = FinetuneSettings(
    epochs=3,
    batch_size=16,
    augment=("resized_crop", "flip"),
    optimizer=OptimizerSettings(learning_rate=0.02, head_learning_rate_factor=10.0),
)


@pytest.fixture
def _quick_strong_views(monkeypatch):
    """RandAugment, which has its own tests, takes seconds to compile."""
    monkeypatch.setitem(AUGMENTATIONS, "rand_augment_fixmatch", AUGMENTATIONS["color_jitter"])


@pytest.mark.usefixtures("_quick_strong_views")
@pytest.mark.parametrize("name", REUSE)
def test_weights_of_the_source_share_one_program_and_equal_separate_runs(name):
    net, weights, compiled = tiny_net(3, batch_norm=True), (0.1, 1.0, 3.0), _compilations()
    arrays = _arrays(net, 0) if REUSE[name].arrays else {}
    swept, counts = [], []
    for done in _reuse(name, net, REUSED, [Candidate("m5", 2, {"source_weight": w}, arrays) for w in weights], (1, 2)):
        swept.append(done)
        counts.append(len(compiled))
    assert [(done.index, done.epoch) for done in sorted(swept, key=lambda done: done.index)] == [
        (index, epoch) for index in range(3) for epoch in (1, 2)
    ]
    assert counts[0] > 0 and counts[0] == counts[-1]
    assert all(0 <= done.metrics["accuracy"] <= 1 and done.gflops > 0 for done in swept)
    last = {done.index: done.model for done in swept if done.epoch == 2}
    assert jax.tree.map(np.shape, last[0]["params"]) == jax.tree.map(np.shape, _models(net, [5])["m5"].params)
    differences = [
        np.abs(last[0]["params"]["conv"]["kernel"] - last[i]["params"]["conv"]["kernel"]).max() for i in (1, 2)
    ]
    assert 1e-5 < differences[0] < differences[1]
    *_, alone = _reuse(name, net, REUSED, [Candidate("m5", 2, {}, arrays)], (1, 2), source_weight=weights[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), alone.model, last[1])


@pytest.mark.usefixtures("_quick_strong_views")
def test_source_without_weight_leaves_fine_tuning_as_it_is():
    net = tiny_net(3)
    (plain,) = _finetune(net, _models(net, [5]), dataclasses.replace(REUSED, augment=("flip",)))
    candidates = [Candidate("m5", 2, {"source_weight": 0.0})]
    for name in ("joint", "weak_strong"):
        (found,) = _reuse(name, net, dataclasses.replace(REUSED, augment=("flip",)), candidates)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found.model, plain.model)


@pytest.mark.usefixtures("_quick_strong_views")
@pytest.mark.parametrize("name", REUSE)
def test_parts_of_a_batch_train_the_same_model_without_batch_norm(name):
    net, settings = tiny_net(3), dataclasses.replace(REUSED, augment=("resized_crop",))
    candidates = [Candidate("m5", 2, {"source_weight": 1.0}, _arrays(net, 0) if REUSE[name].arrays else {})]
    (whole,) = _reuse(name, net, settings, candidates)
    (parts,) = _reuse(name, net, dataclasses.replace(settings, microbatches=2, remat=True), candidates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), parts.model, whole.model)
    assert parts.gflops == whole.gflops


def test_each_candidate_has_its_own_arrays():
    net = tiny_net(3)
    arrays = [_arrays(net, seed) for seed in (0, 1)]
    together = list(_reuse("cotuning", net, REUSED, [Candidate("m5", 2, {}, own) for own in arrays]))
    (alone,) = _reuse("cotuning", net, REUSED, [Candidate("m5", 2, {}, arrays[1])])
    assert_equal_trees(alone.model, together[1].model)
    kernels = [found.model["params"]["conv"]["kernel"] for found in together]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-4


def test_arrays_of_different_shapes_are_refused():
    net = tiny_net(3)
    arrays = _arrays(net, 0)
    wider = {**arrays, "relationship": np.ones((3, 9), np.float32)}
    with pytest.raises(ValueError, match=r"same names, shapes and dtypes:\ndiffers: relationship .*\[3, 9\]"):
        list(_reuse("cotuning", net, REUSED, [Candidate("m5", 2, {}, own) for own in (arrays, wider)]))


def test_new_heads_have_the_standard_deviation_in_the_settings():
    net = tiny_net(3)
    frozen = OptimizerSettings(learning_rate=1e-30)
    kernels = {}
    for std in (0.01, 0.5):
        (done,) = _finetune(
            net, _models(net, [5]), FinetuneSettings(steps=1, batch_size=16, head_std=std, optimizer=frozen)
        )
        kernels[std] = done.model["params"]["fc"]["kernel"]
    expected = random_head(jax.random.fold_in(jax.random.key(2), 0x4EAD), {}, net)["fc"]["kernel"]
    np.testing.assert_allclose(kernels[0.01], expected, rtol=1e-5)
    np.testing.assert_allclose(kernels[0.5], 50 * expected, rtol=1e-5)


def test_grid_takes_weights_of_the_source_as_its_last_setting():
    settings = FinetuneSettings(learning_rates=(0.1, 0.01), weight_decays=(0.0, 1e-4))
    points = grid(settings, source_weights=(0.1, 0.3, 1.0))
    assert len(points) == 12 and list(points[1].values()) == [0.1, 0.0, 0.3]
    assert [{name: point[name] for name in list(point)[:2]} for point in points[::3]] == grid(settings)
    assert list(points[0]) == ["learning_rate", "weight_decay", "source_weight"]


# --- heads and metrics


def test_custom_head_and_custom_metrics_are_used():
    """LP-FT needs a given head, and other protocols measure something else than accuracy."""
    net = _tuned_net()
    settings = FinetuneSettings(steps=1, batch_size=16, optimizer=OptimizerSettings(learning_rate=1e-30))
    kernel = np.random.default_rng(0).normal(size=(net.feature_dim, 3)).astype(np.float32)
    head = lambda key, params, net: {**params, "fc": {"kernel": jnp.asarray(kernel), "bias": jnp.ones(3)}}  # noqa: E731

    def evaluate(net, preprocessing, mesh):
        return lambda model, feed, batch_size: [{"bias": float(row.sum())} for row in model["params"]["fc"]["bias"]]

    (done,) = _finetune(net, _models(net, [5]), settings, head=head, evaluate=evaluate)
    assert done.metrics == {"bias": pytest.approx(3.0)}
    np.testing.assert_allclose(done.model["params"]["fc"]["kernel"], kernel, atol=1e-6)


def test_diverged_finetuning_is_nan_and_logged(caplog):
    net = MODELS["resnet10"](num_classes=3, stem="cifar", width=8)
    settings = FinetuneSettings(epochs=3, batch_size=16, optimizer=OptimizerSettings(learning_rate=1e30))
    (done,) = _finetune(net, {"epoch 5": _models(net, [0])["m0"]}, settings)
    assert all(map(np.isnan, done.metrics.values())) and done.diverged_at is not None
    assert "epoch 5 on shades diverged at step" in caplog.text


def test_mean_class_accuracy_does_not_depend_on_the_stack():
    rng = np.random.default_rng(0)
    for _ in range(50):
        count = np.append(rng.integers(3, 9, 10), 0)
        correct = rng.binomial(count, 0.8, (4, 1, 11)).astype(float)
        together = probes.mean_class_accuracy(correct, count)
        np.testing.assert_array_equal(together, [probes.mean_class_accuracy(correct[i], count) for i in range(4)])
        np.testing.assert_allclose(together, (correct[..., :10] / count[:10]).mean(-1))
