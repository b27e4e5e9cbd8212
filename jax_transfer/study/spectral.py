"""The "spectral" stage: spectral components, similarities and t-SNE embeddings of the features of each checkpoint.

It analyses the features before fine-tuning (`pretrained`) and, if the checkpoints were fine-tuned, also those after
fine-tuning (`finetuned`), as Table 1 and Figures 4 and 5 of "Towards Inadequately Pre-trained Models" require.
"""

import functools
import math
from collections.abc import Callable, Mapping

import jax
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
from jax_transfer.report.spectral import shown_checkpoints
from jax_transfer.results import (
    TEST,
    EmbeddingRow,
    Rows,
    SimilarityRow,
    SpectralRow,
    SpectrumRow,
    is_plain,
    to_json_dict,
)
from jax_transfer.study import estimates, groups
from jax_transfer.study.epochs import Snapshot
from jax_transfer.study.finetune import chosen_rates, tune_again, tuned_checkpoint
from jax_transfer.study.workspace import Workspace
from jax_transfer.transfer.probe import PROTOCOLS, ProbeSettings, probe

COMPONENTS = ("full", "main", "residual")
SIMILARITY_IMAGES = 1000  # number of test images on which checkpoints are compared
SPECTRUM_POINTS = 60  # number of singular values in a row, evenly spaced on a logarithmic axis
COMPONENT_BATCH_SIZE = 128  # batch size of the probes on the components

Load = Callable[[Snapshot, str], Features]  # (checkpoint, split) -> features


def run(work: Workspace) -> None:
    """Computes components, spectra, similarities and embeddings for every target, before and after fine-tuning."""
    rows = Rows(work.results, "spectral")
    rows.forget_failures()
    _forget_other_metrics(work, rows)
    transfer = list(filter(is_plain, Rows(work.results, "transfer").rows))
    for target in work.config.targets:
        _explain(work, target, "pretrained", work.snapshots, lambda s, split, t=target: work.features(s, t, split))
        key = target, "finetune", TEST, ""
        tuned = {row.checkpoint for row in transfer if (row.target, row.method, row.split, row.error) == key}
        done = [snapshot for snapshot in work.snapshots if snapshot.name in tuned]
        tune_again(work, _missing(work, target, "finetuned", done), target)
        rates = chosen_rates(work, done, target)
        _explain(work, target, "finetuned", done, functools.partial(_tuned_features, work, target, rates))


def _tuned_features(work: Workspace, target: str, rates: Mapping, snapshot: Snapshot, split: str) -> Features:
    """Returns the features of a checkpoint that was fine-tuned on a target with these rates."""
    tuned = tuned_checkpoint(work, snapshot, target, rates[snapshot])
    return work.features_of(tuned, work.source(target, split))


def describe(work: Workspace) -> str:
    """Describes this stage for the plan."""
    return f"components, spectra and t-SNE: {estimates.checkpoints(work)}"


def _forget_other_metrics(work: Workspace, rows: Rows) -> None:
    """Drops rows from an earlier version that lack the metric of their target, so that they are computed again."""
    kept = [row for row in rows.rows if math.isfinite(getattr(row, work.metrics.get(row.target, "accuracy")))]
    if len(kept) < len(rows.rows):
        count = len(rows.rows) - len(kept)
        log.info("%d rows of %s lack the mean class accuracy: they are computed again.", count, rows.path)
        rows.replace(kept)


def _missing(work: Workspace, target: str, stage: str, snapshots: list[Snapshot]) -> list[Snapshot]:
    """Lists the checkpoints whose components or spectrum have no rows yet."""
    spectral, spectrum = Rows(work.results, "spectral"), Rows(work.results, "spectrum")
    return [
        s
        for s in snapshots
        if (s.name, target, stage) not in spectrum
        or not all((s.name, target, stage, component) in spectral for component in COMPONENTS)
    ]


def _explain(work: Workspace, target: str, stage: str, snapshots: list[Snapshot], load: Load) -> None:
    """Writes the missing rows of all result files of this stage, for one target, before or after fine-tuning."""
    if not snapshots:
        return
    log.info("spectral components on %s, %s: %d checkpoints", target, stage, len(snapshots))
    rows = Rows(work.results, "spectral")
    missing = _missing(work, target, stage, snapshots)
    for group in groups.by_feature_dim(work, missing, target, copies=len(COMPONENTS) + 1):
        load_once = functools.cache(load)  # reads the features of a group once for both components and spectra
        valid = [snapshot for snapshot in group if _is_valid(work, target, stage, snapshot, load_once, rows)]
        _components(work, target, stage, valid, load_once, rows)
        _spectra(work, target, stage, valid, load_once)
    failed = {row.checkpoint for row in rows.rows if (row.target, row.stage) == (target, stage) and row.error}
    valid = [snapshot for snapshot in snapshots if snapshot.name not in failed]
    _similarities(work, target, stage, valid, load)
    _embeddings(work, target, stage, valid, load)


def _is_valid(work: Workspace, target: str, stage: str, snapshot: Snapshot, load: Load, rows: Rows) -> bool:
    """Returns whether the features of a checkpoint are valid; if not, writes rows with the reason."""
    error = groups.problem(work, target, functools.partial(load, snapshot))
    if error:
        log.warning("checkpoint %s on %s, %s, is skipped: %s.", snapshot.name, target, stage, error)
        for component in COMPONENTS:
            rows.append(
                SpectralRow(snapshot.name, work.epoch(snapshot), target, stage, component, math.nan, math.nan, error)
            )
    return not error


def _components(work: Workspace, target: str, stage: str, snapshots: list[Snapshot], load: Load, rows: Rows) -> None:
    """Probes the full features and their main and residual components, computed batch by batch, as in Table 1."""
    missing = [s for s in snapshots if not all((s.name, target, stage, c) in rows for c in COMPONENTS)]
    if not missing:
        return
    settings = ProbeSettings(
        epochs=work.config.spectral.epochs, batch_size=COMPONENT_BATCH_SIZE, learning_rates=(0.01,)
    )
    train, ranks = _stacked_components(work, target, "train", missing, load)
    test, _ = _stacked_components(work, target, "test", missing, load)
    num_classes = work.source(target, "train").num_classes
    result = probe(PROTOCOLS["probe"], train, test, num_classes, settings, work.config.seed)
    probed = [
        (snapshot, rank, component) for snapshot, rank in zip(missing, ranks, strict=True) for component in COMPONENTS
    ]
    for i, (snapshot, rank, component) in enumerate(probed):
        rows.append(
            SpectralRow(
                snapshot.name,
                work.epoch(snapshot),
                target,
                stage,
                component,
                rank[component],
                accuracy=float(result.accuracy[i, 0]),
                mean_class_accuracy=float(result.mean_class_accuracy[i, 0]),
            )
        )


def _stacked_components(
    work: Workspace, target: str, split: str, snapshots: list[Snapshot], load: Load
) -> tuple[tuple[jax.Array, jax.Array | np.ndarray], list[dict[str, float]]]:
    """Returns the components of k checkpoints' features, with the images in random order.

    Returns:
      ((components, labels), ranks). components: [3 k, n, d], in the order of COMPONENTS for each checkpoint;
      labels: [n]; ranks: for each checkpoint, component -> rank averaged over batches.
    """
    batch_size = work.config.spectral.batch_size
    order = np.random.default_rng(work.config.seed).permutation(len(work.source(target, split)))
    stacked, ranks = [], []
    for snapshot in snapshots:
        features = load(snapshot, split)
        x = jnp.asarray(features.features[order])
        parts = batched_spectral_components(x, batch_size or len(x))
        stacked += [x, parts.main, parts.residual]
        full_rank = min(batch_size or len(x), *x.shape)
        main = float(jnp.mean(parts.rank))
        ranks.append({"full": float(full_rank), "main": main, "residual": full_rank - main})
    return (jnp.stack(stacked), features.labels[order]), ranks


def _spectra(work: Workspace, target: str, stage: str, snapshots: list[Snapshot], load: Load) -> None:
    """Writes the spectrum of the training features of each checkpoint."""
    rows = Rows(work.results, "spectrum")
    for snapshot in snapshots:
        if (snapshot.name, target, stage) in rows:
            continue
        s = singular_values(jnp.asarray(load(snapshot, "train").features))
        places = np.unique(np.geomspace(1, len(s), SPECTRUM_POINTS).round().astype(int))
        shares = np.asarray(s / jnp.maximum(jnp.sum(s), jnp.finfo(s.dtype).tiny))[places - 1]
        rows.append(
            SpectrumRow(
                snapshot.name,
                work.epoch(snapshot),
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
    """Writes the similarity of the test features of every pair of checkpoints."""
    rows = Rows(work.results, "similarity")
    names = [snapshot.name for snapshot in snapshots]
    if not names or all((a, b, target, stage) in rows for a in names for b in names):
        return
    images = _some_images(work, target, SIMILARITY_IMAGES)
    widest = max(work.checkpoint(snapshot).net.feature_dim for snapshot in snapshots)

    def stack_features(part: list[Snapshot]) -> jax.Array:
        features = [load(snapshot, "test").features[images] for snapshot in part]
        # Padding with columns of zeros changes neither of the two similarities.
        return jnp.stack([np.pad(x, ((0, 0), (0, widest - x.shape[1]))) for x in features])

    n = len(images)
    bytes_each = 2 * 4 * (2 * n**2 + n * widest)  # twice, because two parts are in memory together
    parts = groups.within_budget(work, snapshots, bytes_each, "similarities", target)
    cka, overlap = {}, {}
    for i, part in enumerate(parts):
        x = stack_features(part)
        for other in parts[i:]:
            result = similarities(x) if other is part else similarities(x, stack_features(other))
            pairs = [(a.name, b.name) for a in part for b in other]
            for values, matrix in ((cka, result.cka), (overlap, result.overlap)):
                for (a, b), value in zip(pairs, np.asarray(matrix, float).ravel(), strict=True):
                    values[a, b] = values[b, a] = value
    new = [SimilarityRow(a, b, target, stage, cka[a, b], overlap[a, b]) for a in names for b in names]
    rows.replace([row for row in rows.rows if (row.target, row.stage) != (target, stage)] + new)


def _embeddings(work: Workspace, target: str, stage: str, snapshots: list[Snapshot], load: Load) -> None:
    """Writes t-SNE embeddings for the checkpoints in Table 1, see `shown_checkpoints`."""
    rows = Rows(work.results, "embedding")
    transfer, spectral = (Rows(work.results, name).rows for name in ("transfer", "spectral"))
    found = {"transfer": filter(is_plain, transfer), "spectral": spectral}
    results = {name: with_metrics(map(to_json_dict, own), work.metrics) for name, own in found.items()}
    images = _some_images(work, target, work.config.spectral.embedded_images)
    shown = shown_checkpoints(results, target) if len(images) else []
    chosen = [snapshot for snapshot in snapshots if snapshot.name in shown]
    names = [snapshot.name for snapshot in chosen]
    kept = [row for row in rows.rows if (row.target, row.stage) != (target, stage) or row.checkpoint in names]
    if len(kept) < len(rows.rows):  # a different epoch was the best one in an earlier run
        rows.replace(kept)
    for snapshot in chosen:
        if (snapshot.name, target, stage) in rows:
            continue
        features = load(snapshot, "test")
        x, y = tsne(features.features[images], seed=work.config.seed).T
        rows.append(
            EmbeddingRow(
                snapshot.name,
                work.epoch(snapshot),
                target,
                stage,
                x=x.round(2).tolist(),
                y=y.round(2).tolist(),
                labels=features.labels[images].tolist(),
            )
        )


def _some_images(work: Workspace, target: str, count: int) -> np.ndarray:
    """Returns indices of random test images, which are the same for all checkpoints."""
    n = len(work.source(target, "test"))
    return np.sort(np.random.default_rng(work.config.seed).permutation(n)[:count])
