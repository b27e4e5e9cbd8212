"""The checks of a study before anything is compiled: of the config alone, then of the config with its data."""

from ml_collections import ConfigDict

from jax_transfer import devices, fields
from jax_transfer.choose import choose
from jax_transfer.data.batches import steps_per_epoch
from jax_transfer.logs import log
from jax_transfer.models import MODELS
from jax_transfer.records import InputError
from jax_transfer.study import config as study_config
from jax_transfer.study import settings
from jax_transfer.study.pretrain import feed_sizes
from jax_transfer.study.snapshots import evaluated_epochs
from jax_transfer.study.workspace import Workspace
from jax_transfer.transfer.finetune import FINETUNE_SCORES, early_epochs
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
    fields.check_unique(settings.sources(config), "config.source")
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


def check_data(work: Workspace) -> None:
    """Opens every data set the study names and checks it against the config.

    Raises:
      InputError: a data set that is missing or unusable, a batch that does not divide or is too large.
    """
    config = work.config
    device_batch = devices.check_batch_size(config.pretrain.batch_size, work.mesh, "config.pretrain.batch_size")
    devices.check_batch_size(config.data.eval_batch_size, work.mesh, "config.data.eval_batch_size")
    log.info("%s; global batch %d, %d on each device", devices.description(), config.pretrain.batch_size, device_batch)
    feeds = [feed.dataset for feed in config.pretrain.feeds.values()]
    for dataset in dict.fromkeys((*work.sources, *feeds, *config.targets)):
        train, test = work.source(dataset, "train"), work.source(dataset, "test")
        for source in (train, test):
            if not len(source):
                raise InputError(f"{dataset} has no images in its {source.split} split.")
            if source.labels.min() < 0 or source.labels.max() >= source.num_classes:
                raise InputError(
                    f"{dataset} {source.split}: labels lie in [{source.labels.min()}, {source.labels.max()}], "
                    f"outside of its {source.num_classes} classes (0 to {source.num_classes - 1})."
                )
        if train.class_names != test.class_names:
            raise InputError(f"{dataset}: the train and test splits have different classes.")
        if train.num_classes < 2:
            raise InputError(f"{dataset} has a single class ({train.class_names[0]!r}): at least two are needed.")
    if "pretrain" in config.stages:
        for pretraining in work.pretrainings:
            main, *others = feed_sizes(work, pretraining).items()
            for where, (_, (dataset, size)) in zip(
                ("", *(f".feeds.{feed}" for feed, _ in others)), (main, *others), strict=True
            ):
                devices.check_batch_size(size, work.mesh, f"config.pretrain{where}.batch_size")
                steps_per_epoch(len(work.source(dataset, "train")), size, f"{dataset} (config.pretrain{where})")
    for target in config.targets:
        tuning = settings.finetune_settings(config, target)
        if "finetune" in config.stages:
            steps_per_epoch(len(work.source(target, "train")), tuning.batch_size, f"{target} (config.finetune)")
        if "scores" in config.stages and early_epochs(config.scores):
            what = f"The part of {target} for early stopping (config.scores)"
            steps = steps_per_epoch(len(work.source(target, "fit")), tuning.batch_size, what)
            check_early_stops(config, target, steps)


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
