"""The method "zero_shot" of the stage "probe": classes are recognised by captions with their names, without training.

It needs a pre-training with language (`Objective.zero_shot_head`); other checkpoints have no row.
"""

import functools
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from jax_transfer import devices
from jax_transfer.data.templates import TEMPLATES, captions_of
from jax_transfer.data.vocabulary import read_vocabulary
from jax_transfer.logs import log
from jax_transfer.records import InputError
from jax_transfer.results import Rows, results_of
from jax_transfer.study import groups, settings, text
from jax_transfer.study.epochs import Pretraining, Saved, Snapshot
from jax_transfer.study.pretrain import read_state
from jax_transfer.study.workspace import Workspace
from jax_transfer.training.objectives.parts import linear
from jax_transfer.transfer.probe import accuracy, mean_class_accuracy

METHOD = "zero_shot"


def run(work: Workspace, target: str, rows: Rows) -> None:
    """Writes a row for each checkpoint that was pre-trained with language; its `num_train` is 0."""
    source, seed, done = work.source(target, "train"), work.config.seed, results_of(rows.rows)
    able = with_language(work)
    log.info(
        "%s on %s: %d checkpoints with language (%d without have no row), %d captions of each class, chance is %.4f",
        *(METHOD, target, len(able), len(work.snapshots) - len(able), len(TEMPLATES), 1 / source.num_classes),
    )
    tokens_of = functools.cache(functools.partial(class_tokens, work, class_names=source.class_names))
    for snapshot, saved in able.items():
        if (snapshot.name, target, METHOD, seed) in done:
            continue
        start = time.perf_counter()
        head, gflops = zero_shot_head(work, saved, tokens_of(saved.pretraining))
        test = work.features(snapshot, target, "test")
        error = groups.problem(work, target, functools.partial(work.features, snapshot, target))
        if error:
            log.warning("%s of checkpoint %s on %s is skipped: %s.", METHOD, snapshot.name, target, error)
            rows.append(work.transfer_row(snapshot, target, METHOD, seed, num_train=0, error=error))
            continue
        with jax.default_matmul_precision("float32"):
            predicted = np.asarray(linear(head, jnp.asarray(test.features))).argmax(-1)
        labels = np.asarray(test.labels)
        correct, count = (
            np.bincount(labels[chosen], minlength=source.num_classes).astype(float)
            for chosen in (predicted == labels, slice(None))
        )
        row = work.transfer_row(
            snapshot,
            target,
            METHOD,
            seed,
            num_train=0,
            accuracy=float(accuracy(correct, count)),
            mean_class_accuracy=float(mean_class_accuracy(correct, count)),
            gflops=gflops,
            seconds=time.perf_counter() - start,
        )
        rows.append(row)


def with_language(work: Workspace) -> dict[Snapshot, Saved]:
    """Returns the checkpoints to evaluate that the study itself pre-trains with language, and their entries."""
    own = {snapshot: snapshot.origin for snapshot in work.snapshots if isinstance(snapshot.origin, Saved)}
    return {s: saved for s, saved in own.items() if work.objective(saved.pretraining).zero_shot_head is not None}


def check(work: Workspace, target: str) -> None:
    """Checks that some checkpoint of a study has language, if its probes on a target include METHOD.

    Raises:
      InputError: if none has.
    """
    if METHOD in settings.probe_settings(work.config, target).methods and not with_language(work):
        raise InputError(
            f"config.probe.methods lists {METHOD!r}, but no checkpoint of this study is pre-trained with language: "
            'leave it out, or pre-train with config.pretrain.objective = "clip".'
        )


def class_tokens(work: Workspace, pretraining: Pretraining, class_names: Sequence[str]) -> Int[np.ndarray, "c k l"]:
    """Returns the tokens of captions of classes, one with each of TEMPLATES, in the vocabulary of a pre-training.

    Raises:
      InputError: if the vocabulary cannot be read.
    """
    length = settings.objective_settings(work.recipe(pretraining).section)["context_length"]
    vocabulary = read_vocabulary(work.folder(pretraining) / text.FILE)
    captions = [caption for name in class_names for caption in captions_of(name)]
    return vocabulary.encode(captions, length).reshape(len(class_names), len(TEMPLATES), -1)


def zero_shot_head(work: Workspace, saved: Saved, tokens: Int[np.ndarray, "c k l"]) -> tuple[dict, float]:
    """Makes a linear head on a checkpoint's features from captions of classes.

    Embeddings of the captions of a class are normalised, averaged and normalised again (Radford et al., 2021,
    section 3.1.4). With the projection of the images and the learned scale, they are the columns of the kernel. Logits
    of CLIP divide by the length of the image's embedding, which this head does not: the predicted class is the same,
    but the softmax, and so the first steps of fine-tuning from this head, are not.

    Returns:
      ({"kernel": [d, c], "bias": [c]}, floating-point operations of the text tower / 1e9).

    Raises:
      InputError: if the checkpoint cannot be read.
      ValueError: if it is pre-trained without language.
    """
    make = work.objective(saved.pretraining).zero_shot_head
    if make is None:
        raise ValueError(f"{saved.pretraining.objective} has no zero_shot_head")
    params = read_state(work, saved)["params"]
    with jax.default_matmul_precision("float32"):
        head = jax.jit(make)(params, tokens)
    return head, devices.gigaflops(make, params, tokens[:1]) * len(tokens)
