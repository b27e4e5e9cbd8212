"""Studies of given checkpoints, of a trajectory, and of both: each checkpoint is compared under its own name."""

import io
import itertools
import re

import pytest
import rich.console

from helpers.reports import (
    CONFIG,
    GIVEN,
    TARGETS,
    Elements,
    grid_points,
    make_both_results,
    make_given_results,
    make_results,
    transfer_row,
    write_workdir,
)
from helpers.studies import one_epoch_config
from jax_transfer import main
from jax_transfer.report import answer, best, figures_by_name, page, score_figures, spectral, spectral_figures, tables
from jax_transfer.report.comparison import comparison_rows, comparisons
from jax_transfer.results import CheckpointRow, Rows, ScoreRow, TransferRow, to_json_dict
from jax_transfer.study import report as report_stage
from jax_transfer.study.stages import written_by
from jax_transfer.study.workspace import Workspace

KINDS = {"given": make_given_results, "own": make_results, "both": make_both_results}
GIVEN_CONFIG = {**CONFIG, "checkpoints": ["a.safetensors", "b.safetensors"], "stages": ["probe", "report"]}


def given_row(name, accuracy, seed=0, method="probe", target="a"):
    return {**transfer_row(0, accuracy, seed, method, target), "checkpoint": name, "epoch": None}


def names_of(comparison):
    return [candidate.label for candidate in comparison.candidates]


def page_text(workdir, results, config=None):
    return Elements(page.write_report(write_workdir(workdir, results, config), written_by()).read_text("utf-8")).text


# --- which is best


def test_given_checkpoints_are_ranked_by_their_mean_over_seeds():
    rows = [given_row("run/1", 0.9, 0), given_row("run/1", 0.5, 1), given_row("b", 0.8, 0), given_row("b", 0.7, 1)]
    (comparison,) = comparisons([*rows, given_row("c", 0.6)])
    assert names_of(comparison) == ["b", "run/1", "c"]
    assert [round(comparison.behind(c), 4) for c in comparison.candidates] == [0, 0.05, 0.15]
    assert comparison.seed_spread == pytest.approx(0.4)
    words = answer.comparison_sentence(comparison)
    assert "b is best with 75.00\N{NO-BREAK SPACE}% accuracy, 5.00 points above the next, run/1" in words
    assert "15.00 points above the lowest of 3, c" in words and "no clear winner" in words
    assert words.endswith("Some seeds are missing for c.")


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_first_row_wins_a_tie(order):
    rows = [given_row("b", 0.9), given_row("a", 0.9), transfer_row(5, 0.9)]
    (comparison,) = comparisons([rows[i] for i in order])
    first, second, third = (["b", "a", "epoch 5"][i] for i in order)
    assert comparison.best.label == first
    equal = f"{first}, {second} and {third} are equally good"
    assert answer.comparison_sentence(comparison).endswith(f"{equal} with 90.00\N{NO-BREAK SPACE}% accuracy.")
    assert answer.overall_by_name([comparison]).endswith(f"{equal} on the only target.")


@pytest.mark.parametrize(
    ("accuracies", "words"),
    [
        ((0.25, 0.25), "a and b are equally good with 25.00 % accuracy."),
        ((0.25,) * 4, "all 4 checkpoints are equally good with 25.00 % accuracy."),
        ((0.3, 0.25), "a is best with 30.00 % accuracy, 5.00 points above b (25.00 %)."),
        ((0.3, 0.25, 0.25), "a is best with 30.00 % accuracy, 5.00 points above b and c (25.00 %)."),
        ((0.3, 0.25, 0.25, 0.25, 0.25), "a is best with 30.00 % accuracy, 5.00 points above the other 4 (25.00 %)."),
        ((0.3, 0.3, 0.25), "a and b are best with 30.00 % accuracy, 5.00 points above c (25.00 %)."),
        (
            (0.3, 0.3, 0.25, 0.2),
            "a and b are best with 30.00 % accuracy, 5.00 points above the next, c (25.00 %), "
            "and 10.00 points above the lowest of 4, d.",
        ),
        ((0.30001, 0.3), "a is best with 30.00 % accuracy, less than 0.01 points above b (30.00 %)."),
    ],
)
def test_equal_checkpoints_are_called_equal_and_each_distance_is_said_once(accuracies, words):
    rows = [given_row(name, accuracy) for name, accuracy in zip("abcde", accuracies, strict=False)]
    (comparison,) = comparisons(rows)
    sentence = answer.comparison_sentence(comparison).replace("\N{NO-BREAK SPACE}", " ")
    assert sentence == f"as a frozen feature extractor (FE), {words}"
    who = words.partition(" with ")[0]
    assert answer.overall_by_name([comparison]) == f"As a frozen feature extractor (FE), {who} on the only target."


def test_equal_epochs_are_not_0_points_apart():
    rows = [transfer_row(epoch, accuracy) for epoch, accuracy in ((1, 0.9), (5, 0.8), (9, 0.9))]
    assert answer.epoch_sentence(best.best_checkpoints(rows)[0]).endswith("; the last checkpoint is equally good.")


@pytest.mark.parametrize("kind", KINDS)
def test_story_calls_equal_checkpoints_equal(kind):
    results = KINDS[kind](TARGETS[:1])
    results["transfer"] = [{**row, "accuracy": 0.25} for row in results["transfer"]]
    words = " ".join(words for _, words in spectral.story(results))
    assert "0.00 points lower" not in words
    for equal, shown in (
        ("equally high for all checkpoints", kind != "own"),
        ("equally high at the last epoch", kind != "given"),
    ):
        assert (equal in words) == shown


def test_best_and_last_epoch_are_compared_with_given_checkpoints():
    rows = [transfer_row(epoch, accuracy) for epoch, accuracy in ((1, 0.6), (17.98, 0.8), (20, 0.7), (30, 0.65))]
    (comparison,) = comparisons([*rows, given_row("run/a", 0.75), given_row("b", 0.5)])
    assert names_of(comparison) == ["epoch 17.98", "run/a", "epoch 30", "b"]
    assert [candidate.role for candidate in comparison.candidates] == ["best epoch", "", "last epoch", ""]
    (row,) = best.best_checkpoints([*rows, given_row("run/a", 0.9)])  # the trajectory's own result does not change
    assert (row["best_epoch"], row["last_epoch"], row["source"], row["num_checkpoints"]) == (17.98, 30, "", 4)
    assert answer.epoch_sentence(row, among_given=True).startswith("of the study's own epochs, 17.98 is best with 80")
    (only,) = comparisons([transfer_row(5, 0.7), given_row("a", 0.6)])
    assert only.best.role == "best and last epoch"


def test_slashes_in_the_name_of_a_given_checkpoint_name_no_source():
    own = [{**transfer_row(e, 0.5), "checkpoint": f"{source}/{e}"} for source in ("cifar10", "svhn") for e in (1, 2)]
    rows = [*own, given_row("cifar10/checkpoints/2", 0.9)]
    assert list(best.trajectories(rows)) == ["cifar10", "svhn"]
    assert [row["source"] for row in best.best_checkpoints(rows)] == ["cifar10", "svhn"]
    assert names_of(comparisons(rows)[0])[0] == "cifar10/checkpoints/2"
    assert names_of(comparisons(rows)[0])[1] == "cifar10 epoch 1"


def test_trajectories_alone_are_not_compared_by_name():
    assert comparisons(make_results()["transfer"]) == []
    assert best.best_checkpoints(make_given_results()["transfer"]) == []


def test_overall_answer_counts_targets():
    rows = [given_row("x", 0.9, target=t) for t in "ab"] + [given_row("y", 0.8, target=t) for t in "ab"]
    rows += [given_row("x", 0.1, target="c"), given_row("y", 0.2, target="c")]
    text = answer.overall_by_name(comparisons(rows))
    assert text == "As a frozen feature extractor (FE), x is best on 2 of 3 targets, y is best on 1."
    equal = [given_row(name, 0.5, target="d") for name in "xy"]
    text = answer.overall_by_name(comparisons([*rows, *equal]))
    assert text.endswith("x is best on 2 of 4 targets, y is best on 1, x and y are equally good on 1.")


# --- the page and the terminal


def test_page_of_given_checkpoints_never_says_epoch(tmp_path):
    results = make_given_results()
    text = page_text(tmp_path, results, GIVEN_CONFIG)
    words = text[: text.index("All results")].replace("Fine-tune (1 epoch)", "").lower()
    words = words.replace("fine-tuning for k epochs", "")  # the explanation of the work of fine-tuning
    assert "epoch" not in words and "trajectory" not in words
    assert "pre-trained on" not in text and "stage pretrain" not in text
    assert f"4 given checkpoints: {', '.join(dict.fromkeys(r['checkpoint'] for r in results['transfer']))}" in text
    for comparison in comparisons(results["transfer"]):
        assert f"{comparison.best.label} is best with {tables.percent(comparison.best.point.mean)}" in text


def test_page_of_both_names_the_winner_and_the_best_own_epoch(tmp_path):
    results = make_both_results()
    text = page_text(tmp_path, results, {**GIVEN_CONFIG, "stages": ["pretrain"]})
    assert "resnet18 pre-trained on tfds:cifar10, and 4 given checkpoints: " in text
    for row in best.best_checkpoints(results["transfer"]):
        assert (
            f"Of the study's own epochs, {row['best_epoch']} is best with {tables.percent(row['best_accuracy'])}"
            in text
        )
    assert "Transfer along the trajectory" in text and "Transfer by checkpoint" in text


def test_page_without_results_names_the_checkpoints_of_the_config(tmp_path):
    assert "2 given checkpoints: a.safetensors, b.safetensors" in page_text(tmp_path, {}, GIVEN_CONFIG)


def test_page_of_a_trajectory_has_no_sections_of_the_other_kinds(tmp_path):
    text = page_text(tmp_path, make_results(), CONFIG)
    for heading in ("Transfer by checkpoint", "Settings tried", "Time and memory", "given checkpoint"):
        assert heading not in text


@pytest.mark.parametrize("kind", KINDS)
def test_terminal_tables_fit_80_columns(kind, tmp_path, monkeypatch):
    results = KINDS[kind]()
    results["transfer"] += grid_points(results, "test_grid")
    console = rich.console.Console(width=80, file=io.StringIO(), record=True)
    monkeypatch.setattr(main.rich, "print", console.print)
    main._print_summary(write_workdir(tmp_path, results) / "results")
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("* The best of the sweep on the test images") == (2 if kind == "both" else 1)
    assert "(best of the sweep" in text  # in the trust note
    for title, shown in (("by name", kind != "own"), ("Gain", kind != "given")):
        assert (title in text) == shown
    for row in comparison_rows(comparisons(results["transfer"]))[:1]:
        assert row["Accuracy"].removesuffix("\N{NO-BREAK SPACE}%") in text
    assert all(title in text for title in ("spread", "FT*"))


# --- figures and tables of components


def test_figure_shows_every_given_checkpoint_best_first():
    results = make_both_results(TARGETS[:1])
    figure = figures_by_name.accuracy_by_name(results["transfer"], TARGETS[0])
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    points = best.accuracy_by("checkpoint", results["transfer"], TARGETS[0], "probe")
    expected = sorted(points, key=lambda name: -points[name].mean)
    shown = [name for name in expected if name in GIVEN or name in ("5", "10", "40", "200")]
    assert [name.replace("epoch ", "") for name in names] == [
        name if len(name) < 23 else "a_very_lon…oints/90000" for name in shown
    ]
    drawn = figure.axes[0].lines[0].get_xdata()
    assert sorted(drawn) == pytest.approx(sorted(100 * points[name].mean for name in shown))


def test_scores_of_given_checkpoints_are_labelled_by_name_without_a_colour_bar():
    results = make_given_results(TARGETS[:1])
    arguments = (TARGETS[0], "logme", "probe", results["ranking"])
    figure = score_figures.score_against_accuracy(results["scores"], results["transfer"], *arguments)
    assert len(figure.axes) == 1
    assert {"mobilenet_v2", "run1/c…oints/5"} <= {text.get_text() for text in figure.axes[0].texts}
    both = make_both_results(TARGETS[:1])
    figure = score_figures.score_against_accuracy(both["scores"], both["transfer"], *arguments)
    assert figure.axes[1].get_ylabel() == "Pre-training epoch"
    assert sum(len(dots.get_offsets()) for dots in figure.axes[0].collections if len(dots.get_offsets()) > 1) == 16


@pytest.mark.parametrize("kind", KINDS)
def test_shown_checkpoints_are_those_with_table_rows(kind):
    results = KINDS[kind](TARGETS[:1])
    own = best.best_checkpoints(results["transfer"])
    epochs = [str(own[0]["best_epoch"]), "200"] if own else []
    points = best.accuracy_by("checkpoint", best.given(results["transfer"]), TARGETS[0], "probe")
    by_accuracy = sorted(points, key=lambda name: -points[name].mean)
    shown = spectral.shown_checkpoints(results, TARGETS[0])
    assert shown == epochs + (by_accuracy[:2] + by_accuracy[-1:] if points else [])
    table = spectral.table_1(results)
    column = "Epoch" if kind == "own" else "Checkpoint"
    labels = [f"epoch {name}" if name in epochs and kind != "own" else name for name in shown]
    assert [row[column] for row in table if row["Task"] == "FE"] == labels
    assert ("Epoch" in table[0]) == (kind == "own")


def test_shown_checkpoints_without_probes_follow_the_spectral_stage():
    results = {**make_given_results(TARGETS[:1]), "transfer": []}
    assert spectral.shown_checkpoints(results, TARGETS[0]) == [GIVEN[0], GIVEN[1], GIVEN[3]]


@pytest.mark.parametrize("kind", KINDS)
def test_converged_probe_stands_for_frozen_features_where_it_is_the_only_probe(kind, tmp_path):
    results = KINDS[kind](TARGETS[:1])
    others = [row for row in results["transfer"] if row["method"] != "probe"]
    results = {**results, "transfer": others}
    points = best.accuracy_by("checkpoint", others, TARGETS[0], "probe_converged")
    rows = [row for row in spectral.table_1(results) if row["Task"] == "FE converged"]
    assert tables.percent(max(point.mean for point in points.values())) in [row["Accuracy"] for row in rows]
    assert all(row["Accuracy"] != tables.EN_DASH for row in rows)
    assert all("FE converged accuracy is highest" in words for _, words in spectral.story(results))
    text = page_text(tmp_path, results, CONFIG)
    assert "with the highest FE converged accuracy" in text and "belongs to the FE converged probe" in text
    assert "highest FE accuracy" not in text and "FE accuracy is highest" not in text
    paper = [{"target": TARGETS[0], "epoch": 5, "what": "FE", "accuracy": 0.7, "where": "Table 1"}]
    (row,) = spectral.paper_rows(results, paper)
    assert row["What"] == "FE (ours: FE converged)"
    assert row["Ours"] == (tables.EN_DASH if kind == "given" else tables.percent(points["5"].mean))


def test_components_of_given_checkpoints_are_drawn_by_name():
    results = make_given_results(TARGETS[:1])
    for axes in spectral_figures.components_by_name(results["spectral"], TARGETS[0]).axes:
        assert [text.get_text() for text in axes.get_yticklabels()][:2] == ["random resnet18", "run1/checkpoints/5"]
        assert len(axes.lines) == 3
    titles = [axes.get_title() for axes in spectral_figures.embeddings(results["embedding"], TARGETS[0], None).axes]
    assert "run1/checkpoints/5\nbefore fine-tuning" in titles


def test_story_compares_given_checkpoints_by_name():
    ((_, words),) = spectral.story(make_given_results(TARGETS[:1]))
    assert "FE accuracy is highest for run1/checkpoints/5" in words and "epoch" not in words
    assert len(list(spectral.story(make_both_results(TARGETS[:1])))) == 2


def test_source_accuracy_belongs_to_the_checkpoint_of_a_step():
    results = make_results(TARGETS[:1], (0, 1, 5))
    name_of = {"0": "0", "1": "18000", "5": "90000"}
    results = {
        name: [
            row | {k: name_of[row[k]] for k in ("checkpoint", "other") if k in row}
            | ({"epoch": 3.596 * row["epoch"]} if "epoch" in row else {})
            for row in rows
        ]
        for name, rows in results.items()
    }  # fmt: skip
    last = spectral.table_1(results)[-1]
    assert last["Epoch"] == "17.98"
    assert last["Source accuracy"] == tables.percent(results["pretrain"][-1]["test_accuracy"])


# --- the ranking


def test_ranking_counts_given_checkpoints_but_no_grid_points(tmp_path):
    work = Workspace(one_epoch_config(pretrain__epochs=1, trajectory__epochs="all"), tmp_path)
    target = work.config.targets[0]
    rows, scores = Rows(work.results, "transfer"), Rows(work.results, "scores")
    for i, (name, epoch) in enumerate((("0", 0), ("1", 1), ("run/a", None))):
        accuracy = 0.5 + 0.1 * i
        rows.append(TransferRow(name, epoch, target, "probe", 0, 0.1, accuracy, accuracy, 9, 9, 1.0, 1.0))
        grid = TransferRow(name, epoch, target, "finetune", 0, 0.1, 0.9, 0.9, 9, 9, 1.0, 1.0, split="validation")
        rows.append(grid)
        scores.append(ScoreRow(name, epoch, target, "logme", float(i), 1.0, 1.0, 1.0))
    ranking = [row for row in report_stage._judged(work)["ranking"] if row.score == "logme"]
    assert [(row.method, row.num_checkpoints, row.num_scored, round(row.kendall, 6)) for row in ranking] == [
        ("probe", 3, 3, 1.0)
    ]


@pytest.mark.parametrize("num_given", [1, 2])
def test_one_is_counted_in_the_singular(num_given, tmp_path):
    results = make_given_results(TARGETS[:1], GIVEN[:2])
    left_out = {*GIVEN[num_given:]}
    results = {
        name: [row for row in rows if not left_out & {row.get("checkpoint"), row.get("other")}]
        for name, rows in results.items()
    }
    results["ranking"] = [row | {"num_checkpoints": num_given, "num_scored": num_given} for row in results["ranking"]]
    results["transfer"] += grid_points(results, rates=(0.001,), decays=(0.0,))
    text = page_text(tmp_path, results, CONFIG)
    assert ("1 checkpoint is too few to trust any of this" in text) == (num_given == 1)
    assert ("2 checkpoints are too few to trust any of this" in text) == (num_given == 2)
    assert "(1 setting)" in text
    assert not re.findall(r"\b1 (?:checkpoints|given checkpoints|settings|targets|epochs)\b", text)


# --- what the given checkpoints are


def test_page_describes_the_given_checkpoints(tmp_path):
    row = CheckpointRow(
        "b", "models/b.pth", "resnet50", 25_557_032, {"image_size": 224}, True, False, ["A <guess>."], "f"
    )
    results = make_given_results() | {"checkpoints": [to_json_dict(row)]}
    text = page_text(tmp_path, results, GIVEN_CONFIG)
    described = text[text.index("Given checkpoints") : text.index("Why: the spectral components")]
    for cell in ("resnet50", "25,557,032", "224", "a guess", "no", "models/b.pth", "A <guess>."):
        assert cell in described
    assert "Given checkpoints" not in page_text(tmp_path / "own", make_results(), CONFIG)
