"""Invented results of a study, and a parser of the page."""

import html.parser
import json
import math

import numpy as np

from jax_transfer.results import (
    EmbeddingRow,
    PretrainRow,
    RankingRow,
    ScoreRow,
    SimilarityRow,
    SpectralRow,
    SpectrumRow,
    TransferRow,
    to_json_dict,
)

EPOCHS = (0, 1, 2, 3, 5, 10, 20, 40, 60, 100, 150, 200)
TARGETS = ("tfds:mnist?per_class=100", "folder:/photos/birds")
SCORES = ("logme", "leep")
GIVEN = ("random resnet18", "run1/checkpoints/5", "mobilenet_v2", "a_very_long_name_of_a_run/checkpoints/90000")


def make_results(targets=TARGETS, epochs=EPOCHS, seeds=(0, 1)) -> dict[str, list[dict]]:
    """Returns rows with the shape of the paper's curves: FE peaks at epoch 5 and falls, FT rises and levels off."""
    rng = np.random.default_rng(0)
    t = np.log1p(np.array(epochs, float))
    source = 0.10 + 0.85 * (1 - np.exp(-1.1 * t))
    results = {
        "pretrain": [
            PretrainRow(
                e,
                *((math.nan, math.nan) if e == 0 else (2.2 * (1 - a), a + 0.03)),
                a,
                5000.0,
                12.0,
                "tfds:cifar10",
                str(e),
                "resnet18",
            )
            for e, a in zip(epochs, source, strict=True)
        ],
        "transfer": [],
        "scores": [],
        "ranking": [],
        "spectral": [],
        "spectrum": [],
        "similarity": [],
        "embedding": [],
    }
    for target in targets:
        add_spectral_rows(results, target, epochs, t)
        means = {
            "probe": 0.965 - 0.035 * (t - math.log(6)) ** 2 / (1 + 0.35 * t),
            "probe_converged": 0.955 - 0.02 * (t - math.log(8)) ** 2 / (1 + 0.4 * t),
            "finetune": 0.983 + 0.0118 * (1 - np.exp(-0.9 * t)),
        }
        for method, curve in means.items():
            for seed in seeds:
                for e, mean in zip(epochs, curve, strict=True):
                    a = float(mean + rng.normal() * (0.0004 if method == "finetune" else 0.003))
                    lr = 0.01 if method != "finetune" else 0.001
                    row = TransferRow(str(e), e, target, method, seed, lr, a, a - 0.002, 1000, 10000, 8.5, 3.2)
                    results["transfer"].append(row)
        for score in SCORES:
            for e, x in zip(epochs, t, strict=True):
                value = float(0.2 * x + rng.normal() * 0.05)
                results["scores"].append(ScoreRow(str(e), e, target, score, value, 0.5, 0.01, 300.0))
            for method in means:
                row = RankingRow(
                    target,
                    method,
                    score,
                    0.71,
                    0.52,
                    0.6,
                    1.0,
                    1.0,
                    0.99,
                    1.0,
                    len(epochs),
                    0.1,
                    0.8,
                    0.01,
                    len(epochs),
                )
                results["ranking"].append(row)
    return {name: [to_json_dict(row) for row in rows] for name, rows in results.items()}


def add_spectral_rows(results, target, epochs, t):
    """Adds rows whose main component falls and residual rises with the epochs, more so before fine-tuning."""
    for stage, fall in (("pretrained", 0.06), ("finetuned", 0.01)):
        for e, x in zip(epochs, t, strict=True):
            parts = {"full": 0.95 - fall * x / 2, "main": 0.9 - fall * x, "residual": 0.5 + fall * x}
            for component, accuracy in parts.items():
                rank = {"full": 128.0, "main": 30.5, "residual": 97.5}[component]
                results["spectral"].append(SpectralRow(str(e), e, target, stage, component, rank, accuracy))
            row = SpectrumRow(str(e), e, target, stage, 30, 55.5, 1.2, [1, 2, 4, 8], [0.4, 0.3, 0.2, 0.1])
            results["spectrum"].append(row)
            for other in epochs:
                row = SimilarityRow(str(e), str(other), target, stage, 1 - abs(e - other) / 200, 0.7)
                results["similarity"].append(row)
        for e in (5, epochs[-1]):
            points = np.random.default_rng(e).normal(size=(2, 40)).round(2).tolist()
            results["embedding"].append(EmbeddingRow(str(e), e, target, stage, *points, [0, 1, 2, 3] * 10))


def as_given(results, names=GIVEN):
    """Returns the results as if their checkpoints, in the order of their epochs, had been given under these names."""
    epochs = sorted({row["epoch"] for row in results["transfer"]})
    name_of = {str(epoch): name for epoch, name in zip(epochs, names, strict=True)}

    def change(row):
        row = {k: name_of[v] if k in ("checkpoint", "other") else v for k, v in row.items()}
        return row | ({"epoch": None} if "epoch" in row else {})

    return {name: list(map(change, rows)) for name, rows in results.items() if name != "pretrain"}


def make_given_results(targets=TARGETS, names=GIVEN, seeds=(0, 1)):
    """Returns the results of a study of given checkpoints only; the second one has the best frozen features."""
    results = make_results(targets, (0, 5, 200, 20)[: len(names)], seeds)
    return as_given(results, names)


def make_both_results(targets=TARGETS, seeds=(0, 1)):
    """Returns the results of a study with a trajectory of its own and given checkpoints, as its stages write them."""
    own, others = make_results(targets, seeds=seeds), make_given_results(targets, seeds=seeds)
    rankings = [{**row, "num_checkpoints": 16, "num_scored": 16} for row in own["ranking"]]
    return {name: [*rows, *others.get(name, [])] for name, rows in own.items()} | {"ranking": rankings}


def grid_points(results, split="validation", method="finetune", rates=(0.001, 0.01), decays=(0.0, 1e-4)):
    """Returns the points of a grid of settings, one of which diverged, for each checkpoint of a method."""
    rows = [r for r in results["transfer"] if (r["method"], r["seed"]) == (method, 0)]
    points = [
        {**row, "split": split, "learning_rate": rate, "weight_decay": decay, "accuracy": 0.999, "seconds": 1.0}
        for row in rows
        for rate in rates
        for decay in decays
    ]
    points[0] |= {"accuracy": None, "mean_class_accuracy": None, "error": "the loss is not finite at step 7"}
    return points


def write_workdir(workdir, results, config=None):
    """Writes the results, and the config if given, as a study does; returns `workdir`."""
    (workdir / "results").mkdir(parents=True, exist_ok=True)
    for name, rows in results.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (workdir / "results" / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    if config is not None:
        (workdir / "config.json").write_text(json.dumps(config))
    return workdir


CONFIG = {
    "name": "cifar10_to_mnist",
    "source": {"dataset": "tfds:cifar10"},
    "model": {"name": "resnet18"},
    "targets": list(TARGETS),
}


class Elements(html.parser.HTMLParser):
    """Elements of a page, as (tag, attributes), and its text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def transfer_row(epoch, accuracy, seed=0, method="probe", target="a"):
    """Returns a row of results/transfer.jsonl as a dict."""
    row = TransferRow(str(epoch), epoch, target, method, seed, 0.1, accuracy, accuracy, 10, 10, 1.0, 1.0)
    return to_json_dict(row)
