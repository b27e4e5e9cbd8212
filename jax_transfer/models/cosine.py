"""A net whose head compares directions: logits are scaled cosines between an embedding and the weights of the classes.

It is the net of weight imprinting (Qi, Brown and Lowe, CVPR 2018, arXiv:1712.07136, section 3.1).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jax_transfer import trees
from jax_transfer.models.net import Net, Output, gaussian
from jax_transfer.numerics import unit

HEAD = "cosine"  # name of the new parameters in `params`
INITIAL_SCALE = 10.0


@functools.cache
def with_cosine_head(net: Net, num_classes: int, embedding_dim: int | None = None) -> Net:
    """Returns a net whose features have the length 1, and whose logits are their cosines with the classes' weights.

        f(x) = u / |u|,   u = W h(x) + b        logits_c = s w_c . f(x) / |w_c|

    with the features h(x) of `net` and a learned scale s. `params` holds those of `net`, and under "cosine" the
    "kernel" [e, c] with the columns w_c, the "scale" s, which begins at 10, and the "embedding" W, b if there is such a
    layer. Equal arguments give the same Net object.

    Args:
      net: a net without a head.
      num_classes: number of classes, c.
      embedding_dim: columns of f(x), e; None: those of h(x), without an embedding layer.

    >>> from jax_transfer.models.resnet import resnet10
    >>> net = with_cosine_head(resnet10(num_classes=0, width=8), num_classes=5, embedding_dim=16)
    >>> params, stats = net.init(jax.random.key(0))
    >>> output = net.apply(params, stats, jnp.ones((1, 32, 32, 3)))
    >>> output.logits.shape, round(float(jnp.linalg.norm(output.features)), 3)
    ((1, 5), 1.0)
    """
    columns = net.feature_dim if embedding_dim is None else embedding_dim
    shapes: dict[str, tuple[int, ...]] = {"kernel": (columns, num_classes), "scale": ()}
    if embedding_dim is not None:
        shapes |= {"embedding/kernel": (net.feature_dim, columns), "embedding/bias": (columns,)}

    def init(key):
        params, stats = net.init(key)
        return with_new_cosine_head(params, jax.random.fold_in(key, 1), cosine), stats

    def compare(params, output: Output) -> Output:
        head, x = params[HEAD], output.features.astype(jnp.float32)
        if embedding_dim is not None:
            x = x @ head["embedding"]["kernel"] + head["embedding"]["bias"]
        x = unit(x)
        return output._replace(logits=head["scale"] * (x @ unit(head["kernel"].T).T), features=x)

    def apply(params, stats, images):
        return compare(params, net.apply(without_cosine_head(params), stats, images))

    def apply_train(params, stats, images, key):
        output, stats = net.apply_train(without_cosine_head(params), stats, images, key)
        return compare(params, output), stats

    cosine = dataclasses.replace(
        net,
        num_classes=num_classes,
        feature_dim=columns,
        classifier=(HEAD,),
        init=jax.jit(init),
        apply=jax.jit(apply),
        apply_train=jax.jit(apply_train),
        shapes={**net.shapes, **{f"params/{HEAD}/{name}": shape for name, shape in shapes.items()}},
    )
    return cosine


def with_new_cosine_head(params, key, net: Net):
    """Returns the parameters of a net without a head, with a new head for a net that `with_cosine_head` has made.

    Kernels are drawn from N(0, 1 / rows), the bias is 0 and the scale 10.

    >>> from jax_transfer.models.resnet import resnet10
    >>> net = with_cosine_head(resnet10(num_classes=0, width=8), num_classes=5)
    >>> with_new_cosine_head({"conv1": {}}, jax.random.key(0), net)["cosine"]["kernel"].shape
    (64, 5)
    """
    prefix = f"params/{HEAD}/"
    shapes = {name.removeprefix(prefix): shape for name, shape in net.shapes.items() if name.startswith(prefix)}
    head = {"embedding/bias": jnp.zeros, "scale": lambda shape: jnp.full(shape, INITIAL_SCALE, jnp.float32)}
    flat = {
        name: head[name](shape) if name in head else gaussian(jax.random.fold_in(key, number), shape, shape[0] ** -0.5)
        for number, (name, shape) in enumerate(sorted(shapes.items()))
    }
    return {**params, HEAD: trees.unflatten(flat)}


def without_cosine_head(params):
    """Returns `params` without the head that `with_new_cosine_head` adds.

    >>> without_cosine_head({"conv1": {}, "cosine": {}})
    {'conv1': {}}
    """
    return {name: tree for name, tree in params.items() if name != HEAD}
