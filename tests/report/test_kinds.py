"""Kinds of checkpoints, and the figure of their accuracies by kind."""

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex

from helpers.reports import TARGETS, make_both_results, make_given_results, make_results, write_workdir
from jax_transfer.records import InputError
from jax_transfer.report import kinds, page
from jax_transfer.report.kind_figure import COLOURS, MOST, accuracies_by_kind, colours
from jax_transfer.report.kinds import FROM_SCRATCH, GIVEN, KINDS, Origin, groups, origins
from jax_transfer.report.score_figures import score_against_accuracy
from jax_transfer.training.objectives import OBJECTIVES

HEADING = "Transfer by kind of checkpoint"
SUPERVISED, VAE = Origin("supervised", "imagenet2012", "resnet"), Origin("generative", "imagenet2012", "resnet")
SCRATCH, FILE = Origin(FROM_SCRATCH, "", "resnet"), Origin(GIVEN, "", "vit")


def study(checkpoints, accuracies, seeds=(0.0,), target="a"):
    """Returns results of checkpoints: name -> (objective, source, model), or None if it was given."""
    transfer = [
        {
            "checkpoint": name,
            "epoch": made and 9,
            "target": target,
            "method": "finetune",
            "seed": seed,
            "accuracy": accuracy + offset,
        }
        for (name, made), accuracy in zip(checkpoints.items(), accuracies, strict=True)
        for seed, offset in enumerate(seeds)
        if accuracy is not None
    ]
    columns = ("objective", "source", "model")
    pretrain = [
        {"checkpoint": n, **dict(zip(columns, made, strict=True))}
        for n, made in checkpoints.items()
        if made is not None
    ]
    return {"transfer": transfer, "pretrain": pretrain}


GROUP_1 = {
    "vae/9": ("vae", "tfds:imagenet2012", "resnet50"),
    "supervised/9": ("supervised", "tfds:imagenet2012?train=64", "resnet50"),
    "random resnet50": None,
    "places/9": ("supervised", "tfds:places365", "resnet50"),
    "rotation/9": ("rotation", "tfds:imagenet2012", "resnet50"),
}


def test_every_objective_has_a_kind_and_every_kind_of_the_paper_a_colour():
    assert KINDS.keys() == OBJECTIVES.keys()
    assert COLOURS.keys() >= set(KINDS.values()) - {kinds.SUPERVISED, "image-text"}
    assert len(set(COLOURS.values())) == len(COLOURS)


def test_origins_come_from_the_rows_of_pre_training_and_of_given_checkpoints():
    results = study(
        {**GROUP_1, "mine/9": ("mine", "folder:/my/birds", "vit_tiny"), "net": None, "old": None}, [0.5] * 8
    )
    described = {"random resnet50": "random resnet50", "net": "/runs/random net.safetensors"}
    results["checkpoints"] = [{"checkpoint": n, "path": p, "model": "inception_v1"} for n, p in described.items()]
    found = origins(results)
    assert found["supervised/9"] == SUPERVISED and found["vae/9"] == VAE
    assert found["random resnet50"] == (FROM_SCRATCH, "", "inception") and found["net"] == (GIVEN, "", "inception")
    assert found["mine/9"] == ("mine", "birds", "vit_tiny") and found["old"] == (GIVEN, "", "old")
    assert origins({"transfer": results["transfer"]})["vae/9"].kind == kinds.UNKNOWN


@pytest.mark.parametrize(
    ("known", "labels"),
    [
        ((SUPERVISED, VAE, SCRATCH, FILE), ("supervised", "generative", FROM_SCRATCH, GIVEN)),
        (
            (SUPERVISED, SUPERVISED._replace(source="places365"), VAE, VAE._replace(source="svhn")),
            ("supervised on imagenet2012", "supervised on places365", "generative", "generative"),
        ),
        ((VAE, VAE._replace(source="svhn", family="vit"), SCRATCH), ("on imagenet2012", "on svhn", FROM_SCRATCH)),
        ((VAE, VAE._replace(family="vit"), SCRATCH, FILE), ("resnet", "vit", FROM_SCRATCH, GIVEN)),
        ((FILE, FILE._replace(family="resnet"), SCRATCH), ("vit", "resnet", FROM_SCRATCH)),
    ],
)
def test_groups_are_kinds_else_sources_else_families(known, labels):
    assert tuple(groups(dict(enumerate(known))).values()) == labels


def test_colours_differ_and_are_those_of_the_paper():
    found = colours(
        ["supervised on a", "generative", "supervised on b", "supervised on c", FROM_SCRATCH, "semi-supervised"]
    )
    assert len(set(found.values())) == 6 and found[FROM_SCRATCH] == "black"
    assert found["generative"] == COLOURS["generative"] and found["semi-supervised"] == COLOURS["semi-supervised"]
    assert len(set(colours(["on a", "on b", "on c", "on d", "on e"]).values())) == 5


def test_bars_are_accuracies_minus_their_mean_in_the_order_of_the_groups():
    accuracies = np.array([0.5, 0.9, 0.4, 0.8, 0.7])
    results = study(GROUP_1, accuracies, seeds=(-0.02, 0.02))
    axes = (figure := accuracies_by_kind(results, ["a"], "finetune")).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        "vae",
        "supervised",
        "places",
        "rotation",
        "random resnet50",
    ]
    order = [0, 1, 3, 4, 2]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(100 * (accuracies - accuracies.mean())[order])
    spans = np.array([line.get_segments()[0][:, 0] for line in axes.collections])
    expected = 100 * (accuracies - accuracies.mean())[order][:, None] + [-2, 2]
    np.testing.assert_allclose(spans, expected)
    legend = {text.get_text(): to_hex(patch.get_facecolor()) for patch, text in _legend(figure)}
    assert list(legend)[-1] == FROM_SCRATCH and legend["generative"] == to_hex(axes.patches[0].get_facecolor())
    assert legend["supervised on places365"] == to_hex(axes.patches[2].get_facecolor())


def _legend(figure):
    (legend,) = figure.legends
    return zip(legend.get_patches(), legend.get_texts(), strict=True)


def test_a_checkpoint_without_an_accuracy_on_a_target_has_no_bar_there():
    results = study(GROUP_1, [0.5, 0.9, 0.4, 0.8, 0.7])
    results["transfer"] += study(GROUP_1, [0.5, None, 0.4, 0.8, 0.7], target="b")["transfer"]
    first, second = accuracies_by_kind(results, ["a", "b"], "finetune").axes
    assert (len(first.patches), len(second.patches)) == (5, 4)
    mean = np.mean([0.5, 0.4, 0.8, 0.7])
    assert second.patches[1].get_width() == pytest.approx(100 * (0.8 - mean)) and second.patches[1].get_y() > 1.5
    with pytest.raises(InputError, match="no 'finetune' accuracy for target 'c'; run stage finetune"):
        accuracies_by_kind(results, ["c"], "finetune")


def names_of(runs):
    axes = accuracies_by_kind(study(runs, np.linspace(0, 1, len(runs))), ["a"], "finetune").axes[0]
    return [text.get_text() for text in axes.get_yticklabels()]


def test_long_names_lose_what_they_share_and_what_their_colour_shows():
    runs = {
        f"neucrab_group{group}/{source}/{step}": ("supervised", f"tfds:{source}?train=9", "vit")
        for source in ("imagenet2012", "inaturalist2018")
        for group in (1, 2)
        for step in (90_000, 300_000)
    }
    expected = [f"…group{group}/{step}" for group in (1, 2) for step in (90_000, 300_000)]
    assert names_of(runs) == expected * 2  # once in each colour
    others = {"neucrab_group1/imagenet2012/vae/7": ("vae", "tfds:imagenet2012", "vit"), "neucrab_group3/net": None}
    assert names_of({**runs, **others}) == [*expected * 2, "…group1/imagenet2012/vae", "neucrab_group3/net"]


def test_short_names_stay_and_names_of_a_group_are_distinct():
    runs = {f"{source}/{step}": ("supervised", f"tfds:{source}", "vit") for source in "ab" for step in (9, 18)}
    assert names_of(runs) == ["a/9", "a/18", "b/9", "b/18"]
    long = {f"{'very_long_' * 5}{i}{'_name' * 5}/9": ("vae", "tfds:b", "vit") for i in range(3)}
    names = names_of({**runs, **long})
    assert len(set(names)) == 7 and all(len(name) <= 28 for name in names)


@pytest.mark.parametrize(
    ("results", "shown"),
    [
        (make_results(TARGETS[:1], seeds=(0,)), False),  # a single trajectory
        (make_both_results(TARGETS[:1], seeds=(0,)), True),
        (make_given_results(seeds=(0,)), True),
        (make_given_results(names=("a", "b"), seeds=(0,)), False),
        (study({f"{i}/9": ("vae", "tfds:b", "vit") for i in range(MOST + 1)}, np.linspace(0, 1, MOST + 1)), False),
    ],
)
def test_page_shows_the_figure_if_there_are_several_pre_trainings(tmp_path, results, shown):
    results = {name: rows for name, rows in results.items() if name in ("transfer", "pretrain")}
    if not results["transfer"][0].get("num_test"):
        results = {"transfer": results["transfer"], "pretrain": []}
    text = "".join(part for part in _section(results, tmp_path))
    assert ("minus the mean over" in text) == shown and bool(text) == shown
    assert len(list(tmp_path.glob("figures/kinds*.svg"))) == shown


def _section(results, tmp_path):
    """Returns the section of the page."""
    (tmp_path / "figures").mkdir()
    data = page.Page({}, results, results, {}, tmp_path, tmp_path / "figures")
    return page.SECTIONS[HEADING](data)


def test_many_targets_are_divided_over_figures(tmp_path):
    results = make_given_results([f"tfds:target_{i}" for i in range(5)], seeds=(0,))
    page.write_report(write_workdir(tmp_path, {"transfer": results["transfer"]}))
    assert len(list((tmp_path / "report/figures").glob("kinds*.svg"))) == 2
    assert HEADING in (tmp_path / "report/index.html").read_text()


@pytest.mark.parametrize("number", [3, 12])
def test_scores_of_many_pre_trainings_have_no_legend_that_would_cover_the_dots(number):
    runs = {f"run_{i}/9": ("vae", "tfds:b", "vit") for i in range(number)}
    rows = study(runs, np.linspace(0, 1, number))["transfer"]
    scores = [{**row, "score": "logme", "value": row["accuracy"]} for row in rows]
    axes = score_against_accuracy(scores, rows, "a", "logme", "finetune").axes[0]
    dots = [collection for collection in axes.collections if isinstance(collection, PathCollection)]
    assert sum(len(collection.get_offsets()) for collection in dots) == number
    assert (axes.get_legend() is not None) == (number == 3)
