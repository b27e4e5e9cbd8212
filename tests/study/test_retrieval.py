"""The stage "retrieval": its rows, how it resumes bit for bit, what fails, and what is refused."""

import contextlib
import json
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from helpers.images import write_images
from helpers.source_files import REPOSITORY, get_config
from helpers.studies import environment, results_without_times, run_stages, tiny_config
from jax_transfer import preemption
from jax_transfer.checkpoints.trajectory import Trajectory
from jax_transfer.data.sources import load_source
from jax_transfer.data.words import read_words
from jax_transfer.records import InputError
from jax_transfer.report import page
from jax_transfer.study import captioned, checks
from jax_transfer.study import retrieval as stage
from jax_transfer.study.stages import written_by
from jax_transfer.study.workspace import Workspace

DATASET = "embedded:digits?train=120&test=40&captions=attributes"
EPOCHS = 3
RETRIEVAL = {
    "stages": ("pretrain", "retrieval"),
    "model__width": 8.0,
    "targets": (),
    "metrics": {},
    "pretrain__epochs": 1,
    "trajectory__epochs": "1",
    "data__eval_batch_size": 16,
    **{
        f"retrieval__{name}": value
        for name, value in {
            "datasets": (DATASET,),
            "fractions": (0.5, 1.0),
            "folds": (1, 2),
            "epochs": EPOCHS,
            "batch_size": 16,
            "augment": (),
            "embedding_dim": 16,
            "word_dim": 8,
            "patience": 0,
            "optimizer__learning_rate": 3e-3,
        }.items()
    },
}


def config(**changes):
    return tiny_config(**{**RETRIEVAL, **changes})


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Returns the working directory of the study, its rows, and the embeddings that were ranked."""
    workdir, ranked = tmp_path_factory.mktemp("retrieval"), []
    rankings = stage.rankings

    def recorded(embeddings, owner, folds):
        ranked.append((embeddings, owner, folds))
        return rankings(embeddings, owner, folds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "rankings", recorded)
        rows = run_stages(config(), workdir)
    return workdir, rows["retrieval"], ranked


def plain_recall(queries, items, matches, cutoff):
    """Ranks one query at a time, with equally similar items before the matching ones."""
    found = []
    for query, own in zip(queries, matches, strict=True):
        similarity = np.array([(item @ query.T).max() for item in items])
        found.append(np.sum(similarity[~own] >= similarity[own].max() - 1e-6) < cutoff)
    return np.mean(found)


def test_rows_equal_a_plain_ranking_of_the_embeddings(study):
    _, rows, ranked = study
    tests = [row for row in rows if row["split"] == "test" and row["folds"] == 1]
    ranked = [
        (embeddings, owner) for embeddings, owner, folds in ranked if len(embeddings[0]) == 40 and folds == (1, 2)
    ]
    assert len(tests) == len(ranked) == 2
    for row, ((images, captions), owner) in zip(tests, ranked, strict=True):
        matches = owner == np.arange(40)[:, None]
        for cutoff in (1, 5, 10):
            there = plain_recall(images, captions, matches, cutoff)
            back = plain_recall(captions, images, matches.T, cutoff)
            assert row[f"i2t_recall@{cutoff}"] == pytest.approx(there) and row[f"t2i_recall@{cutoff}"] == pytest.approx(
                back
            )
        six = [row[f"{way}_recall@{k}"] for way in ("i2t", "t2i") for k in (1, 5, 10)]
        assert row["rsum"] == pytest.approx(sum(six)) and row["chance_rsum"] > 0


def test_each_share_and_protocol_has_a_row_of_both_splits(study):
    workdir, rows, _ = study
    keys = [(row["checkpoint"], row["epoch"], row["fraction"], row["split"], row["folds"]) for row in rows]
    assert keys == [("1", 1, f, s, k) for f in (0.5, 1.0) for s in ("validation", "test") for k in (1, 2)]
    by_key = dict(zip(keys, rows, strict=True))
    for (_, _, fraction, split, folds), row in by_key.items():
        num_images = {"validation": 20, "test": 40}[split]
        assert (row["num_train"], row["num_images"], row["num_captions"]) == (
            100 * fraction,
            num_images / folds,
            5 * num_images,
        )
        assert row["seconds"] > 0 and row["gflops"] > 0 and row["error"] == "" and 1 <= row["best_epoch"] <= EPOCHS
        texts = [caption for own in load_source(DATASET, "test").captions for caption in own]
        if split == "test":
            images = [i for i in range(40) for _ in range(5)]
            shared = [
                t
                for t, i in zip(texts, images, strict=True)
                if any(t == u and i != j for u, j in zip(texts, images, strict=True))
            ]
            assert row["num_duplicates"] == len(shared)
    assert by_key["1", 1, 1.0, "test", 1]["gflops"] == pytest.approx(2 * by_key["1", 1, 0.5, "test", 1]["gflops"])
    (folder,) = (workdir / "retrieval").iterdir()
    assert [path.name for path in folder.iterdir()] == ["words.json"]  # the states are deleted
    train = load_source(DATASET, "train")
    assert "contrast" in read_words(folder / "words.json").words and len(train) == 120


def test_the_best_epoch_is_that_of_the_validation_images(study):
    _, rows, ranked = study
    judged = [embeddings for embeddings, _, folds in ranked if folds == (1,)]
    assert len(judged) == 2 * EPOCHS and all(len(images) == 20 for images, _ in judged)
    for index, row in enumerate(row for row in rows if row["split"] == "validation" and row["folds"] == 1):
        own = judged[index * EPOCHS : (index + 1) * EPOCHS]
        owner = np.repeat(np.arange(20), 5)
        sums = [stage.rankings(embeddings, owner, (1,))[1].rsum for embeddings in own]
        assert row["rsum"] == pytest.approx(max(sums)) and row["best_epoch"] == 1 + int(np.argmax(sums))


def test_it_is_not_run_again_and_what_a_killed_run_left_is_deleted(study, monkeypatch):
    workdir, rows, _ = study
    work = Workspace(config(), workdir)
    left = stage._training_folder(work, stage.Run(work.snapshots[0], DATASET, 1.0))
    work.close()
    (left / "6").mkdir(parents=True)
    monkeypatch.setattr(stage, "_train", None)
    assert run_stages(config(stages=("retrieval",)), workdir)["retrieval"] == rows
    assert not left.exists() and left.parent.exists()


def test_embeddings_of_test_images_that_are_not_finite_are_a_failure(study, tmp_path, monkeypatch):
    (tmp_path / "checkpoints").symlink_to(study[0] / "checkpoints")
    rankings = stage.rankings
    monkeypatch.setattr(
        stage, "rankings", lambda x, owner, folds: None if len(x[0]) == 40 else rankings(x, owner, folds)
    )
    rows = run_stages(config(stages=("retrieval",), retrieval__fractions=(0.5,)), tmp_path)["retrieval"]
    assert [row["error"] for row in rows if row["split"] == "validation"] == ["", ""]
    assert [row["error"] for row in rows if row["split"] == "test"] == [
        "the embeddings of test images are not finite"
    ] * 2


@pytest.mark.parametrize(
    ("stop_at", "tuned"),
    [
        pytest.param(14, False, id="within an epoch"),
        pytest.param(3, False, id="after the last step of an epoch, before its validation"),
        pytest.param(4, True, id="while a tuned net is validated", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_resumes_bit_for_bit(stop_at, tuned, study, tmp_path, monkeypatch):
    """It is asked once before the training, after each of 3 steps of an epoch, and 9 batches of its validation."""
    workdir, rows, _ = study
    settings = {"stages": ("retrieval",), "retrieval__fractions": (0.5,), "retrieval__tune_backbone": tuned}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
        (folder / "checkpoints").symlink_to(workdir / "checkpoints")
    expected = (
        run_stages(config(**settings), whole) if tuned else {"retrieval": [r for r in rows if r["fraction"] == 0.5]}
    )
    asked, saved = [0], []

    def requested():
        asked[0] += 1
        return asked[0] == stop_at + 1

    monkeypatch.setattr(preemption, "requested", requested)
    with pytest.raises(preemption.Preempted):
        run_stages(config(**settings), parts)
    (folder,) = (path.parent for path in parts.glob("retrieval/*/*/[0-9]*"))
    with contextlib.closing(Trajectory(folder, alone=True)) as trajectory:
        (step,) = trajectory.epochs()
        saved.append(trajectory.metadata(step)["progress"])
    assert step == (5 if stop_at == 14 else 3) and len(saved[0]["history"]) == (stop_at == 14) and saved[0]["begun"]
    found = run_stages(config(**settings), parts)
    times = dict.fromkeys(("seconds",))
    assert [{**row, **times} for row in found["retrieval"]] == [{**row, **times} for row in expected["retrieval"]]


def test_the_learning_rate_is_halved_without_another_program(study, tmp_path, monkeypatch):
    workdir, _, _ = study
    (tmp_path / "checkpoints").symlink_to(workdir / "checkpoints")
    rates, programs = [], []
    one_epoch, falling = stage._one_epoch, iter((3.0, 2.0, 1.0))

    def recorded(share, state, progress, label):
        rates.append(float(state["learning_rate"]))
        epoch = one_epoch(share, state, progress, label)
        programs.append(share.many_steps._cache_size())
        return epoch

    def measured(self, kept, state, split, folds, stop=None):
        return {folds[0]: types.SimpleNamespace(rsum=next(falling), chance_rsum=0.0)}

    monkeypatch.setattr(stage, "_one_epoch", recorded)
    monkeypatch.setattr(stage._Share, "measure", measured)
    monkeypatch.setattr(stage, "_rows", lambda *arguments: ())
    run_stages(config(stages=("retrieval",), retrieval__fractions=(0.5,)), tmp_path)
    assert rates == pytest.approx([3e-3, 3e-3, 1.5e-3]) and programs == [1, 1, 1]


def test_divergence_is_a_row_with_the_reason_and_is_tried_again(study, tmp_path):
    workdir, _, _ = study
    (tmp_path / "checkpoints").symlink_to(workdir / "checkpoints")
    changes = {"stages": ("retrieval",), "retrieval__fractions": (0.5,), "retrieval__optimizer__learning_rate": 1e38}
    for _ in range(2):
        rows = run_stages(config(**changes), tmp_path)["retrieval"]
    assert [(row["split"], row["folds"]) for row in rows] == [("test", 1), ("test", 2)]
    assert all("not finite" in row["error"] and row["rsum"] is None for row in rows)
    text = page.write_report(tmp_path, written_by()).read_text(encoding="utf-8")
    assert "<h2>What failed</h2>" in text and "is not finite" in text


def test_the_report_shows_the_choice_and_the_tables(study):
    workdir, rows, _ = study
    text = page.write_report(workdir, written_by()).read_text(encoding="utf-8")
    assert "<h2>Image-text retrieval</h2>" in text and "but made from the names of the classes" in text
    assert "100 % of the training images (100), the mean of 2 folds of 20 images" in text
    best = max(row["rsum"] for row in rows if row["folds"] == 1 and row["split"] == "test")
    assert f"{100 * best:.2f}" in text


# --- what is refused


def captioned_folder(folder, count=24, caption=lambda split, i: f"picture {i} of {split}"):
    """Writes a folder with Karpathy's file: `count` images for training and 8 each for validation and testing."""
    splits = ["train"] * count + ["val"] * 8 + ["test"] * 8
    write_images(folder / "images", len(splits))
    names = [path.name for path in sorted((folder / "images").iterdir())]
    entries = [
        {"split": split, "filename": name, "sentences": [{"raw": caption(split, i)}]}
        for i, (split, name) in enumerate(zip(splits, names, strict=True))
    ]
    (folder / "dataset_mine.json").write_text(json.dumps({"images": entries}))
    return entries


def glove(path, dim):
    path.write_text("".join(f"{word} {' '.join(['0.5'] * dim)}\n" for word in ("picture", "of", "train")))
    return str(path)


def broken(folder, change):
    entries = captioned_folder(folder)
    change(entries)
    (folder / "dataset_mine.json").write_text(json.dumps({"images": entries}))


PROBLEMS = {
    "captions of missing images": (
        lambda f: broken(f, lambda entries: entries[30].update(filename="gone.png")),
        {},
        r"captions without an image: 1 \(such as gone\.png\)",
    ),
    "images without captions": (
        lambda f: broken(f, lambda entries: entries[0].update(sentences=[])),
        {},
        r"images without a caption: 1 \(such as images/",
    ),
    "a caption of unknown words only": (
        lambda f: broken(f, lambda entries: entries[35].update(sentences=[{"raw": "ein Bild"}, {"raw": "picture"}])),
        {},
        r"test: 1 of 9 captions have no word of the vocabulary of \d+ words \(such as 'ein Bild'\)",
    ),
    "a GloVe file of another dimension": (
        captioned_folder,
        {"retrieval__word_vectors": 4},
        r"glove\.txt has 4 numbers in its first line: expected a word and 8 \(config\.retrieval\.word_dim\)",
    ),
    "folds": (
        captioned_folder,
        {"retrieval__folds": (1, 3)},
        r"3 does not divide the 8 images of captions:.*, validation",
    ),
    "a large batch": (
        captioned_folder,
        {"retrieval__batch_size": 32},
        r"0\.5 of captions:.* has 12 training images, fewer",
    ),
    "a batch of one": (captioned_folder, {"retrieval__batch_size": 1}, r"config\.retrieval: batch_size = 1: the loss"),
    "an odd embedding": (
        captioned_folder,
        {"retrieval__embedding_dim": 5},
        r"embedding_dim = 5: expected an even number",
    ),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_a_study_that_cannot_work_is_refused_in_one_line(case, study, tmp_path):
    make, changes, message = PROBLEMS[case]
    make(tmp_path / "data")
    if dim := changes.get("retrieval__word_vectors"):
        changes = {"retrieval__word_vectors": glove(tmp_path / "glove.txt", dim)}
    (tmp_path / "checkpoints").symlink_to(study[0] / "checkpoints")
    own = {
        "stages": ("retrieval",),
        "retrieval__datasets": (f"captions:{tmp_path / 'data'}",),
        "retrieval__folds": (1,),
    }
    with pytest.raises(InputError, match=message) as caught:
        run_stages(config(**{**own, "retrieval__batch_size": 8, **changes}), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"retrieval__datasets": ()}, r"config\.retrieval\.datasets is empty: name a data set with captions"),
        ({"retrieval__fractions": (0.0,)}, r"config\.retrieval\.fractions\[0\] = 0\.0: must lie in \(0, 1\]"),
        ({"stages": ("probe", "retrieval")}, r"config\.targets is empty"),
    ],
)
def test_a_config_without_sense_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        checks.check(config(**changes))


def test_a_data_set_without_captions_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"digits has no captions: use captions:DIR"):
        run_stages(config(retrieval__datasets=("embedded:digits",)), tmp_path)


def test_three_splits_of_a_folder_are_used_and_a_fifth_is_held_out_otherwise(tmp_path):
    captioned_folder(tmp_path / "data")
    both = (f"captions:{tmp_path / 'data'}", DATASET)
    work = Workspace(config(retrieval__datasets=both), tmp_path)
    sizes = []
    for dataset in both:
        data = captioned.captioned(work, dataset)
        sizes.append((len(data.train), *(len(source) for source in data.held_out.values())))
        assert data is captioned.captioned(work, dataset)
    assert sizes == [(24, 8, 8), (100, 20, 40)]
    work.close()


def test_a_smaller_share_is_contained_in_a_larger_one(tmp_path):
    work = Workspace(config(), tmp_path)
    data = captioned.captioned(work, DATASET)
    quarter, half = (captioned.share_of(work, data, share) for share in (0.25, 0.5))
    pixels = [{image.tobytes() for image in source.read(range(len(source)))} for source in (quarter, half)]
    assert len(quarter) == 25 and pixels[0] < pixels[1] and quarter.extra["tokens"].shape[1] == 5
    work.close()


def test_the_config_holds_the_papers_tables_whose_best_epoch_is_70():
    full = get_config("retrieval_pvse", "full")
    checks.check(full)
    tables = {where: [e for e in full.retrieval.paper if e["where"] == where] for where in ("Table 2", "Table 3")}
    for where, entries in tables.items():
        assert [entry["epoch"] for entry in entries] == [50, 60, 70, 80, 90]
        assert max(entries, key=lambda entry: entry["rsum"])["epoch"] == 70
        assert {entry["fraction"] for entry in entries} == {{"Table 2": 1.0, "Table 3": 0.25}[where]}


# --- several processes

COMMAND = (
    "--config=configs/retrieval_pvse.py:smoke",
    "--config.source.dataset=embedded:digits?train=256&test=64",
    "--config.preprocessing.image_size=8",
    "--config.pretrain.epochs=1",
    "--config.trajectory.epochs=1",
    f"--config.retrieval.datasets=('{DATASET}',)",
    "--config.retrieval.batch_size=16",
    "--config.retrieval.fractions=(0.5, 1.0)",
    "--config.data.eval_batch_size=16",
)


def start(workdir, log, *launcher):
    command = [*(launcher or (sys.executable, "-m", "jax_transfer.main")), *COMMAND, f"--workdir={workdir}"]
    output = log.open("a")
    options = {"cwd": REPOSITORY, "env": environment(PYTHON=sys.executable), "stdout": output, "stderr": output}
    return subprocess.Popen(command, **options)


@pytest.mark.slow
def test_two_processes_train_together_and_stop_and_resume_together(tmp_path):
    log, both = tmp_path / "log", ("bash", "launch/local_processes.sh", "2")
    assert start(tmp_path / "one", log).wait(300) == 0, log.read_text()[-3000:]
    log = tmp_path / "log_of_both"
    process, deadline = start(tmp_path / "two", log, *both), time.monotonic() + 300
    while "100 % of the images, epoch 2/5" not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == preemption.EXIT_CODE, log.read_text()[-3000:]
    assert start(tmp_path / "two", log, *both).wait(300) == 0, log.read_text()[-3000:]
    text = log.read_text()
    assert "Resuming retrieval checkpoint 1" in text and "Traceback" not in text
    one, two = (results_without_times(tmp_path / name)["retrieval.jsonl"] for name in ("one", "two"))
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        same = ("checkpoint", "fraction", "split", "folds", "num_train", "num_images", "num_captions", "num_duplicates")
        assert {name: a[name] for name in same} == {name: b[name] for name in same}
        assert b["rsum"] == pytest.approx(a["rsum"], abs=0.15)  # rounding changes ranks and grows with training
        assert b["gflops"] == pytest.approx(a["gflops"])
    assert [path.name for path in (tmp_path / "two" / "retrieval").glob("*/*")] == ["words.json"]
