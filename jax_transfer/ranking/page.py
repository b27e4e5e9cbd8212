"""Writes the page of a ranking: the answer, a table, a figure, how far to trust the answer, and what was measured."""

import math
import pathlib
from collections.abc import Iterator

import matplotlib
from matplotlib.figure import Figure

from jax_transfer.ranking.result import EPISODES, STAR, Ranking, answer, named_classes, table_rows
from jax_transfer.report import tables
from jax_transfer.report.markup import escape, inline_svg, to_page
from jax_transfer.report.style import BLUE, GREY, STYLE, WIDTH, cut, to_svg
from jax_transfer.report.tables import EN_DASH


@matplotlib.rc_context(STYLE)
def figure(ranking: Ranking) -> Figure:
    """Draws the probe accuracy of each checkpoint with its 95 % interval, the best on top.

    >>> from jax_transfer.ranking.result import Ranked
    >>> ranking = Ranking("a", 9, 2, 0.5, [Ranked("b", "b.pth", accuracy=0.9, low=0.8, high=0.95)])
    >>> [label.get_text() for label in figure(ranking).axes[0].get_yticklabels()]
    ['b']
    """
    rows = ranking.evaluated[::-1]
    drawn = Figure(figsize=(WIDTH, 0.55 + 0.2 * len(rows)), layout="constrained")
    axes = drawn.subplots()
    for y, row in enumerate(rows):
        is_best_or_tied = any(row is other for other in (ranking.best, *ranking.tied))
        colour = BLUE if is_best_or_tied else GREY
        ends = [[100 * (row.accuracy - row.low)], [100 * (row.high - row.accuracy)]]
        axes.errorbar([100 * row.accuracy], [y], xerr=ends, fmt="o", color=colour, markersize=4, elinewidth=1.2)
    axes.set_yticks(range(len(rows)), [cut(row.checkpoint, 30) for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(axis="x", linewidth=0.4, alpha=0.5)
    axes.set_xlabel(
        "Probe mean class accuracy (%)" if ranking.metric == "mean_class_accuracy" else "Probe accuracy (%)"
    )
    return drawn


def write_page(ranking: Ranking, folder: pathlib.Path) -> pathlib.Path:
    """Writes `index.html`, `accuracy.svg` and `ranking.csv` into a folder, and returns the path of the page.

    >>> import tempfile
    >>> from jax_transfer.ranking.result import Ranked
    >>> ranking = Ranking("a", 9, 2, 0.5, [Ranked("b", "b.pth", accuracy=0.9, low=0.8, high=0.95)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_page(ranking, pathlib.Path(folder)).name
    'index.html'
    """
    svg = to_svg(figure(ranking))
    tables.write_text(folder / "accuracy.svg", svg)
    ranking.to_csv(folder / "ranking.csv")
    title = f"Which checkpoint to use for {tables.short_target(ranking.target)}"
    tables.write_text(folder / "index.html", to_page(title, list(_body(ranking, title, svg))))
    return folder / "index.html"


def _body(ranking: Ranking, title: str, svg: str) -> Iterator[str]:
    """Yields the elements of the page."""
    first, *others = answer(ranking)
    yield f"<h1>{escape(title)}</h1>"
    yield (
        f'<p class="quiet">{escape(ranking.target)}: {ranking.num_images:,} images of {ranking.num_classes} classes'
        f"{escape(named_classes(ranking.class_names))}, {len(ranking.rows)} checkpoints</p>"
    )
    yield f'<p class="answer">{escape(first)}</p>'
    yield f"<p>{escape(' '.join(others))}</p>"
    yield tables.to_html(table_rows(ranking))
    tuned = (
        "Fine-tuned: the same metric of the whole model after training, on the test images. " if ranking.tuning else ""
    )
    few = (
        "N-shot: the same metric of the nearest class mean by cosine, of N training images of a class, on the test "
        f"images; mean over {EPISODES} draws of these images, with half of its 95 % interval. "
        if ranking.best.few_shot
        else ""
    )
    metric = {"accuracy": "accuracy", "mean_class_accuracy": "mean of the classes' accuracies"}[ranking.metric]
    yield (
        f'<p class="quiet">Probe: {metric} of a softmax regression on the frozen features, with its 95 % interval. '
        "Each image is tested by a classifier trained on other images (five-fold cross-validation). Behind: percentage "
        "points below the best checkpoint, on the same images; ≈: the 95 % interval of this difference includes 0. "
        f"{tuned}{few}"
        f"{STAR}: ranked first by this score. Scores: higher is better; values are comparable only between "
        "checkpoints on one target.</p>"
    )
    caption = "Probe accuracy and its 95 % interval. Blue: the best checkpoint and those not significantly worse."
    yield f"<figure>{inline_svg(svg, 'a-', caption)}<figcaption>{escape(caption)}</figcaption></figure>"
    if ranking.scores or ranking.naive_lists:
        yield from _trust(ranking)
    failed = [{"Checkpoint": row.checkpoint, "Why": row.error} for row in ranking.rows if row.error]
    if failed:
        yield "<h2>What failed</h2>"
        yield tables.to_html(failed)
    yield "<h2>What was measured</h2>"
    if notes := [*ranking.notes, *(f"{row.checkpoint}: {note}" for row in ranking.evaluated for note in row.notes)]:
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
            for row in ranking.evaluated
            if row.preprocessing
        ]
    )


def _trust(ranking: Ranking) -> Iterator[str]:
    """Yields the section on how well the scores agree with the probe."""
    yield "<h2>How far to trust it</h2>"
    yield tables.to_html(
        [
            {
                "Score": tables.score_name(score),
                "Ranks first": first.checkpoint if (first := ranking.first_by(score)) else EN_DASH,
                "Kendall's tau with the probe": f"{tau:.2f}"
                if math.isfinite(tau := ranking.agreement(score))
                else EN_DASH,
                "Scored": f"{ranking.num_scored(score)} of {len(ranking.evaluated)}",
            }
            for score in [*ranking.scores, *ranking.naive_lists]
        ]
    )
    yield (
        '<p class="quiet">The probe accuracy is measured; the scores only predict it. If they agree, the order does '
        "not depend on the criterion. LEEP and NCE need a checkpoint with a classifier for its source classes. A score "
        "that any checkpoint lacks cannot rank them. The last rows, if they name parameters, work, accuracy on the "
        "source or epochs, are lists that need no images of the target: a score is worth what it adds to "
        "them.</p>"
    )
