"""SimCLR: two views of an image have similar projections, those of different images do not."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jax_transfer.fields import Count, Positive
from jax_transfer.models.net import Net, with_projection, without_projection
from jax_transfer.numerics import unit
from jax_transfer.training.objectives.objective import Objective
from jax_transfer.training.objectives.parts import check_compared_views, check_unmixed, in_one_pass, similarities


def nt_xent(x: Float[Array, "b p"], y: Float[Array, "b p"], temperature: float) -> Float[Array, "2 b"]:
    """Computes the normalised temperature-scaled cross-entropy of each of the 2b views of b images.

    With the unit vectors z of all 2b projections and p(i) the other view of the image of i:

        l_i = -log( exp(z_i z_p(i) / temperature) / sum_{j != i} exp(z_i z_j / temperature) )

    Equation 1 of Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020. Of a
    batch that is split over devices only z is gathered; the similarities stay where their rows are.

    Args:
      x, y: projections of the first and of the second views, of any length.

    Example:
      >>> x = jnp.eye(2)  # the views of an image are equal, and orthogonal to those of the other
      >>> losses = nt_xent(x, x, temperature=1.0)  # -log(e / (e + 1 + 1))
      >>> losses.shape, round(float(losses.mean()), 3)
      ((2, 2), 0.551)
    """
    x, y = unit(x), unit(y)
    own = jnp.arange(len(x))

    def losses(x, y):
        others = jnp.where(jnp.eye(len(x), dtype=bool), -jnp.inf, similarities(x, x))
        logits = jnp.concatenate([similarities(x, y), others], -1) / temperature
        return optax.softmax_cross_entropy_with_integer_labels(logits, own)

    return jnp.stack([losses(x, y), losses(y, x)])


def simclr(
    net: Net,
    augment: tuple[str, ...],
    *,
    hidden_dim: Count = 4096,
    projection_dim: Count = 256,
    temperature: Positive = 0.1,
) -> Objective:
    """Makes the objective of SimCLR, the mean of `nt_xent` over both views of all images of the global batch.

    Chen et al., ICML 2020, arXiv:2002.05709. The projection is theirs, two linear layers with a ReLU between them, in
    the sizes of SLIP (Mu et al., 2022, arXiv:2112.12750), which has three layers with BatchNorm. Both views go through
    the net in one pass, so that BatchNorm sees both.

    The feed is "train"; its labels are not used.

    Args:
      net: a net without a head.
      augment: names of the augmentations of both views.
      hidden_dim, projection_dim: columns of the two layers of the projection.
      temperature: as in `nt_xent`.

    Returns:
      The objective. Its metric "contrast" is the share of first views whose most similar second view is their own. Its
      model is the net alone, without the projection.

    Raises:
      InputError: if `augment` mixes images.

    Example:
      >>> import jax
      >>> from jax_transfer.models.resnet import resnet10
      >>> objective = simclr(resnet10(num_classes=0, width=8), ("flip",), hidden_dim=128, projection_dim=32)
      >>> params, aux = jax.eval_shape(objective.init, jax.random.key(0), None)
      >>> params["projection"]["2"]["kernel"].shape, "projection" in objective.model(params, aux)["params"]
      ((128, 32), False)
    """
    check_unmixed("simclr", augment)
    net = with_projection(net, (hidden_dim, projection_dim))

    def init(key, model=None):
        params, stats = net.init(key)
        params, stats = (params, stats) if model is None else ({**params, **model["params"]}, model["stats"])
        return params, {"stats": stats}

    def loss(params, aux, views, key):
        outputs, stats = in_one_pass(net, params, aux["stats"], views["train"].images, key)
        x, y = (jnp.asarray(output.projection) for output in outputs)
        own = jnp.arange(len(x))
        contrast = (similarities(unit(x), unit(y)).argmax(-1) == own).mean()
        return nt_xent(x, y, temperature).mean(), ({"stats": stats}, {"contrast": contrast})

    return Objective(
        init,
        loss,
        model=lambda params, aux: {"params": without_projection(params), "stats": aux["stats"]},
        views={"train": (augment, augment)},
        has_head=False,
        check=check_compared_views,
    )
