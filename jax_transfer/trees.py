"""Operations on trees of arrays, mostly nested dictionaries: stack, flatten, compare and fingerprint.

The flat name of a leaf is its path joined by "/", such as "layer1/0/conv1/kernel". Refer to leaves by
name and never by position, because list indices sort as strings: 0, 1, 10, 11, 2.
"""

import concurrent.futures
import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np


def stack(trees):
    """Stacks k trees with equal leaf shapes into one tree whose leaves have a leading axis of size k.

    >>> import jax.numpy as jnp
    >>> stack([{"w": jnp.zeros(3)}, {"w": jnp.ones(3)}])["w"].shape
    (2, 3)

    Raises:
      ValueError: if there are no trees, or if one differs from the first in names, shapes or dtypes.
    """
    trees = list(trees)
    if not trees:
        raise ValueError("trees is empty: expected at least one tree to stack")
    for i, tree in enumerate(trees[1:], start=1):
        if message := difference(trees[0], tree):
            raise ValueError(f"tree {i} cannot be stacked with tree 0:\n{message}")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def flatten(tree) -> dict:
    """Returns a dictionary flat name -> leaf, sorted by name. Empty dictionaries are dropped.

    >>> flatten({"conv": {"kernel": 1, "bias": 2}, "empty": {}})
    {'conv/bias': 2, 'conv/kernel': 1}

    Raises:
      ValueError: if a key contains "/", which would make flat names ambiguous.
    """
    flat = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.count("/") != max(len(path) - 1, 0):
            raise ValueError(f"a key in the path {name!r} contains '/', which separates the parts of a flat name")
        flat[name] = leaf
    return dict(sorted(flat.items()))


def unflatten(flat) -> dict:
    """Builds nested dictionaries from flat names: the inverse of `flatten` for trees of dictionaries with string keys.

    >>> unflatten({"conv/bias": 2, "conv/kernel": 1})
    {'conv': {'bias': 2, 'kernel': 1}}
    """
    tree = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def difference(expected, found, limit: int = 20) -> str:
    """Describes how two trees differ in names, shapes and dtypes; values are not compared.

    >>> import jax.numpy as jnp
    >>> print(difference({"w": jnp.zeros(3)}, {"w": jnp.zeros(4), "b": jnp.zeros(1)}))
    unexpected: b float32[1]
    differs: w expected float32[3], found float32[4]

    Args:
      expected, found: trees of arrays or `jax.ShapeDtypeStruct`s.
      limit: maximum number of lines before a last line such as "... and 7 more".

    Returns:
      One line for each leaf that is missing, unexpected, or has another shape or dtype; "" if the trees agree.
    """
    expected, found = ({name: _describe(leaf) for name, leaf in flatten(tree).items()} for tree in (expected, found))
    lines = [f"missing: {name} {expected[name]}" for name in expected if name not in found]
    lines += [f"unexpected: {name} {found[name]}" for name in found if name not in expected]
    lines += [
        f"differs: {name} expected {expected[name]}, found {found[name]}"
        for name in expected
        if name in found and expected[name] != found[name]
    ]
    if len(lines) > limit:
        lines = [*lines[:limit], f"... and {len(lines) - limit} more"]
    return "\n".join(lines)


def size_bytes(tree) -> int:
    """Returns the number of bytes in the leaves of a tree of arrays or `jax.ShapeDtypeStruct`s.

    >>> import jax.numpy as jnp
    >>> size_bytes({"w": jnp.zeros((2, 3)), "b": jnp.zeros(2, jnp.bfloat16)})
    28
    """
    return sum(math.prod(np.shape(leaf)) * _dtype(leaf).itemsize for leaf in jax.tree.leaves(tree))


def fingerprint(tree) -> str:
    """Hashes the names, dtypes, shapes and values of a tree (BLAKE2b, 32 hexadecimal digits).

    The result depends neither on the insertion order of dictionaries nor on the devices that hold the arrays. All
    arrays must be fully addressable from this process.

    >>> import jax.numpy as jnp
    >>> a, b = jnp.zeros(2), jnp.ones(3)
    >>> fingerprint({"a": a, "b": b}) == fingerprint({"b": b, "a": a})
    True
    """
    flat = jax.device_get(flatten(tree))
    digest = hashlib.blake2b(digest_size=16)
    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing releases the GIL
        for name, values in zip(flat, pool.map(_hash, flat.values()), strict=True):
            digest.update(f"{name}\0{_describe(flat[name])}\0".encode() + values)
    return digest.hexdigest()


def _hash(leaf) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data).digest()


def _dtype(leaf):
    return leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


def _describe(leaf) -> str:
    return f"{_dtype(leaf).name}{list(np.shape(leaf))}"
