"""Draws how well N-LEEP ranks checkpoints by its two settings, as in Figure 2 of "Ranking Neural Checkpoints"."""

import inspect
import statistics
from collections.abc import Iterator, Sequence

import matplotlib
import matplotlib.patches
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from jax_transfer.analysis import nleep, split_options
from jax_transfer.records import InputError
from jax_transfer.report import tables
from jax_transfer.report.figures import Drawing, Results
from jax_transfer.report.style import STYLE, WIDTH, cut
from jax_transfer.report.tables import counted, is_number
from jax_transfer.results import Row

SETTINGS = ("energy", "components_per_class")
DEFAULTS = {name: inspect.signature(nleep).parameters[name].default for name in SETTINGS}


def nleep_taus(ranking_rows: Sequence[Row], method: str) -> dict[tuple[float, float], float | None]:
    """Returns (PCA energy, components a class) -> Kendall's tau of N-LEEP, averaged over the targets.

    The mean is over the targets on which N-LEEP has a value with any settings. Settings that lack one of these have
    None, since a mean over other targets cannot be compared.

    Args:
      ranking_rows: rows of results/ranking.jsonl. Those of other scores, and of N-LEEP with other options, are ignored.
      method: the method whose accuracies N-LEEP predicts, such as "finetune".

    >>> rows = [{"target": target, "method": "probe", "score": score, "kendall": tau}
    ...         for target, score, tau in (("a", "nleep", 0.5), ("b", "nleep", 0.7), ("a", "nleep?energy=0.5", 0.4))]
    >>> nleep_taus(rows, "probe")
    {(0.8, 5): 0.6, (0.5, 5): None}
    """
    by_settings: dict[tuple[float, float], dict[str, float]] = {}
    for row in ranking_rows:
        if row["method"] == method and (settings := _settings(row["score"])):
            taus = by_settings.setdefault(settings, {})
            if is_number(row["kendall"]):
                taus[row["target"]] = row["kendall"]
    targets = {target for taus in by_settings.values() for target in taus}
    return {
        settings: statistics.fmean(taus.values()) if taus.keys() == targets and taus else None
        for settings, taus in by_settings.items()
    }


def _settings(score: str) -> tuple[float, float] | None:
    """Returns N-LEEP's energy and components a class in the name of a score; None for another score."""
    if score.partition("?")[0] != "nleep":
        return None
    _, options = split_options(score)
    energy, components = (DEFAULTS | options)[SETTINGS[0]], (DEFAULTS | options)[SETTINGS[1]]
    return (energy, components) if options.keys() <= DEFAULTS.keys() else None


@matplotlib.rc_context(STYLE)
def nleep_heat_map(ranking_rows: Sequence[Row], method: str) -> Figure:
    """Draws Kendall's tau of N-LEEP as a table of colours: a row for each PCA energy, a column for each number of
    Gaussian components a class.

    Follows Figure 2 of "Ranking Neural Checkpoints". Settings without a value have a dash.

    Args:
      ranking_rows, method: see `nleep_taus`.

    Raises:
      InputError: if fewer than two settings of N-LEEP have a value.

    >>> rows = [{"target": "a", "method": "probe", "score": score, "kendall": tau}
    ...         for score, tau in (("nleep", 0.5), ("nleep?energy=0.5&components_per_class=2", 0.4))]
    >>> [text.get_text() for text in nleep_heat_map(rows, "probe").axes[0].texts]
    ['0.40', '–', '–', '0.50']
    """
    taus = nleep_taus(ranking_rows, method)
    known = [tau for tau in taus.values() if tau is not None]
    if len(known) < 2:
        raise InputError(
            f"results/ranking.jsonl has {counted(len(known), 'setting')} of N-LEEP with a value for {method!r}: "
            "expected at least two, such as 'nleep' and 'nleep?energy=0.5' in config.scores."
        )
    energies, components = (sorted({settings[i] for settings in taus}) for i in (0, 1))
    cells = [[taus.get((energy, number)) for number in components] for energy in energies]
    figure = Figure(figsize=(WIDTH, 0.9 + 0.24 * len(energies)), layout="constrained")
    axes = figure.subplots()
    norm, colors = Normalize(min(known), max(known)), matplotlib.colormaps["cividis"]
    for y, line in enumerate(cells):
        for x, tau in enumerate(line):
            face = "#EEEEEE" if tau is None else colors(norm(tau))
            axes.add_patch(matplotlib.patches.Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=face, edgecolor="white"))
            is_dark = tau is not None and norm(tau) < 0.5
            text = tables.EN_DASH if tau is None else f"{tau:.2f}"
            axes.text(x, y, text, ha="center", va="center", color="white" if is_dark else "black")
    axes.set(xlim=(-0.5, len(components) - 0.5), ylim=(len(energies) - 0.5, -0.5))
    axes.set_xticks(range(len(components)), [f"{number:g}" for number in components])
    axes.set_yticks(range(len(energies)), [f"{100 * energy:.4g}" for energy in energies])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("Gaussian components a class")
    axes.set_ylabel("PCA energy (%)")
    figure.suptitle(f"Kendall's τ of N-LEEP, {cut(tables.method_name(method), 14)}")
    return figure


def draw_heat_maps(results: Results) -> Iterator[Drawing]:
    """Yields a heat map for each method for which at least two settings of N-LEEP have a value.

    >>> list(draw_heat_maps({"ranking": []}))
    []
    """
    rows = results["ranking"]
    for method in dict.fromkeys(row["method"] for row in rows):
        taus = nleep_taus(rows, method)
        if sum(tau is not None for tau in taus.values()) < 2:
            continue
        targets = {
            r["target"] for r in rows if r["method"] == method and _settings(r["score"]) and is_number(r["kendall"])
        }
        caption = (
            f"Kendall's τ of N-LEEP with {tables.method_name(method)} accuracies, averaged over "
            f"{counted(len(targets), 'target')}, by the PCA energy and the number of Gaussian components a class. The "
            f"score N-LEEP itself has {100 * DEFAULTS['energy']:g} % and {DEFAULTS['components_per_class']}."
        )
        yield Drawing("", f"nleep-settings-{method}", caption, nleep_heat_map(rows, method))
