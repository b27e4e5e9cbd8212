import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from jax_transfer import trees
from jax_transfer.models import MODELS, Output, gaussian, make_net, with_new_head, with_projection
from jax_transfer.models.net import BLOCK, map_dim
from jax_transfer.models.resnet import he_normal_fan_out
from jax_transfer.records import InputError

# Parameters with 1,000 classes, as published with torchvision's weights.
PUBLISHED = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
}
STAGES = {"resnet10": (1, 1, 1, 1), "resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}
KEY = jax.random.key(0)


def small(name, **options):
    takes = inspect.signature(MODELS[name]).parameters
    sizes = {"stem": "cifar", "width": 8 if "stem" in takes else 0.25}
    return MODELS[name](**{"num_classes": 5} | {k: v for k, v in sizes.items() if k in takes} | options)


@functools.cache
def abstract(net):
    return jax.eval_shape(net.init, KEY)


@pytest.fixture(scope="module")
def tiny():
    """(net, params, stats, images) of the smallest net."""
    net = small("resnet10")
    return net, *net.init(KEY), jax.random.normal(jax.random.key(1), (6, 8, 8, 3))


@pytest.mark.parametrize("name", MODELS)
def test_every_net_takes_a_projection(name):
    net = small(name, dtype="bfloat16")
    projected = with_projection(net, (12, 4))
    assert with_projection(net, (12, 4)) is projected and projected != with_projection(net, (12,)) != net
    params, stats = abstract(projected)
    assert trees.difference(abstract(net), ({k: v for k, v in params.items() if k != "projection"}, stats)) == ""
    shapes = {name: leaf.shape for name, leaf in trees.flatten({"params": params, "stats": stats}).items()}
    assert shapes == dict(sorted(projected.shapes.items()))
    images = jax.ShapeDtypeStruct((2, net.min_image_size, net.min_image_size, 3), jnp.float32)
    output, new_stats = jax.eval_shape(projected.apply_train, params, stats, images, KEY)
    plain, _ = jax.eval_shape(net.apply_train, *abstract(net), images, KEY)
    expected = plain._replace(projection=jax.ShapeDtypeStruct((2, 4), jnp.float32))
    assert trees.difference(expected, output) == "" == trees.difference(stats, new_stats)


def test_a_projection_is_linear_layers_with_relu_between_them(tiny):
    net, params, stats, images = tiny
    projected = with_projection(net, (12, 4))
    head = projected.init(KEY)[0]["projection"]
    output = projected.apply({**params, "projection": head}, stats, images)
    plain = net.apply(params, stats, images)
    np.testing.assert_array_equal(output.features, plain.features)
    np.testing.assert_array_equal(output.logits, plain.logits)
    hidden = np.maximum(plain.features @ head["0"]["kernel"] + head["0"]["bias"], 0)
    np.testing.assert_allclose(output.projection, hidden @ head["2"]["kernel"] + head["2"]["bias"], atol=1e-5)
    for wrong in (params, {**params, "projection": {"0": head["0"]}}):
        with pytest.raises(InputError, match=f"the projection in params does not fit {net.name}: missing: "):
            projected.apply(wrong, stats, images)


@pytest.mark.parametrize("name", MODELS)
def test_shapes_and_dtypes(name):
    net = small(name, dtype="bfloat16")
    params, stats = abstract(net)
    images = jax.ShapeDtypeStruct((2, net.min_image_size, net.min_image_size, 3), jnp.float32)
    output, new_stats = jax.eval_shape(net.apply_train, params, stats, images, KEY)
    expected = Output(
        logits=jax.ShapeDtypeStruct((2, net.num_classes), jnp.float32),
        features=jax.ShapeDtypeStruct((2, net.feature_dim), jnp.float32),
        maps=jax.ShapeDtypeStruct((2, *output.maps.shape[1:3], net.feature_dim), output.maps.dtype),
    )
    assert trees.difference(expected, output) == ""
    assert output.maps.dtype in (jnp.float32, jnp.bfloat16) and map_dim(net) == net.feature_dim
    assert trees.difference(stats, new_stats) == ""


# The smallest net of each family that pools by the mean of its map; some take long to compile.
SLOW = ("resnet50_v2", "inception_v2", "inception_v3", "inception_v4", "inception_resnet_v2")
POOLED = (
    "resnet10",
    "mobilenet_v1",
    "mobilenet_v2",
    "inception_v1",
    *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW),
)
TOKENS = {"vit_tiny_patch4_32": 4}  # a net with a class token -> size of its patches


@pytest.mark.parametrize("name", POOLED)
def test_the_mean_of_the_map_is_the_features(name):
    net = small(name)
    params, stats = net.init(KEY)
    size = max(2 * net.min_image_size, 64 if "v1" in name else 0)
    output = net.apply(params, stats, jax.random.normal(KEY, (2, size, size, 3)))
    assert min(output.maps.shape[1:3]) > 1
    np.testing.assert_allclose(output.maps.mean((1, 2)), output.features, rtol=1e-5, atol=1e-6)
    assert np.ptp(output.maps, axis=(1, 2)).max() > 0


@pytest.mark.parametrize("name", TOKENS)
def test_the_map_of_a_transformer_holds_its_patches_row_by_row(name):
    """A change of one patch of the image changes its own token most."""
    net, patch = small(name), TOKENS[name]
    params, stats = net.init(KEY)
    images = np.array(jax.random.normal(KEY, (1, net.min_image_size, net.min_image_size, 3)))
    before = net.apply(params, stats, images).maps
    images[:, patch : 2 * patch, 3 * patch : 4 * patch] += 3
    change = np.abs(net.apply(params, stats, images).maps - before).sum(-1)[0]
    assert np.unravel_index(change.argmax(), change.shape) == (1, 3)


@pytest.mark.parametrize("name", MODELS)
def test_params_and_stats_are_nested_dicts_of_float32_with_string_keys(name):
    def check(tree):
        for key, value in tree.items():
            assert type(key) is str
            if type(value) is dict:
                check(value)
            else:
                assert value.dtype == jnp.float32

    for tree in abstract(small(name, dtype="bfloat16")):
        assert type(tree) is dict
        check(tree)


@pytest.mark.parametrize("name", MODELS)
def test_classifier_is_the_path_of_the_head(name):
    net = small(name, dtype="bfloat16")
    head = abstract(net)[0]
    for part in net.classifier:
        head = head[part]
    assert head["kernel"].shape == (net.feature_dim, net.num_classes)
    assert head["bias"].shape == (net.num_classes,)


@pytest.mark.parametrize("name", MODELS)
def test_named_outputs_of_blocks_are_a_small_part_of_the_activations(name):
    """Counts what the backward pass reads of 11 images, with and without `remat`; nothing is computed."""
    net = small(name)
    images = jax.ShapeDtypeStruct((11, net.min_image_size, net.min_image_size, 3), jnp.float32)

    def kept(apply):
        def backward(params, stats, images):
            return jax.vjp(lambda params: apply(params, stats, images, KEY)[0].logits, params)[1]

        arrays = jax.tree.leaves(jax.eval_shape(backward, *abstract(net), images))
        return [array.size * array.dtype.itemsize for array in arrays if array.shape[:1] == (11,)]

    policy = jax.checkpoint_policies.save_only_these_names(BLOCK)
    every, blocks = kept(net.apply_train), kept(jax.checkpoint(net.apply_train, policy=policy))
    assert sum(blocks) < 0.2 * sum(every)
    assert len(blocks) >= 1 + 5  # the images, and at least the stem and four blocks


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_parameters_is_the_published_one(name):
    params, _ = abstract(MODELS[name](num_classes=1000))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PUBLISHED[name]


@pytest.mark.parametrize("name", ["resnet10", "resnet50"])
def test_equal_arguments_return_the_identical_net(name):
    default = MODELS[name](num_classes=5)
    assert MODELS[name](num_classes=np.int64(5), dtype=jnp.float32, stem="imagenet", width=64) is default
    assert MODELS[name](num_classes=5, dtype=jnp.dtype("float32")) is default
    assert MODELS[name](num_classes=5, dtype=jnp.bfloat16) is MODELS[name](num_classes=5, dtype="bfloat16")
    assert len({default, MODELS[name](num_classes=6), MODELS[name](num_classes=5, stem="cifar")}) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": "cifr"}, "stem of resnet18.*'cifr'.*Did you mean 'cifar'"),
        ({"dtype": "float8"}, "dtype of resnet18.*'float8'.*bfloat16"),
        ({"num_classes": -1}, "num_classes of resnet18 is -1"),
        ({"width": -1}, "width of resnet18 is -1"),
        ({"width": 8.5}, "width of resnet18 is 8.5; .*whole number"),
    ],
)
def test_a_wrong_argument_is_named(options, message):
    with pytest.raises(InputError, match=message):
        small("resnet18", **options)


@pytest.mark.parametrize(
    ("name", "block", "stem"),
    [
        ("resnet18", "BasicBlock", "imagenet"),
        ("resnet18", "BasicBlock", "cifar"),
        ("resnet50", "Bottleneck", "imagenet"),
    ],
)
def test_output_equals_the_torch_twin(name, block, stem):
    pytest.importorskip("torch")
    from helpers import torch_twins

    twin = torch_twins.random_resnet(getattr(torch_twins, block), STAGES[name], num_classes=5, width=8, stem=stem)
    size = 32 if stem == "imagenet" else 16  # even at each stride, where "SAME" would pad one side only
    images = np.random.default_rng(0).normal(size=(3, size, size, 3)).astype(np.float32)
    logits, features = torch_twins.twin_output(twin, images)
    output = small(name, stem=stem).apply(*torch_twins.to_dicts(twin), images)
    np.testing.assert_allclose(output.logits, logits, rtol=1e-4, atol=1e-4 * np.abs(logits).max())
    np.testing.assert_allclose(output.features, features, rtol=1e-4, atol=1e-4 * np.abs(features).max())


def test_training_mode_equals_the_torch_twin_with_its_running_statistics():
    pytest.importorskip("torch")
    from helpers import torch_twins

    twin = torch_twins.random_resnet(torch_twins.BasicBlock, STAGES["resnet10"], num_classes=5, width=8, stem="cifar")
    params, stats = torch_twins.to_dicts(twin)
    images = np.random.default_rng(0).normal(size=(6, 8, 8, 3)).astype(np.float32)
    logits, _ = torch_twins.twin_output(twin.train(), images)
    output, new_stats = small("resnet10").apply_train(params, stats, images, KEY)
    np.testing.assert_allclose(output.logits, logits, rtol=1e-4, atol=1e-4)
    # The last stage has one pixel: with n = 6 values, the biased variance would be off by a sixth.
    expected = trees.flatten(torch_twins.to_dicts(twin)[1])
    for name, leaf in trees.flatten(new_stats).items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_evaluation_is_deterministic_and_independent_of_the_batch(tiny):
    net, params, stats, images = tiny
    output = net.apply(params, stats, images)
    np.testing.assert_array_equal(output.logits, net.apply(params, stats, images).logits)
    # The other images of the batch have no influence.
    others = net.apply(params, stats, images.at[3:].set(7.0))
    np.testing.assert_array_equal(output.logits[:3], others.logits[:3])


def test_training_mode_changes_every_statistic(tiny):
    net, params, stats, images = tiny
    _, new_stats = net.apply_train(params, stats, images, KEY)
    for name, leaf in trees.flatten(new_stats).items():
        assert not np.array_equal(leaf, trees.flatten(stats)[name]), name


def test_gradients_are_finite_and_reach_every_parameter(tiny):
    net, params, stats, images = tiny
    labels = jnp.arange(6) % 5

    @jax.jit
    def gradient(params, images):
        def loss(params):
            output, new_stats = net.apply_train(params, stats, images, KEY)
            return -jnp.mean(jax.nn.log_softmax(output.logits)[jnp.arange(6), labels]), new_stats

        return jax.grad(loss, has_aux=True)(params)

    gradients, _ = gradient(params, images)
    for name, leaf in trees.flatten(gradients).items():
        assert np.isfinite(leaf).all() and np.any(leaf != 0), name
    # Constant images must not lead to a division by zero.
    for name, leaf in trees.flatten(gradient(params, jnp.ones_like(images))).items():
        assert np.isfinite(leaf).all(), name


def test_bfloat16_is_close_to_float32(tiny):
    net, params, stats, images = tiny
    exact = net.apply(params, stats, images)
    rough = small("resnet10", dtype="bfloat16").apply(params, stats, images)
    assert not np.array_equal(exact.features, rough.features)
    assert np.linalg.norm(exact.features - rough.features) < 0.02 * np.linalg.norm(exact.features)
    assert np.linalg.norm(exact.logits - rough.logits) < 0.02 * np.linalg.norm(exact.logits)


@pytest.mark.parametrize(("name", "last"), [("resnet18", "bn2"), ("resnet50", "bn3")])
def test_zero_init_last_affects_only_the_last_scale_of_each_block(name, last):
    def scales():
        flat = trees.flatten(small(name, zero_init_last=True).init(KEY)[0])
        return {path: leaf for path, leaf in flat.items() if path.endswith("scale")}

    # The scales are constants, so that jit skips drawing the convolutions.
    for path, scale in jax.jit(scales)().items():
        assert np.all(scale == (0.0 if path.startswith("layer") and path.endswith(f"/{last}/scale") else 1.0)), path


def test_convolutions_start_he_normal_by_fan_out():
    kernel = he_normal_fan_out(KEY, (3, 3, 16, 64))
    assert np.std(kernel) == pytest.approx(np.sqrt(2 / (3 * 3 * 64)), rel=0.03)


def test_gaussian_equals_jax_random_normal():
    expected = 0.3 * jax.random.normal(KEY, (2, 3, 4))
    np.testing.assert_array_equal(gaussian(KEY, (2, 3, 4), 0.3), expected)


def test_a_new_head_leaves_other_weights_unchanged(tiny):
    net, params, stats, images = tiny
    target = small("resnet10", num_classes=300)
    adapted = with_new_head(params, target, jax.random.key(3), std=0.05)
    output = target.apply(adapted, stats, images)
    assert output.logits.shape == (6, 300)
    np.testing.assert_array_equal(output.features, net.apply(params, stats, images).features)
    assert np.std(adapted["fc"]["kernel"]) == pytest.approx(0.05, rel=0.05) and np.all(adapted["fc"]["bias"] == 0)
    assert params["fc"]["kernel"].shape == (64, 5)


@pytest.mark.parametrize("name", MODELS)
def test_a_net_without_classes_has_no_head(name):
    def abstract_weights(net):
        return trees.unflatten({path: jax.ShapeDtypeStruct(x, jnp.float32) for path, x in net.shapes.items()})

    net, target = small(name, num_classes=0, dtype="bfloat16"), small(name, dtype="bfloat16")
    params, whole = abstract_weights(net)["params"], abstract_weights(target)["params"]
    head = "/".join(target.classifier)
    assert trees.flatten(whole).keys() - trees.flatten(params).keys() == {f"{head}/kernel", f"{head}/bias"}
    assert target.classifier[0] not in params
    images = jax.ShapeDtypeStruct((2, net.min_image_size, net.min_image_size, 3), jnp.float32)
    expected = Output(
        logits=jax.ShapeDtypeStruct((2, 0), jnp.float32),
        features=jax.ShapeDtypeStruct((2, net.feature_dim), jnp.float32),
    )
    stats = abstract_weights(net).get("stats", {})
    output = jax.eval_shape(net.apply, params, stats, images)._replace(maps=None)
    assert trees.difference(expected, output) == ""
    assert trees.difference(whole, jax.eval_shape(lambda params: with_new_head(params, target, KEY), params)) == ""
    assert trees.difference(params, with_new_head(whole, net, KEY)) == ""


# First two values of the head's kernel and sum of all absolute values, for seed 0. If a module drew in another order,
# studies would start from other weights than in their recorded results.
DRAWN = {
    "resnet10": (-0.005138224456459284, -0.00033661630004644394, 4810.956551137931),
    "mobilenet_v2": (0.007416264619678259, 0.0035212377551943064, 24584.657038643636),
    "vit_tiny_patch4_32": (0.03586724400520325, -0.006916299927979708, 90414.30729332122),
}


@functools.cache
def drawn(name):
    return small(name).init(KEY)


@pytest.mark.parametrize("name", DRAWN)
def test_initial_weights_of_a_seed_are_unchanged(name):
    flat = trees.flatten(drawn(name)[0])
    head = np.ravel(flat["/".join((*small(name).classifier, "kernel"))])
    total = sum(np.abs(np.asarray(leaf, np.float64)).sum() for leaf in flat.values())
    np.testing.assert_allclose((*head[:2], total), DRAWN[name], rtol=1e-5)


@pytest.mark.parametrize("name", ["resnet10", "vit_tiny_patch4_32"])
def test_features_do_not_depend_on_the_head(name):
    net, target, (whole, stats) = small(name, num_classes=0), small(name), drawn(name)
    params = with_new_head(whole, net, KEY)
    images = jax.random.normal(KEY, (2, net.min_image_size, net.min_image_size, 3))
    output = net.apply(params, stats, images)
    np.testing.assert_array_equal(output.features, target.apply(whole, stats, images).features)


def test_a_net_without_a_head_has_the_same_initial_trunk(tiny):
    net, (whole, _) = small("resnet10", num_classes=0), drawn("resnet10")
    params, stats = net.init(KEY)
    jax.tree.map(np.testing.assert_array_equal, params, {name: x for name, x in whole.items() if name != "fc"})
    gradient = jax.grad(lambda params: net.apply_train(params, stats, tiny[3], KEY)[0].features.sum())(params)
    assert trees.difference(params, gradient) == ""


@pytest.mark.parametrize("name", MODELS)
def test_a_spec_agrees_with_its_net(name):
    spec = MODELS[name]
    assert (
        inspect.signature(spec) == inspect.signature(spec.make) and "num_classes" in inspect.signature(spec).parameters
    )
    net = spec(num_classes=0, **({"width": 8 if spec.takes("stem") else 0.25} if spec.takes("width") else {}))
    assert net.name == name and net.min_image_size == spec.min_image_size
    assert (spec.patch is not None) == spec.takes("image_size") and spec.min_image_size % (spec.patch or 1) == 0
    patches = net.shapes.get("params/patch_embed/proj/kernel")
    assert patches is None or patches[:2] == (spec.patch, spec.patch)
    if spec.network:
        same = dataclasses.replace(MODELS[spec.network](num_classes=0), name=name)
        assert same.shapes == net.shapes and MODELS[spec.network].network is None


def test_params_of_another_task_or_model_are_named(tiny):
    net, params, stats, images = tiny
    with pytest.raises(InputError, match=r"resnet10 with 9 classes: .*fc/kernel expected float32\[64, 9\]") as caught:
        small("resnet10", num_classes=9).apply(params, stats, images)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="missing: layer1/1/bn1/bias"):
        small("resnet18").apply(params, stats, images)
    with pytest.raises(InputError, match=r"stats do not fit resnet10 with \d+ classes: .*missing: bn1/mean"):
        net.apply(params, {}, images)


def draw(key, shape, dtype):
    return gaussian(key, shape, 0.7)


class TwelveBlocks(nnx.Module):
    """Twelve different affine maps that do not commute, and dropout."""

    def __init__(self, rngs):
        self.blocks = nnx.List([nnx.Linear(4, 4, kernel_init=draw, rngs=rngs) for _ in range(12)])
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, images, train, rngs):
        x = images[:, 0, :, 0]
        for block in self.blocks:
            x = jnp.tanh(block(x))
        x = self.dropout(x, deterministic=not train, rngs=rngs)
        return Output(logits=x, features=x)


@pytest.fixture(scope="module")
def twelve():
    """(net, params, stats, images) of the twelve blocks."""
    sizes = {"num_classes": 4, "feature_dim": 4, "min_image_size": 4}
    net = make_net("twelve", TwelveBlocks, classifier=("blocks", "11"), **sizes)
    return net, *net.init(KEY), jax.random.normal(KEY, (8, 4, 4, 3))


def test_block_order_survives_sorting_by_name(twelve):
    net, params, stats, images = twelve
    flat = trees.flatten(jax.device_get(params))
    restored = trees.unflatten({name: flat[name] for name in sorted(flat)})
    assert list(restored["blocks"])[:4] == ["0", "1", "10", "11"]
    x = images[:, 0, :, 0]
    for i in range(12):
        x = jnp.tanh(x @ params["blocks"][str(i)]["kernel"] + params["blocks"][str(i)]["bias"])
    np.testing.assert_allclose(net.apply(restored, stats, images).logits, x, atol=1e-6)


def test_block_order_survives_orbax(twelve, tmp_path):
    net, params, stats, images = twelve
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "epoch", params)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "epoch", jax.eval_shape(net.init, KEY)[0])
    np.testing.assert_array_equal(net.apply(restored, stats, images).logits, net.apply(params, stats, images).logits)


def test_vmap_over_stacked_checkpoints_equals_the_loop(twelve):
    net, params, stats, images = twelve
    several = [params, jax.tree.map(lambda leaf: 1.1 * leaf, params)]
    together = jax.vmap(net.apply, in_axes=(0, None, None))(trees.stack(several), stats, images).logits
    for i, params_i in enumerate(several):
        np.testing.assert_allclose(together[i], net.apply(params_i, stats, images).logits, rtol=1e-5, atol=1e-6)


def test_dropout_depends_on_the_key_and_only_in_training(twelve):
    net, params, stats, images = twelve
    assert stats == {}
    one, _ = net.apply_train(params, stats, images, jax.random.key(1))
    again, _ = net.apply_train(params, stats, images, jax.random.key(1))
    other, _ = net.apply_train(params, stats, images, jax.random.key(2))
    np.testing.assert_array_equal(one.logits, again.logits)
    assert np.mean(one.logits == 0) > 0.2 and not np.array_equal(one.logits, other.logits)
    assert not np.any(net.apply(params, stats, images).logits == 0)


def test_a_module_with_random_state_is_refused():
    class WithState(nnx.Module):
        def __init__(self, rngs):
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

    with pytest.raises(TypeError, match=r"keeps with 1 classes holds state .*dropout/rngs"):
        make_net("keeps", WithState, num_classes=1, feature_dim=1, min_image_size=1, classifier=("fc",))
