"""Feeds, augmentation, optimizers, the training step and loop, and the trajectory of checkpoints."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers.training_parts import (
    CLASSES,
    PREPROCESSING,
    assert_equal_trees,
    feed_of,
    joined_feed,
    make_objective,
    random_source,
    small_net,
    start_state,
    train_small,
    training_step,
)
from jax_transfer import devices
from jax_transfer.checkpoints.trajectory import Trajectory, abstract
from jax_transfer.data import augment, batches, mixing
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.records import Batch, InputError
from jax_transfer.study.epochs import selected
from jax_transfer.training.evaluation import classification
from jax_transfer.training.loop import first_bad_step, train
from jax_transfer.training.objectives import Objective
from jax_transfer.training.optimizers import OPTIMIZERS, SCHEDULES, OptimizerSettings, make_optimizer, make_schedule
from jax_transfer.training.state import divide, evaluated, init_state, join
from jax_transfer.training.steps import make_train_step, many_steps, many_steps_of_many


@pytest.mark.usefixtures("fully_optimised")
def test_resident_and_streamed_feeds_train_identically():
    resident, streamed = feed_of(random_source()), feed_of(random_source(), gigabytes=0.0)
    assert isinstance(resident, batches.Resident) and isinstance(streamed, batches.Streamed)
    a, losses_a = train_small(resident, 4)
    b, losses_b = train_small(streamed, 4)
    assert losses_a == losses_b
    assert_equal_trees(a, b)


@pytest.mark.parametrize("gigabytes", [1.0, 0.0])
def test_evaluation_sees_every_image_once_in_order(gigabytes):
    source = random_source(n=37)
    seen = list(feed_of(source, gigabytes).evaluation_batches(16))
    assert {batch.images.shape for batch in seen} == {(16, 8, 8, 3)}
    mask = np.concatenate([batch.mask for batch in seen])
    labels = np.concatenate([batch.labels for batch in seen])
    images = np.concatenate([batch.images for batch in seen])
    assert mask.sum() == 37 and mask[:37].all()
    np.testing.assert_array_equal(labels[mask], source.labels)
    np.testing.assert_array_equal(images[mask], np.stack(source.read(range(37))))


@pytest.mark.parametrize("gigabytes", [1.0, 0.0])
def test_error_names_corrupt_image_in_both_feeds(gigabytes):
    def read(indices):
        raise InputError("cat/7.jpg cannot be decoded: truncated")

    source = dataclasses.replace(random_source(), read=read)
    with pytest.raises(InputError, match=r"^cat/7\.jpg cannot be decoded"):
        list(feed_of(source, gigabytes).evaluation_batches(16))


def test_epoch_visits_each_example_at_most_once_and_epochs_differ():
    first, second = (np.asarray(batches.epoch_order(0, epoch, 50, 16)) for epoch in (0, 1))
    assert first.shape == (3, 16)
    assert len(np.unique(first)) == 48
    assert (first != second).any()
    np.testing.assert_array_equal(first, batches.epoch_order(0, 0, 50, 16))


def test_resuming_within_an_epoch_equals_uninterrupted_run():
    feed = feed_of(random_source(n=100))
    whole, losses = train_small(feed, 9)
    half, first = train_small(feed, 4)
    again, rest = train_small(feed, 9, start=half)
    assert losses == first + rest
    assert_equal_trees(whole, again)


def test_training_loop_makes_no_implicit_transfers():
    feed = feed_of(random_source())
    both = joined_feed(feed)
    step, optimizer = training_step()
    run = many_steps(step, both.fetch, feed.mesh)
    state = start_state(optimizer, feed.mesh)
    measure = classification(small_net(), PREPROCESSING, feed.mesh, stacked=False)
    with jax.transfer_guard("disallow"):
        for items in both.items(range(2), 1, 3):
            state, _ = run(state, both.held, items, 1)
        measure(evaluated(make_objective(), state), feed, 16)


@pytest.mark.parametrize("total", range(1, 26))
def test_training_runs_exactly_the_requested_steps(total, monkeypatch):
    """A compiled call makes several steps, as on accelerators: 12 steps per epoch, at most 6 per call."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    counts = []

    def run(state, held, items, count):
        counts.append(count)
        return {"step": state["step"] + count}, {"loss": np.zeros(count)}

    feed = joined_feed(feed_of(random_source(n=48)), 4)
    epochs = list(train({"step": np.int32(0)}, run, feed, seed=0, total_steps=total, what="", max_steps=6))
    assert [epoch.number for epoch in epochs] == list(range(1, -(-total // 12) + 1))
    assert epochs[-1].state["step"] == sum(counts) == total
    assert counts[: total // 12 * 2] == [6] * (total // 12 * 2)


@pytest.mark.parametrize("pauses", [(), (1,), (7,), (12, 13, 23), (5, 11, 19, 24), range(31)])
def test_training_pauses_at_any_step_with_two_programs(pauses, monkeypatch):
    """Twelve steps per epoch, at most six per call, as on accelerators."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    counts = []

    def run(state, held, items, count):
        counts.append(count)
        return {"step": state["step"] + count}, {"loss": state["step"] + np.arange(count)}

    feed = joined_feed(feed_of(random_source(n=48)), 4)
    epochs = train({"step": 0}, run, feed, seed=0, total_steps=30, what="", max_steps=6, pauses=pauses)
    found = []
    for epoch in epochs:
        steps = range((epoch.number - 1) * 12, epoch.step)
        assert epoch.state["step"] == epoch.step and epoch.metrics["loss"].tolist() == list(steps)
        assert epoch.images_per_second * epoch.seconds == pytest.approx(4 * len(steps))
        found.append(epoch.step)
    assert found == sorted({12, 24, 30, *pauses} - {0})
    parts = np.diff([0, *found])
    assert counts == [count for n in parts for count in (*[6] * (n // 6), *[1] * (n % 6))]


def test_supervised_loss_falls_in_twenty_steps():
    feed = feed_of(random_source(n=64))
    _, losses = train_small(feed, 20)
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:4])


def test_masked_evaluation_equals_a_plain_loop():
    source, net = random_source(n=37), small_net()
    feed = feed_of(source)
    params, stats = net.init(jax.random.key(1))
    measure = classification(net, PREPROCESSING, feed.mesh, stacked=False)
    (found,) = measure({"params": params, "stats": stats}, feed, 16)
    assert measure({"params": params, "stats": stats}, feed, 16, lambda: True) is None
    images = augment.evaluation_view(np.stack(source.read(range(37))), PREPROCESSING)
    hits = np.asarray(net.apply(params, stats, images).logits.argmax(-1)) == source.labels
    assert found["accuracy"] == pytest.approx(hits.mean())
    assert found["mean_class_accuracy"] == pytest.approx(
        np.mean([hits[source.labels == c].mean() for c in range(CLASSES)])
    )
    broken = {"params": jax.tree.map(lambda x: x * np.nan, params), "stats": stats}
    assert all(np.isnan(value) for value in measure(broken, feed, 16)[0].values())


def test_stacked_sweep_equals_single_trainings():
    feed = feed_of(random_source())
    step, optimizer = training_step()
    mesh = devices.make_mesh(sweep=jax.device_count())
    run = many_steps_of_many(step, joined_feed(feed).fetch, mesh)
    single, losses = train_small(feed, 2)
    stacked = jax.tree.map(lambda x: jnp.stack([x] * jax.device_count()), start_state(optimizer, mesh))
    (epoch,) = train(stacked, run, joined_feed(feed).on(mesh), seed=3, total_steps=2, what="test")
    np.testing.assert_allclose(epoch.metrics["loss"][0], losses, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-5, atol=1e-6), epoch.state, single)


@pytest.mark.parametrize("bad", [{0: 5}, {0: 13, 1: 14}, {0: 7, 1: None}, {0: None, 1: 3}])
def test_training_ends_once_every_row_has_diverged(bad):
    """Twelve steps per epoch; bad: row -> first step whose loss is not finite, or None."""
    rows, called = len(bad), []

    def run(state, held, items, count):
        called.append(int(state["step"][0]))
        losses = [[np.inf if bad[row] is not None and called[-1] >= bad[row] else 1.0] for row in range(rows)]
        return {"step": state["step"] + 1}, {"loss": np.array(losses)}

    feed = joined_feed(feed_of(random_source(n=48)), 4)
    start = {"step": np.zeros(rows, np.int32)}
    epochs = list(train(start, run, feed, seed=0, total_steps=24, what=""))
    found = [dict(enumerate(epoch.diverged_at)) for epoch in epochs]
    for epoch, steps in enumerate(found):
        first = {row: None if at is None or at >= 12 * (epoch + 1) else max(at, 12 * epoch) for row, at in bad.items()}
        assert steps == first
    last = max(at if at is not None else 24 for at in bad.values())
    assert max(called) <= last + 3 and (max(called) == 23) == (last == 24)


# --- feeds side by side


def test_joined_feed_cycles_through_its_second_feed():
    first, second = feed_of(random_source(n=24)), feed_of(random_source(n=20))
    both = batches.joined({"target": (first, 8), "source": (second, 6)})
    assert (both.steps_per_epoch, both.batch_size) == (3, 14)
    assert both.num_classes == {"target": CLASSES, "source": CLASSES}
    for gigabytes in (1.0, 0.0):
        feeds = {
            "target": (feed_of(random_source(n=24), gigabytes), 8),
            "source": (feed_of(random_source(n=20), gigabytes), 6),
        }
        both, seen = batches.joined(feeds), {"target": [], "source": []}
        for epoch in range(3):
            for items in both.items(range(3 * epoch, 3 * epoch + 3), 1, 5):
                batch = both.fetch(both.held, jax.tree.map(lambda x: x[0], items))
                for name in seen:
                    seen[name].append(np.asarray(batch[name].images))
        for name, (feed, size) in feeds.items():
            images = np.stack(feed.source.read(range(len(feed.source))))
            index = 0 if name == "target" else 1
            order = batches.epochs_order(len(feed.source), range(9), 5 + (index << 24), size)
            np.testing.assert_array_equal(np.stack(seen[name]), images[order])


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_items_do_not_depend_on_steps_per_call(count):
    feed = batches.joined({"a": (feed_of(random_source(n=48)), 8), "b": (feed_of(random_source(n=28)), 8)})
    one = [jax.tree.map(np.asarray, items) for items in feed.items(range(6), 1, 0)]
    many = [jax.tree.map(np.asarray, items) for items in feed.items(range(6), count, 0)]
    join = lambda parts: jax.tree.map(lambda *x: np.concatenate(x), *parts)  # noqa: E731
    assert_equal_trees(join(one), join(many))


def test_feed_smaller_than_its_batch_is_rejected():
    with pytest.raises(InputError, match=r"\(feed source\) has 20 training images, fewer than one batch of 32"):
        batches.joined({"target": (feed_of(random_source()), 8), "source": (feed_of(random_source(n=20)), 32)})


@pytest.mark.parametrize("gigabytes", [1.0, 0.0])
def test_extra_arrays_stay_aligned_with_their_images(gigabytes):
    source = dataclasses.replace(
        random_source(n=44), extra={"index": np.arange(44), "tokens": np.arange(88).reshape(44, 2)}
    )
    feed = batches.joined({"train": (feed_of(source, gigabytes), 8)})
    images = np.stack(source.read(range(44)))
    for items in feed.items(range(5), 1, 0):
        batch = feed.fetch(feed.held, jax.tree.map(lambda x: x[0], items))["train"]
        np.testing.assert_array_equal(batch.images, images[np.asarray(batch.extra["index"])])
        np.testing.assert_array_equal(batch.extra["tokens"][:, 0], 2 * batch.extra["index"])
    tested = np.concatenate([batch.extra["index"] for batch in feed.feeds["train"].evaluation_batches(16)])
    np.testing.assert_array_equal(tested[:44], np.arange(44))


def test_each_view_of_each_feed_uses_its_own_key():
    images = jax.random.randint(jax.random.key(0), (6, 8, 8, 3), 0, 256).astype(jnp.uint8)
    batch = Batch(images, jnp.arange(6) % CLASSES, jnp.ones(6, bool), {"index": jnp.arange(6)})
    names = {"a": (("pad_crop",), ("pad_crop",)), "b": (("pad_crop",), ())}
    classes = {"a": CLASSES, "b": CLASSES}
    seen = augment.views(jax.random.key(1), {"a": batch, "b": batch}, names, PREPROCESSING, classes)
    drawn = [*seen["a"].images, seen["b"].images[0]]
    assert all((drawn[i] != drawn[j]).any() for i in range(3) for j in range(i))
    first, _ = augment.view(jax.random.key(1), batch, ("pad_crop",), PREPROCESSING, CLASSES)
    np.testing.assert_array_equal(drawn[0], first)
    np.testing.assert_array_equal(seen["b"].images[1], augment.evaluation_view(images, PREPROCESSING))
    assert seen["a"].extra is batch.extra


def test_first_bad_step_is_the_first_non_finite_loss():
    assert first_bad_step(10, np.array([1.0, np.nan, np.inf])) == 11
    assert first_bad_step(10, np.array([1.0, 2.0])) is None


def test_gradient_reversal_trains_two_players_in_one_step():
    """min over d, max over w of (d - 1) w: with a reversed gradient, w maximises the loss that d minimises."""

    @jax.custom_vjp
    def reverse(x):
        return x

    reverse.defvjp(lambda x: (x, None), lambda _, gradient: (-gradient,))

    def loss(params, aux, views, key):
        value = (params["d"] - 1) * reverse(params["w"])
        return value, (aux, {"value": value})

    objective = Objective(
        init=lambda key, model=None: ({"w": jnp.float32(2), "d": jnp.float32(4)}, {}),
        loss=loss,
        model=lambda params, aux: {"params": params, "stats": {}},
        views={},
    )
    optimizer = make_optimizer(OptimizerSettings(learning_rate=0.1, momentum=0.0), 10)
    step = make_train_step(objective, optimizer, PREPROCESSING, {})
    state, metrics = jax.jit(step)(init_state(objective, optimizer, 0), {})
    assert (float(state["params"]["w"]), float(state["params"]["d"])) == pytest.approx((2 + 0.1 * 3, 4 - 0.1 * 2))
    assert metrics["loss"] == metrics["value"] == 6


# --- augmentation


@pytest.mark.parametrize("name", augment.AUGMENTATIONS | mixing.MIXINGS)
def test_augmentation_keeps_range_and_reaches_the_model_size(name):
    images = jax.random.randint(jax.random.key(0), (5, 40, 40, 3), 0, 256).astype(jnp.uint8)
    plain = Preprocessing(image_size=32, crop_fraction=0.8, mean=(0, 0, 0), std=(1, 1, 1))
    batch = Batch(images=images, labels=jnp.arange(5), mask=jnp.ones(5, bool))
    view = jax.jit(lambda seed: augment.view(jax.random.key(seed), batch, (name,), plain, 5)[0])
    out = view(1)
    assert out.shape == (5, 32, 32, 3) and out.dtype == jnp.float32
    assert name == "random_erase" or (out.min() >= 0 and out.max() <= 1)
    np.testing.assert_array_equal(out, view(1))
    assert any((out != view(seed)).any() for seed in range(2, 12))  # some change few images


def test_flip_mirrors_about_half_of_the_images():
    images = jnp.tile(jnp.arange(8.0)[None, None, :, None], (400, 1, 1, 1))
    flipped = augment.flip(jax.random.key(0), images, PREPROCESSING)[:, 0, 0, 0] == 7
    assert 0.4 < flipped.mean() < 0.6


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
def test_weight_decay_can_skip_vectors_and_tokens(name):
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


def test_cosine_schedule_starts_at_warmup_and_ends_at_minimum():
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


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("decay_norm_and_bias", [True, False])
def test_traced_rates_equal_constant_rates(name, decay_norm_and_bias):
    params = {"w": jnp.arange(4.0).reshape(2, 2), "b": jnp.ones(2)}
    gradient = jax.tree.map(lambda x: 0.1 * x + 0.3, params)
    for schedule in SCHEDULES:
        settings = OptimizerSettings(
            name=name,
            learning_rate=0.03,
            weight_decay=0.01,
            schedule=schedule,
            warmup=0.2,
            milestones=(0.5,),
            decay_norm_and_bias=decay_norm_and_bias,
        )
        other = dataclasses.replace(settings, learning_rate=7.0, weight_decay=5.0)

        def steps(rates, settings):
            optimizer = make_optimizer(settings, 10, **rates)
            state, x = optimizer.init(params), params
            for _ in range(7):
                update, state = optimizer.update(gradient, state, x)
                x = optax.apply_updates(x, update)
            return x

        rates = {"learning_rate": jnp.float32(0.03), "weight_decay": jnp.float32(0.01)}
        traced = jax.jit(steps, static_argnums=1)(rates, other)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), traced, jax.jit(lambda s=settings: steps({}, s))()
        )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_head_factor_scales_only_the_head_updates(name):
    params = {"layer": jnp.ones((2, 2)), "fc": jnp.ones((2, 2))}
    groups = lambda params: {"layer": "backbone", "fc": "head"}  # noqa: E731
    found = {}
    for factor in (1.0, 10.0):
        settings = OptimizerSettings(name, learning_rate=0.1, weight_decay=0.1, head_learning_rate_factor=factor)
        optimizer = make_optimizer(settings, 10, groups)
        found[factor], _ = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_array_equal(found[10.0]["layer"], found[1.0]["layer"])
    np.testing.assert_allclose(found[10.0]["fc"], 10 * found[1.0]["fc"], rtol=1e-6)


def test_parameter_groups_are_head_and_backbone():
    params, _ = small_net().init(jax.random.key(0))
    groups = make_objective().groups(params)
    assert set(jax.tree.leaves(groups["fc"])) == {"head"}
    assert set(jax.tree.leaves({name: part for name, part in groups.items() if name != "fc"})) == {"backbone"}


# --- the stored parts of a state


def _states():
    _, optimizer = training_step()
    objective = make_objective()

    def init(key, model=None):
        params, aux = objective.init(key, model)
        aux = {**aux, "queue": jnp.zeros((4, 2)), "momentum": params}
        return {"net": params, "projector": jnp.ones(3)}, aux

    with_queue = Objective(
        init=init,
        loss=None,
        model=lambda params, aux: {"params": params["net"], "stats": aux["stats"]},
        views={},
    )
    for kind in (objective, with_queue):
        for ema in (False, True):
            yield kind, init_state(kind, optimizer, 0, ema=ema)


def test_divided_state_joins_again_without_duplicates():
    for objective, state in _states():
        model, training = divide(objective, state)
        assert set(model) == {"params", "stats"}
        stored = [id(leaf) for leaf in jax.tree.leaves((model, training))]
        assert sorted(stored) == sorted(map(id, jax.tree.leaves(state)))
        shapes = abstract(state, devices.replicated(devices.make_mesh()))
        assert jax.tree.map(jnp.shape, divide(objective, shapes)) == jax.tree.map(jnp.shape, (model, training))
        assert_equal_trees(join(objective, shapes, model, training), state)


def test_supervised_state_keeps_its_stored_names():
    _, optimizer = training_step()
    for ema, names in ((False, {"opt_state", "step", "key"}), (True, {"opt_state", "step", "key", "params", "stats"})):
        assert set(divide(make_objective(), init_state(make_objective(), optimizer, 0, ema=ema))[1]) == names


def test_divide_rejects_computed_models_and_reserved_names():
    objective, state = next(_states())
    computes = objective._replace(model=lambda params, aux: {"params": {"w": params["fc"]["bias"] + 1}, "stats": {}})
    with pytest.raises(ValueError, match="must select leaves"):
        divide(computes, state)
    with pytest.raises(ValueError, match="must not hold step"):
        divide(objective, {**state, "aux": {**state["aux"], "step": jnp.zeros(1)}})


# --- trajectory


def _saved(folder, epochs=2):
    _, optimizer = training_step()
    state = start_state(optimizer, devices.make_mesh())
    trajectory = Trajectory(folder)
    for epoch in range(epochs):
        trajectory.save(epoch, *divide(make_objective(), {**state, "step": state["step"] + epoch}), {"epoch": epoch})
    trajectory.wait()
    return trajectory, state


def _restored(trajectory, epoch, state):
    shapes = abstract(state, devices.replicated(devices.make_mesh()))
    return join(make_objective(), shapes, *trajectory.restore(epoch, *divide(make_objective(), shapes)))


def test_trajectory_restores_the_saved_state(tmp_path):
    trajectory, state = _saved(tmp_path / "checkpoints")
    assert trajectory.epochs() == [0, 1]
    assert_equal_trees(_restored(trajectory, 1, state), {**state, "step": state["step"] + 1})
    model = trajectory.restore_model(0, small_net(), devices.replicated(devices.make_mesh()))
    assert_equal_trees(model, evaluated(make_objective(), state))
    assert trajectory.metadata(1)["epoch"] == 1


@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_truncated_checkpoint_error_names_last_valid_epoch(tmp_path, keep):
    trajectory, state = _saved(tmp_path / "checkpoints")
    files = [f for f in (tmp_path / "checkpoints" / "1" / "model").rglob("*") if f.is_file() and "/d/" in str(f)]
    assert files
    for file in files:
        data = file.read_bytes()
        file.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(InputError, match=r"checkpoints/1 cannot be read.*checkpoint before it is 0: delete"):
        _restored(trajectory, 1, state)


@pytest.mark.parametrize("item", ["model", "training", "metadata"])
def test_flipped_bits_on_disk_are_detected_or_harmless(tmp_path, item):
    trajectory, state = _saved(tmp_path / "checkpoints")
    files = [path for path in (tmp_path / "checkpoints" / "1" / item).rglob("*") if path.is_file()]
    file = max(files, key=lambda path: (path.parent.name == "d", path.stat().st_size))  # d/ holds the arrays
    data, refused = file.read_bytes(), []
    for position in range(7, len(data), len(data) // 12):
        file.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        try:
            assert_equal_trees(_restored(trajectory, 1, state), {**state, "step": state["step"] + 1})
        except InputError as error:
            refused.append(str(error))
    assert all("checkpoints/1 cannot be read" in error for error in refused)
    if item == "metadata":
        assert len(refused) > 6 and "its metadata changed on the disk" in "".join(refused)
    if item == "model":  # random weights do not compress, so most bits of the file are theirs
        assert f"its {item} changed on the disk" in "".join(refused)


def test_checkpoint_without_fingerprints_is_restored(tmp_path):
    trajectory, state = _saved(tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "1" / "metadata" / "metadata").write_text('{"epoch": 1}')
    assert_equal_trees(_restored(trajectory, 1, state), {**state, "step": state["step"] + 1})


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
def test_evaluated_epochs_follow_the_rule(rule, expected):
    assert selected(rule, 5) == expected


@pytest.mark.parametrize("rule", ["6", "none", "every:x", "every:0", (), "-1", "2k", "every:1k"])
def test_evaluated_epochs_rejects_invalid_rules(rule):
    with pytest.raises(InputError, match=r"config\.trajectory\.epochs"):
        selected(rule, 5)


# --- devices


def test_indivisible_batch_error_suggests_valid_sizes():
    class Mesh:
        shape = {"data": 8}  # noqa: RUF012

    with pytest.raises(InputError, match=r"config\.pretrain\.batch_size = 20 .* 16 or 24"):
        devices.check_batch_size(20, Mesh, "config.pretrain.batch_size")
    assert devices.check_batch_size(24, Mesh, "x") == 3


def test_only_devices_module_accesses_devices():
    package = pathlib.Path(devices.__file__).parent
    words = ("jax.devices", "default_backend", "NamedSharding", "local_devices")
    offenders = [
        str(p) for p in package.rglob("*.py") if p.name != "devices.py" and any(w in p.read_text() for w in words)
    ]
    assert not offenders


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_betas_of_adam_are_those_of_the_settings(name):
    """After gradients 1 and 0 the step is m / sqrt(v) with m = b1 (1 - b1) / (1 - b1^2), and v the same with b2."""
    optimizer = make_optimizer(OptimizerSettings(name=name, learning_rate=1.0, b1=0.5, b2=0.98), 10)
    params = jnp.zeros(())
    _, state = optimizer.update(jnp.ones(()), optimizer.init(params), params)
    update, _ = optimizer.update(jnp.zeros(()), state, params)
    average, square = (b * (1 - b) / (1 - b**2) for b in (0.5, 0.98))
    np.testing.assert_allclose(update, -average / np.sqrt(square), rtol=1e-5)
