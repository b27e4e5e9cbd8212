"""Models as pure functions of dictionaries of arrays: `MODELS[name](num_classes=..., dtype=...) -> Net`.

>>> import jax
>>> import jax.numpy as jnp
>>> net = MODELS["resnet10"](num_classes=5, width=8)
>>> params, stats = jax.eval_shape(net.init, jax.random.key(0))  # net.init(key) for real weights
>>> output = jax.eval_shape(net.apply, params, stats, jnp.zeros((2, 32, 32, 3)))
>>> output.logits.shape, output.features.shape
((2, 5), (2, 64))
"""

from jax_transfer.models.net import Net, Output, gaussian, make_net, with_new_head, with_projection
from jax_transfer.models.spec import Spec
from jax_transfer.models.zoo import MODELS

__all__ = ["MODELS", "Net", "Output", "Spec", "gaussian", "make_net", "with_new_head", "with_projection"]
