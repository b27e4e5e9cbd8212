"""Reusing source data: which way is best and by how much, what was selected, and nothing of it anywhere else."""

import base64
import json
import math
import pathlib
import types

import numpy as np
import pytest

from helpers import reports, reuse
from helpers.reports import Elements, write_workdir
from helpers.reuse import BIRDS, CALTECH, CHECKPOINT, CLASSES, CUB, GAINS, SELECTIONS
from jax_transfer import main
from jax_transfer.report import families, grid, page, reuse_figures, reuse_section, reuse_tables, selected, tables
from jax_transfer.report import reuse as report_reuse
from jax_transfer.report.best import Point, by_metric
from jax_transfer.report.reuse import PLAIN_WAY, Way, collect, sentence
from jax_transfer.results import Rows, TransferRow, is_plain, picture, results_of
from jax_transfer.study import report as report_stage
from jax_transfer.study.config import default_config
from jax_transfer.study.epochs import Pretraining, snapshot
from jax_transfer.study.finetune import chosen_rates
from jax_transfer.study.stages import written_by

UOT, RANDOM = Way("joint", "uot"), Way("joint", "random")


def only(rows, checkpoint=CHECKPOINT):
    """Returns what `collect` finds for a checkpoint."""
    return next(found for found in collect(rows) if found.checkpoint == checkpoint)


def points(mean, spread=0.0, seeds=3):
    return Point(mean, mean - spread / 2, mean + spread / 2, seeds)


def write_page(folder, results, config=None):
    config = reuse.config() if config is None else config
    return page.write_report(write_workdir(folder, results, config), written_by()).read_text(encoding="utf-8")


def html_of(results, config=None, folder=pathlib.Path()):
    """Returns the section as HTML without its figures, which takes less time than a page."""
    parts = reuse_section.section(by_metric(results), reuse.config() if config is None else config, folder)
    return "\n".join(part for part in parts if isinstance(part, str))


def words_of(results, config=None):
    return Elements(html_of(results, config)).text


def section_of(text):
    """Returns the text of the section on reuse."""
    words = Elements(text).text
    return words[words.index("Reusing pre-training data") : words.index("Which checkpoint transfers best\n")]


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """Returns (results, page) of a study with all ways of fine-tuning."""
    results = reuse.make_reuse_results()
    return results, write_page(tmp_path_factory.mktemp("reuse"), results)


# --- plain fine-tuning stays by itself


def with_reuse(results):
    """Adds better rows of other ways to the fine-tuned models of a study, and points of their grids."""
    ways = [{"objective": "joint", "selection": "uot"}, {"objective": "cotuning"}]
    tuned = [row for row in results["transfer"] if row["method"] == "finetune"]
    better = [
        {**row, **way, "source_weight": 0.3, "accuracy": 0.999, "learning_rate": 0.5, "split": split}
        for row in tuned
        for way in ways
        for split in ("test", "test_grid", "validation")
    ]
    return {**results, "transfer": [*better, *results["transfer"], *better]}


def test_other_sections_of_the_page_read_plain_fine_tuning_only(tmp_path):
    own = reports.make_results(reports.TARGETS[:1], reports.EPOCHS[:2], (0,))
    given = reports.make_given_results(reports.TARGETS[:1], reports.GIVEN[:2], (0,))
    results = {name: [*rows, *given.get(name, [])] for name, rows in own.items()}

    def sections(results, folder):
        folder.mkdir()
        shown = page.Page(reports.CONFIG, results, by_metric(results), written_by(), folder, folder)
        changed = ("Reusing pre-training data", "Settings tried", "What failed", "All results")
        return {name: list(make(shown)) for name, make in page.SECTIONS.items() if name not in changed}

    before, after = (sections(r, tmp_path / n) for n, r in (("a", results), ("b", with_reuse(results))))
    assert before == after and sum(map(bool, before.values())) > 8


def test_terminal_tables_and_stages_read_plain_fine_tuning_only(tmp_path):
    row = TransferRow("5", 5, "tfds:mnist", "finetune", 0, 0.1, 0.9, 0.9, 100, 10, 1.0, 1.0, weight_decay=0.0)
    other = {"objective": "joint", "selection": "uot", "learning_rate": 0.7, "accuracy": 0.99}
    results = {"transfer": [row.__dict__, {**row.__dict__, **other}]}
    assert [found["objective"] for found in by_metric(results)["transfer"]] == ["supervised"]
    assert len(by_metric(results)["reuse"]) == 2
    assert "reuse" not in by_metric({"transfer": [row.__dict__]})
    reused = TransferRow(**{**row.__dict__, **other})
    assert results_of([reused]) == set() and not is_plain(reused) and is_plain(row)
    config = default_config()
    config.finetune.learning_rates = (0.1, 0.7)
    work = types.SimpleNamespace(
        config=config, results=tmp_path, metrics={}, metric=lambda target: "accuracy", snapshots=[]
    )
    tuned = snapshot(Pretraining("resnet18", "tfds:cifar10", "supervised", ""), 5)
    write_workdir(tmp_path, {})
    Rows(tmp_path, "transfer").replace([row, reused])
    assert chosen_rates(work, [tuned], "tfds:mnist") == {tuned: {"learning_rate": 0.1, "weight_decay": 0.0}}


def test_command_prints_the_answer_for_each_target(tmp_path, capsys):
    main._print_summary(write_workdir(tmp_path, reuse.make_reuse_results()) / "results")
    printed = " ".join(capsys.readouterr().out.replace("\N{NO-BREAK SPACE}", " ").split())
    for target in ("cub200", "caltech101"):
        assert f"{CHECKPOINT}, {target}: Joint fine-tuning with uot is the best of 5 ways" in printed


def test_scores_are_ranked_by_plain_accuracies(tmp_path):
    config = default_config()
    config.targets, config.scores = reports.TARGETS, reports.SCORES
    work = types.SimpleNamespace(
        config=config, results=tmp_path, metrics={}, metric=lambda target: "accuracy", snapshots=[]
    )

    def ranking(results):
        for name in ("transfer", "scores"):
            lines = "".join(json.dumps(row) + "\n" for row in results[name])
            (tmp_path / f"{name}.jsonl").write_text(lines)
        return report_stage._judged(work)["ranking"]

    results = reports.make_results(seeds=(0,))
    plain, reused = (ranking(found) for found in (results, with_reuse(results)))
    assert plain == reused and all(math.isfinite(row.kendall) for row in plain)


def test_section_is_shown_only_with_a_selection_or_a_reuse(tmp_path, full):
    results, text = full
    assert "Reusing pre-training data" in text
    plain = {**results, "selection": [], "transfer": [row for row in results["transfer"] if is_plain(row)]}
    assert "<h2>Reusing" not in write_page(tmp_path / "plain", plain)
    selection_only = {name: results[name] for name in ("targets", "selection")}
    words = section_of(write_page(tmp_path / "selection", selection_only))
    assert "stage finetune has not run" in words and "What was selected" in words
    assert "Plain" not in words


def test_a_missing_selection_is_listed_only_if_it_is_planned(tmp_path):
    results = {"transfer": [reports.transfer_row(1, 0.9)]}
    for stages, listed in ((["probe", "report"], False), (["select", "report"], True)):
        text = write_page(tmp_path / str(listed), results, {"stages": stages})
        assert ("selection.jsonl" in text) == listed


# --- the answer


@pytest.mark.parametrize(
    ("plain", "other", "words"),
    [
        (
            points(0.80, 0.02),
            points(0.85, 0.02),
            "5.00 points above plain fine-tuning (80.00 %; best of 3 seeds: 81.00",
        ),
        (points(0.80, 0.02), points(0.85, 0.02), "The spread over seeds is 2.00 points."),
        (points(0.80, 0.02), points(0.81, 0.01), "no more than the spread over seeds (2.00 points), so there is no cl"),
        (points(0.80, 0.01), points(0.79, 0.03), "3.00 points), so there is no clear loss."),
        (points(0.80, 0.02), points(0.75, 0.02), "5.00 points below plain fine-tuning"),
        (points(0.80), points(0.80), "80.00 % accuracy (best of 3 seeds: 80.00 %), the same as plain fine-tuning."),
        (
            points(0.80, seeds=1),
            points(0.85, seeds=1),
            "85.00 % accuracy, 5.00 points above plain fine-tuning (80.00 %).",
        ),
        (None, points(0.85, seeds=1), "; plain fine-tuning has no accuracy yet."),
    ],
)
def test_sentence_compares_the_best_way_with_plain_fine_tuning(plain, other, words):
    found = {UOT: other, RANDOM: points(0.1)} | ({PLAIN_WAY: plain} if plain else {})
    text = sentence(found, "accuracy").replace("\N{NO-BREAK SPACE}", " ")
    assert text.startswith("Joint fine-tuning with uot is the best of 2 ways of reusing source data, with ")
    assert words in text


def test_sentence_says_if_the_test_images_chose_the_settings():
    assert grid.SWEPT in sentence({UOT: points(0.9)}, "accuracy", on_test=True)
    assert grid.SWEPT not in sentence({UOT: points(0.9)}, "accuracy")
    swept = [{**row, "split": "test_grid"} for row in reuse.reuse_rows(CUB)] + reuse.reuse_rows(CUB)
    assert only(swept).swept == {CUB} and only(reuse.reuse_rows(CUB)).swept == set()


def test_sentence_without_another_way_claims_nothing():
    text = sentence({PLAIN_WAY: points(0.9, seeds=1)}, "mean_class_accuracy")
    assert text.endswith("mean class accuracy; no other way has an accuracy yet.")
    assert sentence({}, "accuracy") == ""


def test_best_way_and_seeds_are_on_the_page(full):
    _, text = full
    words = section_of(text).replace("\N{NO-BREAK SPACE}", " ")
    assert "On average over 2 targets, joint fine-tuning with uot (85.50 %), the best of 5 ways" in words
    assert "is 3.00 points above plain fine-tuning (82.50 %)." in words
    assert "cub200. Joint fine-tuning with uot is the best of 5 ways of reusing source data, with 78.00 %" in words
    assert "(best of 3 seeds: 78.20 %)" in words and "The spread over seeds is 0.40 points." in words


def test_overall_answer_leaves_out_parts_and_incomplete_ways():
    rows = [*reuse.reuse_rows(CUB), *reuse.reuse_rows(CALTECH)]
    rows = [row for row in rows if (row["target"], row["selection"]) != (CALTECH, "uot")]
    hard = reuse.reuse_rows(f"{CUB}?fraction=0.2", plain=0.1) + reuse.reuse_rows(f"{CUB}?imbalance=10", plain=0.1)
    assert "joint fine-tuning with labels" in report_reuse.overall(only([*rows, *hard]))
    assert report_reuse.overall(only([*rows, *hard])) == report_reuse.overall(only(rows))
    assert report_reuse.overall(only(reuse.reuse_rows(CUB) + hard)) == ""  # one whole target


def test_a_single_seed_has_no_spread():
    words = words_of(reuse.make_reuse_results(seeds=(0,)))
    assert "With a single seed, the spread over seeds is unknown" in words
    assert "±" not in words and "best of" not in words.replace("the best of", "")


def test_checkpoints_are_told_apart():
    results = reuse.make_reuse_results()
    other = [{**row, "checkpoint": "other", "accuracy": row["accuracy"] - 0.5} for row in results["transfer"]]
    words = words_of({**results, "transfer": [*results["transfer"], *other]})
    first, second = words.split("From other")
    assert f"From {CHECKPOINT}" in first and "78.00" in first and "28.00" not in first
    assert "28.00" in second and "78.00" not in second


# --- tables


def test_tables_hold_mean_spread_and_best_seed():
    found = only(reuse.reuse_rows(CUB) + reuse.reuse_rows(CALTECH, {**GAINS, ("joint", "uot"): -0.2}))
    titles = {CUB: "cub", CALTECH: "caltech"}
    first = reuse_tables.ways_in(found, titles, {})
    rows, bold = reuse_tables.mean_table(found, titles, first)
    assert rows[0] == {"Fine-tuning": "Plain", "cub": "75.00 ± 0.20", "caltech": "90.00 ± 0.20", "Average": "82.50"}
    by_name = {row["Fine-tuning"]: i for i, row in enumerate(rows)}
    assert next(iter(by_name)) == "Plain" and len(rows) == len(GAINS)
    assert bold == {
        (by_name["Joint, uot"], "cub"),
        (by_name["Joint, labels"], "caltech"),
        (by_name["Joint, labels"], "Average"),
    }
    best, _ = reuse_tables.best_table(found, titles, first, {(CUB, UOT): 0.7721})
    assert best[by_name["Joint, uot"]]["cub"] == "78.20 (77.21)"
    assert best[0]["cub"] == "75.20"
    assert "<strong>78.00 ± 0.20</strong>" in tables.to_html(rows, bold=bold)


def test_average_needs_every_target_and_whole_ones():
    rows = reuse.reuse_rows(CUB) + reuse.reuse_rows(CALTECH, {("joint", "random"): 0.1})
    found = only(rows)
    table = reuse_tables.mean_table(found, {CUB: "a", CALTECH: "b"}, reuse_tables.ways_in(found, [CUB], {})).rows
    assert [row["Average"] == tables.EN_DASH for row in table] == [
        row["Fine-tuning"] != "Joint, random" for row in table
    ]
    hard = {f"{CUB}?imbalance=10": "a", f"{CALTECH}?imbalance=10": "b"}
    found = only([row for target, name in hard.items() for row in reuse.reuse_rows(target, plain=0.5)])
    assert "Average" not in reuse_tables.mean_table(found, hard, reuse_tables.ways_in(found, hard, {})).rows[0]


def test_failed_way_is_a_dash_and_listed_as_failed(tmp_path):
    results = reuse.make_reuse_results()
    failed = {"accuracy": None, "mean_class_accuracy": None, "error": "the loss is not finite at step 7"}
    rows = [{**row, **failed} if row["selection"] == "random" else row for row in results["transfer"]]
    text = write_page(tmp_path, {**results, "transfer": rows})
    assert "the best of 4 ways of reusing" in section_of(text)
    words = Elements(text).text
    assert "What failed" in words and "Joint, random" in words[words.index("What failed") :]


def entry(target, accuracy, where="Table 1a", **fields):
    return {"target": target, "what": "FT", "accuracy": accuracy, "where": where, **fields}


def test_numbers_of_the_paper_stand_beside_ours(tmp_path):
    paper = [
        entry(CUB, 0.7549),
        entry(CUB, 0.7721, objective="joint", selection="uot"),
        entry(CUB, 0.7777, objective="joint", selection="not_run"),
        entry(CUB, 0.9831, what="recall", selection="uot"),
        entry(CUB, 0.5, epoch=5, where="Figure 9"),
    ]
    text = write_page(tmp_path, reuse.make_reuse_results(), {**reuse.config(), "paper": paper})
    words = section_of(text)
    assert "75.20 (75.49)" in words and "78.20 (77.21)" in words
    assert "– (77.77)" in words  # a way that has not run
    assert "100.00 (98.31)" in words  # recall
    assert "The paper reports the best of three seeds" in words and "Figure 9" not in words
    words = Elements(text).text
    compared = words[words.index("Comparison with the paper") : words.index("All results")]
    assert "Figure 9" in compared and "Table 1a" not in compared


def test_long_tail_and_parts_have_tables_of_their_own():
    targets = (CUB, f"{CUB}?fraction=0.2", f"{CUB}?fraction=0.4", f"{CUB}?imbalance=10")
    two = {("supervised", None): 0.0, ("joint", "uot"): 0.06}
    rows = [row for t in targets for row in reuse.reuse_rows(t, GAINS if t == CUB else two, plain=0.5)]
    html = html_of({"targets": [reuse.target_row(target) for target in targets], "transfer": rows})
    assert "<h3>With a long-tailed training set</h3>" in html
    part = html[html.index("<h3>With a part of the training images: cub200</h3>") :]
    part = part[: part.index("</table>")]
    assert [Elements(cell).text for cell in part.split("</th>")[1:-1]] == ["20 %", "40 %", "100 %"]
    assert "Joint, uot" in part and "Joint, random" not in part  # a way that no part has


def test_number_of_clusters_has_a_table():
    selections = {
        f"k{k}": {"strategy": "uot", "kind": "cluster", "num_clusters": k, "num_selected": 200} for k in (2000, 1000)
    }
    rows = reuse.reuse_rows(CUB, {("weak_strong", "k1000"): 0.01, ("weak_strong", "k2000"): 0.02})
    (family,) = families.families(selections, "num_clusters")
    ((title, table),) = reuse_tables.cluster_tables(only(rows), [family], {CUB: "cub"})
    assert title == "Number of clusters: UOT, 200 clusters, weak-strong fine-tuning"
    assert table.rows == [{"Clusters": "1,000", "cub": "76.00 ± 0.20"}, {"Clusters": "2,000", "cub": "77.00 ± 0.20"}]


# --- families


@pytest.mark.parametrize(
    ("field", "differ", "members"),
    [
        ("num_selected", [{"num_selected": 300}, {"num_selected": 50}, {}], {50: "b", 100: "c", 300: "a"}),
        ("cost_scale", [{"cost_scale": 1.0}, {"cost_scale": None}], {0.01: "b", 1.0: "a"}),
        ("first", [{"first": 101}, {}, {"metric": "l2", "first": 201}], {1: "b", 101: "a"}),
        ("first", [{"first": 101}, {"first": 1, "num_selected": 50}], None),  # two settings differ
        ("num_clusters", [{"num_clusters": 10}, {"num_clusters": 20}], None),  # of classes, not clusters
        ("num_clusters", [{"kind": "cluster", "num_clusters": 10}, {"kind": "cluster"}], {10: "a", 2000: "b"}),
    ],
)
def test_a_family_differs_in_one_setting_only(field, differ, members):
    selections = {name: {"strategy": "uot", **fields} for name, fields in zip("abc", differ, strict=False)}
    found = families.families({**selections, "random": {"strategy": "random"}}, field)
    assert [family.members for family in found] == ([members] if members else [])


def test_settings_that_a_strategy_does_not_use_make_no_family():
    greedy = {str(scale): {"strategy": "greedy_ot", "cost_scale": scale} for scale in (0.1, 1.0)}
    assert families.families(greedy, "cost_scale") == []
    labels = {str(n): {"strategy": "labels", "num_selected": n} for n in (50, 100)}
    assert families.families(labels, "num_selected") == []


def test_fractions_belong_to_the_target_with_the_same_other_options():
    targets = (f"{CUB}?fraction=0.2&test=50", f"{CUB}?test=50", f"{CUB}?fraction=0.4", CALTECH)
    assert families.by_fraction(targets) == {
        f"{CUB}?test=50": {0.2: targets[0], 1.0: targets[1]},
        CUB: {0.4: targets[2]},
    }


# --- what was selected


def test_recall_counts_related_classes():
    chosen = selected.by_selection(reuse.make_selections(CUB) + reuse.make_selections(CALTECH))
    classes = selected.related(reuse.config()["select"], chosen)
    recalls = {name: selected.recall(rows, classes[target]) for (target, name), rows in chosen.items() if target == CUB}
    assert recalls == {"uot": 1.0, "random": 0.0, "greedy_ot": 6 / 8, "labels": 1.0}
    assert CALTECH not in classes
    clusters = reuse.selected_rows(CUB, "k", ["cluster 1"], kind="cluster")
    assert selected.recall(clusters, BIRDS) is None and selected.recall(chosen[CUB, "uot"], ()) is None


def test_without_listed_labels_the_label_based_selection_gives_the_related_classes():
    chosen = selected.by_selection(reuse.make_selections(CUB))
    assert selected.related({"selections": SELECTIONS}, chosen) == {CUB: set(BIRDS)}
    assert selected.related({}, chosen) == {}


def test_selections_are_listed_with_sizes_recalls_and_accuracies(full):
    results, _ = full
    chosen = selected.by_selection(results["selection"])
    found = only(results["transfer"])
    names = {CUB: "cub", CALTECH: "caltech"}
    classes = selected.related(reuse.config()["select"], chosen)
    rows = selected.selection_rows(chosen, SELECTIONS, classes, names, found, {})
    assert rows[0] == {
        "Target": "cub",
        "Selection": "uot",
        "How": "UOT, cosine",
        "Selected": "100 classes",
        "Images": f"{sum(1300 - i for i in range(100)):,}",
        "Recall (%)": "100.00",
        "Joint (%)": "78.00",
    }
    assert {row["Recall (%)"] for row in rows if row["Target"] == "caltech"} == {tables.EN_DASH}


def test_selections_that_did_not_converge_are_named():
    results = reuse.make_reuse_results()
    rows = [{**row, "converged": row["strategy"] != "uot"} for row in results["selection"]]
    words = words_of({**results, "selection": rows})
    assert "The transport of uot for cub200 and uot for caltech101 did not converge" in words


@pytest.mark.parametrize(("left_out", "words"), [(True, "They were left out."), (False, "may be leakage")])
def test_near_duplicates_are_counted_and_shown(left_out, words):
    overlap = [reuse.overlap_row(CUB, image, test, distance) for image, test, distance in
               ((1, 7, 3), (1, 8, 0), (2, 8, 1), *((i, i, 4) for i in range(3, 20)))]  # fmt: skip
    config = reuse.config(exclude_duplicates=left_out)
    text = words_of({**reuse.make_reuse_results(), "overlap": overlap}, config)
    assert "19 source images nearly equal a test image of cub200 (17 test images)" in text and words in text
    rows = selected.overlap_rows(overlap)
    assert [row["Bits of the hash that differ"] for row in rows] == [0, 1, 3, 4, 4]


@pytest.mark.parametrize(
    ("searched", "words"),
    [(True, "No source image nearly equals a test image of cub200."), (False, "config.select.find_duplicates is off")],
)
def test_no_near_duplicates_and_no_search_are_told_apart(searched, words):
    config = reuse.config(find_duplicates=searched)
    assert words in words_of({**reuse.make_reuse_results(), "overlap": []}, config)


def test_pictures_are_part_of_the_page_and_described(tmp_path):
    results, data = reuse.make_reuse_results(), b"\xff\xd8 a picture"
    for target, name in ((CUB, "uot"), (CUB, "random")):
        path = picture(tmp_path / "results", CHECKPOINT, target, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    elements = Elements(html_of(results, folder=tmp_path / "results")).elements
    images = [attributes for tag, attributes in elements if tag == "img"]
    assert [image["src"] for image in images] == ["data:image/jpeg;base64," + base64.b64encode(data).decode()] * 2
    assert (
        "images of the first classes of selection uot, a row for each: jay, magpie, chickadee, bulbul"
        in images[0]["alt"]
    )


# --- figures


def drawings(results, config):
    """Returns name -> figure of all figures of the section."""
    reading = by_metric(results)
    found, chosen = only(reading["reuse"]), selected.by_selection(results["selection"])
    names = {target: tables.short_target(target) for target in found.points}
    select = config["select"]
    classes = selected.related(select, chosen)
    drawn = [
        *reuse_figures.draw_accuracies(found, select, chosen, names),
        *reuse_figures.draw_recalls(select, chosen, classes, names),
        *reuse_figures.draw_similarities(select, chosen, classes, names),
    ]
    return {drawing.name: drawing.figure for drawing in drawn}


def test_figures_of_families_are_drawn_only_with_families(full):
    names = list(drawings(full[0], reuse.config()))
    assert names == [f"reuse-similarity-{t}-{how}" for t in ("cub200", "caltech101") for how in ("UOT", "greedy-OT")]


def test_accuracy_is_drawn_against_the_number_of_classes():
    numbers = {50: 0.01, 100: 0.03, 300: 0.02}
    selections = {f"uot_{n}": {"strategy": "uot", "num_selected": n} for n in numbers}
    ways = {
        ("supervised", None): 0.0,
        ("joint", "labels"): 0.02,
        **{("joint", f"uot_{n}"): g for n, g in numbers.items()},
    }
    results = {"transfer": reuse.reuse_rows(CUB, ways), "selection": []}
    config = reuse.config(selections={**selections, "labels": {"strategy": "labels"}})
    figure = drawings(results, config)["reuse-number-cub200-joint-classes"]
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(lines) == ["Plain", "label-based", "UOT"]
    np.testing.assert_allclose(lines["UOT"].get_xydata(), [(50, 76), (100, 78), (300, 77)])
    assert lines["label-based"].get_ydata()[0] == pytest.approx(77)


def test_gain_is_drawn_against_the_part_of_the_training_images():
    gains = {0.2: 0.1, 0.6: 0.05, 1: 0.02}
    targets = {0.2: f"{CUB}?fraction=0.2", 0.6: f"{CUB}?fraction=0.6", 1: CUB}
    rows = [
        row
        for part, gain in gains.items()
        for row in reuse.reuse_rows(targets[part], {("supervised", None): 0.0, ("joint", "uot"): gain}, plain=0.5)
    ]
    figure = drawings({"transfer": rows, "selection": []}, reuse.config())["reuse-low_data-cub200"]
    accuracy, gain = figure.axes
    np.testing.assert_allclose(accuracy.lines[0].get_xydata(), [(20, 50), (60, 50), (100, 50)])
    np.testing.assert_allclose(gain.lines[-1].get_xydata(), [(20, 10), (60, 5), (100, 2)])


def test_recall_is_drawn_against_the_cost_scale():
    selections = {"a": {"strategy": "uot", "cost_scale": 1.0}, "b": {"strategy": "uot"}}
    rows = [*reuse.selected_rows(CUB, "a", [*BIRDS[:4], "x"]), *reuse.selected_rows(CUB, "b", [*BIRDS[:6], "x"])]
    results = {"transfer": reuse.reuse_rows(CUB), "selection": rows}
    figure = drawings(results, reuse.config(selections=selections))["reuse-recall"]
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xydata(), [(0.01, 75), (1, 50)])


def test_accuracy_and_similarity_are_drawn_by_rank():
    selections = {"top": {"strategy": "uot"}, "next": {"strategy": "uot", "first": 101}}
    ways = {("supervised", None): 0.0, ("joint", "top"): 0.02, ("joint", "next"): -0.01}
    rows = [*reuse.selected_rows(CUB, "top", CLASSES[:2]), *reuse.selected_rows(CUB, "next", CLASSES[2:4], first=101)]
    results = {"transfer": reuse.reuse_rows(CUB, ways), "selection": rows}
    found = drawings(results, reuse.config(selections=selections))
    accuracy, similarity = found["reuse-rank-cub200-joint"].axes
    np.testing.assert_allclose(accuracy.lines[-1].get_xydata(), [(1, 77), (101, 74)])
    heights = [patch.get_height() for patch in similarity.patches]
    means = [np.mean([row["similarity"] for row in rows[i : i + 2]]) for i in (0, 2)]
    np.testing.assert_allclose(heights, means)
    (vector,) = [figure for name, figure in found.items() if "similarity" in name]  # one of both selections
    assert len(vector.axes[0].patches) == 4


def test_similarity_figure_colours_and_names_related_classes():
    rows = reuse.selected_rows(CUB, "uot", CLASSES[:150])
    figure = reuse_figures.similarity(rows, set(BIRDS), CUB, "UOT")
    above, below = figure.axes
    colours = [patch.get_facecolor() for patch in above.patches]
    assert len(colours) == reuse_figures.MOST_BARS  # not all 150
    assert len(set(colours)) == 2 and sum(c == colours[0] for c in colours) == len(BIRDS)
    labels = [text.get_text() for text in below.get_yticklabels()]
    assert labels[0] == "jay" and len(labels) == reuse_figures.MOST_NAMES


def test_every_figure_of_the_section_has_a_file_and_a_caption(full, tmp_path):
    results, text = full
    workdir = write_workdir(tmp_path, results, reuse.config())
    again = page.write_report(workdir, written_by())
    assert again.read_text(encoding="utf-8") == text  # the same bytes for the same results
    names = {path.name for path in (tmp_path / "report" / "figures").glob("reuse*.svg")}
    assert names == {
        f"reuse_similarity_{target}_{how}.svg" for target in ("cub200", "caltech101") for how in ("uot", "greedy_ot")
    }
    assert text.count("similarity of the first source classes by") >= 2 * len(names)  # label and caption


def test_hostile_names_are_escaped(tmp_path):
    name, class_ = '<script>"x"</script>', "<b>&'\x07"
    results = {
        "selection": reuse.selected_rows(CUB, name, [class_, "b"]),
        "transfer": reuse.reuse_rows(CUB, {("supervised", None): 0, ("joint", name): 0.1, ("<i>", None): 0.2}),
        "overlap": [{**reuse.overlap_row(CUB, 1, 2), "source_class": class_}],
    }
    path = picture(tmp_path / "results", CHECKPOINT, CUB, name)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    text = write_page(tmp_path, results, reuse.config(selections={name: {"strategy": "uot"}}))
    elements = Elements(text)
    assert not {"script", "b", "i"} & {tag for tag, _ in elements.elements}
    assert name in elements.text and "<b>&'\N{REPLACEMENT CHARACTER}" in elements.text
    for tag, attributes in elements.elements:
        for attribute, value in attributes.items():
            if attribute in ("src", "href", "xlink:href"):
                assert value.startswith(("#", "data:image/")), tag


# --- settings tried


def test_grids_of_ways_are_kept_apart_and_edges_named(tmp_path):
    rows = reuse.reuse_rows(CUB, {("supervised", None): 0.0, ("joint", "uot"): 0.03})
    tried = [
        {**row, "split": "validation", "learning_rate": rate, "source_weight": weight}
        for row in rows
        if row["seed"] == 0
        for rate in (0.001, 0.003, 0.01)
        for weight in ((0.1, 0.3) if row["selection"] else (None,))
    ]
    results = {"targets": [reuse.target_row(CUB)], "transfer": [*tried, *rows], "selection": []}
    plain, joint = grid.grid_rows(results["transfer"])
    assert (plain["Method"], joint["Method"]) == ("FT", "Joint, uot")
    assert plain["Settings tried"] == "learning rate 0.001, 0.003, 0.01; weight decay 0.0001 (3 settings)"
    assert "source weight 0.1, 0.3 (6 settings)" in joint["Settings tried"]
    assert joint["Chosen"] == f"learning rate 0.003, source weight 0.3: {CHECKPOINT}"
    (text,) = grid.grid_sentences(results["transfer"])
    assert text == (
        f"cub200, Joint, uot: the chosen source weight is the largest of the grid for {CHECKPOINT}; a wider grid might "
        "do better."
    )
    words = Elements(write_page(tmp_path, results)).text
    assert text in words


def test_figures_without_a_value_are_left_out():
    selections = {f"uot_{n}": {"strategy": "uot", "num_selected": n} for n in (50, 100)}
    rows = reuse.reuse_rows(CUB, {("supervised", None): 0.0, ("joint", "uot_50"): 0.1})  # one value is no line
    assert drawings({"transfer": rows, "selection": []}, reuse.config(selections=selections)) == {}


def test_a_target_on_which_every_way_failed_has_no_sentence():
    failed = [{**row, "accuracy": None, "error": "diverged"} for row in reuse.reuse_rows(CUB)]
    assert 'class="answer"' not in html_of({"transfer": failed})


def test_a_selection_without_a_strategy_has_the_usual_one():
    results = reuse.make_reuse_results()
    config = reuse.config(selections={**SELECTIONS, "uot": {"num_selected": 100}})
    assert words_of(results, config) == words_of(results, reuse.config())


def test_a_gain_that_few_test_images_cannot_show_is_qualified():
    plain, better = Point(0.16, 0.15, 0.17, 2), Point(0.21, 0.20, 0.22, 2)
    points = {PLAIN_WAY: plain, Way("joint", "uot"): better}
    few = sentence(points, "accuracy", num_test=40).replace("\N{NO-BREAK SPACE}", " ")
    assert "The spread over seeds is 2.00 points, but with 40 test images, a difference of up to 16.98 points" in few
    assert "due to chance" not in sentence(points, "accuracy", num_test=4000)


def test_ties_are_named_together():
    ways = [Way("joint", "uot"), Way("cotuning", None), Way("joint", "random")]
    points = {PLAIN_WAY: Point(0.1, 0.1, 0.1, 1), **{way: Point(0.2, 0.2, 0.2, 1) for way in ways}}
    assert "and 2 other ways of reusing source data are equal, with" in sentence(points, "accuracy")
    points[ways[2]] = Point(0.15, 0.15, 0.15, 1)
    assert "and 1 other way of reusing source data are the 2 best of 3, with" in sentence(points, "accuracy")
