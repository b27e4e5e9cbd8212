"""CLIP: its loss and gradient equal torch's, whatever the number of devices, and its head is its own classifier."""

import json
import math
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.source_files import REPOSITORY
from jax_transfer.models.net import Output
from jax_transfer.records import InputError, Views
from jax_transfer.training.objectives import OBJECTIVES
from jax_transfer.training.objectives.clip import MOST_SCALE, scale
from jax_transfer.training.objectives.objective import Division
from jax_transfer.training.objectives.parts import unit

SIZE = {"vocabulary_size": 300, "context_length": 6, "embedding_dim": 5, "text_width": 8, "text_layers": 1}
DIM = 7


def identity_net():
    """Returns a net without weights, whose features are its images."""
    apply_train = lambda params, stats, images, key: (Output(images[:, :0], images), stats)  # noqa: E731
    return types.SimpleNamespace(init=lambda key: ({}, {}), apply_train=apply_train, feature_dim=DIM)


@pytest.fixture(scope="module")
def clip():
    return OBJECTIVES["clip"](identity_net(), ("flip",), **SIZE, text_heads=2)


@pytest.fixture(scope="module")
def params(clip):
    params, aux = clip.init(jax.random.key(0), None)
    assert aux == {"stats": {}} and clip.extra == ("tokens",) and not clip.has_head
    return params


def random_views(n=12, captions=1, seed=0):
    generator = np.random.default_rng(seed)
    tokens = generator.integers(3, 300, (n, captions, 6)).astype(np.int32)
    tokens[..., 0], tokens[..., -1] = 1, 2
    images = generator.normal(size=(n, DIM)).astype(np.float32)
    return {"train": Views((images,), np.zeros(n, np.int32), np.ones(n, bool), {"tokens": tokens})}


def text_embeddings(clip, params, tokens):
    """Returns the unit embeddings of captions through `zero_shot_head`, whose kernel is scale * projection @ them."""
    identity = {**params, "projection": {"kernel": jnp.eye(SIZE["embedding_dim"])}, "log_scale": jnp.zeros(())}
    return np.asarray(clip.zero_shot_head(identity, tokens)["kernel"]).T


@pytest.mark.parametrize("log_scale", [math.log(1 / 0.07), 0.5])
def test_loss_and_gradient_equal_torch(clip, params, log_scale):
    torch = pytest.importorskip("torch")
    params, views = {**params, "log_scale": jnp.float32(log_scale)}, random_views()
    gradient_of = jax.jit(jax.value_and_grad(clip.loss, has_aux=True))
    (value, (_, metrics)), gradient = gradient_of(params, {"stats": {}}, views, jax.random.key(1))
    kernel = torch.tensor(np.array(params["projection"]["kernel"]), requires_grad=True)
    log = torch.tensor(log_scale, requires_grad=True)
    x = torch.nn.functional.normalize(torch.tensor(views["train"].images[0]) @ kernel, dim=-1)
    t = torch.tensor(text_embeddings(clip, params, views["train"].extra["tokens"]), requires_grad=True)
    logits, target = log.exp() * x @ t.T, torch.arange(len(x))
    loss = (torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)) / 2
    loss.backward()
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient["projection"]["kernel"], kernel.grad, atol=2e-6)
    np.testing.assert_allclose(gradient["log_scale"], log.grad, atol=2e-6)
    assert float(metrics["contrast"]) == pytest.approx((logits.argmax(1) == target).float().mean().item())
    norms = [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient["text"])]
    assert all(math.isfinite(norm) for norm in norms) and sum(norm > 0 for norm in norms) > len(norms) - 3


def test_start_has_the_temperature(params):
    assert float(scale(params["log_scale"])) == pytest.approx(1 / 0.07, rel=1e-6)


@pytest.mark.parametrize(("log_scale", "passes"), [(1.0, (True, True)), (math.log(MOST_SCALE) + 0.1, (True, False))])
def test_scale_is_limited_and_can_fall_again(log_scale, passes):
    value, back = jax.vjp(scale, jnp.float32(log_scale))
    assert float(value) == pytest.approx(min(math.exp(log_scale), MOST_SCALE), rel=1e-6)
    lowers, raises = (float(back(jnp.float32(sign))[0]) for sign in (1, -1))
    assert (lowers > 0, raises < 0) == passes
    assert lowers == pytest.approx(float(value))


def test_each_caption_of_an_image_is_drawn(clip, params):
    """With the same caption k times the loss is that of one; with others it depends on the key alone."""
    views, loss = random_views(captions=3), jax.jit(clip.loss)
    tokens = views["train"].extra["tokens"]
    values = {}
    for chosen in range(3):
        same = {"train": Views(views["train"].images, None, None, {"tokens": tokens[:, [chosen] * 3]})}
        values[chosen] = {float(loss(params, {"stats": {}}, same, jax.random.key(k))[0]) for k in range(2)}
        assert len(values[chosen]) == 1
    drawn = [float(loss(params, {"stats": {}}, views, jax.random.key(k))[0]) for k in (0, 1, 0)]
    assert drawn[0] == drawn[2] != drawn[1] and drawn[0] not in set().union(*values.values())
    one = {"train": Views((views["train"].images[0][:2],), None, None, {"tokens": tokens[:2]})}
    pairs = {round(float(loss(params, {"stats": {}}, one, jax.random.key(k))[0]), 5) for k in range(60)}
    assert len(pairs) == 9  # each of three captions with each of three


def test_head_classifies_as_the_nearest_prototype(clip, params):
    """Mean of unit embeddings, normalised, against the unit embedding of the image, in numpy."""
    views, tokens = random_views(40), random_views(4, captions=5, seed=1)["train"].extra["tokens"]
    head = jax.jit(clip.zero_shot_head)(params, tokens)
    features = views["train"].images[0]
    embedded = text_embeddings(clip, params, tokens.reshape(20, 1, 6)).reshape(4, 5, -1).mean(1)
    prototypes = embedded / np.linalg.norm(embedded, axis=1, keepdims=True)
    x = features @ np.asarray(params["projection"]["kernel"])
    cosines = x @ prototypes.T / np.linalg.norm(x, axis=1, keepdims=True)
    logits = features @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    np.testing.assert_array_equal(logits.argmax(1), cosines.argmax(1))
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(logits / lengths, cosines / 0.07, rtol=1e-4, atol=1e-5)
    assert len(set(logits.argmax(1))) > 1


def test_unit_of_zeros_has_a_finite_gradient():
    assert float(unit(jnp.zeros(3)).sum()) == 0
    assert np.isfinite(jax.grad(lambda x: unit(x).sum())(jnp.zeros(3))).all()


@pytest.mark.parametrize(
    ("division", "message"), [(Division(1), "batch_size = 1: the loss compares"), (Division(8, 2), "microbatches = 2")]
)
def test_batches_of_one_and_parts_of_a_batch_are_refused(clip, division, message):
    with pytest.raises(InputError, match=message):
        clip.check(division)


# A child process, since the number of simulated devices is fixed at the start of a process.
CHILD = """
import sys; sys.path[:0] = ['tests', 'tests/training']
import json, re, jax, numpy as np
import test_clip as own
from jax_transfer import devices
clip = own.OBJECTIVES["clip"](own.identity_net(), (), **own.SIZE, text_heads=2)
params, _ = clip.init(jax.random.key(0), None)
mesh = devices.make_mesh()
views = devices.split(own.random_views(32, captions=3), mesh, "data")
params = devices.replicate(params, mesh)
step = jax.jit(devices.on_mesh(jax.value_and_grad(clip.loss, has_aux=True), mesh))
arguments = (params, {"stats": {}}, views, jax.random.key(3))
(value, (_, metrics)), gradient = step(*arguments)
text = step.lower(*arguments).compile().as_text()
gathered = [np.prod([int(n) for n in s.split(",")]) for s in re.findall(r"= \\w+\\[([\\d,]+)\\]\\S* all-gather", text)]
leaves = [np.asarray(leaf, np.float64).ravel()[:3].tolist() for leaf in jax.tree.leaves(gradient)]
print(json.dumps([jax.device_count(), float(value), float(metrics["contrast"]), leaves, [int(n) for n in gathered]]))
"""


@pytest.mark.slow
def test_one_and_four_devices_give_the_same_loss_and_gather_only_embeddings():
    results = []
    for count in (1, 4):
        flags = f"--xla_force_host_platform_device_count={count}"
        environment = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", CHILD]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(json.loads(done.stdout.splitlines()[-1]))
    (one, *alone, _), (four, *split, gathered) = results
    assert (one, four) == (1, 4)
    assert alone[:2] == pytest.approx(split[:2], rel=1e-5)
    for a, b in zip(alone[2], split[2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    assert gathered and max(gathered) <= 32 * SIZE["embedding_dim"]
