"""`Trajectory`: the checkpoints of a pre-training, one per epoch or step, saved with Orbax.

`checkpoints/<epoch>/` (`checkpoints/<step>/` if pre-training counts steps) holds three items: `model` (params, stats),
`training` (everything else that training needs to resume, see `training.state.divide`) and `metadata` (JSON: model name
and settings, preprocessing, source accuracy, the result row of the epoch, and fingerprints of all three items, which
reveal corruption on the disk). A checkpoint can therefore be used without the config of its training. Epoch 0 is the
initialisation. Checkpoints are always restored into an abstract target: without one, Orbax turns list indices into
strings and permutes the layers.
"""

import contextlib
import ctypes
import hashlib
import json
import logging
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import args as ocp_args

from jax_transfer import trees
from jax_transfer.models.net import Net
from jax_transfer.records import InputError

_ITEMS = ("model", "training", "metadata")


class Trajectory:
    """The checkpoints of one pre-training.

    `close` waits for the last save. With several processes, all of them must open, save and close the trajectory
    together; a single process may read it with `alone`.

    Args:
      folder: the folder of the epochs; created if it does not exist.
      alone: whether this process reads without the others.
      most: how many epochs are kept, the last ones; None for all.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     trajectory = Trajectory(pathlib.Path(folder))
    ...     model = {"params": {"w": np.ones(2, np.float32)}, "stats": {}}
    ...     trajectory.save(0, model, training={"step": 0}, metadata={"model": {"name": "mine"}})
    ...     trajectory.wait()
    ...     restored, training = trajectory.restore(0, model, {"step": np.zeros((), np.int32)})
    ...     print(trajectory.epochs(), trajectory.metadata(0)["model"], restored["params"]["w"])
    ...     trajectory.close()
    [0] {'name': 'mine'} [1. 1.]
    """

    def __init__(self, folder: pathlib.Path, alone: bool = False, most: int | None = None):
        self.folder = folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            create=False,  # Orbax cannot create it from a single process of several
            enable_async_checkpointing=True,
            max_to_keep=most,
            multiprocessing_options=_one_process() if alone and jax.process_count() > 1 else _ALL_PROCESSES,
        )
        self._manager = _Manager(self.folder, item_names=_ITEMS, options=options)

    def close(self) -> None:
        """Waits for the last save and releases the folder."""
        with _disk_errors():
            self._manager.close()

    def epochs(self) -> list[int]:
        """Returns the completely saved epochs, in ascending order."""
        return sorted(self._manager.all_steps())

    def save(self, epoch: int, model: dict, training: dict, metadata: dict) -> None:
        """Saves an epoch asynchronously; its folder gets its final name when all files are written.

        Args:
          model: {"params", "stats"} of the net that is evaluated.
          training: everything else that training needs to resume.
          metadata: a dictionary that JSON can represent.

        Raises:
          InputError: if a leaf is not an array or number, or has a dtype that JAX does not support, such as int64; the
            message names the leaf.
        """
        model, training = _storable(model), _storable(training)
        saved = {"model": model, "training": training, "metadata": metadata}
        fingerprints = {name: _fingerprint(name, item) for name, item in saved.items()}
        items = ocp_args.Composite(
            model=ocp_args.StandardSave(model),
            training=ocp_args.StandardSave(training),
            metadata=ocp_args.JsonSave({**metadata, "fingerprints": fingerprints}),
        )
        with _disk_errors():  # including errors of the previous save, which continued in the background
            self._manager.save(epoch, args=items)
        if _malloc_trim:
            _malloc_trim(0)

    def wait(self) -> None:
        """Waits until all saves are on disk."""
        with _disk_errors():
            self._manager.wait_until_finished()

    def metadata(self, epoch: int) -> dict:
        """Returns the metadata of an epoch, including the fingerprints of its items."""
        return self._restore(epoch)["metadata"]

    def fingerprint(self, epoch: int) -> str | None:
        """Returns the saved `trees.fingerprint` of an epoch's model, without reading it; None if it has none."""
        return _fingerprints(self.metadata(epoch)).get("model")

    def restore_model(self, epoch: int, net: Net, sharding: jax.sharding.Sharding) -> dict:
        """Restores {"params", "stats"} of an epoch, whose net must be `net`, with this sharding.

        Raises:
          InputError: if the checkpoint is missing or damaged, or holds another net.
        """
        params, stats = jax.eval_shape(net.init, jax.random.key(0))
        target = abstract({"params": params, "stats": stats}, sharding)
        return self._restore(epoch, model=ocp_args.StandardRestore(target))["model"]

    def restore(self, epoch: int, abstract_model: dict, abstract_training: dict) -> tuple[dict, dict]:
        """Restores (model, training) of an epoch with the shapes, dtypes and shardings of the abstract trees.

        Raises:
          InputError: if the checkpoint is missing or damaged, or has another structure.
        """
        targets = {"model": abstract_model, "training": abstract_training}
        items = self._restore(epoch, **{name: ocp_args.StandardRestore(tree) for name, tree in targets.items()})
        return items["model"], items["training"]

    def _restore(self, epoch: int, **items):
        """Restores items of an epoch and its metadata, and checks their fingerprints."""
        items["metadata"] = ocp_args.JsonRestore()
        try:
            restored = self._manager.restore(epoch, args=ocp_args.Composite(**items))
            problem = _changed(restored)
        except Exception as error:  # noqa: BLE001  Orbax raises plain Exceptions for missing, short and garbled files
            logging.getLogger("asyncio").addFilter(_is_relevant)
            problem = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0][:200]
        # Not in the `except` clause: its error would keep unfinished reads alive, which warn when the program ends.
        if not problem:
            return restored
        others = [e for e in self.epochs() if e < epoch]
        advice = (
            f"The checkpoint before it is {others[-1]}: delete {self.folder / str(epoch)} and run again."
            if others
            else "No earlier checkpoint exists: delete the folder and run again."
        )
        raise InputError(f"Checkpoint {self.folder / str(epoch)} cannot be read ({problem}). {advice}")


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Returns False, so that `preemption.requested` alone asks JAX whether to stop.

        JAX would confuse Orbax's epochs with the steps of `preemption.requested`, and one of several processes would
        never stop.
        """
        return False


def _changed(restored) -> str:
    """Returns which items of an epoch differ from their saved fingerprints, in words; "" if none does."""
    saved = _fingerprints(restored["metadata"])
    items = {name: restored[name] for name in saved if name in restored}
    if "metadata" in items:
        items["metadata"] = {name: value for name, value in restored["metadata"].items() if name != "fingerprints"}
    changed = [name for name, item in items.items() if _fingerprint(name, item) != saved[name]]
    return f"its {' and '.join(changed)} changed on the disk since it was saved" if changed else ""


def _fingerprint(name: str, item) -> str:
    """Returns the fingerprint of an item of an epoch."""
    if name == "metadata":
        return hashlib.blake2b(json.dumps(item, sort_keys=True).encode(), digest_size=16).hexdigest()
    return trees.fingerprint(item)


def _fingerprints(metadata) -> dict[str, str]:
    """Returns item -> fingerprint in the metadata of an epoch; {} if there are none."""
    fingerprints = metadata.get("fingerprints") if isinstance(metadata, dict) else None
    fingerprints = fingerprints if isinstance(fingerprints, dict) else {}
    return {name: value for name, value in fingerprints.items() if isinstance(value, str)}


def _is_relevant(record: logging.LogRecord) -> bool:
    """Drops the tracebacks of Orbax's other tasks, which failed for the same reason as the reported one."""
    return "was never retrieved" not in str(record.msg)


# After the threads of a save free memory, glibc keeps it reserved for these threads: without malloc_trim, the memory
# of a run grows by a quarter of a checkpoint each epoch. Other C libraries have no such function.
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)

_ALL_PROCESSES = ocp.options.MultiprocessingOptions()


def _one_process():
    """Returns the options for one process that reads without the others."""
    i = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=i, active_processes={i}, barrier_sync_key_prefix=f"process {i} alone"
    )


def _storable(tree: dict) -> dict:
    """Returns the tree with plain numbers as arrays.

    Raises:
      InputError: if Orbax would reject, drop or change a leaf; the message names the leaf.
    """
    stored = set()

    def storable(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        parts = [jax.tree_util.keystr((key,), simple=True) for key in path]
        if any("/" in part for part in parts) or ".".join(parts) in stored:  # Orbax joins the parts with dots
            raise InputError(f"A checkpoint cannot hold {name}: a key has a '/', or another array has the same name.")
        stored.add(".".join(parts))
        fits = isinstance(leaf, float) or (isinstance(leaf, int) and -(2**31) <= leaf < 2**31)
        array = np.asarray(leaf, jnp.result_type(leaf)) if fits else leaf
        kind = getattr(array, "dtype", type(leaf).__name__)
        if _is_storable(array, kind):
            return array
        shape = getattr(array, "shape", ())
        size = f" and shape {list(shape)}" if 0 in shape else ""
        raise InputError(
            f"A checkpoint cannot hold {name} of type {kind}{size}: expected arrays and numbers that JAX supports."
        )

    try:
        jax.tree.structure(tree)
    except ValueError as error:
        raise InputError("A checkpoint cannot hold a dictionary with unsortable keys, such as 1 and '1'.") from error
    return jax.tree_util.tree_map_with_path(storable, tree)


def _is_storable(array, kind) -> bool:
    """Returns whether Orbax saves and restores an array of dtype `kind` unchanged."""
    if not isinstance(array, jax.Array | np.ndarray | np.generic) or isinstance(array, np.ma.MaskedArray):
        return False
    is_number = isinstance(kind, np.dtype) and (kind.kind == "b" or jnp.issubdtype(kind, jnp.number))
    is_supported = is_number and kind.isnative and kind.itemsize <= 8 and jax.dtypes.canonicalize_dtype(kind) == kind
    return is_supported and array.size > 0


@contextlib.contextmanager
def _disk_errors():
    """Converts tensorstore's write errors to the OSError that caused them and whose number is in their text."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        number = int(code.group(1))
        raise OSError(number, f"{os.strerror(number)} while saving a checkpoint") from error


def abstract(tree, sharding):
    """Returns the abstract target of a restore: the shapes and dtypes of `tree`, with this sharding."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
