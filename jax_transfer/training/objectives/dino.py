"""DINO: a net learns to predict, from one view of an image, what its moving average makes of another view."""

import functools
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_transfer.fields import Count, Positive, Probability, between
from jax_transfer.models.net import Net, gaussian
from jax_transfer.records import InputError
from jax_transfer.training.objectives.objective import Division, Objective, head_and_backbone
from jax_transfer.training.objectives.parts import (
    check_ungrouped,
    check_unmixed,
    in_one_pass,
    linear,
    moved_towards,
    new_linear,
    unit,
)


def dino(
    net: Net,
    augment: tuple[str, ...],
    *,
    second_augment: tuple[str, ...] = ("global_crop", "jitter_byol", "gray", "blur_rarely", "solarize", "flip"),
    local_augment: tuple[str, ...] = ("local_crop", "jitter_byol", "gray", "blur", "flip"),
    num_local: Annotated[int, between(0, 100)] = 0,
    output_dim: Count = 65_536,
    hidden_dim: Count = 2048,
    bottleneck_dim: Count = 256,
    momentum: Probability = 0.996,
    center_momentum: Probability = 0.9,
    student_temperature: Positive = 0.1,
    teacher_temperature: Positive = 0.04,
) -> Objective:
    """Makes the objective of DINO: cross-entropies between the teacher's and the student's outputs for different views.

    Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021, arXiv:2104.14294, algorithm
    1. With the outputs t of the teacher for the two global views, s of the student for all views, and the centre c:

        loss = mean_{i global, j != i} -sum_k p_ik log softmax(s_j / t_S)_k,   p_i = softmax((t_i - c) / t_T)

    The teacher moves by 1 - momentum towards the student before each step, and c by 1 - center_momentum towards the
    mean of the teacher's outputs after it. Outputs come from a head of three layers with GELU, a bottleneck of unit
    length, and a linear layer whose columns have unit length.

    Ours, since an objective does not know how long training is: the momentum and the teacher's temperature are constant
    (the paper raises the former to 1, and the latter from 0.04 to 0.07), and the last layer is not frozen in the first
    epoch. Local views have the size of the global ones, for nets with a fixed image size.

    The feed is "train"; its labels are not used.

    Args:
      net: a net without a head.
      augment, second_augment: names of the augmentations of the two global views. The paper has
        ("global_crop", "jitter_byol", "gray", "blur_always", "flip") for the first.
      local_augment, num_local: names of the augmentations of the local views, which only the student sees, and their
        number. The paper has 10 of them.
      output_dim: columns of the outputs.
      hidden_dim, bottleneck_dim: columns of the layers of the head.
      momentum, center_momentum, student_temperature, teacher_temperature: as above.

    Returns:
      The objective. Its metric "entropy" is that of the teacher's mean prediction, in nats, which is near 0 if the
      outputs have collapsed to one. Its model is the teacher, which the paper evaluates, without its head.

    Raises:
      InputError: if a view mixes images.

    Example:
      >>> from jax_transfer.models.resnet import resnet10
      >>> objective = dino(resnet10(num_classes=0, width=8), ("flip",), num_local=2, output_dim=64, hidden_dim=32)
      >>> len(objective.views["train"])
      4
      >>> params, aux = jax.eval_shape(objective.init, jax.random.key(0), None)
      >>> sorted(params), aux["center"].shape
      (['head', 'net'], (64,))
    """
    check_unmixed("dino", (*augment, *second_augment, *local_augment))

    def init(key, model=None):
        params, stats = net.init(key) if model is None else (model["params"], model["stats"])
        keys = jax.random.split(jax.random.fold_in(key, 1), 4)
        head = {
            "0": new_linear(keys[0], net.feature_dim, hidden_dim),
            "1": new_linear(keys[1], hidden_dim, hidden_dim),
            "2": new_linear(keys[2], hidden_dim, bottleneck_dim),
            "last": {"kernel": gaussian(keys[3], (bottleneck_dim, output_dim), bottleneck_dim**-0.5)},
        }
        student = {"net": params, "head": head}
        return student, {"stats": stats, "teacher": student, "teacher_stats": stats, "center": jnp.zeros(output_dim)}

    def outputs(params, stats, images, key) -> tuple[list[Float[Array, "b o"]], dict]:
        """Returns the outputs for each view, and the new statistics."""
        found, stats = in_one_pass(net, params["net"], stats, images, key)
        return [project(params["head"], output.features) for output in found], stats

    def loss(params, aux, views, key):
        images = views["train"].images
        key_student, key_teacher = jax.random.split(key)
        teacher = moved_towards(aux["teacher"], params, momentum)
        targets, teacher_stats = outputs(teacher, aux["teacher_stats"], images[:2], key_teacher)
        predictions, stats = outputs(params, aux["stats"], images, key_student)
        raw = jax.lax.stop_gradient(jnp.stack(targets))
        probabilities = jax.nn.softmax((raw - aux["center"]) / teacher_temperature, -1)
        logs = [jax.nn.log_softmax(x / student_temperature, -1) for x in predictions]
        pairs = [(i, j) for i in range(2) for j in range(len(images)) if i != j]
        value = jnp.mean(jnp.stack([-(probabilities[i] * logs[j]).sum(-1).mean() for i, j in pairs]))
        mean = probabilities.mean((0, 1))
        new_aux = {
            "stats": stats,
            "teacher": teacher,
            "teacher_stats": teacher_stats,
            "center": aux["center"] + (1 - center_momentum) * (raw.mean((0, 1)) - aux["center"]),
        }
        return value, (new_aux, {"entropy": -(mean * jnp.log(mean + 1e-12)).sum()})

    def check(division: Division) -> None:
        if division.microbatches > 1:
            raise InputError(
                f"microbatches = {division.microbatches}: the teacher and the centre of its outputs move once for a "
                "whole batch; leave it at 1, and save memory with remat, a smaller batch_size or fewer local views."
            )
        check_ungrouped(division)

    return Objective(
        init,
        loss,
        model=lambda params, aux: {"params": aux["teacher"]["net"], "stats": aux["teacher_stats"]},
        views={"train": (augment, second_augment, *(local_augment,) * num_local)},
        has_head=False,
        groups=functools.partial(head_and_backbone, (("head",),)),
        check=check,
    )


def project(head, features: Float[Array, "b d"]) -> Float[Array, "b o"]:
    """Computes the outputs of the head of DINO, which lie in [-1, 1].

    >>> ones = {"kernel": jnp.ones((4, 4)), "bias": jnp.zeros(4)}
    >>> project({"0": ones, "1": ones, "2": ones, "last": {"kernel": jnp.eye(4)}}, jnp.ones((1, 4))).round(1).tolist()
    [[0.5, 0.5, 0.5, 0.5]]
    """
    x = jax.nn.gelu(linear(head["0"], features.astype(jnp.float32)), approximate=False)
    x = jax.nn.gelu(linear(head["1"], x), approximate=False)
    return unit(linear(head["2"], x)) @ unit(head["last"]["kernel"].T).T
