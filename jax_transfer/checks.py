"""The checks of a config that are made before anything is compiled."""

import reprlib
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from jax_transfer.analysis import SCORES
from jax_transfer.analysis.embedding import MOST_POINTS
from jax_transfer.choose import choose
from jax_transfer.config import (
    BY_TARGET,
    STAGES,
    check_names,
    default_config,
    finetune_settings,
    make_net,
    models,
    preprocessing,
    probe_settings,
    sources,
)
from jax_transfer.data.augment import AUGMENTATIONS
from jax_transfer.data.mixing import MIXINGS
from jax_transfer.data.sources import ON_CORRUPT
from jax_transfer.models import MODELS
from jax_transfer.models.trajectory import evaluated_epochs
from jax_transfer.records import METRICS, UNPRINTABLE, InputError
from jax_transfer.training.objectives import OBJECTIVES
from jax_transfer.training.optimizers import OPTIMIZERS, SCHEDULES
from jax_transfer.transfer.finetune import FINETUNE_SCORES
from jax_transfer.transfer.probe import PROTOCOLS

# The largest float32.
LARGEST = 3.4028e38

# What the tuples hold whose default is empty or unset.
ELEMENTS = {
    "config.model.others": dict,
    "config.source.others": str,
    "config.paper": dict,
    "augment": str,
    "milestones": float,
    "mean": float,
    "std": float,
}


def _whole(least: int, most: int):
    return lambda x: least <= x <= most, f"lie in [{least}, {most}]"


_POSITIVE = (lambda x: x > 0, "be positive")
_PROBABILITY = (lambda x: 0 <= x < 1, "lie in [0, 1); 0 turns it off")
_PART = (lambda x: 0 <= x <= 1, "lie in [0, 1]")

# The last part of a number's name -> what it must fulfil, in code and in words. Others must not be negative.
RANGES = {
    "seed": _whole(0, 2**31 - 1),
    "epochs": _whole(1, 100_000),
    "steps": _whole(1, 10**9),
    "batch_size": _whole(1, 100_000),
    "eval_batch_size": _whole(1, 100_000),
    "num_seeds": _whole(1, 1000),
    "num_threads": _whole(1, 1000),
    "width": (lambda x: 0 < x <= 10_000, "lie in (0, 10000]"),
    "stochastic_depth": _PROBABILITY,
    "label_smoothing": _PROBABILITY,
    "ema_decay": _PROBABILITY,
    "momentum": _PROBABILITY,
    "learning_rate": _POSITIVE,
    "learning_rates": _POSITIVE,
    "warmup": _PART,
    "milestones": _PART,
    "validation_fraction": (lambda x: 0 < x < 1, "lie in (0, 1)"),
    "mean": (lambda x: True, ""),
}
NOT_NEGATIVE = (lambda x: x >= 0, "not be negative")

PAPER = {"target": str, "epoch": int, "what": str, "accuracy": float, "where": str}
PAPERS_WHAT = ("source", "FE", "FT", "FE main", "FE residual", "FT main", "FT residual")


def check(config: ConfigDict) -> None:
    """Checks every field, name, size and number that needs no data.

    Raises:
      InputError: naming the field, what was expected and what to do.
    """
    known = default_config()
    check_fields(config, known)
    for field in ("stages", "targets"):
        if not config[field]:
            raise InputError(f"config.{field} is empty: name at least one.")
    _check_overrides(config, known)
    _check_metrics(config)
    _check_dictionaries(config, known)
    for stage in config.stages:
        choose(dict.fromkeys(STAGES), stage, "stage (config.stages)")
    choose(OBJECTIVES, config.pretrain.objective, "objective (config.pretrain.objective)")
    choose(dict.fromkeys(ON_CORRUPT), config.data.on_corrupt, "value of config.data.on_corrupt")
    for score in config.scores:
        choose({**SCORES, **FINETUNE_SCORES}, score, "score (config.scores)")
    for field in ("stages", "targets", "scores"):
        _check_no_twice(config[field], f"config.{field}")
    _check_no_twice(sources(config), "config.source")
    for name, section in [
        ("pretrain", config.pretrain),
        *[("finetune", finetune_settings(config, t)) for t in config.targets],
    ]:
        where = f"config.{name}"
        for augmentation in section.augment:
            choose({**AUGMENTATIONS, **MIXINGS}, augmentation, f"augmentation ({where}.augment)")
        choose(OPTIMIZERS, section.optimizer.name, f"optimizer ({where}.optimizer.name)")
        choose(SCHEDULES, section.optimizer.schedule, f"schedule ({where}.optimizer.schedule)")
        for field in ("min_learning_rate", "warmup_learning_rate"):
            rate = getattr(section.optimizer, field)
            if not 0 <= rate <= section.optimizer.learning_rate:
                raise InputError(
                    f"{where}.optimizer.{field} = {rate}: must lie between 0 and learning_rate = "
                    f"{section.optimizer.learning_rate}."
                )
        if name == "finetune" and section.checkpoints:
            evaluated_epochs(section.checkpoints, config.pretrain.epochs, f"{where}.checkpoints")
    for target in config.targets:
        if "scores" in config.stages:
            check_early_stops(config, target)
        settings = probe_settings(config, target)
        for method in settings.methods:
            choose(PROTOCOLS, method, "probe (config.probe.methods)")
        _check_no_twice(settings.methods, "config.probe.methods")
        if not settings.learning_rates or not settings.l2:
            raise InputError("config.probe.learning_rates and config.probe.l2 need at least one value each.")
    if not 0 <= config.spectral.embedded_images <= MOST_POINTS or 0 < config.spectral.embedded_images < 4:
        raise InputError(
            f"config.spectral.embedded_images = {config.spectral.embedded_images}: t-SNE takes 4 to {MOST_POINTS:,} images, "
            "and 0 leaves it out."
        )
    evaluated_epochs(config.trajectory.epochs, config.pretrain.epochs)
    preprocessing(config)
    for label, model in models(config).items():
        smallest = make_net(config, model, num_classes=2).min_image_size
        if config.preprocessing.image_size < smallest:
            stem = f" with the {model.get('stem', 'imagenet')} stem" if MODELS[model["name"]].takes("stem") else ""
            raise InputError(
                f"config.preprocessing.image_size = {config.preprocessing.image_size} does not suit {label}{stem}, which "
                f"needs at least {smallest} pixels: use a larger size{' or another stem' if stem else ''}."
            )


def check_early_stops(config: ConfigDict, target: str, steps_an_epoch: int | None = None) -> None:
    """Checks that the fine-tuning schedule of a target lasts until the scores by early stopping are taken.

    Args:
      steps_an_epoch: on the images that those scores train on; without it, a schedule given in steps is not checked.

    Raises:
      InputError: naming the field that is too small.
    """
    tuning = finetune_settings(config, target)
    field = "steps" if tuning.steps else "epochs"
    length = tuning.steps or tuning.epochs
    where = "config.finetune"
    if field in config.overrides.get(target, ConfigDict()).get("finetune", ConfigDict()):
        where = f"config.overrides[{target!r}].finetune"
    for score in config.scores:
        if score not in FINETUNE_SCORES or (tuning.steps and steps_an_epoch is None):
            continue
        least = FINETUNE_SCORES[score] * (steps_an_epoch if tuning.steps else 1)
        if length < least:
            epochs = f" ({steps_an_epoch} steps an epoch on the images that scores train on)" if tuning.steps else ""
            raise InputError(
                f"{where}.{field} = {length}: {score} (config.scores) stops this schedule after "
                f"{FINETUNE_SCORES[score]} epochs on {target}{epochs}: give it at least {least} {field}, or leave "
                f"{score} out."
            )


def check_fields(config: ConfigDict, known: ConfigDict) -> None:
    """Checks that a config has the fields of `known` and no others, of the same types and with numbers in their RANGES.

    Raises:
      InputError: naming the field, and what was expected.
    """
    check_names(config.to_dict(), known.to_dict(), "config")
    _check_complete(config.to_dict(), known.to_dict(), "config")
    _check_values(config.to_dict(), known, "config")


def _check_values(found: Mapping, known: ConfigDict, where: str) -> None:
    """Each value of `found` is of the type that it has in `known`; only what is unset there may be unset."""
    for name, value in found.items():
        field, default = f"{where}.{name}", known[name]
        if where == "config" and name in BY_TARGET:
            continue
        if isinstance(default, ConfigDict):
            _check_values(value, default, field)
        elif value is None:
            if default is not None and field != "config.spectral.batch_size":
                raise InputError(f"{field} is unset: give it a value, such as {default!r}.")
        elif known.get_type(name) is tuple:
            kind = ELEMENTS.get(field) or ELEMENTS.get(name) or type(default[0])
            if not isinstance(value, tuple | list):
                raise InputError(f"{field} = {_shown(value)}: must be a tuple of {kind.__name__}, such as {default!r}.")
            for place, part in enumerate(value):
                _check_value(part, kind, f"{field}[{place}]", name)
        else:
            _check_value(value, known.get_type(name), field, name)


def _check_value(value, kind: type, field: str, name: str) -> None:
    """`name` is the last part of the field's, by which RANGES are known."""
    accepted = {float: (float, int), dict: (Mapping, ConfigDict)}.get(kind, (kind,))
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{field} = {_shown(value)}: must be of type {kind.__name__}, not {type(value).__name__}.")
    if kind is str and UNPRINTABLE.search(value):
        raise InputError(f"{field} = {_shown(value)}: must hold no control characters, and be valid Unicode.")
    if kind in (int, float):
        fits, words = RANGES.get(name, NOT_NEGATIVE)
        if not abs(value) <= LARGEST or not fits(value):
            raise InputError(f"{field} = {_shown(value)}: must {words or 'be finite'}.")


def _check_overrides(config: ConfigDict, known: ConfigDict) -> None:
    if not isinstance(config.overrides, ConfigDict):
        raise InputError(f"config.overrides = {_shown(config.overrides)}: must hold fields of single targets.")
    _check_targets(config, "overrides")
    sections = {name: known[name].to_dict() for name in ("probe", "finetune")}
    for target, found in config.overrides.items():
        where = f"config.overrides[{target!r}]"
        if not isinstance(found, ConfigDict):
            raise InputError(f"{where} = {_shown(found)}: must hold fields of probe and finetune.")
        check_names(found.to_dict(), sections, where)
        _check_values(found.to_dict(), known, where)


def _check_metrics(config: ConfigDict) -> None:
    if not isinstance(config.metrics, ConfigDict):
        expected = f'{{target: metric}}, such as {{{config.targets[0]!r}: "mean_class_accuracy"}}'
        raise InputError(f"config.metrics = {_shown(config.metrics)}: must be {expected}.")
    _check_targets(config, "metrics")
    for target, metric in config.metrics.items():
        if not isinstance(metric, str):
            raise InputError(f"config.metrics[{target!r}] = {_shown(metric)}: must be one of {', '.join(METRICS)}.")
        choose(METRICS, metric, f"metric (config.metrics[{target!r}])")


def _check_targets(config: ConfigDict, field: str) -> None:
    """The keys of a field in BY_TARGET are targets of the study."""
    for target in config[field]:
        choose(dict.fromkeys(config.targets), target, f"target (config.{field}; it must be one of config.targets)")


def _check_dictionaries(config: ConfigDict, known: ConfigDict) -> None:
    """Those in config.model.others and config.paper."""
    fields = {name: value for name, value in known.model.items() if name != "others"}
    for place, given in enumerate(config.model.others):
        where = f"config.model.others[{place}]"
        check_names(dict(given), fields, where)
        _check_values(dict(given), known.model, where)
    for place, entry in enumerate(config.paper):
        where = f"config.paper[{place}]"
        check_names(dict(entry), PAPER, where)
        _check_complete(dict(entry), PAPER, where)
        for name, value in entry.items():
            _check_value(value, PAPER[name], f"{where}.{name}", name)
        choose(dict.fromkeys(PAPERS_WHAT), entry["what"], f"what ({where})")


def _check_no_twice(names: Sequence[str], where: str) -> None:
    if twice := [name for name in dict.fromkeys(names) if list(names).count(name) > 1]:
        raise InputError(f"{where} names {twice[0]!r} twice.")


def _shown(value) -> str:
    try:
        return reprlib.repr(value.to_dict() if isinstance(value, ConfigDict) else value)
    except ValueError:  # a whole number of more digits than Python prints
        return f"a {type(value).__name__}"


def check_field(path: str, known: dict) -> None:
    """Checks a field named on the command line, such as "config.pretrain.epochs".

    Raises:
      InputError: if there is no such field; lists those that exist beside it.
    """
    where, *names = path.split(".")
    for name in names:
        if not isinstance(known, dict):
            raise InputError(f"{where} is a value and has no field {name!r}.")
        if where in [f"config.{field}" for field in BY_TARGET]:
            return
        known, where = choose(known, name, f"field of {where}"), f"{where}.{name}"


def _check_complete(found: dict, known: dict, where: str) -> None:
    if missing := [name for name in known if name not in found]:
        raise InputError(f"{where} lacks {', '.join(missing)}: give it.")
    for name, value in known.items():
        if isinstance(value, dict):
            _check_complete(found[name], value, f"{where}.{name}")
