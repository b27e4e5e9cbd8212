"""Checkpoints from anywhere, ready to use: an epoch of a trajectory (Orbax), or a file of torch weights."""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping

import jax
import numpy as np

from jax_transfer import devices
from jax_transfer.checkpoints import descriptions, renamings, state_dicts, torch_files, torch_weights
from jax_transfer.checkpoints.checkpoint import Checkpoint
from jax_transfer.checkpoints.folders import expanded, is_epoch, only_file
from jax_transfer.checkpoints.released import architecture, named
from jax_transfer.checkpoints.trajectory import Trajectory
from jax_transfer.choose import choose
from jax_transfer.logs import log
from jax_transfer.models.net import Net, without_head
from jax_transfer.models.zoo import MODELS
from jax_transfer.records import InputError, printable


def load_checkpoint(
    path: str | pathlib.Path, model: str | None = None, *, settings: Mapping[str, object] | None = None
) -> Checkpoint:
    """Loads one checkpoint.

    The weights are looked for in every mapping of a file, under every prefix, and those that fit the model best are taken.
    Where several fit equally, the moving average (or the teacher) comes first, then the network, then its momentum copy.
    What is left out, such as losses, projections and decoders, is said, and a file that lacks a weight is refused.

    What a file does not say of itself is told by its shapes (classes, width and stem of a ResNet, width of a MobileNet,
    image size of a transformer); how its images are prepared, by its name, as `released.releases` knows it. Assumptions and
    guesses are logged and kept as `notes`. A head that is not one of classes is left out.

    Args:
      path: `run/checkpoints/5` (an epoch that Orbax saved here), a file of a model in MODELS with the names of torchvision
        or timm, or of the releases of T2T-ViT, MoCo and pretrainedmodels' bninception, or a folder with one such file.
        `~` is the home folder.
      model: a key of MODELS, which settings may follow: "vit_small_patch16_224?num_heads=12". None: what the file says of
        itself (in its metadata, timm's config.json beside it, or the `arch` among its options), or the model that its
        name begins with, or that of the folder or of the repository in a hub's cache where the file is a
        model.safetensors.
      settings: arguments of the model that weights do not show, such as {"num_heads": 12} or {"stem": "3x3_pool"}.

    Raises:
      InputError: if the file cannot be used, or says that it is another model; it names the file and what to do.
    """
    path = expanded(path)
    model, asked = named(model) if model else (None, {})
    try:
        if os.path.isdir(path) and not is_epoch(path):
            path = only_file(path)
        load = _from_trajectory if os.path.isdir(path) else _from_file
        found = load(path, model, {**asked, **(settings or {})})
    except InputError as error:
        raise InputError(printable(error)) from error
    for note in found.notes:
        log.warning("%s: %s", path, note)
    return found


def describes_itself(path: str | pathlib.Path) -> bool:
    """Whether a checkpoint says which of MODELS it is, so that `load_checkpoint` needs no `model` for it.

    True for an epoch of a trajectory, and for a file whose metadata, or timm's config.json beside it, name a model. A
    file's name alone does not count. False for what cannot be read. No weights are read.
    """
    path = expanded(path)
    if os.path.isdir(path):
        return is_epoch(path)
    try:
        return os.path.isfile(path) and descriptions.describe(path).model in MODELS
    except InputError:  # load_checkpoint says why
        return False


def _from_trajectory(path: pathlib.Path, model: str | None, given: dict) -> Checkpoint:
    if not is_epoch(path):
        raise InputError(f"{path}: is a folder, but no epoch of a trajectory such as checkpoints/5.")
    epoch = int(path.name)
    with contextlib.closing(Trajectory(path.parent)) as trajectory:
        if epoch not in trajectory.epochs():
            raise InputError(f"{path}: is no complete checkpoint; the folder has {trajectory.epochs() or 'none'}.")
        described = _described(path, trajectory.metadata(epoch))
        name, settings = described.model, {**described.settings, **given}
        if model not in (None, name):
            raise InputError(f"{path}: is a {name}, not a {model}.")
        net = _made(path, name, settings)
        weights = trajectory.restore_model(epoch, net, devices.replicated(devices.make_mesh()))
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(weights))):
        raise InputError(f"{path}: holds weights that are NaN or infinite; use an earlier epoch.")
    return Checkpoint(
        str(path),
        net,
        weights["params"],
        weights["stats"],
        described.preprocessing,
        described.source_accuracy,
        settings,
        described.has_head and net.num_classes > 0,
    )


def _described(path: pathlib.Path, metadata: object) -> descriptions.Description:
    """What the metadata of an epoch say, which must name the model and the preprocessing."""
    try:
        described = descriptions.from_metadata(metadata)
    except InputError as error:
        raise InputError(f"{path}: its metadata cannot be used ({str(error).rstrip('.')}).") from error
    if described.model is None or described.preprocessing is None:
        raise InputError(f"{path}: its metadata name no model or no preprocessing; use another epoch.")
    return described


def _made(path: pathlib.Path, name: str, settings: Mapping) -> Net:
    make = choose(MODELS, name, f"model of {path}")
    try:
        return make(**settings)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"{path}: there are settings that a {name} does not take: {settings}.") from error


def _from_file(path: pathlib.Path, model: str | None, given: dict) -> Checkpoint:
    contents = torch_files.read(path)
    described = descriptions.describe(path)
    descriptions.check_plain(path, contents)
    if None not in (model, described.model) and model != described.model:
        raise InputError(f"{path}: is a {described.model}, as {described.where} says, not a {model}.")
    arch = descriptions.said_architecture(contents)
    if model is not None and descriptions.is_another(model, architecture(arch)):
        raise InputError(f"{path}: is a {architecture(arch)}, as its options say ({arch}), not a {model}.")
    first = model or described.model
    guesses = (architecture(arch), (descriptions.released_as(path) or (None,))[0])
    names = [first] if first else list(dict.fromkeys(filter(None, guesses)))
    if not names:
        raise InputError(
            f"{path}: which model is it? Name it (model=...): one of {', '.join(MODELS)}; "
            f"{state_dicts.outline(contents)}."
        )
    try:
        return _from_contents(path, contents, names[0], described, given)
    except InputError:
        if len(names) == 1:  # else the options and the name of the file differ
            raise
    found = _from_contents(path, contents, names[1], described, given)
    note = (
        f"Its options say that it is a {arch}, which its weights do not fit: it is read as the {names[1]} of its name."
    )
    return dataclasses.replace(found, notes=(note, *found.notes))


def _from_contents(
    path: pathlib.Path, contents: object, name: str, described: descriptions.Description, given: dict
) -> Checkpoint:
    """The checkpoint that a file holds, read as a model."""
    choose(MODELS, name, f"model of {path}")
    known = {**described.settings, **given}
    net = _made(path, name, {"num_classes": 1000, **known})
    found = _found(path, contents, net, known)
    told = descriptions.settings_from_shapes(net, renamings.to_ours(found.state, str(path)), found.contrastive)
    options, on_options = descriptions.told_settings(path, name, contents, found.where)
    settings = {**told, **({} if described.model else options), **known}
    net = _made(path, name, {"num_classes": 1000, **settings})
    try:
        params, stats, note = torch_weights.from_torch(found.state, net, str(path), found.contrastive)
    except InputError as error:
        raise InputError(f"{str(error).rstrip('.')}; {state_dicts.outline(contents)}.") from error
    preprocessing = described.preprocessing
    if preprocessing and settings.get("image_size", preprocessing.image_size) != preprocessing.image_size:
        raise InputError(
            f"{path}: its weights take images of {settings['image_size']} pixels; {described.where} says "
            f"{preprocessing.image_size}: correct that."
        )
    guess = ""
    if preprocessing is None:
        is_moco = descriptions.is_moco_v3(contents, found.where)
        preprocessing, guess = descriptions.guessed_preprocessing(path, name, settings, is_moco)
    is_known = bool(described.model) or not guess
    assumed = descriptions.assumptions(name, settings, {**options, **known}, found.segments, is_known)
    on_head = f"A new head stands in: {note}." if note else ""
    on_options = "" if "num_heads" in known else on_options
    notes = (*found.notes, on_head, *described.notes, on_options, *assumed, guess)
    return Checkpoint(
        str(path),
        net,
        params,
        stats,
        preprocessing,
        described.source_accuracy,
        settings,
        described.has_head and net.num_classes > 0 and not note,
        tuple(printable(note) for note in notes if note),
        bool(guess),
    )


def _found(path: pathlib.Path, contents: object, net: Net, known: dict) -> state_dicts.Found:
    """The weights of a file that fit a model best; `net` is the model with the `known` settings."""

    def count_shapes(state: Mapping) -> int:
        ours = renamings.our_names(state)
        state = {ours[key]: x for key, x in state.items()}
        try:
            told = descriptions.settings_from_shapes(net, state)
            shapes = torch_weights.expected_shapes(_made(path, net.name, {"num_classes": 1000, **told, **known}))
        except InputError:  # no such network: nothing fits
            return 0
        return sum(key in state and state[key].shape == shape for key, shape in shapes.items())

    expected = frozenset(torch_weights.expected_shapes(net))
    return state_dicts.find(contents, expected, ".".join(net.classifier) + ".", path, count_shapes)


def export(checkpoint: Checkpoint, path: str | pathlib.Path) -> None:
    """Writes a checkpoint as .safetensors with timm's names and shapes; `load_checkpoint` reads it back.

    They are those of timm's resnet18 .. resnet152 (also for resnet10), resnetv2_18 .. resnetv2_152, mobilenetv1_100,
    mobilenetv2_100, inception_v3, inception_resnet_v2, vit_* and deit_*. The others have the names of their release:
    inception_v1 torchvision's googlenet, inception_v2 pretrainedmodels' bninception (whose first convolution reads blue,
    green, red), t2t_vit_14 and t2t_vit_t_14 the T2T-ViT repository's. A head that no training made is left out.

    The metadata hold the model, the preprocessing and the source accuracy under "jax_transfer", as JSON.
    """
    described = {
        "model": {**checkpoint.settings, "name": checkpoint.net.name, "num_classes": checkpoint.net.num_classes},
        "preprocessing": checkpoint.preprocessing.to_json(),
        "source_accuracy": checkpoint.source_accuracy,
        "has_head": checkpoint.has_head,
    }
    model = checkpoint.model
    params = model["params"] if checkpoint.has_head else without_head(model["params"], checkpoint.net)
    metadata = {"format": "pt", "jax_transfer": json.dumps(described)}
    torch_weights.save_safetensors(expanded(path), params, model["stats"], metadata)
