"""The protocols in configs/ are those that their papers state."""

import pytest

from helpers.source_files import get_config
from jax_transfer.data import catalog
from jax_transfer.study import checks, settings

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
