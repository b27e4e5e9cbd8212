"""Training objectives, one per file: `OBJECTIVES[name](net, augment, **settings) -> Objective`.

`net` has no head (`num_classes=0`) if the objective needs none. `augment` holds the names of the augmentations in the
config. Keyword arguments with defaults are settings of the objective and become fields of `config.pretrain.<name>`.

REUSE holds objectives for fine-tuning alone, which reuse what a checkpoint was pre-trained on.
"""

from jax_transfer.training.objectives.cotuning import cotuning
from jax_transfer.training.objectives.joint import joint
from jax_transfer.training.objectives.objective import Objective as Objective
from jax_transfer.training.objectives.objective import Reuse
from jax_transfer.training.objectives.supervised import supervised
from jax_transfer.training.objectives.weak_strong import weak_strong

OBJECTIVES = {"supervised": supervised}

REUSE = {
    "joint": Reuse(joint, feeds=("train", "source"), settings=("num_source_classes", "head_std")),
    "weak_strong": Reuse(weak_strong, feeds=("train", "source")),
    "cotuning": Reuse(cotuning, feeds=("train",), arrays=("relationship", "source_head")),
}
