"""Grids of settings: points are no results; the page says what was tried, chosen, at the edge and diverged."""

import pytest

from helpers.reports import CONFIG, TARGETS, Elements, grid_points, make_given_results, make_results, write_workdir
from jax_transfer.report import best, comparison, figures, grid, page, score_figures, spectral, trust

KINDS = {"own": make_results, "given": make_given_results}


def with_grid(results, split="validation", chosen=(0.001, 0.0), **settings):
    """Adds a grid to results whose fine-tuned models all have the chosen settings."""
    rate, decay = chosen
    tuned = {"learning_rate": rate, "weight_decay": decay}
    transfer = [row | (tuned if row["method"] == "finetune" else {}) for row in results["transfer"]]
    return {**results, "transfer": [*grid_points(results, split, **settings), *transfer]}


def text_of(results, folder):
    return Elements(page.write_report(write_workdir(folder, results, CONFIG)).read_text(encoding="utf-8")).text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["validation", "test_grid"])
def test_grid_points_change_no_result(kind, split):
    results = KINDS[kind]()
    gridded = with_grid(results, split)

    def drawn(results):
        target = TARGETS[0]
        figure = score_figures.score_against_accuracy(
            results["scores"], results["transfer"], target, "logme", "finetune", results["ranking"]
        )
        yield sorted(map(tuple, (offset for dots in figure.axes[0].collections for offset in dots.get_offsets())))
        if kind == "own":
            curves = figures.transfer_curves([], results["transfer"], target)
            yield [list(line.get_ydata()) for axes in curves.axes for line in axes.lines]

    assert list(drawn(gridded)) == list(drawn(results))
    for summarise in (best.best_checkpoints, comparison.comparisons):
        before, after = (summarise(found["transfer"]) for found in (results, gridded))
        if summarise is best.best_checkpoints:
            before, after = (
                [{k: v for k, v in row.items() if k != "swept"} for row in found] for found in (before, after)
            )
        else:
            before, after = ([row.candidates for row in found] for found in (before, after))
        assert before == after
    words = [text.replace(f" ({grid.SWEPT})", "") for _, text in spectral.story(gridded)]
    assert words == [text for _, text in spectral.story(results)]


def test_page_says_what_was_tried_and_chosen(tmp_path):
    results = with_grid(make_given_results(TARGETS[:1]))
    (row,) = grid.grid_rows(results["transfer"])
    assert row["Settings tried"] == "learning rate 0.001, 0.01; weight decay 0, 0.0001 (4 settings)"
    assert row["Chosen"] == "learning rate 0.001, weight decay 0: 4 checkpoints"
    assert (row["Chosen on"], row["Diverged"]) == ("validation images", "1 of 16")
    text = text_of(results, tmp_path)
    assert "Settings tried" in text and row["Chosen"] in text
    assert "What failed" not in text  # a diverged grid point is counted, and not tried again
    assert grid.SWEPT not in text


@pytest.mark.parametrize("split", ["validation", "test_grid"])
def test_page_says_which_seeds_choose_and_what_a_mean_over_seeds_is(split, tmp_path):
    text = text_of(with_grid(make_given_results(TARGETS[:1]), split), tmp_path)
    section = text[text.index("Settings tried") : text.index("All results")]
    assert "Fine-tuning chooses its setting with the first seed, by accuracy" in section
    assert "A probe chooses a setting for each seed" in section
    assert (f"the {grid.SWEPT} is the mean of the chosen settings" in section) == (split == "test_grid")


def test_few_checkpoints_are_named_by_setting():
    results = make_given_results(TARGETS[:1])
    rows = with_grid(results)["transfer"]
    rows = [row | {"learning_rate": 0.0099999998} if row["checkpoint"] == "mobilenet_v2" else row for row in rows]
    assert grid.grid_rows(rows)[0]["Chosen"].startswith("learning rate 0.001, weight decay 0: random resnet18, run1")
    assert "learning rate 0.01, weight decay 0: mobilenet_v2" in grid.grid_rows(rows)[0]["Chosen"]


@pytest.mark.parametrize(
    ("chosen", "settings", "edges"),
    [
        ((0.001, 0.0), {"rates": (0.001, 0.01, 0.1), "decays": (0.0,)}, ["learning rate is the smallest"]),
        ((0.1, 0.0), {"rates": (0.001, 0.01, 0.1), "decays": (0.0, 1e-4)}, ["learning rate is the largest"]),
        ((0.01, 1e-4), {"rates": (0.001, 0.01, 0.1), "decays": (0.0, 1e-4)}, ["weight decay is the largest"]),
        ((0.01, 0.0), {"rates": (0.001, 0.01, 0.1), "decays": (0.0, 1e-4)}, []),  # nothing is below 0
        ((0.01, 1e-4), {"rates": (0.01,), "decays": (1e-4,)}, []),
    ],
)
def test_choice_at_the_edge_of_the_grid_is_named(chosen, settings, edges):
    results = with_grid(make_given_results(TARGETS[:1]), chosen=chosen, **settings)
    sentences = list(grid.grid_sentences(results["transfer"]))
    assert len(sentences) == len(edges)
    for sentence, edge in zip(sentences, edges, strict=True):
        assert edge in sentence and sentence.endswith("a wider grid might do better.")


def test_best_of_a_sweep_on_test_is_called_that_everywhere(tmp_path):
    results = with_grid(make_given_results(), "test_grid")
    swept = grid.swept(results["transfer"])
    assert swept == {(target, "finetune") for target in TARGETS}
    note = trust.trust_note(results["ranking"], results["scores"], "finetune", swept)
    assert note.startswith(f"Measured against the FT accuracy ({grid.SWEPT}) of 4 checkpoints")
    assert grid.SWEPT not in trust.trust_note(results["ranking"], [], "probe", swept)
    one = trust.trust_note(results["ranking"], [], "finetune", {(TARGETS[1], "finetune")})
    assert f"({grid.SWEPT} of birds) of 4 checkpoints" in one
    text = text_of(results, tmp_path)
    assert f"FT ({grid.SWEPT})" in text and f"FT: {grid.SWEPT}." in text
    assert f"% accuracy ({grid.SWEPT})" in text and note in text
    assert f"FT accuracy ({grid.SWEPT}) is highest for" in text
    summary = best.summary_rows(with_grid(make_results(), "test_grid")["transfer"])
    assert {row["Method"] for row in summary} == {"FE", "FE converged", f"FT ({grid.SWEPT})"}
