"""Feeds, the training step, the loop and the trajectory."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_transfer import devices
from jax_transfer.data import augment, batches, mixing
from jax_transfer.data.sources import from_arrays
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models import MODELS
from jax_transfer.models.trajectory import Trajectory, abstract, evaluated_epochs
from jax_transfer.records import Batch, InputError
from jax_transfer.training import steps as training_steps
from jax_transfer.training.loop import first_bad_step, fit
from jax_transfer.training.objectives import OBJECTIVES
from jax_transfer.training.optimizers import OPTIMIZERS, SCHEDULES, OptimizerSettings, make_optimizer, make_schedule

PREPROCESSING = Preprocessing(image_size=8)
CLASSES = 4


def _source(n=44, split="train", size=8):
    rng = np.random.default_rng(0)
    labels = np.arange(n) % CLASSES
    images = rng.integers(0, 60, (n, size, size, 3)) + 50 * labels[:, None, None, None]
    return from_arrays(images.astype(np.uint8), labels.astype(np.int32), name="stripes", split=split)


@functools.cache
def _net():
    return MODELS["resnet10"](num_classes=CLASSES, stem="cifar", width=8)


def _feed(source, gigabytes=1.0):
    return batches.make_feed(source, PREPROCESSING, devices.make_mesh(), gigabytes, num_threads=2)


@functools.cache
def _step(objective="supervised", learning_rate=0.05):
    optimizer = make_optimizer(OptimizerSettings(learning_rate=learning_rate), 100)
    view = training_steps.training_view(("pad_crop", "flip"), PREPROCESSING)
    return training_steps.make_train_step(_net(), OBJECTIVES[objective], optimizer, view), optimizer


def _train(feed, total_steps, learning_rate=0.05, start=None):
    step, optimizer = _step(learning_rate=learning_rate)
    run = training_steps.many_steps(step, feed.fetch, feed.mesh)
    state = start if start is not None else _start(optimizer, feed.mesh)
    losses = []
    keep = lambda first, metrics: losses.extend(np.ravel(metrics["loss"]))  # noqa: E731
    state = fit(state, run, feed, seed=3, batch_size=16, total_steps=total_steps, what="test",
                on_metrics=keep, on_epoch=lambda *_: None)  # fmt: skip
    return state, losses


def _start(optimizer, mesh):
    return devices.replicate(training_steps.init_state(*_net().init(jax.random.key(0)), optimizer, 0), mesh)


def _equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_resident_and_streamed_feeds_train_to_the_same_bits():
    resident, streamed = _feed(_source()), _feed(_source(), gigabytes=0.0)
    assert isinstance(resident, batches.Resident) and isinstance(streamed, batches.Streamed)
    a, losses_a = _train(resident, 4)
    b, losses_b = _train(streamed, 4)
    assert losses_a == losses_b
    _equal(a, b)


@pytest.mark.parametrize("gigabytes", [1.0, 0.0])
def test_evaluation_sees_every_image_once_in_order(gigabytes):
    source = _source(n=37)
    seen = list(_feed(source, gigabytes).evaluation_batches(16))
    assert {batch.images.shape for batch in seen} == {(16, 8, 8, 3)}
    mask = np.concatenate([batch.mask for batch in seen])
    labels = np.concatenate([batch.labels for batch in seen])
    images = np.concatenate([batch.images for batch in seen])
    assert mask.sum() == 37 and mask[:37].all()
    np.testing.assert_array_equal(labels[mask], source.labels)
    np.testing.assert_array_equal(images[mask], np.stack(source.read(range(37))))


@pytest.mark.parametrize("gigabytes", [1.0, 0.0])
def test_a_corrupt_image_is_named_on_both_paths(gigabytes):
    def read(indices):
        raise InputError("cat/7.jpg cannot be decoded: truncated")

    source = dataclasses.replace(_source(), read=read)
    with pytest.raises(InputError, match=r"^cat/7\.jpg cannot be decoded"):
        list(_feed(source, gigabytes).evaluation_batches(16))


def test_an_epoch_visits_each_example_at_most_once_and_epochs_differ():
    first, second = (np.asarray(batches.epoch_order(0, epoch, 50, 16)) for epoch in (0, 1))
    assert first.shape == (3, 16)
    assert len(np.unique(first)) == 48
    assert (first != second).any()
    np.testing.assert_array_equal(first, batches.epoch_order(0, 0, 50, 16))


def test_resuming_in_the_middle_of_an_epoch_gives_the_bits_of_an_uninterrupted_run():
    feed = _feed(_source(n=100))
    whole, losses = _train(feed, 9)
    half, first = _train(feed, 4)
    again, rest = _train(feed, 9, start=half)
    assert losses == first + rest
    _equal(whole, again)


def test_the_hot_loop_makes_no_implicit_transfer():
    feed = _feed(_source())
    step, optimizer = _step()
    run = training_steps.many_steps(step, feed.fetch, feed.mesh)
    state = _start(optimizer, feed.mesh)
    evaluate = training_steps.make_evaluation(_net(), PREPROCESSING, feed.mesh)
    zeros = devices.replicate(training_steps.zero_counts((CLASSES,)), feed.mesh)
    with jax.transfer_guard("disallow"):
        for held, items, count in feed.training_calls(0, 0, 3, 16):
            state, _ = run(state, held, items, count)
        training_steps.count_correct(evaluate, state, feed, 16, zeros)


@pytest.mark.parametrize("total", range(1, 26))
def test_training_ends_after_exactly_as_many_steps_as_asked(total, monkeypatch):
    """Also where a compiled call makes many steps, as on accelerators: 12 steps an epoch, at most 6 a call."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    counts = []

    def run(state, held, items, count):
        counts.append(count)
        return {"step": state["step"] + count}, {"loss": np.zeros(count)}

    state = fit({"step": np.int32(0)}, run, _feed(_source(n=48)), seed=0, batch_size=4, total_steps=total, what="",
                on_metrics=lambda *_: None, on_epoch=lambda *_: None, max_steps=6)  # fmt: skip
    assert state["step"] == sum(counts) == total
    assert counts[: total // 12 * 2] == [6] * (total // 12 * 2)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_falls_in_twenty_steps(name):
    feed = _feed(_source(n=64))
    _, losses = _train(feed, 20)
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:4])


def test_masked_evaluation_equals_a_plain_loop():
    source, net = _source(n=37), _net()
    feed = _feed(source)
    params, stats = net.init(jax.random.key(1))
    evaluate = training_steps.make_evaluation(net, PREPROCESSING, feed.mesh)
    zeros = training_steps.zero_counts((CLASSES,))
    counts = training_steps.count_correct(evaluate, {"params": params, "stats": stats}, feed, 16, zeros)
    stopped = training_steps.count_correct(evaluate, {"params": params, "stats": stats}, feed, 16, zeros, lambda: True)
    assert stopped is None
    images = augment.evaluation_view(np.stack(source.read(range(37))), PREPROCESSING)
    hits = np.asarray(net.apply(params, stats, images).logits.argmax(-1)) == source.labels
    accuracy, mean_class = training_steps.accuracies(counts)
    assert accuracy == pytest.approx(hits.mean())
    assert mean_class == pytest.approx(np.mean([hits[source.labels == c].mean() for c in range(CLASSES)]))


def test_a_stacked_sweep_equals_single_trainings():
    feed = _feed(_source())
    step, optimizer = _step()
    mesh = devices.make_mesh(sweep=jax.device_count())
    run = training_steps.many_steps_of_many(step, feed.fetch, mesh)
    single, losses = _train(feed, 2)
    stacked = jax.tree.map(lambda x: jnp.stack([x] * jax.device_count()), _start(optimizer, mesh))
    history = []
    state = fit(stacked, run, feed.on(mesh), seed=3, batch_size=16, total_steps=2, what="test",
                on_metrics=lambda first, m: history.append(m["loss"]), on_epoch=lambda *_: None)  # fmt: skip
    np.testing.assert_allclose(np.concatenate(history, -1)[0], losses, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-5, atol=1e-6), state, single)


def test_first_bad_step():
    assert first_bad_step(10, np.array([1.0, np.nan, np.inf])) == 11
    assert first_bad_step(10, np.array([1.0, 2.0])) is None


# --- augmentation


@pytest.mark.parametrize("name", augment.AUGMENTATIONS | mixing.MIXINGS)
def test_augmentation_keeps_range_and_reaches_the_model_size(name):
    images = jax.random.randint(jax.random.key(0), (5, 40, 40, 3), 0, 256).astype(jnp.uint8)
    plain = Preprocessing(image_size=32, crop_fraction=0.8, mean=(0, 0, 0), std=(1, 1, 1))
    batch = Batch(images=images, labels=jnp.arange(5), mask=jnp.ones(5, bool))
    view = jax.jit(lambda seed: augment.apply(jax.random.key(seed), batch, (name,), plain, 5).images)
    out = view(1)
    assert out.shape == (5, 32, 32, 3) and out.dtype == jnp.float32
    assert name == "random_erase" or (out.min() >= 0 and out.max() <= 1)
    np.testing.assert_array_equal(out, view(1))
    assert any((out != view(seed)).any() for seed in (2, 3, 4))  # few images are erased


def test_flip_mirrors_about_half_of_the_images():
    images = jnp.tile(jnp.arange(8.0)[None, None, :, None], (400, 1, 1, 1))
    flipped = augment.flip(jax.random.key(0), images, PREPROCESSING)[:, 0, 0, 0] == 7
    assert 0.4 < flipped.mean() < 0.6


def test_resized_crop_of_the_whole_area_is_the_resized_image():
    images = jax.random.uniform(jax.random.key(0), (2, 16, 16, 3))
    whole = augment.resized_crop(jax.random.key(1), images, PREPROCESSING, area=(1.0, 1.0), ratio=(1.0, 1.0))
    np.testing.assert_allclose(whole, jax.image.resize(images, (2, 8, 8, 3), "linear"), atol=1e-5)


def test_evaluation_view_is_the_normalised_centre():
    images = np.random.default_rng(0).integers(0, 256, (2, 10, 10, 3)).astype(np.uint8)
    preprocessing = Preprocessing(image_size=8, crop_fraction=0.8)
    expected = (images[:, 1:9, 1:9] / 255 - preprocessing.mean) / preprocessing.std
    np.testing.assert_allclose(augment.evaluation_view(images, preprocessing), expected, rtol=1e-4, atol=1e-5)


# --- optimizers


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_minimises_a_parabola(name):
    optimizer = make_optimizer(OptimizerSettings(name=name, learning_rate=0.05), 200)
    x = {"w": jnp.ones((2, 2))}
    state = optimizer.init(x)
    for _ in range(200):
        update, state = optimizer.update(jax.grad(lambda x: (x["w"] ** 2).sum())(x), state, x)
        x = optax.apply_updates(x, update)
    assert jnp.abs(x["w"]).max() < 0.05


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_spares_vectors_and_tokens_if_told_to(name):
    params = {"kernel": jnp.ones((2, 2)), "scale": jnp.ones(2), "cls_token": jnp.ones((1, 1, 2))}
    settings = OptimizerSettings(name=name, learning_rate=0.1, weight_decay=0.1, decay_norm_and_bias=False)
    optimizer = make_optimizer(settings, 10)
    update, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    assert (update["kernel"] < 0).all() and (update["scale"] == 0).all() and (update["cls_token"] == 0).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_warms_up_then_starts_at_the_full_rate(name):
    settings = OptimizerSettings(learning_rate=0.4, schedule=name, warmup=0.1, milestones=(0.5,))
    schedule = make_schedule(settings, 100)
    assert float(schedule(0)) == 0
    assert float(schedule(5)) == pytest.approx(0.2)
    assert float(schedule(10)) == pytest.approx(0.4)


def test_cosine_goes_from_the_rate_of_the_warm_up_to_the_least_rate():
    settings = OptimizerSettings(
        learning_rate=5e-4, schedule="cosine", warmup=0.1, warmup_learning_rate=1e-6, min_learning_rate=1e-5
    )
    schedule = make_schedule(settings, 100)
    middle = (5e-4 + 1e-5) / 2
    np.testing.assert_allclose([schedule(s) for s in (0, 10, 55, 100)], [1e-6, 5e-4, middle, 1e-5], rtol=1e-5)


def test_imagenet_step_schedule_divides_by_ten_at_each_third():
    schedule = make_schedule(OptimizerSettings(schedule="step", milestones=(1 / 3, 2 / 3), learning_rate=0.1), 90)
    np.testing.assert_allclose(
        [schedule(s) for s in (0, 29, 31, 59, 61, 89)], [0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-5
    )


# --- trajectory


def _saved(folder, epochs=2):
    _, optimizer = _step()
    state = _start(optimizer, devices.make_mesh())
    trajectory = Trajectory(folder)
    for epoch in range(epochs):
        trajectory.save(epoch, {**state, "step": state["step"] + epoch}, {"epoch": epoch})
    trajectory.wait()
    return trajectory, state


def test_trajectory_returns_what_was_saved(tmp_path):
    trajectory, state = _saved(tmp_path / "checkpoints")
    assert trajectory.epochs() == [0, 1]
    target = abstract(state, devices.replicated(devices.make_mesh()))
    _equal(trajectory.restore_state(1, target), {**state, "step": state["step"] + 1})
    model = {name: target[name] for name in ("params", "stats")}
    _equal(trajectory.restore_model(0, model), {name: state[name] for name in model})
    assert trajectory.metadata(1)["epoch"] == 1


@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_truncated_checkpoint_is_named_and_the_last_good_one_offered(tmp_path, keep):
    trajectory, state = _saved(tmp_path / "checkpoints")
    files = [f for f in (tmp_path / "checkpoints" / "1" / "model").rglob("*") if f.is_file() and "/d/" in str(f)]
    assert files
    for file in files:
        data = file.read_bytes()
        file.write_bytes(data[: int(keep * len(data))])
    target = abstract(state, devices.replicated(devices.make_mesh()))
    with pytest.raises(InputError, match=r"checkpoints/1 cannot be read.*epoch 0"):
        trajectory.restore_state(1, target)


@pytest.mark.parametrize("item", ["model", "training", "metadata"])
def test_a_bit_that_the_disk_has_turned_is_named_or_does_not_matter(tmp_path, item):
    trajectory, state = _saved(tmp_path / "checkpoints")
    target = abstract(state, devices.replicated(devices.make_mesh()))
    files = [path for path in (tmp_path / "checkpoints" / "1" / item).rglob("*") if path.is_file()]
    file = max(files, key=lambda path: (path.parent.name == "d", path.stat().st_size))  # d/ holds the arrays
    data, refused = file.read_bytes(), []
    for place in range(7, len(data), len(data) // 12):
        file.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        try:
            _equal(trajectory.restore_state(1, target), {**state, "step": state["step"] + 1})
        except InputError as error:
            refused.append(str(error))
    assert all("checkpoints/1 cannot be read" in error for error in refused)
    if item == "metadata":
        assert len(refused) > 6 and "its metadata changed on the disk" in "".join(refused)
    if item == "model":  # random weights do not compress: most of the file are their own bits
        assert f"its {item} changed on the disk" in "".join(refused)


def test_a_checkpoint_of_before_there_were_fingerprints_is_read(tmp_path):
    trajectory, state = _saved(tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "1" / "metadata" / "metadata").write_text('{"epoch": 1}')
    target = abstract(state, devices.replicated(devices.make_mesh()))
    _equal(trajectory.restore_state(1, target), {**state, "step": state["step"] + 1})


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        ("every:2", [0, 2, 4, 5]),
        ("log", [0, 1, 2, 4, 5]),
        ("5,1", [1, 5]),
        ((0, 3), [0, 3]),
    ],
)
def test_evaluated_epochs(rule, expected):
    assert evaluated_epochs(rule, 5) == expected


@pytest.mark.parametrize("rule", ["6", "none", "every:x", "every:0", (), "-1"])
def test_evaluated_epochs_refuses_what_is_no_rule(rule):
    with pytest.raises(InputError, match=r"config\.trajectory\.epochs"):
        evaluated_epochs(rule, 5)


# --- devices


def test_batch_that_does_not_divide_says_which_sizes_do():
    class Mesh:
        shape = {"data": 8}  # noqa: RUF012

    with pytest.raises(InputError, match=r"config\.pretrain\.batch_size = 20 .* 16 or 24"):
        devices.check_batch_size(20, Mesh, "config.pretrain.batch_size")
    assert devices.check_batch_size(24, Mesh, "x") == 3


def test_only_devices_py_names_devices():
    package = pathlib.Path(devices.__file__).parent
    words = ("jax.devices", "default_backend", "NamedSharding", "local_devices")
    guilty = [
        str(p) for p in package.rglob("*.py") if p.name != "devices.py" and any(w in p.read_text() for w in words)
    ]
    assert not guilty
