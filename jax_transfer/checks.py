"""The checks of a study's config that are made before anything is compiled."""

from ml_collections import ConfigDict

from jax_transfer.analysis import SCORES
from jax_transfer.analysis.embedding import MOST_POINTS
from jax_transfer.choose import choose
from jax_transfer.config import (
    STAGES,
    check_names,
    default_config,
    finetune_settings,
    make_net,
    models,
    probe_settings,
    sources,
)
from jax_transfer.data.augment import AUGMENTATIONS
from jax_transfer.data.mixing import MIXINGS
from jax_transfer.data.transforms import INTERPOLATIONS
from jax_transfer.models.trajectory import evaluated_epochs
from jax_transfer.records import InputError
from jax_transfer.training.objectives import OBJECTIVES
from jax_transfer.training.optimizers import OPTIMIZERS, SCHEDULES
from jax_transfer.transfer.finetune import FINETUNE_SCORES
from jax_transfer.transfer.probe import PROTOCOLS


def check(config: ConfigDict) -> None:
    """Checks every name, size and number that needs no data.

    Raises:
      InputError: naming the field, what was expected and what to do.
    """
    check_names(config.to_dict(), default_config().to_dict(), "config")
    _check_complete(config.to_dict(), default_config().to_dict(), "config")
    for stage in config.stages:
        choose(dict.fromkeys(STAGES), stage, "stage (config.stages)")
    choose(OBJECTIVES, config.pretrain.objective, "objective (config.pretrain.objective)")
    choose(INTERPOLATIONS, config.preprocessing.interpolation, "interpolation (config.preprocessing.interpolation)")
    for score in config.scores:
        choose({**SCORES, **FINETUNE_SCORES}, score, "score (config.scores)")
    if len(set(sources(config))) < len(sources(config)):
        raise InputError(f"config.source names a data set twice: {', '.join(sources(config))}.")
    if not config.targets:
        raise InputError("config.targets is empty: name at least one data set to transfer to.")
    for target in config.overrides:
        if target not in config.targets:
            raise InputError(f"config.overrides names {target!r}, which is none of config.targets: {config.targets}.")
    for name, section in [
        ("pretrain", config.pretrain),
        *[("finetune", finetune_settings(config, t)) for t in config.targets],
    ]:
        where = f"config.{name}"
        for augmentation in section.augment:
            choose({**AUGMENTATIONS, **MIXINGS}, augmentation, f"augmentation ({where}.augment)")
        choose(OPTIMIZERS, section.optimizer.name, f"optimizer ({where}.optimizer.name)")
        choose(SCHEDULES, section.optimizer.schedule, f"schedule ({where}.optimizer.schedule)")
        _positive(section.optimizer.learning_rate, f"{where}.optimizer.learning_rate")
        for field in ("min_learning_rate", "warmup_learning_rate"):
            rate = getattr(section.optimizer, field)
            if not 0 <= rate <= section.optimizer.learning_rate:
                raise InputError(
                    f"{where}.optimizer.{field} = {rate}: must lie between 0 and learning_rate = "
                    f"{section.optimizer.learning_rate}."
                )
        _positive(section.batch_size, f"{where}.batch_size")
        _positive(section.epochs, f"{where}.epochs")
        if name == "finetune" and section.checkpoints:
            evaluated_epochs(section.checkpoints, config.pretrain.epochs, f"{where}.checkpoints")
    for field in ("label_smoothing", "ema_decay"):
        value = config.pretrain[field]
        if not 0 <= value < 1:
            raise InputError(f"config.pretrain.{field} = {value}: must lie in [0, 1); 0 turns it off.")
    for target in config.targets:
        settings = probe_settings(config, target)
        for method in settings.methods:
            choose(PROTOCOLS, method, "probe (config.probe.methods)")
        for field in ("epochs", "batch_size", "num_seeds"):
            _positive(getattr(settings, field), f"config.probe.{field}")
        if not settings.learning_rates or not settings.l2:
            raise InputError("config.probe.learning_rates and config.probe.l2 need at least one value each.")
        if not 0 < settings.validation_fraction < 1:
            raise InputError(f"config.probe.validation_fraction = {settings.validation_fraction}: must lie in (0, 1).")
    _positive(config.spectral.epochs, "config.spectral.epochs")
    if config.spectral.batch_size is not None:
        _positive(config.spectral.batch_size, "config.spectral.batch_size")
    if not 0 <= config.spectral.embedded_images <= MOST_POINTS or 0 < config.spectral.embedded_images < 4:
        raise InputError(
            f"config.spectral.embedded_images = {config.spectral.embedded_images}: t-SNE takes 4 to {MOST_POINTS:,} images, "
            "and 0 leaves it out."
        )
    _positive(config.data.eval_batch_size, "config.data.eval_batch_size")
    _positive(config.data.num_threads, "config.data.num_threads")
    evaluated_epochs(config.trajectory.epochs, config.pretrain.epochs)
    if not 0 < config.preprocessing.crop_fraction <= 1:
        raise InputError(
            f"config.preprocessing.crop_fraction = {config.preprocessing.crop_fraction}: must lie in (0, 1]."
        )
    for label, model in models(config).items():
        smallest = make_net(config, model, num_classes=2).min_image_size
        if config.preprocessing.image_size < smallest:
            stem = f" with the {model.get('stem', 'imagenet')} stem" if label.startswith("resnet") else ""
            raise InputError(
                f"config.preprocessing.image_size = {config.preprocessing.image_size} does not suit {label}{stem}, which "
                f"needs at least {smallest} pixels: use a larger size{' or another stem' if stem else ''}."
            )


def check_field(path: str, known: dict) -> None:
    """Checks a field named on the command line, such as "config.pretrain.epochs".

    Raises:
      InputError: if there is no such field; lists those that exist beside it.
    """
    where, *names = path.split(".")
    for name in names:
        if not isinstance(known, dict):
            raise InputError(f"{where} is a value and has no field {name!r}.")
        if where == "config.overrides":
            return
        known, where = choose(known, name, f"field of {where}"), f"{where}.{name}"


def _check_complete(found: dict, known: dict, where: str) -> None:
    if missing := [name for name in known if name not in found]:
        raise InputError(f"{where} lacks {', '.join(missing)}: start from jax_transfer.config.default_config().")
    for name, value in known.items():
        if isinstance(value, dict):
            _check_complete(found[name], value, f"{where}.{name}")


def _positive(value, field: str) -> None:
    if not value > 0:
        raise InputError(f"{field} = {value}: must be positive.")
