"""Several studies as one list: what is united is named, judged anew over all checkpoints, and nothing is guessed."""

import json
import logging
import pathlib

import pytest

from helpers.source_files import get_config
from jax_transfer import fields
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
    assert f"{BIRDS} is left out: not every study has evaluated it." in caplog.text


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


def drop(results, file, checkpoint, **columns):
    """Removes the rows of a checkpoint from a result file."""
    rows = Rows(results, file)
    gone = {"checkpoint": checkpoint, **columns}
    rows.replace([row for row in rows.rows if any(getattr(row, name) != value for name, value in gone.items())])


def test_an_unfinished_study_has_missing_values_and_is_named(tmp_path, caplog):
    first, second = write_study(tmp_path / "one", {1: 0.5, 2: 0.7}), write_study(tmp_path / "two", {1: 0.6, 5: 0.8})
    drop(second / "results", "transfer", "5")
    with caplog.at_level(logging.WARNING):
        results = union(tmp_path, first, second)
    (ranking,) = read_rows(results / "ranking.jsonl")
    assert (ranking["num_checkpoints"], ranking["num_scored"], ranking["kendall"]) == (4, 3, None)
    words = "two: 1 of 2 checkpoints without FT accuracy on pets, so no score is judged by it there."
    assert words in caplog.text
    assert words in (tmp_path / "union" / "report" / "index.html").read_text(encoding="utf-8")


def test_a_study_without_a_method_is_not_ranked_by_it_and_is_named(tmp_path, caplog):
    first, second = write_study(tmp_path / "one", {1: 0.5, 2: 0.7}), write_study(tmp_path / "two", {1: 0.6, 5: 0.8})
    for epoch in (1, 2):
        row = TransferRow(str(epoch), epoch, PETS, "probe", 0, 0.1, epoch / 10, 0.5, 10, 10, 1.0, 1.0)
        Rows(first / "results", "transfer").append(row)
    with caplog.at_level(logging.WARNING):
        results = union(tmp_path, first, second)
    counts = {row["method"]: row["num_checkpoints"] for row in read_rows(results / "ranking.jsonl")}
    assert counts == {"finetune": 4, "probe": 2}
    assert "two has no FE accuracies: its checkpoints are not ranked by them." in caplog.text


def test_united_studies_are_only_read(tmp_path):
    """One may be running: a line that it is writing is not its last."""
    first, second = write_study(tmp_path / "one", {1: 0.5, 2: 0.7}), write_study(tmp_path / "two", {1: 0.6})
    with open(second / "results" / "transfer.jsonl", "a") as file:
        file.write('{"checkpoint": "5", "ep')
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    results = union(tmp_path, first, second)
    assert {path: path.read_bytes() for path in before} == before
    assert len(read_rows(results / "transfer.jsonl")) == 3


def test_no_study_is_overwritten(tmp_path):
    first, second = write_study(tmp_path / "one", {1: 0.5, 2: 0.7}), write_study(tmp_path / "two", {1: 0.6})
    config = unite.default_config()
    config.unite = (str(first),)
    with pytest.raises(InputError, match=r"two holds the results of a study, which would be lost"):
        unite.run(config, second)
    (second / "config.json").write_text(json.dumps({"name": "a study"}))
    with pytest.raises(InputError, match=r"two holds the results of a study, which would be lost"):
        unite.run(config, second)
    with pytest.raises(InputError, match=r"one is also in config\.unite"):
        unite.run(config, first)


def test_page_speaks_of_no_stages(tmp_path):
    union(tmp_path, write_study(tmp_path / "one", {1: 0.5, 2: 0.7}), write_study(tmp_path / "two", {1: 0.6}))
    page = (tmp_path / "union" / "report" / "index.html").read_text(encoding="utf-8")
    assert "has not run" not in page and "No results in" not in page and "Transfer by kind of checkpoint" in page


def test_smoke_variant_unites_a_recorded_study():
    """`.ci/run` runs it."""
    for variant in ("full", "smoke"):
        config = get_config("neucrab_union", variant)
        fields.check(config.to_dict(), fields.schema(unite.UnionFields()), "config")
    targets, others = unite._shared_targets(unite._named([pathlib.Path(path) for path in config.unite]))
    assert len(targets) > 1 and not others
