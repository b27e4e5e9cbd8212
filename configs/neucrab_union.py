"""NeuCRaB, all groups together: how well scores rank the checkpoints of several studies as one list.

    python -m jax_transfer.main --config=configs/neucrab_union.py --workdir=runs/neucrab_union

"Ranking Neural Checkpoints" (Li et al., CVPR 2021) unites its groups "to simulate a sufficiently large pool of
checkpoints"; the table is in its appendix, which is not in the document at hand, so no numbers of the paper stand here.

Nothing is computed again: the result files of the working directories in `config.unite` are read, and the checkpoints
of all of them are ranked together on the targets that they share. Run `neucrab_group1.py`, `neucrab_group2.py`,
`neucrab_group3.py` and `neucrab_resnet101.py` first, in any order; a group without results is left out, and joins when
this command runs again. Groups I and II both hold a ResNet-50 trained on ImageNet, by recipes of their own.

Our results: not measured at this size.

Variants: `full`; `smoke`, the recorded results in docs/results/neucrab_reduced, in seconds.
"""

import pathlib

from jax_transfer.choose import choose
from jax_transfer.study.unite import default_config

RECORDED = pathlib.Path(__file__).resolve().parents[1] / "docs" / "results"


def full():
    config = default_config()
    config.name = "NeuCRaB, all groups"
    config.unite = tuple(f"runs/neucrab_{group}" for group in ("group1", "group2", "group3", "resnet101"))
    return config


def smoke():
    config = full()
    config.unite = (str(RECORDED / "neucrab_reduced"),)
    return config


def get_config(variant: str = "full"):
    return choose({"full": full, "smoke": smoke}, variant, "variant of configs/neucrab_union.py")()
