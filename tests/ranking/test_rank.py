"""`rank`: order of the checkpoints, reported errors, uncertainty, and what the answer recommends."""

import csv
import dataclasses
import functools
import html
import json
import logging
import math
import pickle
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression

import jax_transfer as jt
from jax_transfer.checkpoints import load_checkpoint, torch_weights
from jax_transfer.checkpoints.trajectory import Trajectory
from jax_transfer.data.augment import evaluation_view
from jax_transfer.data.sources import load_source
from jax_transfer.features import extract
from jax_transfer.models import MODELS
from jax_transfer.ranking import command
from jax_transfer.ranking import rank as ranking_module
from jax_transfer.ranking.candidates import list_candidates, load
from jax_transfer.ranking.page import write_page
from jax_transfer.ranking.result import Ranked, Ranking, answer
from jax_transfer.records import InputError
from jax_transfer.transfer.cross_validation import (
    cross_validated,
    image_weights,
    paired_difference,
    share_with_interval,
)
from jax_transfer.transfer.fewshot import draw_episodes
from jax_transfer.transfer.softmax_regression import ProbeSettings, converged

TARGET = "embedded:digits?train=160&test=40"


def write_checkpoint(path, width=8, seed=0, head=True, change=None, **preprocessing):
    """Writes a small random ResNet as .safetensors; returns the path."""
    net = MODELS["resnet10"](num_classes=10, stem="cifar", width=width)
    params, stats = net.init(jax.random.key(seed))
    if change:
        params = {**params, "bn1": jax.tree.map(change, params["bn1"])}
    if not head:
        params = {name: value for name, value in params.items() if name != "fc"}
    model = {"name": "resnet10", "stem": "cifar", "width": width, "num_classes": 10}
    described = {"model": model, "preprocessing": {"image_size": 8, **preprocessing}}
    torch_weights.save_safetensors(path, params, stats, {"jax_transfer": json.dumps(described)})
    return path


def write_class_folders(folder, classes=("a", "b"), count=10, damaged=0):
    """Writes folders of random images, with `damaged` more files in each; returns the name of the data set."""
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
        for i in range(damaged):
            (folder / name / f"damaged_{i}.png").write_bytes(b"\x89PNG no more")
    return f"folder:{folder}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two good checkpoints, one with few channels, one with constant features, and four that cannot be read."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write_checkpoint(folder / "blind.safetensors", change=lambda x: 0 * x)
    write_checkpoint(folder / "weak.safetensors", width=1)
    whole = write_checkpoint(folder / "small.safetensors").read_bytes()
    write_checkpoint(folder / "headless.safetensors", head=False, seed=1)
    write_checkpoint(folder / "nan.safetensors", change=lambda x: np.nan * x)
    (folder / "broken.safetensors").write_bytes(b"no checkpoint")
    (folder / "short.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "code.pth").write_bytes(pickle.dumps(print))
    return folder


@pytest.fixture(scope="module")
def ranking(folder):
    return jt.rank(sorted(folder.glob("*")), TARGET, scores=("logme", "leep"))


def test_the_best_is_first_and_failures_are_last(ranking):
    names = [row.checkpoint for row in ranking.rows]
    assert set(names[:2]) == {"small", "headless"} and names[2] == "weak"
    assert ranking.best.accuracy > 0.5 > ranking.rows[2].accuracy
    accuracies = [row.accuracy for row in ranking.evaluated]
    assert accuracies == sorted(accuracies, reverse=True) and len(accuracies) == 3
    assert ranking.num_images == 200 and all(row.low < row.accuracy < row.high for row in ranking.evaluated)
    difference = ranking.best.accuracy - ranking.rows[2].accuracy
    assert ranking.best.behind == 0 and ranking.rows[2].behind == pytest.approx(difference)
    assert ranking.rows[2] not in ranking.tied


def test_each_row_loads_the_evaluated_checkpoint(ranking, folder):
    loaded = ranking.best.load()
    assert loaded.preprocessing == ranking.best.preprocessing and loaded.net.name == ranking.best.model
    one = jt.rank(
        f"{folder / 'small.safetensors'}=resnet10", TARGET, scores=("logme",), preprocessing={"mean": (0, 0, 0)}
    )
    assert one.best.load().preprocessing.mean == (0, 0, 0)
    random = jt.rank("random:resnet10", TARGET, scores=("logme",), preprocessing={"image_size": 32}, seed=3)
    expected, _ = MODELS["resnet10"](num_classes=1000).init(jax.random.key(3))
    assert jax.tree.all(jax.tree.map(np.array_equal, random.best.load().params, expected))
    with pytest.raises(InputError, match="truncated"):
        next(row for row in ranking.rows if row.checkpoint == "short").load()


def test_candidates_accept_settings_and_home_folders(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    found = list_candidates(["~/small.safetensors=resnet10?stem=cifar&width=8", "random:resnet10?width=4"], None)
    assert [candidate.name for candidate in found] == ["small", "random resnet10?width=4"]
    assert found[0].path == folder / "small.safetensors"
    assert found[0].model == "resnet10?stem=cifar&width=8"
    assert load(found[1], {"image_size": 32}, seed=0).params["conv1"]["kernel"].shape[-1] == 4
    path = folder / "small.safetensors"
    assert list_candidates(path, None) == list_candidates([str(path)], None)


def test_a_checkpoint_in_a_hub_cache_is_named_by_its_repository(tmp_path):
    for tag in ("a1_in1k", "tv2_in1k"):
        snapshot = tmp_path / f"models--timm--resnet18.{tag}" / "snapshots" / "0123"
        snapshot.mkdir(parents=True)
        (snapshot / "model.safetensors").write_bytes(b"")
    names = [c.name for c in list_candidates(sorted(tmp_path.glob("models--*")), None)]
    assert names == ["timm/resnet18.a1_in1k", "timm/resnet18.tv2_in1k"]


def test_a_guessed_preprocessing_is_marked_unless_replaced(folder, tmp_path):
    torch_weights.save_safetensors(tmp_path / "resnet10.safetensors", *_weights(), {})
    files = [tmp_path / "resnet10.safetensors", folder / "small.safetensors"]
    found = jt.rank(files, TARGET, scores=("logme",), preprocessing={"image_size": 32})
    guesses = {row.checkpoint.split("/")[-1]: row.preprocessing_is_guess for row in found.rows}
    assert guesses == {"resnet10": True, "small": False}
    page = write_page(found, tmp_path).read_text()
    assert "a guess" in page and all(note in page for row in found.rows for note in map(html.escape, row.notes))
    whole = load_checkpoint(files[1]).preprocessing.to_json()
    (candidate,) = list_candidates(files[0], None)
    assert not load(candidate, {**whole, "image_size": 32}, seed=0).preprocessing_is_guess


def _weights():
    return MODELS["resnet10"](num_classes=10, width=8).init(jax.random.key(0))


def test_epochs_of_a_trajectory_are_ranked(tmp_path):
    net = MODELS["resnet10"](num_classes=10, stem="cifar", width=8)
    described = {
        "model": {"name": "resnet10", "stem": "cifar", "width": 8, "num_classes": 10},
        "preprocessing": {"image_size": 8},
    }
    run = Trajectory(tmp_path / "run" / "checkpoints")
    for epoch, head in ((0, {}), (1, {}), (2, {"has_head": False})):
        params, stats = net.init(jax.random.key(epoch))
        training = {"opt_state": {}, "step": 0, "key": 0}
        run.save(epoch, {"params": params, "stats": stats}, training, {**described, **head})
    run.close()
    found = jt.rank(tmp_path / "run", TARGET, scores=("leep", "logme"))
    assert sorted(row.checkpoint for row in found.rows) == ["0", "1", "2"]
    for row in found.rows:
        assert math.isfinite(row.scores["leep"]) == (row.checkpoint != "2") and math.isfinite(row.scores["logme"])
        expected, _ = net.init(jax.random.key(int(row.checkpoint)))
        assert jax.tree.all(jax.tree.map(np.array_equal, row.load().params, expected))
    assert found.num_scored("leep") == 2 and found.first_by("leep") is None


def test_a_ranking_can_be_pickled(ranking):
    assert pickle.loads(pickle.dumps(ranking)).best.load().net is ranking.best.load().net


def test_bad_checkpoints_are_reported_and_do_not_stop_others(ranking, folder):
    errors = {row.checkpoint: row.error for row in ranking.rows if row.error}
    assert set(errors) == {"nan", "broken", "short", "code", "blind"}
    for name, error in errors.items():
        assert str(folder / name) in error and "\n" not in error
    assert "NaN" in errors["nan"] and "truncated" in errors["short"] and "do not vary" in errors["blind"]
    assert all(math.isnan(row.accuracy) for row in ranking.rows if row.error)


@pytest.mark.parametrize("gigabytes", [2.0, 0.0], ids=["kept", "read again"])
def test_problems_of_files_are_logged_before_the_work(folder, gigabytes, caplog, monkeypatch):
    monkeypatch.setattr(ranking_module, "KEPT_GIGABYTES", gigabytes)
    monkeypatch.setattr(logging.getLogger("jax_transfer"), "propagate", True)  # independently of earlier tests
    files = [folder / name for name in ("headless.safetensors", "small.safetensors", "short.safetensors")]
    with caplog.at_level("INFO", "jax_transfer"):
        ranking = jt.rank(files, TARGET, scores=("logme",))
    assert [row.checkpoint for row in ranking.rows if row.error] == ["short"]
    messages = [record.getMessage() for record in caplog.records]
    (estimate,) = [index for index, message in enumerate(messages) if "of computation, not including" in message]
    (broken,) = [index for index, message in enumerate(messages) if "truncated" in message]
    headless = [index for index, message in enumerate(messages) if "the file has no head" in message]
    assert broken < estimate and headless[0] < estimate
    assert len(headless) == (1 if gigabytes else 2)


def test_scores_of_logits_need_a_head(ranking):
    scores = {row.checkpoint: row.scores for row in ranking.evaluated}
    assert math.isnan(scores["headless"]["leep"]) and math.isfinite(scores["headless"]["logme"])
    assert math.isfinite(scores["small"]["leep"])


def test_table_csv_and_page_agree(ranking, tmp_path):
    text = " ".join(str(ranking).split())
    assert f"Use {ranking.best.checkpoint}" in text and "Failed:" in text and "LogME" in text
    page = write_page(ranking, tmp_path).read_text()
    assert "<script" not in page and f"Use {ranking.best.checkpoint}" in page and "What failed" in page
    for row in ranking.rows:
        assert row.checkpoint in text and row.checkpoint in page
    assert f"{100 * ranking.best.accuracy:.2f}" in page
    with open(tmp_path / "ranking.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["checkpoint"] for row in rows] == [row.checkpoint for row in ranking.rows]
    assert float(rows[0]["accuracy"]) == ranking.best.accuracy and rows[0]["image_size"] == "8"
    assert float(rows[0]["logme"]) == ranking.best.scores["logme"] and rows[-1]["error"]


def ranked(name, accuracy, behind_low, **scores):
    interval = {"low": 0.4, "high": 0.9, "behind": 0.1, "behind_low": behind_low, "behind_high": 0.2}
    return Ranked(name, name, accuracy=accuracy, scores=scores, **interval)


def test_the_answer_names_ties_and_contradicting_scores():
    rows = [
        ranked("a", 0.8, 0, s=1.0, t=3.0),
        ranked("b", 0.7, -0.01, s=3.0, t=2.0),
        ranked("c", 0.6, 0.05, s=2.0, t=1.0),
    ]
    found = Ranking("folder:x", 9, 2, 0.3, rows)
    assert [row.checkpoint for row in found.tied] == ["b"]
    message = " ".join(answer(found))
    assert "too few to tell it from b" in message and "t also ranks it first; s ranks b first" in message
    assert found.agreement("t") == 1 and found.agreement("s") == pytest.approx(-1 / 3)
    assert found.mean_agreement == pytest.approx((1 - 1 / 3 - 1 / 3) / 3) and "contradict" in message
    clear = Ranking("folder:x", 9, 2, 0.3, [rows[0], rows[2]])
    assert not clear.tied and "next one, c, is 10.00 points behind" in " ".join(answer(clear))


@pytest.mark.parametrize(("low", "advice"), [(0.49, "Use none"), (0.5, "Use none"), (0.51, "Use a")])
def test_a_checkpoint_at_majority_accuracy_is_not_recommended(low, advice):
    row = dataclasses.replace(ranked("a", 0.6, 0, s=1.0), low=low)
    assert answer(Ranking("folder:x", 100, 2, 0.5, [row]))[0].startswith(advice)


def test_the_best_of_many_random_checkpoints_is_rarely_recommended():
    rng, taken = np.random.default_rng(0), {1: 0, 10: 0}
    for k in taken:
        for _ in range(400):
            guesses = [share_with_interval(rng.random(200) < 0.5, np.ones(200)) for _ in range(k)]
            accuracy, low, _ = max(guesses)
            rows = [dataclasses.replace(ranked("a", accuracy, 0), low=low)] * k
            taken[k] += Ranking("folder:x", 200, 2, 0.5, rows).is_useful
    assert max(taken.values()) < 0.05 * 400


def test_a_score_missing_for_a_checkpoint_ranks_nothing(tmp_path):
    rows = [
        ranked("a", 0.8, 0, s=1.0, t=5.0),
        ranked("b", 0.7, -0.01, s=3.0, t=math.nan),
        ranked("c", 0.6, 0.05, s=2.0, t=1.0),
    ]
    found = Ranking("folder:x", 9, 2, 0.3, rows)
    assert found.first_by("t") is None and math.isnan(found.agreement("t")) and math.isfinite(found.agreement("s"))
    assert found.num_scored("t") == 2 and found.complete_scores == ["s"]
    assert "t is missing for some of the 3 checkpoints, so it cannot rank them" in " ".join(answer(found))
    assert "2 of 3" in write_page(found, tmp_path).read_text() and "5.00★" not in str(found)


def test_the_metric_is_used_in_answer_and_page(tmp_path):
    target = write_class_folders(tmp_path / "images", classes=("cat", "dog", "emu"), count=12)
    for extra in range(30):  # two thirds are cats: constant predictions have high accuracy
        Image.fromarray(np.full((8, 8, 3), extra, np.uint8)).save(tmp_path / "images" / "cat" / f"more_{extra}.png")
    arguments = {"target": target, "scores": ("logme",), "preprocessing": {"image_size": 32}}
    found = jt.rank("random:resnet10", metric="mean_class_accuracy", **arguments)
    assert found.metric == "mean_class_accuracy" and found.majority == pytest.approx(1 / 3)
    assert "averaged over classes" in answer(found)[0] and "class mean %" in write_page(found, tmp_path).read_text()
    assert jt.rank("random:resnet10", **arguments).majority == pytest.approx(42 / 66)
    with pytest.raises(InputError, match="metric"):
        jt.rank("random:resnet10", metric="mean", **arguments)


def test_log_table_and_page_name_the_classes(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("jax_transfer"), "propagate", True)
    target = write_class_folders(tmp_path / "images", classes=tuple("abcdefgh"), count=6)
    for i in range(3, 6):
        (tmp_path / "images" / "c" / f"{i}.png").unlink()
    with caplog.at_level("INFO", "jax_transfer"):
        found = jt.rank("random:resnet10", target, scores=("logme",), preprocessing={"image_size": 32})
    for text in (caplog.text, " ".join(str(found).split()), write_page(found, tmp_path).read_text()):
        assert "(a, b, c, d, ... h)" in text
    (note,) = [note for note in found.notes if "fewer than 5 images" in note]
    assert note == "1 of 8 classes has fewer than 5 images (c 3): its accuracy is rough."
    assert note in write_page(found, tmp_path).read_text()


@pytest.mark.parametrize("counts", [(1, 4), (1, 9), (2, 3, 1, 30), (5, 5), (4, 4, 4, 4, 4, 1)])
def test_small_and_single_image_classes_are_noted(tmp_path, counts):
    rng = np.random.default_rng(0)
    for name, count in zip("abcdef", counts, strict=False):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(tmp_path / name / f"{i}.png")
    arguments = {"scores": ("logme",), "preprocessing": {"image_size": 32}}
    notes = jt.rank("random:resnet10?width=4", f"folder:{tmp_path}", **arguments).notes
    small = [f"{name} {count}" for name, count in zip("abcdef", counts, strict=False) if count < 5]
    assert len(notes) == bool(small)
    if small:
        assert f"{len(small)} of {len(counts)} classes" in notes[0] and ", ".join(small[:3]) in notes[0]
        assert ("alone in its class" in notes[0]) == (1 in counts)


@pytest.mark.parametrize(
    ("count", "message"), [(1, "no class has more than one image"), (2, "has 4 images: at least 5 are needed")]
)
def test_a_target_with_too_few_images_is_refused_first(tmp_path, count, message):
    with pytest.raises(InputError, match=message):
        jt.rank("nothing.safetensors", write_class_folders(tmp_path / "images", count=count))


def test_brackets_and_control_characters_in_names_are_shown(folder, tmp_path):
    names = ("cat [small]", "[bold]dog", "x[@a]", "red\x1b[31m", "new\nline")
    target = write_class_folders(tmp_path / "my [old] images", classes=names, count=2)
    shutil.copy(folder / "small.safetensors", tmp_path / "run [link].safetensors")
    found = jt.rank(tmp_path / "run [link].safetensors", target, scores=("logme",))
    text = " ".join(str(found).split())
    for shown in ("my [old] images", "cat [small]", "[bold]dog", "x[@a]", r"red\x1b[31m", r"new\nline", "run [link]"):
        assert shown in text
    assert "\x1b" not in str(found)


def test_a_ranking_without_scores_has_no_empty_table(folder, tmp_path):
    found = jt.rank(folder / "headless.safetensors", TARGET, scores=("leep", "nce"))
    page = write_page(found, tmp_path).read_text()
    assert not found.scores and "<tr></tr>" not in page and "Use headless" in page and "What was measured" in page


def test_the_interval_with_equal_weights_equals_scipys_wilson():
    for correct, total in ((0, 5), (0, 7), (0, 10), (7, 10), (180, 200), (50, 50)):
        share, low, high = share_with_interval(np.arange(total) < correct, np.ones(total))
        expected = binomtest(correct, total).proportion_ci(method="wilson")
        assert share == correct / total
        np.testing.assert_allclose((low, high), expected, atol=1e-4)
        assert low >= 0 and high <= 1 and f"{low:.2f}" != "-0.00"


def test_the_paired_interval_has_95_percent_coverage():
    rng = np.random.default_rng(0)
    inside = narrower = 0
    for _ in range(400):
        a = rng.random(500) < 0.8
        b = np.where(rng.random(500) < 0.1, rng.random(500) < 0.4, a)  # right on 0.76 of the images
        difference, low, high = paired_difference(a, b, np.full(500, 3.0))
        assert difference == pytest.approx(a.mean() - b.mean())
        inside += low <= 0.04 <= high
        unpaired = np.sqrt(a.var() / 500 + b.var() / 500) * 2 * 1.96
        narrower += high - low < 0.6 * unpaired
    assert 0.92 < inside / 400 < 0.98 and narrower == 400


def test_the_interval_covers_the_mean_class_accuracy():
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], [300, 60, 40])
    of_class = np.array([0.9, 0.6, 0.3])
    weights, inside = image_weights(y, "mean_class_accuracy"), 0
    for _ in range(300):
        right = rng.random(400) < of_class[y]
        share, low, high = share_with_interval(right, weights)
        assert share == pytest.approx(np.mean([right[y == k].mean() for k in range(3)]))
        inside += low <= of_class.mean() <= high
    assert 0.92 < inside / 300 <= 1


def test_cross_validation_is_close_to_scikit_learn():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 203).astype(np.int32)
    x = (np.eye(3)[y] @ rng.normal(size=(3, 5)) + rng.normal(size=(203, 5))).astype(np.float32)
    right = cross_validated(x, y, 3)
    held_out = [i for i in range(203) if i % 5 == 0]
    fitted = [i for i in range(203) if i % 5]
    reference = LogisticRegression(C=1.0).fit(x[fitted], y[fitted]).score(x[held_out], y[held_out])
    assert right.shape == (203,) and abs(right.mean() - reference) < 0.1
    assert cross_validated(x, rng.permutation(y), 3).mean() < 0.5
    # The features do not change the folds.
    assert np.array_equal(cross_validated(x[:, ::-1], y, 3), right)


@pytest.mark.parametrize("counts", [(100, 4), (33, 1, 20), (2, 2, 1)])
def test_every_image_is_tested_by_a_classifier_of_other_images(counts):
    y = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    unique = np.eye(len(y), dtype=np.float32)  # no image helps to classify another
    right, rare = cross_validated(unique, y, len(counts)), 2 * np.array(counts)[y] < max(counts)
    assert right.shape == y.shape and not right[rare].any()
    shuffled = np.random.default_rng(0).permutation(y)
    right = cross_validated(np.eye(len(counts), dtype=np.float32)[shuffled], shuffled, len(counts))
    np.testing.assert_array_equal(right, np.array(counts)[shuffled] > 1)  # the only image of a class is always wrong


def test_padding_of_a_fold_does_not_change_the_classifier():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 5)).astype(np.float32), rng.integers(0, 3, 40).astype(np.int32)
    fit = functools.partial(converged, x, y, l2=0.01, key=None, num_classes=3, settings=ProbeSettings())
    rows, mask = np.r_[:30, 35, 35, 39], np.arange(33) < 30
    plain, padded = fit(indices=np.arange(30)), fit(indices=rows, mask=jnp.asarray(mask))
    for name in ("w", "b"):
        np.testing.assert_allclose(padded[name], plain[name], atol=1e-5)


def test_architectures_mix_and_preprocessing_can_be_replaced(folder, tmp_path):
    found = jt.rank(
        [folder / "small.safetensors", "random:resnet10", f"{folder / 'headless.safetensors'}=resnet10"],
        TARGET,
        scores=("logme",),
        preprocessing={"image_size": 32, "crop_fraction": 1.0},
        workdir=tmp_path,
    )
    assert {row.preprocessing.image_size for row in found.rows} == {32}
    assert {row.checkpoint for row in found.rows} == {"small", "headless", "random resnet10"}
    assert all(not row.error and math.isfinite(row.scores["logme"]) for row in found.rows)
    dims = {np.load(path)["features"].shape[1] for path in (tmp_path / "features").iterdir()}
    assert dims == {64, 512}


def test_a_second_run_of_the_command_uses_cached_features(folder, tmp_path, monkeypatch, capsys):
    config = command.default_config()
    config.checkpoints = f"{folder / 'small.safetensors'}, {folder / 'nan.safetensors'}"
    config.target, config.scores = TARGET, ("logme",)
    command.run(config, tmp_path)
    first = (tmp_path / "report" / "ranking.csv").read_text()
    assert "Use small" in capsys.readouterr().out and (tmp_path / "report" / "index.html").exists()
    monkeypatch.setattr(extract, "extract", None)
    command.run(config, tmp_path)
    without_seconds = [
        [[cell for name, cell in row.items() if name != "seconds"] for row in csv.DictReader(text.splitlines())]
        for text in (first, (tmp_path / "report" / "ranking.csv").read_text())
    ]
    assert without_seconds[0] == without_seconds[1]


def test_damaged_images_are_skipped_or_an_error(folder, tmp_path, caplog):
    target = write_class_folders(tmp_path / "images", damaged=2)
    arguments = {"checkpoints": [folder / "small.safetensors"], "target": target, "scores": ("logme",)}
    assert jt.rank(**arguments).num_images == 20
    assert "damaged_1.png" in caplog.text
    with pytest.raises(InputError, match="damaged_"):
        jt.rank(**arguments, on_corrupt="error")


def test_a_folder_with_one_class_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"single class.*'a'"):
        jt.rank(["random:resnet10"], write_class_folders(tmp_path / "images", classes=("a",)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"checkpoints": []}, "checkpoints is empty"),
        ({"checkpoints": ["a.safetensors", "./a.safetensors"]}, "lists .*a.safetensors twice"),
        ({"checkpoints": ["random:resnet10", "random:resnet10"]}, "lists resnet10 twice"),
        ({"checkpoints": "random:resnet11?width=8"}, "'random:resnet11.*Did you mean 'resnet1"),
        ({"checkpoints": "random:resnet10?widht=8"}, "resnet10 does not take the settings"),
        ({"checkpoints": ["random:resnet11"]}, "'random:resnet11'.*Did you mean 'resnet1"),
        ({"checkpoints": ["a.safetensors"]}, "No checkpoint can be used. a.safetensors: no such"),
        ({"model": "resnet11"}, "Did you mean 'resnet1"),
        ({"scores": ("logmee",)}, "Did you mean 'logme'"),
        ({"target": "embedded:digit"}, "Did you mean 'digits'"),
        ({"preprocessing": {"image_sise": 3}, "checkpoints": ["random:resnet10"]}, "unknown image_sise"),
        ({"preprocessing": {"image_size": 3}, "checkpoints": ["random:resnet10"]}, "at least 32"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        jt.rank(**{"checkpoints": ["a.safetensors"], "target": TARGET, **arguments})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("checkpoints", " , ", "config.checkpoints is empty"),
        ("target", "", "config.target is empty"),
        ("on_corrupt", "ignore", "on_corrupt.*'ignore'"),
    ],
)
def test_the_command_names_the_field(field, value, message, tmp_path):
    config = command.default_config()
    config.checkpoints, config.target = "random:resnet10", TARGET
    config[field] = value
    with pytest.raises(InputError, match=message):
        command.run(config, tmp_path)


# --- classes from a few images


def test_few_shot_accuracies_equal_a_plain_loop_and_are_shown(tmp_path):
    path = write_checkpoint(tmp_path / "small.safetensors")
    ranking = jt.rank([path], TARGET, scores=(), shots=(1, 3))
    sources = [load_source(TARGET, split) for split in ("train", "test")]
    checkpoint = load_checkpoint(path)
    x, x_test = (
        np.asarray(checkpoint.net.apply(checkpoint.params, checkpoint.stats, _normalised(source, checkpoint)).features)
        for source in sources
    )
    x, x_test = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (x, x_test))
    accuracies = []
    for rows in draw_episodes(sources[0].labels, range(10), 3, ranking_module.EPISODES, seed=0):
        weights = x[rows].mean(1)
        weights /= np.linalg.norm(weights, axis=1, keepdims=True)
        accuracies.append(np.mean((x_test @ weights.T).argmax(1) == sources[1].labels))
    mean, half_width = ranking.best.few_shot[3]
    assert mean == pytest.approx(np.mean(accuracies), abs=2e-3) and 0 < half_width < 0.05
    assert f"{100 * mean:.1f}" in str(ranking) and "3-shot %" in write_page(ranking, tmp_path).read_text()
    ranking.to_csv(tmp_path / "ranking.csv")
    (row,) = csv.DictReader((tmp_path / "ranking.csv").open())
    assert float(row["3_shot"]) == mean and float(row["1_shot"]) == ranking.best.few_shot[1][0]


def _normalised(source, checkpoint):
    grey = np.asarray(source.read(np.arange(len(source))))
    return evaluation_view(jnp.asarray(np.repeat(grey[..., None], 3, axis=-1)), checkpoint.preprocessing)


@pytest.mark.parametrize(
    ("shots", "message"),
    [
        (1, r"shots = 1: expected a list of numbers of images, such as \(1, 5\)"),
        ((0,), r"shots = \(0,\): expected numbers of images, each 1 or more"),
        ((2, 2), r"shots = \(2, 2\) lists a number twice"),
        ((99,), r"shots = \(99,\): class '\d' of .* has \d+ training images, fewer than 99"),
    ],
)
def test_bad_shots_are_refused_before_a_checkpoint_is_evaluated(shots, message, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        jt.rank([tmp_path / "missing.safetensors", "random:resnet10"], TARGET, shots=shots)
    assert "\n" not in str(caught.value)


def test_lists_that_need_no_images_stand_beside_the_scores(tmp_path):
    """The larger net has more parameters and work; both are counted without heads, and equal lists are left out."""
    paths = [write_checkpoint(tmp_path / f"w{width}.safetensors", width=width) for width in (4, 8)]
    ranking = jt.rank(paths, TARGET, scores=("logme",))
    by_name = {row.checkpoint: row for row in ranking.rows}
    assert ranking.naive_lists == ["num_parameters", "forward_gflops"]
    for name in ranking.naive_lists:
        assert by_name["w4"].naive[name] < by_name["w8"].naive[name]
        assert ranking.first_by(name).checkpoint == "w8"
    net = by_name["w8"].load().net
    head = net.feature_dim * net.num_classes + net.num_classes
    assert by_name["w8"].naive["num_parameters"] == by_name["w8"].num_parameters - head
    assert "The list by number of parameters, which needs no images of the target, ranks w8 first." in answer(ranking)
    text = write_page(ranking, tmp_path / "page").read_text(encoding="utf-8")
    assert "Parameters" in text and "GFLOP of a forward pass" in text and "Source accuracy" not in text
    with open(tmp_path / "page" / "ranking.csv", newline="") as file:
        (first, _) = csv.DictReader(file)
    assert float(first["num_parameters_without_head"]) < float(first["num_parameters"])
