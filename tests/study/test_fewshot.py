"""The stage fewshot: rows against a plain computation from the kept embeddings, resuming, and bad input."""

import json
import subprocess
import sys

import numpy as np
import pytest

from helpers.source_files import REPOSITORY
from helpers.studies import TINY, environment, results_without_times, run_stages, tiny_config
from jax_transfer.records import InputError
from jax_transfer.study import fewshot
from jax_transfer.study.workspace import Workspace
from jax_transfer.transfer.fewshot import draw_episodes

TARGET = "embedded:digits?per_class=12&test=80"
FEW, MISSING = "embedded:digits?per_class=12&test=8", ("2", "8")  # of these no image is among the eight test images
CONFIG = {
    "stages": ("pretrain", "fewshot"),
    "model__width": 8.0,
    "targets": (TARGET,),
    "pretrain__epochs": 1,
    "trajectory__epochs": "0,1",
    "finetune__steps": 8,
    "finetune__epochs": 1,
    "finetune__batch_size": 20,
    "finetune__augment": ("pad_crop",),
    "fewshot__shots": (1, 5),
    "fewshot__num_episodes": 6,
    "fewshot__embedding_dim": 16,
    "data__eval_batch_size": 80,
}


def config(**changes):
    return tiny_config(**{**CONFIG, **changes})


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Returns the working directory of the study, and its rows."""
    workdir = tmp_path_factory.mktemp("fewshot")
    return workdir, run_stages(config(), workdir)


def test_there_is_a_row_for_each_checkpoint_method_and_number_of_shots(study):
    rows = study[1]["fewshot"]
    keys = [(row["checkpoint"], row["method"], row["shots"]) for row in rows]
    methods = ("imprinting", "imprinting_frozen", "prototypes")
    assert sorted(keys) == sorted((c, m, n) for c in ("0", "1") for m in methods for n in (1, 5))
    for row in rows:
        tuned, has_seen = row["method"] == "imprinting", row["method"] != "prototypes"
        assert row["num_train"] == (60 if tuned else 0) and (row["gflops"] > 0) == tuned
        assert (row["num_seen"], row["num_unseen"]) == ((5, 5) if has_seen else (0, 10))
        assert (row["seen_only"] is None) == (not has_seen) and not row["error"]
        assert row["num_episodes"] == 6 and row["metric"] == "accuracy" and row["num_test"] == 80


@pytest.mark.parametrize("method", ["imprinting", "imprinting_frozen"])
def test_accuracies_equal_a_plain_loop_over_the_draws(study, method):
    """With the embeddings on disk: mean directions, cosines, the best class, in float64."""
    workdir, rows = study
    work = Workspace(config(), workdir)
    snapshot = work.snapshots[-1]
    tuned = method == "imprinting"
    checkpoint = fewshot._tuned_checkpoint(work, snapshot, TARGET) if tuned else work.checkpoint(snapshot)
    train, test = (work.features_of(checkpoint, work.source(TARGET, split)) for split in ("train", "test"))
    x, y = _unit(train.features), np.asarray(train.labels)
    if tuned:
        assert x.shape[1] == 16
        seen = _unit(np.load(fewshot._weights_path(work, checkpoint, TARGET)))
    else:
        seen = _unit(np.stack([x[y == c].mean(0) for c in range(5)]))
    labels, accuracies = np.asarray(test.labels), []
    for episode in draw_episodes(y, range(5, 10), 5, 6, work.config.seed):
        weights = np.concatenate([seen, _unit(np.stack([x[own].mean(0) for own in episode]))])
        predicted = (_unit(test.features) @ weights.T).argmax(1)
        accuracies.append((predicted == labels)[labels >= 5].mean())
    work.close()
    (row,) = (r for r in rows["fewshot"] if (r["checkpoint"], r["method"], r["shots"]) == ("1", method, 5))
    assert row["unseen"] == pytest.approx(np.mean(accuracies), abs=1e-6)
    assert row["unseen_interval"] == pytest.approx(1.96 * np.std(accuracies, ddof=1) / 6**0.5, abs=1e-6)


def _unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_resuming_adds_only_the_missing_rows_and_more_shots_train_nothing(study, monkeypatch):
    workdir, _ = study
    path, whole = workdir / "results" / "fewshot.jsonl", results_without_times(workdir)["fewshot.jsonl"]
    kept = path.read_text().splitlines(keepends=True)
    path.write_text("".join(kept[:2] + kept[4:-1]) + kept[-1][:30])  # one checkpoint's tuned rows, and a torn line
    run_stages(config(), workdir)
    again = results_without_times(workdir)["fewshot.jsonl"]
    assert sorted(map(json.dumps, again)) == sorted(map(json.dumps, whole))
    monkeypatch.setattr(fewshot, "finetune", None)  # nothing is tuned again
    rows = run_stages(config(fewshot__shots=(1, 2, 5)), workdir)["fewshot"]
    assert len(rows) == len(whole) + 6
    (new,) = (r for r in rows if (r["checkpoint"], r["method"], r["shots"]) == ("1", "imprinting", 2))
    (old,) = (r for r in rows if (r["checkpoint"], r["method"], r["shots"]) == ("1", "imprinting", 5))
    assert (new["seconds"], new["gflops"], new["num_train"]) == (old["seconds"], old["gflops"], old["num_train"])


def test_augmented_copies_are_views_of_the_images_in_their_order_and_kept(study, monkeypatch):
    work = Workspace(config(fewshot__augmented_copies=2), study[0])
    checkpoint = work.checkpoint(work.snapshots[-1])
    x, _ = fewshot._embeddings(work, checkpoint, TARGET)
    same = Workspace(config(fewshot__augmented_copies=2, finetune__augment=()), study[0])
    copies, _ = fewshot._embeddings(same, checkpoint, TARGET)
    expected = np.asarray(work.features_of(checkpoint, work.source(TARGET, "train")).features)
    np.testing.assert_allclose(copies, np.repeat(expected[:, None], 2, axis=1), atol=1e-4)
    same.close()
    monkeypatch.setattr(fewshot, "make_embed", None)
    again, _ = fewshot._embeddings(work, checkpoint, TARGET)
    plain = work.features_of(checkpoint, work.source(TARGET, "train")).features
    assert x.shape == (120, 2, plain.shape[1])
    np.testing.assert_array_equal(x, again)
    cosines = (_unit(x.reshape(240, -1)).reshape(x.shape) * _unit(plain)[:, None]).sum(-1)
    assert cosines.mean() < 1 - 1e-6 and np.any(x[:, 0] != x[:, 1])
    others = (_unit(x[:, 0]) * _unit(np.roll(plain, 1, axis=0))).sum(-1)
    assert cosines.mean() > others.mean()
    work.close()


def test_divergence_is_a_row_that_is_computed_again(tmp_path):
    changes = {"fewshot__methods": ("imprinting",), "trajectory__epochs": "0", "fewshot__shots": (1,)}
    diverging = config(**changes, finetune__optimizer__learning_rate=1e30)
    (row,) = run_stages(diverging, tmp_path)["fewshot"]
    assert "the loss is not finite at step" in row["error"] and row["unseen"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"fewshot__seen": {TARGET: ("0", "1")}, "fewshot__unseen": {TARGET: ("1", "2")}},
            r"class '1' of .* is in seen and in unseen \(1 in all\): remove it from one of them",
        ),
        ({"fewshot__seen": {TARGET: ("0", "0")}}, r"config\.fewshot\.seen\[.*\] lists '0' twice"),
        (
            {"targets": (FEW,), "fewshot__seen": {}, "fewshot__unseen": {FEW: MISSING}, "fewshot__shots": (1,)},
            r"none of the 2 unseen classes has a test image: choose others in config\.fewshot\.unseen",
        ),
        (
            {"model__batch_norm_group": 32, "pretrain__batch_size": 32},
            r"config\.finetune\.batch_size = 20 .*batch_norm_group",
        ),
        ({"fewshot__shots": (1, 13)}, r"class '0' has 12 training images, fewer than the 13 shots of config\.fewshot"),
        ({"fewshot__seen": {TARGET: ("zero",)}}, r"\(config\.fewshot\.seen.*'zero'\. Valid: 0, 1"),
        ({"fewshot__seen": {"tfds:mnist": ("0",)}}, r"config\.fewshot\.seen; it must be one of config\.targets"),
        ({"fewshot__methods": ("imprint",)}, "Did you mean 'imprinting'"),
        ({"fewshot__shots": (0,)}, r"config\.fewshot\.shots\[0\] = 0"),
        ({"finetune__batch_size": 64}, "seen classes of .* fewer than .*64"),
    ],
)
def test_a_study_that_cannot_work_is_refused_in_one_line(changes, message, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        run_stages(config(**changes), tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "checkpoints").exists()


def test_classes_by_name_are_divided(tmp_path):
    work = Workspace(config(fewshot__seen={TARGET: ("7", "2")}, fewshot__unseen={TARGET: ("9", "1", "0")}), tmp_path)
    split = fewshot.class_split(work, TARGET)
    assert split.seen.tolist() == [2, 7] and split.unseen.tolist() == [0, 1, 9]
    work.close()


@pytest.mark.slow
def test_two_processes_write_the_rows_of_one(study, tmp_path):
    workdir, _ = study
    fields = {**TINY, **{name.replace("__", "."): value for name, value in CONFIG.items()}}
    command = ["bash", "launch/local_processes.sh", "2", "--config=configs/quickstart.py:smoke"]
    command += [f"--workdir={tmp_path}", *(f"--config.{name}={value}" for name, value in fields.items())]
    ended = subprocess.run(
        command, cwd=REPOSITORY, env=environment(PYTHON=sys.executable), capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    own, whole = (results_without_times(folder)["fewshot.jsonl"] for folder in (tmp_path, workdir))
    one = {(r["checkpoint"], r["method"], r["shots"]): r for r in whole}
    for row in own:
        expected = one[row["checkpoint"], row["method"], row["shots"]]
        assert row["unseen"] == pytest.approx(expected["unseen"], abs=0.02), row
