"""A study with language: CLIP learns from the names of classes, and recognises held-out images by them."""

import contextlib

import pytest

from helpers.studies import results_without_times, run_stages, tiny_config
from jax_transfer import devices, preemption
from jax_transfer.checkpoints.trajectory import Trajectory
from jax_transfer.data.batches import joined
from jax_transfer.data.sources import load_source
from jax_transfer.data.vocabulary import read_vocabulary
from jax_transfer.models.net import with_head
from jax_transfer.records import InputError
from jax_transfer.study import pretrain, text, zero_shot
from jax_transfer.study.text import FILE
from jax_transfer.study.workspace import Workspace
from jax_transfer.training.evaluation import classification
from jax_transfer.training.objectives import OBJECTIVES
from jax_transfer.training.optimizers import OptimizerSettings
from jax_transfer.transfer.finetune import Candidate, FinetuneSettings, finetune

TARGET = "embedded:digits?per_class=4"
CLIP = {
    "stages": ("pretrain", "features", "probe"),
    "model__width": 8.0,
    "source__dataset": "embedded:digits?train=640&captions=templates",
    "targets": (TARGET,),
    "pretrain__objective": "clip",
    "pretrain__epochs": 8,
    "pretrain__batch_size": 64,
    "pretrain__augment": (),
    "pretrain__optimizer__name": "adamw",
    "pretrain__optimizer__learning_rate": 3e-3,
    "trajectory__epochs": "0,8",
    "probe__methods": ("zero_shot",),
    "data__eval_batch_size": 360,
    **{
        f"pretrain__clip__{name}": value
        for name, value in {
            "vocabulary_size": 320,
            "context_length": 20,
            "embedding_dim": 32,
            "text_width": 32,
            "text_layers": 1,
            "text_heads": 2,
        }.items()
    },
}


def config(**changes):
    return tiny_config(**{**CLIP, **changes})


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Returns the working directory of the study, and its rows."""
    workdir = tmp_path_factory.mktemp("clip")
    return workdir, run_stages(config(), workdir)


def test_zero_shot_beats_chance_on_held_out_images_and_starts_at_chance(study):
    _, rows = study
    by_epoch = {row["epoch"]: row for row in rows["transfer"]}
    assert sorted(by_epoch) == [0, 8] and {row["method"] for row in rows["transfer"]} == {"zero_shot"}
    assert by_epoch[0]["accuracy"] < 0.25 and by_epoch[8]["accuracy"] > 0.5
    assert all(row["num_train"] == 0 and row["num_test"] == 359 and row["gflops"] > 0 for row in rows["transfer"])
    assert all(row["learning_rate"] is None for row in rows["transfer"])
    assert rows["pretrain"][-1]["train_loss"] < rows["pretrain"][1]["train_loss"]


def test_the_row_is_the_accuracy_of_the_net_with_the_head_and_fine_tuning_starts_there(study):
    workdir, rows = study
    work, expected = Workspace(config(), workdir), rows["transfer"][-1]["accuracy"]
    snapshot = work.snapshots[-1]
    tokens = zero_shot.class_tokens(work, snapshot.origin.pretraining, work.source(TARGET, "train").class_names)
    assert tokens.shape[:2] == (10, 80) and tokens.shape[2] <= 20
    head, _ = zero_shot.zero_shot_head(work, snapshot.origin, tokens)
    net, checkpoint = work.tuned_net(snapshot, TARGET), work.checkpoint(snapshot)
    test, mesh = work.feed(TARGET, "test", work.preprocessing), devices.make_mesh()
    model = {"params": with_head(checkpoint.params, net, head), "stats": checkpoint.stats}
    (metrics,) = classification(net, work.preprocessing, mesh, stacked=False)(model, test, 360, lambda: False)
    assert metrics["accuracy"] == pytest.approx(expected, abs=1e-6)
    # One step that changes nothing but the running statistics of BatchNorm, and those little.
    tuning = FinetuneSettings(steps=1, batch_size=40, optimizer=OptimizerSettings(learning_rate=1e-12))
    feed = joined({"train": (work.feed(TARGET, "train", work.preprocessing), 40)})
    (result,) = finetune(
        {"clip": checkpoint},
        [Candidate("clip", seed=0)],
        net,
        lambda: OBJECTIVES["supervised"](net, ()),
        feed,
        test,
        work.preprocessing,
        tuning,
        devices.make_mesh(sweep=1),
        head=lambda key, params, net: with_head(params, net, head),
        eval_batch_size=360,
    )
    assert result.metrics["accuracy"] == pytest.approx(expected, abs=0.08)
    work.close()


@pytest.mark.slow
def test_resuming_reads_the_vocabulary_and_equals_an_uninterrupted_run(study, tmp_path, monkeypatch):
    workdir, _ = study
    num_checks = [0]

    def requested():
        num_checks[0] += 1
        return num_checks[0] == 13  # within the second epoch

    monkeypatch.setattr(preemption, "requested", requested)
    for stops in (True, False):
        work = Workspace(config(stages=("pretrain",)), tmp_path)
        with pytest.raises(preemption.Preempted) if stops else contextlib.nullcontext():
            pretrain.run(work)
        work.close()
        monkeypatch.setattr(text, "train_vocabulary", None)  # not trained again
    assert (tmp_path / FILE).read_bytes() == (workdir / FILE).read_bytes()
    assert len(read_vocabulary(tmp_path / FILE)) <= 320
    own, whole = (results_without_times(folder)["pretrain.jsonl"] for folder in (tmp_path, workdir))
    assert own == whole
    fingerprints = []
    for folder in (tmp_path, workdir):
        with contextlib.closing(Trajectory(folder / "checkpoints", alone=True)) as trajectory:
            fingerprints.append(trajectory.metadata(8)["fingerprints"]["training"])
    assert fingerprints[0] == fingerprints[1]


def test_a_vocabulary_that_does_not_fit_is_refused(study, tmp_path):
    (tmp_path / "checkpoints" / "0").mkdir(parents=True)
    source = load_source(CLIP["source__dataset"], "train")
    with pytest.raises(InputError, match=r"vocabulary\.json cannot be read"):
        text.vocabulary(source, tmp_path, {"vocabulary_size": 320})
    (tmp_path / FILE).write_bytes((study[0] / FILE).read_bytes())
    with pytest.raises(InputError, match=r"has 320 tokens, more than the vocabulary_size = 300"):
        text.vocabulary(source, tmp_path, {"vocabulary_size": 300})


def test_only_checkpoints_with_language_are_able(tmp_path):
    both = config(pretrain__others=({"objective": "supervised"},))
    work = Workspace(both, tmp_path)
    able = zero_shot.with_language(work)
    assert {saved.pretraining.objective for saved in able.values()} == {"clip"} and len(able) < len(work.snapshots)
    work.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source__dataset": "embedded:digits?train=640"}, r"digits\?train=640 has no captions: use captions:DIR"),
        ({"pretrain__objective": "supervised"}, "no checkpoint of this study is pre-trained with language"),
        ({"pretrain__clip__vocabulary_size": 200}, r"clip\.vocabulary_size = 200: must lie in \[300, 100000\]"),
        ({"pretrain__batch_size": 1}, r"config\.pretrain with the objective clip: batch_size = 1: the loss compares"),
        ({"pretrain__clip__text_heads": 3}, "width 32 has 3 heads"),
        ({"probe__methods": ("zero-shot",)}, "Did you mean 'zero_shot'"),
    ],
)
def test_a_study_that_cannot_work_is_refused_in_one_line(changes, message, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        run_stages(config(**changes), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_clip_learns_cifar10_from_the_names_of_its_classes(tfds_dir, tmp_path):
    """1,024 images and a few epochs recognise held-out test images clearly better than chance, 0.1."""
    target = "tfds:cifar10?train=64&test=1000"
    changes = {
        "source__dataset": "tfds:cifar10?train=1024&captions=templates",
        "targets": (target,),
        "preprocessing__image_size": 32,
        "pretrain__epochs": 8,
        "pretrain__augment": ("pad_crop", "flip"),
        "pretrain__optimizer__learning_rate": 2e-3,
        "trajectory__epochs": "8",
        "data__eval_batch_size": 500,
    }
    (row,) = run_stages(config(**changes), tmp_path)["transfer"]
    assert row["accuracy"] > 0.18 and row["num_test"] == 1000
