"""The Wasserstein autoencoder whose codes deceive a critic (Tolstikhin et al., ICLR 2018), by reversing gradients."""

import functools

import jax
from jaxtyping import Array, Float

from jax_transfer.fields import Count, Few, NotNegative
from jax_transfer.models.net import Net
from jax_transfer.training.objectives.autoencoder import autoencoder, deterministic_codes
from jax_transfer.training.objectives.objective import Objective
from jax_transfer.training.objectives.parts import linear, new_linear


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gradient_reversal(x: Array, factor: float) -> Array:
    """Returns x; gradients that flow back through it are multiplied by -factor.

    Ganin and Lempitsky, "Unsupervised Domain Adaptation by Backpropagation", ICML 2015, arXiv:1409.7495, section 3.2.

    Example:
      >>> float(jax.grad(lambda x: 3 * gradient_reversal(x, 0.5))(1.0))
      -1.5
    """
    return x


def _reversal_forward(x, factor):
    return x, None


def _reversal_backward(factor, _, gradient):
    return (-factor * gradient,)


gradient_reversal.defvjp(_reversal_forward, _reversal_backward)


def new_critic(key: jax.Array, inputs: int, width: int, layers: int) -> dict:
    """Draws a critic of codes: hidden layers with ReLU, and one output, the logit of a code being from the prior.

    Example:
      >>> [layer["kernel"].shape for layer in new_critic(jax.random.key(0), inputs=8, width=16, layers=2).values()]
      [(8, 16), (16, 16), (16, 1)]
    """
    widths = [inputs, *[width] * layers, 1]
    return {str(i): new_linear(jax.random.fold_in(key, i), widths[i], widths[i + 1]) for i in range(len(widths) - 1)}


def criticise(critic: dict, codes: Float[Array, "b e"]) -> Float[Array, " b"]:
    """Computes the logits of a critic.

    Example:
      >>> import jax.numpy as jnp
      >>> criticise(new_critic(jax.random.key(0), inputs=8, width=16, layers=2), jnp.ones((3, 8))).shape
      (3,)
    """
    for i in range(len(critic)):
        codes = linear(critic[str(i)], jax.nn.relu(codes) if i else codes)
    return codes[:, 0]


def adversarial_loss(prior: Float[Array, " a"], codes: Float[Array, " b"]) -> Float[Array, ""]:
    """Computes -mean log D(prior) - mean log(1 - D(codes)), of the logits of a critic D; log 4 if it is undecided.

    Example:
      >>> import jax.numpy as jnp
      >>> round(float(adversarial_loss(jnp.zeros(2), jnp.zeros(2))), 3)
      1.386
    """
    return jax.nn.softplus(-prior).mean() + jax.nn.softplus(codes).mean()


def wae_gan(
    net: Net,
    augment: tuple[str, ...],
    *,
    latent_dim: Count = 128,
    decoder_width: Count = 32,
    weight: NotNegative = 1.0,
    critic_width: Count = 512,
    critic_layers: Few = 4,
) -> Objective:
    """Makes the objective of WAE-GAN: a critic tells codes from draws of the prior, and the encoder deceives it.

    Algorithm 1 of Tolstikhin et al., "Wasserstein Auto-Encoders", ICLR 2018, arXiv:1711.01558. With V, the
    `adversarial_loss` of the critic, whose minimum over critics is log 4 - 2 JS(codes, prior):

        min over encoder and decoder, max over the critic:  (|x - decode(z)|^2 - weight * V) / number of values

    There is one loss, mean squared error + V, and one optimizer: the critic gets the gradient of V, and the encoder
    gets it times -weight / number of values, by `gradient_reversal`. So the game is the min-max one, in which the
    encoder ascends -log(1 - D(z)) of its codes z; the paper's encoder descends -log D(z) instead, which has the same
    fixed points. Codes are deterministic; the rest is in `autoencoder`.

    Args:
      net: a net; its classification head, if it has one, is not used.
      augment: names of the augmentations.
      latent_dim: dimension of the codes.
      decoder_width: channels of the decoder, see `new_decoder`.
      weight: weight of the divergence; the paper has 1 for CelebA and 10 for MNIST.
      critic_width, critic_layers: columns and number of the hidden layers of the critic.

    Returns:
      The objective, with the metrics "squared_error" and "penalty"; the latter is V, which is log 4 if the critic is
      undecided and 0 if it is always right. Its model is the net alone.

    Example:
      >>> from jax_transfer.models.resnet import resnet10
      >>> objective = wae_gan(resnet10(num_classes=0, width=8), ("flip",), latent_dim=16, decoder_width=4)
      >>> params, aux = jax.eval_shape(objective.init, jax.random.key(0), None)
      >>> params["code"]["kernel"].shape, params["critic"]["4"]["kernel"].shape
      ((64, 16), (512, 1))
    """

    def penalty(critic, codes, key, weight):
        prior = jax.random.normal(key, codes.z.shape)
        return adversarial_loss(criticise(critic, prior), criticise(critic, gradient_reversal(codes.z, weight)))

    return autoencoder(
        net,
        augment,
        deterministic_codes,
        penalty,
        latent_dim=latent_dim,
        decoder_width=decoder_width,
        weight=weight,
        new_critic=functools.partial(new_critic, inputs=latent_dim, width=critic_width, layers=critic_layers),
    )
