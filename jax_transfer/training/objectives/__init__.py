"""What a training minimises: one file an objective.

An objective is `(net, params, stats, batch, key, **settings) -> loss, (stats, metrics)`. `stats` is the
dictionary of all that changes by other means than the gradient: BatchNorm statistics here, a momentum
encoder or a queue of keys elsewhere.
"""

from jax_transfer.training.objectives.supervised import supervised

OBJECTIVES = {"supervised": supervised}

# Whether the logits of what an objective trains are of the classes of the source; a contrastive projection's are not.
HAS_HEAD = {"supervised": True}
