"""The checks of a config that are made before anything is compiled."""

from ml_collections import ConfigDict

from jax_transfer import config as study_config
from jax_transfer import fields, settings
from jax_transfer.choose import choose
from jax_transfer.models import MODELS
from jax_transfer.models.trajectory import evaluated_epochs
from jax_transfer.records import InputError
from jax_transfer.transfer.finetune import FINETUNE_SCORES
from jax_transfer.transfer.probe import PROTOCOLS


def check(config: ConfigDict) -> None:
    """Checks every field, name, size and number that needs no data.

    Raises:
      InputError: naming the field, what was expected and what to do.
    """
    known = study_config.schema()
    fields.check(config.to_dict(), known, "config")
    _check_by_target(config, known)
    for place, given in enumerate(config.model.others):
        others = fields.schema(study_config.OtherModel)
        fields.check(dict(given), others, f"config.model.others[{place}]", partial=True)
    fields.check_no_twice(settings.sources(config), "config.source")
    evaluated_epochs(config.trajectory.epochs, config.pretrain.epochs)
    for target in config.targets:
        if tuned := settings.finetune_settings(config, target).checkpoints:
            evaluated_epochs(tuned, config.pretrain.epochs, "config.finetune.checkpoints")
        if "scores" in config.stages:
            check_early_stops(config, target)
        for method in settings.probe_settings(config, target).methods:
            choose(PROTOCOLS, method, "probe (config.probe.methods)")
    settings.preprocessing(config)
    for label, model in settings.models(config).items():
        smallest = settings.make_net(config, model, num_classes=2).min_image_size
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
    tuning = settings.finetune_settings(config, target)
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


def _check_by_target(config: ConfigDict, known: fields.Schema) -> None:
    """The keys of fields in BY_TARGET are targets of the study; overrides hold fields of probe and finetune."""
    for field in study_config.BY_TARGET:
        for target in config[field]:
            choose(dict.fromkeys(config.targets), target, f"target (config.{field}; it must be one of config.targets)")
    sections = {name: known[name] for name in ("probe", "finetune")}
    for target, override in config.overrides.items():
        where = f"config.overrides[{target!r}]"
        fields.check(dict(override.to_dict()), sections, where, partial=True)
