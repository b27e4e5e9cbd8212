"""Studies of given checkpoints: files of several architectures, trajectories and random initialisations."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from helpers.source_files import REPOSITORY
from helpers.studies import TARGET, environment, one_epoch_config, results_without_times, run_stages
from jax_transfer import study
from jax_transfer.checkpoints import Checkpoint, export, load_checkpoint
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models import MODELS
from jax_transfer.records import InputError
from jax_transfer.study import checks
from jax_transfer.study.epochs import evaluated_snapshots
from jax_transfer.study.workspace import Workspace

CIFAR = {"width": 8, "stem": "cifar"}
OF_TRAINING = ("source_accuracy", "last_epoch")  # the naive lists that only a study's own pre-training knows
ALL_STAGES = ("features", "probe", "finetune", "scores", "spectral", "report")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with two files of two architectures and image sizes, and the trajectory of a tiny study."""
    folder = tmp_path_factory.mktemp("given")
    for name, size, settings in (("resnet10", 8, CIFAR), ("resnet18_v2", 16, CIFAR)):
        net = MODELS[name](num_classes=5, **settings)
        params, stats = net.init(jax.random.key(size))
        checkpoint = Checkpoint(name, net, params, stats, Preprocessing(size), settings=settings)
        export(checkpoint, folder / f"{name}.safetensors")
    run_stages(one_epoch_config(stages=("pretrain",), pretrain__epochs=2, trajectory__epochs="all"), folder / "own")
    return folder


def given_config(given, *names, **changes):
    changes = {"stages": ("features", "probe"), "scores": ("logme",), "finetune__steps": 4, **changes}
    config = one_epoch_config(checkpoints=tuple(str(given / name) for name in names), **changes)
    config.probe.epochs = 5
    return config


FILES = "resnet10.safetensors", "resnet18_v2.safetensors"


@pytest.mark.slow
def test_files_of_different_architectures_and_sizes_share_a_study(given, tmp_path):
    config = given_config(given, *FILES, "own", scores=("logme", "leep", "nce"), stages=ALL_STAGES)
    config.spectral.embedded_images = 20
    results = run_stages(config, tmp_path)
    names = ["resnet10", "resnet18_v2", *(f"given/own/checkpoints/{epoch}" for epoch in range(3))]
    for file, per_checkpoint in (("transfer", 2), ("scores", 3), ("spectral", 6)):
        assert {row["epoch"] for row in results[file]} == {None}
        assert sorted(row["checkpoint"] for row in results[file]) == sorted(names * per_checkpoint)
        assert not [row for row in results[file] if row["error"]]
    sizes = {row["checkpoint"]: row["preprocessing"]["image_size"] for row in results["checkpoints"]}
    assert sizes == dict(zip(names, (8, 16, 8, 8, 8), strict=True))
    assert {row["model"] for row in results["checkpoints"]} == {"resnet10", "resnet18_v2"}
    page = (tmp_path / "report/index.html").read_text(encoding="utf-8")
    assert "resnet18_v2" in page and "epoch None" not in page


def test_given_epoch_has_the_numbers_of_the_study_that_made_it(given, tmp_path):
    """Wherever its weights come from, a checkpoint is evaluated in the same way."""
    stages = ("features", "probe", "finetune", "scores")
    own = given_config(
        given,
        stages=("pretrain", *stages),
        pretrain__epochs=2,
        trajectory__epochs="1,2",
    )
    (tmp_path / "own").mkdir()
    shutil.copytree(given / "own/checkpoints", tmp_path / "own/checkpoints")
    given_one = given_config(given, "own/checkpoints/1", "own/checkpoints/2", stages=stages)
    tables = run_stages(own, tmp_path / "own"), run_stages(given_one, tmp_path / "given")
    for file, columns in (("transfer", ("accuracy", "mean_class_accuracy", "gflops")), ("scores", ("value", "gflops"))):
        trained, read = (
            [[row[c] for c in columns] for row in table[file] if row.get("score") not in OF_TRAINING]
            for table in tables
        )
        assert trained == read and len(read) >= 2


def test_own_epochs_and_given_checkpoints_are_compared(given, tmp_path):
    config = given_config(given, "own", stages=("pretrain", "probe"), trajectory__epochs="0,1")
    names = [snapshot.name for snapshot in evaluated_snapshots(config)]
    assert names == ["0", "1", "given/0", "given/1", "given/2"]
    rows = run_stages(config, tmp_path)["transfer"]
    assert [(row["checkpoint"], row["epoch"]) for row in rows] == [
        ("0", 0), ("1", 1), ("given/0", None), ("given/1", None), ("given/2", None)
    ]  # fmt: skip
    accuracy = {row["checkpoint"]: row["accuracy"] for row in rows}
    assert accuracy["0"] == accuracy["given/0"]  # both are the initialisation with the seed of the config


def test_weights_are_not_read_if_all_features_are_there(given, tmp_path, monkeypatch):
    config = given_config(given, *FILES)
    run_stages(config, tmp_path)
    monkeypatch.setattr(Workspace, "_model", lambda self, snapshot: pytest.fail("reads the weights"))
    config.scores, config.stages = ("logme", "h_score"), ("scores",)
    run_stages(config, tmp_path)


def test_preprocessing_of_all_given_checkpoints_can_be_replaced(given, tmp_path):
    config = given_config(given, FILES[1])
    config.checkpoint_preprocessing.image_size, config.checkpoint_preprocessing.mean = 40, (0.5, 0.5, 0.5)
    (row,) = run_stages(config, tmp_path)["checkpoints"]
    assert row["preprocessing"]["image_size"] == 40 and row["preprocessing"]["mean"] == [0.5, 0.5, 0.5]


def _refused(config, workdir, message):
    with pytest.raises(InputError, match=message) as raised:
        study.run(config, workdir)
    assert "\n" not in str(raised.value)


REFUSED = [
    (("random:resnet10?width=8",), {"scores": ("leep", "logme", "nce"), "stages": ("scores",)},
     r"config\.scores: leep and nce need a classification head, which random resnet10\?width=8 .* does not have"),
    (("resnet10.safetensors", "resnet18_v2.safetensors"), {"checkpoint_preprocessing__image_size": 64},
     r"config\.checkpoint_preprocessing\.image_size = 64: .*different sizes \(resnet10 8, resnet18_v2 16\)"),
    (("resnet10.safetensors",),
     {"checkpoint_preprocessing__interpolation": "nearest", "finetune__augment": ("resized_crop",)},
     r"interpolation of random crops \(resnet10; config\.checkpoint_preprocessing\.interpolation\): 'nearest'"),
    (("nothing.safetensors",), {}, r"nothing\.safetensors"),
    (("resnet10.safetensors", "resnet10.safetensors"), {}, r"resnet10\.safetensors twice"),
    (("random:resnet11",), {}, r"'resnet11'.*Did you mean 'resnet1"),
]  # fmt: skip


@pytest.mark.parametrize(("names", "changes", "message"), REFUSED)
def test_unsuitable_checkpoints_are_refused_before_the_first_stage(given, tmp_path, names, changes, message):
    config = given_config(given, **changes)
    config.checkpoints = tuple(name if ":" in name else str(given / name) for name in names)
    _refused(config, tmp_path, message)
    assert not (tmp_path / "results/transfer.jsonl").exists()


def test_file_that_changed_between_two_runs_is_refused(given, tmp_path):
    file = tmp_path / "a.safetensors"
    shutil.copy(given / FILES[0], file)
    config = given_config(tmp_path, "a.safetensors", stages=("probe",))
    study.run(config, tmp_path / "study")
    before = results_without_times(tmp_path / "study")
    study.run(config, tmp_path / "study")
    assert results_without_times(tmp_path / "study") == before
    checkpoint = load_checkpoint(file)
    changed = jax.tree.map(lambda x: np.asarray(x) + 1, checkpoint.params)
    export(dataclasses.replace(checkpoint, params=changed), file)
    _refused(config, tmp_path / "study", r"a\.safetensors has other weights than the checkpoint of the same name, a")
    shutil.copy(given / FILES[0], file)
    study.run(config, tmp_path / "study")


def test_checkpoints_can_be_added_later(given, tmp_path):
    study.run(given_config(given, FILES[0], stages=("probe",)), tmp_path)
    (first,) = results_without_times(tmp_path)["transfer.jsonl"]
    study.run(given_config(given, *FILES, stages=("probe",)), tmp_path)
    rows = results_without_times(tmp_path)["transfer.jsonl"]
    assert rows[0] == first and [row["checkpoint"] for row in rows] == ["resnet10", "resnet18_v2"]


def test_rows_are_never_those_of_another_checkpoint(given, tmp_path):
    """Own epochs stay in the study when a stage runs alone, and a wider choice of them finds no rows of given ones."""
    config = given_config(given, "own", stages=("pretrain", "probe"), pretrain__epochs=2, trajectory__epochs="0")
    own_and_given = [("0", 0), ("given/0", None), ("given/1", None), ("given/2", None)]
    assert [(r["checkpoint"], r["epoch"]) for r in run_stages(config, tmp_path)["transfer"]] == own_and_given
    config.stages, config.trajectory.epochs = ("probe",), "all"
    rows = run_stages(config, tmp_path)["transfer"]
    assert [(r["checkpoint"], r["epoch"]) for r in rows] == [*own_and_given, ("1", 1), ("2", 2)]


def test_names_of_evaluated_checkpoints_stay_when_the_list_changes(given, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        shutil.copy(given / FILES[folder == "two"], tmp_path / folder / "a.safetensors")
    one, two = (str(tmp_path / folder / "a.safetensors") for folder in ("one", "two"))
    config = given_config(given, stages=("probe",))
    for checkpoints, names in (((one,), ["a"]), ((one, two), ["a", "two/a"]), ((two, one), ["a", "two/a"])):
        config.checkpoints = checkpoints
        rows = run_stages(config, tmp_path / "study")["transfer"]
        assert [row["checkpoint"] for row in rows] == names
    config.checkpoints = (two,)
    rows = run_stages(config, tmp_path / "other")["transfer"]
    assert [row["checkpoint"] for row in rows] == ["a"]


def test_file_that_changes_during_a_run_is_refused(given, tmp_path):
    file = tmp_path / "a.safetensors"
    shutil.copy(given / FILES[0], file)
    work = Workspace(given_config(tmp_path, "a.safetensors"), tmp_path / "study")
    checks.check_data(work)
    shutil.copy(given / FILES[1], file)
    with pytest.raises(InputError, match=r"a\.safetensors has changed while the study ran"):
        work.features(work.snapshots[0], TARGET, "train")
    work.close()


def test_own_working_directory_is_not_given(given, tmp_path):
    shutil.copytree(given / "own/checkpoints", tmp_path / "checkpoints")
    config = given_config(given, stages=("pretrain", "probe"), pretrain__epochs=2)
    config.checkpoints = (str(tmp_path / "checkpoints"),)
    _refused(config, tmp_path, "belongs to this study .* which evaluates its own epochs anyway")


def test_missing_own_epochs_are_noticed_before_the_first_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(Workspace, "features", lambda *_: pytest.fail("a stage has begun"))
    _refused(one_epoch_config(stages=("features",)), tmp_path, "run the pretrain stage first, or name the checkpoints")


def test_batch_norm_groups_of_given_checkpoints_are_checked(tmp_path):
    config = one_epoch_config(checkpoints=("random:resnet10?width=8&batch_norm_group=24",), stages=("finetune",))
    checks.check(config)
    work = Workspace(config, tmp_path)
    with pytest.raises(InputError, match=r"batch_norm_group = 24 images that random resnet10.* normalises together"):
        checks.check_data(work)
    work.close()


@pytest.fixture(scope="module")
def folder_of_images(tmp_path_factory):
    """60 noisy images of two classes, bright and dark."""
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, level in (("bright", 170), ("dark", 80)):
        (folder / name).mkdir()
        for number in range(30):
            pixels = np.clip(generator.normal(level, 60, (24, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.mark.slow
def test_killed_study_of_files_and_a_trajectory_resumes_and_spreads_over_devices(given, folder_of_images, tmp_path):
    """Three files of two architectures and one trajectory, all stages, on a folder of images, with a grid."""
    files = [*FILES, "third.safetensors"]
    folder = tmp_path / "files"
    shutil.copytree(given, folder)
    net = MODELS["resnet10"](num_classes=3, **CIFAR)
    params, stats = net.init(jax.random.key(5))
    third = Checkpoint("third", net, params, stats, Preprocessing(16), settings=CIFAR)
    export(third, folder / files[2])
    given_names = tuple(str(folder / name) for name in (*files, "own"))
    arguments = [
        "--config=configs/quickstart.py:smoke",
        f"--config.checkpoints={given_names!r}",
        f"--config.targets=('folder:{folder_of_images}',)",
        f"--config.stages={ALL_STAGES!r}",
        "--config.scores=('logme','leep','nce','finetune_1')",
        "--config.finetune.learning_rates=(0.01,0.05)",
        "--config.finetune.batch_size=16",
        "--config.finetune.epochs=2",
        "--config.finetune.num_seeds=2",
        "--config.probe.epochs=5",
        "--config.spectral.embedded_images=10",
        "--config.data.eval_batch_size=64",
    ]

    def run(workdir, code=("-m", "jax_transfer.main"), **variables):
        command = [sys.executable, *code, *arguments, f"--workdir={workdir}"]
        variables = environment(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "compiled"), **variables)
        return subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=900)

    whole = run(tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    expected = results_without_times(tmp_path / "whole")
    assert {len(rows) for name, rows in expected.items() if name == "checkpoints.jsonl"} == {6}
    grid = [row for row in expected["transfer.jsonl"] if row["method"] == "finetune"]
    assert len(grid) == 6 * 2 + 6 * 2  # two points of the grid, and two seeds of the chosen one
    kill_after_rows = (
        "-c",
        "import os, sys; from jax_transfer import results, main\n"
        "append, count = results.Rows.append, int(os.environ['ROWS'])\n"
        "def counted(self, row):\n"
        "    global count\n"
        "    append(self, row); count -= 1\n"
        "    if count == 0: os.kill(os.getpid(), 9)\n"
        "results.Rows.append = counted\n"
        "main.run()",
    )
    for rows in (8, 21, 14):
        killed = run(tmp_path / "killed", kill_after_rows, ROWS=str(rows))
        assert killed.returncode == -9, killed.stderr
    resumed = run(tmp_path / "killed")
    assert resumed.returncode == 0, resumed.stderr
    assert results_without_times(tmp_path / "killed") == expected
    eight = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    spread = run(tmp_path / "spread", **eight)
    assert spread.returncode == 0, spread.stderr
    for name, rows in results_without_times(tmp_path / "spread").items():
        _assert_close(rows, expected[name], name)


@pytest.mark.slow
@pytest.mark.parametrize("choose", ["validation", "test"])
def test_two_processes_share_the_work_of_a_grid(choose, tmp_path):
    """Each of them trains some of the candidates, and both know all rows, also after a run without the last rows."""
    config = "--config=configs/study_checkpoints.py:smoke", f"--config.finetune.choose={choose}"
    config = *config, "--config.finetune.num_seeds=2", "--config.stages=('finetune',)"
    variables = environment(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "compiled"))

    def run(workdir, *launcher):
        command = [*launcher, *config, f"--workdir={workdir}"]
        process = subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=600)
        assert process.returncode == 0, process.stderr
        return sorted(results_without_times(workdir)["transfer.jsonl"], key=str)

    expected = run(tmp_path / "one", sys.executable, "-m", "jax_transfer.main")
    two = "bash", "launch/local_processes.sh", "2"
    assert run(tmp_path / "two", *two) == expected
    path = tmp_path / "two/results/transfer.jsonl"
    rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join(row for row in rows if '"split": "test"' not in row))
    assert run(tmp_path / "two", *two) == expected


def _assert_close(rows, expected, name):
    """Compares rows, which may differ between numbers of devices only by rounding."""
    keys = [json.dumps({k: v for k, v in row.items() if isinstance(v, str | int)}) for row in rows]
    for key, row, other in zip(keys, rows, expected, strict=True):
        numbers = [(v, other[k]) for k, v in row.items() if isinstance(v, float)]
        assert {k: v for k, v in row.items() if isinstance(v, str | int)} == {
            k: v for k, v in other.items() if isinstance(v, str | int)
        }, name
        # A fine-tuned model may classify one of the 12 or 9 test images differently.
        assert [a for a, _ in numbers] == pytest.approx([b for _, b in numbers], rel=1e-3, abs=1e-3), (name, key)
