"""Typed access to a study's config for the stages: settings, models, sources and nets."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from jax_transfer import fields
from jax_transfer.analysis.embedding import MOST_POINTS
from jax_transfer.choose import choose
from jax_transfer.data.batches import NUM_THREADS, RESIDENT_GIGABYTES
from jax_transfer.data.sources import ON_CORRUPT
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.features.means import REPRESENTATIONS
from jax_transfer.fields import (
    Count,
    Few,
    NotNegative,
    OneOf,
    Probability,
    Rule,
    Steps,
    StudyConfig,
)
from jax_transfer.models import MODELS
from jax_transfer.records import InputError
from jax_transfer.selection.strategies import SelectionSettings
from jax_transfer.training.objectives import OBJECTIVES
from jax_transfer.training.optimizers import OptimizerSettings
from jax_transfer.transfer.fewshot import FewShotSettings
from jax_transfer.transfer.finetune import Augmentations, FinetuneSettings, grid
from jax_transfer.transfer.probe import ProbeSettings
from jax_transfer.transfer.pvse import RetrievalSettings


@dataclasses.dataclass(frozen=True)
class FeedSettings:
    """An entry of `config.pretrain.feeds`: an additional data set on which an objective trains."""

    dataset: str
    # Global: over all devices.
    batch_size: Count


@dataclasses.dataclass(frozen=True)
class PretrainSettings:
    """The fields of `config.pretrain`, without the sections of the objectives."""

    objective: Annotated[str, OneOf(OBJECTIVES, "objective")] = "supervised"
    epochs: Count = 200
    # Number of training steps; if set, it is used instead of `epochs`. The checkpoints are then named by their step,
    # and config.trajectory.steps says which ones are evaluated.
    steps: Steps | None = None
    # Global: over all devices.
    batch_size: Count = 128
    # Whether to save device memory: the backward pass keeps only the outputs of the model's blocks and computes the
    # rest again, about a third more computation. It changes results only by rounding, so a run may resume with another
    # value. XLA's CPU backend undoes it.
    remat: bool = False
    # Number of equal parts into which a batch is divided to save device memory; their gradients are averaged.
    # BatchNorm normalises each part by itself.
    microbatches: Few = 1
    # Keys of jax_transfer.data.augment.AUGMENTATIONS and jax_transfer.data.mixing.MIXINGS, applied in this order on the
    # device. The first one may be a key of jax_transfer.data.crops.CROPS, which cuts a window from the full image.
    augment: Augmentations = ("pad_crop", "flip")
    # Decay per step of a moving average of the weights. If not 0, the averaged weights are evaluated and transferred.
    ema_decay: Probability = 0.0
    optimizer: OptimizerSettings = OptimizerSettings(weight_decay=5e-4, schedule="cosine")  # noqa: RUF009  frozen
    # Data sets on which the objective trains in addition to config.source.dataset, keyed by the objective's names:
    # {"unlabelled": {"dataset": "tfds:cifar10", "batch_size": 64}}.
    feeds: dict[str, FeedSettings] = dataclasses.field(default_factory=dict)
    # Number of the source's test images by which every epoch is judged without a head: k-nearest-neighbour accuracy,
    # effective rank, alignment and uniformity, see jax_transfer.study.judge. If unset, 2,000 for an objective without
    # classes and 0 for any other; 0 leaves it out. A run may resume with another value.
    judged_images: Annotated[int, Rule(lambda x: x == 0 or x >= 2, "be 2 or more, or 0 to judge no epoch")] | None = (
        None
    )
    # Further pre-trainings of each model on each source, of the same length: each is this section with the fields that
    # it replaces, ({"objective": "simclr", "augment": ("resized_crop", "flip"), "simclr": {"temperature": 0.2}}, ...).
    # "source" in an entry is its only source, and "model" replaces settings of the models: {"batch_norm_group": 32}.
    # The checkpoints of all are ranked together.
    others: tuple[dict, ...] = ()

    def __post_init__(self):
        fields.check_itself(self)


@dataclasses.dataclass(frozen=True)
class SpectralSettings:
    """The fields of `config.spectral`.

    The stage "spectral" also keeps the features of fine-tuned models on disk: images x dimensions x 4 bytes for each
    checkpoint.
    """

    # Number of images whose features are decomposed together, as in the paper. If unset, the whole data set.
    batch_size: Count | None = 128
    # Training epochs of the probes on the components.
    epochs: Count = 50
    # Number of test images in the t-SNE embeddings; 0 leaves t-SNE out.
    embedded_images: Annotated[
        int, Rule(lambda x: x == 0 or 4 <= x <= MOST_POINTS, f"be 4 to {MOST_POINTS:,}, or 0 to leave t-SNE out")
    ] = 2000

    def __post_init__(self):
        fields.check_itself(self)


SELECTIONS: dict[str, Any] = {name: {"strategy": name} for name in ("random", "greedy_ot", "uot")}


@dataclasses.dataclass(frozen=True)
class SelectSettings:
    """The fields of `config.select`: which source images may be reused in fine-tuning, see `config.finetune.reuse`."""

    # The data set to select from; unset: config.source.dataset.
    dataset: str = ""
    # Name -> a selection; all of its fields are in jax_transfer.selection.strategies.SelectionSettings:
    # {"uot_50": {"strategy": "uot", "num_selected": 50}}.
    selections: dict[str, SelectionSettings] = dataclasses.field(default_factory=lambda: dict(SELECTIONS))
    # Target -> the names of the source classes that are selected by label; a target without an entry: the names that
    # its classes share with the source. The share of them that another selection finds is its recall.
    labels: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    # What images are compared by: the features, or the projection of a contrastive method.
    representation: Annotated[str, OneOf(REPRESENTATIONS, "representation")] = "features"
    # Whether to look for source images that nearly equal a test image of a target, and whether to leave them out.
    find_duplicates: bool = True
    exclude_duplicates: bool = False

    def __post_init__(self):
        fields.check_itself(self)


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The fields of `config.data`."""

    # A decoded data set up to this size is held in device memory; a larger one is streamed from disk.
    resident_gigabytes: NotNegative = RESIDENT_GIGABYTES
    # If the stacked features of all checkpoints on a target exceed this, the checkpoints are processed in groups.
    features_gigabytes: NotNegative = 2.0
    # Number of threads that read and decode images while streaming.
    num_threads: Few = NUM_THREADS
    eval_batch_size: Count = 512
    # error: stop at the first corrupt image. skip: leave out corrupt images, and log their names and number.
    on_corrupt: Annotated[str, OneOf(dict.fromkeys(ON_CORRUPT), "treatment of corrupt images")] = "error"

    def __post_init__(self):
        fields.check_itself(self)


def models(config: StudyConfig) -> dict[str, dict]:
    """Returns the models to pre-train: label -> its name in MODELS and all settings that are set.

    The label is the name in MODELS, followed by the settings if several models have the same name.

    >>> from jax_transfer.study.config import default_config
    >>> config = default_config()
    >>> config.model.others = ({"name": "mobilenet_v1", "width": 0.5},)
    >>> models(config)
    {'resnet18': {'name': 'resnet18'}, 'mobilenet_v1': {'name': 'mobilenet_v1', 'width': 0.5}}

    Raises:
      InputError: if a name or a setting is unknown, or a model is given twice.
    """
    first = {field: value for field, value in config.model.items() if field != "others"}
    by_label: dict[str, dict] = {}
    for index, model in enumerate((first, *config.model.others)):
        where = f"config.model.others[{index - 1}]" if index else "config.model"
        settings = {name: value for name, value in dict(model).items() if value not in (None, "")}
        _check_model(settings, where, list(first))
        label = "_".join([settings["name"], *(_format(v) for n, v in sorted(settings.items()) if n != "name")])
        if label in by_label:
            raise InputError(f"config.model lists {label} twice.")
        by_label[label] = settings
    names = [settings["name"] for settings in by_label.values()]
    return {s["name"] if names.count(s["name"]) == 1 else label: s for label, s in by_label.items()}


def _check_model(settings: dict, where: str, fields: list[str]) -> None:
    """Checks the name and the settings of a model.

    Args:
      where: the config field that holds the model.
      fields: all fields that a model can have in a config.

    Raises:
      InputError: if the name is unknown, or the model has no such setting.
    """
    make = choose(MODELS, settings.get("name", ""), f"model ({where}.name)")
    parameters = inspect.signature(make).parameters
    for name in settings.keys() - {"name"}:
        if name not in parameters:
            valid = [field for field in fields if field in parameters]
            raise InputError(
                f"{where}.{name} = {settings[name]!r}: {settings['name']} has no {name}; leave it unset with "
                f'--{where}.{name}="". The settings of {settings["name"]} are: {", ".join(valid) or "none"}.'
            )


def _format(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def sources(config: StudyConfig) -> list[str]:
    """Lists the data sets for pre-training, each of which gives a separate trajectory.

    >>> from jax_transfer.study.config import default_config
    >>> sources(default_config())
    ['tfds:cifar10']
    """
    own = [entry["source"] for entry in config.pretrain.others if "source" in entry]
    common = [config.source.dataset, *config.source.others]
    return [*common, *(source for source in dict.fromkeys(own) if source not in common)]


def make_net(config: StudyConfig, model: dict, num_classes: int, dtype=None):
    """Builds a net for one of the config's `models`, such as {"name": "resnet18"}.

    >>> from jax_transfer.study.config import default_config
    >>> make_net(default_config(), {"name": "resnet18"}, num_classes=10).feature_dim
    512
    """
    arguments = net_arguments(config, model)
    make = MODELS[arguments.pop("name")]
    return make(num_classes=num_classes, **arguments, **({} if dtype is None else {"dtype": dtype}))


def net_arguments(config: StudyConfig, model: dict) -> dict:
    """Returns the settings of one of the config's `models`, with the image size if the model depends on it.

    >>> from jax_transfer.study.config import default_config
    >>> net_arguments(default_config(), {"name": "resnet18"})
    {'name': 'resnet18'}
    """
    depends = "image_size" in inspect.signature(MODELS[model["name"]]).parameters
    return {**model, "image_size": config.preprocessing.image_size} if depends else dict(model)


def preprocessing(config: StudyConfig) -> Preprocessing:
    """Returns the preprocessing of a study.

    >>> from jax_transfer.study.config import default_config
    >>> preprocessing(default_config()).image_size
    32
    """
    return Preprocessing.from_json(config.preprocessing.to_dict())


def probe_settings(config: StudyConfig, target: str) -> ProbeSettings:
    """Returns the settings of linear probes on a target, with its `config.overrides`.

    >>> from jax_transfer.study.config import default_config
    >>> config = default_config()
    >>> config.overrides = {"tfds:mnist": {"probe": {"epochs": 150}}}
    >>> probe_settings(config, "tfds:mnist").epochs, probe_settings(config, "tfds:pets").epochs
    (150, 100)
    """
    return _of_target(ProbeSettings, config, "probe", target)


def finetune_settings(config: StudyConfig, target: str) -> FinetuneSettings:
    """Returns the settings of fine-tuning on a target, with its `config.overrides`.

    >>> from jax_transfer.study.config import default_config
    >>> config = default_config()
    >>> config.finetune.batch_size = 32
    >>> finetune_settings(config, "tfds:mnist").batch_size
    32
    >>> config.finetune.learning_rates = (0.5,)  # not a grid
    >>> finetune_settings(config, "tfds:mnist").optimizer.learning_rate
    0.5
    """
    tuning = _of_target(FinetuneSettings, config, "finetune", target)
    point, *others = grid(tuning)
    if others:
        return tuning
    optimizer = dataclasses.replace(tuning.optimizer, **point)
    return dataclasses.replace(tuning, optimizer=optimizer, learning_rates=None, weight_decays=None)


def fewshot_settings(config: StudyConfig) -> FewShotSettings:
    """Returns the settings of few-shot classifiers.

    >>> from jax_transfer.study.config import default_config
    >>> fewshot_settings(default_config()).shots
    (1, 2, 5, 10, 20)
    """
    return fields.make(FewShotSettings, config.fewshot.to_dict(), "config.fewshot")


def selections(config: StudyConfig) -> dict[str, SelectionSettings]:
    """Returns the selections of source images by name.

    >>> from jax_transfer.study.config import default_config
    >>> selections(default_config())["uot"].num_selected
    100
    """
    return fields.make(SelectSettings, config.select.to_dict(), "config.select").selections


def retrieval_settings(config: StudyConfig) -> RetrievalSettings:
    """Returns the settings of image-text retrieval.

    >>> from jax_transfer.study.config import default_config
    >>> retrieval_settings(default_config()).fractions
    (0.25, 1.0)
    """
    return fields.make(RetrievalSettings, config.retrieval.to_dict(), "config.retrieval")


class Recipe(NamedTuple):
    """How to pre-train.

    Attributes:
      where: the name of the section in messages: "config.pretrain" or "config.pretrain.others[0]".
      section: the fields of `config.pretrain`, with those that an entry of `others` replaces.
      sources: the data sets on which to pre-train in this way.
      model: settings of the model that replace those of `config.model`.
    """

    where: str
    section: StudyConfig
    sources: tuple[str, ...]
    model: dict[str, Any]


SHARED = ("epochs", "steps", "others")  # fields of `config.pretrain` that an entry of `others` cannot replace


def recipes(config: StudyConfig) -> dict[str, Recipe]:
    """Returns the ways to pre-train each model: label -> recipe, first that of `config.pretrain` itself.

    The label is the name of the objective, followed by a number from the second recipe with the same objective.

    >>> from jax_transfer.study.config import default_config
    >>> config = default_config()
    >>> config.pretrain.others = ({"supervised": {"label_smoothing": 0.1}},)
    >>> {label: recipe.section.supervised.label_smoothing for label, recipe in recipes(config).items()}
    {'supervised': 0.0, 'supervised_2': 0.1}

    Raises:
      InputError: if two recipes are equal.
    """
    base, common = config.pretrain.to_dict(), (config.source.dataset, *config.source.others)
    by_label: dict[str, Recipe] = {}
    for index, entry in enumerate(({}, *config.pretrain.others)):
        where = f"config.pretrain.others[{index - 1}]" if index else "config.pretrain"
        replaced = {name: value for name, value in dict(entry).items() if name not in ("source", "model")}
        recipe = Recipe(
            where,
            StudyConfig(_replaced(base, replaced)),
            (entry["source"],) if "source" in entry else common,
            dict(entry.get("model", {})),
        )
        for earlier in by_label.values():
            same = (earlier.section, earlier.model) == (recipe.section, recipe.model)
            if same and set(earlier.sources) & set(recipe.sources):
                raise InputError(f"{where} is the same pre-training as {earlier.where}: leave it out.")
        label, number = recipe.section.objective, 1
        while label in by_label:
            number += 1
            label = f"{recipe.section.objective}_{number}"
        by_label[label] = recipe
    return by_label


def model_of(model: Mapping, recipe: Recipe) -> dict:
    """Returns the settings of one of the config's `models` for a pre-training; a model ignores what it does not have.

    >>> recipe = Recipe("config.pretrain", StudyConfig(), (), {"batch_norm_group": 32})
    >>> model_of({"name": "resnet18"}, recipe), model_of({"name": "vit_tiny_patch16_224"}, recipe)
    ({'name': 'resnet18', 'batch_norm_group': 32}, {'name': 'vit_tiny_patch16_224'})
    """
    own = {name: value for name, value in recipe.model.items() if MODELS[model["name"]].takes(name)}
    return {name: value for name, value in {**model, **own}.items() if value is not None}


def _replaced(section: Mapping, entry: Mapping) -> dict:
    """Returns a section with the fields that an entry gives, in nested sections too."""
    result = dict(section)
    for name, value in dict(entry).items():
        nested = isinstance(value, Mapping | StudyConfig) and name not in fields.NAMED_BY_USER
        result[name] = _replaced(section[name], dict(value)) if nested else value
    return result


def pretrain_optimizer(section: StudyConfig, where: str = "config.pretrain") -> OptimizerSettings:
    """Returns the settings of the optimizer for pre-training.

    >>> from jax_transfer.study.config import default_config
    >>> pretrain_optimizer(default_config().pretrain).schedule
    'cosine'

    Args:
      section, where: a `Recipe`.
    """
    return fields.make(OptimizerSettings, section.optimizer.to_dict(), f"{where}.optimizer")


def objective_settings(section: StudyConfig) -> dict:
    """Returns the arguments of the objective of a pre-training, from the subsection with its name.

    >>> from jax_transfer.study.config import default_config
    >>> objective_settings(default_config().pretrain)
    {'label_smoothing': 0.0}
    """
    return section[section.objective].to_dict()


def _of_target(kind: type, config: StudyConfig, part: Literal["probe", "finetune"], target: str):
    """Returns the settings of a section of the config, with the values from `config.overrides` for a target."""
    values = config[part].to_dict()
    override = config.overrides.to_dict().get(target, {}).get(part, {})
    where = f"config.overrides[{target!r}].{part}" if override else f"config.{part}"
    if "optimizer" in override:
        override["optimizer"] = {**values["optimizer"], **override["optimizer"]}
    return fields.make(kind, {**values, **override}, where)
