"""Operations on nested dictionaries of arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_transfer import trees


def small_tree(seed=0):
    a, b, c = jax.random.split(jax.random.key(seed), 3)
    return {
        "layer": {"10": {"kernel": jax.random.normal(a, (2, 3))}, "2": {"kernel": jax.random.normal(b, (2, 3))}},
        "bias": jax.random.normal(c, (4,)).astype(jnp.bfloat16),
    }


def assert_trees_equal(expected, found):
    assert trees.difference(expected, found) == ""
    jax.tree.map(np.testing.assert_array_equal, expected, found)


def test_stack_adds_a_leading_axis():
    several = [small_tree(seed) for seed in range(3)]
    stacked = trees.stack(several)
    assert stacked["layer"]["2"]["kernel"].shape == (3, 2, 3)
    for i, expected in enumerate(several):
        assert_trees_equal(expected, jax.tree.map(lambda leaf, i=i: leaf[i], stacked))


def test_stack_names_the_leaf_that_does_not_fit():
    other = small_tree() | {"bias": jnp.zeros(5, jnp.bfloat16)}
    with pytest.raises(ValueError, match=r"tree 1 .*\n.*bias expected bfloat16\[4\], found bfloat16\[5\]"):
        trees.stack([small_tree(), other])


def test_stack_refuses_to_promote_dtypes():
    other = small_tree() | {"bias": jnp.zeros(4, jnp.float32)}
    with pytest.raises(ValueError, match="differs: bias"):
        trees.stack([small_tree(), other])


def test_stack_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        trees.stack([])


def test_unflatten_undoes_flatten_and_names_are_sorted():
    flat = trees.flatten(small_tree())
    assert list(flat) == ["bias", "layer/10/kernel", "layer/2/kernel"]
    assert_trees_equal(small_tree(), trees.unflatten(flat))


def test_flatten_keeps_each_leaf_with_its_name():
    tree = {str(i): {"x": np.full(1, i)} for i in range(12)}
    assert all(leaf[0] == int(name.split("/")[0]) for name, leaf in trees.flatten(tree).items())


def test_flatten_refuses_a_key_with_a_slash():
    with pytest.raises(ValueError, match="'/'"):
        trees.flatten({"a": {"b/c": 1}})


def test_difference_is_empty_for_arrays_and_their_shapes():
    assert trees.difference(jax.eval_shape(small_tree), small_tree()) == ""


def test_difference_names_each_leaf_that_differs():
    expected = {"a": jnp.zeros(2), "b": {"c": jnp.zeros(3)}, "d": jnp.zeros(1), "e": jnp.zeros(1)}
    found = {"b": {"c": jnp.zeros((3, 1))}, "d": jnp.zeros(1, jnp.int32), "e": jnp.ones(1), "f": jnp.zeros(4)}
    assert trees.difference(expected, found).splitlines() == [
        "missing: a float32[2]",
        "unexpected: f float32[4]",
        "differs: b/c expected float32[3], found float32[3, 1]",
        "differs: d expected float32[1], found int32[1]",
    ]


def test_difference_is_truncated_at_its_limit():
    lines = trees.difference({str(i): jnp.zeros(1) for i in range(9)}, {}, limit=2).splitlines()
    assert len(lines) == 3 and lines[-1] == "... and 7 more"


def test_size_bytes_is_equal_for_arrays_and_shapes():
    assert trees.size_bytes(small_tree()) == trees.size_bytes(jax.eval_shape(small_tree)) == 2 * 6 * 4 + 4 * 2


def test_fingerprint_ignores_insertion_order_and_array_type():
    tree = small_tree()
    reordered = {name: jax.device_get(tree[name]) for name in reversed(tree)}
    assert list(reordered) != list(tree)
    assert trees.fingerprint(reordered) == trees.fingerprint(tree)


def test_fingerprint_changes_with_names_dtypes_shapes_and_values():
    x = np.arange(4, dtype=np.float32)
    variants = [{"a": x}, {"b": x}, {"a": x.view(np.int32)}, {"a": x.reshape(2, 2)}, {"a": x[::-1]}, {"a": {"a": x}}]
    assert len({trees.fingerprint(tree) for tree in variants}) == len(variants)
