"""Checks of what a study selects from its source images, and of how it reuses them, before anything is computed."""

from jax_transfer import fields
from jax_transfer.choose import choose
from jax_transfer.fields import StudyConfig
from jax_transfer.records import InputError
from jax_transfer.selection.strategies import STRATEGIES
from jax_transfer.study import settings
from jax_transfer.study.workspace import Workspace
from jax_transfer.training.objectives import REUSE


def check(config: StudyConfig) -> None:
    """Checks the selections of source images, and the ways to reuse them in fine-tuning."""
    selections, ways = settings.selections(config), settings.reuses(config)
    for name, selection in selections.items():
        if selection.kind == "cluster" and STRATEGIES[selection.strategy].needs_names:
            raise InputError(
                f"config.select.selections[{name!r}]: strategy {selection.strategy!r} goes by the names of classes, "
                'and clusters have none; use "kind": "class".'
            )
        last = selection.first - 1 + selection.num_selected
        if selection.kind == "cluster" and last > selection.num_clusters:
            raise InputError(
                f"config.select.selections[{name!r}] asks for ranks up to {last} of num_clusters = "
                f"{selection.num_clusters}: use more clusters, or a smaller num_selected or first."
            )
    if "select" in config.stages and not selections:
        raise InputError(
            'config.select.selections is empty: name at least one, or leave "select" out of config.stages.'
        )
    fields.check_unique([str(way) for way in ways], "config.reuse")
    for index, way in enumerate(ways):
        where, kind = f"config.reuse[{index}]", REUSE[way.objective]
        if not kind.source_views:
            if way.selection is not None or way.batch_size is not None:
                raise InputError(
                    f"{where}: {way.objective} trains on no source images; leave selection and batch_size out."
                )
        elif way.selection is None:
            raise InputError(
                f"{where}: {way.objective} trains on source images; name a selection: "
                f"{', '.join(selections) or 'none'}."
            )
        else:
            choose(selections, way.selection, f"selection ({where}.selection)")
        if way.only_selected_classes and not kind.needs_source_labels:
            raise InputError(f"{where}.only_selected_classes: {way.objective} has no head for the source.")


def check_data(work: Workspace) -> None:
    """Checks that the source images suit the selections, and the checkpoints the ways to reuse them."""
    config, source = work.config, work.source(work.reused, "train")
    for name, selection in settings.selections(config).items() if "select" in config.stages else ():
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
    if any(REUSE[way.objective].needs_relationship for way in settings.reuses(config)):
        for snapshot in work.snapshots:
            if not work.checkpoint(snapshot).has_head:
                raise InputError(
                    f"config.reuse: cotuning needs the classification head of pre-training, which checkpoint "
                    f"{snapshot.name} does not have: leave cotuning out, or the checkpoint."
                )
