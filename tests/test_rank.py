"""`rank`: the best checkpoint first, bad ones last with their reason, and an honest word on how sure that is."""

import csv
import json
import math

import jax
import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression

import jax_transfer as jt
from jax_transfer.models import MODELS, torch_weights
from jax_transfer.rank_checkpoints import Ranked, Ranking, cross_validated, wilson
from jax_transfer.records import Features, InputError

TARGET = "embedded:digits?train=160&test=40"


def written(path, width=8, seed=0, head=True, damage=False):
    """A .safetensors file of a small random ResNet."""
    net = MODELS["resnet10"](num_classes=10, stem="cifar", width=width)
    params, stats = net.init(jax.random.key(seed))
    if damage:  # features that are all the same
        params = {**params, "bn1": jax.tree.map(lambda x: 0 * x, params["bn1"])}
    if not head:
        params = {name: value for name, value in params.items() if name != "fc"}
    model = {"name": "resnet10", "stem": "cifar", "width": width, "num_classes": 10}
    described = {"model": model, "preprocessing": {"image_size": 8}}
    torch_weights.save_safetensors(path, params, stats, {"jax_transfer": json.dumps(described)})
    return path


@pytest.fixture(scope="module")
def ranking(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    written(folder / "blind.safetensors", damage=True)
    written(folder / "small.safetensors")
    written(folder / "headless.safetensors", width=12, head=False)
    (folder / "broken.safetensors").write_bytes(b"no checkpoint")
    return jt.rank(sorted(folder.glob("*")), TARGET, scores=("logme", "leep"))


def test_the_best_is_first_and_failures_are_last(ranking):
    names = [row.checkpoint for row in ranking.rows]
    assert names[-2:] == ["blind.safetensors", "broken.safetensors"]
    assert ranking.best.checkpoint in ("small.safetensors", "headless.safetensors") and ranking.best.accuracy > 0.5
    accuracies = [row.accuracy for row in ranking.rows[:-1]]
    assert accuracies == sorted(accuracies, reverse=True) and accuracies[-1] < 0.2
    assert "is cut off" in ranking.rows[-1].error and math.isnan(ranking.rows[-1].accuracy)
    assert ranking.num_images == 200 and all(row.low < row.accuracy < row.high for row in ranking.rows[:-1])


def test_scores_of_logits_need_a_head(ranking):
    by_name = {row.checkpoint: row.scores for row in ranking.rows}
    assert math.isnan(by_name["headless.safetensors"]["leep"]) and math.isfinite(
        by_name["headless.safetensors"]["logme"]
    )
    assert math.isfinite(by_name["small.safetensors"]["leep"])


def test_the_table_says_what_failed_and_how_sure_it_is(ranking, tmp_path):
    text = " ".join(str(ranking).split())
    assert "small.safetensors" in text and "Failed:" in text and "LogME" in text and "5 folds" in text
    ranking.to_csv(tmp_path / "ranking.csv")
    with open(tmp_path / "ranking.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["checkpoint"] for row in rows] == [row.checkpoint for row in ranking.rows]
    assert float(rows[0]["accuracy"]) == ranking.best.accuracy


def test_checkpoints_within_the_interval_of_the_best_are_called_tied():
    def row(name, accuracy, low, high):
        return Ranked(name, None, "m", accuracy, low, high, {})

    found = Ranking("t", 9, [row("a", 0.9, 0.8, 0.95), row("b", 0.85, 0.75, 0.91), row("c", 0.5, 0.4, 0.6)], math.nan)
    assert [r.checkpoint for r in found.tied] == ["b"]
    assert "1 other cannot be told apart" in " ".join(str(found).split())


def test_wilson_equals_scipys():
    for correct, total in ((0, 10), (7, 10), (180, 200), (50, 50)):
        share, low, high = wilson(correct, total)
        expected = binomtest(correct, total).proportion_ci(method="wilson")
        assert share == correct / total
        np.testing.assert_allclose((low, high), expected, atol=1e-4)


def test_cross_validation_is_near_that_of_scikit_learn_and_blind_to_labels_it_tests():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 203).astype(np.int32)
    x = (np.eye(3)[y] @ rng.normal(size=(3, 5)) + rng.normal(size=(203, 5))).astype(np.float32)
    accuracy, low, high = cross_validated(Features(x, x, y), 3)
    held_out = [i for i in range(203) if i % 5 == 0]
    fitted = [i for i in range(203) if i % 5]
    peer = LogisticRegression(C=1.0).fit(x[fitted], y[fitted]).score(x[held_out], y[held_out])
    assert abs(accuracy - peer) < 0.1 and low < accuracy < high
    chance, *_ = cross_validated(Features(x, x, rng.permutation(y)), 3)
    assert chance < 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"checkpoints": []}, "checkpoints is empty"),
        ({"checkpoints": ["a.safetensors", "a.safetensors"]}, "names a.safetensors twice"),
        ({"checkpoints": ["a.safetensors"]}, "No checkpoint can be used. a.safetensors: there is no such"),
        ({"scores": ("logmee",)}, "Did you mean 'logme'"),
        ({"target": "embedded:digit"}, "Did you mean 'digits'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        jt.rank(**{"checkpoints": ["a.safetensors"], "target": TARGET, **arguments})
