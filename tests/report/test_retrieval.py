"""The section on image-text retrieval: the choice by the smallest share, its cost, tables and the paper's numbers."""

import dataclasses

import pytest

from jax_transfer.report import retrieval
from jax_transfer.report.retrieval import choice, choice_sentence, paper_rows, section, summary_tables
from jax_transfer.results import RetrievalRow, to_json_dict

TARGET = "captions:/data/coco"
RSUM = {("50", 0.25): 1.1, ("70", 0.25): 1.3, ("90", 0.25): 1.2, ("50", 1.0): 1.15, ("70", 1.0): 1.3, ("90", 1.0): 1.4}


def make_rows(folds=(1,), **changes):
    """Returns rows of three epochs and two shares; the smaller one takes a tenth of the time of the other."""
    rows = []
    for (checkpoint, fraction), rsum in RSUM.items():
        for split in ("validation", "test"):
            for count in folds:
                row = RetrievalRow(
                    *(checkpoint, int(checkpoint), TARGET, fraction, split, count, 0),
                    *(rsum / 6,) * 6,
                    rsum=rsum + 0.01 * (split == "test") + count,
                    chance_rsum=0.02,
                    i2t_median_rank=3.0,
                    t2i_median_rank=4.0,
                    best_epoch=7,
                    num_train=int(1000 * fraction),
                    num_images=500,
                    num_captions=2500,
                    num_duplicates=25,
                    seconds=60.0 if fraction < 1 else 600.0,
                    gflops=100.0 * fraction,
                )
                rows.append(to_json_dict(dataclasses.replace(row, **changes)))
    return rows


def test_the_choice_follows_validation_and_its_cost_is_a_sum_over_all_checkpoints():
    rows = make_rows(folds=(1, 5))
    for row in rows:  # the test images of the small share would choose another one, and so would the other protocol
        if (row["fraction"], row["split"], row["checkpoint"]) == (0.25, "test", "50"):
            row["rsum"] = 5.9
        if (row["folds"], row["split"], row["checkpoint"]) == (5, "validation", "90"):
            row["rsum"] = 9.9
    found = choice(rows, TARGET, 1)
    assert (found.chosen, found.best, found.num_checkpoints) == ("70", "90", 3)
    assert found.regret == pytest.approx(0.1)
    assert (found.seconds, found.whole_seconds, found.gflops, found.whole_gflops) == (180, 1800, 75, 300)
    assert choice(rows, TARGET, 5).chosen == "90"
    text = choice_sentence(found)
    assert "validation would choose checkpoint 70 of 3; after training on 100 %, 90 is the best" in text
    assert "the rsum of 70 is 10.00 lower" in text and "3 min and 75 GFLOP with 25 %" in text
    assert "it is the best on the test images, too" in choice_sentence(dataclasses.replace(found, best="70"))


@pytest.mark.parametrize("missing", ["a share", "all but one checkpoint", "another data set"])
def test_nothing_is_chosen_without_a_comparison(missing):
    rows = make_rows()
    kept = {
        "a share": [row for row in rows if row["fraction"] == 1],
        "all but one checkpoint": [row for row in rows if row["checkpoint"] == "50"],
        "another data set": [{**row, "target": "x"} for row in rows],
    }
    assert choice(kept[missing], TARGET, 1) is None


def test_failed_and_unfinished_checkpoints_are_not_compared():
    rows = make_rows()
    failed = [row for row in rows if (row["checkpoint"], row["fraction"], row["split"]) == ("90", 1.0, "test")]
    failed[0].update(rsum=None, error="the loss is not finite at step 3")
    found = choice(rows, TARGET, 1)
    assert (found.best, found.num_checkpoints, found.seconds) == ("70", 2, 120)


def test_the_section_has_a_table_for_each_share_and_protocol_and_marks_the_best():
    rows = make_rows(folds=(1, 5))
    parts = list(section(rows, {"retrieval": {"folds": [5, 1]}}))
    html = "\n".join(part for part in parts if isinstance(part, str))
    titles = [
        f"<h3>{share} % of the training images ({count}), {images}</h3>"
        for share, count in ((100, "1,000"), (25, "250"))
        for images in ("all test images", "the mean of 5 folds of 500 images")
    ]
    assert all(title in html for title in titles)
    assert "<strong>241.00</strong>" in html and "<strong>641.00</strong>" in html and "240.00" not in html
    assert "500 test images with 2,500 captions, of which 25 (1.00" in html and "not written by people" not in html
    (drawings,) = [part for part in parts if not isinstance(part, str)]
    assert len(drawings) == 1 and "100 % of the images, best 641.00 at epoch 90" in str(
        [text.get_text() for text in drawings[0].figure.axes[0].get_legend().get_texts()]
    )


def test_a_run_that_was_killed_before_its_test_rows_has_a_page():
    rows = [row for row in make_rows() if row["split"] == "validation"]
    assert section(rows, {}) and all(part == [] for part in section(rows, {}) if not isinstance(part, str))


def test_captions_that_are_made_are_said_to_be_so():
    rows = make_rows(target="tfds:cifar10?captions=attributes")
    html = "\n".join(part for part in section(rows, {}) if isinstance(part, str))
    assert "not written by people, but made from the names of the classes, and the brightness, contrast" in html


def test_the_papers_numbers_are_printed_beside_ours():
    entry = {"where": "Table 3", "i2t": (9.28, 26.64, 28.82), "t2i": (3.84, 12.44, 19.8), "rsum": 110.82}
    quarter = {**entry, "epoch": 70, "fraction": 0.25, "note": "a misprint"}
    paper = [{**quarter, "split": "validation"}, {**entry, "epoch": 40, "fraction": 1.0}]
    first, second = paper_rows(make_rows(), TARGET, 1, paper)
    assert (first["rsum"], first["Sum of the recalls"], first["Our rsum"]) == ("110.82", "100.82", "230.00")
    assert paper_rows(make_rows(), TARGET, 1, [quarter])[0]["Our rsum"] == "231.00"  # of the test images
    assert (first["Note"], second["Our rsum"], second["Note"]) == ("a misprint", retrieval.EN_DASH, "")
    html = "\n".join(p for p in section(make_rows(), {"retrieval": {"paper": paper}}) if isinstance(p, str))
    assert "<h3>The paper's recalls, as printed</h3>" in html and "28.82" in html


def test_given_checkpoints_have_tables_and_no_figure():
    rows = make_rows(epoch=None)
    parts = list(section(rows, {}))
    assert [part for part in parts if not isinstance(part, str)] == [[]]
    (table,) = summary_tables(rows)
    assert table.row_count == 6
