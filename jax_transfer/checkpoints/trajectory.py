"""A trajectory: one Orbax checkpoint an epoch, and what is needed to use it without its config.

`checkpoints/<epoch>/` holds three items: `model` (params, stats), `training` (all else that training needs to continue,
see `training.state.divide`) and `metadata` (JSON: model name and settings, preprocessing, source accuracy, the epoch's
result row, and fingerprints of all three, without which a bit that turned on the disk would go unseen).
Epoch 0 is the initialisation. Checkpoints are always restored into an abstract target: without one,
Orbax turns list indices into strings and layers change places.
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
    """The checkpoints of one pre-training. `close` waits for the last save.

    Where there are several processes, all must open, save and close alike; a single one may read `alone`.
    """

    def __init__(self, folder: pathlib.Path, alone: bool = False):
        self.folder = folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            create=False,  # which Orbax refuses for one process of several
            enable_async_checkpointing=True,
            max_to_keep=None,
            multiprocessing_options=_of_one_process() if alone and jax.process_count() > 1 else _OF_ALL,
        )
        self._manager = _Manager(self.folder, item_names=_ITEMS, options=options)

    def close(self) -> None:
        with _disk_errors():
            self._manager.close()

    def epochs(self) -> list[int]:
        """The epochs that are completely saved, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, epoch: int, model: dict, training: dict, metadata: dict) -> None:
        """Saves two trees asynchronously; the files appear under their final name when all are written.

        Args:
          model: {"params", "stats"} of the net, as it is evaluated.
          training: what else training needs to continue.
          metadata: a dictionary that JSON holds.

        Raises:
          InputError: if a leaf is no array or number, or of a type that JAX does not hold, such as int64; it is named.
        """
        model, training = _storable(model), _storable(training)
        saved = {"model": model, "training": training, "metadata": metadata}
        fingerprints = {name: _fingerprint(name, item) for name, item in saved.items()}
        items = ocp_args.Composite(
            model=ocp_args.StandardSave(model),
            training=ocp_args.StandardSave(training),
            metadata=ocp_args.JsonSave({**metadata, "fingerprints": fingerprints}),
        )
        with _disk_errors():  # also those of the save before, which continued in the background
            self._manager.save(epoch, args=items)
        if _malloc_trim:
            _malloc_trim(0)

    def wait(self) -> None:
        """Returns when every save so far is on disk."""
        with _disk_errors():
            self._manager.wait_until_finished()

    def metadata(self, epoch: int) -> dict:
        return self._restore(epoch)["metadata"]

    def fingerprint(self, epoch: int) -> str | None:
        """`trees.fingerprint` of an epoch's model, without reading it; None if it was not saved with it."""
        return _fingerprints(self.metadata(epoch)).get("model")

    def restore_model(self, epoch: int, net: Net, sharding: jax.sharding.Sharding) -> dict:
        """Restores {"params", "stats"} of an epoch, which must be those of `net`, placed as `sharding` says."""
        params, stats = jax.eval_shape(net.init, jax.random.key(0))
        target = abstract({"params": params, "stats": stats}, sharding)
        return self._restore(epoch, model=ocp_args.StandardRestore(target))["model"]

    def restore(self, epoch: int, abstract_model: dict, abstract_training: dict) -> tuple[dict, dict]:
        """Both trees of an epoch, (model, training), with the shapes, dtypes and shardings of the abstract ones."""
        items = {"model": abstract_model, "training": abstract_training}
        found = self._restore(epoch, **{name: ocp_args.StandardRestore(tree) for name, tree in items.items()})
        return found["model"], found["training"]

    def _restore(self, epoch: int, **items):
        items["metadata"] = ocp_args.JsonRestore()
        try:
            found = self._manager.restore(epoch, args=ocp_args.Composite(**items))
            wrong = _changed(found)
        except Exception as error:  # noqa: BLE001  Orbax raises plain Exceptions for missing, short and garbled files
            logging.getLogger("asyncio").addFilter(_was_asked_for)
            wrong = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0][:200]
        # Not inside of `except`: with the error go the unfinished reads, which would complain when the program ends.
        if not wrong:
            return found
        others = [e for e in self.epochs() if e < epoch]
        offer = (
            f"The last one before it is epoch {others[-1]}: delete {self.folder / str(epoch)} and run again."
            if others
            else "No earlier checkpoint exists: delete the folder and run again."
        )
        raise InputError(f"Checkpoint {self.folder / str(epoch)} cannot be read ({wrong}). {offer}")


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Orbax would ask JAX, which takes epochs for later or earlier questions of `preemption.requested` and then never
        tells one of several processes to stop."""
        return False


def _changed(found) -> str:
    """Which items of an epoch are not as they were saved; "" for none, and where no fingerprints were saved."""
    saved = _fingerprints(found["metadata"])
    items = {name: found[name] for name in saved if name in found}
    if "metadata" in items:
        items["metadata"] = {name: value for name, value in found["metadata"].items() if name != "fingerprints"}
    changed = [name for name, item in items.items() if _fingerprint(name, item) != saved[name]]
    return f"its {' and '.join(changed)} changed on the disk since it was saved" if changed else ""


def _fingerprint(name: str, item) -> str:
    if name == "metadata":
        return hashlib.blake2b(json.dumps(item, sort_keys=True).encode(), digest_size=16).hexdigest()
    return trees.fingerprint(item)


def _fingerprints(metadata) -> dict[str, str]:
    """item -> fingerprint, as they were saved; {} where there are none."""
    found = metadata.get("fingerprints") if isinstance(metadata, dict) else None
    found = found if isinstance(found, dict) else {}
    return {name: value for name, value in found.items() if isinstance(value, str)}


def _was_asked_for(record: logging.LogRecord) -> bool:
    """Drops the tracebacks of Orbax's other tasks, which failed for the same reason and which nobody waits for."""
    return "was never retrieved" not in str(record.msg)


# glibc keeps what the threads of a save have freed for these threads: without this, the memory of a run grows with each
# epoch by a quarter of what a checkpoint holds. Other C libraries have no such function.
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)

_OF_ALL = ocp.options.MultiprocessingOptions()


def _of_one_process():
    i = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=i, active_processes={i}, barrier_sync_key_prefix=f"process {i} alone"
    )


def _storable(tree: dict) -> dict:
    """The tree with plain numbers as arrays. What Orbax would refuse, drop or change is an InputError that names it."""
    stored = set()

    def storable(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        parts = [jax.tree_util.keystr((key,), simple=True) for key in path]
        if any("/" in part for part in parts) or ".".join(parts) in stored:  # Orbax joins them by dots
            raise InputError(f"A checkpoint cannot hold {name}: a key has a '/', or another array is of the same name.")
        stored.add(".".join(parts))
        fits = isinstance(leaf, float) or (isinstance(leaf, int) and -(2**31) <= leaf < 2**31)
        array = np.asarray(leaf, jnp.result_type(leaf)) if fits else leaf
        kind = getattr(array, "dtype", type(leaf).__name__)
        if _is_storable(array, kind):
            return array
        size = f" and shape {list(array.shape)}" if hasattr(array, "shape") and 0 in array.shape else ""
        raise InputError(
            f"A checkpoint cannot hold {name} of type {kind}{size}: expected arrays and numbers that JAX holds."
        )

    try:
        jax.tree.structure(tree)
    except ValueError as error:
        raise InputError("A checkpoint cannot hold a dictionary whose keys do not sort, such as 1 and '1'.") from error
    return jax.tree_util.tree_map_with_path(storable, tree)


def _is_storable(array, kind) -> bool:
    if not isinstance(array, jax.Array | np.ndarray | np.generic) or isinstance(array, np.ma.MaskedArray):
        return False
    is_number = isinstance(kind, np.dtype) and (kind.kind == "b" or jnp.issubdtype(kind, jnp.number))
    is_held = is_number and kind.isnative and kind.itemsize <= 8 and jax.dtypes.canonicalize_dtype(kind) == kind
    return is_held and array.size > 0


@contextlib.contextmanager
def _disk_errors():
    """Turns tensorstore's errors of writing into the OSError they come from; it only tells in words."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        number = int(code.group(1))
        raise OSError(number, f"{os.strerror(number)} while saving a checkpoint") from error


def abstract(tree, sharding):
    """What to restore into: the shapes and dtypes of `tree`, placed as `sharding` says."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
