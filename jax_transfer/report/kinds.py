"""Tells what kind of checkpoint each one is: how it was supervised, on which images, and its architecture's family."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jax_transfer.report.tables import short_target
from jax_transfer.results import Row

SUPERVISED = "supervised"
# Objective of pre-training -> its kind, as in Figure 1 of "Ranking Neural Checkpoints". CLIP is not in the paper.
KINDS = {
    "supervised": SUPERVISED,
    "moco_v2": "self-supervised",
    "simclr": "self-supervised",
    "dino": "self-supervised",
    "clip": "image-text",
    "rotation": "self-supervised",
    "relative_patch": "self-supervised",
    "jigsaw": "self-supervised",
    "exemplar": "self-supervised",
    "sup_exemplar": "hybrid",
    "semi_rotation": "semi-supervised",
    "semi_exemplar": "semi-supervised",
    "vae": "generative",
    "wae_mmd": "generative",
    "wae_gan": "generative",
    "wae_ukl": "generative",
    "mae": "self-supervised",
}
FROM_SCRATCH, GIVEN, UNKNOWN = "from scratch", "given", "pre-trained"


class Origin(NamedTuple):
    """What a checkpoint is.

    Attributes:
      kind: a value of KINDS; or FROM_SCRATCH, GIVEN for another checkpoint that was given to the study, or UNKNOWN.
      source: short name of the pre-training data; "" if unknown.
      family: family of the architecture, such as "resnet".
    """

    kind: str
    source: str
    family: str


def origins(results: Mapping[str, Sequence[Row]]) -> dict[str, Origin]:
    """Returns what each checkpoint with a row in results/transfer.jsonl is, in the order of these rows.

    Args:
      results: result file -> rows; uses transfer, pretrain and checkpoints.

    >>> transfer = [{"checkpoint": name, "epoch": epoch} for name, epoch in (("vae/5", 5), ("random resnet18", None))]
    >>> pretrain = [{"checkpoint": "vae/5", "objective": "vae", "source": "tfds:cifar10?train=64", "model": "resnet10"}]
    >>> origins({"transfer": transfer, "pretrain": pretrain})["vae/5"]
    Origin(kind='generative', source='cifar10', family='resnet')
    """
    pretrained = {row["checkpoint"]: row for row in results.get("pretrain", [])}
    described = {row["checkpoint"]: row for row in results.get("checkpoints", [])}
    return {
        row["checkpoint"]: _origin(row, pretrained.get(row["checkpoint"]), described.get(row["checkpoint"]))
        for row in results.get("transfer", [])
    }


def _origin(row: Row, pretrained: Row | None, described: Row | None) -> Origin:
    if pretrained:
        objective, source = pretrained["objective"], pretrained["source"].partition("?")[0]
        return Origin(KINDS.get(objective) or str(objective), short_target(source), family_of(pretrained["model"]))
    if row["epoch"] is not None:
        return Origin(UNKNOWN, "", family_of(row["checkpoint"]))
    kind = FROM_SCRATCH if is_random(described["path"] if described else row["checkpoint"]) else GIVEN
    return Origin(kind, "", family_of(described["model"] if described else row["checkpoint"]))


def is_random(path: str) -> bool:
    """Returns whether a given checkpoint is a random initialisation, which has this name in place of a path.

    >>> is_random("random resnet18"), is_random("/runs/random.safetensors")
    (True, False)
    """
    return path.startswith("random ")


def family_of(name: str) -> str:
    """Returns the family of an architecture: its name up to the first number, in lower case.

    >>> family_of("resnet50"), family_of("mobilenet_v1_0.25"), family_of("DenseNet-121"), family_of("50")
    ('resnet', 'mobilenet', 'densenet', '50')
    """
    found = re.match(r"[a-z]+(?:[ _-]?[a-z]{2,})*", name.lower())
    return found[0] if found else name


def groups(known: Mapping[str, Origin]) -> dict[str, str]:
    """Groups checkpoints by what distinguishes them most: kind, else pre-training data, else family of architectures.

    Among several kinds, supervised checkpoints are divided by their pre-training data, as in Figure 1 of "Ranking
    Neural Checkpoints". Training from scratch is a group of its own, and so are given checkpoints beside others.

    Args:
      known: see `origins`.

    Returns:
      Checkpoint -> label of its group.

    >>> supervised, scratch = Origin("supervised", "cifar10", "resnet"), Origin("from scratch", "", "resnet")
    >>> groups({"a": supervised, "b": supervised._replace(source="svhn"), "c": scratch})
    {'a': 'on cifar10', 'b': 'on svhn', 'c': 'from scratch'}
    >>> groups({"a": supervised, "b": supervised._replace(family="vit"), "c": scratch})
    {'a': 'resnet', 'b': 'vit', 'c': 'from scratch'}
    """
    trained = [origin for origin in known.values() if origin.kind not in (FROM_SCRATCH, GIVEN)]
    several_kinds = len({origin.kind for origin in trained}) > 1
    several_sources = len({o.source for o in trained if o.kind == SUPERVISED or not several_kinds}) > 1

    def label(origin: Origin) -> str:
        if origin.kind == FROM_SCRATCH or (origin.kind == GIVEN and trained):
            return origin.kind
        if several_kinds:
            divided = several_sources and origin.kind == SUPERVISED
            return f"{origin.kind} on {origin.source}" if divided else origin.kind
        return f"on {origin.source}" if several_sources else origin.family

    return {checkpoint: label(origin) for checkpoint, origin in known.items()}
