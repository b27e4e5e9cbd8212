"""Epochs of an objective without classes are judged by features of test images, and a collapse is said at once."""

import contextlib
import dataclasses
import json
import logging
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.source_files import REPOSITORY
from helpers.studies import environment, tiny_config
from jax_transfer.analysis import knn_accuracy, rankme, uniformity
from jax_transfer.data.subsets import capped
from jax_transfer.fields import to_json
from jax_transfer.records import InputError
from jax_transfer.report.page import write_report
from jax_transfer.results import PretrainRow
from jax_transfer.study import checks, judge, pretrain
from jax_transfer.study.config import differences
from jax_transfer.study.epochs import snapshot
from jax_transfer.study.workspace import Workspace
from jax_transfer.training.objectives import OBJECTIVES, Objective


def unit(x):
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def without_head(value, views):
    """Makes an objective without a head: the minimum of `value(features of each view)`."""

    def make(net, augment):
        def init(key, model=None):
            params, stats = net.init(key) if model is None else (model["params"], model["stats"])
            return params, {"stats": stats}

        def loss(params, aux, seen, key):
            output, stats = net.apply_train(params, aux["stats"], jnp.concatenate(seen["train"].images), key)
            return value(*jnp.split(output.features, views)), ({"stats": stats}, {})

        return Objective(
            init,
            loss,
            model=lambda params, aux: {"params": params, "stats": aux["stats"]},
            views={"train": (augment,) * views},
            has_head=False,
        )

    return make


def apart(first, second):
    """Alignment + uniformity (Wang and Isola, 2020), which keeps images apart."""
    u, v = unit(first), unit(second)
    distances = jnp.sum((u[:, None] - u) ** 2, -1)
    return jnp.mean(jnp.sum((u - v) ** 2, -1)) + jnp.log(jnp.mean(jnp.exp(-2 * distances)))


def constant(features):
    """The same target for all images."""
    return jnp.mean(jnp.sum((features - 1) ** 2, -1))


TOYS = {"apart": without_head(apart, views=2), "constant": without_head(constant, views=1)}


def configure(**changes):
    return tiny_config(
        **{
            "model__width": 4.0,
            "source__dataset": "embedded:digits?train=1200&test=100",
            "pretrain__objective": "apart",
            "pretrain__batch_size": 20,
            "pretrain__epochs": 2,
            "pretrain__augment": ("flip",),
            "pretrain__optimizer__learning_rate": 0.05,
            "stages": ("pretrain",),
            **changes,
        }
    )


@pytest.fixture(scope="module", autouse=True)
def toys():
    with pytest.MonkeyPatch.context() as patch:
        for name, make in TOYS.items():
            patch.setitem(OBJECTIVES, name, make)
        yield


def run(config, folder):
    """Pre-trains, and returns the workspace and the rows."""
    checks.check(config)
    work = Workspace(config, folder)
    pretrain.run(work)
    return work, [json.loads(line) for line in (folder / "results" / "pretrain.jsonl").read_text().splitlines()]


@contextlib.contextmanager
def logged():
    """Collects the messages of the project's log."""
    messages, handler, level = [], logging.Handler(), pretrain.log.level
    handler.emit = lambda record: messages.append(record.getMessage())
    pretrain.log.addHandler(handler)
    pretrain.log.setLevel(logging.INFO)
    try:
        yield messages
    finally:
        pretrain.log.removeHandler(handler)
        pretrain.log.setLevel(level)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A pre-training with each of TOYS: name -> its workspace, rows and log."""
    result = {}
    for name in TOYS:
        with logged() as messages:
            result[name] = *run(configure(pretrain__objective=name), tmp_path_factory.mktemp(name)), messages
    yield result
    for work, *_ in result.values():
        work.close()


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Random weights, and a function that judges them: judge_start(**changes of the config) -> the numbers."""
    model = []

    def judge_start(stop=lambda: False, **changes):
        work = Workspace(configure(**changes), tmp_path_factory.mktemp("start"))
        pretraining = work.pretrainings[0]
        if not model:
            params, stats = jax.jit(work.source_net(pretraining).init)(jax.random.key(0))
            model.append({"params": params, "stats": stats})
        try:
            return judge.make_judge(work, pretraining, work.mesh)(model[0], stop)
        finally:
            work.close()

    return judge_start


def test_rows_hold_the_measures_of_features_of_test_images(trained):
    work, rows, _ = trained["apart"]
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    for row in rows:
        features = work.features(snapshot(work.pretrainings[0], row["epoch"]), work.config.source.dataset, "test")
        x, y = features.features, features.labels
        assert len(y) == 100  # not a multiple of the batch
        assert row["knn_accuracy"] == pytest.approx(float(knn_accuracy(x, y, 10)))
        assert row["effective_rank"] == pytest.approx(float(rankme(x)), rel=1e-4)
        assert row["uniformity"] == pytest.approx(float(uniformity(x)), rel=1e-4)
        assert row["test_accuracy"] is None


def test_training_for_alignment_and_uniformity_improves_both(trained):
    _, rows, _ = trained["apart"]
    assert rows[2]["alignment"] < rows[0]["alignment"] / 2 and rows[2]["uniformity"] < rows[0]["uniformity"] - 1


def test_log_names_the_numbers_in_place_of_class_accuracies(trained):
    _, rows, messages = trained["apart"]
    (line,) = [message for message in messages if message.startswith("epoch 2/2: loss ")]
    for name, column in (("k-NN accuracy", "knn_accuracy"), ("alignment", "alignment"), ("uniformity", "uniformity")):
        assert f", {name} {rows[2][column]:.4f}" in line
    assert f", effective rank {rows[2]['effective_rank']:.1f}" in line
    assert "nan" not in line and "test accuracy" not in line


def test_collapse_is_said_once(trained):
    _, rows, messages = trained["constant"]
    assert all(row["effective_rank"] < judge.LEAST_RANK for row in rows[1:]) and rows[0]["effective_rank"] > 4
    (warning,) = [message for message in messages if "collapsed" in message]
    assert warning.startswith("epoch 1/2: the representation has collapsed (effective rank 1.")
    assert "lower config.pretrain.optimizer.learning_rate" in warning and "\n" not in warning
    assert not any("collapsed" in message for message in trained["apart"][2])


def collapsed_row(number, name="", **changes):
    row = PretrainRow(number, 1.0, math.nan, math.nan, 1.0, 1.0, "a", f"{name}/{number}".lstrip("/"), "b", 10 * number)
    return dataclasses.replace(row, **{"effective_rank": 1.0, "uniformity": -0.1, **changes})


def test_a_collapse_is_said_again_only_for_another_pretraining():
    def said(row, earlier):
        with logged() as messages:
            judge.warn_of_collapse(row, [*earlier, row], "epoch", "config.pretrain")
        return len(messages)

    healthy = {"effective_rank": 9.0}
    first = collapsed_row(1, "moco")
    assert said(first, []) == 1
    assert said(collapsed_row(2, "moco"), [first]) == 0
    assert said(collapsed_row(2, "moco"), [collapsed_row(1, "moco", **healthy)]) == 1
    assert said(collapsed_row(2, "simclr"), [first]) == 1
    assert said(collapsed_row(0), []) == said(collapsed_row(1, **healthy), []) == 0
    assert said(collapsed_row(1, uniformity=-1e-4, **healthy), []) == 1
    assert said(collapsed_row(1, effective_rank=None, uniformity=None), []) == 0
    assert said(collapsed_row(1, effective_rank=math.nan, uniformity=math.nan), []) == 0


def test_plain_views_are_aligned_and_do_not_depend_on_the_batch(started):
    plain = started(pretrain__augment=())
    assert plain["alignment"] == 0
    flipped = started(pretrain__augment=("flip",))
    assert flipped["alignment"] > 0.01
    assert {**flipped, "alignment": 0} == pytest.approx(plain, rel=1e-5)
    whole = started(pretrain__augment=(), data__eval_batch_size=40)
    assert whole == pytest.approx(plain, rel=1e-5)


def test_views_are_the_same_in_every_epoch_and_change_with_the_seed(started):
    first, again, other = started(), started(), started(seed=1)
    assert first == again and first["alignment"] != other["alignment"]


def test_mixing_makes_no_view(started):
    assert started(pretrain__augment=("flip", "mixup")) == pytest.approx(started(), rel=1e-5)


def test_crops_show_windows_of_the_full_images(started):
    resident = started(pretrain__augment=("resized_crop", "flip"))
    streamed = started(pretrain__augment=("resized_crop", "flip"), data__resident_gigabytes=0.0)
    assert streamed == pytest.approx(resident, rel=1e-2)
    assert {**resident, "alignment": 0} == pytest.approx(started(pretrain__augment=()), rel=1e-4)
    assert resident["alignment"] > started()["alignment"]


def test_judged_images_are_a_part_of_the_test_images_with_all_classes(trained, tmp_path):
    work, *_ = trained["apart"]
    start = snapshot(work.pretrainings[0], 0)
    features = work.features(start, work.config.source.dataset, "test")
    chosen = capped(features.labels, 50, seed=0)
    fewer = Workspace(configure(pretrain__judged_images=50), tmp_path)
    found = judge.make_judge(fewer, fewer.pretrainings[0], fewer.mesh)(work.checkpoint(start).model, lambda: False)
    fewer.close()
    x, y = features.features[chosen], features.labels[chosen]
    assert found["knn_accuracy"] == pytest.approx(float(knn_accuracy(x, y, 10)))
    assert found["effective_rank"] == pytest.approx(float(rankme(x)), rel=1e-4)
    assert np.bincount(y).min() >= 3


def test_a_stop_ends_the_judgement(started):
    calls = []
    assert started(stop=lambda: len(calls) == 1 or calls.append(0)) is None


def test_supervised_epochs_are_judged_only_on_request(tmp_path):
    changes = {"pretrain__objective": "supervised", "pretrain__epochs": 1}
    work, _ = run(configure(**changes), tmp_path)
    pretraining = work.pretrainings[0]
    assert judge.num_images(work, pretraining) == 0
    work.close()
    rows = [json.loads(line) for line in (tmp_path / "results" / "pretrain.jsonl").read_text().splitlines()]
    assert all(row[column] is None for row in rows for column in judge.NAMES)
    resumed = configure(**{**changes, "pretrain__judged_images": 60})
    work = Workspace(resumed, tmp_path)
    assert judge.num_images(work, work.pretrainings[0]) == 60
    work.close()
    assert differences(to_json(configure(**changes)), to_json(resumed)) == []


def test_number_of_judged_images(tmp_path):
    for value, expected in ((None, 100), (0, 0), (40, 40), (5000, 100)):
        work = Workspace(configure(pretrain__judged_images=value), tmp_path)
        assert judge.num_images(work, work.pretrainings[0]) == expected
        work.close()
    with pytest.raises(InputError, match=r"judged_images.* 1\b.* must be 2 or more, or 0 to judge no epoch"):
        checks.check(configure(pretrain__judged_images=1))


def test_no_accuracy_without_labels():
    x = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    found = judge.measure(x, x, x, np.zeros(30, int), num_classes=1)
    assert found["knn_accuracy"] is None and found["uniformity"] < 0


def test_report_draws_the_judged_epochs(trained, tmp_path):
    work, rows, _ = trained["apart"]
    page = write_report(work.workdir).read_text()
    assert "Effective rank" in page and "k-NN acc. (%)" in page and "Uniformity" in page
    (tmp_path / "results").mkdir()
    without = [{**row, **dict.fromkeys(judge.NAMES)} for row in rows]
    (tmp_path / "results" / "pretrain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in without))
    page = write_report(tmp_path).read_text()
    assert "Train loss" in page and "Effective rank" not in page and not list(tmp_path.rglob("*judged*"))


DEVICES = """
import json, pathlib, sys, tempfile
sys.path[:0] = ["tests", "tests/study"]
import jax, test_judge as tests
from jax_transfer.study import judge
from jax_transfer.study.workspace import Workspace
tests.OBJECTIVES.update(tests.TOYS)
for augment in (("flip",), ("resized_crop", "flip")):
    work = Workspace(tests.configure(pretrain__augment=augment), pathlib.Path(tempfile.mkdtemp()))
    params, stats = jax.jit(work.source_net(work.pretrainings[0]).init)(jax.random.key(0))
    found = judge.make_judge(work, work.pretrainings[0], work.mesh)
    print(json.dumps(found({"params": params, "stats": stats}, lambda: False)))
"""


@pytest.mark.slow
def test_eight_devices_judge_as_one():
    found = {}
    for count in (1, 8):
        flags = f"--xla_force_host_platform_device_count={count}"
        command = [sys.executable, "-c", DEVICES]
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment(XLA_FLAGS=flags), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found[count] = [json.loads(line) for line in done.stdout.splitlines()]
    for one, eight in zip(found[1], found[8], strict=True):
        assert eight == pytest.approx(one, rel=1e-4)
