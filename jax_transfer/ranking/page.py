"""The page of a ranking: the answer, the table, a figure, how far to trust it, and what was measured."""

import math
import pathlib
from collections.abc import Iterator

import matplotlib
from matplotlib.figure import Figure

from jax_transfer.ranking.result import STAR, Ranking, answer, named_classes, table_rows
from jax_transfer.report import tables
from jax_transfer.report.markup import escape, inline_svg, to_page
from jax_transfer.report.style import BLUE, GREY, STYLE, WIDTH, cut, to_svg
from jax_transfer.report.tables import EN_DASH


@matplotlib.rc_context(STYLE)
def figure(ranking: Ranking) -> Figure:
    """The probe accuracy of each checkpoint with its 95 % interval, the best on top."""
    rows = ranking.sound[::-1]
    drawn = Figure(figsize=(WIDTH, 0.55 + 0.2 * len(rows)), layout="constrained")
    axes = drawn.subplots()
    for place, row in enumerate(rows):
        alike = any(row is other for other in (ranking.best, *ranking.tied))
        colour = BLUE if alike else GREY
        ends = [[100 * (row.accuracy - row.low)], [100 * (row.high - row.accuracy)]]
        axes.errorbar([100 * row.accuracy], [place], xerr=ends, fmt="o", color=colour, markersize=4, elinewidth=1.2)
    axes.set_yticks(range(len(rows)), [cut(row.checkpoint, 30) for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(axis="x", linewidth=0.4, alpha=0.5)
    axes.set_xlabel(
        "Probe mean class accuracy (%)" if ranking.metric == "mean_class_accuracy" else "Probe accuracy (%)"
    )
    return drawn


def write_page(ranking: Ranking, folder: pathlib.Path) -> pathlib.Path:
    """Writes `index.html`, `accuracy.svg` and `ranking.csv` into a folder; returns the path of the page."""
    svg = to_svg(figure(ranking))
    tables.write_text(folder / "accuracy.svg", svg)
    ranking.to_csv(folder / "ranking.csv")
    title = f"Which checkpoint to take for {tables.short_target(ranking.target)}"
    tables.write_text(folder / "index.html", to_page(title, list(_body(ranking, title, svg))))
    return folder / "index.html"


def _body(ranking: Ranking, title: str, svg: str) -> Iterator[str]:
    first, *others = answer(ranking)
    yield f"<h1>{escape(title)}</h1>"
    yield (
        f'<p class="quiet">{escape(ranking.target)}: {ranking.num_images:,} images of {ranking.num_classes} classes'
        f"{escape(named_classes(ranking.class_names))}, {len(ranking.rows)} checkpoints</p>"
    )
    yield f'<p class="answer">{escape(first)}</p>'
    yield f"<p>{escape(' '.join(others))}</p>"
    yield tables.to_html(table_rows(ranking))
    metric = {"accuracy": "accuracy", "mean_class_accuracy": "mean of the classes' accuracies"}[ranking.metric]
    yield (
        f'<p class="quiet">Probe: {metric} of a softmax regression on the frozen features, each image tested by a classifier '
        "trained on four fifths of the others, with its 95 % interval. Behind: points less than the best, on the same "
        f"images; ≈: the 95 % interval of that difference reaches 0. {STAR}: first by this score. Scores: higher is better; "
        "their values compare checkpoints of one target and nothing else.</p>"
    )
    caption = (
        "Probe accuracy and its 95 % interval. Blue: the best one, and those that these images cannot tell from it."
    )
    yield f"<figure>{inline_svg(svg, 'a-', caption)}<figcaption>{escape(caption)}</figcaption></figure>"
    if ranking.scores:
        yield from _trust(ranking)
    failed = [{"Checkpoint": row.checkpoint, "Why": row.error} for row in ranking.rows if row.error]
    if failed:
        yield "<h2>What failed</h2>"
        yield tables.to_html(failed)
    yield "<h2>What was measured</h2>"
    if notes := [*ranking.notes, *(f"{row.checkpoint}: {note}" for row in ranking.sound for note in row.notes)]:
        yield f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>"
    yield tables.to_html(
        [
            {
                "Checkpoint": row.path,
                "Model": row.model,
                "Parameters": f"{row.num_parameters:,}",
                "Preprocessing": "a guess" if row.preprocessing_is_guess else "known",
                "Image size": row.preprocessing.image_size,
                "Crop fraction": f"{row.preprocessing.crop_fraction:g}",
                "Mean": " ".join(f"{value:.3f}" for value in row.preprocessing.mean),
                "Std": " ".join(f"{value:.3f}" for value in row.preprocessing.std),
                "Interpolation": row.preprocessing.interpolation,
                "Seconds": f"{row.seconds:.1f}",
            }
            for row in ranking.sound
            if row.preprocessing
        ]
    )


def _trust(ranking: Ranking) -> Iterator[str]:
    yield "<h2>How far to trust it</h2>"
    yield tables.to_html(
        [
            {
                "Score": tables.score_name(score),
                "Puts first": first.checkpoint if (first := ranking.first_by(score)) else EN_DASH,
                "Kendall's tau with the probe": f"{tau:.2f}"
                if math.isfinite(tau := ranking.agreement(score))
                else EN_DASH,
                "Scored": f"{ranking.num_scored(score)} of {len(ranking.sound)}",
            }
            for score in ranking.scores
        ]
    )
    yield (
        '<p class="quiet">The probe is measured, the scores are predictions of it: where they agree, the order does not '
        "depend on the criterion. LEEP and NCE need the classes that a checkpoint was trained on. A score that a checkpoint "
        "lacks puts none first.</p>"
    )
