"""The probe stage: rows of results and of grid points, resuming, and checks before anything is compiled."""

import json
import logging

import numpy as np
import pytest

from helpers.studies import TARGET, one_epoch_config
from jax_transfer.data.subsets import stratified_split
from jax_transfer.fields import to_json
from jax_transfer.records import Features, InputError
from jax_transfer.results import TEST, TEST_GRID, VALIDATION, Rows
from jax_transfer.study import checks
from jax_transfer.study import probe as probe_stage
from jax_transfer.study.config import default_config, differences
from jax_transfer.study.workspace import Workspace

GRID = {
    "probe__methods": ("probe", "probe_converged"),
    "probe__learning_rates": (1e-4, 0.1),
    "probe__weight_decays": (0.0, 0.2),
    "probe__l2": (10.0, 1e-3),
    "probe__num_seeds": 2,
    "probe__epochs": 3,
}
PAIRS = [(1e-4, 0.0), (1e-4, 0.2), (0.1, 0.0), (0.1, 0.2)]


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """Returns a function that opens a study of two checkpoints whose features are drawn at random."""

    def features(work, snapshot, dataset, split):
        labels = work.source(dataset, split).labels
        rng = np.random.default_rng([work.epoch(snapshot), split == "test"])
        centres = np.random.default_rng(9).normal(size=(10, 64))
        x = centres[labels] + (2 + work.epoch(snapshot)) * rng.normal(size=(len(labels), 64))
        return Features(x.astype(np.float32), np.zeros((len(labels), 0), np.float32), labels)

    monkeypatch.setattr(Workspace, "features", features)
    return lambda folder="a", **changes: Workspace(one_epoch_config(**changes), tmp_path / folder)


def read(work):
    lines = (work.results / "transfer.jsonl").read_text().splitlines()
    return [{name: v for name, v in json.loads(line).items() if name != "seconds"} for line in lines]


def settings_of(row):
    return row["learning_rate"], row["weight_decay"]


def test_single_setting_writes_only_results(workspace):
    work = workspace(probe__methods=("probe", "probe_converged"), probe__epochs=2)
    probe_stage.run(work)
    rows = read(work)
    assert [(row["checkpoint"], row["method"], row["split"]) for row in rows] == [
        (name, method, TEST) for method in ("probe", "probe_converged") for name in ("0", "1")
    ]
    assert [settings_of(row) for row in rows] == [(0.01, 0.0)] * 2 + [(None, 1e-4)] * 2


@pytest.mark.parametrize(("choose", "split"), [("validation", VALIDATION), ("test", TEST_GRID)])
def test_every_grid_point_has_a_row_before_the_result_chosen_from_it(workspace, choose, split):
    work = workspace(**GRID, probe__choose=choose)
    probe_stage.run(work)
    rows, expected = read(work), []
    labels = work.source(TARGET, "train").labels
    fitted, held_out = map(len, stratified_split(labels))
    assert (fitted, held_out) == tuple(len(work.source(TARGET, part)) for part in ("fit", "held_out"))
    for method, points in (("probe", PAIRS), ("probe_converged", [(None, 10.0), (None, 1e-3)])):
        for name in ("0", "1"):
            for seed in (0, 1):
                expected += [(method, name, seed, split, point) for point in points] + [(method, name, seed, TEST)]
                *grid, result = rows[len(expected) - len(points) - 1 : len(expected)]
                best = grid[int(np.argmax([row["accuracy"] for row in grid]))]
                assert settings_of(result) == settings_of(best)
                assert (result["num_train"], result["num_test"]) == (160, 64)
                sizes = (fitted, held_out) if choose == "validation" else (160, 64)
                assert {(row["num_train"], row["num_test"]) for row in grid} == {sizes}
                if choose == "test":
                    assert (result["accuracy"], result["gflops"]) == (best["accuracy"], best["gflops"])
    found = [(row["method"], row["checkpoint"], row["seed"], row["split"], settings_of(row)) for row in rows]
    assert [row[: 4 + (row[3] != TEST)] for row in found] == expected
    assert len({row["accuracy"] for row in rows}) > 4
    probe_stage.run(work)
    assert len(read(work)) == len(rows)


def test_study_killed_between_any_two_rows_resumes_with_the_same_file(workspace, monkeypatch):
    work = workspace(**GRID)
    probe_stage.run(work)
    expected, append = read(work), Rows.append
    for number in (4, 7, len(expected) - 2):
        left = [number]

        def append_or_die(self, row, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            append(self, row)

        killed = workspace(f"killed {number}", **GRID)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Rows, "append", append_or_die)
            probe_stage.run(killed)
        assert read(killed) == expected[:number]
        probe_stage.run(killed)
        assert read(killed) == expected


@pytest.mark.parametrize("has_grid", (True, False))
def test_only_results_chosen_on_a_random_split_are_computed_again(workspace, has_grid, monkeypatch, caplog):
    """Earlier versions wrote no weight decay, and l2 as the learning rate."""
    monkeypatch.setattr(logging.getLogger("jax_transfer"), "propagate", True)
    changes = GRID if has_grid else {"probe__epochs": 2}
    work = workspace(**changes)
    probe_stage.run(work)
    expected = read(work)
    path = work.results / "transfer.jsonl"
    earlier = [json.loads(line) for line in path.read_text().splitlines()]
    earlier = [{**row, "weight_decay": None, "accuracy": 0.125} for row in earlier if row["split"] == TEST]
    path.write_text("".join(json.dumps(row) + "\n" for row in earlier))
    probe_stage.run(work)
    if has_grid:
        assert read(work) == expected
        assert "probe_converged on " + TARGET + ": 4 rows chose on a random split and are computed again" in caplog.text
    else:
        assert {row["accuracy"] for row in read(work)} == {0.125} and not caplog.messages


# --- checks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"probe__choose": "test"},
            r'^config\.probe\.choose = "test", but there is nothing to choose: give several values of learning_rates '
            r'or weight_decays, or leave it at "validation"\.$',
        ),
        (
            {"probe__choose": "test", "probe__methods": ("probe_converged",), "probe__learning_rates": (0.1, 0.2)},
            r"^config\.probe\.choose .* several values of l2, or",
        ),
        (
            {"overrides": {TARGET: {"probe": {"choose": "test"}}}},
            r"^config\.overrides\['" + TARGET.replace("?", r"\?") + r"'\]\.probe\.choose = \"test\"",
        ),
        ({"probe__choose": "train"}, r"Unknown choice \(config\.probe\.choose\): 'train'"),
        ({"probe__min_learning_rate": 0.5}, r"config\.probe\.min_learning_rate = 0\.5: must lie between 0 and"),
    ],
)
def test_choice_without_a_grid_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        checks.check(one_epoch_config(**changes))


def test_choice_on_test_needs_a_grid_of_only_one_method():
    checks.check(one_epoch_config(**{**GRID, "probe__l2": (1e-3,)}, probe__choose="test"))


def test_grid_needs_images_to_hold_out(tmp_path):
    target = "embedded:digits?per_class=1&test=64"
    changes = {"targets": (target,), "finetune__batch_size": 8, "stages": ("pretrain", "probe")}
    checks.check_data(Workspace(one_epoch_config(**changes), tmp_path))
    with pytest.raises(InputError, match=r"^embedded:digits\?per_class=1&test=64 \(config\.probe\): No class has two"):
        checks.check_data(
            Workspace(one_epoch_config(**changes, probe__l2=(1.0, 2.0), probe__methods=("probe_converged",)), tmp_path)
        )


def test_config_from_before_the_grid_resumes():
    earlier, new = to_json(default_config()), default_config()
    for name in ("weight_decays", "schedule", "milestones", "decay_factor", "min_learning_rate", "choose"):
        del earlier["probe"][name]
    assert differences(earlier, to_json(new)) == []
    new.probe.choose = "test"
    assert differences(earlier, to_json(new)) == ["config.probe.choose was 'validation', is 'test'"]
