"""Pre-training by steps: what is saved, named and evaluated, how it resumes, and what is refused."""

import json
import shutil

import pytest

from helpers.studies import results_without_times, run_stages, tiny_config
from jax_transfer import preemption, trees
from jax_transfer.checkpoints import expand, load_checkpoint
from jax_transfer.fields import to_json
from jax_transfer.ranking.candidates import list_candidates
from jax_transfer.records import InputError
from jax_transfer.study import checks, pretrain
from jax_transfer.study.config import default_config, differences
from jax_transfer.study.epochs import epochs_after, evaluated_snapshots, finetuned_snapshots, selected
from jax_transfer.study.smoke import tiny
from jax_transfer.study.workspace import Workspace

PER_EPOCH = 8  # steps in an epoch of the tiny study
SAVED = [0, 5, 8, 12, 16, 20]  # the start, the ends of epochs, and the selected steps


def by_steps(**changes):
    """Returns the config of the tiny study with two and a half epochs, two of whose checkpoints lie within epochs."""
    stages = {"stages": ("pretrain", "probe"), "probe__epochs": 1}
    return tiny_config(**{**stages, "pretrain__steps": 20, "trajectory__steps": "5,12,20", **changes})


def pretrained(workdir):
    """Runs the stage "pretrain"; returns its rows without times, and the fingerprints of its checkpoints."""
    run_stages(by_steps(stages=("pretrain",)), workdir)
    fingerprints = {path.name: trees.fingerprint(load_checkpoint(path).model) for path in expand(workdir)}
    return results_without_times(workdir)["pretrain.jsonl"], fingerprints


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    run_stages(by_steps(), workdir)
    return workdir


@pytest.fixture(scope="module")
def expected(whole):
    return pretrained(whole)


def test_every_epoch_and_selected_step_is_saved_under_its_step(whole):
    assert [path.name for path in expand(whole)] == list(map(str, SAVED))
    rows = results_without_times(whole)
    assert [row["step"] for row in rows["pretrain.jsonl"]] == SAVED
    assert [row["epoch"] for row in rows["pretrain.jsonl"]] == [0, 0.62, 1, 1.5, 2, 2.5]
    assert [(row["checkpoint"], row["epoch"]) for row in rows["transfer.jsonl"]] == [
        ("5", 0.62),
        ("12", 1.5),
        ("20", 2.5),
    ]


def test_a_longer_epoch_has_the_losses_of_its_first_part(whole):
    """The means at step 12 are those of steps 8 to 12, and the means at step 16 those of steps 8 to 16."""
    work = Workspace(by_steps(), whole)
    trajectory = work._trajectory(work.pretrainings[0])
    so_far = {number: trajectory.metadata(number).get("so_far") for number in SAVED}
    work.close()
    losses = {number: part["metrics"]["loss"] for number, part in so_far.items() if part}
    assert {number: len(values) for number, values in losses.items()} == {5: 5, 12: 4, 20: 4}
    row = results_without_times(whole)["pretrain.jsonl"][SAVED.index(12)]
    assert row["train_loss"] == pytest.approx(sum(losses[12]) / 4)


@pytest.mark.parametrize("last", [5, 8, 12])
def test_training_resumes_from_any_checkpoint_bit_for_bit(whole, expected, last, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    for number in SAVED:
        if number > last:
            shutil.rmtree(workdir / "checkpoints" / str(number))
    if last == 12:  # rows are rebuilt from the checkpoints
        (workdir / "results" / "pretrain.jsonl").unlink()
    assert pretrained(workdir) == expected


@pytest.mark.parametrize("step", [3, 5, 14])
def test_training_stopped_at_any_step_resumes_bit_for_bit(expected, step, tmp_path, monkeypatch):
    """Step 5 is selected: SIGTERM comes before its checkpoint is saved."""
    steps = []
    original = pretrain.train

    def train(*args, stop, **named):
        yield from original(*args, stop=lambda: steps.append(1) or len(steps) == step, **named)

    with monkeypatch.context() as patched:
        patched.setattr(pretrain, "train", train)
        with pytest.raises(preemption.Preempted):
            pretrained(tmp_path)
    assert (tmp_path / "stopped" / str(step)).is_dir()
    assert pretrained(tmp_path) == expected


def test_checkpoints_named_by_step_can_be_ranked(whole):
    names = [candidate.name for candidate in list_candidates([whole / "checkpoints"], None)]
    assert names == list(map(str, SAVED))
    assert load_checkpoint(whole / "checkpoints" / "12").net.name == "resnet10"


def test_other_steps_can_be_evaluated_if_they_are_saved(whole):
    checks.check_data(Workspace(by_steps(trajectory__steps="8,16"), whole))
    with pytest.raises(InputError, match=r"config.trajectory.steps selects step \[7\], which pre-training has passed"):
        checks.check_data(Workspace(by_steps(trajectory__steps="7,16"), whole))


def test_a_step_before_a_stop_is_not_promised(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "_stopped_at", lambda folder: 14)
    (tmp_path / "checkpoints").mkdir()
    checks.check_data(Workspace(by_steps(trajectory__steps="14,20"), tmp_path))
    with pytest.raises(InputError, match=r"selects step \[13\]"):
        checks.check_data(Workspace(by_steps(trajectory__steps="13,20"), tmp_path))


def test_checkpoints_named_by_the_other_unit_are_refused(whole, tmp_path):
    with pytest.raises(InputError, match=r"names its checkpoints by step, and a config with .* = None by epoch"):
        checks.check_data(Workspace(tiny_config(pretrain__epochs=20), whole))
    run_stages(tiny_config(stages=("pretrain",), pretrain__epochs=1), tmp_path)
    with pytest.raises(InputError, match=r"names its checkpoints by epoch, and a config with .* = 20 by step"):
        checks.check_data(Workspace(by_steps(), tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trajectory__steps": "5"}, "config.trajectory.steps = '5': pre-training counts epochs"),
        (
            {"pretrain__steps": 9},
            "config.pretrain.steps = 9: select the steps to evaluate with config.trajectory.steps",
        ),
        ({"pretrain__steps": 9, "trajectory__steps": "0,9,10"}, r"steps are 0 to 9; there is no \[10\]"),
        ({"pretrain__steps": 9, "trajectory__steps": "1k"}, r"steps are 0 to 9; there is no \[1000\]"),
        ({"pretrain__steps": 9, "trajectory__steps": ""}, "config.trajectory.steps = '': expected 'every:30k'"),
        ({"pretrain__steps": 9, "trajectory__steps": "all"}, "config.trajectory.steps = 'all': expected 'every:30k'"),
        ({"pretrain__steps": 10**9, "trajectory__steps": "every:1"}, "selects 1,000,000,000 steps, more than 100,000"),
        ({"trajectory__epochs": "0,1k"}, "config.trajectory.epochs = '0,1k': expected 'all', 'every:K'"),
        (
            {"pretrain__steps": 9, "trajectory__steps": "log", "finetune__checkpoints": "9,12"},
            r"config.finetune.checkpoints = '9,12': the steps are 0 to 9; there is no \[12\]",
        ),
        ({"pretrain__steps": 0, "trajectory__steps": "0"}, "config.pretrain.steps = 0"),
    ],
)
def test_bad_steps_are_refused_in_one_line(changes, message):
    with pytest.raises(InputError, match=message) as caught:
        checks.check(tiny_config(**changes))
    assert "\n" not in str(caught.value)


def test_too_many_epochs_are_refused_with_the_data(tmp_path):
    config = tiny_config(pretrain__steps=10**9, trajectory__steps="log", stages=("pretrain",))
    checks.check(config)
    with pytest.raises(InputError, match=r"config.pretrain.steps = 1000000000: these are 125,000,000 epochs"):
        checks.check_data(Workspace(config, tmp_path))


@pytest.mark.parametrize(
    ("rule", "steps"),
    [
        ("0,90k,270K,300k", [0, 90_000, 270_000, 300_000]),
        ("every:120k", [0, 120_000, 240_000, 300_000]),
        ("7, 90001", [7, 90_001]),
    ],
)
def test_steps_may_end_in_a_suffix(rule, steps):
    assert selected(rule, 300_000, unit="step") == steps
    assert selected("1m", 10**6, unit="step") == [10**6]


@pytest.mark.parametrize("steps_per_epoch", [1, 7, 8, 100, 999, 1000, 5004])
def test_different_steps_have_different_epochs(steps_per_epoch):
    epochs = [epochs_after(step, steps_per_epoch) for step in range(3 * steps_per_epoch + 1)]
    assert len(set(epochs)) == len(epochs) and epochs == sorted(epochs)
    assert epochs[::steps_per_epoch] == [0, 1, 2, 3] and all(isinstance(e, int) for e in epochs[::steps_per_epoch])


def test_fine_tuning_selects_among_the_evaluated_steps():
    config = by_steps(finetune__checkpoints="12,16,20", checkpoints=("random:resnet18",))
    names = [snapshot.name for snapshot in evaluated_snapshots(config)]
    assert names == ["5", "12", "20", "random resnet18"]
    tuned = finetuned_snapshots(config, evaluated_snapshots(config), config.targets[0])
    assert [snapshot.name for snapshot in tuned] == ["12", "20", "random resnet18"]


def test_a_config_from_before_steps_existed_resumes():
    old = json.loads(json.dumps(to_json(tiny_config())))
    del old["pretrain"]["steps"], old["trajectory"]["steps"]
    assert differences(old, to_json(tiny_config())) == []
    assert differences(old, to_json(by_steps(probe__epochs=tiny_config().probe.epochs))) == [
        "config.pretrain.steps was None, is 20"
    ]
    assert differences(to_json(by_steps()), to_json(by_steps(trajectory__steps="log"))) == []


def test_tiny_forgets_steps():
    config = default_config()
    config.pretrain.steps, config.trajectory.steps = 300_000, "90k"
    checks.check(tiny(config))
