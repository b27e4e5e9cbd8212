import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_transfer import trees
from jax_transfer.models import MODELS, make_net, with_new_head
from jax_transfer.models.t2t_vit import T2TViT, sinusoids, soft_split, t2t_vit_14, t2t_vit_t_14
from jax_transfer.models.transformer import Size, gaussian_002, gelu
from jax_transfer.models.vit import (
    VisionTransformer,
    deit_base_patch16_224,
    deit_small_patch16_224,
    deit_tiny_patch16_224,
    resize_position_embedding,
    uniform_fan_in,
    vit_base_patch16_224,
    vit_base_patch32_224,
    vit_small_patch16_224,
    vit_tiny_patch4_32,
    vit_tiny_patch16_224,
)
from jax_transfer.records import InputError

NAMES = {spec: name for name, spec in MODELS.items()}
# Parameters with 1,000 classes, as published with timm's weights.
PUBLISHED = {
    vit_tiny_patch16_224: 5_717_416,
    vit_small_patch16_224: 22_050_664,
    vit_base_patch16_224: 86_567_656,
    vit_base_patch32_224: 88_224_232,
}
DEIT = {
    deit_tiny_patch16_224: vit_tiny_patch16_224,
    deit_small_patch16_224: vit_small_patch16_224,
    deit_base_patch16_224: vit_base_patch16_224,
}
T2T = {t2t_vit_14: "TokenPerformer", t2t_vit_t_14: "TokenTransformer"}
FAMILIES = {"vit": Size(24, 2, 3), "transformer": Size(24, 1, 3), "performer": Size(24, 1, 3)}
TOKEN_DIM, IMAGE_SIZE = 8, 32
KEY = jax.random.key(0)


@functools.cache
def small(family, dtype="float32", size=None, image_size=IMAGE_SIZE, **rates):
    """Returns a net of one of the FAMILIES with one or two narrow blocks, for images of 32 pixels."""
    size = size or FAMILIES[family]
    rates = {"dropout": 0.0, "stochastic_depth": 0.0, **rates}

    def make_module(rngs):
        options = {"dtype": jnp.dtype(dtype), "rngs": rngs, **rates}
        if family == "vit":
            return VisionTransformer(size, 8, image_size, 5, **options)
        return T2TViT(family, size, TOKEN_DIM, image_size, 5, **{"token_dropout": 0.0, **options})

    sizes = {"num_classes": 5, "feature_dim": size.dim, "min_image_size": image_size}
    return make_net(family, make_module, classifier=("head",), **sizes)


@functools.cache
def twin(family):
    """Returns the torch twin of `small(family)`, with random weights."""
    pytest.importorskip("torch")
    from helpers import torch_twins_vit as twins

    if family == "vit":
        return twins.random(twins.VisionTransformer(*FAMILIES[family], 8, IMAGE_SIZE, 5))
    layer = {"transformer": twins.TokenTransformer, "performer": twins.TokenPerformer}[family]
    return twins.random(twins.T2TViT(layer, *FAMILIES[family], TOKEN_DIM, IMAGE_SIZE, 5))


@functools.cache
def weights(family):
    """Returns random (params, stats) of `small(family)`; compiling its `init` would take seconds."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        scaled = rng.normal(size=leaf.shape) * (0.2 if len(leaf.shape) == 1 else 1 / np.sqrt(max(leaf.shape[-2], 8)))
        return (scaled + (path[-1].key == "scale")).astype(np.float32)

    return jax.tree.map_with_path(draw, jax.eval_shape(small(family).init, KEY))


def random_images(n=4, size=IMAGE_SIZE, scale=1.0):
    return (scale * np.random.default_rng(0).normal(size=(n, size, size, 3))).astype(np.float32)


def assert_equals_twin(net, twin, images):
    from helpers.torch_twins import twin_output
    from helpers.torch_twins_vit import to_dicts

    logits, features = twin_output(twin, images)
    output = net.apply(*to_dicts(twin), images)
    np.testing.assert_allclose(output.logits, logits, rtol=1e-4, atol=1e-4 * np.abs(logits).max())
    np.testing.assert_allclose(output.features, features, rtol=1e-4, atol=1e-4 * np.abs(features).max())


def num_values(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("family", FAMILIES)
def test_output_equals_the_torch_twin(family):
    assert_equals_twin(small(family), twin(family), random_images())


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_norm_has_the_eps_of_the_torch_twin(family):
    """The input of the first LayerNorm has a variance of about 1e-6, so that the output depends on eps."""
    torch = pytest.importorskip("torch")
    tiny = copy.deepcopy(twin(family))
    if family == "vit":
        with torch.no_grad():
            for tensor in (tiny.cls_token, tiny.pos_embed, *tiny.patch_embed.parameters()):
                tensor *= 1e-3
    assert_equals_twin(small(family), tiny, random_images(scale=1.0 if family == "vit" else 1e-3))


def test_vit_base_of_224_pixels_equals_the_torch_twin():
    pytest.importorskip("torch")
    from helpers import torch_twins_vit as twins

    base = twins.random(twins.VisionTransformer(768, 12, 12, 16, 224, 10))
    assert_equals_twin(vit_base_patch16_224(num_classes=10), base, random_images(n=1, size=224))


@pytest.mark.parametrize("make", PUBLISHED, ids=NAMES.get)
def test_number_of_parameters_is_the_published_one(make):
    params, stats = jax.eval_shape(make(num_classes=1000).init, KEY)
    assert num_values(params) == PUBLISHED[make] and stats == {}


def test_deit_has_the_network_of_the_vit():
    for deit, same in DEIT.items():
        (name, *network), (same_name, *same_network) = deit.make.args, same.make.args
        assert (name, network) == (same_name.replace("vit", "deit"), same_network) and deit.network == same_name


@pytest.mark.parametrize("make", T2T, ids=NAMES.get)
def test_t2t_vit_has_the_arrays_of_the_torch_twin(make):
    pytest.importorskip("torch")
    from helpers import torch_twins_vit as twins

    full = twins.T2TViT(getattr(twins, T2T[make]), 384, 14, 6, 64, 224, 1000)
    expected = jax.eval_shape(lambda: twins.to_dicts(full))
    params, stats = jax.eval_shape(make(num_classes=1000).init, KEY)
    assert trees.difference(expected[0], params) == "" and trees.difference(expected[1], stats) == ""
    assert round((num_values(params) + num_values(stats)) / 1e6, 1) == 21.5
    np.testing.assert_allclose(sinusoids(197, 384), full.pos_embed, atol=1e-5)


def test_performer_directions_are_orthogonal_of_length_sqrt_m():
    _, stats = small("performer").init(KEY)
    for layer in ("attention1", "attention2"):
        w = stats["tokens_to_token"][layer]["w"]
        np.testing.assert_allclose(w @ w.T, TOKEN_DIM // 2 * np.eye(TOKEN_DIM // 2), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_matrix_products_use_dtype_and_softmax_float32(family):
    net = small(family, dtype="bfloat16")
    params, stats = weights(family)
    text = str(jax.make_jaxpr(net.apply)(params, stats, random_images()))
    found = [line for line in text.splitlines() if "dot_general[" in line]
    in_float32 = [line for line in found if ":f32" in line.split("=")[0]]
    # The head, and five products in the kernel of each Performer layer (phi of q and k, sum, values, average).
    assert len(in_float32) == (11 if family == "performer" else 1) and len(found) >= 8
    assert not [line for line in text.splitlines() if " exp " in line and ":bf16" in line]


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_close_to_float32(family):
    params, stats = weights(family)
    exact = small(family).apply(params, stats, random_images())
    rough = small(family, dtype="bfloat16").apply(params, stats, random_images())
    for field in ("features", "logits"):
        a, b = getattr(exact, field), getattr(rough, field)
        assert 0 < np.linalg.norm(a - b) < 0.03 * np.linalg.norm(a)


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_is_deterministic_and_independent_of_the_batch(family):
    net, (params, stats) = small(family, dropout=0.5, stochastic_depth=0.5), weights(family)
    images = random_images()
    output = net.apply(params, stats, images)
    np.testing.assert_array_equal(output.logits, net.apply(params, stats, images).logits)
    np.testing.assert_array_equal(output.logits, small(family).apply(params, stats, images).logits)
    others = net.apply(params, stats, np.concatenate([images[:2], 0 * images[2:]]))
    np.testing.assert_array_equal(output.logits[:2], others.logits[:2])
    assert not np.allclose(output.logits[2:], others.logits[2:])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_finite_and_reach_every_parameter(family):
    net, (params, stats) = small(family), weights(family)

    def loss(params, stats, images):
        output, new_stats = net.apply_train(params, stats, images, KEY)
        return -jnp.mean(jax.nn.log_softmax(output.logits)[:, 0]), new_stats

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    for images in (random_images(), 0 * random_images()):
        gradients, new_stats = gradient(params, stats, images)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
        jax.tree.map(np.testing.assert_array_equal, stats, new_stats)  # they are not trained
        if images.any():
            assert [name for name, leaf in trees.flatten(gradients).items() if not np.any(leaf != 0)] == []


@pytest.mark.parametrize(
    ("family", "rate"),
    [
        ("vit", "dropout"),
        ("vit", "stochastic_depth"),
        ("transformer", "token_dropout"),
        ("performer", "token_dropout"),
        ("performer", "dropout"),
    ],
)
def test_dropout_and_stochastic_depth_depend_on_the_key(family, rate):
    net, (params, stats) = small(family, **{rate: 0.5}), weights(family)
    images = random_images()
    one, again, other = (net.apply_train(params, stats, images, jax.random.key(i))[0].logits for i in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one, small(family).apply(params, stats, images).logits)


def test_stochastic_depth_drops_the_last_block_per_image():
    net, (params, stats) = small("vit", stochastic_depth=0.5), weights("vit")
    images = np.repeat(random_images(n=1), 64, axis=0)
    features = np.asarray(net.apply_train(params, stats, images, KEY)[0].features)
    # Each half of the last block is kept or dropped, so that equal images have four outcomes.
    outcomes, counts = np.unique(features.round(3), axis=0, return_counts=True)
    assert len(outcomes) == 4 and counts.min() >= 4
    # If both are dropped, only the first block remains.
    one_block = {**params, "blocks": {"0": params["blocks"]["0"]}}
    rest = small("vit", size=Size(24, 1, 3)).apply(one_block, stats, images[:1]).features
    assert np.abs(outcomes - np.asarray(rest)).max(1).min() < 2e-3


def test_gelu_is_exact():
    x = jnp.linspace(-6, 6, 101)
    np.testing.assert_allclose(gelu(x), jax.nn.gelu(x, approximate=False), atol=1e-6)
    assert gelu(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_initial_weights_have_the_published_standard_deviation():
    assert np.std(gaussian_002(KEY, (64, 256))) == pytest.approx(0.02, rel=0.03)
    kernel = uniform_fan_in(KEY, (4, 4, 3, 64))
    assert np.abs(kernel).max() <= 1 / np.sqrt(48) and np.std(kernel) == pytest.approx(1 / np.sqrt(3 * 48), rel=0.03)


@pytest.mark.parametrize(("size", "stride", "padding"), [(7, 4, 2), (3, 2, 1)])
def test_soft_split_equals_torch_unfold(size, stride, padding):
    torch = pytest.importorskip("torch")
    images = random_images(size=16)
    expected = torch.nn.functional.unfold(
        torch.from_numpy(images.transpose(0, 3, 1, 2)), size, stride=stride, padding=padding
    )
    np.testing.assert_array_equal(soft_split(images, size, stride, padding), expected.transpose(1, 2))


@pytest.mark.parametrize("new_grid", [(7, 7), (24, 24), (14, 14), (9, 20)])
def test_resized_position_embedding_equals_torch_interpolate(new_grid):
    torch = pytest.importorskip("torch")
    pos_embed = np.random.default_rng(0).normal(size=(1, 197, 6)).astype(np.float32)
    grid = torch.from_numpy(pos_embed[:, 1:]).reshape(1, 14, 14, 6).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, size=new_grid, mode="bicubic", antialias=True)
    found = resize_position_embedding(jnp.asarray(pos_embed), (14, 14), new_grid)
    np.testing.assert_array_equal(found[:, 0], pos_embed[:, 0])
    np.testing.assert_allclose(found[:, 1:], expected.permute(0, 2, 3, 1).reshape(1, -1, 6), atol=1e-5)


def test_resized_weights_fit_another_image_size():
    params, stats = weights("vit")
    resized = {**params, "pos_embed": resize_position_embedding(params["pos_embed"], (4, 4), (6, 6))}
    images = jax.ShapeDtypeStruct((2, 48, 48, 3), jnp.float32)
    output = jax.eval_shape(small("vit", image_size=48).apply, resized, stats, images)
    assert output.logits.shape == (2, 5)


def test_a_new_head_replaces_the_classifier():
    params, stats = weights("vit")
    adapted = with_new_head(params, small("vit"), KEY)
    assert np.all(adapted["head"]["bias"] == 0)
    before, after = (small("vit").apply(p, stats, random_images()).features for p in (params, adapted))
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(("make", "default"), [(vit_tiny_patch4_32, 32), (t2t_vit_14, 224)])
def test_equal_arguments_return_the_identical_net(make, default):
    net = make(num_classes=5)
    assert make(np.int64(5), dtype=jnp.float32, image_size=default, dropout=0, stochastic_depth=0.0) is net
    assert make(5, dtype=jnp.bfloat16) is make(5, dtype="bfloat16")
    assert len({net, make(6), make(5, image_size=64), make(5, stochastic_depth=0.1)}) == 4
    assert make(5, image_size=64).min_image_size == 64


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            vit_base_patch16_224,
            {"image_size": 100},
            "image_size of vit_base_patch16_224 is 100; .*the patch size, 16, such as 96",
        ),
        (vit_tiny_patch4_32, {"image_size": 0}, "image_size of vit_tiny_patch4_32 is 0; .*such as 4"),
        (t2t_vit_t_14, {"image_size": 20}, "image_size of t2t_vit_t_14 is 20; .*multiple .*16"),
        (vit_tiny_patch4_32, {"dtype": "float8"}, "dtype of vit_tiny_patch4_32.*'float8'.*bfloat16"),
        (t2t_vit_14, {"num_classes": -1}, "num_classes of t2t_vit_14 is -1"),
        (vit_tiny_patch4_32, {"dropout": 1}, "dropout of vit_tiny_patch4_32 is 1; .*less than 1"),
        (t2t_vit_14, {"stochastic_depth": -0.1}, "stochastic_depth of t2t_vit_14 is -0.1"),
    ],
)
def test_a_wrong_argument_is_named(make, options, message):
    with pytest.raises(InputError, match=message) as caught:
        make(**{"num_classes": 5, **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_images_of_another_size_are_refused(family):
    with pytest.raises(InputError, match=r"images have shape \[4, 48, 48, 3\], expected \[b, 32, 32, 3\]"):
        small(family).apply(*weights(family), random_images(size=48))


def test_a_position_embedding_of_another_grid_is_refused():
    with pytest.raises(InputError, match=r"pos_embed has shape \[1, 10, 4\]; expected \[1, 17, d\] .*grid of 4x4"):
        resize_position_embedding(jnp.zeros((1, 10, 4)), (4, 4), (3, 3))
