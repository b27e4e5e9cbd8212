"""What a training minimises: one file an objective, `OBJECTIVES[name](net, augment, **its own settings) -> Objective`.

`net` is without a head (`num_classes=0`) for an objective that has none. `augment` are the augmentations that the config
names; keyword arguments with defaults are the objective's own settings, fields of `config.pretrain.<name>`.
"""

from jax_transfer.training.objectives.objective import Objective as Objective
from jax_transfer.training.objectives.supervised import supervised

OBJECTIVES = {"supervised": supervised}
