"""Turns NNX modules into pure functions of plain dictionaries; no other file splits or merges modules.

A module is called as `module(images, train, rngs) -> Output`. With `train` (a Python bool), BatchNorm uses the
statistics of the batch and dropout is active. `rngs` is an `nnx.Rngs` with a "dropout" stream, or None. Modules hold
only `nnx.Param` and `nnx.BatchStat` variables: build `nnx.Dropout` without `rngs` and pass it the `rngs` of the call.

A module whose images are made of patches may also have a method `encode(images, kept, train, rngs) -> tokens`.

Arrays are matched between the module and the dictionaries by name, never by position: checkpoints turn list indices
into strings, which sort as 0, 1, 10, 11, 2, so matching by position would permute the layers of a list longer than ten.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jax_transfer import trees
from jax_transfer.records import InputError


class Output(NamedTuple):
    """The outputs of a net for a batch.

    Attributes:
      logits: float32, output of the classification head; [b, 0] for a net without a head.
      features: float32, input of the classification head.
      maps: features of each place of an image: the map before pooling, in the dtype of the computation, whose mean over
        the places is the features; of a transformer the tokens of the patches after the last LayerNorm, float32. None
        if the net does not return them.
      projection: float32, output of a projection head for a contrastive loss, before the loss normalises it; None if
        the net has no such head. `with_projection` adds one, and `load_checkpoint(..., keep_projection=True)` reads one
        from a file.
    """

    logits: Float[Array, "b s"]
    features: Float[Array, "b d"]
    maps: Float[Array, "b i j c"] | None = None
    projection: Float[Array, "b p"] | None = None


@dataclasses.dataclass(frozen=True)
class Net:
    """A model as pure functions of `params` and `stats`, nested dictionaries of float32 arrays with string keys.

    The three functions are jitted, and can be jitted, differentiated and vmapped again. They raise InputError if the
    names or shapes of `params` or `stats` do not fit the net. `jax.eval_shape(net.init, key)` returns the abstract
    trees into which a checkpoint is restored.

    Attributes:
      name: the key in MODELS.
      num_classes: columns of the logits (s); 0 for a net without a head, where `params` has no entry at `classifier`.
      feature_dim: columns of the features (d).
      min_image_size: smallest height and width of the images, in pixels; the caller has to check it.
      init: `init(key) -> (params, stats)`. `stats` is {} for a model without BatchNorm.
      apply: `apply(params, stats, images) -> Output`, in evaluation mode. images: float [b, h, w, 3], normalised.
      apply_train: `apply_train(params, stats, images, key) -> (Output, new_stats)`, in training mode: BatchNorm
        normalises with the statistics of the global batch, or of its groups, and the dropout masks are drawn with
        `key`. The outputs of its blocks carry the name BLOCK.
      classifier: path of the classification head in `params`, such as ("fc",).
      encode_train: `encode_train(params, stats, images, kept, key) -> tokens` float32 [b, 1 + m, d] of the class token
        and of the patches `kept` int [b, m] of each image, which alone are seen, in training mode. Patches are numbered
        row by row. None for a net that needs all of an image.
      shapes: flat name -> shape of each array of {"params", "stats"}.
      projection: columns of the outputs of the linear layers of the projection; () for a net without one.
    """

    name: str
    num_classes: int
    feature_dim: int
    min_image_size: int
    init: Callable
    apply: Callable
    apply_train: Callable
    classifier: tuple[str, ...]
    encode_train: Callable | None = None
    shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    projection: tuple[int, ...] = ()


class Functions(NamedTuple):
    """A module as jitted pure functions, see `pure_functions`; the attributes are those of `Net`, for any input."""

    init: Callable
    apply: Callable
    apply_train: Callable
    shapes: dict[str, tuple[int, ...]]
    encode_train: Callable | None


def pure_functions(name: str, make_module: Callable[[nnx.Rngs], nnx.Module]) -> Functions:
    """Turns a module into pure functions. `make_module` is only traced, so no weights are allocated.

    Args:
      name: describes the module in messages.
      make_module: builds the module from an `nnx.Rngs`; the docstring of this file describes how the module is called.
        Arrays without elements, such as the kernel [d, 0] of a head for 0 classes, are left out of the dictionaries, so
        that a module needs no special code for a net without a head.

    Raises:
      TypeError: if the module holds variables other than parameters and BatchNorm statistics.

    >>> class Twice(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.factor = nnx.Param(jnp.full(1, 2.0))
    ...     def __call__(self, x, train, rngs):
    ...         return self.factor[...] * x
    >>> functions = pure_functions("twice", Twice)
    >>> params, stats = functions.init(jax.random.key(0))
    >>> functions.apply(params, stats, jnp.ones(3)).tolist()
    [2.0, 2.0, 2.0]
    """
    module = nnx.eval_shape(lambda: make_module(nnx.Rngs(0)))
    graph, abstract_params, abstract_stats, rest = nnx.split(module, nnx.Param, nnx.BatchStat, ...)
    if others := ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(rest)]:
        raise TypeError(f"{name} holds state that is neither Param nor BatchStat: {', '.join(others)}")

    def merge(params, stats) -> Any:
        return nnx.merge(
            graph,
            _to_state(abstract_params, params, f"params do not fit {name}"),
            _to_state(abstract_stats, stats, f"stats do not fit {name}"),
        )

    def init(key):
        module = make_module(nnx.Rngs(key))
        return _to_dict(nnx.state(module, nnx.Param)), _to_dict(nnx.state(module, nnx.BatchStat))

    def apply(params, stats, inputs):
        return merge(params, stats)(inputs, train=False, rngs=None)

    def apply_train(params, stats, inputs, key):
        module = merge(params, stats)
        output = module(inputs, train=True, rngs=nnx.Rngs(dropout=key))
        return output, _to_dict(nnx.state(module, nnx.BatchStat))

    def encode_train(params, stats, images, kept, key):
        whole: Any = merge(params, stats)
        return whole.encode(images, kept, train=True, rngs=nnx.Rngs(dropout=key))

    shapes = {**_shapes("params", abstract_params), **_shapes("stats", abstract_stats)}
    encode = jax.jit(encode_train) if hasattr(module, "encode") else None
    return Functions(jax.jit(init), jax.jit(apply), jax.jit(apply_train), shapes, encode)


def make_net(
    name: str,
    make_module: Callable[[nnx.Rngs], nnx.Module],
    *,
    num_classes: int,
    feature_dim: int,
    min_image_size: int,
    classifier: tuple[str, ...],
) -> Net:
    """Makes a Net from a module.

    Args:
      name, num_classes, feature_dim, min_image_size, classifier: see `Net`.
      make_module: as in `pure_functions`; the module returns an `Output`.

    Raises:
      TypeError: if the module holds variables other than parameters and BatchNorm statistics.

    >>> class Tiny(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.fc = nnx.Linear(3, 2, rngs=rngs)
    ...     def __call__(self, images, train, rngs):
    ...         features = images.mean((1, 2))
    ...         return Output(self.fc(features), features)
    >>> net = make_net("tiny", Tiny, num_classes=2, feature_dim=3, min_image_size=1, classifier=("fc",))
    >>> net.shapes
    {'params/fc/bias': (2,), 'params/fc/kernel': (3, 2)}
    >>> params, stats = net.init(jax.random.key(0))
    >>> net.apply(params, stats, jnp.ones((1, 4, 4, 3))).features.tolist()
    [[1.0, 1.0, 1.0]]
    """
    functions = pure_functions(f"{name} with {num_classes} classes", make_module)
    return Net(
        name=name,
        num_classes=num_classes,
        feature_dim=feature_dim,
        min_image_size=min_image_size,
        classifier=classifier,
        **functions._asdict(),
    )


def map_dim(net: Net) -> int:
    """Returns the number of channels of `Output.maps`.

    Raises:
      InputError: if the net does not return maps.

    >>> from jax_transfer.models.resnet import resnet10
    >>> map_dim(resnet10(num_classes=0, width=8))
    64
    """
    images = jax.ShapeDtypeStruct((1, net.min_image_size, net.min_image_size, 3), jnp.float32)
    output = jax.eval_shape(net.apply, *jax.eval_shape(net.init, jax.random.key(0)), images)
    if output.maps is None:
        raise InputError(f"{net.name} does not return the maps before pooling (Output.maps): use another model.")
    return output.maps.shape[-1]


def num_parameters(net: Net) -> int:
    """Counts the parameters of a net without its head and projection, which depend on the data that it was trained on.

    >>> from jax_transfer.models.resnet import resnet10
    >>> num_parameters(resnet10(num_classes=0, width=8)) == num_parameters(resnet10(num_classes=1000, width=8))
    True
    """
    heads = tuple("/".join(("params", *names, "")) for names in (net.classifier, (PROJECTION,)))
    return sum(
        math.prod(shape)
        for name, shape in net.shapes.items()
        if name.startswith("params/") and not name.startswith(heads)
    )


BLOCK = "block"  # see `block_output`
PROJECTION = "projection"  # name of the projection in `params`, see `with_projection`


def block_output(x: Array) -> Array:
    """Names the output of a block BLOCK; its values are unchanged.

    A training step that saves memory (`make_train_step`, `remat`) keeps only the arrays with this name for the backward
    pass and computes all others again, so every net names the outputs of its blocks.

    >>> block_output(jnp.ones(3)).tolist()
    [1.0, 1.0, 1.0]
    """
    return checkpoint_name(x, BLOCK)


def with_new_head(params, net: Net, key, std: float = 0.01):
    """Returns `params` with a new classification head for the classes of `net`; the other parameters are kept.

    The kernel is drawn from N(0, std^2) and the bias is 0 (Goyal et al., 2017, section 5.1). `params` may have been
    trained for any number of classes, or lack a head. If `net` has no head, the head is removed.

    >>> from jax_transfer.models.resnet import resnet10
    >>> five, three = (resnet10(num_classes=n, width=8) for n in (5, 3))
    >>> params, stats = jax.eval_shape(five.init, jax.random.key(0))
    >>> with_new_head(params, three, jax.random.key(0))["fc"]["kernel"].shape
    (64, 3)
    """
    if not net.num_classes:
        return without_head(params, net)
    head = {
        "kernel": gaussian(key, (net.feature_dim, net.num_classes), std),
        "bias": jnp.zeros(net.num_classes, jnp.float32),
    }
    return with_head(params, net, head)


def with_head(params, net: Net, head: dict[str, Array]):
    """Returns `params` with the classification head {"kernel": [d, s], "bias": [s]}; the other parameters are kept.

    >>> from jax_transfer.models.resnet import resnet10
    >>> head = {"kernel": jnp.zeros((64, 3)), "bias": jnp.zeros(3)}
    >>> sorted(with_head({"conv1": {}}, resnet10(num_classes=3, width=8), head))
    ['conv1', 'fc']
    """
    return _replace(params, net.classifier, head)


def without_head(params, net: Net):
    """Returns `params` without the classification head."""
    flat, head = trees.flatten(params), "/".join((*net.classifier, ""))
    return trees.unflatten({name: leaf for name, leaf in flat.items() if not name.startswith(head)})


@functools.cache
def with_projection(net: Net, widths: tuple[int, ...]) -> Net:
    """Returns a net that also computes a projection of its features: linear layers with ReLU between them.

    It is the projection head of SimCLR (Chen et al., 2020, arXiv:2002.05709, section 2) and MoCo v2, or with one layer
    that of MoCo v1. `params` holds it under "projection", with the names "0", "2", ... that torch's Sequential gives to
    its linear layers; the other arrays are those of `net`. Equal arguments give the same Net object.

    Args:
      net: a net without a projection.
      widths: columns of the output of each layer; the last one is that of the projection.

    >>> from jax_transfer.models.resnet import resnet10
    >>> net = with_projection(resnet10(num_classes=5, width=8), (64, 16))
    >>> params, stats = jax.eval_shape(net.init, jax.random.key(0))
    >>> params["projection"]["2"]["kernel"].shape
    (64, 16)
    >>> jax.eval_shape(net.apply, params, stats, jnp.zeros((2, 32, 32, 3))).projection.shape
    (2, 16)
    """
    inputs = (net.feature_dim, *widths)
    shapes = {}
    for i, (width_in, width) in enumerate(itertools.pairwise(inputs)):
        shapes |= {f"{2 * i}/kernel": (width_in, width), f"{2 * i}/bias": (width,)}

    def init(key):
        params, stats = net.init(key)
        draws = {name: jax.random.fold_in(key, i) for i, name in enumerate(shapes)}
        flat = {
            name: gaussian(draws[name], shape, shape[0] ** -0.5) if name.endswith("kernel") else jnp.zeros(shape)
            for name, shape in shapes.items()
        }
        return {**params, PROJECTION: trees.unflatten(flat)}, stats

    def project(params, output: Output) -> Output:
        flat = trees.flatten(params.get(PROJECTION, {}))
        expected = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
        _check_names_and_shapes(expected, flat, f"the projection in params does not fit {net.name}")
        x = output.features
        for i in range(len(widths)):
            x = (jax.nn.relu(x) if i else x) @ flat[f"{2 * i}/kernel"] + flat[f"{2 * i}/bias"]
        return output._replace(projection=x)

    def apply(params, stats, images):
        return project(params, net.apply(without_projection(params), stats, images))

    def apply_train(params, stats, images, key):
        output, stats = net.apply_train(without_projection(params), stats, images, key)
        return project(params, output), stats

    return dataclasses.replace(
        net,
        init=jax.jit(init),
        apply=jax.jit(apply),
        apply_train=jax.jit(apply_train),
        shapes={**net.shapes, **{f"params/{PROJECTION}/{name}": shape for name, shape in shapes.items()}},
        projection=widths,
    )


def without_projection(params):
    """Returns `params` without the projection; they are unchanged if they have none.

    >>> without_projection({"fc": {}, "projection": {"0": {}}})
    {'fc': {}}
    """
    return {name: tree for name, tree in params.items() if name != PROJECTION}


def gaussian(key, shape: tuple[int, ...], std: float) -> Array:
    """Draws float32 values from N(0, std^2).

    The values are drawn as a vector and then reshaped: `jax.random.normal(key, shape)` gives the same values, but takes
    several times longer to compile for four-dimensional shapes, and a deep net has about a hundred of these.

    >>> gaussian(jax.random.key(0), (2, 3), std=0.01).shape
    (2, 3)
    """
    return (std * jax.random.normal(key, (math.prod(shape),), jnp.float32)).reshape(shape)


def _replace(tree, path, value):
    """Returns a copy of a nested dictionary with the subtree at `path` replaced."""
    first, *rest = path
    return {**tree, first: _replace(tree.get(first, {}), rest, value) if rest else value}


def _shapes(kind: str, abstract) -> dict[str, tuple[int, ...]]:
    """Returns {flat name: shape} of the variables of an NNX state."""
    return {f"{kind}/{name}": variable.shape for name, _, variable in _named(abstract) if variable.size}


def _named(state):
    """Returns (flat name, path, variable) of each variable of an NNX state."""
    return [("/".join(map(str, path)), path, variable) for path, variable in nnx.to_flat_state(state)]


def _to_dict(state) -> dict:
    """Returns the arrays of an NNX state as a nested dictionary with string keys."""
    return trees.unflatten({name: variable[...] for name, _, variable in _named(state) if variable.size})


def _to_state(abstract, tree, message: str):
    """Returns an NNX state with the structure of `abstract` and the arrays of `tree`, matched by name.

    Raises:
      InputError: if a name or shape differs.
    """
    variables, flat = _named(abstract), trees.flatten(tree)
    expected = {name: jax.ShapeDtypeStruct(v.shape, jnp.float32) for name, _, v in variables if v.size}
    _check_names_and_shapes(expected, flat, message)
    flat |= {name: jnp.zeros(variable.shape, jnp.float32) for name, _, variable in variables if not variable.size}
    return nnx.from_flat_state([(path, variable.replace(flat[name])) for name, path, variable in variables])


def _check_names_and_shapes(expected: dict, flat: dict, message: str) -> None:
    """Checks that flat dictionaries agree in names and shapes; the caller may keep its weights in another dtype.

    Raises:
      InputError: if they do not; it begins with `message`.
    """
    found = {name: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.float32) for name, leaf in flat.items()}
    if different := trees.difference(trees.unflatten(expected), trees.unflatten(found), limit=3):
        raise InputError(f"{message}: {different.replace(chr(10), '; ')}")
