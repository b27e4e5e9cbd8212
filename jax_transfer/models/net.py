"""From NNX modules to pure functions on plain dictionaries: the only file that splits and merges modules.

A module is called as `module(images, train, rngs) -> Output`. `train` (a Python bool) switches BatchNorm to
batch statistics and dropout on; `rngs` is an `nnx.Rngs` with a "dropout" stream, or None. Modules hold
`nnx.Param` and `nnx.BatchStat` variables and nothing else: build `nnx.Dropout` without `rngs` and hand it the
ones of the call.

Leaves travel between the module and the dictionaries by name, never by position: a checkpoint turns list
indices into strings, and those sort 0, 1, 10, 11, 2, which would permute the layers of a list longer than ten.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jax_transfer import trees
from jax_transfer.records import InputError


class Output(NamedTuple):
    """What a net says of a batch.

    Attributes:
      logits: float32, what the classification head gives; [b, 0] for a net without one.
      features: float32, what the classification head reads.
      maps: what is pooled to the features, a place of the image each; None where a net does not give them.
      projection: what a projection head gives, such as a contrastive loss's; None where a net has none.
    """

    logits: Float[Array, "b s"]
    features: Float[Array, "b d"]
    maps: Float[Array, "b h w c"] | None = None
    projection: Float[Array, "b p"] | None = None


@dataclasses.dataclass(frozen=True)
class Net:
    """A model as pure functions of `params` and `stats`, nested dictionaries of float32 arrays with string keys.

    The three functions are jitted, and may be jitted, differentiated and vmapped again. They raise InputError
    where the names or shapes of `params` or `stats` are not this net's. `jax.eval_shape(net.init, key)` gives
    the abstract trees, the target to restore a checkpoint into.

    Attributes:
      name: the key in MODELS.
      num_classes: columns of the logits (s); 0 for a net without a head, whose `params` have nothing at `classifier`.
      feature_dim: columns of the features (d).
      min_image_size: smallest height and width, in pixels; the caller checks.
      init: `init(key) -> (params, stats)`. `stats` is {} for a model without BatchNorm.
      apply: `apply(params, stats, images) -> Output`, evaluation mode. images: float [b, h, w, 3], normalised.
      apply_train: `apply_train(params, stats, images, key) -> (Output, new_stats)`, training mode: BatchNorm
        normalises by the statistics of the (global) batch, and `key` draws the dropout masks.
      classifier: path of the classification head in `params`, such as ("fc",), or where `with_new_head` puts one.
      shapes: flat name -> shape of each array of {"params", "stats"}.
    """

    name: str
    num_classes: int
    feature_dim: int
    min_image_size: int
    init: Callable
    apply: Callable
    apply_train: Callable
    classifier: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict, compare=False, repr=False)


def make_net(
    name: str,
    make_module: Callable[[nnx.Rngs], nnx.Module],
    *,
    num_classes: int,
    feature_dim: int,
    min_image_size: int,
    classifier: tuple[str, ...],
) -> Net:
    """Turns a module into a Net. `make_module` is traced here, so no weights are allocated.

    Args:
      name, num_classes, feature_dim, min_image_size, classifier: see `Net`.
      make_module: builds the module from an `nnx.Rngs`; the module's calling convention is at the head of
        this file. Arrays without elements, such as the kernel [d, 0] of a head for 0 classes, are left out of the
        dictionaries, so that a module needs no code for a net without a head.

    Raises:
      TypeError: if the module holds variables other than parameters and BatchNorm statistics.
    """
    module = nnx.eval_shape(lambda: make_module(nnx.Rngs(0)))
    graph, abstract_params, abstract_stats, rest = nnx.split(module, nnx.Param, nnx.BatchStat, ...)
    if others := ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(rest)]:
        raise TypeError(f"{name} holds state that is neither Param nor BatchStat: {', '.join(others)}")

    def merge(params, stats):
        return nnx.merge(
            graph,
            _to_state(abstract_params, params, f"params do not fit {name} with {num_classes} classes"),
            _to_state(abstract_stats, stats, f"stats do not fit {name}"),
        )

    def init(key):
        module = make_module(nnx.Rngs(key))
        return _to_dict(nnx.state(module, nnx.Param)), _to_dict(nnx.state(module, nnx.BatchStat))

    def apply(params, stats, images):
        return merge(params, stats)(images, train=False, rngs=None)

    def apply_train(params, stats, images, key):
        module = merge(params, stats)
        output = module(images, train=True, rngs=nnx.Rngs(dropout=key))
        return output, _to_dict(nnx.state(module, nnx.BatchStat))

    return Net(
        name=name,
        num_classes=num_classes,
        feature_dim=feature_dim,
        min_image_size=min_image_size,
        init=jax.jit(init),
        apply=jax.jit(apply),
        apply_train=jax.jit(apply_train),
        classifier=classifier,
        shapes={**_shapes("params", abstract_params), **_shapes("stats", abstract_stats)},
    )


def with_new_head(params, net: Net, key, std: float = 0.01):
    """Returns `params` with a fresh classification head for the classes of `net`; all else is kept.

    The kernel is drawn from N(0, std^2), the bias is 0 (Goyal et al., 2017, section 5.1). `params` may have
    been trained for any number of classes, or come without a head. A `net` without a head gets none.
    """
    if not net.num_classes:
        return without_head(params, net)
    head = {
        "kernel": gaussian(key, (net.feature_dim, net.num_classes), std),
        "bias": jnp.zeros(net.num_classes, jnp.float32),
    }
    return _replace(params, net.classifier, head)


def without_head(params, net: Net):
    """Returns `params` without the classification head, if they have one."""
    flat, head = trees.flatten(params), "/".join((*net.classifier, ""))
    return trees.unflatten({name: leaf for name, leaf in flat.items() if not name.startswith(head)})


def gaussian(key, shape: tuple[int, ...], std: float) -> Array:
    """Draws float32 values from N(0, std^2).

    They are drawn flat: `jax.random.normal(key, shape)` has the same values, but takes several times longer to
    compile for a shape of four dimensions, and a deep net has a hundred of them.
    """
    return (std * jax.random.normal(key, (math.prod(shape),), jnp.float32)).reshape(shape)


def _replace(tree, path, value):
    """A copy of a nested dictionary with the subtree at `path` replaced."""
    first, *rest = path
    return {**tree, first: _replace(tree.get(first, {}), rest, value) if rest else value}


def _shapes(kind: str, abstract) -> dict[str, tuple[int, ...]]:
    return {f"{kind}/{name}": variable.shape for name, _, variable in _named(abstract) if variable.size}


def _named(state):
    """(flat name, path, variable) of each variable of an NNX state."""
    return [("/".join(map(str, path)), path, variable) for path, variable in nnx.to_flat_state(state)]


def _to_dict(state) -> dict:
    """The arrays of an NNX state as a nested dictionary with string keys."""
    return trees.unflatten({name: variable[...] for name, _, variable in _named(state) if variable.size})


def _to_state(abstract, tree, message: str):
    """The NNX state of `abstract`'s structure that holds the arrays of `tree`, matched by name."""
    variables, flat = _named(abstract), trees.flatten(tree)
    # Only names and shapes must agree: a caller may hold its weights in another dtype.
    expected = {name: jax.ShapeDtypeStruct(v.shape, jnp.float32) for name, _, v in variables if v.size}
    found = {name: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.float32) for name, leaf in flat.items()}
    if different := trees.difference(trees.unflatten(expected), trees.unflatten(found), limit=3):
        raise InputError(f"{message}: {different.replace(chr(10), '; ')}")
    flat |= {name: jnp.zeros(variable.shape, jnp.float32) for name, _, variable in variables if not variable.size}
    return nnx.from_flat_state([(path, variable.replace(flat[name])) for name, path, variable in variables])
