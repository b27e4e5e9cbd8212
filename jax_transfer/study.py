"""The stages of a study in their order. They talk only through the working directory, so each can run alone."""

import math
import time

import jax

from jax_transfer import config as settings
from jax_transfer import devices, logs
from jax_transfer.analysis import ranking_row
from jax_transfer.finetuning import finetunes
from jax_transfer.logs import Rows, log
from jax_transfer.plan import record_targets
from jax_transfer.pretraining import pretrain
from jax_transfer.records import RankingRow, to_json_dict
from jax_transfer.report.best import accuracy_by, with_metrics
from jax_transfer.report.page import write_report
from jax_transfer.scoring import scores
from jax_transfer.spectra import spectral
from jax_transfer.transfer.probe import PROTOCOLS, probe
from jax_transfer.workspace import Workspace


def features(work: Workspace) -> None:
    """Extracts what the later stages will ask for, one compiled forward pass for the checkpoints of a pre-training.

    Several processes share the work.
    """
    pairs = [(snapshot, target) for target in work.config.targets for snapshot in work.snapshots]
    pairs = pairs[jax.process_index() :: jax.process_count()]
    with logs.progress(2 * len(pairs), "features", "sets") as bar:
        for snapshot, target in pairs:
            for split in ("train", "test"):
                work.features(snapshot, target, split)
                bar.update()


def probes(work: Workspace) -> None:
    """Linear probes on the frozen features: all checkpoints of a target in one compiled program."""
    rows = Rows(work.results, "transfer")
    rows.forget_failures()
    for target in work.config.targets:
        probing = settings.probe_settings(work.config, target)
        num_classes = work.source(target, "train").num_classes
        seeds = [work.config.seed + s for s in range(probing.num_seeds)]
        for method in probing.methods:
            missing = [s for s in work.snapshots if not all((s.name, target, method, seed) in rows for seed in seeds)]
            sound = []
            for snapshot in missing:
                error = work.problem(snapshot, target)
                if not error:
                    sound.append(snapshot)
                    continue
                log.warning("%s of checkpoint %s on %s is left out: %s.", method, snapshot.name, target, error)
                for seed in seeds:
                    rows.append(work.transfer_row(snapshot, target, method, seed, error=error))
            gflops = work.counted(row for row in rows.rows if (row.target, row.method) == (target, method))
            for group in work.groups(sound, target):
                log.info("%s on %s: %d checkpoints", method, target, len(group))
                start = time.perf_counter()
                train, test = (work.stacked_features(group, target, split) for split in ("train", "test"))
                result = probe(
                    PROTOCOLS[method],
                    (train.features, train.labels[0]),
                    (test.features, test.labels[0]),
                    num_classes,
                    probing,
                    work.config.seed,
                )
                seconds = (time.perf_counter() - start) / result.accuracy.size
                count = gflops.setdefault(train.features.shape[-1], result.gflops)
                for i, snapshot in enumerate(group):
                    for s, seed in enumerate(seeds):
                        rows.append(
                            work.transfer_row(
                                snapshot,
                                target,
                                method,
                                seed,
                                learning_rate=float(result.chosen[i, s]),
                                accuracy=float(result.accuracy[i, s]),
                                mean_class_accuracy=float(result.mean_class_accuracy[i, s]),
                                seconds=seconds,
                                gflops=count,
                            )
                        )


def report(work: Workspace) -> None:
    """How well each score ranks the checkpoints, then tables, figures and the page."""
    record_targets(work)
    Rows(work.results, "ranking").replace(_ranking(work))
    if devices.is_first_process():
        log.info("Report: %s", write_report(work.workdir))


def _ranking(work: Workspace) -> list[RankingRow]:
    """A row a target, method and score: against all checkpoints that the method is to evaluate, scored or not."""
    transfer, scored = (Rows(work.results, name).rows for name in ("transfer", "scores"))
    read = with_metrics(map(to_json_dict, transfer), work.metrics)
    found = []
    for target in work.config.targets:
        values = {}
        for row in scored:
            if row.target == target:
                values.setdefault(row.score, {})[row.checkpoint] = row.value
        if values:  # a score that no checkpoint has, such as LEEP without a head over classes, is shown without values
            values = {**{score: {} for score in work.config.scores}, **values}
        for method in dict.fromkeys(row.method for row in transfer if row.target == target):
            expected = work.tuned_snapshots(target) if method == "finetune" else work.snapshots
            tried = [row.checkpoint for row in transfer if (row.target, row.method) == (target, method)]
            names = list(dict.fromkeys([*(snapshot.name for snapshot in expected), *tried]))
            points = accuracy_by("checkpoint", read, target, method)
            accuracies = [points[name].mean if name in points else math.nan for name in names]
            for score, value in values.items():
                given = [value.get(name, math.nan) for name in names]
                found.append(ranking_row(target, method, score, given, accuracies, work.metric(target)))
    return found


STAGES = {
    "pretrain": pretrain,
    "features": features,
    "probe": probes,
    "finetune": finetunes,
    "scores": scores,
    "spectral": spectral,
    "report": report,
}
