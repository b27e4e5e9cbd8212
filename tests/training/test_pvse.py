"""PVSE's objective: what gets gradients, which captions are drawn, given word vectors, dropout, and its optimizer."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_transfer import trees
from jax_transfer.data.word_vectors import WordVectors
from jax_transfer.models.net import Output
from jax_transfer.models.pvse import text_embedding
from jax_transfer.models.resnet import resnet10
from jax_transfer.records import InputError, Views
from jax_transfer.training.objectives.objective import Division
from jax_transfer.training.objectives.pvse import pvse, recurrent_gigaflops
from jax_transfer.training.objectives.pvse_losses import pvse_loss
from jax_transfer.training.optimizers import OptimizerSettings, make_optimizer
from jax_transfer.training.plateau import halvings

SIZE = {"vocabulary_size": 20, "embedding_dim": 8, "word_dim": 6}
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def net():
    return resnet10(num_classes=0, width=8, stem="cifar")


def views(n=6, captions=1, seed=0):
    generator = np.random.default_rng(seed)
    tokens = generator.integers(2, 20, (n, captions, 5)).astype(np.int32)
    tokens[..., -1] = 0
    images = generator.normal(size=(n, 16, 16, 3)).astype(np.float32)
    return {"train": Views((images,), np.zeros(n, np.int32), np.ones(n, bool), {"tokens": tokens})}


def gradient_of(made, batch, start=None):
    params, aux = made.objective.init(KEY, start)
    compute = jax.jit(jax.value_and_grad(made.objective.loss, has_aux=True))
    (value, (new_aux, metrics)), gradient = compute(params, aux, batch, jax.random.key(1))
    return float(value), new_aux, metrics, gradient, params, aux


def largest(tree):
    return {name: float(jnp.abs(leaf).max()) for name, leaf in trees.flatten(tree).items()}


@pytest.mark.parametrize("tuned", [False, True])
def test_only_a_tuned_net_gets_gradients_and_new_statistics(net, tuned):
    made = pvse(net, (), **SIZE, tune_backbone=tuned)
    _, new_aux, _, gradient, params, aux = gradient_of(made, views())
    assert ("net" in gradient, "net" in aux) == (tuned, not tuned)
    assert all(value > 0 for name, value in largest(gradient).items() if name.startswith("net/conv1"))
    changed = [
        not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (aux["stats"], new_aux["stats"])), strict=True)
    ]
    assert all(changed) == any(changed) == tuned
    if not tuned:
        np.testing.assert_array_equal(aux["net"]["conv1"]["kernel"], new_aux["net"]["conv1"]["kernel"])
    model = made.objective.model(params, aux)
    assert trees.difference(dict(zip(("params", "stats"), net.init(KEY), strict=True)), model) == ""
    heads = {n: v for n, v in largest(gradient).items() if not n.startswith("net/")}
    assert all(np.isfinite(v) and v > 0 for v in heads.values())


def test_it_starts_from_the_given_model_and_the_loss_is_that_of_its_embeddings(net):
    """Without dropout, a frozen net and one caption each, the training loss is that of the embeddings for ranking."""
    made, batch = pvse(net, (), **SIZE), views()
    start = dict(zip(("params", "stats"), net.init(jax.random.key(7)), strict=True))
    value, _, metrics, _, params, aux = gradient_of(made, batch, start)
    np.testing.assert_array_equal(aux["net"]["conv1"]["kernel"], start["params"]["conv1"]["kernel"])
    x = made.images(params, aux, batch["train"].images[0])
    t = made.captions(params, batch["train"].extra["tokens"][:, 0])
    expected, terms = pvse_loss(x.embeddings, t.embeddings, x.residuals, t.residuals, gamma=0.5)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert set(metrics) == {*terms, "contrast"} and x.embeddings.shape == (6, 2, 8)
    similar = np.einsum("ake,ble->abkl", x.embeddings, t.embeddings).max((2, 3))
    assert float(metrics["contrast"]) == pytest.approx((similar.argmax(1) == np.arange(6)).mean())


def test_each_caption_of_an_image_is_drawn(net):
    made, batch = pvse(net, (), **SIZE), views(n=2, captions=3)
    params, aux = made.objective.init(KEY, None)
    loss = jax.jit(made.objective.loss)
    drawn = {round(float(loss(params, aux, batch, jax.random.key(k))[0]), 5) for k in range(60)}
    assert len(drawn) == 9  # each of three captions with each of three


def test_given_word_vectors_stay_and_missing_words_are_learned(net):
    found = np.arange(20) % 2 == 0
    vectors = WordVectors(np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32) * found[:, None], found)
    made, batch = pvse(net, (), **SIZE, word_vectors=vectors), views()
    value, _, _, gradient, params, aux = gradient_of(made, batch)
    moved = np.abs(np.asarray(gradient["text"]["words"])).max(1) > 0
    used = np.unique(batch["train"].extra["tokens"])
    assert not moved[found].any() and moved[[t for t in used if t % 2]].all()
    # The weights for found words do not matter, and neither does what the file has for the others.
    words = params["text"]["words"]
    other = {**params, "text": {**params["text"], "words": words + 9 * found[:, None]}}
    assert float(made.objective.loss(other, aux, batch, jax.random.key(1))[0]) == pytest.approx(value, abs=1e-6)
    tokens = batch["train"].extra["tokens"][:, 0]
    table = np.where(found[:, None], vectors.table, words)
    plain = text_embedding(**SIZE, num_embeddings=2).apply({**params["text"], "words": jnp.asarray(table)}, {}, tokens)
    np.testing.assert_allclose(made.captions(params, tokens).embeddings, plain.embeddings, atol=1e-6)


def test_dropout_zeroes_word_vectors_in_training_alone():
    """With words that are all equal to 1, attention sees the share that is kept, scaled by its inverse."""
    net = text_embedding(**SIZE, num_embeddings=2, dropout=0.5)
    params, _ = net.init(KEY)
    tokens = jnp.asarray(np.random.default_rng(0).integers(2, 20, (3, 4)))
    embed = lambda key: net.apply_train(params, {}, tokens, key)[0]  # noqa: E731
    same, other = embed(jax.random.key(1)), embed(jax.random.key(2))
    np.testing.assert_array_equal(same.embeddings, embed(jax.random.key(1)).embeddings)
    assert (
        np.abs(same.attention - other.attention).max() > 1e-3
    )  # of the words themselves, which no later dropout changes
    still = net.apply(params, {}, tokens)
    np.testing.assert_array_equal(
        still.embeddings, text_embedding(**SIZE, num_embeddings=2).apply(params, {}, tokens)[0]
    )
    assert np.abs(still.embeddings - same.embeddings).max() > 1e-3


def test_a_net_without_maps_mixed_images_and_single_images_are_refused(net):
    apply = lambda params, stats, images: Output(images[:, 0, 0, :0], images[:, 0, 0])  # noqa: E731
    flat = types.SimpleNamespace(name="flat", min_image_size=4, feature_dim=3, init=lambda key: ({}, {}), apply=apply)
    with pytest.raises(InputError, match=r"flat does not return the maps before pooling"):
        pvse(flat, (), **SIZE)
    with pytest.raises(InputError, match="mixes images by 'mixup'"):
        pvse(net, ("mixup",), **SIZE)
    with pytest.raises(InputError, match="batch_size = 1: the loss compares"):
        pvse(net, (), **SIZE).objective.check(Division(1))


def test_the_recurrent_products_are_those_that_the_compiler_counts_once():
    """The words between the first and the last one each add the same to a step without a loop."""
    b, e = 3, 8
    counted = 2 * 3 * (2 * b * (e // 2) * 3 * (e // 2))  # of one word: two directions, forward and backward twice
    assert recurrent_gigaflops(b, 5, e) == pytest.approx(4 * counted / 1e9) and recurrent_gigaflops(b, 1, e) == 0


# --- the optimizer and its learning rate


def test_amsgrad_divides_by_the_largest_average_so_far():
    optimizer = make_optimizer(OptimizerSettings(name="amsgrad", learning_rate=0.1, b1=0.0, b2=0.5), steps=9)
    w, state, m, v, most = jnp.zeros(()), None, 0.0, 0.0, 0.0
    state = optimizer.init(w)
    for step, gradient in enumerate((4.0, 0.5, 0.5), 1):
        updates, state = optimizer.update(jnp.float32(gradient), state, w)
        m, v = gradient, 0.5 * v + 0.5 * gradient**2
        most = max(most, v / (1 - 0.5**step))
        assert float(updates) == pytest.approx(-0.1 * m / (most**0.5 + 1e-8), rel=1e-5)
    plain = make_optimizer(OptimizerSettings(name="adam", learning_rate=0.1, b1=0.0, b2=0.5), steps=9)
    state = plain.init(w)
    for gradient in (4.0, 0.5, 0.5):
        adam, state = plain.update(jnp.float32(gradient), state, w)
    assert abs(float(adam)) > abs(float(updates))


@pytest.mark.parametrize(("norm", "expected"), [(None, 5.0), (2.0, 2.0), (9.0, 5.0)])
def test_gradients_are_clipped_at_their_common_norm(norm, expected):
    settings = OptimizerSettings(momentum=0.0, learning_rate=1.0, clip_norm=norm)
    params = {"a": jnp.zeros(()), "b": jnp.zeros(1)}
    optimizer = make_optimizer(settings, steps=1)
    updates, _ = optimizer.update({"a": jnp.float32(3.0), "b": jnp.array([4.0])}, optimizer.init(params), params)
    assert float(optax.global_norm(updates)) == pytest.approx(expected)
    assert float(updates["a"] / updates["b"][0]) == pytest.approx(0.75)
    with pytest.raises(InputError, match=r"clip_norm = 0\.0: must be positive"):
        dataclasses.replace(settings, clip_norm=0.0)


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_halvings_are_those_of_torch(patience):
    torch = pytest.importorskip("torch")
    history = np.random.default_rng(patience).integers(0, 9, 30).astype(float).tolist()
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, "max", factor=0.5, patience=patience, threshold=0, eps=0
    )
    for epoch, score in enumerate(history, 1):
        schedule.step(score)
        assert 0.5 ** halvings(history[:epoch], patience) == optimizer.param_groups[0]["lr"]
    assert halvings(history, patience) > 2
