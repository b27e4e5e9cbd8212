"""Training objectives, one per file: `OBJECTIVES[name](net, augment, **settings) -> Objective`.

`net` has no head (`num_classes=0`) if the objective needs none. `augment` holds the names of the augmentations in the
config. Keyword arguments with defaults are settings of the objective and become fields of `config.pretrain.<name>`.

REUSE holds objectives for fine-tuning alone, which reuse what a checkpoint was pre-trained on.
"""

from jax_transfer.training.objectives.clip import clip
from jax_transfer.training.objectives.cotuning import cotuning
from jax_transfer.training.objectives.joint import joint
from jax_transfer.training.objectives.moco_v2 import moco_v2
from jax_transfer.training.objectives.objective import Objective as Objective
from jax_transfer.training.objectives.objective import ReuseObjective
from jax_transfer.training.objectives.simclr import simclr
from jax_transfer.training.objectives.supervised import supervised
from jax_transfer.training.objectives.weak_strong import weak_strong

OBJECTIVES = {"supervised": supervised, "moco_v2": moco_v2, "simclr": simclr, "clip": clip}

REUSE = {
    "joint": ReuseObjective(joint, source_views=1, settings=("num_source_classes", "head_std")),
    "weak_strong": ReuseObjective(weak_strong, source_views=2),
    "cotuning": ReuseObjective(cotuning, source_views=0, arrays=("relationship", "source_head"), source_weight=2.3),
}
