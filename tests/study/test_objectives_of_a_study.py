"""A study may pre-train with several objectives or settings, each of which gives a trajectory of its own."""

import pytest

from helpers.source_files import get_config
from helpers.studies import results_without_times
from jax_transfer import study
from jax_transfer.checkpoints import load_checkpoint
from jax_transfer.records import InputError
from jax_transfer.study import checks, pretrain, settings
from jax_transfer.study.epochs import pretrainings
from jax_transfer.study.workspace import Workspace

SMOOTHED = {
    "supervised": {"label_smoothing": 0.1},
    "augment": (),
    "batch_size": 32,
    "optimizer": {"learning_rate": 0.02},
}


def make_config(*others):
    config = get_config("quickstart", "smoke")
    config.update_from_flattened_dict(
        {
            "model.width": 4.0,
            "source.dataset": "embedded:digits?train=160&test=64",
            "targets": ("embedded:digits?train=128&test=64",),
            "preprocessing.image_size": 8,
            "pretrain.batch_size": 64,
            "pretrain.epochs": 1,
            "stages": ("pretrain", "features", "probe", "report"),
            "probe.epochs": 2,
            "data.eval_batch_size": 64,
        }
    )
    config.pretrain.others = others
    return config


def test_each_objective_has_its_trajectory(tmp_path):
    study.run(make_config(SMOOTHED), tmp_path)
    found = results_without_times(tmp_path)
    names = ["supervised/0", "supervised/1", "supervised_2/0", "supervised_2/1"]
    assert [row["checkpoint"] for row in found["pretrain.jsonl"]] == names
    assert [row["step"] for row in found["pretrain.jsonl"]] == [0, 2, 0, 5]  # 160 images in batches of 64 and of 32
    assert {row["checkpoint"] for row in found["transfer.jsonl"]} == {*names}
    alone = make_config()
    alone.pretrain.update(SMOOTHED)
    study.run(alone, tmp_path / "alone")
    losses = [row["train_loss"] for row in results_without_times(tmp_path / "alone")["pretrain.jsonl"]]
    assert losses == [row["train_loss"] for row in found["pretrain.jsonl"][2:]]


def test_an_entry_replaces_only_what_it_gives():
    config = make_config(SMOOTHED)
    first, second = (recipe.section for recipe in settings.recipes(config).values())
    assert second.augment == () and first.augment == config.pretrain.augment
    assert second.optimizer.learning_rate == 0.02 and second.optimizer.schedule == first.optimizer.schedule
    assert second.supervised.label_smoothing == 0.1 and first.supervised.label_smoothing == 0.0
    assert [pretraining.name for pretraining in pretrainings(config)] == ["supervised", "supervised_2"]


def test_names_hold_model_source_and_objective():
    config = make_config(SMOOTHED)
    config.source.others = ("embedded:mnist_5k",)
    names = [pretraining.name for pretraining in pretrainings(config)]
    assert names == [f"{source}/{label}" for source in ("digits", "mnist_5k") for label in settings.recipes(config)]


def test_an_entry_may_have_a_source_of_its_own():
    names = [pretraining.name for pretraining in pretrainings(make_config({"source": "embedded:mnist_5k"}, SMOOTHED))]
    assert names == ["digits/supervised", "digits/supervised_3", "mnist_5k/supervised_2"]


def test_an_entry_may_replace_settings_of_the_model(tmp_path):
    config = make_config({"model": {"batch_norm_group": 16}})
    work = Workspace(config, tmp_path)
    assert [work.model(p).get("batch_norm_group") for p in work.pretrainings] == [None, 16]
    assert work.source_net(work.pretrainings[0]) is not work.source_net(work.pretrainings[1])
    pretrain.run(work)
    work.close()
    folders = (tmp_path, tmp_path / "others/supervised_2")
    settings_of = [load_checkpoint(folder / "checkpoints/1").settings for folder in folders]
    assert [found.get("batch_norm_group") for found in settings_of] == [None, 16]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"objective": "moco"}, r"config\.pretrain\.others\[0\]\.objective\): 'moco'"),
        ({"epochs": 3}, r"field of config\.pretrain\.others\[0\]: 'epochs'"),
        ({"supervised": {"smoothing": 0.1}}, r"field of config\.pretrain\.others\[0\]\.supervised: 'smoothing'"),
        ({"optimizer": {"learning_rate": -1.0}}, r"others\[0\]\.optimizer\.learning_rate = -1\.0: must be positive"),
        ({"batch_size": 0}, r"others\[0\]\.batch_size = 0"),
        ({"model": {"name": "resnet18"}}, r"field of config\.pretrain\.others\[0\]\.model: 'name'"),
        ({"model": {"batch_norm_group": 24}}, r"others\[0\]\.batch_size = 64 does not divide into the groups of batch"),
        ({}, r"others\[0\] is the same pre-training as config\.pretrain"),
    ],
)
def test_invalid_entry_is_refused(entry, message):
    with pytest.raises(InputError, match=message):
        checks.check(make_config(entry))
