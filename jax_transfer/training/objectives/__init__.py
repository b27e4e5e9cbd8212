"""Training objectives, one per file: `OBJECTIVES[name](net, augment, **settings) -> Objective`.

`net` has no head (`num_classes=0`) if the objective needs none. `augment` holds the names of the augmentations in the
config. Keyword arguments with defaults are settings of the objective and become fields of `config.pretrain.<name>`.

REUSE holds objectives for fine-tuning alone, which reuse what a checkpoint was pre-trained on.
"""

from jax_transfer.training.objectives.clip import clip
from jax_transfer.training.objectives.cotuning import cotuning
from jax_transfer.training.objectives.dino import dino
from jax_transfer.training.objectives.exemplar import exemplar
from jax_transfer.training.objectives.jigsaw import jigsaw
from jax_transfer.training.objectives.joint import joint
from jax_transfer.training.objectives.mae import mae
from jax_transfer.training.objectives.moco_v2 import moco_v2
from jax_transfer.training.objectives.objective import Objective as Objective
from jax_transfer.training.objectives.objective import ReuseObjective
from jax_transfer.training.objectives.relative_patch import relative_patch
from jax_transfer.training.objectives.rotation import rotation
from jax_transfer.training.objectives.semi_exemplar import semi_exemplar
from jax_transfer.training.objectives.semi_rotation import semi_rotation
from jax_transfer.training.objectives.simclr import simclr
from jax_transfer.training.objectives.sup_exemplar import sup_exemplar
from jax_transfer.training.objectives.supervised import supervised
from jax_transfer.training.objectives.vae import vae
from jax_transfer.training.objectives.wae_gan import wae_gan
from jax_transfer.training.objectives.wae_mmd import wae_mmd
from jax_transfer.training.objectives.wae_ukl import wae_ukl
from jax_transfer.training.objectives.weak_strong import weak_strong

OBJECTIVES = {
    "supervised": supervised,
    "moco_v2": moco_v2,
    "simclr": simclr,
    "dino": dino,
    "clip": clip,
    "rotation": rotation,
    "relative_patch": relative_patch,
    "jigsaw": jigsaw,
    "exemplar": exemplar,
    "sup_exemplar": sup_exemplar,
    "semi_rotation": semi_rotation,
    "semi_exemplar": semi_exemplar,
    "vae": vae,
    "wae_mmd": wae_mmd,
    "wae_gan": wae_gan,
    "wae_ukl": wae_ukl,
    "mae": mae,
}

REUSE = {
    "joint": ReuseObjective(joint, source_views=1, settings=("num_source_classes", "head_std")),
    "weak_strong": ReuseObjective(weak_strong, source_views=2),
    "cotuning": ReuseObjective(cotuning, source_views=0, arrays=("relationship", "source_head"), source_weight=2.3),
}
