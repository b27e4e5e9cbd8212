"""The stage of a study that explains: spectral components, similarities and t-SNE of the features of each checkpoint.

Before fine-tuning (`pretrained`) and after it (`finetuned`, where it was run), so that Table 1 and Figures 4 and 5 of
"Towards Inadequately Pre-trained Models" come out of one run.
"""

import functools
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from jax_transfer.analysis.embedding import tsne
from jax_transfer.analysis.spectral import (
    batched_spectral_components,
    effective_rank,
    main_rank,
    similarities,
    singular_values,
    spectral_decay,
)
from jax_transfer.logs import log
from jax_transfer.records import Features
from jax_transfer.report.best import with_metrics
from jax_transfer.report.spectral import shown_epochs
from jax_transfer.results import EmbeddingRow, Rows, SimilarityRow, SpectralRow, SpectrumRow, to_json_dict
from jax_transfer.study import estimates, groups
from jax_transfer.study.finetune import tune_again, tuned_checkpoint
from jax_transfer.study.snapshots import Snapshot
from jax_transfer.study.workspace import Workspace
from jax_transfer.transfer.probe import PROTOCOLS, ProbeSettings, probe

COMPONENTS = ("full", "main", "residual")
SIMILARITY_IMAGES = 1000
PLACES = 60  # points of the spectrum in a row, evenly spaced on a logarithmic axis

Load = Callable[[Snapshot, str], Features]  # (checkpoint, split) -> features


def run(work: Workspace) -> None:
    """Components, spectra, similarities and embeddings for every target, before and after fine-tuning."""
    rows = Rows(work.results, "spectral")
    rows.forget_failures()
    _forget_other_metrics(work, rows)
    transfer = Rows(work.results, "transfer").rows
    for target in work.config.targets:
        _explain(work, target, "pretrained", work.snapshots, lambda s, split, t=target: work.features(s, t, split))
        tuned = {row.checkpoint for row in transfer if (row.target, row.method, row.error) == (target, "finetune", "")}
        done = [snapshot for snapshot in work.snapshots if snapshot.name in tuned]
        tune_again(work, _missing(work, target, "finetuned", done), target)
        _explain(work, target, "finetuned", done, functools.partial(_tuned_features, work, target))


def _tuned_features(work: Workspace, target: str, snapshot: Snapshot, split: str) -> Features:
    return work.features_of(tuned_checkpoint(work, snapshot, target), work.source(target, split))


def describe(work: Workspace) -> str:
    """Describes this stage for the plan."""
    return f"components, spectra and t-SNE: {estimates.checkpoints(work)}"


def _forget_other_metrics(work: Workspace, rows: Rows) -> None:
    """Drops rows of an earlier version that lack the accuracy which counts on their target, so that they are made again."""
    kept = [row for row in rows.rows if math.isfinite(getattr(row, work.metrics.get(row.target, "accuracy")))]
    if len(kept) < len(rows.rows):
        count = len(rows.rows) - len(kept)
        log.info("%d rows of %s lack the mean class accuracy: they are computed again.", count, rows.path)
        rows.replace(kept)


def _missing(work: Workspace, target: str, stage: str, snapshots: list[Snapshot]) -> list[Snapshot]:
    """Those without components or without a spectrum."""
    spectral, spectrum = Rows(work.results, "spectral"), Rows(work.results, "spectrum")
    return [
        s
        for s in snapshots
        if (s.name, target, stage) not in spectrum
        or not all((s.name, target, stage, component) in spectral for component in COMPONENTS)
    ]


def _explain(work: Workspace, target: str, stage: str, snapshots: list[Snapshot], load: Load) -> None:
    if not snapshots:
        return
    log.info("spectral components on %s, %s: %d checkpoints", target, stage, len(snapshots))
    rows = Rows(work.results, "spectral")
    missing = _missing(work, target, stage, snapshots)
    for group in groups.by_feature_dim(work, missing, target, copies=len(COMPONENTS) + 1):
        read = functools.cache(load)  # once for all that is made of a group's features
        valid = [snapshot for snapshot in group if _is_valid(work, target, stage, snapshot, read, rows)]
        _components(work, target, stage, valid, read, rows)
        _spectra(work, target, stage, valid, read)
    failed = {row.checkpoint for row in rows.rows if (row.target, row.stage) == (target, stage) and row.error}
    valid = [snapshot for snapshot in snapshots if snapshot.name not in failed]
    _similarities(work, target, stage, valid, load)
    _embeddings(work, target, stage, valid, load)


def _is_valid(work: Workspace, target: str, stage: str, snapshot: Snapshot, load: Load, rows: Rows) -> bool:
    """Whether the features are finite; if not, rows say what is wrong."""
    error = groups.problem(work, target, functools.partial(load, snapshot))
    if error:
        log.warning("checkpoint %s on %s, %s, is skipped: %s.", snapshot.name, target, stage, error)
        for component in COMPONENTS:
            rows.append(SpectralRow(snapshot.name, snapshot.epoch, target, stage, component, math.nan, math.nan, error))
    return not error


def _components(work: Workspace, target: str, stage: str, snapshots: list[Snapshot], load: Load, rows: Rows) -> None:
    """A probe on the full features, the main and the residual component of each batch of 128, as in Table 1."""
    missing = [s for s in snapshots if not all((s.name, target, stage, c) in rows for c in COMPONENTS)]
    if not missing:
        return
    spectral = work.config.spectral
    settings = ProbeSettings(epochs=spectral.epochs, batch_size=128, learning_rates=(0.01,))
    splits, ranks = {}, []
    for split in ("train", "test"):
        order = np.random.default_rng(work.config.seed).permutation(len(work.source(target, split)))
        stacked = []
        for snapshot in missing:
            found = load(snapshot, split)
            x = jnp.asarray(found.features[order])
            parts = batched_spectral_components(x, spectral.batch_size or len(x))
            stacked += [x, parts.main, parts.residual]
            if split == "train":
                most = min(spectral.batch_size or len(x), *x.shape)
                kept = float(jnp.mean(parts.rank))
                ranks.append({"full": float(most), "main": kept, "residual": most - kept})
        splits[split] = jnp.stack(stacked), found.labels[order]
    num_classes = work.source(target, "train").num_classes
    result = probe(PROTOCOLS["probe"], splits["train"], splits["test"], num_classes, settings, work.config.seed)
    parts = [
        (snapshot, rank, component) for snapshot, rank in zip(missing, ranks, strict=True) for component in COMPONENTS
    ]
    for i, (snapshot, rank, component) in enumerate(parts):
        rows.append(
            SpectralRow(
                snapshot.name,
                snapshot.epoch,
                target,
                stage,
                component,
                rank[component],
                accuracy=float(result.accuracy[i, 0]),
                mean_class_accuracy=float(result.mean_class_accuracy[i, 0]),
            )
        )


def _spectra(work: Workspace, target: str, stage: str, snapshots: list[Snapshot], load: Load) -> None:
    rows = Rows(work.results, "spectrum")
    for snapshot in snapshots:
        if (snapshot.name, target, stage) in rows:
            continue
        s = singular_values(jnp.asarray(load(snapshot, "train").features))
        places = np.unique(np.geomspace(1, len(s), PLACES).round().astype(int))
        shares = np.asarray(s / jnp.maximum(jnp.sum(s), jnp.finfo(s.dtype).tiny))[places - 1]
        rows.append(
            SpectrumRow(
                snapshot.name,
                snapshot.epoch,
                target,
                stage,
                rank=int(main_rank(s)),
                effective_rank=float(effective_rank(s)),
                decay=float(spectral_decay(s)),
                places=places.tolist(),
                shares=shares.tolist(),
            )
        )


def _similarities(work: Workspace, target: str, stage: str, snapshots: list[Snapshot], load: Load) -> None:
    rows = Rows(work.results, "similarity")
    names = [snapshot.name for snapshot in snapshots]
    if not names or all((a, b, target, stage) in rows for a in names for b in names):
        return
    images = _some_images(work, target, SIMILARITY_IMAGES)
    widest = max(work.source_net(snapshot.pretraining).feature_dim for snapshot in snapshots)

    def stacked(part: list[Snapshot]):
        features = [load(snapshot, "test").features[images] for snapshot in part]
        # Columns of zeros change neither similarity.
        return jnp.stack([np.pad(x, ((0, 0), (0, widest - x.shape[1]))) for x in features])

    n = len(images)
    bytes_each = 2 * 4 * (2 * n**2 + n * widest)  # of the checkpoints of two parts
    parts = groups.within_budget(work, snapshots, bytes_each, "similarities", target)
    cka, overlap = {}, {}
    for i, part in enumerate(parts):
        x = stacked(part)
        for other in parts[i:]:
            found = similarities(x) if other is part else similarities(x, stacked(other))
            pairs = [(a.name, b.name) for a in part for b in other]
            for values, matrix in ((cka, found.cka), (overlap, found.overlap)):
                for (a, b), value in zip(pairs, np.asarray(matrix, float).ravel(), strict=True):
                    values[a, b] = values[b, a] = value
    new = [SimilarityRow(a, b, target, stage, cka[a, b], overlap[a, b]) for a in names for b in names]
    rows.replace([row for row in rows.rows if (row.target, row.stage) != (target, stage)] + new)


def _embeddings(work: Workspace, target: str, stage: str, snapshots: list[Snapshot], load: Load) -> None:
    """Embeds, for each pre-training, the epochs that Table 1 shows: the best one for FE and the last one (Figure 4)."""
    rows = Rows(work.results, "embedding")
    results = {
        name: with_metrics(map(to_json_dict, Rows(work.results, name).rows), work.metrics)
        for name in ("transfer", "spectral")
    }
    images = _some_images(work, target, work.config.spectral.embedded_images)
    shown = {p.name: shown_epochs(results, target, p.name) if len(images) else [] for p in work.pretrainings}
    chosen = [snapshot for snapshot in snapshots if snapshot.epoch in shown[snapshot.pretraining.name]]
    names = [snapshot.name for snapshot in chosen]
    kept = [row for row in rows.rows if (row.target, row.stage) != (target, stage) or row.checkpoint in names]
    if len(kept) < len(rows.rows):  # another epoch was the best one
        rows.replace(kept)
    for snapshot in chosen:
        if (snapshot.name, target, stage) in rows:
            continue
        found = load(snapshot, "test")
        x, y = tsne(found.features[images], seed=work.config.seed).T
        rows.append(
            EmbeddingRow(
                snapshot.name,
                snapshot.epoch,
                target,
                stage,
                x=x.round(2).tolist(),
                y=y.round(2).tolist(),
                labels=found.labels[images].tolist(),
            )
        )


def _some_images(work: Workspace, target: str, count: int) -> np.ndarray:
    """The same random test images for all checkpoints."""
    n = len(work.source(target, "test"))
    return np.sort(np.random.default_rng(work.config.seed).permutation(n)[:count])
