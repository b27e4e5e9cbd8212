"""Checkpoints from anywhere, ready to use: an epoch of a trajectory (Orbax), a .safetensors, .pth or .pt file."""

import dataclasses
import json
import pathlib
import re

import jax

from jax_transfer import devices
from jax_transfer.choose import choose
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.logs import log
from jax_transfer.models import torch_weights
from jax_transfer.models.net import Net
from jax_transfer.models.trajectory import Trajectory, abstract
from jax_transfer.models.zoo import MODELS, released_preprocessing
from jax_transfer.records import InputError


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model with its weights and what it expects of its input. source_accuracy is in [0, 1], None if it is not known."""

    name: str
    net: Net
    params: dict
    stats: dict
    preprocessing: Preprocessing
    source_accuracy: float | None = None
    settings: dict = dataclasses.field(default_factory=dict)  # arguments of MODELS[net.name]
    has_head: bool = True  # False: the logits are of an untrained head, for the file holds none that fits


def load_checkpoint(path: str | pathlib.Path, model: str | None = None) -> Checkpoint:
    """Loads one checkpoint.

    Args:
      path: `run/checkpoints/5` (an epoch that Orbax saved here), or a .safetensors, .pth or .pt file of a model in MODELS
        with the names of torchvision or timm.
      model: a key of MODELS. None: what the file says of itself, or the model that its file name begins with.

    Raises:
      InputError: if the file cannot be used; it names the file and what to do.
    """
    path = pathlib.Path(path)
    return _from_trajectory(path, model) if path.is_dir() else _from_file(path, model)


def expand(path: str | pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints that a path stands for: the epochs of a trajectory's folder, ascending, or the file itself."""
    path = pathlib.Path(path)
    if path.is_dir() and not path.name.isdigit():
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        epochs = sorted((p for p in folder.iterdir() if p.is_dir() and p.name.isdigit()), key=lambda p: int(p.name))
        if not epochs:
            raise InputError(f"{path}: holds no checkpoints; expected folders named by epochs, such as {path / '5'}.")
        return epochs
    return [path]


def _from_trajectory(path: pathlib.Path, model: str | None) -> Checkpoint:
    if not path.name.isdigit():
        raise InputError(f"{path}: is a folder, but no epoch of a trajectory such as checkpoints/5.")
    trajectory = Trajectory(path.parent)
    try:
        if int(path.name) not in trajectory.epochs():
            raise InputError(f"{path}: is no complete checkpoint; the folder has {trajectory.epochs() or 'none'}.")
        metadata = trajectory.metadata(int(path.name))
        settings = dict(metadata["model"])
        name = settings.pop("name")
        if model not in (None, name):
            raise InputError(f"{path}: is a {name}, not a {model}.")
        net = choose(MODELS, name, f"model of {path}")(**settings)
        shapes = jax.eval_shape(net.init, jax.random.key(0))
        target = dict(zip(("params", "stats"), shapes, strict=True))
        target = abstract(target, devices.replicated(devices.make_mesh()))
        weights = trajectory.restore_model(int(path.name), target)
    finally:
        trajectory.close()
    preprocessing = Preprocessing.from_json(metadata["preprocessing"])
    accuracy = metadata["source_accuracy"]
    return Checkpoint(str(path), net, weights["params"], weights["stats"], preprocessing, accuracy, settings)


def _from_file(path: pathlib.Path, model: str | None) -> Checkpoint:
    state, metadata = torch_weights.read_state(path)
    described = _description(metadata)
    name = model or described.get("model", {}).get("name") or _model_in(path.name)
    if name is None:
        raise InputError(f"{path}: which model is it? Name it (model=...): one of {', '.join(MODELS)}.")
    settings = {k: v for k, v in described.get("model", {}).items() if k != "name"} if model in (None, name) else {}
    make = choose(MODELS, name, f"model of {path}")
    net = make(**{"num_classes": 1000, **settings})
    head = torch_weights.renamed(state).get(".".join((*net.classifier, "bias")))
    if "num_classes" not in settings and head is not None and head.ndim == 1:
        net = make(**{**settings, "num_classes": len(head)})
    params, stats, note = torch_weights.from_torch(state, net, str(path))
    if note:
        log.warning("%s: %s.", path, note)
    size = described.get("preprocessing")
    preprocessing = Preprocessing.from_json(size) if size else released_preprocessing(name)
    return Checkpoint(
        str(path), net, params, stats, preprocessing, described.get("source_accuracy"), settings, not note
    )


def export(checkpoint: Checkpoint, path: str | pathlib.Path) -> None:
    """Writes a checkpoint as .safetensors with the names of torchvision and timm; `load_checkpoint` reads it back.

    The metadata hold the model, the preprocessing and the source accuracy under "jax_transfer", as JSON.
    """
    described = {
        "model": {**checkpoint.settings, "name": checkpoint.net.name, "num_classes": checkpoint.net.num_classes},
        "preprocessing": checkpoint.preprocessing.to_json(),
        "source_accuracy": checkpoint.source_accuracy,
    }
    metadata = {"format": "pt", "jax_transfer": json.dumps(described)}
    torch_weights.save_safetensors(pathlib.Path(path), checkpoint.params, checkpoint.stats, metadata)


def _description(metadata: dict[str, str]) -> dict:
    try:
        return json.loads(metadata.get("jax_transfer", "{}"))
    except ValueError:
        return {}


def _model_in(file_name: str) -> str | None:
    """The longest name in MODELS that a file's name begins with: resnet18-f37072fd.pth is a resnet18."""
    plain = re.sub(r"[^a-z0-9]+", "_", file_name.lower())
    return max((name for name in MODELS if plain.startswith(name)), key=len, default=None)
