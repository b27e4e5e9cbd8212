"""Fine-tuning over a grid of settings: every point has a row, and the chosen point is the one a plain loop chooses."""

import dataclasses
import functools
import math

import numpy as np
import pytest

from helpers.studies import TARGET, one_epoch_config, run_stages
from jax_transfer.data.batches import joined
from jax_transfer.records import InputError
from jax_transfer.results import TEST, TEST_GRID, VALIDATION, Rows
from jax_transfer.study import checks, grid
from jax_transfer.study import finetune as finetune_stage
from jax_transfer.study.settings import finetune_settings
from jax_transfer.study.workspace import Workspace
from jax_transfer.training.objectives import OBJECTIVES
from jax_transfer.transfer.finetune import Candidate, finetune

RATES, DECAYS = (0.003, 0.05), (0.0, 0.3)
POINTS = [(rate, decay) for rate in RATES for decay in DECAYS]
STAGES = ("pretrain", "finetune")


def grid_config(**changes):
    defaults = {
        "stages": STAGES,
        "finetune__learning_rates": RATES,
        "finetune__weight_decays": DECAYS,
        "finetune__steps": 12,
    }
    return one_epoch_config(**{**defaults, **changes})


@pytest.fixture(scope="module", params=["validation", "test"])
def swept(request, tmp_path_factory):
    """The config, the working directory and the rows of a study that chooses in one of both ways, with two seeds."""
    config = grid_config(finetune__choose=request.param, finetune__num_seeds=2)
    workdir = tmp_path_factory.mktemp("swept")
    return config, workdir, run_stages(config, workdir)["transfer"]


def _alone(work, snapshot, seed, point, splits):
    """Trains one candidate by itself, with its settings as constants of the config."""
    tuning = finetune_settings(work.config, TARGET)
    optimizer = dataclasses.replace(tuning.optimizer, learning_rate=point[0], weight_decay=point[1])
    net, preprocessing = work.tuned_net(snapshot, TARGET), work.preprocessing
    train, test = (work.feed(TARGET, split, preprocessing) for split in splits)
    (result,) = finetune(
        {"a": work.checkpoint(snapshot)},
        [Candidate("a", seed)],
        net,
        functools.partial(OBJECTIVES["supervised"], net, ()),
        joined({"train": (train, tuning.batch_size)}),
        test,
        preprocessing,
        dataclasses.replace(tuning, optimizer=optimizer, learning_rates=None, weight_decays=None, choose="validation"),
        work.mesh,
    )
    return result.metrics["accuracy"]


@pytest.mark.slow
def test_choice_equals_a_loop(swept):
    config, workdir, rows = swept
    work = Workspace(config, workdir)
    by_test = config.finetune.choose == "test"
    split, splits = (TEST_GRID, ("train", "test")) if by_test else (VALIDATION, ("fit", "held_out"))
    for snapshot in work.snapshots:
        own = [row for row in rows if row["checkpoint"] == snapshot.name]
        tried = {(r["learning_rate"], r["weight_decay"]): r["accuracy"] for r in own if r["split"] == split}
        alone = {point: _alone(work, snapshot, 0, point, splits) for point in POINTS}
        assert list(tried) == POINTS
        assert tried == pytest.approx(alone, abs=1 / 64 + 1e-6)  # at most one image, by rounding
        best = max(POINTS, key=tried.get)
        assert alone[best] == pytest.approx(max(alone.values()), abs=1 / 30 + 1e-6)  # a tie up to one image
        results = {row["seed"]: row for row in own if row["split"] == TEST}
        assert [(r["learning_rate"], r["weight_decay"]) for r in results.values()] == [best, best]
        if by_test:
            assert results[0]["accuracy"] == tried[best] == max(tried.values())
        else:
            assert results[0]["accuracy"] == pytest.approx(
                _alone(work, snapshot, 0, best, ("train", "test")), abs=1 / 64 + 1e-6
            )
        assert results[1]["accuracy"] == pytest.approx(
            _alone(work, snapshot, 1, best, ("train", "test")), abs=1 / 64 + 1e-6
        )
    work.close()


def test_rows_say_on_which_images_they_were_trained_and_tested(swept):
    config, _, rows = swept
    sizes = {row["split"]: (row["num_train"], row["num_test"]) for row in rows}
    grid_split = {"validation": (VALIDATION, (130, 30)), "test": (TEST_GRID, (160, 64))}[config.finetune.choose]
    assert sizes == {TEST: (160, 64), grid_split[0]: grid_split[1]}
    assert {row["seed"] for row in rows if row["split"] != TEST} == {0}


def test_second_run_changes_nothing(swept, tmp_path):
    config, workdir, _ = swept
    before = (workdir / "results/transfer.jsonl").read_bytes()
    run_stages(config, workdir)
    assert (workdir / "results/transfer.jsonl").read_bytes() == before


@pytest.mark.parametrize("kept", range(0, 8, 3))
def test_grid_resumes_after_any_row(swept, kept, tmp_path):
    config, workdir, rows = swept
    (tmp_path / "results").mkdir()
    (tmp_path / "checkpoints").symlink_to(workdir / "checkpoints")
    for name in ("pretrain", "transfer"):
        lines = (workdir / f"results/{name}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"results/{name}.jsonl").write_text("".join(lines[: kept if name == "transfer" else None]))
    again = run_stages(config, tmp_path)["transfer"]
    without_time = [[{**row, "seconds": None} for row in own] for own in (rows, again)]
    assert sorted(without_time[0], key=str) == sorted(without_time[1], key=str)


def test_ties_go_to_the_first_point_and_diverged_points_are_not_chosen(tmp_path):
    config = grid_config()
    tuning, work = finetune_settings(config, TARGET), Workspace(config, tmp_path)
    snapshot, rows = work.snapshots[0], []
    for (rate, decay), accuracy in zip(POINTS, (math.nan, 0.5, 0.75, 0.75), strict=True):
        error = "the loss is not finite at step 3" if math.isnan(accuracy) else ""
        measured = {"accuracy": accuracy, "learning_rate": rate, "weight_decay": decay, "error": error}
        rows.append(work.transfer_row(snapshot, TARGET, "finetune", 0, split=VALIDATION, **measured))
    assert grid.rates(grid.choice(rows, snapshot, TARGET, tuning)) == {"learning_rate": 0.05, "weight_decay": 0.0}
    failed = [dataclasses.replace(row, error="x") for row in rows]
    assert grid.choice(failed, snapshot, TARGET, tuning) is None
    work.close()


def test_grid_on_which_everything_diverges_fails_in_words_and_is_not_tried_again(tmp_path, monkeypatch):
    config = grid_config(finetune__learning_rates=(1e30, 1e31), finetune__weight_decays=None, pretrain__epochs=1)
    rows = run_stages(config, tmp_path)["transfer"]
    results = [row for row in rows if row["split"] == TEST]
    assert [row["error"] for row in results] == ["the loss is not finite with any of the 2 settings of the grid"] * 2
    assert all(row["accuracy"] is None for row in rows) and len(rows) == 6
    monkeypatch.setattr(finetune_stage, "finetune", lambda *_, **__: pytest.fail("trains again"))
    assert run_stages(config, tmp_path)["transfer"] == rows


@pytest.mark.slow
def test_early_stop_scores_do_not_depend_on_the_grid(tmp_path):
    values = []
    for number, rates in enumerate((None, (0.003, 0.2))):
        config = one_epoch_config(stages=("pretrain", "finetune", "scores"), scores=("finetune_1",))
        config.finetune.epochs, config.finetune.learning_rates = 2, rates
        scores = run_stages(config, tmp_path / str(number))["scores"]
        values.append([row["value"] for row in scores])
    assert values[0] == values[1]


@pytest.mark.slow
def test_fine_tuned_features_are_those_of_the_chosen_point(tmp_path):
    config = grid_config(
        stages=("pretrain", "finetune", "spectral"), finetune__choose="test", finetune__weight_decays=None
    )
    run_stages(config, tmp_path)
    work = Workspace(config, tmp_path)
    rows = Rows(work.results, "transfer").rows
    chosen = finetune_stage.chosen_rates(work, work.snapshots, TARGET)
    for snapshot in work.snapshots:
        (result,) = [row for row in rows if row.checkpoint == snapshot.name and row.split == TEST]
        assert chosen[snapshot] == {"learning_rate": result.learning_rate, "weight_decay": result.weight_decay}
        tuned = finetune_stage.tuned_checkpoint(work, snapshot, TARGET, chosen[snapshot])
        features = work.features_of(tuned, work.source(TARGET, "test"))
        accuracy = np.mean(features.logits.argmax(1) == features.labels)
        assert accuracy == pytest.approx(result.accuracy, abs=1 / 64 + 1e-6)
    work.close()


def test_single_value_replaces_that_of_the_optimizer():
    config = grid_config(finetune__learning_rates=(0.5,), finetune__weight_decays=None)
    tuning = finetune_settings(config, TARGET)
    assert tuning.optimizer.learning_rate == 0.5 and tuning.learning_rates is None
    config.overrides = {TARGET: {"finetune": {"weight_decays": (0.25,)}}}
    assert finetune_settings(config, TARGET).optimizer.weight_decay == 0.25


REFUSED = [
    ({"finetune__choose": "test", "finetune__learning_rates": None, "finetune__weight_decays": None},
     r'config\.finetune\.choose = "test", but there is nothing to choose'),
    ({"finetune__learning_rates": ()}, r"config\.finetune\.learning_rates is empty"),
    ({"finetune__learning_rates": (0.1, 0.1)}, r"config\.finetune\.learning_rates lists 0\.1 twice"),
    ({"finetune__learning_rates": (0.1, -1.0)}, r"config\.finetune\.learning_rates\[1\] = -1\.0: must be positive"),
    ({"finetune__weight_decays": (-1.0,)}, r"config\.finetune\.weight_decays\[0\] = -1\.0: must not be negative"),
    ({"finetune__optimizer__min_learning_rate": 0.01, "finetune__optimizer__learning_rate": 0.02},
     r"config\.finetune\.optimizer\.min_learning_rate = 0\.01: must not be above 0\.003, the lowest of"),
    ({"finetune__choose": "tests"}, r"choice \(config\.finetune\.choose\): 'tests'.*Did you mean 'test'"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_bad_grids_are_refused_before_anything_runs(changes, message):
    with pytest.raises(InputError, match=message):
        checks.check(grid_config(**changes))


def test_grid_needs_images_to_hold_out(tmp_path):
    target = "embedded:digits?per_class=1&test=64"
    config = grid_config(targets=(target,), finetune__batch_size=4)
    work = Workspace(config, tmp_path)
    with pytest.raises(InputError, match="one training image in each class, so none can be held out"):
        checks.check_data(work)
    config.finetune.choose = "test"
    checks.check_data(work)
    work.close()
