"""The heat map of N-LEEP's settings, and scores with options on the page and in the configs that draw it."""

import itertools

import numpy as np
import pytest

from helpers.reports import TARGETS, make_results, write_workdir
from helpers.source_files import config_file
from jax_transfer.analysis import score_named
from jax_transfer.records import InputError
from jax_transfer.report import page, tables
from jax_transfer.report.nleep_figure import nleep_heat_map, nleep_taus

ENERGIES, COMPONENTS = (0.5, 0.8, 0.95), (1, 5)
TAUS = dict(zip(itertools.product("abc", ENERGIES, COMPONENTS), np.linspace(-0.4, 0.9, 18).tolist(), strict=True))
OTHERS = ("logme", "nleep?seed=1", "nleep?energy=0.5&max_dimension=8")


def name(energy, components):
    return "nleep" if (energy, components) == (0.8, 5) else f"nleep?energy={energy}&components_per_class={components}"


def rows(taus=TAUS, method="finetune"):
    """Returns ranking rows of these values: (target, energy, components) -> tau; and of other scores."""
    found = [{"target": t, "method": method, "score": name(e, m), "kendall": tau} for (t, e, m), tau in taus.items()]
    return found + [{"target": "a", "method": method, "score": score, "kendall": 1.0} for score in OTHERS]


def texts(figure):
    """Returns the cells line by line."""
    return [text.get_text() for text in figure.axes[0].texts]


def test_values_are_means_over_targets():
    expected = {(e, m): np.mean([TAUS[t, e, m] for t in "abc"]) for e in ENERGIES for m in COMPONENTS}
    assert nleep_taus(rows(), "finetune") == pytest.approx(expected)
    assert nleep_taus(rows(), "probe") == {} and nleep_taus(rows() + rows(method="probe"), "probe") == expected


@pytest.mark.parametrize("missing", [None, float("nan"), "no row"])
def test_settings_that_lack_a_target_have_no_value(missing):
    taus = TAUS | {("b", 0.95, 1): missing}
    if missing == "no row":
        del taus["b", 0.95, 1]
    found = nleep_taus(rows(taus), "finetune")
    assert found.pop((0.95, 1)) is None and None not in found.values()
    assert texts(nleep_heat_map(rows(taus), "finetune"))[4] == tables.EN_DASH


def test_cells_have_a_row_for_each_energy_and_a_column_for_each_number_of_components():
    axes = (figure := nleep_heat_map(list(reversed(rows())), "finetune")).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["50", "80", "95"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "5"]
    means = [np.mean([TAUS[t, e, m] for t in "abc"]) for e in ENERGIES for m in COMPONENTS]
    assert texts(figure) == [f"{mean:.2f}" for mean in means]
    lightness = [np.dot(patch.get_facecolor()[:3], (0.3, 0.6, 0.1)) for patch in axes.patches]
    assert np.argsort(lightness).tolist() == np.argsort(means).tolist()


def test_one_setting_draws_nothing():
    one = {key: tau for key, tau in TAUS.items() if key[1:] == (0.8, 5)}
    with pytest.raises(InputError, match="has 1 setting of N-LEEP with a value for 'finetune': expected at least two"):
        nleep_heat_map(rows(one), "finetune")


@pytest.mark.parametrize("settings", [1, 2])
def test_page_shows_the_map_and_no_other_figure_of_scores_with_options(tmp_path, settings):
    results = make_results(TARGETS[:1], epochs=(0, 1), seeds=(0,))
    results = {file: results[file] for file in ("transfer", "scores", "ranking")}
    variants = ("nleep", "nleep?energy=0.5&components_per_class=2")[:settings]
    for file in ("scores", "ranking"):
        own = [row for row in results[file] if row["score"] == "logme"]
        results[file] += [{**row, "score": score} for row in own for score in variants]
    write_workdir(tmp_path, results)
    page.write_report(tmp_path)
    text = (tmp_path / "report/index.html").read_text()
    drawn = {path.stem for path in (tmp_path / "report/figures").glob("*.svg")}
    maps = {stem for stem in drawn if stem.startswith("nleep_settings")}
    assert len(maps) == (3 if settings == 2 else 0)  # one for each method
    assert ("Settings of N-LEEP" in text) == (settings == 2)
    assert not any("energy" in stem for stem in drawn) and any("nleep_finetune" in stem for stem in drawn)
    assert ("N-LEEP, energy 0.5, components 2" in text) == (settings == 2)


def test_names_of_scores_with_options():
    assert tables.score_name("knn?k=5") == "k-NN, k 5"
    assert tables.score_name("linear_1?learning_rate=0.1&seed=3") == "Linear (1 epoch), rate 0.1, seed 3"
    assert tables.score_name("nleep?energy") == "nleep?energy" and tables.score_name("mine?k=5") == "mine?k=5"


@pytest.mark.parametrize("group", [1, 2])
def test_configs_have_the_settings_of_the_figure_in_the_paper(group):
    scores = config_file(f"neucrab_group{group}").get_config().scores
    found = nleep_taus(
        [{"target": "a", "method": "probe", "score": score, "kendall": 0.5} for score in scores], "probe"
    )
    assert found.keys() == set(itertools.product((0.5, 0.6, 0.7, 0.8, 0.9, 0.95), (1, 2, 5, 10)))
    assert all(score_named(score) for score in scores if "?" in score)
