"""The autoencoders: VAE, WAE-MMD, WAE-UKL and WAE-GAN."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from helpers.source_files import REPOSITORY
from helpers.training_parts import tiny_net
from jax_transfer import devices
from jax_transfer.data.batches import joined, make_feed
from jax_transfer.data.source import from_arrays
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models.decoder import decode
from jax_transfer.records import InputError, Views
from jax_transfer.training.loop import train
from jax_transfer.training.objectives import OBJECTIVES
from jax_transfer.training.objectives.autoencoder import Codes, gaussian_codes
from jax_transfer.training.objectives.objective import Division
from jax_transfer.training.objectives.vae import kl_to_prior
from jax_transfer.training.objectives.wae_gan import adversarial_loss, criticise, gradient_reversal
from jax_transfer.training.objectives.wae_mmd import mmd
from jax_transfer.training.objectives.wae_ukl import mixture_kl
from jax_transfer.training.optimizers import OptimizerSettings, make_optimizer
from jax_transfer.training.state import init_state
from jax_transfer.training.steps import make_train_step, many_steps

SMALL = {
    "vae": {"weight": 3.0},
    "wae_mmd": {"weight": 50.0},
    "wae_ukl": {"weight": 3.0},
    "wae_gan": {"weight": 5.0, "critic_width": 12, "critic_layers": 2},
}
COMPARE_IMAGES = ("wae_mmd", "wae_ukl")
LATENT, VALUES = 6, 16 * 16 * 3


def make(name, augment=(), net=None):
    return OBJECTIVES[name](net or tiny_net(num_classes=0), augment, latent_dim=LATENT, decoder_width=4, **SMALL[name])


def draws(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def some_codes(seed=0, b=7):
    mean, log_variance, noise = draws(seed, 3, b, LATENT)
    return Codes(mean, log_variance, mean + np.exp(log_variance / 2) * noise)


# --- the divergences


def expected_kl(codes):
    """Returns the mean over images of the sum over dimensions of KL(N(m, v) || N(0, 1)), by numerical integration."""
    z, total = np.linspace(-30, 30, 60_001), 0.0
    for mean, log_variance in zip(codes.mean.ravel(), codes.log_variance.ravel(), strict=True):
        density = stats.norm(mean, np.exp(log_variance / 2))
        total += np.trapezoid(density.pdf(z) * (density.logpdf(z) - stats.norm.logpdf(z)), z)
    return total / len(codes.mean)


def expected_mmd(x, y):
    """Returns the unbiased estimate of Tolstikhin et al., algorithm 2, by loops."""

    def kernel(a, b):
        distance = ((a.astype(np.float64) - b) ** 2).sum()
        return sum(2 * len(a) * s / (2 * len(a) * s + distance) for s in (0.1, 0.2, 0.5, 1, 2, 5, 10))

    n = len(x)
    pairs = [(i, j) for i in range(n) for j in range(n)]
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs if i != j)
    return within / (n * (n - 1)) - 2 / n**2 * sum(kernel(x[i], y[j]) for i, j in pairs)


def expected_mixture_kl(codes):
    """Returns the Monte Carlo estimate of KL(mixture of the batch || prior), with the densities of scipy."""
    total = 0.0
    for z in codes.z:
        parts = zip(codes.mean, codes.log_variance, strict=True)
        density = np.mean([stats.multivariate_normal(m, np.diag(np.exp(v))).pdf(z) for m, v in parts])
        total += np.log(density) - stats.multivariate_normal(np.zeros(LATENT)).logpdf(z)
    return total / len(codes.z)


def test_kl_equals_integral():
    codes = some_codes()
    assert kl_to_prior(codes.mean, codes.log_variance) == pytest.approx(expected_kl(codes), rel=1e-4)


def test_mmd_equals_double_loop():
    x, y = draws(0, 9, LATENT), 2 * draws(1, 9, LATENT) + 0.5
    assert mmd(x, y) == pytest.approx(expected_mmd(x, y), rel=1e-4)


def test_mmd_of_one_distribution_is_zero_on_average():
    """A biased estimate, with i = j, would be near 2 k(x, x) / n = 0.9 here."""
    x = jax.random.normal(jax.random.key(0), (2, 400, 16, 2))
    found = jax.vmap(mmd)(*x)
    assert abs(found.mean()) < 4 * found.std() / 20 < 0.05


def test_mixture_kl_equals_densities_of_scipy():
    codes = some_codes()
    assert mixture_kl(codes) == pytest.approx(expected_mixture_kl(codes), rel=1e-4)


def test_mixture_kl_lies_between_zero_and_the_mean_of_kl():
    """KL(mixture || prior) >= 0, and by convexity at most the mean of KL(component || prior), on average over draws."""
    mean, log_variance = some_codes(b=20)[:2]
    layer = {"kernel": jnp.zeros((1, 2 * LATENT)), "bias": 0.0}

    def draw(key):
        codes = gaussian_codes(layer, jnp.ones((20, 1)), key)  # standard normal noise
        return mixture_kl(Codes(mean, log_variance, mean + jnp.exp(log_variance / 2) * codes.z))

    average = jax.vmap(draw)(jax.random.split(jax.random.key(0), 500)).mean()
    assert 0.1 < average < kl_to_prior(mean, log_variance) - 1


def test_reversal_keeps_values_and_turns_gradients():
    x = draws(0, 3)
    value, gradient = jax.value_and_grad(lambda x: (gradient_reversal(x, 0.3) ** 2).sum())(x)
    assert value == (x**2).sum()
    np.testing.assert_allclose(gradient, -0.3 * 2 * x, rtol=1e-6)


# --- the losses


def affine(layer, x):
    return np.asarray(x, np.float64) @ layer["kernel"] + layer["bias"]


def logits(critic, x):
    return affine(critic["2"], np.maximum(affine(critic["1"], np.maximum(affine(critic["0"], x), 0)), 0))[:, 0]


@pytest.fixture(scope="module", params=SMALL)
def trial(request):
    """Returns an objective on a net without BatchNorm, its parameters, a batch, and its loss and gradient for a key."""
    objective, key = make(request.param), jax.random.key(5)
    params, aux = jax.device_get(objective.init(jax.random.key(0), None))
    views = {"train": Views((0.5 * draws(0, 5, 16, 16, 3),), np.zeros(5, np.int32), np.ones(5, bool))}
    (value, (new_aux, metrics)), gradient = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))(
        params, aux, views, key
    )
    assert jax.tree.structure(new_aux) == jax.tree.structure(aux)
    return request.param, objective, params, views, key, value, metrics, gradient


def test_loss_equals_numpy(trial):
    name, _, params, views, key, value, metrics, _ = trial
    (images,) = views["train"].images
    _, key_codes, key_penalty = jax.random.split(key, 3)
    features = tiny_net(num_classes=0).apply(params["net"], {}, images).features
    encoded, weight = affine(params["code"], features).astype(np.float32), SMALL[name]["weight"] / VALUES
    noise = np.asarray(jax.random.normal(key_codes, (5, LATENT)))
    prior = np.asarray(jax.random.normal(key_penalty, (5, LATENT)))
    if name in ("vae", "wae_ukl"):
        mean, log_variance = np.split(encoded, 2, axis=1)
        codes = Codes(mean, log_variance, mean + np.exp(log_variance / 2) * noise)
        penalty = weight * (expected_kl(codes) if name == "vae" else expected_mixture_kl(codes))
    else:
        codes = Codes(encoded, np.full_like(encoded, -np.inf), encoded)
        if name == "wae_mmd":
            penalty = weight * expected_mmd(prior, encoded)
        else:
            right = [
                1 / (1 + np.exp(-logits(params["critic"], prior))),
                1 / (1 + np.exp(logits(params["critic"], encoded))),
            ]
            penalty = -np.log(right).mean(1).sum()
    error = np.square(np.asarray(decode(params["decoder"], codes.z, 16, 16)) - images).sum((1, 2, 3)).mean() / VALUES
    assert metrics["squared_error"] == pytest.approx(error, rel=1e-4)
    assert metrics["penalty"] == pytest.approx(penalty, rel=1e-3)
    assert value == pytest.approx(error + penalty, rel=1e-4)


def test_critic_descends_and_encoder_ascends_the_adversarial_loss():
    """The gradient is that of |x - decode(z)|^2 / N - weight / N * V for the encoder, and that of V for the critic."""
    objective, net, key = make("wae_gan"), tiny_net(num_classes=0), jax.random.key(5)
    params, aux = objective.init(jax.random.key(0), None)
    images = 0.5 * draws(0, 5, 16, 16, 3)
    views = {"train": Views((images,), np.zeros(5, np.int32), np.ones(5, bool))}
    prior = jax.random.normal(jax.random.split(key, 3)[2], (5, LATENT))

    def parts(params):
        z = net.apply(params["net"], {}, images).features @ params["code"]["kernel"] + params["code"]["bias"]
        error = jnp.square(decode(params["decoder"], z, 16, 16) - images).mean()
        return error, adversarial_loss(criticise(params["critic"], prior), criticise(params["critic"], z))

    error, adversarial = jax.jit(jax.jacrev(parts))(params)
    weight = SMALL["wae_gan"]["weight"] / VALUES
    expected = jax.tree.map(lambda a, b: a - weight * b, error, adversarial) | {"critic": adversarial["critic"]}
    found = jax.jit(jax.grad(lambda *arguments: objective.loss(*arguments)[0]))(params, aux, views, key)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), found, expected)
    assert np.abs(weight * adversarial["code"]["kernel"]).max() > 1e-5


def test_every_parameter_is_trained(trial):
    gradient = trial[-1]
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))


def test_model_is_the_net_and_all_else_is_head(trial):
    _, objective, params, *_ = trial
    model = objective.model(params, {"stats": {}})
    assert model["params"] is params["net"] and not objective.has_head
    groups = objective.groups(params)
    assert set(jax.tree.leaves(groups.pop("net"))) == {"backbone"} and set(jax.tree.leaves(groups)) == {"head"}


@pytest.mark.parametrize("name", SMALL)
def test_only_losses_that_compare_images_refuse_parts_and_batches_of_one(name):
    objective = make(name)
    for division in (Division(batch_size=1), Division(batch_size=8, microbatches=2)):
        if name in COMPARE_IMAGES:
            with pytest.raises(InputError, match="the loss compares the images of a"):
                objective.check(division)
        else:
            objective.check(division)
    objective.check(Division(batch_size=2))


# --- training

PREPROCESSING = Preprocessing(image_size=16, mean=(0.5,) * 3, std=(0.25,) * 3)


def training(name, settings):
    """Returns the compiled steps of an objective on a tiny net with BatchNorm, its feed and its first state."""
    line = np.linspace(0.2, 1, 16)
    colours = np.random.default_rng(0).uniform(size=(32, 1, 1, 3))
    images = (255 * colours * line[:, None, None] * np.ones((16, 3))[:, :1]).astype(np.uint8)
    objective = make(name, ("flip",), tiny_net(num_classes=0, batch_norm=True))
    feed = make_feed(from_arrays(images, np.zeros(32, np.int32)), PREPROCESSING, devices.make_mesh())
    feeds, optimizer = joined({"train": (feed, 16)}), make_optimizer(settings, 100, objective.groups)
    step = make_train_step(objective, optimizer, PREPROCESSING, feeds.num_classes)
    state = devices.replicate(init_state(objective, optimizer, 0), feed.mesh)
    return many_steps(step, feeds.fetch, feed.mesh), feeds, state


def metrics_and_state(run, feeds, state, steps):
    found = []
    for epoch in train(state, run, feeds, seed=3, total_steps=steps, what="test"):
        state = epoch.state
        found.append(epoch.metrics)
    return {name: np.concatenate([metrics[name] for metrics in found]) for name in found[0]}, state


@pytest.mark.parametrize("name", SMALL)
def test_loss_falls_in_twenty_steps(name):
    metrics, _ = metrics_and_state(*training(name, OptimizerSettings("adam", learning_rate=0.01)), 20)
    assert all(np.isfinite(values).all() for values in metrics.values())
    for term in ("loss", "squared_error"):
        assert np.mean(metrics[term][-4:]) < 0.9 * np.mean(metrics[term][:4])


ON_DEVICES = """
import json, sys
sys.path[:0] = ["tests", "tests/training"]
import jax
import test_generative as t
metrics, state = t.metrics_and_state(*t.training(sys.argv[1], t.OptimizerSettings(learning_rate=0.05)), 3)
total = float(sum(abs(x).sum() for x in jax.tree.leaves(state["params"])))
print(json.dumps([jax.device_count(), *metrics["loss"].tolist(), *metrics["penalty"].tolist(), total]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_training_is_equal_on_one_and_four_devices(name):
    found = []
    for count in (1, 4):
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", ON_DEVICES, name]
        done = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, **flags}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert [row[0] for row in found] == [1, 4]
    np.testing.assert_allclose(found[0][1:], found[1][1:], rtol=1e-4, atol=1e-7)
