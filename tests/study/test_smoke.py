"""The smoke variants of the configs: one pre-training for all that start from `tiny` and keep its pre-training."""

import re

import pytest

from helpers.source_files import REPOSITORY, get_config
from jax_transfer.study import checks
from jax_transfer.study.config import default_config
from jax_transfer.study.epochs import pretrainings
from jax_transfer.study.smoke import tiny

STUDIES = sorted(
    path.stem for path in (REPOSITORY / "configs").glob("*.py") if "jax_transfer.study.config" in path.read_text()
)


# The first five do not start from `tiny`, the sixth trains by steps, and the others have objectives of their own.
ALONE = (
    *("quickstart", "t2t_vit_14_imagenet", "study_checkpoints", "uot_resnet18", "uot_moco", "neucrab_group2"),
    *("moco_v2_resnet50_imagenet", "pretraining_data_clip", "pretraining_data_simclr", "neucrab_group1"),
)
OWN_PRETRAINING = r"pretrain\.(steps|objective|others) ="


@pytest.mark.parametrize("name", [name for name in STUDIES if name not in ALONE])
def test_smoke_variants_share_one_pre_training(name):
    config, shared = get_config(name, "smoke"), tiny(default_config())
    checks.check(config)
    first = pretrainings(config)[0]
    assert (first.model, first.source) == (shared.model.name, shared.source.dataset)
    for section in ("pretrain", "preprocessing", "seed"):
        assert config[section] == shared[section]


def test_ci_shares_the_pre_training_of_exactly_these_variants():
    """`.ci/run` recognises them by their text."""
    texts = {name: (REPOSITORY / "configs" / f"{name}.py").read_text() for name in STUDIES}
    sharing = {name for name, text in texts.items() if "tiny(" in text and not re.search(OWN_PRETRAINING, text)}
    assert sharing == set(STUDIES) - set(ALONE)
    assert f"grep -q 'tiny(' \"$config\" && ! grep -qE '{OWN_PRETRAINING}'" in (REPOSITORY / ".ci/run").read_text()


def test_every_study_has_a_smoke_variant():
    assert len(STUDIES) >= 6
    for name in STUDIES:
        checks.check(get_config(name, "smoke"))
