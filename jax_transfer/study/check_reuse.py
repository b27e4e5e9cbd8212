"""Checks of what a study selects from its source images, and of how it reuses them, before anything is computed."""

from collections.abc import Mapping

from jax_transfer import fields
from jax_transfer.choose import choose
from jax_transfer.data.mixing import MIXINGS
from jax_transfer.fields import StudyConfig
from jax_transfer.records import InputError
from jax_transfer.results import Rows
from jax_transfer.selection.select import shared_names
from jax_transfer.selection.strategies import STRATEGIES, SelectionSettings, unused
from jax_transfer.study import settings
from jax_transfer.study.epochs import Snapshot, finetuned_snapshots
from jax_transfer.study.reuse import check_number, num_source_views
from jax_transfer.study.select import not_made
from jax_transfer.study.workspace import Workspace
from jax_transfer.training.objectives import REUSE
from jax_transfer.transfer.finetune import Reuse


def check(config: StudyConfig) -> None:
    """Checks the selections of source images, and the ways to reuse them in fine-tuning."""
    selections = settings.selections(config)
    for name, selection in selections.items():
        if selection.kind == "cluster" and STRATEGIES[selection.strategy].needs_names:
            raise InputError(
                f"config.select.selections[{name!r}]: strategy {selection.strategy!r} goes by the names of classes, "
                'and clusters have none; use "kind": "class".'
            )
        if ignored := unused(selection):
            of = " with classes" if ignored[0] in STRATEGIES[selection.strategy].uses else ""
            raise InputError(
                f"config.select.selections[{name!r}].{ignored[0]} = {getattr(selection, ignored[0])!r}, but strategy "
                f"{selection.strategy!r}{of} does not use it: leave it out."
            )
        last = selection.first - 1 + selection.num_selected
        if selection.kind == "cluster" and last > selection.num_clusters:
            raise InputError(
                f"config.select.selections[{name!r}] asks for ranks up to {last} of num_clusters = "
                f"{selection.num_clusters}: use more clusters, or a smaller num_selected or first."
            )
    if config.select.exclude_duplicates and not config.select.find_duplicates:
        raise InputError(
            "config.select.exclude_duplicates = True, but config.select.find_duplicates = False: duplicates must be "
            "found to be left out; set both, or neither."
        )
    if "select" in config.stages and not selections:
        raise InputError(
            'config.select.selections is empty: name at least one, or leave "select" out of config.stages.'
        )
    for target in config.targets:
        overridden = "reuse" in config.overrides.to_dict().get(target, {}).get("finetune", {})
        field = f"config.overrides[{target!r}].finetune.reuse" if overridden else "config.finetune.reuse"
        fields.check_unique([str(way) for way in settings.finetune_settings(config, target).reuse], field)
        for index, way in enumerate(settings.finetune_settings(config, target).reuse):
            _check_way(way, f"{field}[{index}]", selections)
            mixings = [name for name in settings.finetune_settings(config, target).augment if name in MIXINGS]
            if mixings and REUSE[way.objective].source_views > 1:
                raise InputError(
                    f"{field}[{index}]: {way.objective} compares two views of an image, which config.finetune.augment "
                    f"mixes with another one by {mixings[0]!r}: leave one of them out."
                )


def _check_way(way: Reuse, where: str, selections: Mapping[str, SelectionSettings]) -> None:
    """Checks that a way of reuse names a selection if and only if its objective trains on source images."""
    objective = REUSE[way.objective]
    if objective.source_views:
        if way.selection is None:
            named = ", ".join(selections) or "none"
            raise InputError(f"{where}: {way.objective} trains on source images; name a selection: {named}.")
        choose(selections, way.selection, f"selection ({where}.selection)")
    elif way.selection is not None or way.batch_size is not None:
        raise InputError(f"{where}: {way.objective} trains on no source images; leave selection and batch_size out.")
    if way.only_selected_classes and not objective.settings:
        raise InputError(f"{where}.only_selected_classes: {way.objective} has no head for the source.")


def check_data(work: Workspace) -> None:
    """Checks that the source images suit the selections, and the checkpoints the ways to reuse them.

    Raises:
      InputError: if they do not, or the study reuses a selection that no stage makes.
    """
    config = work.config
    targets = config.targets if "finetune" in config.stages else ()
    ways = {target: settings.finetune_settings(config, target).reuse for target in targets}
    if "select" in config.stages:
        _check_selections(work)
    if not any(ways.values()):
        return
    for target, own in ways.items():
        for way in own:
            if num_source_views(way):
                source, tuning = work.source(work.reused, "train"), settings.finetune_settings(config, target)
                check_number(len(source), f"{way}: the source has", work.reused, way, tuning)
                if REUSE[way.objective].settings and source.num_classes < 2:
                    raise InputError(
                        f"{way} needs labels of the source images, and {work.reused} has a single class: use "
                        "weak_strong with clusters."
                    )
            for snapshot in finetuned_snapshots(config, work.snapshots, target):
                _check_checkpoint(work, snapshot, target, way)


def _check_selections(work: Workspace) -> None:
    """Checks that the source images suit the selections, and that images can be compared."""
    config, source = work.config, work.source(work.reused, "train")
    for name, selection in settings.selections(config).items():
        where, last = f"config.select.selections[{name!r}]", selection.first - 1 + selection.num_selected
        if selection.kind == "cluster":
            if selection.num_clusters > len(source):
                raise InputError(
                    f"{where}.num_clusters = {selection.num_clusters}: {work.reused} has only {len(source)} training "
                    "images."
                )
        elif source.num_classes < 2:
            raise InputError(
                f"{where}: {work.reused} has a single class, so there are no classes to select from; select clusters, "
                'with "kind": "cluster".'
            )
        elif not STRATEGIES[selection.strategy].needs_names and last > source.num_classes:
            raise InputError(
                f"{where} asks for ranks up to {last}, but {work.reused} has {source.num_classes} classes: use a "
                "smaller num_selected or first."
            )
    for target, names in config.select.labels.items():
        for class_name in names:
            known = dict.fromkeys(source.class_names)
            choose(known, class_name, f"class of {work.reused} (config.select.labels[{target!r}])")
    if config.select.representation == "projection":
        for snapshot in work.snapshots:
            work.with_projection(snapshot)  # raises an InputError if there is none


def _check_checkpoint(work: Workspace, snapshot: Snapshot, target: str, way: Reuse) -> None:
    """Checks that a checkpoint has what a way of fine-tuning reuses: a classification head, or selected images."""
    if REUSE[way.objective].arrays and not work.checkpoint(snapshot).has_head:
        raise InputError(
            f"{way} (reuse on {target}) needs the classification head of pre-training, which {snapshot.name} does "
            "not have: leave the one or the other out."
        )
    if way.selection is None:
        return
    settings_of = settings.selections(work.config)[way.selection]
    if "select" not in work.config.stages:
        key, rows = (snapshot.name, target, way.selection), Rows(work.results, "selection").rows
        if not any((row.checkpoint, row.target, row.strategy) == key for row in rows):
            raise InputError(f"{not_made(way.selection, target, snapshot)}.")
    elif STRATEGIES[settings_of.strategy].needs_names and not work.config.select.labels.get(target):
        names = (work.source(dataset, "train").class_names for dataset in (work.reused, target))
        if not shared_names(*names):
            raise InputError(
                f"{way}: no class of {work.reused} has the name of a class of {target}; name those to select in "
                "config.select.labels."
            )
