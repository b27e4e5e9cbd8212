"""The given checkpoints of a study: how they are described, and how a change of one between two runs is noticed."""

from collections.abc import Callable, Iterable

import jax

from jax_transfer import devices
from jax_transfer.checkpoints import Checkpoint, with_classes
from jax_transfer.checkpoints.checkpoint import Model
from jax_transfer.ranking.candidates import Candidate
from jax_transfer.records import InputError
from jax_transfer.results import CheckpointRow, Rows
from jax_transfer.study.epochs import Snapshot, identity


def without_weights(snapshot: Snapshot, loaded: Checkpoint, read_model: Callable[[], Model]) -> Checkpoint:
    """Returns a given checkpoint whose weights are read again when they are needed, with a net for this device.

    Args:
      snapshot: gives the name of the checkpoint.
      loaded: the checkpoint with its weights.
      read_model: reads the weights.
    """
    return Checkpoint.stored(
        snapshot.name,
        with_classes(loaded, loaded.net.num_classes, devices.compute_dtype()),
        read_model,
        loaded.preprocessing,
        **{
            field: getattr(loaded, field)
            for field in ("source_accuracy", "settings", "has_head", "notes", "preprocessing_is_guess")
        },
        known_fingerprint=loaded.fingerprint,
    )


def describe(candidate: Candidate, checkpoint: Checkpoint) -> CheckpointRow:
    """Returns the row that describes a given checkpoint, which the study has named."""
    params, _ = jax.eval_shape(checkpoint.net.init, jax.random.key(0))
    return CheckpointRow(
        checkpoint.name,
        str(candidate.path or candidate.name),
        checkpoint.net.name,
        sum(leaf.size for leaf in jax.tree.leaves(params)),
        checkpoint.preprocessing.to_json(),
        checkpoint.preprocessing_is_guess,
        checkpoint.has_head,
        list(checkpoint.notes),
        checkpoint.fingerprint,
    )


def names(rows: Rows) -> dict[str, str]:
    """Returns the names under which earlier runs have evaluated given checkpoints, by `epochs.identity`."""
    return {identity(row.path): row.checkpoint for row in rows.rows}


def record(rows: Rows, new: Iterable[CheckpointRow]) -> None:
    """Writes the descriptions of the given checkpoints, and keeps those of checkpoints that are no longer given.

    Raises:
      InputError: if a checkpoint differs from the one of the same name that an earlier run evaluated.
    """
    new, earlier = list(new), {row.checkpoint: row for row in rows.rows}
    for row in new:
        before = earlier.get(row.checkpoint, row)
        for field, words in (("fingerprint", "weights"), ("model", "model"), ("preprocessing", "preprocessing")):
            if getattr(row, field) != getattr(before, field):
                where = f" at {before.path}" if before.path != row.path else ""
                raise InputError(
                    f"config.checkpoints: {row.path} has other {words} than the checkpoint{where} of the same name, "
                    f"{row.checkpoint}, that this working directory has evaluated: use that one, or another --workdir."
                )
    names = {row.checkpoint for row in new}
    kept = [row for row in rows.rows if row.checkpoint not in names]
    if [*kept, *new] != rows.rows or not rows.path.exists():
        rows.replace([*kept, *new])
