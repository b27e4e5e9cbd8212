"""Collects the accuracies and scores of a working directory, and judges the scores by them."""

import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence

from jax_transfer.report.best import accuracy_by, with_metrics
from jax_transfer.report.kinds import family_of, is_random
from jax_transfer.results import GRID, Rows, ScoreRow, TransferRow, is_plain, to_json_dict
from jax_transfer.trust.evidence import Evidence, make
from jax_transfer.trust.judge import judge

FILES = ("ranking", "trust", "checklist", "points", "predictions")  # the result files of `judge`

Expected = Callable[[str, str], Iterable[str]]  # (method, target) -> the checkpoints that should have an accuracy


def judge_results(
    results: pathlib.Path, metrics: Mapping[str, str], expected: Expected | None = None, scores: Sequence[str] = ()
) -> dict[str, list]:
    """Judges the scores of a working directory by the accuracies of each method.

    Args:
      results: its folder of result files.
      metrics: metric of each target to judge, in order.
      expected: the checkpoints that should have an accuracy, whether they have one or not; by default those with a row.
      scores: scores that get a row even without any value, such as LEEP for models that have no classification head.

    Returns:
      Each of FILES -> its rows, over all methods.
    """
    transfer, scored = (Rows(results, name).rows for name in ("transfer", "scores"))
    transfer = [row for row in transfer if row.split not in GRID and is_plain(row) and row.target in metrics]
    rows: dict[str, list] = {name: [] for name in FILES}
    if not scored:
        return rows
    groups = _groups(results)
    for method in dict.fromkeys(row.method for row in transfer):
        own = [row for row in transfer if row.method == method]
        evidence = _evidence(method, own, scored, metrics, expected or (lambda method, target: ()), scores, *groups)
        for name, judged in judge(evidence).items():
            rows[name] += judged
    return rows


def _evidence(
    method: str,
    transfer: Sequence[TransferRow],
    scored: Sequence[ScoreRow],
    metrics: Mapping[str, str],
    expected: Expected,
    scores: Sequence[str],
    trajectories: Mapping[str, str],
    families: Mapping[str, str],
    random: set[str],
) -> Evidence:
    """Collects the accuracies of a method and all scores, over all checkpoints of the method, whether scored or not."""
    measured = with_metrics(map(to_json_dict, transfer), metrics)
    accuracies, spreads, seeds = {}, {}, {}
    for target in metrics:
        tried = [row.checkpoint for row in transfer if row.target == target]
        if not tried or not any(row.target == target for row in scored):
            continue
        points = accuracy_by("checkpoint", measured, target, method)
        for name in trained(list(dict.fromkeys((*expected(method, target), *tried))), random):
            key, point = (target, name), points.get(name)
            accuracies[key] = point.mean if point else math.nan
            if point and point.num_seeds > 1:
                spreads[key], seeds[key] = point.high - point.low, point.num_seeds
    values: dict[str, dict[tuple[str, str], float]] = {score: {} for score in scores}
    for row in scored:
        values.setdefault(row.score, {})[row.target, row.checkpoint] = row.value
    return make(
        method,
        accuracies,
        values,
        spreads=spreads,
        num_seeds=seeds,
        trajectories=trajectories,
        families=families,
        metrics=metrics,
    )


def _groups(results: pathlib.Path) -> tuple[dict[str, str], dict[str, str], set[str]]:
    """Returns the pre-training and the family of each checkpoint, as far as known, and the random initialisations.

    A family also names the images and the objective of the pre-training: upgrades differ in nothing else.
    """
    pretrained, given = (Rows(results, name).rows for name in ("pretrain", "checkpoints"))
    trajectories = {row.checkpoint: f"{row.model} {row.source} {row.objective}" for row in pretrained}
    families = {row.checkpoint: f"{family_of(row.model)} {row.source} {row.objective}" for row in pretrained}
    described = {row.checkpoint: row.path for row in given}
    names = {row.checkpoint for row in Rows(results, "transfer").rows if row.epoch is None} | described.keys()
    return trajectories, families, {name for name in names if is_random(described.get(name, name))}


def trained(names: Sequence[str], random: set[str]) -> Sequence[str]:
    """Leaves out the names of random initialisations, which show what training from scratch gives.

    To rank them would be easy, and no score that needs a classification head could be compared. If fewer than two other
    checkpoints remain, all names are kept.

    >>> trained(["1", "2", "random resnet18"], {"random resnet18"}), trained(["1", "b"], {"b"})
    (['1', '2'], ['1', 'b'])
    """
    rest = [name for name in names if name not in random]
    return rest if len(rest) > 1 else names
