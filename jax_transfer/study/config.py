"""Every field of a study's config and its default. `configs/*.py` start from `default_config()` and set what differs."""

# ruff: noqa: RUF009  the defaults are frozen

import dataclasses
from collections import ChainMap
from collections.abc import Mapping, Sequence
from typing import Annotated

from ml_collections import ConfigDict

from jax_transfer import fields
from jax_transfer.analysis import SCORES
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.fields import Listed, NotNegative, OneOf, Probability, Rule, Schema, between, to_json
from jax_transfer.logs import log
from jax_transfer.records import METRICS
from jax_transfer.study.settings import DataSettings, PretrainSettings, SpectralSettings
from jax_transfer.study.stages import STAGES
from jax_transfer.training.objectives import OBJECTIVES
from jax_transfer.transfer.finetune import FINETUNE_SCORES, FinetuneSettings
from jax_transfer.transfer.probe import ProbeSettings

# What may change between two runs in one working directory: it adds or leaves out work, but no result
# that is already there would come out otherwise. So may `checkpoints` of finetune and of its overrides.
CHANGEABLE = ("stages", "targets", "metrics", "scores", "trajectory", "data", "paper")

# Fields whose keys are targets.
BY_TARGET = ("overrides", "metrics")


@dataclasses.dataclass(frozen=True)
class OtherModel:
    """A key of jax_transfer.models.MODELS; the rest is unset for the published model, and for models that do not have it."""

    name: str = "resnet18"
    # ResNets only. imagenet: 7x7 stride 2 and max-pool; cifar: 3x3 stride 1.
    stem: str | None = None
    # ResNets: channels after the stem, 64 if unset. MobileNets and Inceptions: multiplier of all channels.
    width: Annotated[float, Rule(lambda x: 0 < x <= 10_000, "lie in (0, 10000]")] | None = None
    # Transformers only: probability with which the last block is left out of an image in training.
    stochastic_depth: Probability | None = None


@dataclasses.dataclass(frozen=True)
class Model(OtherModel):
    """The fields of `config.model`."""

    # Further models, each pre-trained for itself: ({"name": "mobilenet_v1", "width": 0.5}, ...). The checkpoints of all
    # are ranked together.
    others: tuple[dict, ...] = ()


@dataclasses.dataclass(frozen=True)
class SourceData:
    """The fields of `config.source`."""

    # What the model is pre-trained on: "kind:name?option=value", see jax_transfer.data.sources.
    dataset: str = "tfds:cifar10"
    # Further ones, each with a trajectory of its own; the checkpoints of all are ranked together.
    others: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class TrajectorySettings:
    """The fields of `config.trajectory`."""

    # The epochs that are evaluated: "all", "every:K", "log", or a list such as "0,1,5,20".
    epochs: str = "log"


PAPERS_WHAT = ("source", "FE", "FT", "FE main", "FE residual", "FT main", "FT residual")


@dataclasses.dataclass(frozen=True)
class PaperAccuracy:
    """One accuracy that a paper prints. target: "" for the source; epoch: ours that it is shown beside."""

    target: str
    epoch: Annotated[int, Rule(lambda x: x >= 0, "not be negative")]
    what: Annotated[str, OneOf(dict.fromkeys(PAPERS_WHAT), "what")]
    accuracy: NotNegative
    where: str


@dataclasses.dataclass(frozen=True)
class Study:
    """The fields of a config: a ResNet-18 on CIFAR-10 and its transfer to MNIST."""

    # Shown at the head of the report.
    name: str = "study"
    # Seeds initialisation, data order, augmentation, subsets and splits.
    seed: Annotated[int, between(0, 2**31 - 1)] = 0
    # What runs, in the order of jax_transfer.stages.STAGES.
    stages: Annotated[tuple[Annotated[str, OneOf(STAGES, "stage")], ...], Listed(True, True)] = tuple(STAGES)
    model: Model = Model()
    source: SourceData = SourceData()
    preprocessing: Preprocessing = Preprocessing(image_size=32)
    # With a section for the settings of each objective, see `schema`.
    pretrain: PretrainSettings = PretrainSettings()
    trajectory: TrajectorySettings = TrajectorySettings()
    # The data sets to transfer to.
    targets: Annotated[tuple[str, ...], Listed(True, True)] = ("tfds:mnist",)
    # What counts on single targets, a key of jax_transfer.records.METRICS: {"folder:/my/birds": "mean_class_accuracy"}. A
    # target without one has the metric that the field uses for it (jax_transfer.data.catalog), else accuracy. It decides
    # which checkpoint is best and what tables and figures show; it changes no result. Learning rates and l2 of probes are
    # chosen by accuracy on a validation split, and scores that are accuracies stay accuracies.
    metrics: dict[str, Annotated[str, OneOf(METRICS, "metric")]] = dataclasses.field(default_factory=dict)
    probe: ProbeSettings = ProbeSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    # Fields of probe and finetune for single targets: {"tfds:cifar10": {"probe": {"epochs": 150}}}.
    overrides: dict[str, dict] = dataclasses.field(default_factory=dict)
    # Keys of jax_transfer.analysis.SCORES, and of jax_transfer.transfer.finetune.FINETUNE_SCORES: finetune_5 is the
    # schedule of config.finetune stopped after 5 epochs, so it must have as many.
    scores: Annotated[
        tuple[Annotated[str, OneOf(ChainMap(SCORES, FINETUNE_SCORES), "score")], ...], Listed(unique=True)
    ] = ("logme", "leep", "nce")
    # The paper's accuracies, which the report shows beside ours: ({"target": ("" for the source), "epoch": (ours), "what":
    # "source", "FE", "FT", "FE main", "FE residual", "FT main" or "FT residual", "accuracy": 0.9, "where": "Table 1"}, ...).
    paper: tuple[PaperAccuracy, ...] = ()
    spectral: SpectralSettings = SpectralSettings()
    data: DataSettings = DataSettings()


def schema() -> Schema:
    """The fields of a config; those of `pretrain` hold a section for each objective, of the arguments with a default."""
    found = fields.schema(Study())
    found["pretrain"] |= {name: fields.keywords(objective) for name, objective in OBJECTIVES.items()}
    return found


def default_config() -> ConfigDict:
    """A complete config: a ResNet-18 on CIFAR-10 and its transfer to MNIST."""
    return fields.section(schema())


def follow_targets(config: ConfigDict, names: Sequence[str]) -> None:
    """Drops what a config file says in the fields `names` of targets that the command line has replaced."""
    for name in names:
        found = config.get(name)
        if not isinstance(found, ConfigDict):
            continue
        dropped = [target for target in found if target not in config.targets]
        with found.unlocked():
            for target in dropped:
                del found[target]
        if dropped:
            log.info("config.%s of %s is dropped: no longer in config.targets.", name, ", ".join(dropped))


def differences(old: dict, new: dict) -> list[str]:
    """Readable lines for the fields in which two configs, as `to_json` gives them, differ in a way that changes results.

    `old` may come from an earlier version: a field that it lacks has its default.
    """
    defaults = to_json(default_config())
    return _differences(*(_used(_completed(_renamed(config), defaults)) for config in (old, new)), "config")


def _renamed(config: dict) -> dict:
    """Fields that had another name in an earlier version."""
    pretrain = dict(config.get("pretrain") or {})
    if "label_smoothing" in pretrain:
        pretrain["supervised"] = {"label_smoothing": pretrain.pop("label_smoothing")}
    return {**config, "pretrain": pretrain}


def _completed(config: dict, defaults: dict) -> dict:
    return {
        **config,
        **{
            name: _completed(config.get(name) or {}, default)
            if isinstance(default, dict)
            else config.get(name, default)
            for name, default in defaults.items()
        },
    }


def _used(config: dict) -> dict:
    """Without the settings of objectives that are not chosen."""
    chosen = config["pretrain"]["objective"]
    pretrain = {name: v for name, v in config["pretrain"].items() if name == chosen or name not in OBJECTIVES}
    return {**config, "pretrain": pretrain}


def _differences(old: Mapping, new: Mapping, where: str) -> list[str]:
    lines = []
    for name in sorted(old.keys() | new.keys()):
        if (where == "config" and name in CHANGEABLE) or name == "checkpoints":
            continue
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += _differences(a, b, f"{where}.{name}")
        elif a != b:
            lines.append(f"{where}.{name} was {a!r}, is {b!r}")
    return lines
