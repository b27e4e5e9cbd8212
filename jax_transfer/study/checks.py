"""Checks of a study before anything is compiled: first of the config alone, then of the config with its data."""

import zlib
from collections.abc import Mapping

from jax_transfer import devices, fields
from jax_transfer.analysis import score_named
from jax_transfer.choose import choose
from jax_transfer.data.batches import steps_per_epoch
from jax_transfer.data.crops import FILTERS, crops_of
from jax_transfer.fields import StudyConfig
from jax_transfer.logs import log
from jax_transfer.models import MODELS
from jax_transfer.ranking.candidates import Candidate, load
from jax_transfer.records import InputError
from jax_transfer.results import Rows
from jax_transfer.study import check_reuse, fewshot, given, retrieval, settings, zero_shot
from jax_transfer.study import config as study_config
from jax_transfer.study.epochs import (
    MOST_CHECKPOINTS,
    Pretraining,
    Saved,
    evaluated_numbers,
    given_snapshots,
    length,
    pretrainings,
    selected,
)
from jax_transfer.study.pretrain import check_saved, feed_sizes
from jax_transfer.study.reuse import num_source_views, points
from jax_transfer.study.settings import Recipe
from jax_transfer.study.workspace import Workspace
from jax_transfer.training.objectives.objective import LABELLED, Division
from jax_transfer.transfer.finetune import FINETUNE_SCORES, early_epochs
from jax_transfer.transfer.probe import PROTOCOLS, grid_points, validation_rows
from jax_transfer.trust.naive import static_values

# The stages that read checkpoints, and leave them as they are or tune them.
FROZEN_STAGES, TUNING_STAGES = {"features", "select", "probe"}, {"finetune", "fewshot", "retrieval"}


def check(config: StudyConfig) -> None:
    """Checks everything in a config that can be checked without the data.

    >>> config = study_config.default_config()
    >>> config.pretrain.epochs = 0
    >>> check(config)
    Traceback (most recent call last):
      ...
    jax_transfer.records.InputError: config.pretrain.epochs = 0: must lie in [1, 100000].

    Raises:
      InputError: if a field is not valid, or a batch does not divide evenly over the devices. The message names the
        field, what was expected and what to do.
    """
    schema = study_config.schema()
    fields.check(config.to_dict(), schema, "config")
    _check_by_target(config, schema)
    _check_paper_tables(config)
    for index, model in enumerate(config.model.others):
        other_model = fields.schema(study_config.OtherModel)
        fields.check(dict(model), other_model, f"config.model.others[{index}]", partial=True)
    other_pretraining = {
        **{name: field for name, field in study_config.pretrain_schema().items() if name not in settings.SHARED},
        "source": fields.schema(study_config.SourceData)["dataset"],
        "model": {n: f for n, f in fields.schema(study_config.OtherModel).items() if n != "name"},
    }
    for index, entry in enumerate(config.pretrain.others):
        fields.check(dict(entry), other_pretraining, f"config.pretrain.others[{index}]", partial=True)
    fields.check_unique([config.source.dataset, *config.source.others], "config.source")
    check_reuse.check(config)
    if "pretrain" in config.stages:
        _check_pretraining_batches(config)
    if "retrieval" in config.stages:
        retrieval.check(config)
    if not config.targets and not {*config.stages} <= {"pretrain", "retrieval", "report"}:
        raise InputError("config.targets is empty: give it at least one value, such as 'tfds:mnist'.")
    evaluated_numbers(config)
    last, unit = length(config)
    for target in config.targets:
        tuning = settings.finetune_settings(config, target)
        if tuning.checkpoints:
            selected(tuning.checkpoints, last, _field(config, target, "finetune", "checkpoints"), unit)
        devices.check_microbatches(
            tuning.microbatches,
            tuning.batch_size,  # each model is fine-tuned on one device
            _field(config, target, "finetune", "microbatches"),
            _field(config, target, "finetune", "batch_size"),
        )
        for index, way in enumerate(tuning.reuse):
            if num_source_views(way) and way.batch_size:
                field = f"{_field(config, target, 'finetune', 'reuse')}[{index}].batch_size"
                devices.check_microbatches(tuning.microbatches, way.batch_size, "config.finetune.microbatches", field)
        _check_lowest_rate(config, target)
        if tuning.choose == "test" and all(len(points(tuning, way)) == 1 for way in (None, *tuning.reuse)):
            raise InputError(
                f'{_field(config, target, "finetune", "choose")} = "test", but there is nothing to choose: give '
                'several values of learning_rates or weight_decays, or leave it at "validation".'
            )
        if "scores" in config.stages:
            check_early_stops(config, target)
        _check_probes(config, target)
    settings.preprocessing(config)
    views = [recipe.section.augment for recipe in settings.recipes(config).values()]
    if any(crops_of([*views, *_finetuning_views(config)])):
        _check_interpolation(config)
    if pretrainings(config):
        _check_image_size(config)
        for recipe in settings.recipes(config).values():
            own = _recipe_batches(recipe) if "pretrain" in config.stages else {}
            models = {label: settings.model_of(m, recipe) for label, m in settings.models(config).items()}
            _check_batch_norm_groups({**own, **_finetuning_batches(config)}, models)
    given_snapshots(config)


def _check_lowest_rate(config: StudyConfig, target: str) -> None:
    """Checks that no schedule of the grid of fine-tuning would rise to a rate that is meant to be its lowest."""
    tuning = settings.finetune_settings(config, target)
    ways = (None, *tuning.reuse)
    lowest = min(point["learning_rate"] for way in ways for point in points(tuning, way))
    for field in ("min_learning_rate", "warmup_learning_rate"):
        if getattr(tuning.optimizer, field) > lowest:
            name = f"{_field(config, target, 'finetune', 'optimizer')}.{field}"
            raise InputError(
                f"{name} = {getattr(tuning.optimizer, field):g}: must not be above {lowest:g}, the lowest of the "
                "learning rates to try."
            )


def _check_probes(config: StudyConfig, target: str) -> None:
    """Checks the methods of the probes on a target, and that there is something to choose if that is asked for."""
    probing = settings.probe_settings(config, target)
    for method in probing.methods:
        choose({**PROTOCOLS, zero_shot.METHOD: None}, method, "probe (config.probe.methods)")
    fitted = [PROTOCOLS[method] for method in probing.methods if method in PROTOCOLS]
    if probing.choose == "test" and fitted and all(len(grid_points(protocol, probing)) == 1 for protocol in fitted):
        lists = [field for protocol in fitted for _, field in protocol.grid]
        raise InputError(
            f'{_field(config, target, "probe", "choose")} = "test", but there is nothing to choose: give several '
            f'values of {" or ".join(lists)}, or leave it at "validation".'
        )


Batches = dict[str, tuple[int, int]]  # field of the config -> (images in a batch, number of parts)


def _pretraining_batches(config: StudyConfig) -> Batches:
    """Returns the batches of pre-training, if the study runs it."""
    batches = {}
    for recipe in settings.recipes(config).values() if "pretrain" in config.stages else ():
        batches |= _recipe_batches(recipe)
    return batches


def _recipe_batches(recipe: Recipe) -> Batches:
    where, section = recipe.where, recipe.section
    feeds = {f"{where}.feeds.{name}.batch_size": feed.batch_size for name, feed in section.feeds.items()}
    sizes = {f"{where}.batch_size": section.batch_size, **feeds}
    return {field: (size, section.microbatches) for field, size in sizes.items()}


def _finetuning_batches(config: StudyConfig) -> Batches:
    """Returns the batches of fine-tuning on each target, if a stage fine-tunes."""
    batches = {}
    tunes = {"finetune", "scores", "spectral"} & set(config.stages)
    imprints = "fewshot" in config.stages and fewshot.tunes(settings.fewshot_settings(config))
    for target in config.targets if tunes or imprints else ():
        tuning = settings.finetune_settings(config, target)
        field = _field(config, target, "finetune", "batch_size")
        batches[field] = (tuning.batch_size, tuning.microbatches)
        for index, way in enumerate(tuning.reuse):  # one forward pass over all views
            images = num_source_views(way) * (way.batch_size or tuning.batch_size)
            batches[f"{field} with reuse[{index}]"] = (tuning.batch_size + images, tuning.microbatches)
    return batches


def _finetuning_views(config: StudyConfig) -> list[tuple[str, ...]]:
    """Returns the augmentations of fine-tuning on each target."""
    return [settings.finetune_settings(config, target).augment for target in config.targets]


def _check_interpolation(config: StudyConfig) -> None:
    """Checks that random crops can be resized in the way of the config."""
    where = "interpolation of random crops (config.preprocessing.interpolation)"
    choose(FILTERS, config.preprocessing.interpolation, where)


def _check_batch_norm_groups(batches: Batches, models: Mapping[str, Mapping]) -> None:
    """Checks that the images of a forward pass divide into the groups that BatchNorm normalises together.

    Args:
      models: label -> settings of each model.
    """
    groups = {label: model["batch_norm_group"] for label, model in models.items() if model.get("batch_norm_group")}
    for label, group in groups.items():
        for field, (size, parts) in batches.items():
            if size // parts % group:
                each = f" in {parts} microbatches" if parts > 1 else ""
                raise InputError(
                    f"{field} = {size}{each} does not divide into the groups of batch_norm_group = {group} images that "
                    f"{label} normalises together: use a multiple of {group * parts}, or another batch_norm_group."
                )


def _check_image_size(config: StudyConfig) -> None:
    """Checks that the images are large enough for every model."""
    for label, model in settings.models(config).items():
        smallest = settings.make_net(config, model, num_classes=2).min_image_size
        if config.preprocessing.image_size < smallest:
            stem = f" with the {model.get('stem', 'imagenet')} stem" if MODELS[model["name"]].takes("stem") else ""
            raise InputError(
                f"config.preprocessing.image_size = {config.preprocessing.image_size} does not suit {label}{stem}, "
                f"which needs at least {smallest} pixels: use a larger size{' or another stem' if stem else ''}."
            )


def _check_pretraining_batches(config: StudyConfig) -> None:
    """Checks that the batches of all feeds divide over the devices, and on each device into parts."""
    mesh = devices.make_global_mesh()  # all processes train together
    for field, (size, parts) in _pretraining_batches(config).items():
        device_batch = devices.check_batch_size(size, mesh, field)
        where = field.removesuffix(".batch_size").partition(".feeds.")[0]
        devices.check_microbatches(parts, device_batch, f"{where}.microbatches", field)


def check_data(work: Workspace) -> None:
    """Opens all data sets of a study and checks that the config fits them.

    Raises:
      InputError: if a data set is missing or cannot be used, or if a batch is too large.
    """
    config = work.config
    devices.check_batch_size(config.data.eval_batch_size, work.mesh, "config.data.eval_batch_size")
    batch = ""
    if "pretrain" in config.stages:
        num_devices = devices.make_global_mesh().size
        sizes = dict.fromkeys(recipe.section.batch_size for recipe in work.recipes.values())
        each = " or ".join(f"{size}, {size // num_devices} on each device" for size in sizes)
        batch = f"; global batch {each}"
    log.info("%s%s", devices.description(), batch)
    _check_datasets(work)
    _check_given(work)
    if "pretrain" in config.stages:
        _check_pretraining_data(work)
    elif (FROZEN_STAGES | TUNING_STAGES) & set(config.stages):  # the other stages build on their results
        for snapshot in work.snapshots:
            if isinstance(snapshot.origin, Saved):
                work.trajectory_with(snapshot.origin)
    check_reuse.check_data(work)
    if "fewshot" in config.stages:
        fewshot.check(work)
    if "retrieval" in config.stages:
        retrieval.check_data(work)
    static_values(config.static, [snapshot.name for snapshot in work.snapshots])
    for target in config.targets:
        tuning = settings.finetune_settings(config, target)
        if "finetune" in config.stages:
            steps_per_epoch(len(work.source(target, "train")), tuning.batch_size, f"{target} (config.finetune)")
            ways = (None, *tuning.reuse)
            if tuning.choose == "validation" and any(len(points(tuning, way)) > 1 for way in ways):
                _check_validation(work, target, tuning.batch_size)
        if "scores" in config.stages and early_epochs(config.scores):
            label = f"The part of {target} for early stopping (config.scores)"
            steps = steps_per_epoch(len(work.source(target, "fit")), tuning.batch_size, label)
            check_early_stops(config, target, steps)
        if "probe" in config.stages:
            _check_validation_images(work, target)
            zero_shot.check(work, target)


def _check_validation_images(work: Workspace, target: str) -> None:
    """Checks that some training images of a target can be held out, if a probe chooses among settings on them."""
    probing = settings.probe_settings(work.config, target)
    fitted = [PROTOCOLS[method] for method in probing.methods if method in PROTOCOLS]
    if probing.choose == "validation" and any(len(grid_points(protocol, probing)) > 1 for protocol in fitted):
        try:
            validation_rows(work.source(target, "train").labels, probing)
        except InputError as error:
            raise InputError(f"{target} (config.probe): {error}") from error


def _check_validation(work: Workspace, target: str, batch_size: int) -> None:
    """Checks that a fifth of a target's training images can be held out to choose from the grid of settings."""
    fit, held_out = work.source(target, "fit"), work.source(target, "held_out")
    if not len(held_out):
        raise InputError(
            f"{target} has one training image in each class, so none can be held out to choose from the grid of "
            "config.finetune: give it a single learning rate and weight decay, or more images."
        )
    steps_per_epoch(len(fit), batch_size, f"The part of {target} that is not held out (config.finetune.learning_rates)")


def _check_given(work: Workspace) -> None:
    """Reads the given checkpoints once, and checks that they are those of earlier runs and suit the config.

    Raises:
      InputError: if a checkpoint cannot be read, has changed since an earlier run, or does not suit a field.
    """
    config = work.config
    given_names = [snapshot.name for snapshot in work.snapshots if isinstance(snapshot.origin, Candidate)]
    if len(set(devices.gather(zlib.crc32("\n".join(given_names).encode())))) > 1:
        raise InputError(
            "config.checkpoints: the processes see different checkpoints; wait until no other run writes to these "
            "folders, and use a disk that all processes share."
        )
    for snapshot in work.snapshots:
        path = snapshot.origin.path if isinstance(snapshot.origin, Candidate) else None
        if path and path.resolve().is_relative_to(work.workdir.resolve()):
            raise InputError(
                f"config.checkpoints: {path} belongs to this study (--workdir={work.workdir}), which evaluates its own "
                "epochs anyway: leave it out, or use another --workdir."
            )
    checkpoints = {s.origin: work.checkpoint(s) for s in work.snapshots if isinstance(s.origin, Candidate)}
    need_head = [name for name in config.scores if name not in FINETUNE_SCORES and score_named(name).needs == "logits"]
    headless = [checkpoint.name for checkpoint in checkpoints.values() if not checkpoint.has_head]
    if need_head and headless and "scores" in config.stages:
        need = f"{' and '.join(need_head)} need{'s' if len(need_head) == 1 else ''} a classification head"
        which = f"{' and '.join(headless)} (config.checkpoints) {'does' if len(headless) == 1 else 'do'} not have"
        if not any(work.checkpoint(snapshot).has_head for snapshot in work.snapshots):
            raise InputError(
                f"config.scores: {need}, which {which}, nor any other checkpoint of the study: leave these scores out."
            )
        log.info("%s, which %s: there are no such scores of %s.", need, which, "it" if len(headless) == 1 else "them")
    _check_batch_norm_groups(_finetuning_batches(config), {c.name: c.settings for c in checkpoints.values()})
    for checkpoint in checkpoints.values() if any(crops_of(_finetuning_views(config))) else ():
        where = f"interpolation of random crops ({checkpoint.name}; config.checkpoint_preprocessing.interpolation)"
        choose(FILTERS, checkpoint.preprocessing.interpolation, where)
    if (size := config.checkpoint_preprocessing.image_size) is not None:
        own = {c.name: load(c, {}, config.seed).preprocessing.image_size for c in checkpoints}
        if len(set(own.values())) > 1:
            sizes = ", ".join(f"{name} {pixels}" for name, pixels in own.items())
            raise InputError(
                f"config.checkpoint_preprocessing.image_size = {size}: the given checkpoints take images of different "
                f"sizes ({sizes}); leave it unset, so that each gets its own."
            )
    # Last, so that a study that is refused leaves no description behind.
    given.record(Rows(work.results, "checkpoints"), [given.describe(*each) for each in checkpoints.items()])


def _check_datasets(work: Workspace) -> None:
    """Checks the images, labels and classes of every data set."""
    config = work.config
    feeds = [feed.dataset for recipe in work.recipes.values() for feed in recipe.section.feeds.values()]
    for dataset in dict.fromkeys((*work.sources, *feeds, *config.targets)):
        train, test = work.source(dataset, "train"), work.source(dataset, "test")
        for source in (train, test):
            if not len(source):
                raise InputError(f"{dataset} has no images in its {source.split} split.")
            if source.labels.min() < 0 or source.labels.max() >= source.num_classes:
                raise InputError(
                    f"{dataset} {source.split}: labels lie in [{source.labels.min()}, {source.labels.max()}], "
                    f"but its {source.num_classes} classes are numbered 0 to {source.num_classes - 1}."
                )
        if train.class_names != test.class_names:
            raise InputError(f"{dataset}: the train and test splits have different classes.")
        if train.num_classes < 2 and (dataset in config.targets or _learns_classes(work, dataset)):
            raise InputError(f"{dataset} has a single class ({train.class_names[0]!r}): at least two are needed.")


def _learns_classes(work: Workspace, dataset: str) -> bool:
    """Returns whether a pre-training on a data set trains a head for its classes."""
    return any(work.objective(p).has_head for p in work.pretrainings if p.source == dataset)


def _check_pretraining_data(work: Workspace) -> None:
    """Checks for every pre-training its length, its batches, its images and captions, and what is saved."""
    for pretraining in work.pretrainings:
        for index, (feed, (dataset, size)) in enumerate(feed_sizes(work, pretraining).items()):
            where = work.recipe(pretraining).where
            section = f"{where}.feeds.{feed}" if index else where
            steps_per_epoch(len(work.source(dataset, "train")), size, f"{dataset} ({section})")
            if feed == LABELLED:
                _check_labelled(work, dataset, pretraining.source, section)
        _check_division(work, pretraining)
        # An objective may have views of its own beside `augment`, which `check` does not know.
        if any(any(crops_of(views)) for views in work.objective(pretraining).views.values()):
            _check_interpolation(work.config)
        steps = work.config.pretrain.steps or 0
        if (epochs := steps // work.steps_per_epoch(pretraining)) > MOST_CHECKPOINTS:
            raise InputError(
                f"config.pretrain.steps = {steps}: these are {epochs:,} epochs of {pretraining.source}, each of which "
                f"is saved; the most are {MOST_CHECKPOINTS:,}: use fewer steps, or more images."
            )
        check_saved(work, pretraining)
        work.trained_on(pretraining)


def _check_division(work: Workspace, pretraining: Pretraining) -> None:
    """Checks that the objective of a pre-training can be computed with its batches."""
    where, section, *_ = work.recipe(pretraining)
    size, net = section.batch_size, work.source_net(pretraining)
    group = work.model(pretraining).get("batch_norm_group") or size // section.microbatches
    has_batch_norm = any(name.startswith("stats/") for name in net.shapes)
    division = Division(size, section.microbatches, group if has_batch_norm else None)
    try:
        work.objective(pretraining).check(division)
    except InputError as error:
        raise InputError(f"{where} with the objective {section.objective}: {error}") from error


def _check_labelled(work: Workspace, dataset: str, source: str, section: str) -> None:
    """Checks that the labels of a feed are those that the head of the net stands for: the classes of the source."""
    labelled, own = (work.source(name, "train").class_names for name in (dataset, source))
    if labelled != own:
        raise InputError(
            f"{section}.dataset = {dataset} has {len(labelled)} classes, which are not the {len(own)} of {source} in "
            "the same order: the net learns those of the source, so use images of it, such as a tenth with "
            "fraction=0.1."
        )


def check_early_stops(config: StudyConfig, target: str, steps_an_epoch: int | None = None) -> None:
    """Checks that the fine-tuning schedule of a target is long enough for the scores that stop it early.

    Args:
      steps_an_epoch: number of steps in an epoch over the images that those scores train on. If it is None, a schedule
        given in steps is not checked.

    Raises:
      InputError: if the schedule is too short. The message names its field.
    """
    tuning = settings.finetune_settings(config, target)
    field = "steps" if tuning.steps else "epochs"
    length = tuning.steps or tuning.epochs
    for score in config.scores:
        if score not in FINETUNE_SCORES or (tuning.steps and steps_an_epoch is None):
            continue
        least = FINETUNE_SCORES[score] * ((steps_an_epoch or 1) if tuning.steps else 1)
        if length < least:
            steps = f" of {steps_an_epoch} steps (over the images that scores train on)" if tuning.steps else ""
            raise InputError(
                f"{_field(config, target, 'finetune', field)} = {length}: {score} (config.scores) stops this schedule "
                f"after {FINETUNE_SCORES[score]} epochs{steps} on {target}: give it at least {least} {field}, "
                f"or leave {score} out."
            )


def _field(config: StudyConfig, target: str, section: str, field: str) -> str:
    """Returns the full name of the field of a section or of its overrides that sets a value for a target."""
    overridden = field in config.overrides.to_dict().get(target, {}).get(section, {})
    return f"config.overrides[{target!r}].{section}.{field}" if overridden else f"config.{section}.{field}"


def _check_paper_tables(config: StudyConfig) -> None:
    """Checks that the scores in a table of a paper have a number in each column."""
    for index, table in enumerate(config.paper_tables):
        for score, numbers in table["scores"].items():
            if len(numbers) != len(table["columns"]):
                raise InputError(
                    f"config.paper_tables[{index}].scores[{score!r}] has {len(numbers)} numbers for the "
                    f"{len(table['columns'])} columns {', '.join(table['columns'])}: give one for each, or None."
                )


def _check_by_target(config: StudyConfig, schema: fields.Schema) -> None:
    """Checks that the keys of the fields in BY_TARGET are targets of the study, and checks the fields in overrides."""
    for field in study_config.BY_TARGET:
        for target in study_config.at(config, field):
            choose(dict.fromkeys(config.targets), target, f"target (config.{field}; it must be one of config.targets)")
    sections = {name: schema[name] for name in ("probe", "finetune")}
    for target, override in config.overrides.items():
        where = f"config.overrides[{target!r}]"
        fields.check(dict(override.to_dict()), sections, where, partial=True)
