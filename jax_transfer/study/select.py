"""The "select" stage: selects classes or clusters of source images for each target, and finds copies of test images."""

import dataclasses
import io
import json
import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps

from jax_transfer import devices, logs
from jax_transfer.checkpoints import Checkpoint
from jax_transfer.data.hashing import hashes
from jax_transfer.data.source import Source, content_hash
from jax_transfer.features.extract import make_forward
from jax_transfer.features.means import REPRESENTATIONS, class_means, on_device
from jax_transfer.logs import log
from jax_transfer.records import InputError
from jax_transfer.results import OverlapRow, Rows, SelectionRow, picture, write_array, write_atomically
from jax_transfer.selection.clusters import group_means, kmeans
from jax_transfer.selection.overlap import find_overlap
from jax_transfer.selection.strategies import STRATEGIES, Problem, SelectionSettings, select, wanted_names
from jax_transfer.study import settings
from jax_transfer.study.epochs import Snapshot, finetuned_snapshots
from jax_transfer.study.workspace import Workspace

# The picture of a selection shows this many classes with this many images each.
PICTURED_CLASSES, PICTURED_IMAGES, PICTURED_PIXELS = 12, 8, 64


class Units(NamedTuple):
    """The classes or clusters from which a selection selects.

    Attributes:
      labels: int [n], the unit of each image of the source.
      means: float32 [s, d], mean feature of each unit.
      names: names of the s units.
    """

    labels: np.ndarray
    means: np.ndarray
    names: tuple[str, ...]

    @property
    def counts(self) -> np.ndarray:
        """Number of images of each unit."""
        return np.bincount(self.labels, minlength=len(self.names))


def run(work: Workspace) -> None:
    """Makes all selections for every target with the features of every checkpoint that is fine-tuned on it."""
    rows, overlaps = Rows(work.results, "selection"), Rows(work.results, "overlap")
    devices.wait_for_all("select: rows are read")
    for target in work.config.targets:
        for snapshot in finetuned_snapshots(work.config, work.snapshots, target):
            if work.config.select.find_duplicates:
                _find_duplicates(work, snapshot, target, overlaps)
            for name, selection in settings.selections(work.config).items():
                _select(work, snapshot, target, name, selection, rows)


def describe(work: Workspace) -> str:
    """Describes this stage for the plan."""
    return f"{', '.join(work.config.select.selections)} from {work.reused}"


def gigaflops(work: Workspace) -> float:
    """Computes the work of the forward passes over all source and target images, in GFLOP."""
    total = 0.0
    seen = set()
    for target in work.config.targets:
        for snapshot in finetuned_snapshots(work.config, work.snapshots, target):
            datasets = [target] if snapshot in seen else [work.reused, target]
            seen.add(snapshot)
            images = sum(len(work.source(dataset, "train")) for dataset in datasets)
            total += images * work.gigaflops_per_image(snapshot)
    return total


def selected_images(work: Workspace, snapshot: Snapshot, target: str, name: str) -> np.ndarray:
    """Returns the indices of the training images of the source that a selection has selected, int64 [m], ascending.

    Images that nearly equal a test image of the target are left out if the config says so.

    Raises:
      InputError: if the selection has not been made, or was made from other classes or clusters.
    """
    selection = settings.selections(work.config)[name]
    units = _units(work, snapshot, selection)
    found = _complete(work, snapshot, target, name, units, Rows(work.results, "selection"))
    if not found:
        raise InputError(f"{not_made(name, target, snapshot)}.")
    kept = np.isin(units.labels, [row.label for row in found])
    if work.config.select.exclude_duplicates:
        overlaps = Rows(work.results, "overlap").rows
        kept[[r.source_image for r in overlaps if (r.checkpoint, r.target) == (snapshot.name, target)]] = False
    return np.flatnonzero(kept).astype(np.int64)


def not_made(name: str, target: str, snapshot: Snapshot) -> str:
    """Says that a selection is missing, and what makes it."""
    return (
        f"selection {name!r} for {target} with checkpoint {snapshot.name} has not been made: "
        'add "select" to config.stages, or, by label, name the classes in config.select.labels'
    )


def _select(
    work: Workspace, snapshot: Snapshot, target: str, name: str, selection: SelectionSettings, rows: Rows
) -> None:
    """Makes a selection and writes its rows and its picture, unless the rows are complete."""
    units = _units(work, snapshot, selection)
    strategy, where = STRATEGIES[selection.strategy], f"config.select.selections[{name!r}] for {target}"
    if _complete(work, snapshot, target, name, units, rows):
        return
    means, counts = _class_means(work, snapshot, target)
    for dataset, names, numbers in ((work.reused, units.names, units.counts), (target, None, counts)):
        empty = np.flatnonzero(numbers == 0)
        if strategy.has_similarity and len(empty):
            names = names or work.source(dataset, "train").class_names
            raise InputError(
                f"{where}: class {names[empty[0]]!r} of {dataset} has no training images and so no mean feature: leave "
                "it out with ?classes=, or use more images."
            )
    problem = Problem(
        units.means,
        means,
        units.names,
        work.source(target, "train").class_names,
        counts,
        work.config.select.labels.get(target),
        # Different targets get different random selections; of those of a target, a larger one contains a smaller one.
        (work.config.seed + zlib.crc32(f"{target} {selection.kind}".encode())) % 2**31,
    )
    if strategy.needs_names and not wanted_names(problem):
        log.info("Selection %s for %s: no class of %s has the name of one of its classes.", name, target, work.reused)
        return
    try:
        result = select(problem, selection)
    except InputError as error:
        raise InputError(f"{where} from {work.reused}: {error}") from error
    if not result.converged:
        log.warning("Selection %s for %s, checkpoint %s: the solver did not converge.", name, target, snapshot.name)
    chosen = np.asarray(result.indices).tolist()
    key = snapshot.name, target, name
    unfinished = [row for row in rows.rows if (row.checkpoint, row.target, row.strategy) == key]
    if unfinished:
        rows.replace([row for row in rows.rows if row not in unfinished])
    made_from = _made_from(work, snapshot, target, name, units)
    for rank, unit in enumerate(chosen, selection.first):
        row = SelectionRow(
            *key,
            kind=selection.kind,
            class_=units.names[unit],
            rank=rank,
            similarity=float(result.similarity[unit]) if strategy.has_similarity else None,
            label=unit,
            num_images=int(units.counts[unit]),
            num_selected=len(chosen),
            made_from=made_from,
            converged=bool(result.converged),
        )
        rows.append(row)
    if devices.is_first_process():
        shown = [np.flatnonzero(units.labels == unit) for unit in chosen[:PICTURED_CLASSES]]
        write_atomically(picture(work.results, *key), _contact_sheet(work.source(work.reused, "train"), shown))
    first = ", ".join(units.names[unit] for unit in chosen[:5])
    log.info("Selection %s for %s, checkpoint %s: %s, ...", name, target, snapshot.name, first)


def _complete(
    work: Workspace, snapshot: Snapshot, target: str, name: str, units: Units, rows: Rows
) -> list[SelectionRow]:
    """Returns the rows of a selection, or none if they are not complete.

    Raises:
      InputError: if the selection was made with other settings, or from other classes or clusters.
    """
    found = [row for row in rows.rows if (row.checkpoint, row.target, row.strategy) == (snapshot.name, target, name)]
    if not found or len(found) < found[0].num_selected:
        return []
    if found[0].made_from != _made_from(work, snapshot, target, name, units):
        raise InputError(
            f"{rows.path}: selection {name!r} for {target}, checkpoint {snapshot.name}, was made with other settings, "
            "or from other classes or clusters (clusters may differ between devices): give it another name, or use "
            "another --workdir."
        )
    return found


def _made_from(work: Workspace, snapshot: Snapshot, target: str, name: str, units: Units) -> str:
    """Returns a hash of what determines a selection."""
    return content_hash(
        json.dumps(dataclasses.asdict(settings.selections(work.config)[name]), sort_keys=True),
        json.dumps([work.config.select.representation, work.config.seed, work.config.select.labels.get(target)]),
        work.checkpoint(snapshot).fingerprint,
        *(work.source(dataset, "train").fingerprint for dataset in (work.reused, target)),
        np.ascontiguousarray(units.labels, np.int32).tobytes(),
    )[:16]


def _units(work: Workspace, snapshot: Snapshot, selection: SelectionSettings) -> Units:
    """Returns the classes of the source, or its clusters in the features of a checkpoint."""
    source = work.source(work.reused, "train")
    if selection.kind == "cluster":
        labels, means = _clusters(work, snapshot, selection.num_clusters)
        return Units(labels, means, tuple(f"cluster {number}" for number in range(len(means))))
    if source.num_classes < 2:
        raise InputError(
            f"{work.reused} has a single class, so there are no classes to select from: select clusters, with "
            '"kind": "cluster" in config.select.selections.'
        )
    return Units(source.labels, _class_means(work, snapshot, work.reused)[0], source.class_names)


def _checkpoint(work: Workspace, snapshot: Snapshot) -> Checkpoint:
    """Returns the checkpoint whose features or projection are compared."""
    has_projection = work.config.select.representation == "projection"
    return work.with_projection(snapshot) if has_projection else work.checkpoint(snapshot)


def _class_means(work: Workspace, snapshot: Snapshot, dataset: str) -> tuple[np.ndarray, ...]:
    """Returns the mean feature of each class of the training images of a data set, and the numbers of images."""

    def means(missing, *arguments, represent):
        yield missing[0], class_means(*arguments, represent=represent)

    return _kept(work, snapshot, dataset, "means", means)


def _clusters(work: Workspace, snapshot: Snapshot, count: int) -> tuple[np.ndarray, ...]:
    """Returns the cluster of each source image, in the features of a checkpoint, and the mean of each cluster.

    The other numbers of clusters that the config asks for are found at the same time, since extracting the features of
    all source images is the longest part.
    """
    chosen = settings.selections(work.config).values()
    numbers = sorted({selection.num_clusters for selection in chosen if selection.kind == "cluster"})
    counts = {f"clusters-{number}-{work.config.seed}": number for number in numbers}

    def cluster(missing, *arguments, represent):
        x = on_device(*arguments, represent=represent)
        for kind in missing:
            clusters = kmeans(x, counts[kind], metric="cosine", seed=work.config.seed)
            if not clusters.converged:
                log.warning("K-means of %s did not converge in %d iterations.", work.reused, clusters.iterations)
            means, _ = group_means(x, clusters.labels, counts[kind])
            yield kind, (np.asarray(clusters.labels), np.asarray(means))

    return _kept(work, snapshot, work.reused, f"clusters-{count}-{work.config.seed}", cluster, also=counts)


def _kept(
    work: Workspace, snapshot: Snapshot, dataset: str, kind: str, compute, also: Iterable[str] = ()
) -> tuple[np.ndarray, ...]:
    """Returns arrays that are computed from all training images of a data set, from a file if it exists.

    Args:
      kind: names the arrays, and their file.
      compute: compute(missing, forward, model, feed, mesh, batch_size, represent=...) -> pairs of a kind that is
        missing and its arrays.
      also: other kinds, which are computed with this one if they are missing too.
    """
    checkpoint, source = _checkpoint(work, snapshot), work.source(dataset, "train")
    features = work.features_of.path(checkpoint, source)
    assert features is not None  # a study keeps its features
    folder, name = features.parent / "selection", f"{work.config.select.representation}-{features.name}"
    paths = {each: folder / f"{each}-{name}" for each in (kind, *also)}
    exist = {each: all(devices.gather(path.exists())) for each, path in paths.items()}
    if not exist[kind]:
        mesh = devices.make_global_mesh()
        computed = compute(
            [each for each, exists in exist.items() if not exists],
            make_forward(checkpoint.net, checkpoint.preprocessing, mesh),
            devices.replicate(checkpoint.model, mesh),
            work.feed(dataset, "train", checkpoint.preprocessing, everywhere=True),
            mesh,
            work.config.data.eval_batch_size,
            represent=REPRESENTATIONS[work.config.select.representation],
        )
        for each, arrays in computed:
            if devices.is_first_process():
                buffer = io.BytesIO()
                np.savez(buffer, *arrays)
                write_atomically(paths[each], buffer.getvalue())
        devices.wait_for_all(f"{paths[kind].name} is written")
    with np.load(paths[kind]) as file:
        return tuple(file.values())


def _find_duplicates(work: Workspace, snapshot: Snapshot, target: str, rows: Rows) -> None:
    """Writes a row for each source image that nearly equals a test image, by its hash and by its features."""
    source, test = work.source(work.reused, "train"), work.source(target, "test")
    checkpoint = work.checkpoint(snapshot)

    def features(images: Source) -> np.ndarray:
        return np.asarray(work.features_of(checkpoint, images).features)

    found = find_overlap(source, test, features, source_hashes=_hashes(work, source))
    for i, j, distance, similarity in zip(found.source, found.test, found.distance, found.similarity, strict=True):
        row = OverlapRow(
            snapshot.name,
            target,
            int(i),
            int(j),
            source.class_names[source.labels[i]],
            test.class_names[test.labels[j]],
            int(distance),
            float(similarity),
        )
        rows.append(row)
    if not rows.rows:
        rows.replace([])  # an empty file: searched, and found nothing
    for note in found.notes:
        log.info("%s and %s: %s", work.reused, target, note)
    left_out = "are left out" if work.config.select.exclude_duplicates else "stay (config.select.exclude_duplicates)"
    count = len(np.unique(found.source))
    log.info("Images of %s that nearly equal a test image of %s: %d; they %s.", work.reused, target, count, left_out)


def _hashes(work: Workspace, source: Source) -> np.ndarray:
    """Returns the perceptual hashes of all images of a source, from a file if it exists."""
    path = work.workdir / "features" / "selection" / f"hashes-{source.fingerprint[:32]}.npy"
    if not path.exists():
        with logs.progress(len(source), f"hash {source.name} {source.split}", "images") as bar:
            computed = hashes(source, progress=lambda done: bar.update(done - bar.n))
        write_array(path, computed)
    return np.load(path)


def _contact_sheet(source: Source, rows: Sequence[np.ndarray]) -> bytes:
    """Returns a JPEG with a row for each list of image indices, of which it shows the first few."""
    side = PICTURED_PIXELS
    sheet = PIL.Image.new("RGB", (PICTURED_IMAGES * side, len(rows) * side), "white")
    for row, indices in enumerate(rows):
        for column, image in enumerate(source.read(indices[:PICTURED_IMAGES].tolist()) if len(indices) else ()):
            square = PIL.ImageOps.fit(PIL.Image.fromarray(np.squeeze(image)).convert("RGB"), (side, side))
            sheet.paste(square, (column * side, row * side))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
