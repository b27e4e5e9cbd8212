"""A paper's tables of how well scores rank, beside ours on the page."""

import re

import numpy as np
import pytest

from helpers.reports import CONFIG, TARGETS, Elements, make_results, write_workdir
from helpers.source_files import config_file
from jax_transfer.fields import to_json
from jax_transfer.records import InputError
from jax_transfer.report import page, tables
from jax_transfer.report.paper_tables import COLUMNS, paper_table_rows, sentences
from jax_transfer.report.trust import METRICS
from jax_transfer.study import checks
from jax_transfer.study.config import default_config, differences

TABLE = {
    "where": "Table 9",
    "method": "finetune",
    "targets": TARGETS,
    "num_checkpoints": 12,
    "columns": ("Rel@1", "Kendall", "GFLOPS"),
    "scores": {"nleep": (99.65, -0.31, 12.85), "logme": (64.67, 20.0, 4.28e6), "leep": (None,) * 3},
}
PAPER_COLUMNS = ("Recall@1", "Rel@1", "Recall@3", "Rel@3", "Pearson", "Kendall", "GFLOPS")


def test_cells_hold_the_papers_number_as_printed_then_the_mean_of_ours():
    results = make_results(seeds=(0,))
    taus = iter(np.linspace(0.1, 0.8, len(results["ranking"])))
    ranking = [{**row, "kendall": float(next(taus))} for row in results["ranking"]]
    nleep, logme, leep = paper_table_rows(TABLE, ranking, results["scores"])
    expected = np.mean([r["kendall"] for r in ranking if (r["method"], r["score"]) == ("finetune", "logme")])
    assert logme["Kendall"] == f"20.00 / {100 * expected:.2f}"
    assert logme["GFLOPS"] == "4.28e6 / 5.00e-3"  # 0.01 GFLOP in the rows, where a multiply-add is two operations
    assert list(nleep.values()) == ["N-LEEP", "99.65 / –", "-0.31 / –", "12.85 / –"]
    assert leep["Rel@1"] == f"– / {100 * ranking[0]['rel@1']:.2f}" and list(leep) == ["Score", *TABLE["columns"]]


@pytest.mark.parametrize(
    ("change", "words", "absent"),
    [
        ({}, "1 of the 2 scores of the paper have a number here; N-LEEP without.", "cannot be compared"),
        (
            {"targets": TARGETS[:1]},
            "means over mnist (100 per class), ours over mnist (100 per class) and birds",
            "ranks",
        ),
        ({"num_checkpoints": 16}, "The paper ranks 16 checkpoints, here it is 12.", "cannot be compared"),
        ({"method": "zero_shot"}, "No score is judged by Zero-shot accuracies here yet.", "of the 2 scores"),
    ],
)
def test_words_say_what_is_there_and_what_can_be_compared(change, words, absent):
    results = make_results(seeds=(0,))
    text = " ".join(sentences({**TABLE, **change}, results["ranking"], results["scores"]))
    assert words in text and absent not in text


def test_page_shows_the_table_with_and_without_results(tmp_path):
    config = default_config()
    config.paper_tables = (TABLE,)
    checks.check(config)
    written = {**CONFIG, "paper_tables": to_json(config)["paper_tables"]}
    results = make_results(seeds=(0,))
    for number, shown in enumerate((results, {"transfer": results["transfer"]})):
        path = page.write_report(write_workdir(tmp_path / str(number), shown, written))
        text = Elements(path.read_text(encoding="utf-8")).text
        assert "Comparison with the paper" in text and "Table 9: how well scores rank" in text
        assert (f"64.67 / {100 * results['ranking'][0]['rel@1']:.2f}" in text) == (number == 0)
        assert ("No score is judged by FT accuracies here yet." in text) == (number == 1)
    assert "Comparison" not in page.write_report(write_workdir(tmp_path / "2", results, CONFIG)).read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"scores": {"nleeep": (1.0, 2.0, 3.0)}},
            r"score \(a name in config\.paper_tables\[0\]\.scores\): 'nleeep'.*'nleep'",
        ),
        (
            {"scores": {"nleep": (1.0, 2.0)}},
            r"scores\['nleep'\] has 2 numbers for the 3 columns Rel@1, Kendall, GFLOPS",
        ),
        ({"scores": {"nleep": (1.0, "2", 3.0)}}, r"scores\['nleep'\]\[1\] = '2': must be of type float, not str"),
        ({"scores": {"nleep?energy=2": (1.0, 2.0, 3.0)}}, r"energy"),
        (
            {"columns": ("Rel@1", "Kendal", "GFLOPS")},
            r"column \(config\.paper_tables\[0\]\.columns\): 'Kendal'.*'Kendall'",
        ),
        ({"columns": ("Rel@1", "Rel@1", "GFLOPS")}, r"columns lists 'Rel@1' twice"),
        ({"method": "tuned"}, r"method \(config\.paper_tables\[0\]\.method\): 'tuned'"),
        ({"accuracy": 0.5}, r"field of config\.paper_tables\[0\]: 'accuracy'"),
        ({"num_checkpoints": 0}, r"num_checkpoints = 0: must lie in \[1, 100000\]"),
    ],
)
def test_a_wrong_table_is_refused_in_one_line(change, message):
    config = default_config()
    config.paper_tables = ({**TABLE, **change},)
    with pytest.raises(InputError, match=message) as refused:
        checks.check(config)
    assert "\n" not in str(refused.value)


def test_a_table_may_change_in_a_working_directory():
    old, new = to_json(default_config()), default_config()
    new.paper_tables = (TABLE,)
    assert differences(old, to_json(new)) == []
    assert COLUMNS.keys() >= set(PAPER_COLUMNS) and COLUMNS.keys() - {"GFLOPS"} == METRICS.keys()


@pytest.mark.parametrize(("group", "num_checkpoints"), [(1, 16), (2, 12), (3, 13)])
def test_groups_hold_the_numbers_in_their_heads(group, num_checkpoints):
    module = config_file(f"neucrab_group{group}")
    (table,) = module.get_config().paper_tables
    assert (table["where"], table["num_checkpoints"], table["columns"]) == (
        f"Table {group}",
        num_checkpoints,
        PAPER_COLUMNS,
    )
    lines = module.__doc__.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split() == list(PAPER_COLUMNS))
    for line, (score, numbers) in zip(lines[start + 1 :], table["scores"].items(), strict=False):
        name, cells = re.match(r"    (.+?)  +(.*)", line).groups()
        # The head has no Greek letters and two decimals of alpha.
        assert name.replace("alpha", "α =").replace("0.50", "0.5") == tables.score_name(score)
        printed = [None if cell == "-" else float(cell) for cell in cells.split()]
        assert printed == list(numbers)
    assert len(table["scores"]) == 11 and not lines[start + 12].strip()
    for variant in ("smoke", "reduced") if group != 2 else ("smoke",):
        assert not module.get_config(variant).paper_tables
