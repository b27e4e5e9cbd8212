"""Fine-tuning of the best checkpoints of a ranking."""

import dataclasses
import functools
import math

import pytest

import jax_transfer as jt
from jax_transfer import devices
from jax_transfer.data.batches import make_feed
from jax_transfer.data.sources import load_source
from jax_transfer.ranking import result, tuning
from jax_transfer.ranking.candidates import list_candidates, load
from jax_transfer.ranking.result import Ranked, Ranking, Tuning
from jax_transfer.records import InputError

TARGET = "embedded:digits?train=80&test=40"
NAMES = ("random:resnet10?width=8&stem=cifar", "random:resnet18_v2?width=8&stem=cifar")
SIZE = {"image_size": 8, "crop_fraction": 1.0}
SHORT = dataclasses.replace(tuning.SETTINGS, epochs=2)


@pytest.fixture(scope="module")
def feeds_of():
    sources = [load_source(TARGET, split) for split in ("train", "test")]

    @functools.cache
    def feeds(preprocessing):
        return [make_feed(source, preprocessing, devices.make_mesh()) for source in sources]

    return feeds


def rows_of(names=NAMES):
    candidates = list_candidates(list(names), None)
    loaders = [functools.partial(load, candidate, SIZE, 0) for candidate in candidates]
    return [
        Ranked(c.name, c.name, preprocessing=loader().preprocessing, accuracy=0.5, loader=loader)
        for c, loader in zip(candidates, loaders, strict=True)
    ]


@pytest.mark.slow
def test_only_the_best_are_tuned_whatever_their_architectures(feeds_of):
    rows = [Ranked("broken", "broken", error="no file"), *rows_of()]
    both, how = tuning.finetune_best(rows, 2, feeds_of, "accuracy", settings=SHORT)
    assert how == Tuning(2, 0.01, 80, 40)
    assert math.isnan(both[0].finetuned) and all(0 <= row.finetuned <= 1 for row in both[1:])
    one, _ = tuning.finetune_best(rows, 1, feeds_of, "accuracy", settings=SHORT)
    assert one[1].finetuned == both[1].finetuned and math.isnan(one[2].finetuned)
    assert [row.checkpoint for row in both] == [row.checkpoint for row in rows]
    assert tuning.finetune_best(rows, 0, feeds_of, "accuracy") == (rows, None)


@pytest.mark.slow
def test_net_with_batch_norm_groups_gets_a_batch_that_they_divide(feeds_of):
    (row,), _ = tuning.finetune_best(
        rows_of(["random:resnet10?width=8&stem=cifar&batch_norm_group=12"]), 1, feeds_of, "accuracy", settings=SHORT
    )
    assert math.isfinite(row.finetuned) and not row.finetune_error


def test_file_that_is_lost_after_the_ranking_has_a_reason(feeds_of):
    def gone():
        raise InputError("a.pth: no such checkpoint file.")

    (row,) = rows_of(NAMES[:1])
    (lost,), _ = tuning.finetune_best([dataclasses.replace(row, loader=gone)], 1, feeds_of, "accuracy")
    assert lost.finetune_error == "a.pth: no such checkpoint file." and lost.accuracy == row.accuracy


def test_diverged_and_impossible_tunings_say_why(feeds_of, caplog):
    hot = dataclasses.replace(SHORT, optimizer=dataclasses.replace(SHORT.optimizer, learning_rate=1e30))
    (row, _), _ = tuning.finetune_best(rows_of(), 1, feeds_of, "accuracy", settings=hot)
    assert math.isnan(row.finetuned) and "diverged at step" in row.finetune_error


@pytest.mark.slow
def test_rank_shows_the_tuned_accuracies(monkeypatch):
    monkeypatch.setattr(tuning.finetune_best, "__defaults__", (0, SHORT))
    ranking = jt.rank(list(NAMES), TARGET, scores=("logme",), preprocessing=SIZE, finetune=1)
    best, other = ranking.rows
    assert math.isfinite(best.finetuned) and math.isnan(other.finetuned)
    text = " ".join(str(ranking).split())
    assert "Fine-" in text and f"{100 * best.finetuned:.2f}" in text
    assert "the other one was not fine-tuned" in text and "after fine-tuning, the order may differ" not in text


def test_answer_orders_the_tuned_checkpoints():
    rows = [
        Ranked("b", "b", accuracy=0.9, low=0.88, high=0.92, behind_low=0.0, scores={}, finetuned=0.91),
        Ranked("a", "a", accuracy=0.8, low=0.78, high=0.82, behind_low=0.05, scores={}, finetuned=0.97),
        Ranked("c", "c", accuracy=0.7, low=0.68, high=0.72, behind_low=0.1, scores={}, finetune_error="no memory"),
    ]
    ranking = Ranking("t", 1000, 2, 0.5, rows, tuning=Tuning(30, 0.01, 800, 200))
    text = " ".join(result.answer(ranking))
    assert "After fine-tuning (30 epochs on 800 images, learning rate 0.01), a is best with 97.00" in text
    assert "then b with 91.00" in text and "on 200 test images" in text and "Fine-tuning c failed: no memory." in text
    assert [row["Fine-tuned %"] for row in result.table_rows(ranking)] == ["91.00", "97.00", "–"]


@pytest.mark.parametrize("number", [-1, 1.5, True, "3"])
def test_number_of_checkpoints_to_tune_is_checked(number):
    with pytest.raises(InputError, match=r"finetune = .*: expected the number of checkpoints to fine-tune"):
        jt.rank(list(NAMES), TARGET, finetune=number)
