"""The protocols in configs/ are those that their papers state."""

import pathlib

import numpy as np
import pytest

from helpers.source_files import config_file, get_config
from jax_transfer.checkpoints import load_checkpoint
from jax_transfer.data import catalog
from jax_transfer.study import checks, settings
from jax_transfer.study.epochs import evaluated_snapshots

SHENZHEN = "folder:data/shenzhen_cxr?train_fraction=0.3"


def schedule(optimizer):
    return optimizer.schedule, optimizer.milestones, optimizer.decay_factor


@pytest.mark.parametrize("target", ("tfds:cifar10", "tfds:cifar100"))
def test_resnet50_transfers_to_cifar_with_adam_and_two_decays(target):
    config = get_config("resnet50_imagenet", "full")
    checks.check(config)
    frozen, tuned = settings.probe_settings(config, target), settings.finetune_settings(config, target)
    assert (frozen.epochs, frozen.steps, frozen.learning_rates) == (150, None, (0.1,))
    assert (tuned.epochs, tuned.steps, tuned.optimizer.name, tuned.optimizer.learning_rate) == (150, None, "adam", 0.1)
    assert schedule(frozen) == schedule(tuned.optimizer) == ("step", (1 / 3, 2 / 3), 0.1)


def test_resnet50_transfers_to_shenzhen_for_a_thousand_iterations():
    config = get_config("resnet50_imagenet", "full")
    assert len(config.targets) == 10 and config.targets[-1] == SHENZHEN and "shenzhen_cxr" in catalog.CATALOG
    frozen, tuned = settings.probe_settings(config, SHENZHEN), settings.finetune_settings(config, SHENZHEN)
    assert (frozen.steps, frozen.learning_rates) == (1000, (0.001,))
    assert (tuned.steps, tuned.optimizer.learning_rate) == (1000, 0.01)
    for target in config.targets[2:-1]:
        frozen, tuned = settings.probe_settings(config, target), settings.finetune_settings(config, target)
        assert (frozen.steps, frozen.learning_rates, frozen.schedule) == (6000, (0.01,), "constant")
        assert (tuned.steps, tuned.optimizer.learning_rate) == (9000, 0.1)


# --- reuse of pre-training data

VARIANTS = [("uot_resnet18", variant) for variant in config_file("uot_resnet18").VARIANTS] + [
    ("uot_moco", variant) for variant in ("full", "cost_scale", "gaps", "smoke")
]


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_reuse_names_selections_that_exist_and_variants_are_valid(name, variant):
    config = get_config(name, variant).copy_and_resolve_references()
    if variant != "smoke":
        config.checkpoints = ("random:resnet18",)  # in place of a file
    checks.check(config)
    for target in config.targets:
        ways = settings.finetune_settings(config, target).reuse
        assert len({(way.objective, way.selection) for way in ways}) == len(ways)
        assert {way.selection for way in ways if way.selection} <= set(config.select.selections)
        labels = [n for n, selection in config.select.selections.items() if selection["strategy"] == "labels"]
        by_label = any(way.selection in labels for way in ways)
        assert target in config.select.labels or not by_label or variant == "reduced"  # which has names in common
    tunings = [settings.finetune_settings(config, target) for target in config.targets]
    ways = {(way.objective, way.selection or "") for tuning in tunings for way in tuning.reuse}
    for entry in config.paper:
        plain = (entry["objective"], entry["selection"]) == ("supervised", "")
        assert plain or entry["what"] == "recall" or (entry["objective"], entry["selection"]) in ways
        assert entry["what"] == "FT" or entry["selection"] in config.select.selections


@pytest.mark.parametrize(
    ("name", "averages"),
    [
        ("uot_resnet18", {"TABLE_1A": (78.98, 79.34, 79.32, 79.84, 80.15)}),
        ("uot_moco", {"TABLE_1B": (81.82, 82.83, 82.76, 84.75, 82.56, 83.16, 83.17), "TABLE_2": (83.04,)}),
    ],
)
def test_numbers_of_the_paper_have_its_averages(name, averages):
    """The paper rounds to two decimals."""
    for table, expected in averages.items():
        found = [np.mean(row) for row in getattr(config_file(name), table).values()]
        np.testing.assert_allclose(found, expected, atol=0.00501)


@pytest.mark.parametrize("name", ["uot_resnet18", "uot_moco"])
def test_reuse_trains_as_the_paper_says(name):
    config = get_config(name, "full")
    for target in config.targets:
        tuning = settings.finetune_settings(config, target)
        assert (tuning.epochs, tuning.steps, tuning.batch_size, tuning.num_seeds) == (100, None, 256, 3)
        assert schedule(tuning.optimizer) == ("step", (0.6, 0.8), 0.1)
        assert (tuning.optimizer.name, tuning.optimizer.nesterov, tuning.choose) == ("sgd", True, "validation")
    assert set(config.metrics.to_dict().values()) == {"accuracy"}


def test_related_classes_are_those_of_the_authors(reference_dir):
    with np.load(reference_dir / "uot" / "resnet18_ImageNet_means.npz") as means:
        wnids, is_bird, kinds = (means[name] for name in ("wnid", "is_bird", "name"))
    resnet18, moco = config_file("uot_resnet18"), config_file("uot_moco")
    assert set(resnet18.BIRDS.split()) == set(wnids[is_bird]) and resnet18.BIRDS == moco.BIRDS
    assert set(resnet18.DOG_BREEDS.split()) == set(wnids[kinds == "dog"])
    assert (len(resnet18.BIRDS.split()), len(resnet18.DOG_BREEDS.split())) == (59, 118)


def test_smoke_of_moco_reads_a_file_in_the_layout_of_moco():
    (given,) = get_config("uot_moco", "smoke").checkpoints
    path, _, model = given.partition("=")
    checkpoint = load_checkpoint(path, model, keep_projection=True)
    assert "projection" in checkpoint.params and not checkpoint.has_head
    assert any("module.encoder_q" in note for note in checkpoint.notes)
    before = pathlib.Path(path).read_bytes()
    assert config_file("uot_moco").moco_file() == pathlib.Path(path) and before == pathlib.Path(path).read_bytes()


# --- NeuCRaB

TRAINING_IMAGES = {"imagenet2012": 1_281_167, "inaturalist2018": 437_513, "places365": 1_803_460}
FAMILIES = {"inception_v": 4, "inception_resnet": 1, "mobilenet": 6, "resnet": 2}


@pytest.mark.parametrize(
    ("name", "own"), [("neucrab_group1", 14), ("neucrab_group2", 12), ("neucrab_group3", 13), ("neucrab_resnet101", 12)]
)
def test_groups_have_as_many_checkpoints_as_the_paper_says_and_one_from_scratch(name, own):
    """The two BigGANs of group I are given by the user."""
    config = get_config(name, "full")
    checks.check(config)
    *trained, scratch = evaluated_snapshots(config)
    assert len(trained) == own and scratch.name == f"random {config.model.name}"
    assert config.finetune.choose == "test" and not config.finetune.checkpoints


def test_group_3_has_thirteen_architectures():
    names = [model["name"] for model in settings.models(get_config("neucrab_group3", "full")).values()]
    found = {family: sum(name.startswith(family) for name in names) for family in FAMILIES}
    assert found == FAMILIES and len(names) == sum(FAMILIES.values()) == 13


@pytest.mark.parametrize("name", ["neucrab_group2", "neucrab_resnet101"])
def test_all_sources_train_for_300k_steps_with_a_checkpoint_after_each_decay(name):
    config = get_config(name, "full")
    assert [s.origin.number for s in evaluated_snapshots(config)[:-1]] == 3 * [90_000, 180_000, 270_000, 300_000]
    assert settings.sources(config) == [f"tfds:{source}" for source in TRAINING_IMAGES]
    assert schedule(config.pretrain.optimizer) == ("step", (0.3, 0.6, 0.9), 0.1)


def test_epochs_in_the_head_of_group_2_are_those_of_its_steps():
    config, head = get_config("neucrab_group2", "full"), " ".join(config_file("neucrab_group2").__doc__.split())
    epochs = [round(config.pretrain.steps * config.pretrain.batch_size / n) for n in TRAINING_IMAGES.values()]
    assert "{} epochs of ImageNet, {} of iNaturalist and {} of Places-365".format(*epochs) in head
    assert f"{catalog.CATALOG['inaturalist2018'].num_classes:,} species, 437,513 images" in head


def test_the_resnet101_group_is_group_2_with_a_deeper_net():
    two, deeper = (get_config(name, "full").to_dict() for name in ("neucrab_group2", "neucrab_resnet101"))
    differing = {field for field in two if two[field] != deeper[field]}
    # Only the paper's groups I and II have its heat map, and its numbers of this group are not known.
    assert differing == {"name", "model", "checkpoints", "scores", "paper_tables"}
    assert list(deeper["scores"]) == [score for score in two["scores"] if "?" not in score]
    assert deeper["model"] == {**two["model"], "name": "resnet101"}
