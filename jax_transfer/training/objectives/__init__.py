"""Training objectives, one per file: `OBJECTIVES[name](net, augment, **settings) -> Objective`.

`net` has no head (`num_classes=0`) if the objective needs none. `augment` holds the names of the augmentations in the
config. Keyword arguments with defaults are settings of the objective and become fields of `config.pretrain.<name>`.
"""

from jax_transfer.training.objectives.objective import Objective as Objective
from jax_transfer.training.objectives.supervised import supervised

OBJECTIVES = {"supervised": supervised}
