"""The loss terms of PVSE and their gradients equal a short torch reference, and are finite where it is not smooth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_transfer.training.objectives.pvse_losses import (
    diversity,
    hardest_negative_hinge,
    mmd,
    multi_instance_similarities,
    pvse_loss,
)

B, K, E = 7, 2, 5


def unit(shape, seed):
    x = np.random.default_rng(seed).normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def torch_similarities(x, y):
    return (x[:, None, :, None] * y[None, :, None]).sum(-1).amax((2, 3))


def torch_hinge(s, margin):
    torch = pytest.importorskip("torch")
    b, total = len(s), 0
    for i in range(b):
        others = [j for j in range(b) if j != i]
        total += torch.relu(margin + s[i, others].max() - s[i, i]) + torch.relu(margin + s[others, i].max() - s[i, i])
    return total / b


def torch_mmd(x, y, gamma):
    torch = pytest.importorskip("torch")

    def kernel(a, b):
        return torch.exp(-gamma * torch.linalg.vector_norm(a[:, None] - b[None], dim=-1)).mean()

    return kernel(x, x) - 2 * kernel(x, y) + kernel(y, y)


def torch_diversity(residuals):
    torch = pytest.importorskip("torch")
    total, k = 0, residuals.shape[1]
    for each in residuals:
        directions = torch.nn.functional.normalize(each, dim=-1)
        total += torch.linalg.matrix_norm(directions @ directions.T - torch.eye(k)) / k**2
    return total / len(residuals)


def torch_total(images, captions, r, s):
    hinge = torch_hinge(torch_similarities(images, captions), 0.1)
    discrepancy = torch_mmd(images.flatten(0, 1), captions.flatten(0, 1), 1 / E)
    return hinge + 0.01 * discrepancy + 0.1 * (torch_diversity(r) + torch_diversity(s))


def embeddings(seed=0):
    """Returns images, captions that resemble them, and two kinds of residuals in (0, 1)."""
    images, noise = unit((B, K, E), seed), unit((B, K, E), seed + 1)
    captions = images + 0.8 * noise
    captions /= np.linalg.norm(captions, axis=-1, keepdims=True)
    residuals = np.random.default_rng(seed + 2).uniform(0.1, 0.9, (2, B, K, E)).astype(np.float32)
    return images, captions, *residuals


TERMS = {
    "similarities": (multi_instance_similarities, torch_similarities, embeddings()[:2]),
    "hinge": (lambda s: hardest_negative_hinge(s, 0.1), lambda s: torch_hinge(s, 0.1), (unit((B, B), 5),)),
    "mmd": (mmd, lambda x, y: torch_mmd(x, y, 1 / E), (unit((6, E), 0), unit((9, E), 1))),
    "mmd with another gamma": (
        lambda x, y: mmd(x, y, 0.5),
        lambda x, y: torch_mmd(x, y, 0.5),
        (unit((6, E), 0), unit((9, E), 1)),
    ),
    "diversity": (diversity, torch_diversity, (embeddings()[2],)),
    "diversity of three": (diversity, torch_diversity, (unit((4, 3, E), 3),)),
    "all": (lambda *x: pvse_loss(*x)[0], torch_total, embeddings()),
}


@pytest.mark.parametrize("name", TERMS)
def test_value_and_gradient_equal_torch(name):
    torch = pytest.importorskip("torch")
    ours, reference, arguments = TERMS[name]
    weights = np.random.default_rng(9).normal(size=np.shape(jax.eval_shape(ours, *arguments))).astype(np.float32)
    total = jax.jit(jax.value_and_grad(lambda arguments: (weights * ours(*arguments)).sum()))
    value, gradients = total(arguments)
    tensors = [torch.tensor(x, requires_grad=True) for x in arguments]
    expected = (torch.tensor(weights) * reference(*tensors)).sum()
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5, atol=1e-6)
    for gradient, tensor in zip(gradients, tensors, strict=True):
        np.testing.assert_allclose(gradient, tensor.grad, atol=3e-6)
        assert np.abs(gradient).max() > 1e-4


def test_terms_are_returned_without_their_weights():
    arguments = embeddings()
    loss, terms = pvse_loss(*arguments, margin=0.3, mmd_weight=2.0, diversity_weight=3.0, gamma=0.5)
    similarity = multi_instance_similarities(*arguments[:2])
    assert float(terms["hinge"]) == pytest.approx(float(hardest_negative_hinge(similarity, 0.3)))
    images, captions = (x.reshape(-1, E) for x in arguments[:2])
    assert float(terms["mmd"]) == pytest.approx(float(mmd(images, captions, 0.5)), rel=1e-4)
    both = diversity(arguments[2]) + diversity(arguments[3])
    assert float(terms["diversity"]) == pytest.approx(float(both))
    assert float(loss) == pytest.approx(float(terms["hinge"] + 2 * terms["mmd"] + 3 * terms["diversity"]))


SPECIAL = {
    "captions that equal their images": lambda i, c, r, s: (i, i, r, s),
    "equal embeddings": lambda i, c, r, s: (i[:1].repeat(B, 0), c[:1].repeat(B, 0), r, s),
    "one point": lambda i, c, r, s: (*2 * (i[:1, :1].repeat(B, 0).repeat(K, 1),), r, s),
    "equal residuals": lambda i, c, r, s: (i, c, r[:, :1].repeat(K, 1), s),
    "orthogonal residuals": lambda i, c, r, s: (i, c, np.eye(E, dtype=np.float32)[None, :K].repeat(B, 0), s),
    "residuals of 0": lambda i, c, r, s: (i, c, 0 * r, s),
    "one pair": lambda i, c, r, s: tuple(x[:1] for x in (i, c, r, s)),
    "one embedding each": lambda i, c, r, s: tuple(x[:, :1] for x in (i, c, r, s)),
}


@pytest.mark.parametrize("case", SPECIAL)
def test_gradients_are_finite_where_vectors_coincide(case):
    arguments = SPECIAL[case](*embeddings())
    value, gradients = jax.jit(jax.value_and_grad(lambda x: pvse_loss(*x)[0]))(arguments)
    assert np.isfinite(value)
    assert all(np.isfinite(gradient).all() and np.abs(gradient).max() < 10 for gradient in gradients)


def test_terms_at_their_minimum_and_maximum():
    images, _, residuals, _ = embeddings()
    assert float(mmd(images[:, 0], images[:, 0])) == pytest.approx(0, abs=1e-6)
    assert float(diversity(residuals[:, :1])) == 0
    assert float(diversity(jnp.ones((4, 3, E)))) == pytest.approx(6**0.5 / 9, rel=1e-5)  # six pairs of three are alike
    assert float(hardest_negative_hinge(jnp.ones((1, 1)), 0.1)) == 0
    assert float(hardest_negative_hinge(jnp.full((4, 4), 0.3), 0.1)) == pytest.approx(0.2)  # the margin, both ways
    assert float(pvse_loss(*embeddings())[1]["mmd"]) > 0
