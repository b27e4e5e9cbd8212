"""Several studies as one list: what is united is named, judged anew over all checkpoints, and nothing is guessed."""

import logging

import pytest

from jax_transfer.records import InputError
from jax_transfer.results import CheckpointRow, PretrainRow, Rows, ScoreRow, TargetRow, TransferRow, read_rows
from jax_transfer.study import unite

PETS, BIRDS = "folder:/pets", "folder:/birds"


def write_study(workdir, accuracies, targets=(PETS,), metric="accuracy", given=()):
    """Writes the rows of a study with an epoch for each accuracy, whose score is its accuracy."""
    results = workdir / "results"
    for target in targets:
        Rows(results, "targets").append(TargetRow(target, metric, 2, ["cat", "dog"], 10, 10, []))
    for epoch, accuracy in accuracies.items():
        row = PretrainRow(float(epoch), 0.1, 0.9, accuracy, 1.0, 1.0, "tfds:cifar10", str(epoch), "resnet18")
        Rows(results, "pretrain").append(row)
        _evaluate(results, str(epoch), epoch, accuracy, targets)
    for name, path in given:
        row = CheckpointRow(name, path, "resnet18", 9, {"image_size": 32}, False, True, [], "f")
        Rows(results, "checkpoints").append(row)
        _evaluate(results, name, None, 0.1, targets)
    return workdir


def _evaluate(results, name, epoch, accuracy, targets):
    for target in targets:
        numbers = (accuracy, accuracy, 10, 10, 1.0, 1.0)
        Rows(results, "transfer").append(TransferRow(name, epoch, target, "finetune", 0, 0.1, *numbers))
        Rows(results, "scores").append(ScoreRow(name, epoch, target, "logme", accuracy, 1.0, 1.0, 1.0))


def union(tmp_path, *folders):
    config = unite.default_config()
    config.unite = tuple(map(str, folders))
    return unite.run(config, tmp_path / "union")


def test_checkpoints_of_all_studies_are_ranked_as_one_list(tmp_path):
    first = write_study(tmp_path / "one", {1: 0.5, 2: 0.7})
    second = write_study(tmp_path / "two", {1: 0.6, 5: 0.8})
    results = union(tmp_path, first, second)
    names = {row["checkpoint"] for row in read_rows(results / "transfer.jsonl")}
    assert names == {"one/1", "one/2", "two/1", "two/5"}
    (ranking,) = read_rows(results / "ranking.jsonl")
    assert (ranking["num_checkpoints"], ranking["num_scored"], ranking["kendall"]) == (4, 4, 1.0)
    (trust,) = read_rows(results / "trust.jsonl")
    assert (trust["num_epochs"], trust["num_checkpoints"]) == (1, 4)  # the same net on the same images, four epochs
    page = (tmp_path / "union" / "report" / "index.html").read_text(encoding="utf-8")
    assert "one" in page and "two" in page


def test_the_same_command_again_replaces_its_rows_and_takes_in_a_new_study(tmp_path):
    first, second = write_study(tmp_path / "one", {1: 0.5, 2: 0.7}), tmp_path / "two"
    union(tmp_path, first, second)
    write_study(second, {1: 0.6})
    results = union(tmp_path, first, second)
    assert len(read_rows(results / "transfer.jsonl")) == 3


def test_a_study_without_results_is_named_and_left_out(tmp_path, caplog):
    first = write_study(tmp_path / "one", {1: 0.5, 2: 0.7})
    with caplog.at_level(logging.WARNING):
        union(tmp_path, first, tmp_path / "later")
    assert "later has no results yet: it is left out." in caplog.text


def test_only_targets_that_all_studies_share_are_ranked(tmp_path, caplog):
    first = write_study(tmp_path / "one", {1: 0.5, 2: 0.7}, targets=(PETS, BIRDS))
    second = write_study(tmp_path / "two", {1: 0.6})
    with caplog.at_level(logging.WARNING):
        results = union(tmp_path, first, second)
    assert {row["target"] for row in read_rows(results / "transfer.jsonl")} == {PETS}
    assert f"{BIRDS} left out: not every study has evaluated it." in caplog.text


def test_an_untrained_net_is_shown_but_not_ranked(tmp_path):
    first = write_study(tmp_path / "one", {1: 0.5, 2: 0.7}, given=[("random resnet18", "random resnet18")])
    results = union(tmp_path, first)
    assert "one/random resnet18" in {row["checkpoint"] for row in read_rows(results / "transfer.jsonl")}
    assert read_rows(results / "ranking.jsonl")[0]["num_checkpoints"] == 2


def test_what_cannot_be_united_is_refused_in_one_line(tmp_path):
    first = write_study(tmp_path / "one", {1: 0.5, 2: 0.7})
    other_metric = write_study(tmp_path / "two", {1: 0.6}, metric="mean_class_accuracy")
    elsewhere = write_study(tmp_path / "three", {1: 0.6}, targets=(BIRDS,))
    same_name = write_study(tmp_path / "copy" / "one", {1: 0.6})
    for folders, message in (
        ((), "config.unite is empty"),
        ((tmp_path / "later",), "has results yet"),
        ((first, other_metric), "is judged by accuracy in one and mean_class_accuracy in two"),
        ((first, elsewhere), "one and three share no target"),
        ((first, same_name), "have the same last part"),
        ((first, first), "twice"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            union(tmp_path, *folders)
        assert "\n" not in str(caught.value)
