"""Converts a TensorFlow ResNet-50: `python -m jax_transfer.checkpoints.from_tensorflow CHECKPOINT OUT.safetensors`.

CHECKPOINT is the folder of a TF-Hub module (saved_model.pb and variables/), such as those of the Visual Task Adaptation
Benchmark (https://tfhub.dev/vtab/sup-rotation-100/1), or the prefix of a checkpoint (model.ckpt-90000). The known names
of variables are those of `tensorflow_names`. `load_checkpoint` reads the result without further arguments.

It needs TensorFlow (`pip install "jax_transfer[prepare]"`); nothing else that reads checkpoints does.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jax_transfer.checkpoints import tensorflow_graph, tensorflow_names, torch_weights
from jax_transfer.checkpoints.checkpoint import Checkpoint
from jax_transfer.checkpoints.export import export
from jax_transfer.checkpoints.folders import expanded
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models.zoo import MODELS
from jax_transfer.records import InputError, printable

# The documentation of VTAB's modules asks for pixels in [0, 1], and VTAB resizes whole images to 224 x 224 pixels.
OF_MODULES = Preprocessing(224, 1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
# The configs of S4L evaluate with resize_small(256)|crop(224)|-1_to_1.
OF_TRAINING = Preprocessing(224, 224 / 256, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Contents(NamedTuple):
    """What a checkpoint holds: its variables, and the nodes of its graph ((), if it has none)."""

    variables: dict[str, np.ndarray]
    nodes: tuple[Any, ...] = ()


def convert(contents: Contents, name: str, preprocessing: Preprocessing | None = None) -> tuple[Checkpoint, list[str]]:
    """Converts the contents of a TensorFlow checkpoint.

    Args:
      contents: the variables and the graph.
      name: the name of the checkpoint.
      preprocessing: how images are prepared; by default as for VTAB's modules, if there is a graph, or as in the
        training code.

    Returns:
      The checkpoint, without a head if no head classifies, and sentences on what is assumed or was left out.

    Raises:
      InputError: if it is not one of the known ResNet-50s.
    """
    names, skipped = tensorflow_names.without_training(contents.variables)
    weights = {ours: np.asarray(contents.variables[full], np.float32) for ours, full in names.items()}
    layout = tensorflow_names.find_layout({name: x.shape for name, x in weights.items()}, name)
    state, heads = tensorflow_names.to_ours(weights, layout)
    head = state.get(f"{layout.our_classifier}.bias")
    notes = [f"Its variables have the names of {layout.source}; it is read as a {layout.model}."]
    if contents.nodes:
        settings = tensorflow_graph.read_settings(contents.nodes, layout, name)
        notes.append(f"Its graph shows {_listed(settings)}.")
    else:
        settings = {"stem": tensorflow_graph.stem(2), "last_stride": 2, "batch_norm_eps": 1e-3}
        notes.append(
            f"The settings {_listed(settings)} are assumed, as in that code, since weights do not show them; its "
            "networks for jigsaw and relative patch location have stride 1 in the first convolution and the last stage "
            f"(for these, load it with settings={{'stem': {tensorflow_graph.stem(1)!r}, 'last_stride': 1}})."
        )
    if not MODELS[layout.model].takes("last_stride"):
        last_stride = settings.pop("last_stride")
        if last_stride != 2:
            raise InputError(f"{name}: its last stage has stride {last_stride}, where {layout.model} has 2.")
    if preprocessing is None:
        preprocessing = OF_MODULES if contents.nodes else OF_TRAINING
        source = "VTAB documents for its modules" if contents.nodes else "S4L's configs evaluate"
        lowest = 0 if contents.nodes else -1
        notes.append(
            f"Images of {preprocessing.image_size} pixels, cropped from {preprocessing.host_size}, with values in "
            f"[{lowest}, 1] are assumed, as {source}."
        )
    for listed, kind in ((skipped, "training state"), (heads, "heads that do not classify")):
        if listed:
            notes.append(f"Left out, as {kind}: {len(listed)} variables such as {listed[0]}.")
    width = len(state[f"{layout.layers[0].ours}.weight"])
    settings = {"num_classes": 0 if head is None else len(head), "width": width, **settings}
    net = MODELS[layout.model](**settings)
    params, stats, _ = torch_weights.from_torch(state, net, name)
    return Checkpoint(name, net, params, stats, preprocessing, settings=settings, has_head=head is not None), notes


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def read(path: str | pathlib.Path) -> Contents:
    """Reads the folder of a module, or a checkpoint by its prefix, with TensorFlow.

    Raises:
      InputError: if TensorFlow is not installed or there is no such checkpoint.
    """
    try:
        import tensorflow as tf
    except ImportError as error:
        raise InputError('Converting needs TensorFlow: pip install "jax_transfer[prepare]"') from error
    path = expanded(path)
    folder = path / "variables" if path.is_dir() else path.parent
    prefix = folder / "variables" if path.is_dir() else path.with_name(path.name.removesuffix(".index"))
    if not prefix.with_name(f"{prefix.name}.index").is_file():
        raise InputError(
            f"{path}: is neither a folder with variables/variables.index nor the prefix of a checkpoint, such as "
            "model.ckpt-90000 beside model.ckpt-90000.index."
        )
    try:
        reader = tf.train.load_checkpoint(str(prefix))
        arrays = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    except (tf.errors.OpError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{path}: cannot be read ({reason}); download it again.") from error
    variables = {name: x for name, x in arrays.items() if np.asarray(x).dtype.kind in "fiu"}
    return Contents(variables, _nodes(path / "saved_model.pb") if path.is_dir() else ())


def _nodes(file: pathlib.Path) -> tuple[Any, ...]:
    """Returns the nodes of the first graph of a saved model.

    Raises:
      InputError: if the file is missing or is no saved model.
    """
    from google.protobuf.message import DecodeError
    from tensorflow.core.protobuf import saved_model_pb2  # pyright: ignore[reportMissingImports]

    try:
        saved = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    except (OSError, DecodeError) as error:
        raise InputError(f"{file}: cannot be read as a saved model; download it again.") from error
    if not saved.meta_graphs:
        raise InputError(f"{file}: holds no graph; download it again.")
    return tuple(saved.meta_graphs[0].graph_def.node)


def main(arguments: Sequence[str] | None = None) -> int:
    """Converts a checkpoint, prints what is assumed and returns 0, or prints a one-line error and returns 2."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_transfer.checkpoints.from_tensorflow", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("checkpoint", help="folder of a TF-Hub module, or prefix of a checkpoint")
    parser.add_argument("out", help="the file to write, OUT.safetensors")
    parser.add_argument("--image_size", type=int, help="side of the images in pixels; default: 224")
    parser.add_argument("--crop_fraction", type=float, help="of the centre crop; default: 1 for a module, else 0.875")
    parser.add_argument("--mean", type=float, help="of pixels in [0, 1]; default: 0 for a module, else 0.5")
    parser.add_argument("--std", type=float, help="of pixels in [0, 1]; default: 1 for a module, else 0.5")
    options = parser.parse_args(arguments)
    try:
        if not options.out.endswith(".safetensors"):
            raise InputError(f"{options.out}: expected a file that ends with .safetensors.")
        contents = read(options.checkpoint)
        checkpoint, notes = convert(contents, options.checkpoint, _preprocessing(contents, options))
        export(checkpoint, options.out, notes)
    except InputError as error:
        print(printable(error), file=sys.stderr)
        return 2
    for note in notes:
        print(note)
    print(f"{options.out} is a {checkpoint.net.name} with {checkpoint.net.num_classes} classes.")
    return 0


def _preprocessing(contents: Contents, options: argparse.Namespace) -> Preprocessing | None:
    """Returns the preprocessing with the options that are given, or None if none is.

    Raises:
      InputError: if an option has an invalid value.
    """
    given = {name: getattr(options, name) for name in ("image_size", "crop_fraction", "mean", "std")}
    given = {name: value for name, value in given.items() if value is not None}
    default = (OF_MODULES if contents.nodes else OF_TRAINING).to_json()
    channels = {name: [given[name]] * 3 for name in ("mean", "std") if name in given}
    return Preprocessing.from_json({**default, **given, **channels}) if given else None


if __name__ == "__main__":
    sys.exit(main())
