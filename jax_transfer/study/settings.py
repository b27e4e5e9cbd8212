"""What a study's config says, as the stages read it: settings, models, sources and nets."""

import dataclasses
import inspect
from typing import Annotated, Literal

from ml_collections import ConfigDict

from jax_transfer import fields
from jax_transfer.analysis.embedding import MOST_POINTS
from jax_transfer.choose import choose
from jax_transfer.data.sources import ON_CORRUPT
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.fields import Count, Few, NotNegative, OneOf, Probability, Rule
from jax_transfer.models import MODELS
from jax_transfer.records import InputError
from jax_transfer.training.objectives import OBJECTIVES
from jax_transfer.training.optimizers import OptimizerSettings
from jax_transfer.transfer.finetune import Augmentation, FinetuneSettings
from jax_transfer.transfer.probe import ProbeSettings


@dataclasses.dataclass(frozen=True)
class FeedSettings:
    """Further data that an objective trains on, and how many of them in a batch over all devices."""

    dataset: str
    batch_size: Count


@dataclasses.dataclass(frozen=True)
class PretrainSettings:
    """The fields of `config.pretrain`, but for the sections of the objectives."""

    objective: Annotated[str, OneOf(OBJECTIVES, "objective")] = "supervised"
    epochs: Count = 200
    # Global: over all devices.
    batch_size: Count = 128
    # Keys of jax_transfer.data.augment.AUGMENTATIONS and jax_transfer.data.mixing.MIXINGS, applied in this order on the
    # device.
    augment: tuple[Augmentation, ...] = ("pad_crop", "flip")
    # Decay, per step, of a moving average of the weights, which is then evaluated and transferred. 0: none.
    ema_decay: Probability = 0.0
    optimizer: OptimizerSettings = OptimizerSettings(weight_decay=5e-4, schedule="cosine")  # noqa: RUF009  frozen
    # What an objective trains on beside config.source.dataset, by the objective's name for it:
    # {"unlabelled": {"dataset": "tfds:cifar10", "batch_size": 64}}.
    feeds: dict[str, FeedSettings] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        fields.check_itself(self)


@dataclasses.dataclass(frozen=True)
class SpectralSettings:
    """The fields of `config.spectral`.

    The stage "spectral" keeps the features of fine-tuned models too: images x dimensions x 4 bytes a checkpoint on disk.
    """

    # Rows of a feature matrix that are decomposed together, as in the paper; unset: the whole data set.
    batch_size: Count | None = 128
    # Epochs for the probes on the components.
    epochs: Count = 50
    # Test images that t-SNE shows; 0 for none.
    embedded_images: Annotated[
        int, Rule(lambda x: x == 0 or 4 <= x <= MOST_POINTS, f"be 4 to {MOST_POINTS:,}, or 0 to leave t-SNE out")
    ] = 2000

    def __post_init__(self):
        fields.check_itself(self)


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The fields of `config.data`."""

    # A decoded data set of at most this size is held in device memory; a larger one is streamed.
    resident_gigabytes: NotNegative = 4.0
    # Stacked features of all checkpoints of a target: more than this is processed in groups.
    features_gigabytes: NotNegative = 2.0
    # Threads that read and decode when streaming.
    num_threads: Few = 16
    eval_batch_size: Count = 512
    # error: stop at a corrupt image; skip: name, count and leave out what is corrupt.
    on_corrupt: Annotated[str, OneOf(dict.fromkeys(ON_CORRUPT), "treatment of corrupt images")] = "error"

    def __post_init__(self):
        fields.check_itself(self)


def models(config: ConfigDict) -> dict[str, dict]:
    """The models to pre-train: what each is called -> its name in MODELS and its settings.

    Raises:
      InputError: for a name or a setting that does not exist, and for a model given twice.
    """
    first = {field: value for field, value in config.model.items() if field != "others"}
    found: dict[str, dict] = {}
    for place, given in enumerate((first, *config.model.others)):
        where = f"config.model.others[{place - 1}]" if place else "config.model"
        settings = {name: value for name, value in dict(given).items() if value not in (None, "")}
        make = choose(MODELS, settings.get("name", ""), f"model ({where}.name)")
        takes = inspect.signature(make).parameters
        for name in settings.keys() - {"name"}:
            if name not in takes:
                has = [field for field in first if field in takes]
                raise InputError(
                    f"{where}.{name} = {settings[name]!r}: {settings['name']} has no {name}; leave it unset, "
                    f'--{where}.{name}="". It has {", ".join(has) or "no settings"}.'
                )
        label = "_".join([settings["name"], *(_plain(v) for n, v in sorted(settings.items()) if n != "name")])
        if label in found:
            raise InputError(f"config.model names {label} twice.")
        found[label] = settings
    names = [settings["name"] for settings in found.values()]
    return {s["name"] if names.count(s["name"]) == 1 else label: s for label, s in found.items()}


def _plain(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def sources(config: ConfigDict) -> list[str]:
    """The data sets to pre-train on, each for itself."""
    return [config.source.dataset, *config.source.others]


def make_net(config: ConfigDict, model: dict, num_classes: int, dtype=None):
    """One of the config's `models` for so many classes."""
    arguments = net_arguments(config, model)
    make = MODELS[arguments.pop("name")]
    return make(num_classes=num_classes, **arguments, **({} if dtype is None else {"dtype": dtype}))


def net_arguments(config: ConfigDict, model: dict) -> dict:
    """The settings of one of the config's `models`, with the image size if the model depends on it."""
    depends = "image_size" in inspect.signature(MODELS[model["name"]]).parameters
    return {**model, "image_size": config.preprocessing.image_size} if depends else dict(model)


def preprocessing(config: ConfigDict) -> Preprocessing:
    return Preprocessing.from_json(config.preprocessing.to_dict())


def probe_settings(config: ConfigDict, target: str) -> ProbeSettings:
    return _of_target(ProbeSettings, config, "probe", target)


def finetune_settings(config: ConfigDict, target: str) -> FinetuneSettings:
    return _of_target(FinetuneSettings, config, "finetune", target)


def pretrain_optimizer(config: ConfigDict) -> OptimizerSettings:
    return fields.make(OptimizerSettings, config.pretrain.optimizer.to_dict(), "config.pretrain.optimizer")


def objective_settings(config: ConfigDict) -> dict:
    """The arguments of the chosen objective, as its section of `config.pretrain` has them."""
    return config.pretrain[config.pretrain.objective].to_dict()


def _of_target(kind: type, config: ConfigDict, part: Literal["probe", "finetune"], target: str):
    """A section of the config with what `config.overrides` says for a target."""
    values = config[part].to_dict()
    override = config.overrides.get(target, ConfigDict()).get(part, ConfigDict()).to_dict()
    where = f"config.overrides[{target!r}].{part}" if override else f"config.{part}"
    if "optimizer" in override:
        override["optimizer"] = {**values["optimizer"], **override["optimizer"]}
    return fields.make(kind, {**values, **override}, where)
