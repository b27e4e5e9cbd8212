"""Shortened names: those that are shown together stay distinct, in the figures and in the terminal."""

import io

import pytest
import rich.console
from hypothesis import example, given
from hypothesis import strategies as st

from helpers.reports import TARGETS, make_given_results
from jax_transfer.report import figures_by_name, score_figures, spectral_figures
from jax_transfer.report.comparison import comparison_table, comparisons
from jax_transfer.report.style import cut, shorten, shorten_all

RANDOM = ("random resnet10?width=4&stem=cifar", "random resnet18?width=4&stem=cifar")
SWEEP = [f"{name}?width={width}&stem=cifar" for name in ("random resnet10", "random resnet18") for width in (4, 8)]


@given(st.lists(st.text("ab /?&=_-鸟…#1", max_size=40), unique=True), st.sampled_from((12, 14, 22)))
@example(SWEEP, 12)
@example([*RANDOM, *(name.replace("random", "trained") for name in RANDOM)], 12)
@example([f"{'a' * 20}{middle}{'a' * 20}" for middle in "bcd"], 12)
def test_shortened_names_are_distinct_and_fit(names, width):
    texts = shorten_all(names, width)
    assert list(texts) == names and len(set(texts.values())) == len(names)
    assert all(cut(text, width) == text for text in texts.values())


@given(st.lists(st.text("ab /鸟", max_size=12), unique=True))
def test_names_that_fit_are_shown_in_full(names):
    assert shorten_all(names, 24) == {name: name for name in names}


def test_only_what_similar_names_have_in_common_is_cut():
    other = "a_very_long_name_of_a_run/checkpoints/90000"
    assert shorten_all([RANDOM[0], other], 14) == {name: shorten(name, 14) for name in (RANDOM[0], other)}
    assert list(shorten_all([*RANDOM, other], 14).values()) == ["…resnet10…", "…resnet18…", shorten(other, 14)]
    assert list(shorten_all(SWEEP, 22).values())[:2] == ["…resnet10?width=4…", "…resnet10?width=8…"]
    assert list(shorten_all(SWEEP, 14).values())[:2] == ["…resnet10…4…", "…resnet10…8…"]


@pytest.mark.parametrize(
    "draw",
    [
        lambda results: figures_by_name.accuracy_by_name(results["transfer"], TARGETS[0]),
        lambda results: spectral_figures.components_by_name(results["spectral"], TARGETS[0]),
        lambda results: spectral_figures.embeddings(results["embedding"], TARGETS[0], None),
        lambda results: spectral_figures.spectra(results["spectrum"], TARGETS[0], "pretrained", None),
        lambda results: spectral_figures.similarity_maps(results["similarity"], TARGETS[0], "pretrained"),
        lambda results: score_figures.score_against_accuracy(
            results["scores"], results["transfer"], TARGETS[0], "logme", "probe", results["ranking"]
        ),
    ],
)
def test_similar_names_differ_in_every_figure(draw):
    results = make_given_results(TARGETS[:1], ("mobilenet_v2", *RANDOM, "run1"))
    # The figure of neighbourhoods shows few checkpoints: here, those with similar names.
    names = dict(zip(dict.fromkeys(row["checkpoint"] for row in results["embedding"]), RANDOM, strict=False))
    results["embedding"] = [{**row, "checkpoint": names[row["checkpoint"]]} for row in results["embedding"]]
    texts = [text.get_text() for text in draw(results).findobj(lambda artist: hasattr(artist, "get_text"))]
    for name in ("resnet10", "resnet18"):
        assert any(name in text for text in texts)


def test_similar_names_differ_in_the_terminal():
    results = make_given_results(TARGETS[:1], ("mobilenet_v2", *RANDOM, "run1"))
    console = rich.console.Console(width=80, file=io.StringIO(), record=True)
    console.print(comparison_table(comparisons(results["transfer"])))
    text = console.export_text()
    assert "…resnet10…" in text or "…resnet18…" in text
    assert max(map(len, text.splitlines())) <= 80
