"""Tables, figures, sentences and the t-SNE stage name the same best checkpoint, by the metric of each target."""

import dataclasses
import io
import json
import math

import numpy as np
import pytest
import rich.console
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.reports import Elements, write_workdir
from helpers.source_files import get_config
from helpers.studies import one_epoch_config
from jax_transfer.data import sources
from jax_transfer.records import METRICS, Features
from jax_transfer.report import answer, best, figures, page, score_figures, spectral_figures, tables, trust
from jax_transfer.report import spectral as report_spectral
from jax_transfer.results import (
    EmbeddingRow,
    RankingRow,
    Rows,
    ScoreRow,
    SpectralRow,
    TargetRow,
    TransferRow,
    read_rows,
    to_json_dict,
)
from jax_transfer.study import checks, plan
from jax_transfer.study import report as report_stage
from jax_transfer.study import spectral as spectral_stage
from jax_transfer.study.workspace import Workspace

EPOCHS = (0, 1, 2, 3)
TARGET = "folder:/data/v1.2/birds"


def transfer_row(epoch, seed, accuracy, mean_class, method="probe", target=TARGET):
    return TransferRow(str(epoch), epoch, target, method, seed, 0.1, accuracy, mean_class, 90, 30, 1.0, 1.0)


def spectral_rows(target=TARGET):
    for stage in ("pretrained", "finetuned"):
        for epoch in EPOCHS:
            for component in ("full", "main", "residual"):
                a = 0.5 + 0.01 * epoch * (1 if component == "main" else -1)
                yield SpectralRow(str(epoch), epoch, target, stage, component, 9.0, a, "", a / 2)


def target_row(metric, target=TARGET, notes=()):
    return TargetRow(target, metric, 2, ["crow", "owl"], 90, 30, list(notes))


def as_results(**rows):
    return {name: [to_json_dict(row) for row in found] for name, found in rows.items()}


def expected_best(values):
    """Returns the first epoch with the highest mean of `values` [epochs, seeds]."""
    return EPOCHS[int(np.argmax(np.round(values.mean(1), 12)))]


# Accuracies in tenths, so that means tie; the order of epochs differs between seeds and metrics.
tables_of_accuracies = st.lists(
    st.lists(st.tuples(st.integers(0, 10), st.integers(0, 10)), min_size=3, max_size=3), min_size=4, max_size=4
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(tables_of_accuracies, st.sampled_from(sorted(METRICS)), st.randoms(use_true_random=False))
def test_all_outputs_name_the_same_best_checkpoint(values, metric, random):
    values = np.array(values) / 10  # [epochs, seeds, metrics]
    rows = [
        transfer_row(epoch, seed, *values[i, seed], method=method)
        for i, epoch in enumerate(EPOCHS)
        for seed in range(3)
        for method in ("probe", "finetune")
    ]
    random.shuffle(rows)
    results = best.by_metric(as_results(transfer=rows, spectral=spectral_rows(), targets=[target_row(metric)]))
    counted = values[:, :, list(METRICS).index(metric)]
    epoch = expected_best(counted)
    shown = tables.percent(counted.mean(1)[epoch])
    for row in best.best_checkpoints(results["transfer"]):
        assert (row["best_epoch"], row["metric"]) == (epoch, metric)
        assert f"epoch {epoch} is best with {shown}" in answer.epoch_sentence(row)
    assert {row["Best epoch"] for row in best.summary_rows(results["transfer"])} == {str(epoch)}
    shown_names = list(map(str, sorted({epoch, 3})))
    assert report_spectral.shown_checkpoints(results, TARGET) == shown_names
    assert sorted({row["Epoch"] for row in report_spectral.table_1(results)}) == shown_names
    (_, words), *_ = report_spectral.story(results)
    assert f"FE {METRICS[metric]} is highest at epoch {epoch} ({shown})" in words
    assert f"FT {METRICS[metric]} is highest at epoch {epoch} ({shown})" in words


@pytest.mark.parametrize("metric", METRICS)
def test_curves_and_scatters_show_the_metric(metric):
    rows = [transfer_row(e, s, 0.5 + 0.1 * e, 0.9 - 0.1 * e) for e in EPOCHS for s in (0, 1)]
    scores = [ScoreRow(str(e), e, TARGET, "logme", float(e), 0.1, 1.0, 1.0) for e in EPOCHS]
    results = best.by_metric(as_results(transfer=rows, spectral=spectral_rows(), targets=[target_row(metric)]))
    scored = as_results(scores=scores)["scores"]
    figure = figures.transfer_curves([], results["transfer"], TARGET)
    axes = figure.axes[0]
    expected = [50, 60, 70, 80] if metric == "accuracy" else [90, 80, 70, 60]
    assert axes.get_ylabel() == f"{METRICS[metric].capitalize()} (%)"
    assert axes.lines[0].get_ydata() == pytest.approx(expected)
    star = next(line for line in axes.lines if line.get_marker() == "*")
    assert star.get_xdata()[0] == (3 if metric == "accuracy" else 0)
    scatter = score_figures.score_against_accuracy(scored, results["transfer"], TARGET, "logme", "probe")
    assert scatter.axes[0].get_ylabel() == f"FE {METRICS[metric]} (%)"
    dots = next(c for c in scatter.axes[0].collections if c.get_array() is not None)
    np.testing.assert_allclose(dots.get_offsets()[:, 1], expected)
    components = spectral_figures.component_curves(results["spectral"], TARGET).axes[0]
    assert components.get_ylabel() == f"FE {METRICS[metric]} (%)"
    assert components.lines[1].get_ydata()[-1] == pytest.approx(53 if metric == "accuracy" else 26.5)


def test_tables_show_one_metric_as_heading_several_as_column(tmp_path):
    other = "embedded:digits"
    rows = [transfer_row(e, 0, 0.5 + 0.1 * e, 0.9 - 0.1 * e, target=t) for e in EPOCHS for t in (TARGET, other)]
    metrics = dict.fromkeys((TARGET, other), "mean_class_accuracy")
    summary = best.summary_rows(best.with_metrics(as_results(rows=rows)["rows"], metrics))
    assert "Mean class accuracy" in summary[0] and "Metric" not in summary[0]
    results = as_results(transfer=rows, targets=[target_row("mean_class_accuracy", notes=["2 copies"])])
    mixed = best.summary_rows(best.by_metric(results)["transfer"])
    assert {row["Target"]: row["Metric"] for row in mixed} == {"birds": "mean class accuracy", "digits": "accuracy"}
    accuracies = {row["Target"]: row["Accuracy"] for row in mixed}
    assert accuracies == {"birds": tables.percent(0.9), "digits": tables.percent(0.8)}
    console = rich.console.Console(width=80, record=True, file=io.StringIO())
    console.print(best.summary_table(best.by_metric(results)["transfer"]))
    assert "Accuracy (mean class accuracy on birds), in percent." in console.export_text()
    text = Elements(page.write_report(write_workdir(tmp_path, results)).read_text(encoding="utf-8")).text
    assert "with 90.00\N{NO-BREAK SPACE}% mean class accuracy" in text
    assert "gives each class the same weight" in text and "2: crow, owl" in text and "birds. 2 copies" in text


def test_trust_note_names_the_metric():
    def note(metrics):
        rows = [RankingRow(t, "probe", "logme", *[0.5] * 7, 12, 0.1, 0.8, 0.0, 12, m) for t, m in metrics.items()]
        return trust.trust_note(as_results(rows=rows)["rows"], [], "probe")

    assert note({"a": "accuracy"}).startswith("Measured against the FE accuracy of 12")
    assert note({"a": "mean_class_accuracy"}).startswith("Measured against the FE mean class accuracy of 12")
    assert note({"a": "accuracy", "b": "mean_class_accuracy"}).startswith(
        "Measured against the FE accuracy (mean class accuracy on b) of 12"
    )


# --- in a study


PAPERS = {  # config -> its variants
    "cifar10_to_mnist": ("full", "reduced", "smoke"),
    **dict.fromkeys(
        ("resnet50_imagenet", "t2t_vit_14_imagenet", "neucrab_group2", "neucrab_group3", "neucrab_resnet101"),
        ("full", "smoke"),
    ),
}


@pytest.mark.parametrize(("name", "variant"), [(name, v) for name, variants in PAPERS.items() for v in variants])
def test_paper_configs_use_accuracy_on_every_target(name, variant):
    config = get_config(name, variant)
    checks.check(config)
    assert config.metrics.to_dict() == dict.fromkeys(config.targets, "accuracy")


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (("cat", "dog"), "2: cat, dog"),
        (("train", "test", "[b]", "鸟", "a\nb"), "5: train, test, [b], 鸟, a\N{REPLACEMENT CHARACTER}b"),
        (tuple(map(str, range(1000))), "1,000: 0, 1, 2, 3, 4, ..."),
    ],
)
def test_plan_rows_and_page_show_class_names(tmp_path, names, shown):
    work, target = workspace(tmp_path)
    given = {
        split: sources.from_arrays(np.zeros((1, 4, 4), np.uint8), [0], class_names=names) for split in sources.SPLITS
    }
    given["test"] = dataclasses.replace(given["test"], notes=("3 exact copies",))
    work.source = lambda dataset, split: given[split]
    assert plan._describe_target(work, target) == f"{target}: 1 train, 1 test images; by accuracy; classes: {shown}"
    Rows(work.results, "targets").append(target_row("mean_class_accuracy", target="folder:/earlier"))
    report_stage.record_targets(work)
    rows = Rows(work.results, "targets").rows
    assert [row.target for row in rows] == [target, "folder:/earlier"]
    assert (rows[0].num_classes, rows[0].class_names[:2], rows[0].notes) == (
        len(names),
        list(names[:2]),
        ["3 exact copies"],
    )
    assert len(rows[0].class_names) <= report_stage.NUM_NAMES
    text = Elements(page.write_report(tmp_path).read_text(encoding="utf-8")).text
    assert shown in text and "3 exact copies" in text


def workspace(workdir, **changes):
    changes = {"pretrain__epochs": 3, "trajectory__epochs": "all", "spectral__embedded_images": 20, **changes}
    config = one_epoch_config(**changes)
    return Workspace(config, workdir), config.targets[0]


def add_rows(work, target, values):
    """Writes transfer rows with `values` [epochs, seeds, metrics]."""
    rows = Rows(work.results, "transfer")
    rows.replace([transfer_row(e, s, *values[e, s], target=target) for e in EPOCHS for s in range(values.shape[1])])
    return rows


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("draw", range(3))
def test_embedding_shows_the_best_checkpoint_of_the_table(tmp_path, monkeypatch, metric, draw):
    work, target = workspace(tmp_path)
    work.config.metrics = {target: metric}
    values = np.random.default_rng(draw).permutation(24).reshape(4, 3, 2) / 24  # the best epoch differs between seeds
    add_rows(work, target, values)
    report_stage.record_targets(work)
    monkeypatch.setattr(spectral_stage, "tsne", lambda x, seed: np.zeros((len(x), 2)))
    labels = work.source(target, "test").labels

    def load(snapshot, split):
        return Features(np.zeros((len(labels), 3)), np.zeros((len(labels), 2)), labels)

    # A row left by an earlier choice is not shown.
    stale = next(e for e in EPOCHS if e not in (3, expected_best(values[:, :, list(METRICS).index(metric)])))
    Rows(work.results, "embedding").append(EmbeddingRow(str(stale), stale, target, "pretrained", [0], [0], [0]))
    spectral_stage._embeddings(work, target, "pretrained", work.snapshots, load)
    results = {path.stem: read_rows(path) for path in work.results.glob("*.jsonl")}
    (row,) = best.best_checkpoints(best.by_metric(results)["transfer"])
    assert row["best_epoch"] == expected_best(values[:, :, list(METRICS).index(metric)])
    assert sorted({r["epoch"] for r in results["embedding"]}) == sorted({row["best_epoch"], 3})


def test_changing_the_metric_reuses_the_stored_rows(tmp_path):
    """Changing config.metrics between runs changes the report but recomputes no rows."""
    work, target = workspace(tmp_path)
    values = np.stack([np.linspace(0.2, 0.8, 4), np.linspace(0.9, 0.3, 4)], 1)[:, None]
    transfer = add_rows(work, target, values).path.read_bytes()
    scores = Rows(work.results, "scores")
    for e in EPOCHS:
        scores.append(ScoreRow(str(e), e, target, "logme", float(e), 0.1, 1.0, 1.0))
    for metric, tau, epoch in (("accuracy", 1.0, 3), ("mean_class_accuracy", -1.0, 0), ("accuracy", 1.0, 3)):
        work.config.metrics = {target: metric}
        report_stage.run(work)
        rows = [json.loads(line) for line in (work.results / "ranking.jsonl").read_text().splitlines()]
        (row,) = [row for row in rows if row["score"] == "logme"]
        assert (row["metric"], round(row["kendall"], 6)) == (metric, tau)
        text = (tmp_path / "report/index.html").read_text(encoding="utf-8")
        assert f"epoch {epoch} is best" in text
        assert (work.results / "transfer.jsonl").read_bytes() == transfer


def test_config_metric_overrides_that_of_the_data_set(tmp_path):
    work, target = workspace(tmp_path)
    assert work.metrics == {target: "accuracy"}
    source = work.source(target, "train")
    work.source = lambda dataset, split: dataclasses.replace(source, metric="mean_class_accuracy")
    assert work.metrics == {target: "mean_class_accuracy"}
    work.config.metrics = {target: "accuracy"}
    assert work.metrics == {target: "accuracy"}


def test_components_without_the_metric_are_recomputed(tmp_path):
    work, target = workspace(tmp_path)
    rows = Rows(work.results, "spectral")
    old = [SpectralRow(str(e), e, t, "pretrained", "full", 1.0, 0.5) for e in EPOCHS for t in (target, "gone")]
    rows.replace(old)
    spectral_stage._forget_other_metrics(work, rows)
    assert rows.rows == old  # these rows have the metric
    work.config.metrics = {target: "mean_class_accuracy"}
    spectral_stage._forget_other_metrics(work, rows)
    assert [row.target for row in Rows(work.results, "spectral").rows] == ["gone"] * 4
    assert all(math.isnan(row.mean_class_accuracy) for row in rows.rows)
