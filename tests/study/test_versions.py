"""Rows of older versions are computed again, rows of newer versions refused, and current rows kept."""

import dataclasses
import json
import logging
import re

import pytest

from helpers.studies import TARGET, one_epoch_config, run_stages
from jax_transfer import devices, results
from jax_transfer.records import InputError
from jax_transfer.results import ROWS, VERSIONS, Rows, read_rows
from jax_transfer.study import finetune as finetune_stage
from jax_transfer.study.workspace import Workspace
from jax_transfer.transfer.finetune import FinetuneSettings

OLD = [name for name, version in VERSIONS.items() if version > 1]


def make_row(file, number, **changes):
    """Returns a row of a result file with a value in every field."""
    values = {
        "int": number,
        "float": 0.5,
        "str": str(number),
        "list[int]": [number],
        "list[float]": [0.5],
        "list[str]": ["a"],
        "dict": {"image_size": number},
        "bool": True,
        "bool | None": True,
        "int | None": number,
        "float | None": 0.5,
        "str | None": str(number),
    }
    types = {f.name: f.type for f in dataclasses.fields(ROWS[file][0])}
    fields = {name: values[t.__name__ if isinstance(t, type) else str(t)] for name, t in types.items()}
    if "error" in fields:
        fields["error"] = ""
    return ROWS[file][0](**{**fields, "version": VERSIONS[file], **changes})


def line(row, version):
    values = {**results.to_json_dict(row), "version": version}
    return json.dumps({name: value for name, value in values.items() if value is not None}) + "\n"


@pytest.fixture(autouse=True)
def _log(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("jax_transfer"), "propagate", True)
    caplog.set_level(logging.INFO, logger="jax_transfer")


def test_rows_carry_the_version_of_their_result_file():
    assert VERSIONS.keys() == ROWS.keys()
    for name, (row_type, _) in ROWS.items():
        assert {f.name: f.default for f in dataclasses.fields(row_type)}["version"] == VERSIONS[name]


def write(path, file, versions, torn=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [line(make_row(file, n), version) for n, version in enumerate(versions)]
    path.write_bytes("".join(lines).encode() + torn)
    return [text for text, version in zip(lines, versions, strict=True) if version == VERSIONS[file]]


@pytest.mark.parametrize("torn", [b"", b'{"checkpoint": "9", "ver'])
@pytest.mark.parametrize("file", OLD)
def test_older_rows_are_removed_with_one_warning(file, torn, tmp_path, caplog):
    now = VERSIONS[file]
    path = tmp_path / f"{file}.jsonl"
    kept = write(path, file, [None, now, *range(1, now), now, None], torn)
    before = path.read_bytes()
    rows = Rows(tmp_path, file)
    assert [rows.key(row) for row in rows.rows] == [rows.key(make_row(file, n)) for n in (1, now + 1)]
    assert rows.key(make_row(file, 0)) not in rows
    assert path.read_bytes() == before.removesuffix(torn)  # reading removes nothing
    new = make_row(file, 50)
    rows.append(new)
    assert path.read_text() == "".join([*kept, line(new, now)])
    Rows(tmp_path, file).append(make_row(file, 51))
    warnings = [message for message in caplog.messages if "older version" in message]
    assert warnings == [
        f"{path}: {now + 1} rows were computed by an older version of jax_transfer and are computed again."
    ]


@pytest.mark.parametrize(
    "file", [name for name in OLD if "error" in {f.name for f in dataclasses.fields(ROWS[name][0])}]
)
def test_forget_failures_also_removes_older_rows(file, tmp_path, caplog):
    path = tmp_path / f"{file}.jsonl"
    (kept,) = write(path, file, [None, VERSIONS[file]])
    with open(path, "a") as opened:
        opened.write(line(make_row(file, 7, error="failed"), VERSIONS[file]))
    for _ in range(2):
        Rows(tmp_path, file).forget_failures()
        assert path.read_text() == kept
    assert sum("1 row was computed by an older version of jax_transfer and is" in m for m in caplog.messages) == 1


def test_only_the_first_process_removes_rows_and_logs(tmp_path, monkeypatch, caplog):
    write(tmp_path / "scores.jsonl", "scores", [None, VERSIONS["scores"]])
    before = (tmp_path / "scores.jsonl").read_bytes()
    monkeypatch.setattr(devices, "is_first_process", lambda: False)
    rows = Rows(tmp_path, "scores")
    rows.forget_failures()
    assert len(rows.rows) == 1 and (tmp_path / "scores.jsonl").read_bytes() == before and not caplog.messages


@pytest.mark.parametrize("read", [lambda path: Rows(path.parent, path.stem), read_rows])
@pytest.mark.parametrize("file", ROWS)
def test_rows_of_a_newer_version_are_refused(file, read, tmp_path):
    path = tmp_path / f"{file}.jsonl"
    write(path, file, [VERSIONS[file], VERSIONS[file] + 1])
    before = path.read_bytes()
    with pytest.raises(
        InputError, match=re.escape(f"{path}: line 2 was computed by a newer version") + ".*use that version, or"
    ):
        read(path)
    assert path.read_bytes() == before
    for wrong in ("2", 1.0, True, 0, -1, [2]):
        path.write_text(line(make_row(file, 0), wrong))
        with pytest.raises(InputError, match=r"version .*expected a whole number of at least 1"):
            read(path)


@pytest.mark.parametrize("file", ROWS)
def test_report_omits_older_rows_with_one_warning(file, tmp_path, caplog):
    path = tmp_path / f"{file}.jsonl"
    kept = write(path, file, [None, VERSIONS[file], None])
    for _ in range(2):
        rows = read_rows(path)
        assert len(rows) == (len(kept) if VERSIONS[file] > 1 else 3)
        assert all(row["version"] == VERSIONS[file] for row in rows)
    warnings = [message for message in caplog.messages if "older version" in message]
    assert len(warnings) == (VERSIONS[file] > 1)
    expected = "2 rows were computed by an older version of jax_transfer and are left out: run its stage"
    assert all(expected in message for message in warnings)


FILES = ("transfer", "scores", "spectral", "spectrum", "similarity", "ranking")


@pytest.mark.slow
def test_old_workdir_is_recomputed_once(tmp_path, caplog):
    stages = ("pretrain", "probe", "finetune", "scores", "spectral", "report")
    config = one_epoch_config(stages=stages, scores=("logme", "finetune_1", "finetune_5"), trajectory__epochs="1")
    config.finetune.epochs = 6
    first = run_stages(config, tmp_path)
    _check_early_stops(config, tmp_path, first)

    def results():
        return {path.stem: path.read_bytes() for path in (tmp_path / "results").iterdir()}

    written = results()
    for name in first:  # as before rows had versions
        path = tmp_path / f"results/{name}.jsonl"
        old = [{k: v for k, v in row.items() if k not in ("version", "test_forward_gflops")} for row in first[name]]
        for row in old:
            row |= {k: 0.125 for k in ("accuracy", "value", "cka", "decay") if k in row}
        path.write_text("".join(json.dumps(row) + "\n" for row in old))
    old_pretrain = results()["pretrain"]
    caplog.clear()
    again = run_stages(config, tmp_path)
    warnings = [message for message in caplog.messages if "older version" in message]
    for name in FILES:
        count = f"{len(first[name])} rows were" if len(first[name]) > 1 else "1 row was"
        assert (
            sum(f"results/{name}.jsonl: {count} computed by an older version" in message for message in warnings) == 1
        )
        now, then = ([{k: v for k, v in r.items() if k != "seconds"} for r in rows[name]] for rows in (again, first))
        assert now == then and {row["version"] for row in now} == {VERSIONS[name]}
    assert len(warnings) == len(FILES) and written.keys() == results().keys()
    assert results()["pretrain"] == old_pretrain  # its rows belong to checkpoints that are kept
    caplog.clear()
    before = results()
    run_stages(config, tmp_path)
    assert results() == before and not [message for message in caplog.messages if "older version" in message]


def _check_early_stops(config, workdir, results):
    """One run of the whole schedule on the same images has the values of both scores on its way."""
    work = Workspace(config, workdir)
    (snapshot,) = work.snapshots
    tuning = finetune_stage.settings.finetune_settings(config, TARGET)
    schedule = finetune_stage.finetuned(
        work, [finetune_stage.Run(snapshot, config.seed)], TARGET, ("fit", "held_out"), tuning, epochs=(1, 2, 5, 6)
    )
    rows = {row["score"]: row for row in results["scores"]}
    by_epoch = {done.epoch: done for _, done in schedule}
    assert len(by_epoch) == 4
    for score, epoch in (("finetune_1", 1), ("finetune_5", 5)):
        assert rows[score]["value"] == by_epoch[epoch].metrics["accuracy"]
        assert rows[score]["gflops"] == pytest.approx(by_epoch[epoch].gflops)
    assert rows["finetune_5"]["gflops"] == pytest.approx(5 * rows["finetune_1"]["gflops"])
    assert rows["finetune_5"]["seconds"] > rows["finetune_1"]["seconds"] > 0
    for row in rows.values():
        assert row["test_forward_gflops"] == pytest.approx(row["forward_gflops"] * 64 / 160)

    def feature_file():
        tuned = finetune_stage.tuned_checkpoint(work, snapshot, TARGET, {})
        return work.features_of.path(tuned, work.source(TARGET, "train"))

    path = feature_file()
    assert path.exists()
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(finetune_stage.VERSIONS, "transfer", VERSIONS["transfer"] + 1)
        assert feature_file() != path
    work.close()


def test_key_of_fine_tuned_features_is_that_of_earlier_versions():
    """Else every fine-tuned feature on disk would be computed again."""
    tuning = FinetuneSettings(batch_size=32)
    optimizer = {
        "decay_factor": 0.1, "decay_norm_and_bias": True, "learning_rate": 0.3, "milestones": [],
        "min_learning_rate": 0.0, "momentum": 0.9, "name": "sgd", "nesterov": False, "schedule": "constant",
        "warmup": 0.0, "warmup_learning_rate": 0.0, "weight_decay": 0.0,
    }  # fmt: skip
    earlier = {
        "augment": [], "batch_size": 32, "checkpoints": None, "epochs": 100, "num_seeds": None, "optimizer": optimizer,
        "steps": None,
    }  # fmt: skip
    key = finetune_stage.tuning_key
    assert key(tuning, {"learning_rate": 0.3}) == json.dumps(earlier, sort_keys=True)
    other_beta = {"optimizer": dataclasses.replace(tuning.optimizer, b2=0.98)}
    changes = ({}, {"head_std": 0.1}, {"microbatches": 2}, other_beta)
    assert len({key(dataclasses.replace(tuning, **change), {}) for change in changes}) == 4
