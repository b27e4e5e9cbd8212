"""The work of each score as this project counts it, and as "Ranking Neural Checkpoints" counts it."""

import html
import math

import pytest
import rich.console

from helpers.reports import make_results, write_workdir
from helpers.source_files import config_file
from jax_transfer.report import page, trust

# Tables 1 and 2: F is in the caption; T is the work of the linear classifiers without training (50 per epoch).
FORWARD, TEST_FORWARD = 3.04e5, 4.95e4 - 50
PRINTED = {
    "linear_1": (50, 4.95e4),
    "linear_5": (250, 4.97e4),
    "linear_converged": (3850, 5.33e4),
    "finetune_1": (None, 6.51e5),
    "finetune_5": (None, 4.28e6),
    "mi_alpha_0.01": (1.62e5, 1.62e5),
    "mi_pca_alpha_0.5": (5.58e4, 5.58e4),
    "leep": (378.31, 378.31),
    "nleep": (12.95, 12.95),
}


def row(score, own, forward=FORWARD, test_forward=TEST_FORWARD):
    """Returns a row, which counts two operations per multiply-add; the paper's rule ignores the work of fine-tuning."""
    gflops = 1.0 if own is None else 2 * own
    return {"score": score, "gflops": gflops, "forward_gflops": 2 * forward, "test_forward_gflops": 2 * test_forward}


@pytest.mark.parametrize("score", PRINTED)
def test_rule_reproduces_the_paper_for_groups_1_and_2(score):
    own, printed = PRINTED[score]
    assert trust.paper_gigaflops(row(score, own)) == pytest.approx(printed, rel=0.01)


@pytest.mark.parametrize(("score", "printed"), [("finetune_1", 4.43e5), ("finetune_5", 2.91e6)])
def test_paper_used_another_forward_pass_for_group_3(score, printed):
    assert trust.paper_gigaflops(row(score, None, 2.73e5, 3.37e4)) / printed == pytest.approx(1.32, abs=0.02)
    assert trust.paper_gigaflops(row(score, None, 2.06e5, 3.37e4)) == pytest.approx(printed, rel=0.01)


@pytest.mark.parametrize("score", PRINTED)
@pytest.mark.parametrize("missing", ["gflops", "forward_gflops", "test_forward_gflops"])
def test_missing_gflops_give_nan(score, missing):
    needs = ["gflops"] if PRINTED[score][0] is not None else ["forward_gflops", "test_forward_gflops"]
    needs += ["test_forward_gflops"] if score.startswith("linear") else []
    for value in (None, math.nan):
        assert math.isnan(trust.paper_gigaflops({**row(score, 1.0), missing: value})) == (missing in needs)


@pytest.fixture(scope="module")
def results():
    """Returns the results of a study with the scores of the paper; forward passes cost 2 F and 2 T."""
    results = make_results()
    ranking, scores = results["ranking"][0], results["scores"][0]
    results["ranking"] = [{**ranking, "method": "finetune", "score": score} for score in PRINTED]
    results["scores"] = [{**scores, **row(score, own)} for score, (own, _) in PRINTED.items()]
    return results


def test_page_shows_both_gflops_columns_and_explains_them(results, tmp_path):
    rows = {row["Score"]: row for row in trust.trust_rows(results["ranking"], results["scores"], "finetune")}
    assert list(rows["LEEP"])[-2:] == ["GFLOPS", "GFLOPS as in the paper"]
    assert [rows["LEEP"][column] for column in list(rows["LEEP"])[-2:]] == ["7.57e2", "3.78e2"]
    assert rows["N-LEEP"]["GFLOPS as in the paper"] == "12.9"
    assert rows["Fine-tune (1 epoch)"]["GFLOPS as in the paper"] == "6.57e5"
    text = page.write_report(write_workdir(tmp_path, results)).read_text(encoding="utf-8")
    note = trust.trust_note(results["ranking"], results["scores"], "finetune")
    assert "GFLOPS as in the paper" in text and "6.57e5" in text and note in html.unescape(text)
    for expected in (
        "a multiply-add is two operations",
        "forward pass over the training images (6.08e+05)",
        "(3k - 1) F + T",
        "groups I and II",
        "group III does not fit",
    ):
        assert expected in note


def test_gflops_columns_fit_into_80_characters(results):
    wide = [{**row, "kendall_low": -1.0, "regret": 0.105} for row in results["ranking"]]
    console = rich.console.Console(width=80, file=None, record=True)
    with console.capture() as captured:
        console.print(trust.trust_table(wide, results["scores"], "finetune"))
    text = captured.get()
    assert "…" not in text and "as in" in text and "paper" in text
    for name, ours, paper in (("Fine-tune (5 epochs)", "1.0e0", "4.3e6"), ("LEEP", "7.6e2", "3.8e2")):
        (line,) = [line for line in text.splitlines() if line.strip().startswith(name)]
        assert line.split()[-2:] == [ours, paper] or line.split()[-2:] == ["1", paper]


@pytest.mark.parametrize(("config", "fit"), [("neucrab_group2", "within 1 %"), ("neucrab_group3", "do not fit")])
def test_config_docstrings_explain_the_counted_work(config, fit):
    head = config_file(config).__doc__
    for expected in ("a multiply-add as two", "(3k - 1) F + T", fit):
        assert expected in " ".join(head.split())
