"""Loads a checkpoint from an epoch of a trajectory (Orbax) or from a file of torch weights."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Mapping

import jax
import numpy as np

from jax_transfer import devices
from jax_transfer.checkpoints import descriptions, renamings, state_dicts, torch_files, torch_weights
from jax_transfer.checkpoints.checkpoint import Checkpoint
from jax_transfer.checkpoints.folders import expanded, is_epoch, only_file
from jax_transfer.checkpoints.projections import Projection, classifies, read_projection, split_head
from jax_transfer.checkpoints.released import architecture, named
from jax_transfer.checkpoints.trajectory import Trajectory
from jax_transfer.choose import choose
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.logs import log
from jax_transfer.models.net import PROJECTION, Net, with_projection
from jax_transfer.models.zoo import MODELS
from jax_transfer.records import InputError, printable


def load_checkpoint(
    path: str | pathlib.Path,
    model: str | None = None,
    *,
    settings: Mapping[str, object] | None = None,
    keep_projection: bool = False,
) -> Checkpoint:
    """Loads one checkpoint.

    Every mapping in a file, with every prefix of its names, is searched for weights, and those that fit the model best
    are used. If several fit equally well, the moving average (or the teacher) is preferred, then the network itself,
    then its momentum copy. Parts that are left out, such as losses, projections and decoders, are reported in `notes`;
    a missing weight is an error.

    Settings that the file does not state are inferred from its shapes: the number of classes, the width and stem of a
    ResNet, the width of a MobileNet, the image size of a transformer. Preprocessing that it does not state is inferred
    from its name, see `released.releases`. Assumptions and guesses are logged and kept in `notes`. A head that does not
    classify is left out.

    Args:
      path: an epoch of a trajectory (`run/checkpoints/5`); a file of a model in MODELS, with the parameter names of
        torchvision, timm, or the releases of T2T-ViT, MoCo and pretrainedmodels' bninception; or a folder with one such
        file. `~` is the home folder.
      model: a key of MODELS, optionally with settings: "vit_small_patch16_224?num_heads=12". By default, the model that
        the file states (in its metadata, in timm's config.json beside it, or as `arch` in its options) or, if it
        states none, the model with whose name the file's name begins. For a model.safetensors, the name of its folder,
        or of its repository in a hub's cache, counts instead.
      settings: arguments of the model that cannot be inferred from weights, such as {"num_heads": 12} or
        {"stem": "3x3_pool"}.
      keep_projection: keep the projection of a contrastive method, which must consist of linear layers with ReLU
        between them, as in MoCo v1 and v2 and in SimCLR. It is the head of the network in the file, or lies beside the
        network under a name such as projector or head. `net.apply` then also returns `Output.projection` [b, p], before
        any normalisation, and `params` has the weights under "projection"; see `net.with_projection`.

    Raises:
      InputError: if the file cannot be used, states another model, or has no projection that can be kept although it
        was asked for; the message names the file and says what to do.

    >>> import pathlib, tempfile
    >>> from jax_transfer.checkpoints.export import export
    >>> from jax_transfer.data.transforms import Preprocessing
    >>> net = MODELS["resnet10"](num_classes=5, width=8)
    >>> shapes = jax.eval_shape(net.init, jax.random.key(0))
    >>> params, stats = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    >>> checkpoint = Checkpoint("mine", net, params, stats, Preprocessing(32), settings={"width": 8})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "mine.safetensors"
    ...     export(checkpoint, path)
    ...     loaded = load_checkpoint(path)
    >>> loaded.net is net, loaded.preprocessing.image_size, loaded.settings["num_classes"]
    (True, 32, 5)
    """
    path = expanded(path)
    model, named_settings = named(model) if model else (None, {})
    try:
        if os.path.isdir(path) and not is_epoch(path):
            path = only_file(path)
        given = {**named_settings, **(settings or {})}
        if not os.path.isdir(path):
            checkpoint = _from_file(path, model, given, keep_projection)
        elif keep_projection:
            raise InputError(f"{path}: an epoch of a trajectory has no projection; load it without keep_projection.")
        else:
            checkpoint = _from_trajectory(path, model, given)
    except InputError as error:
        raise InputError(printable(error)) from error
    for note in checkpoint.notes:
        log.warning("%s: %s", path, note)
    return checkpoint


def describes_itself(path: str | pathlib.Path) -> bool:
    """Returns whether a checkpoint states which of MODELS it is, so that `load_checkpoint` needs no `model`.

    True for an epoch of a trajectory, and for a file whose metadata, or timm's config.json beside it, name a model. The
    name of the file does not count. False if the checkpoint cannot be read. No weights are read.

    >>> describes_itself("no/such/file.safetensors")
    False
    """
    path = expanded(path)
    if os.path.isdir(path):
        return is_epoch(path)
    try:
        return os.path.isfile(path) and descriptions.describe(path).model in MODELS
    except InputError:  # load_checkpoint reports the reason
        return False


def _from_trajectory(path: pathlib.Path, model: str | None, given: dict) -> Checkpoint:
    """Loads an epoch of a trajectory; `given` are the settings that the caller specified."""
    if not is_epoch(path):
        raise InputError(f"{path}: is a folder, but not an epoch of a trajectory such as checkpoints/5.")
    epoch = int(path.name)
    with contextlib.closing(Trajectory(path.parent)) as trajectory:
        if epoch not in trajectory.epochs():
            raise InputError(f"{path}: is not a complete checkpoint; complete epochs: {trajectory.epochs() or 'none'}.")
        name, preprocessing, described = _description_of_epoch(path, trajectory.metadata(epoch))
        settings = {**described.settings, **given}
        if model not in (None, name):
            raise InputError(f"{path}: is a {name}, not a {model}.")
        net = _make_model(path, name, settings)
        weights = trajectory.restore_model(epoch, net, devices.replicated(devices.make_mesh()))
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(weights))):
        raise InputError(f"{path}: some weights are NaN or infinite; use an earlier epoch.")
    return Checkpoint(
        str(path),
        net,
        weights["params"],
        weights["stats"],
        preprocessing,
        described.source_accuracy,
        settings,
        described.has_head and net.num_classes > 0,
    )


def _description_of_epoch(path: pathlib.Path, metadata: object) -> tuple[str, Preprocessing, descriptions.Description]:
    """Returns the model, the preprocessing and the whole description in the metadata of an epoch.

    Raises:
      InputError: if the metadata are malformed or lack the model or the preprocessing.
    """
    try:
        described = descriptions.from_metadata(metadata)
    except InputError as error:
        raise InputError(f"{path}: its metadata cannot be used ({str(error).rstrip('.')}).") from error
    if described.model is None or described.preprocessing is None:
        raise InputError(f"{path}: its metadata lack the model or the preprocessing; use another epoch.")
    return described.model, described.preprocessing, described


def _make_model(path: pathlib.Path, name: str, settings: Mapping) -> Net:
    """Makes the net of a checkpoint.

    Raises:
      InputError: if the model is unknown or does not take these settings; the message names the file.
    """
    make = choose(MODELS, name, f"model of {path}")
    try:
        return make(**settings)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"{path}: {name} does not take all of these settings: {settings}.") from error


def _from_file(path: pathlib.Path, model: str | None, given: dict, keep_projection: bool) -> Checkpoint:
    """Loads a file of weights; `given` are the settings that the caller specified."""
    contents = torch_files.read(path)
    described = descriptions.describe(path)
    descriptions.check_plain(path, contents)
    if None not in (model, described.model) and model != described.model:
        raise InputError(f"{path}: is a {described.model} according to {described.where}, not a {model}.")
    arch = descriptions.architecture_in_options(contents)
    if model is not None and descriptions.is_another(model, architecture(arch)):
        raise InputError(f"{path}: is a {architecture(arch)} according to its options ({arch}), not a {model}.")
    stated = model or described.model
    guesses = (architecture(arch), (descriptions.released_as(path) or (None,))[0])
    names = [stated] if stated else list(dict.fromkeys(filter(None, guesses)))
    if not names:
        raise InputError(
            f"{path}: does not state its model. Name it (model=...): one of {', '.join(MODELS)}; "
            f"{state_dicts.outline(contents)}."
        )
    try:
        return _from_contents(path, contents, names[0], described, given, keep_projection)
    except InputError:
        if len(names) == 1:  # otherwise the options and the name of the file differ, and the name is tried next
            raise
    checkpoint = _from_contents(path, contents, names[1], described, given, keep_projection)
    note = f"Its options name a {arch}, which does not fit its weights; it is read as a {names[1]} because of its name."
    return dataclasses.replace(checkpoint, notes=(note, *checkpoint.notes))


def _from_contents(
    path: pathlib.Path,
    contents: object,
    name: str,
    described: descriptions.Description,
    given: dict,
    keep_projection: bool,
) -> Checkpoint:
    """Reads the contents of a file as the model `name`."""
    choose(MODELS, name, f"model of {path}")
    known = {**described.settings, **given}
    net = _make_model(path, name, {"num_classes": 1000, **known})
    found = _find_weights(path, contents, net, known, keep_projection)
    from_shapes = descriptions.settings_from_shapes(net, renamings.to_ours(found.state, str(path)), found.contrastive)
    options, note_on_options = descriptions.settings_in_options(path, name, contents, found.where)
    settings = {**from_shapes, **({} if described.model else options), **known}
    net = _make_model(path, name, {"num_classes": 1000, **settings})
    found, kept = _with_projection(path, found, net, described.has_head) if keep_projection else (found, None)
    try:
        params, stats, note = torch_weights.from_torch(found.state, net, str(path), found.contrastive)
    except InputError as error:
        raise InputError(f"{str(error).rstrip('.')}; {state_dicts.outline(contents)}.") from error
    preprocessing = described.preprocessing
    if preprocessing and settings.get("image_size", preprocessing.image_size) != preprocessing.image_size:
        raise InputError(
            f"{path}: its weights take images of {settings['image_size']} pixels, but {described.where} says "
            f"{preprocessing.image_size}: correct the latter."
        )
    guess = ""
    if preprocessing is None:
        is_moco = descriptions.is_moco_v3(contents, found.where)
        preprocessing, guess = descriptions.guessed_preprocessing(path, name, settings, is_moco)
    is_known = bool(described.model) or not guess
    assumed = descriptions.assumptions(name, settings, {**options, **known}, found.segments, is_known)
    note_on_head = f"It has a new, untrained head: {note}." if note else ""
    note_on_options = "" if "num_heads" in known else note_on_options
    if kept:
        net, params = with_projection(net, kept.widths), {**params, PROJECTION: kept.params}
    notes = (*found.notes, note_on_head, kept.note if kept else "", *described.notes, note_on_options, *assumed, guess)
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


def _with_projection(
    path: pathlib.Path, found: state_dicts.Found, net: Net, has_head: bool
) -> tuple[state_dicts.Found, Projection]:
    """Returns the weights without the projection, and the projection.

    Args:
      found: the weights of the file.
      net: the net without projection.
      has_head: False if the file says that its head does not classify.

    Raises:
      InputError: if there is no projection, or none that can be kept.
    """
    if found.projection:
        return found, read_projection(found.projection, f"{path} (beside {found.where or 'the network'})", net)
    network, head = split_head(found.state, net)
    where = ".".join(net.classifier)
    if not head or (classifies(head) and has_head and not found.contrastive):
        reason = f"its head {where} classifies" if head else "its network has no head"
        raise InputError(f"{path}: holds no projection ({reason}); load it without keep_projection.")
    return found._replace(state=network), read_projection(head, f"{path} ({where})", net)


def _find_weights(
    path: pathlib.Path, contents: object, net: Net, known: dict, keep_projection: bool
) -> state_dicts.Found:
    """Finds the weights of a file that fit a model best; `net` is the model with the `known` settings."""

    def count_shapes(state: Mapping) -> int:
        """Infers the model's settings from the shapes of the file's arrays; counts the arrays that fit such a model."""
        ours = renamings.our_names(state)
        state = {ours[key]: x for key, x in state.items()}
        try:
            settings = {"num_classes": 1000, **descriptions.settings_from_shapes(net, state), **known}
            shapes = torch_weights.expected_shapes(_make_model(path, net.name, settings))
        except InputError:  # there is no such network, so nothing fits
            return 0
        return sum(key in state and state[key].shape == shape for key, shape in shapes.items())

    expected = frozenset(torch_weights.expected_shapes(net))
    return state_dicts.find(contents, expected, ".".join(net.classifier) + ".", path, count_shapes, keep_projection)
