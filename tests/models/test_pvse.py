"""PVSE's embedding networks: equal to torch, blind to padding, of unit length, with gradients for every weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_transfer.models.pvse import image_embedding, masked_softmax, text_embedding
from jax_transfer.records import InputError

TEXT = {"vocabulary_size": 20, "word_dim": 6, "embedding_dim": 8, "num_embeddings": 3}
IMAGE = {"feature_dim": 5, "map_dim": 6, "embedding_dim": 8, "num_embeddings": 3}
TOKENS = np.array([[3, 7, 9, 2, 0], [5, 11, 12, 13, 14], [19, 0, 0, 0, 0]])


def far_from_the_start(net, seed=1):
    """Returns weights far from their initial values, so that every one of them matters."""
    leaves, structure = jax.tree.flatten(net.init(jax.random.key(0))[0])
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return structure.unflatten([x + 0.5 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


@pytest.fixture(scope="module")
def text():
    return text_embedding(**TEXT)


@pytest.fixture(scope="module")
def text_params(text):
    return far_from_the_start(text)


@pytest.fixture(scope="module")
def image():
    return image_embedding(**IMAGE)


@pytest.fixture(scope="module")
def image_params(image):
    return far_from_the_start(image)


def images(n=4, side=3):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, 5)).astype(np.float32), rng.normal(size=(n, side, side, 6)).astype(np.float32)


def tensor(x):
    torch = pytest.importorskip("torch")
    return torch.tensor(np.array(x))


def torch_pie(params, whole, local):
    """Computes a PIE-Net for one image or caption: whole [e], local [n, d]."""
    torch = pytest.importorskip("torch")
    hidden = torch.tanh(local @ tensor(params["hidden"]["kernel"]))
    attention = torch.softmax(hidden @ tensor(params["heads"]["kernel"]), 0).T
    residuals = torch.sigmoid(attention @ local @ tensor(params["fc"]["kernel"]) + tensor(params["fc"]["bias"]))
    norm = params["norm"]
    x = torch.nn.functional.layer_norm(whole + residuals, whole.shape, tensor(norm["scale"]), tensor(norm["bias"]))
    return torch.nn.functional.normalize(x, dim=-1), attention, residuals


def torch_gru(params, words):
    """Returns the last states of torch's bidirectional GRU for one caption [n, d]."""
    torch = pytest.importorskip("torch")
    units = TEXT["embedding_dim"] // 2
    gru = torch.nn.GRU(words.shape[1], units, bidirectional=True, batch_first=True)
    state = {}
    for name, suffix in (("forward", ""), ("backward", "_reverse")):
        part = params[name]
        for ours, theirs in (("kernel_x", "weight_ih"), ("kernel_h", "weight_hh")):
            state[f"{theirs}_l0{suffix}"] = tensor(part[ours]).T
        for ours, theirs in (("bias_x", "bias_ih"), ("bias_h", "bias_hh")):
            state[f"{theirs}_l0{suffix}"] = tensor(part[ours])
    gru.load_state_dict(state)
    return gru(words[None])[1][:, 0].flatten()


def test_captions_equal_torch_one_by_one(text, text_params):
    found = text.apply(text_params, {}, TOKENS)
    for i, tokens in enumerate(TOKENS):
        length = np.count_nonzero(tokens)
        words = tensor(text_params["words"])[tokens[:length]]
        expected = torch_pie(text_params["pie"], torch_gru(text_params, words), words)
        np.testing.assert_allclose(found.embeddings[i], expected[0].detach(), atol=1e-5)
        np.testing.assert_allclose(found.attention[i, :, :length], expected[1].detach(), atol=1e-5)
        np.testing.assert_allclose(found.residuals[i], expected[2].detach(), atol=1e-5)
        assert not np.any(found.attention[i, :, length:])


def test_images_equal_torch_one_by_one(image, image_params):
    features, maps = images()
    found = image.apply(image_params, {}, (features, maps))
    for i in range(len(features)):
        whole = tensor(features[i]) @ tensor(image_params["fc"]["kernel"]) + tensor(image_params["fc"]["bias"])
        expected = torch_pie(image_params["pie"], whole, tensor(maps[i].reshape(9, 6)))
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours[i], theirs, atol=1e-5)


def test_padding_changes_nothing(text, text_params):
    expected = text.apply(text_params, {}, TOKENS)
    longer = text.apply(text_params, {}, np.pad(TOKENS, ((0, 0), (0, 6))))
    np.testing.assert_allclose(longer.embeddings, expected.embeddings, atol=1e-6)
    np.testing.assert_allclose(longer.attention[..., :5], expected.attention, atol=1e-6)
    short = text.apply(text_params, {}, TOKENS[2:, :1])
    np.testing.assert_allclose(short.embeddings, expected.embeddings[2:], atol=1e-6)
    other = {**text_params, "words": text_params["words"].at[0].set(50.0)}  # the vector of the padding
    np.testing.assert_allclose(text.apply(other, {}, TOKENS).embeddings, expected.embeddings, atol=1e-6)


def test_both_directions_read_the_whole_caption(text, text_params):
    """Without the PIE-Net's view of the words, the first and the last word still matter."""
    blind = {**text_params["pie"], "fc": jax.tree.map(jnp.zeros_like, text_params["pie"]["fc"])}
    for own, other in (("forward", "backward"), ("backward", "forward")):
        still = jax.tree.map(jnp.zeros_like, text_params[own])
        params = {**text_params, "pie": blind, own: still}
        first, last, same = (
            text.apply(params, {}, np.array([tokens])).embeddings for tokens in ([8, 4, 6], [3, 4, 9], [3, 4, 6])
        )
        assert np.abs(first - same).max() > 1e-4 < np.abs(last - same).max(), other


@pytest.mark.parametrize("kind", ["text", "image"])
def test_embeddings_have_length_one_and_heads_differ(kind, request):
    net, params = request.getfixturevalue(kind), request.getfixturevalue(f"{kind}_params")
    found = net.apply(params, {}, TOKENS if kind == "text" else images())
    np.testing.assert_allclose(np.linalg.norm(found.embeddings, axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(found.attention.sum(-1), 1, atol=1e-5)
    assert np.abs(found.embeddings[:, 0] - found.embeddings[:, 1]).max() > 1e-2
    assert all(x.dtype == jnp.float32 for x in found)
    trained, stats = net.apply_train(params, {}, TOKENS if kind == "text" else images(), jax.random.key(0))
    np.testing.assert_allclose(trained.embeddings, found.embeddings, atol=1e-6)
    assert stats == {}


@pytest.mark.parametrize("kind", ["text", "image"])
def test_every_weight_has_a_finite_gradient(kind, request):
    net, params = request.getfixturevalue(kind), request.getfixturevalue(f"{kind}_params")
    inputs = np.concatenate([TOKENS, 0 * TOKENS[:1]]) if kind == "text" else images()  # and a caption without words

    def total(params):
        found = net.apply_train(params, {}, inputs, jax.random.key(0))[0].embeddings
        return (found * jnp.arange(found.size).reshape(found.shape)).sum()

    gradients = jax.jit(jax.grad(total))(params)
    assert all(np.isfinite(x).all() and np.abs(x).max() > 1e-6 for x in jax.tree.leaves(gradients))


def test_captions_without_words_are_equal_and_finite(text, text_params):
    for length in (1, 4):
        found = text.apply(text_params, {}, np.zeros((2, length), int))
        assert np.isfinite(found.embeddings).all() and not found.attention.any()
        np.testing.assert_array_equal(found.embeddings[0], found.embeddings[1])
    assert masked_softmax(jnp.array([1e4, -1e4, 3.0]), jnp.array([False, True, False])).tolist() == [0, 1, 0]


def test_dropout_acts_in_training_alone():
    net = text_embedding(**TEXT, dropout=0.5)
    params, _ = net.init(jax.random.key(0))
    one, two, again = (net.apply_train(params, {}, TOKENS, jax.random.key(k))[0].embeddings for k in (0, 1, 0))
    assert np.abs(one - two).max() > 1e-3
    np.testing.assert_array_equal(one, again)
    plain = text_embedding(**TEXT).apply(params, {}, TOKENS)
    np.testing.assert_allclose(net.apply(params, {}, TOKENS).embeddings, plain.embeddings, atol=1e-6)


def test_initial_weights_have_the_bounds_of_torch(text):
    params, _ = text.init(jax.random.key(0))
    units = TEXT["embedding_dim"] // 2
    bounds = {
        ("forward", "kernel_h"): units**-0.5,
        ("backward", "bias_x"): units**-0.5,
        ("pie", "fc", "kernel"): (6 / 14) ** 0.5,
        ("pie", "hidden", "kernel"): (6 / 9) ** 0.5,
        ("words",): (6 / 26) ** 0.5,
    }
    for path, bound in bounds.items():
        leaf = params
        for name in path:
            leaf = leaf[name]
        assert 0.7 * bound < np.abs(leaf).max() <= bound, path
    assert not np.any(params["pie"]["fc"]["bias"])
    assert np.abs(params["forward"]["kernel_x"] - params["backward"]["kernel_x"]).max() > 0.1


def test_the_size_of_coco_and_bfloat16(text, text_params):
    shapes = text_embedding(vocabulary_size=1000).shapes
    assert shapes["params/forward/kernel_x"] == (300, 3 * 512) and shapes["params/pie/heads/kernel"] == (150, 2)
    assert image_embedding(feature_dim=2048, map_dim=2048).shapes["params/pie/hidden/kernel"] == (2048, 1024)
    half = text_embedding(**TEXT, dtype="bfloat16").apply(text_params, {}, TOKENS)
    assert all(x.dtype == jnp.float32 for x in half)
    np.testing.assert_allclose(half.embeddings, text.apply(text_params, {}, TOKENS).embeddings, atol=0.1)
    assert text_embedding(**TEXT) is text


def test_wrong_sizes_are_refused():
    with pytest.raises(InputError, match="embedding_dim = 7: expected an even number"):
        text_embedding(**{**TEXT, "embedding_dim": 7})
    with pytest.raises(InputError, match="num_embeddings = 0: expected at least 1"):
        image_embedding(**{**IMAGE, "num_embeddings": 0})
