"""Invented results of a study that reuses source images: selections, and fine-tuning in several ways."""

import numpy as np

from jax_transfer.results import OverlapRow, SelectionRow, TargetRow, TransferRow, to_json_dict

CHECKPOINT = "resnet18-f37072fd"
CUB, CALTECH = "tfds:cub200", "tfds:caltech101"
TARGETS = (CUB, CALTECH)
BIRDS = ("jay", "magpie", "chickadee", "bulbul", "robin", "junco", "house finch", "brambling")
CLASSES = (*BIRDS, *(f"n{number:08}" for number in range(2_000_000, 2_000_392)))  # the first are related to CUB
SELECTIONS = {
    "uot": {"strategy": "uot"},
    "random": {"strategy": "random"},
    "greedy_ot": {"strategy": "greedy_ot"},
    "labels": {"strategy": "labels"},
}
# Way of fine-tuning -> its gain over plain fine-tuning.
GAINS = {
    ("supervised", None): 0.0,
    ("cotuning", None): 0.005,
    ("joint", "random"): 0.001,
    ("joint", "greedy_ot"): 0.014,
    ("joint", "uot"): 0.03,
    ("joint", "labels"): 0.02,
}
PLAIN_ACCURACY = {CUB: 0.75, CALTECH: 0.9}


def config(**select):
    """Returns the config of the study as a report reads it; `select` are fields of config.select."""
    return {
        "name": "uot",
        "stages": ["select", "finetune", "report"],
        "checkpoints": [f"{CHECKPOINT}.pth"],
        "source": {"dataset": "tfds:imagenet2012"},
        "targets": list(TARGETS),
        "select": {"selections": SELECTIONS, "labels": {CUB: list(BIRDS)}, "exclude_duplicates": False, **select},
    }


def reuse_rows(target, gains=None, plain=None, seeds=(0, 1, 2), spread=0.004, checkpoint=CHECKPOINT):
    """Returns the rows of results/transfer.jsonl of each way; the seeds differ by `spread` in total."""
    plain = PLAIN_ACCURACY[target] if plain is None else plain
    return [
        to_json_dict(
            TransferRow(
                checkpoint,
                None,
                target,
                "finetune",
                seed,
                0.003,
                accuracy := plain + gain + spread * ((i / (len(seeds) - 1) - 0.5) if len(seeds) > 1 else 0),
                accuracy - 0.01,
                5994,
                5794,
                800.0,
                1e6,
                objective=objective,
                selection=selection,
                weight_decay=1e-4,
                source_weight={"supervised": None, "cotuning": 2.3}.get(objective, 0.3),
            )
        )
        for (objective, selection), gain in (GAINS if gains is None else gains).items()
        for i, seed in enumerate(seeds)
    ]


def selected_rows(target, name, classes, first=1, similar=True, kind="class", converged=True, checkpoint=CHECKPOINT):
    """Returns the rows of results/selection.jsonl of a selection, whose similarity falls with the rank."""
    return [
        to_json_dict(
            SelectionRow(
                checkpoint,
                target,
                name,
                kind,
                class_,
                first + i,
                float(5 * np.exp(-(first + i) / 30)) if similar else None,
                i,
                1300 - i,
                len(classes),
                "0123456789abcdef",
                converged,
            )
        )
        for i, class_ in enumerate(classes)
    ]


def make_selections(target, num_selected=100):
    """Returns the rows of all SELECTIONS for a target; that of labels only for CUB."""
    related = BIRDS if target == CUB else ()
    chosen = {
        "uot": (*related, *CLASSES[8 : 8 + num_selected - len(related)]),
        "random": CLASSES[200 : 200 + num_selected],
        "greedy_ot": (*related[:6], *CLASSES[100 : 100 + num_selected - len(related[:6])]),
        "labels": related,
    }
    return [
        row
        for name, classes in chosen.items()
        for row in selected_rows(target, name, classes, similar=name in ("uot", "greedy_ot"))
    ]


def target_row(target, metric="accuracy"):
    """Returns the row of results/targets.jsonl of a target."""
    return to_json_dict(TargetRow(target, metric, 200, ["Black-footed Albatross", "Laysan Albatross"], 5994, 5794, []))


def make_reuse_results(targets=TARGETS, seeds=(0, 1, 2)):
    """Returns the results of a study: selections, and each way of fine-tuning, of which UOT is the best."""
    return {
        "targets": [target_row(target) for target in targets],
        "selection": [row for target in targets for row in make_selections(target)],
        "transfer": [row for target in targets for row in reuse_rows(target, seeds=seeds)],
    }


def overlap_row(target, source_image, test_image, distance=0, similarity=0.99):
    """Returns a row of results/overlap.jsonl."""
    row = OverlapRow(CHECKPOINT, target, source_image, test_image, "jay", "Blue Jay", distance, similarity)
    return to_json_dict(row)
