"""The smoke variants of the configs: one pre-training for all that start from `tiny`."""

import pytest

from helpers.source_files import REPOSITORY, get_config
from jax_transfer.study import checks
from jax_transfer.study.config import default_config
from jax_transfer.study.epochs import pretrainings
from jax_transfer.study.smoke import tiny

STUDIES = sorted(
    path.stem for path in (REPOSITORY / "configs").glob("*.py") if "jax_transfer.study" in path.read_text()
)


@pytest.mark.parametrize("name", [name for name in STUDIES if name not in ("quickstart", "t2t_vit_14_imagenet")])
def test_smoke_variants_share_one_pre_training(name):
    config, shared = get_config(name, "smoke"), tiny(default_config())
    checks.check(config)
    first = pretrainings(config)[0]
    assert (first.model, first.source) == (shared.model.name, shared.source.dataset)
    for section in ("pretrain", "preprocessing", "seed"):
        assert config[section] == shared[section]


def test_every_study_has_a_smoke_variant():
    assert len(STUDIES) >= 6
    for name in STUDIES:
        checks.check(get_config(name, "smoke"))
