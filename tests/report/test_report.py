"""The report: the best epoch, hostile names, missing stages, and the same bytes for the same results."""

import csv
import io
import json
import logging
import math
import re
import xml.etree.ElementTree

import numpy as np
import pytest
import rich.console

from helpers.reports import CONFIG, EPOCHS, SCORES, TARGETS, Elements, make_results, transfer_row, write_workdir
from jax_transfer.records import InputError
from jax_transfer.report import answer, figures, page, score_figures, spectral_figures, style, tables
from jax_transfer.report import spectral as report_spectral
from jax_transfer.report.best import Point, best_checkpoints, summary_table
from jax_transfer.results import read_rows
from jax_transfer.study.stages import written_by

HOSTILE = 'folder:/data/<script>alert("x")</script>&\'鸟类 $x^2$ [red]\x07'


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """Returns (working directory, results, page) of a complete study."""
    results = make_results()
    workdir = write_workdir(tmp_path_factory.mktemp("study"), results, CONFIG)
    return workdir, results, page.write_report(workdir).read_text(encoding="utf-8")


def test_best_epoch_has_the_highest_mean_over_seeds():
    rows = [transfer_row(1, 0.9, 0), transfer_row(1, 0.5, 1), transfer_row(2, 0.8, 0), transfer_row(2, 0.7, 1)]
    rows += [transfer_row(10, 0.6, 0), transfer_row(10, 0.7, 1)]
    (best,) = best_checkpoints(rows[::-1])  # the order of rows does not matter
    assert (best["best_epoch"], best["last_epoch"], best["num_seeds"]) == (2, 10, 2)
    assert best["best_accuracy"] == pytest.approx(0.75)
    assert best["last_accuracy"] == pytest.approx(0.65)
    assert best["gain"] == pytest.approx(0.10)
    assert best["seed_spread"] == pytest.approx(0.10)


def test_earliest_epoch_wins_ties():
    # The means differ in the last bit: (0.1 + 0.2) / 2 and 0.15.
    rows = [transfer_row(3, 0.15, s) for s in (0, 1)] + [transfer_row(20, 0.1, 0), transfer_row(20, 0.2, 1)]
    rows += [transfer_row(10, 0.3 / 2, 0), transfer_row(10, 0.15, 1), transfer_row(1, 0.1)]
    assert best_checkpoints(rows)[0]["best_epoch"] == 3


def test_best_checkpoints_skip_nan_and_name_incomplete_epochs():
    rows = [transfer_row(0, math.nan), transfer_row(1, 0.5, 0), transfer_row(1, 0.5, 1), transfer_row(2, 0.4, 0)]
    rows += [transfer_row(3, math.nan, 0), transfer_row(3, 0.45, 1), transfer_row(4, math.nan)]
    (best,) = best_checkpoints(rows)
    # Epochs 0 and 4 have no accuracy, epoch 3 has that of one seed.
    assert (best["best_epoch"], best["best_accuracy"], best["last_epoch"]) == (1, 0.5, 3)
    assert best["incomplete_epochs"] == [2, 3] and best["num_checkpoints"] == 3


def test_best_checkpoints_separate_targets_and_methods(full):
    _, results, _ = full
    best = best_checkpoints(results["transfer"])
    assert [(row["target"], row["method"]) for row in best] == [
        (t, m) for t in TARGETS for m in tables.METHODS if m != "zero_shot"
    ]
    assert best[0]["best_epoch"] in (3, 5, 10) and best[0]["gain"] > 0.05


def test_csv_equals_rows(full):
    workdir, results, _ = full
    for name, rows in results.items():
        with open(workdir / "report" / f"{name}.csv", newline="", encoding="utf-8") as file:
            read = list(csv.DictReader(file))
        assert list(read[0]) == list(rows[0])  # columns in the order of the dataclass
        # str(float) keeps every digit
        assert read == [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows]


def test_csv_keeps_commas_quotes_newlines_and_none(tmp_path):
    tables.to_csv([{"a": 'x,"y"\n', "b": None}, {"a": "鸟", "c": 0.1}], tmp_path / "t.csv")
    with open(tmp_path / "t.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["a", "b", "c"], ['x,"y"\n', "", ""], ["鸟", "", "0.1"]]


def test_incomplete_last_line_is_dropped_with_a_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("jax_transfer"), "propagate", True)
    path = tmp_path / "other.jsonl"
    path.write_bytes(b'{"a": NaN}\n{"a": 2}\n{"a": "\xe9\xb8')
    with caplog.at_level(logging.WARNING):
        rows = read_rows(path)
    assert math.isnan(rows[0]["a"]) and rows[1:] == [{"a": 2}]
    assert f"{path}: the last line is incomplete" in caplog.text


@pytest.mark.parametrize("line", ["{", "3", '{"epoch": 1}'])
def test_error_names_invalid_line_within_the_file(tmp_path, line):
    path = tmp_path / "transfer.jsonl"
    good = json.dumps(transfer_row(1, 0.5))
    path.write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(InputError, match=r"transfer\.jsonl: line 2"):
        read_rows(path)


@pytest.mark.parametrize(
    ("target", "short"),
    [
        ("tfds:mnist?per_class=100", "mnist (100 per class)"),
        ("tfds:cifar10", "cifar10"),
        ("embedded:digits?per_class=5&seed=1", "digits (5 per class, seed 1)"),
        ("folder:/my/birds/", "birds"),
        ("folder:/my/birds?", "birds?"),
        ("folder:/my/why? because", "why? because"),
        ("tfds:a/b:1.0.0", "b:1.0.0"),
        ("folder:/نی\u200cها\x00", "نی\u200cها\N{REPLACEMENT CHARACTER}"),  # joiners belong to words
    ],
)
def test_short_target_is_a_readable_name(target, short):
    assert tables.short_target(target) == short


def test_ambiguous_short_targets_keep_their_full_names():
    names = tables.target_names(["folder:/a/birds", "folder:/b/birds", "tfds:mnist"])
    assert names == {"folder:/a/birds": "folder:/a/birds", "folder:/b/birds": "folder:/b/birds", "tfds:mnist": "mnist"}


def test_summary_table_prints_brackets_verbatim():
    console = rich.console.Console(width=200, record=True, file=io.StringIO())
    console.print(summary_table([transfer_row(5, 0.9647, target="[red]x"), transfer_row(9, 0.8, target="[red]x")]))
    text = console.export_text()
    assert "[red]x" in text and "96.47" in text and "FE" in text and "16.47" in text


def test_missing_values_show_as_en_dash():
    cells = re.findall("<td.*?>(.*?)</td>", tables.to_html([{"a": None, "b": math.nan, "c": 0.5}, {"a": 1}]))
    assert cells == ["–", "–", "0.5000", "1", "–", "–"]


def test_page_loads_no_external_resources(full):
    _, _, text = full
    assert "<script" not in text and "@import" not in text
    for tag, attributes in Elements(text).elements:
        assert tag not in ("link", "script", "img", "iframe", "base", "object", "embed")
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                assert value.startswith(("#", "data:image/png;base64,"))
    assert all(url.startswith("#") for url in re.findall(r"url\(['\"]?([^)]*)\)", text))


def test_ids_are_unique_and_references_resolve(full):
    _, _, text = full
    elements = Elements(text).elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) > 100 and len(ids) == len(set(ids))
    references = re.findall(r'(?:xlink:href="|url\()#([^")]+)', text)
    assert references and set(references) <= set(ids)


def test_page_opens_with_the_best_checkpoint(full):
    _, results, text = full
    best = best_checkpoints(results["transfer"])[0]
    opening = text[: text.index("<svg")]
    assert f"epoch {best['best_epoch']} is best with {100 * best['best_accuracy']:.2f}\N{NO-BREAK SPACE}%" in opening
    assert f"{100 * best['gain']:.2f} points above the last checkpoint" in opening
    assert "mnist (100 per class)" in opening and "fine-tuned (FT), " in opening.lower().replace("(ft)", "(FT)")


def test_opening_counts_targets_and_gains_within_seed_spread():
    rows = [transfer_row(1, 0.9, 0, target=t) for t in "ab"] + [transfer_row(2, 0.8, 0, target=t) for t in "ab"]
    rows += [transfer_row(1, 0.80, 1, target="b"), transfer_row(2, 0.85, 1, target="b")]
    text = answer.overall(best_checkpoints(rows))
    assert text.endswith("on 2 of 2 targets (by up to 10.00 points; the spread over seeds is as large on 1).")
    rows = [transfer_row(1, 0.5, method="finetune"), transfer_row(2, 0.6, method="finetune")]
    assert "no earlier checkpoint beats the last one on the only target" in answer.overall(best_checkpoints(rows))


def test_gain_within_seed_spread_is_not_clear():
    rows = [transfer_row(1, 0.90, 0), transfer_row(1, 0.94, 1), transfer_row(2, 0.90, 0), transfer_row(2, 0.92, 1)]
    assert "no clear gain" in answer.epoch_sentence(best_checkpoints(rows)[0])
    rows = [transfer_row(1, 0.93, 0), transfer_row(1, 0.94, 1), transfer_row(2, 0.90, 0), transfer_row(2, 0.91, 1)]
    assert "no clear gain" not in answer.epoch_sentence(best_checkpoints(rows)[0])


def test_every_figure_is_a_well_formed_svg_file(full):
    workdir, _, text = full
    paths = sorted((workdir / "report" / "figures").glob("*.svg"))
    assert len(paths) == text.count("<figure>") == 1 + 2 + 2 * 3 * len(SCORES) + 2 * 6
    for path in paths:
        width = xml.etree.ElementTree.parse(path).getroot().get("width")
        assert float(width.removesuffix("pt")) == pytest.approx(72 * style.WIDTH)


def test_page_and_figures_are_reproducible_byte_for_byte(full, tmp_path):
    workdir, results, text = full
    again = page.write_report(write_workdir(tmp_path, results, CONFIG))
    assert again.read_text(encoding="utf-8") == text
    for path in (workdir / "report" / "figures").glob("*.svg"):
        assert (again.parent / "figures" / path.name).read_bytes() == path.read_bytes()
    assert not list(again.parent.rglob("*.partial"))


def test_hostile_names_are_escaped_everywhere(tmp_path):
    targets = (HOSTILE, HOSTILE + "2", "folder:/" + "鸟" * 300, "folder:/\udcff\u2028")
    results = make_results(targets, EPOCHS[:3], seeds=(0,))
    results["scores"] = [row for row in results["scores"] if row["score"] == "leep"]
    config = CONFIG | {"name": "</pre><b>&", "model": {"name": "<i>"}, "targets": targets}
    path = page.write_report(write_workdir(tmp_path, results, config))
    elements = Elements(path.read_text(encoding="utf-8"))
    assert not {"script", "b", "i"} & {tag for tag, _ in elements.elements}
    shown = tables.short_target(HOSTILE)
    assert "鸟类 $x^2$ [red]\N{REPLACEMENT CHARACTER}" in shown and shown in elements.text
    assert "</pre><b>&" in elements.text
    svgs = list((path.parent / "figures").iterdir())
    assert len(svgs) == 1 + 4 + 4 * 3 + 4 * 6
    drawn = ["".join(xml.etree.ElementTree.parse(svg).getroot().itertext()) for svg in svgs]
    assert any("$x^2$ [red]" in text for text in drawn)  # not typeset as a formula


@pytest.mark.parametrize("missing", ["pretrain", "transfer", "scores", "ranking", "spectral", "spectrum", "embedding"])
def test_page_names_the_stage_that_has_not_run(tmp_path, missing):
    results = make_results(TARGETS[:1], EPOCHS[:4], seeds=(0,))
    del results[missing]
    results["scores"] = results.get("scores", [])[:4]
    text = Elements(page.write_report(write_workdir(tmp_path, results), written_by()).read_text(encoding="utf-8")).text
    assert f"results/{missing}.jsonl: stage {' or '.join(written_by()[missing])} has not run" in text
    assert "no config.json" in text


def test_page_of_an_empty_working_directory_names_every_stage(tmp_path):
    text = Elements(page.write_report(tmp_path, written_by()).read_text(encoding="utf-8")).text
    assert all(f"stage {' or '.join(stages)} has not run" in text for stages in written_by().values())


def test_page_reports_missing_fine_tuning(tmp_path):
    rows = [transfer_row(1, 0.9), transfer_row(2, 0.8)]
    written = page.write_report(write_workdir(tmp_path, {"transfer": rows}), written_by())
    text = Elements(written.read_text(encoding="utf-8")).text
    assert "stage finetune has not run" in text and "stage probe has not run" not in text


def test_unknown_results_get_a_table_and_a_csv(tmp_path):
    text = page.write_report(write_workdir(tmp_path, {"mine": [{"x": 1, "y": "z"}]})).read_text(encoding="utf-8")
    assert "mine (1 row)" in text
    assert (tmp_path / "report" / "mine.csv").read_text() == "x,y\n1,z\n"


def test_missing_working_directory_or_invalid_config_is_rejected(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        page.write_report(tmp_path / "no")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json"):
        page.write_report(tmp_path)


def test_figures_without_values_raise_input_errors():
    with pytest.raises(InputError, match="no accuracy for target 'b'"):
        figures.transfer_curves([], [transfer_row(1, 0.5)], "b")
    with pytest.raises(InputError, match="stage pretrain"):
        figures.source_accuracy([])
    with pytest.raises(InputError, match="stage scores"):
        score_figures.score_against_accuracy([], [transfer_row(1, 0.5)], "a", "logme", "probe")


def test_methods_get_separate_panels_only_if_ranges_differ():
    def points(*means):
        return [Point(mean, mean, mean, 1) for mean in means]

    near = {"probe": points(0.6, 0.8), "finetune": points(0.7, 0.9)}
    assert figures.panels_of(near) == [["probe", "finetune"]]
    far = {"probe": points(0.6, 0.9), "probe_converged": points(0.7, 0.8), "finetune": points(0.98, 0.99)}
    assert figures.panels_of(far) == [["probe", "probe_converged"], ["finetune"]]


def test_curves_draw_mean_and_seed_band():
    rows = [transfer_row(1, 0.5, 0), transfer_row(1, 0.7, 1), transfer_row(2, 0.9, 0), transfer_row(2, 0.9, 1)]
    axes = figures.transfer_curves([], rows, "a").axes[0]
    assert axes.lines[0].get_ydata() == pytest.approx([60, 90])
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((50, 90))
    star = next(line for line in axes.lines if line.get_marker() == "*")
    assert (star.get_xdata()[0], star.get_ydata()[0]) == pytest.approx((2, 90))


def test_pretrainings_are_compared_on_common_axes_for_each_method(tmp_path):
    def row(source, epoch, accuracy, method="probe"):
        return {**transfer_row(epoch, accuracy), "checkpoint": f"{source}/{epoch}", "method": method}

    rows = [row("supervised", 0, 0.2), row("supervised", 5, 0.9), row("supervised", 9, 0.8), row("moco_v2", 0, 0.2)]
    rows += [row("moco_v2", 5, 0.5), row("moco_v2", 9, 0.7), row("moco_v2", 9, 0.95, "finetune")]
    frozen, tuned = figures.compared_trajectories(rows, "a").axes
    lines = [line for line in frozen.lines if len(line.get_xdata()) == 3]
    assert [line.get_label().split(",")[0] for line in lines] == ["supervised", "moco_v2"]
    np.testing.assert_allclose([line.get_ydata() for line in lines], [[20, 90, 80], [20, 50, 70]])
    assert [text.get_text().split(",")[0] for text in tuned.get_legend().get_texts()] == ["moco_v2"]
    assert frozen.get_ylabel() == "FE accuracy (%)" and tuned.get_ylabel() == "FT accuracy (%)"
    with pytest.raises(InputError, match="no accuracy for target 'b'"):
        figures.compared_trajectories(rows, "b")
    page.write_report(write_workdir(tmp_path / "two", {"transfer": rows}))
    page.write_report(write_workdir(tmp_path / "one", {"transfer": rows[:3]}))
    assert [path.parts[-4] for path in tmp_path.rglob("compared_trajectories*")] == ["two"]


@pytest.mark.parametrize(("num_checkpoints", "noted"), [(9, True), (10, False)])
def test_figure_title_notes_too_few_checkpoints(num_checkpoints, noted):
    results = make_results(TARGETS[:1], EPOCHS[:num_checkpoints], seeds=(0,))
    arguments = (results["scores"], results["transfer"], TARGETS[0], "logme", "finetune", results["ranking"])
    title = score_figures.score_against_accuracy(*arguments).get_suptitle()
    assert ("too few to trust" in title) == noted
    assert "τ = 0.52" in title and "r = 0.71" in title


def test_scores_are_matched_to_accuracies_by_checkpoint():
    results = make_results(TARGETS[:1], (0, 1, 2, 3), seeds=(0,))
    scores = [row for row in results["scores"] if row["score"] == "logme"][::-1]  # another order, and one missing
    figure = score_figures.score_against_accuracy(scores[1:], results["transfer"], TARGETS[0], "logme", "probe")
    dots = next(c for c in figure.axes[0].collections if c.get_array() is not None)
    accuracy = {r["epoch"]: 100 * r["accuracy"] for r in results["transfer"] if r["method"] == "probe"}
    value = {row["epoch"]: row["value"] for row in scores}
    assert list(dots.get_array()) == [0, 1, 2]
    np.testing.assert_allclose(dots.get_offsets(), [(value[e], accuracy[e]) for e in (0, 1, 2)])


# --- the spectral components


def test_story_names_the_component_each_protocol_follows(full):
    _, results, _ = full
    (name, words), *_ = report_spectral.story(results)
    assert name == "mnist (100 per class)"
    frozen, tuned = words.split(" FT accuracy ")
    best = next(r for r in best_checkpoints(results["transfer"]) if r["method"] == "probe")
    assert f"FE accuracy is highest at epoch {best['best_epoch']} ({tables.percent(best['best_accuracy'])})" in frozen
    assert f"{100 * best['gain']:.2f} points lower at the last epoch, 200" in frozen
    assert "follows the residual component" in tuned
    t = np.log1p(np.array([best["best_epoch"], 200.0]))
    assert f"main component changes by {-6 * (t[1] - t[0]):+.2f} points" in frozen
    assert "too few to be sure" not in words  # 12 checkpoints
    few = make_results(TARGETS[:1], EPOCHS[:4], seeds=(0,))
    assert "4 checkpoints are too few to be sure" in next(report_spectral.story(few))[1]


def test_story_is_empty_without_accuracies():
    results = make_results(TARGETS[:1], EPOCHS[:4])
    assert list(report_spectral.story({**results, "transfer": []})) == []
    assert list(report_spectral.story({})) == []


def test_table_1_holds_the_best_frozen_and_last_epoch(full):
    _, results, text = full
    rows = [row for row in report_spectral.table_1(results) if row["Target"] == "mnist (100 per class)"]
    best = next(r for r in best_checkpoints(results["transfer"]) if r["method"] == "probe")["best_epoch"]
    assert [(row["Task"], row["Epoch"]) for row in rows] == [(t, str(e)) for t in ("FE", "FT") for e in (best, 200)]
    assert rows[1]["Probe, main"] == tables.percent(0.9 - 0.06 * math.log(201))
    assert rows[1]["Rank of main"] in ("30 of 128", "31 of 128")
    assert rows[0]["Accuracy"] in text and "Why: the spectral components" in text


def test_page_compares_our_accuracies_with_the_paper(tmp_path):
    paper = [
        {"target": "", "epoch": 5, "what": "source", "accuracy": 0.7024, "where": "Table 1"},
        {"target": TARGETS[0], "epoch": 200, "what": "FE main", "accuracy": 0.5874, "where": "Table 1"},
        {"target": TARGETS[0], "epoch": 5, "what": "FT", "accuracy": 0.993, "where": "Table 1"},
        {"target": TARGETS[0], "epoch": 7, "what": "FE", "accuracy": 0.9, "where": "Figure 1"},
    ]
    results = make_results(TARGETS[:1], seeds=(0,))
    source, main, tuned, absent = (row["Ours"] for row in report_spectral.paper_rows(results, paper))
    assert source == tables.percent(next(r["test_accuracy"] for r in results["pretrain"] if r["epoch"] == 5))
    assert main == tables.percent(0.9 - 0.06 * math.log(201))
    (expected,) = [r["accuracy"] for r in results["transfer"] if (r["method"], r["epoch"]) == ("finetune", 5)]
    assert tuned == tables.percent(expected) and absent == tables.EN_DASH
    text = page.write_report(write_workdir(tmp_path, results, {**CONFIG, "paper": paper})).read_text(encoding="utf-8")
    assert "Comparison with the paper" in text and "58.74" in text


def test_component_figure_draws_every_stage_and_component():
    results = make_results(TARGETS[:1], seeds=(0,))
    figure = spectral_figures.component_curves(results["spectral"], TARGETS[0])
    assert len(figure.axes) == 2 and all(len(axes.lines) == 3 for axes in figure.axes)
    assert figure.axes[0].lines[1].get_ydata()[-1] == pytest.approx(100 * (0.9 - 0.06 * math.log(201)))
    with pytest.raises(InputError, match="run stage spectral"):
        spectral_figures.component_curves(results["spectral"], "tfds:other")
