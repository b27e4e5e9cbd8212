"""Trees of arrays (nested dictionaries, mostly): stack them, name their leaves, compare and fingerprint them.

A leaf's flat name is its path joined by "/", such as "layer1/0/conv1/kernel". Leaves are always addressed by
name, never by position: stringified list indices sort 0, 1, 10, 11, 2.
"""

import concurrent.futures
import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np


def stack(trees):
    """Stacks k equal-shaped trees into one whose leaves have a leading axis of size k.

    Raises:
      ValueError: if there are no trees, or if one differs from the first in names, shapes or dtypes.
    """
    trees = list(trees)
    if not trees:
        raise ValueError("stack needs at least one tree")
    for i, tree in enumerate(trees[1:], start=1):
        if message := difference(trees[0], tree):
            raise ValueError(f"tree {i} cannot be stacked with tree 0:\n{message}")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstack(tree) -> list:
    """Undoes `stack`: a list of k trees from one whose leaves all have a leading axis of size k.

    Raises:
      ValueError: if the leaves disagree on k.
    """
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(tree)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(f"unstack needs leaves with one common leading axis, found sizes {sorted(sizes)}")
    ((size,),) = sizes
    return [jax.tree.map(lambda leaf: leaf[i], tree) for i in range(size)]  # noqa: B023


def flatten(tree) -> dict:
    """Returns {flat name: leaf}, sorted by name. Empty dictionaries leave no trace.

    Raises:
      ValueError: if a key holds "/", which would make names ambiguous.
    """
    flat = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.count("/") != max(len(path) - 1, 0):
            raise ValueError(f"a key in the path {name!r} holds '/', which separates the parts of a flat name")
        flat[name] = leaf
    return dict(sorted(flat.items()))


def unflatten(flat) -> dict:
    """Undoes `flatten` for nested dictionaries with string keys."""
    tree = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def difference(expected, found, limit: int = 20) -> str:
    """Says how the names, shapes and dtypes of two trees differ; values are not compared.

    Args:
      expected, found: trees of arrays or `jax.ShapeDtypeStruct`s.
      limit: how many lines to write before "... and 7 more".

    Returns:
      One line per leaf that is missing, unexpected or of another shape or dtype; "" if there is none.
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
    """Bytes that the leaves of the tree (arrays or `jax.ShapeDtypeStruct`s) take."""
    return sum(math.prod(np.shape(leaf)) * _dtype(leaf).itemsize for leaf in jax.tree.leaves(tree))


def fingerprint(tree) -> str:
    """A hash (BLAKE2b, 32 hexadecimal digits) of the names, dtypes, shapes and values of a tree.

    The order in which a dictionary was filled does not matter, nor where the arrays live. Arrays must be
    addressable from this process.
    """
    flat = jax.device_get(flatten(tree))
    digest = hashlib.blake2b(digest_size=16)
    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        for name, values in zip(flat, pool.map(_hash, flat.values()), strict=True):
            digest.update(f"{name}\0{_describe(flat[name])}\0".encode() + values)
    return digest.hexdigest()


def _hash(leaf) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)).digest()


def _dtype(leaf):
    return leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


def _describe(leaf) -> str:
    return f"{_dtype(leaf).name}{list(np.shape(leaf))}"
