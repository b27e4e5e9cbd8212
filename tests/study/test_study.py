"""A study runs end to end, survives being killed at any moment, and refuses bad input in one line."""

import contextlib
import csv
import json
import os
import shutil
import signal

import numpy as np
import pytest

from helpers.studies import checkpoint_fingerprints, results_without_times, run_command, tiny_config
from jax_transfer import main, preemption
from jax_transfer.checkpoints.trajectory import Trajectory
from jax_transfer.records import InputError
from jax_transfer.results import Rows, ScoreRow
from jax_transfer.study import checks, settings
from jax_transfer.study import pretrain as pretrain_stage
from jax_transfer.study.runner import open_workdir
from jax_transfer.study.workspace import Workspace
from jax_transfer.trust.evidence import NAIVE

# Runs the study in a process that kills itself at a given point, as `kill -9` would.
KILLED = """
import os, signal, sys
from jax_transfer import main, results
from jax_transfer.checkpoints.trajectory import Trajectory
from jax_transfer.features import cache
from jax_transfer.study.stages import STAGES
from jax_transfer.training import loop
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
point, sys.argv[1:] = sys.argv[1], sys.argv[2:]
calls = 0
def after(number, action):
    global calls
    calls += 1
    if calls == number: action()
append, save, write_atomically = results.Rows.append, Trajectory.save, cache.write_atomically
if point == "in an epoch":
    check = loop.first_bad_step
    loop.first_bad_step = lambda *a: (after(11, die), check(*a))[1]
elif point == "while saving":
    Trajectory.save = lambda self, epoch, *a: (save(self, epoch, *a), epoch == 1 and die())
elif point == "after saving, before the row":
    saved = []
    def append_after_save(self, row):
        if self.name == "pretrain" and row.epoch == 1:
            saved[-1].wait(); die()
        append(self, row)
    results.Rows.append = append_after_save
    Trajectory.save = lambda self, *a: (saved.append(self), save(self, *a))
elif point == "in the middle of a row":
    def append_in_part(self, row):
        if self.name == "transfer" and row.method == "finetune" and row.epoch == 1:
            with open(self.path, "a") as file: file.write(results._line(row)[:25])
            die()
        append(self, row)
    results.Rows.append = append_in_part
elif point == "while writing features":
    def write_in_part(path, data):
        if path.suffix == ".npz": after(3, lambda: (path.with_suffix(".partial").write_bytes(data[:99]), die()))
        write_atomically(path, data)
    cache.write_atomically = write_in_part
elif point == "between stages":
    STAGES["finetune"] = STAGES["finetune"]._replace(run=lambda work: die())
main.run()
"""
slow = pytest.mark.slow
POINTS = (
    "in an epoch",
    pytest.param("while saving", marks=slow),
    pytest.param("after saving, before the row", marks=slow),
    pytest.param("in the middle of a row", marks=slow),
    pytest.param("while writing features", marks=slow),
    pytest.param("between stages", marks=slow),
)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("clean")
    done = run_command(workdir)
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir, done


def test_study_writes_all_documented_results(clean):
    workdir, done = clean
    results = results_without_times(workdir)
    assert [row["epoch"] for row in results["pretrain.jsonl"]] == [0, 1, 2]
    assert {(row["epoch"], row["method"]) for row in results["transfer.jsonl"]} == {
        (epoch, method) for epoch in (0, 1, 2) for method in ("probe", "finetune")
    }
    assert all(0 <= row["accuracy"] <= 1 and row["num_test"] == 64 for row in results["transfer.jsonl"])
    assert {row["score"] for row in results["scores.jsonl"]} == {"logme", "leep", "nce", *NAIVE} - {"static"}
    assert {row["method"] for row in results["ranking.jsonl"]} == {"probe", "finetune"}
    assert {"recall@1", "rel@3", "weighted_kendall"} <= set(results["ranking.jsonl"][0])
    assert json.loads((workdir / "config.json").read_text())["model"]["width"] == 8
    assert len(list((workdir / "features").glob("*.npz"))) == 12  # two splits, before and after fine-tuning
    assert {(row["epoch"], row["stage"], row["component"]) for row in results["spectral.jsonl"]} == {
        (epoch, stage, component)
        for epoch in (0, 1, 2)
        for stage in ("pretrained", "finetuned")
        for component in ("full", "main", "residual")
    }
    assert all(0 < row["accuracy"] <= 1 and 0 < row["rank"] <= 64 for row in results["spectral.jsonl"])
    assert {(row["epoch"], row["stage"]) for row in results["embedding.jsonl"]} >= {(2, "pretrained"), (2, "finetuned")}
    assert len(results["similarity.jsonl"]) == 2 * 3 * 3
    assert "<svg" in (workdir / "report" / "index.html").read_text()
    assert list((workdir / "report" / "figures").glob("*.svg"))
    with open(workdir / "report" / "transfer.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(results["transfer.jsonl"])
    trajectory = Trajectory(workdir / "checkpoints")
    metadata = trajectory.metadata(2)
    trajectory.close()
    assert metadata["model"]["name"] == "resnet10" and metadata["preprocessing"]["image_size"] == 8
    assert metadata["source_accuracy"] == results["pretrain.jsonl"][2]["test_accuracy"]
    assert "Best checkpoint per target" in done.stdout
    assert "layer1/0/conv1/kernel" in done.stderr and "pretrain" in done.stderr


@pytest.mark.parametrize("point", POINTS)
def test_killed_study_resumes_bit_for_bit(clean, tmp_path, point):
    expected, _ = clean
    killed = run_command(tmp_path, code=("-c", KILLED, point))
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    resumed = run_command(tmp_path)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    if point == "in the middle of a row":
        assert "the last line is incomplete" in resumed.stderr
    assert results_without_times(tmp_path) == results_without_times(expected)
    assert checkpoint_fingerprints(tmp_path) == checkpoint_fingerprints(expected)


def test_stage_run_alone_adds_only_missing_rows(clean, tmp_path):
    expected, _ = clean
    shutil.copytree(expected, tmp_path / "copy")
    before = (tmp_path / "copy/results/transfer.jsonl").read_bytes()
    again = run_command(tmp_path / "copy", "--config.stages=('probe',)", "--config.probe.methods=('probe',)")
    assert again.returncode == 0, again.stderr[-3000:]
    assert (tmp_path / "copy/results/transfer.jsonl").read_bytes() == before


def test_lost_features_are_recomputed_within_a_small_budget(clean, tmp_path):
    expected, _ = clean
    shutil.copytree(expected, tmp_path / "copy")
    lost = ("results/spectral.jsonl", "results/similarity.jsonl")
    for path in (*(tmp_path / "copy/features").glob("*.npz"), *(tmp_path / "copy" / name for name in lost)):
        path.unlink()
    budget = "--config.data.features_gigabytes=1e-6"
    again = run_command(tmp_path / "copy", "--config.stages=('spectral',)", budget)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "The features of 3 checkpoints on" in again.stderr
    assert "The similarities of 3 checkpoints on" in again.stderr
    found, whole = results_without_times(tmp_path / "copy"), results_without_times(expected)
    rows, whole_rows = found.pop("similarity.jsonl"), whole.pop("similarity.jsonl")
    assert found == whole
    assert [(r["checkpoint"], r["other"], r["stage"]) for r in rows] == [
        (r["checkpoint"], r["other"], r["stage"]) for r in whole_rows
    ]
    for measure in ("cka", "overlap"):
        values = [[row[measure] for row in group] for group in (rows, whole_rows)]
        np.testing.assert_allclose(*values, rtol=1e-4)


# --- bad input: one line on stderr, exit code 2


REFUSED = {
    "--config.pretrain.epoch=5": "Unknown field of config.pretrain: 'epoch'. Did you mean 'epochs'? Valid: augment, ",
    "--config.pretrain.epochs=many": "--config.pretrain.epochs=many",
    "--config=configs/quickstart.py:tiny": "Unknown variant of configs/quickstart.py: 'tiny'. Valid: full, smoke.",
    "--config=configs/absent.py": "configs/absent.py",
    "--config.model.name=resnet19": "Did you mean 'resnet1",
    "extra": "Unexpected argument 'extra'",
}

# Runs the command once for each word of its first argument, in children of a process that has imported it.
CHILDREN = """
import os, sys, warnings
from jax_transfer import main
warnings.simplefilter("ignore")  # a child forks from threads that it never calls
words, sys.argv[1:] = sys.argv[1].split("|"), sys.argv[2:]
for word in words:
    child = os.fork()
    if not child:
        sys.argv.append(word)
        main.run()
    print(f"{word}: exit code", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=sys.stderr, flush=True)
"""


def test_command_refuses_bad_arguments_in_one_line(tmp_path):
    done = run_command(tmp_path / "w", code=("-c", CHILDREN, "|".join(REFUSED)))
    lines = iter(done.stderr.strip().splitlines())
    for argument, message in REFUSED.items():
        line = next(lines)
        assert line.startswith("jax_transfer: ") and message in line, done.stderr
        assert next(lines) == f"{argument}: exit code 2", done.stderr
    assert next(lines, None) is None


def test_divergence_names_the_step_and_keeps_the_last_good_epoch(tmp_path):
    done = run_command(tmp_path, "--config.pretrain.optimizer.learning_rate=1e30")
    assert done.returncode == 2
    assert "loss is not finite at step" in done.stderr.strip().splitlines()[-1]
    trajectory = Trajectory(tmp_path / "checkpoints")
    assert trajectory.epochs() == [0]
    trajectory.close()


PRETRAIN = "--config.stages=('pretrain',)"


@slow
def test_full_disk_is_reported_and_the_study_resumes(clean, tmp_path):
    expected, _ = clean
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); "
    limited += "from jax_transfer import main; main.run()"
    done = run_command(tmp_path, code=("-c", limited))
    assert done.returncode == 2, done.stderr[-3000:]
    assert "disk is full" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert run_command(tmp_path, PRETRAIN).returncode == 0
    assert checkpoint_fingerprints(tmp_path) == checkpoint_fingerprints(expected)


def test_stop_during_the_first_evaluation_saves_nothing(tmp_path, monkeypatch):
    for requested, saved in ((True, []), (False, [0, 1])):
        work = Workspace(tiny_config(pretrain__epochs=1), tmp_path)
        with monkeypatch.context() as patched:
            patched.setattr(preemption, "requested", lambda requested=requested: requested)
            with pytest.raises(preemption.Preempted) if requested else contextlib.nullcontext():
                pretrain_stage.run(work)
        assert work._trajectory(work.pretrainings[0]).epochs() == saved
        assert not (tmp_path / "stopped").exists()
        work.close()


def test_timeout_is_reported_in_one_line(monkeypatch, capsys):
    def time_out(*arguments, **named):
        raise TimeoutError("no answer")

    monkeypatch.setattr(main.app, "run", time_out)
    monkeypatch.setattr(main.logs, "setup", lambda: None)
    with pytest.raises(SystemExit) as raised:
        main.run()
    assert raised.value.code == 1
    assert capsys.readouterr().err.startswith("jax_transfer: A wait timed out (no answer)")


@slow
def test_clock_jump_is_reported_and_the_study_resumes(clean, tmp_path):
    expected, _ = clean
    jumping_clock = (
        "import itertools, time; real, n = time.time, itertools.count(); time.time = lambda: real() + 3600 * next(n)"
    )
    done = run_command(tmp_path, code=("-c", f"{jumping_clock}; from jax_transfer import main; main.run()"))
    assert done.returncode == 1, done.stderr[-3000:]
    assert "was the clock set? Run the same command again to resume." in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert run_command(tmp_path, PRETRAIN).returncode == 0
    assert checkpoint_fingerprints(tmp_path) == checkpoint_fingerprints(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": ("pretrain", "pretrian")}, r"stage .*'pretrian'.*Did you mean 'pretrain'"),
        ({"model__name": "vgg"}, r"model \(config\.model\.name\): 'vgg'"),
        ({"model__stem": "cifr"}, "stem"),
        ({"model__name": "mobilenet_v1"}, r"config.model.stem = 'cifar': mobilenet_v1 has no stem; leave it unset"),
        (
            {"model__stochastic_depth": 0.1},
            "resnet10 has no stochastic_depth.*The settings of resnet10 are: batch_norm_group, stem, width",
        ),
        ({"model__others": ({"name": "resnet10", "stem": "cifar", "width": 8.0},)}, "resnet10_cifar_8 twice"),
        ({"model__others": ({"name": "vgg"},)}, r"config\.model\.others\[0\]\.name\): 'vgg'"),
        ({"model__others": ({"width": 8},)}, r"config\.model\.others\[0\]\.name"),
        ({"scores": ("logm",)}, "score .*'logm'"),
        ({"pretrain__objective": "moco"}, "objective"),
        ({"pretrain__augment": ("spin",)}, "augmentation"),
        ({"finetune__optimizer.name": "lion"}, "optimizer"),
        ({"pretrain__augment": ("flip", "resized_crop")}, "lists 'resized_crop' after 'flip': list it first"),
        ({"pretrain__augment": ("resized_crop", "resized_crop")}, "lists 'resized_crop' twice"),
        (
            {"pretrain__augment": ("resized_crop",), "preprocessing__interpolation": "nearest"},
            "interpolation of random",
        ),
        ({"model__batch_norm_group": 5}, "does not divide into the groups of batch_norm_group = 5 images"),
        ({"model__batch_norm_group": 32, "pretrain__microbatches": 4}, "in 4 microbatches does not divide"),
        ({"pretrain__optimizer.schedule": "linear"}, "schedule"),
        ({"probe__methods": ("knn",)}, "probe"),
        ({"preprocessing__image_size": 4}, "image_size = 4 does not suit resnet10"),
        ({"pretrain__batch_size": 0}, "batch_size = 0"),
        ({"trajectory__epochs": "0,9"}, r"epochs are 0 to 2; there is no \[9\]"),
        ({"targets": ()}, "targets is empty"),
        ({"probe__validation_fraction": 1.5}, "validation_fraction"),
    ],
)
def test_check_names_the_field(changes, message):
    with pytest.raises(InputError, match=message):
        checks.check(tiny_config(**changes))


def test_unknown_config_field_suggests_the_nearest():
    config = tiny_config()
    with config.unlocked():
        config.pretrain.epoch = 3
    with pytest.raises(InputError, match=r"field of config\.pretrain: 'epoch'. Did you mean 'epochs'"):
        checks.check(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("tfds:cifar11",)}, "cifar10"),
        ({"targets": ("folder:/absent/images",)}, "/absent/images"),
        ({"targets": ("kaggle:dogs",)}, "embedded, folder, tfds"),
        ({"pretrain__batch_size": 512}, "256 training images, fewer than one batch of 512"),
        ({"finetune__batch_size": 512}, "128 training images, fewer than one batch of 512"),
    ],
)
def test_check_data_names_the_data_set(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        checks.check_data(Workspace(tiny_config(**changes), tmp_path))


def test_labels_out_of_range_are_refused(tmp_path):
    work = Workspace(tiny_config(), tmp_path)
    good = work.source("embedded:digits?train=256&test=64", "train")
    bad = type(good)(**{**good.__dict__, "labels": good.labels + 5})
    work.source = lambda dataset, split: bad
    with pytest.raises(InputError, match=r"labels lie in \[5, 14\]"):
        checks.check_data(work)


def test_workdir_of_another_config_names_the_differing_fields(tmp_path):
    open_workdir(tiny_config(), tmp_path).close()
    open_workdir(tiny_config(stages=("report",)), tmp_path).close()
    (tmp_path / "results").mkdir(exist_ok=True)
    (tmp_path / "results/targets.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"config\.pretrain\.epochs was 2, is 3; config\.seed was 0, is 1"):
        open_workdir(tiny_config(seed=1, pretrain__epochs=3), tmp_path)


def test_two_runs_cannot_share_a_workdir(tmp_path):
    lock = open_workdir(tiny_config(), tmp_path)
    with pytest.raises(InputError, match="in use by another run"):
        open_workdir(tiny_config(), tmp_path)
    lock.close()
    open_workdir(tiny_config(), tmp_path).close()


def test_overrides_apply_to_one_target_only():
    config = tiny_config(targets=("embedded:digits", "embedded:mnist_5k"))
    config.overrides["embedded:digits"] = {"probe": {"epochs": 7}, "finetune": {"optimizer": {"learning_rate": 0.5}}}
    checks.check(config)
    assert settings.probe_settings(config, "embedded:digits").epochs == 7
    assert settings.probe_settings(config, "embedded:mnist_5k").epochs == config.probe.epochs
    tuned = settings.finetune_settings(config, "embedded:digits").optimizer
    assert tuned.learning_rate == 0.5 and tuned.momentum == config.finetune.optimizer.momentum


# --- rows


def test_rows_drop_incomplete_lines_and_duplicate_keys(tmp_path):
    rows = Rows(tmp_path, "scores")
    first = ScoreRow("1", 1, "a\u2028b", "logme", float("nan"), 0.1, 2.0, 3.0)
    rows.append(first)
    rows.append(first)
    with open(rows.path, "a") as file:
        file.write('{"checkpoint": "2", "ep')
    again = Rows(tmp_path, "scores")
    assert len(again.rows) == 1 and again.rows[0].target == "a\u2028b" and np.isnan(again.rows[0].value)
    assert ("1", "a\u2028b", "logme") in again
    assert rows.path.read_text().endswith("\n")


# --- devices


# With the usual rate, one ReLU that rounding switches on or off changes the later losses by 1e-4; it happens in these
# 16 steps with --xla_cpu_max_isa=AVX2.
SMALL_RATE = "--config.pretrain.optimizer.learning_rate=0.002"


@pytest.mark.slow  # tests/training/test_contrastive.py compares one and four devices
def test_eight_devices_give_the_losses_of_one_device(tmp_path):
    one, eight = tmp_path / "one", tmp_path / "eight"
    done = run_command(one, SMALL_RATE, "--config.stages=('pretrain', 'features', 'probe', 'finetune')")
    assert done.returncode == 0, done.stderr[-3000:]
    expected = results_without_times(one)
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    done = run_command(eight, SMALL_RATE, "--config.stages=('pretrain', 'finetune')", XLA_FLAGS=flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 on each device" in done.stderr
    (eight / "results" / "transfer.jsonl").rename(tmp_path / "finetuned_on_eight.jsonl")
    done = run_command(eight, SMALL_RATE, "--config.stages=('pretrain', 'features', 'probe', 'finetune')")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "is complete: 3 checkpoints" in done.stderr
    found = results_without_times(eight)
    losses = [[row["train_loss"] for row in rows["pretrain.jsonl"][1:]] for rows in (found, expected)]
    assert losses[1][1] < losses[1][0] - 0.01  # so an error in the gradient would show
    np.testing.assert_allclose(*losses, rtol=1e-5)
    on_eight = [json.loads(line) for line in (tmp_path / "finetuned_on_eight.jsonl").read_text().splitlines()]
    pairs = [(row["epoch"], row["accuracy"]) for row in expected["transfer.jsonl"] if row["method"] == "finetune"]
    assert [row["epoch"] for row in on_eight] == [epoch for epoch, _ in pairs]
    np.testing.assert_allclose([row["accuracy"] for row in on_eight], [a for _, a in pairs], atol=1 / 64 + 1e-9)
    for a, b in zip(found["transfer.jsonl"], expected["transfer.jsonl"], strict=True):
        assert a["accuracy"] == pytest.approx(b["accuracy"], abs=1 / 64 + 1e-9)
