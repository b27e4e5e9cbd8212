"""Checks of what a study selects from its source images, and of how it reuses them, before anything is computed."""

from collections.abc import Mapping

from jax_transfer import fields
from jax_transfer.choose import choose
from jax_transfer.fields import StudyConfig
from jax_transfer.records import InputError
from jax_transfer.selection.strategies import STRATEGIES, SelectionSettings
from jax_transfer.study import settings
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
    for target in config.targets:
        overridden = "reuse" in config.overrides.to_dict().get(target, {}).get("finetune", {})
        field = f"config.overrides[{target!r}].finetune.reuse" if overridden else "config.finetune.reuse"
        fields.check_unique([str(way) for way in settings.finetune_settings(config, target).reuse], field)
        for index, way in enumerate(settings.finetune_settings(config, target).reuse):
            _check_way(way, f"{field}[{index}]", selections)


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
    """Checks that the source images suit the selections, and the checkpoints the ways to reuse them."""
    config = work.config
    ways = [
        way
        for target in config.targets
        for way in settings.finetune_settings(config, target).reuse
        if "finetune" in config.stages
    ]
    if "select" not in config.stages and not ways:
        return
    source = work.source(work.reused, "train")
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
    if any(REUSE[way.objective].arrays for way in ways):
        for snapshot in work.snapshots:
            if not work.checkpoint(snapshot).has_head:
                raise InputError(
                    f"config.finetune.reuse: cotuning needs the classification head of pre-training, which checkpoint "
                    f"{snapshot.name} does not have: leave cotuning out, or the checkpoint."
                )
