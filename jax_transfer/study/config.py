"""All fields of a study's config, with their defaults. The files in configs/ start from `default_config()`."""

# ruff: noqa: RUF009  the defaults are frozen

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from jax_transfer import fields
from jax_transfer.analysis import SCORES, score_named
from jax_transfer.choose import choose
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.fields import (
    Count,
    Listed,
    NotNegative,
    OneOf,
    Parsed,
    Probability,
    Rule,
    Schema,
    StudyConfig,
    between,
    to_json,
)
from jax_transfer.logs import log
from jax_transfer.ranking.candidates import Replaced
from jax_transfer.records import METRICS, InputError
from jax_transfer.report.paper_tables import COLUMNS
from jax_transfer.report.tables import METHODS, OBJECTIVE_NAMES
from jax_transfer.results import PLAIN
from jax_transfer.selection.strategies import SelectionSettings
from jax_transfer.study.settings import DataSettings, PretrainSettings, SelectSettings, SpectralSettings
from jax_transfer.study.stages import STAGES
from jax_transfer.training.objectives import OBJECTIVES
from jax_transfer.transfer.fewshot import FewShotSettings
from jax_transfer.transfer.finetune import FINETUNE_SCORES, FinetuneSettings, Reuse
from jax_transfer.transfer.probe import ProbeSettings
from jax_transfer.transfer.pvse import RetrievalSettings

# Fields that may change between two runs in the same working directory. A change adds or leaves out
# work, but existing results stay valid. The same holds for the fields in CHANGEABLE_ANYWHERE, in any section:
# `checkpoints`, `finetune.checkpoints` and its overrides, `remat`, which changes results only by rounding,
# `judged_images`, which changes no trained model, the numbers of a paper, and lists each of whose entries has rows of
# its own.
CHANGEABLE = ("stages", "targets", "metrics", "scores", "static", "trajectory", "data")
CHANGEABLE_ANYWHERE = (
    "checkpoints",
    "remat",
    "judged_images",
    "paper",
    "paper_tables",
    "methods",
    "shots",
    "datasets",
    "fractions",
    "folds",
)

# Fields, in any section, to which entries may be added, or from which they may be left out; the others must not change.
GROWING = ("selections", "reuse", "labels", "seen", "unseen")

# Fields whose keys are targets.
BY_TARGET = ("overrides", "metrics", "select.labels", "fewshot.seen", "fewshot.unseen")


@dataclasses.dataclass(frozen=True)
class OtherModel:
    """An entry of `config.model.others`. Unset fields give the published model. Not every model has all fields."""

    # A key of jax_transfer.models.MODELS.
    name: str = "resnet18"
    # ResNets only. imagenet: 7x7 stride 2 and max-pool; cifar: 3x3 stride 1.
    stem: str | None = None
    # ResNets: number of channels after the stem, 64 if unset. MobileNets and Inceptions: factor by which all channel
    # counts are multiplied.
    width: Annotated[float, Rule(lambda x: 0 < x <= 10_000, "lie in (0, 10000]")] | None = None
    # Nets with BatchNorm: number of images that are normalised together in training, whatever the number of devices. It
    # divides the batch sizes of pre-training and fine-tuning. If unset, the global batch is normalised together. 32 is
    # what eight GPUs make of a batch of 256. It needs no communication between devices if each has a multiple of it.
    batch_norm_group: Count | None = None
    # Transformers only: probability that training skips the last block for an image (stochastic depth).
    stochastic_depth: Probability | None = None


@dataclasses.dataclass(frozen=True)
class Model(OtherModel):
    """The fields of `config.model`."""

    # Additional models, each pre-trained separately: ({"name": "mobilenet_v1", "width": 0.5}, ...). The checkpoints of
    # all models are ranked together.
    others: tuple[dict, ...] = ()


@dataclasses.dataclass(frozen=True)
class SourceData:
    """The fields of `config.source`."""

    # The data set for pre-training: "kind:name?option=value", see jax_transfer.data.sources.
    dataset: str = "tfds:cifar10"
    # Additional data sets, each with a separate trajectory. The checkpoints of all trajectories are ranked together.
    others: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class TrajectorySettings:
    """The fields of `config.trajectory`."""

    # The epochs to evaluate: "all", "every:K", "log", or a list such as "0,1,5,20".
    epochs: str = "log"
    # With config.pretrain.steps, and only then, the steps to evaluate in place of epochs: "every:30k", "log", or a list
    # such as "0,90k,300k"; k is a thousand, m a million. They are saved, besides the end of every epoch.
    steps: str | None = None


SHOTS = (1, 2, 5, 10, 20)  # of which a paper reports accuracies
FEW_SHOT = (*(f"{shots}-shot" for shots in SHOTS), "seen classes")
PAPER_RESULTS = ("source", "FE", "FT", "FE main", "FE residual", "FT main", "FT residual", "recall", *FEW_SHOT)


@dataclasses.dataclass(frozen=True)
class PaperAccuracy:
    """An accuracy that a paper reports.

    Attributes:
      target: name of the target; "" for an accuracy on the source.
      what: which accuracy it is: "source", "FE", "FT", "FE main", "FE residual", "FT main" or "FT residual"; or
        "recall", the share of the related source classes that a selection holds, or one of FEW_SHOT.
      accuracy: in [0, 1].
      where: where the paper reports it, such as "Table 1".
      epoch: the epoch of the study whose accuracy is shown beside it; unset for an accuracy ("FT") of a given
        checkpoint, which is shown among the ways of fine-tuning that reuse source data.
      objective, selection: which way of fine-tuning it is, as in `results.TransferRow`; "" for no selection.
    """

    target: str
    what: Annotated[str, OneOf(dict.fromkeys(PAPER_RESULTS), "what")]
    accuracy: NotNegative
    where: str
    epoch: Annotated[int, Rule(lambda x: x >= 0, "not be negative")] | None = None
    objective: Annotated[str, OneOf(OBJECTIVE_NAMES, "objective")] = PLAIN
    selection: str = ""


def _check_score(name: str, description: str) -> None:
    """Checks a name in `config.scores`: a score, with or without options, or the name of early-stopped fine-tuning."""
    base, options, _ = name.partition("?")
    choose({**SCORES, **FINETUNE_SCORES}, base, description)
    if base in SCORES:
        score_named(name, description)
    elif options:
        raise InputError(f"{name!r}: this score has no options: write {base!r}.")


@dataclasses.dataclass(frozen=True)
class PaperTable:
    """A table of a paper that says how well scores rank checkpoints.

    Attributes:
      where: where the paper has it, such as "Table 1".
      method: the method whose accuracies the scores predict.
      targets: the targets over which the numbers are means.
      num_checkpoints: number of checkpoints that are ranked.
      columns: keys of `report.paper_tables.COLUMNS`.
      scores: score -> its number in each column as printed, in percent but for GFLOPS; None for a dash.
    """

    where: str
    method: Annotated[str, OneOf(METHODS, "method")]
    targets: Annotated[tuple[str, ...], Listed(True, True)]
    num_checkpoints: Count
    columns: Annotated[tuple[Annotated[str, OneOf(COLUMNS, "column")], ...], Listed(True, True)]
    scores: dict[Annotated[str, Parsed(_check_score, "score")], tuple[float | None, ...]]


@dataclasses.dataclass(frozen=True)
class Study:
    """The fields of a config. The defaults pre-train a ResNet-18 on CIFAR-10 and transfer it to MNIST."""

    # The title of the report.
    name: str = "study"
    # Random seed for initialisation, data order, augmentation, subsets and splits.
    seed: Annotated[int, between(0, 2**31 - 1)] = 0
    # The stages to run, in the order of jax_transfer.study.stages.STAGES. "select" is only needed for
    # config.finetune.reuse, and "retrieval" for config.retrieval.datasets.
    stages: Annotated[tuple[Annotated[str, OneOf(STAGES, "stage")], ...], Listed(True, True)] = tuple(
        name for name in STAGES if name not in ("select", "fewshot", "retrieval")
    )
    # Checkpoints to evaluate that exist already, as `jax_transfer.rank` takes them: files, epochs, trajectories,
    # folders, FILE=MODEL and random:MODEL. Each has its own model and preprocessing. In a study that
    # runs the stage "pretrain", now or in an earlier run, they are compared with its own epochs; any other study
    # consists of them alone.
    checkpoints: tuple[str, ...] = ()
    # Replaces fields of the given checkpoints' preprocessing, such as that of a file that does not state it.
    checkpoint_preprocessing: Replaced = Replaced()
    model: Model = Model()
    source: SourceData = SourceData()
    preprocessing: Preprocessing = Preprocessing(image_size=32)
    # In the config, this section also has a subsection with the settings of each objective, see `schema`.
    pretrain: PretrainSettings = PretrainSettings()
    trajectory: TrajectorySettings = TrajectorySettings()
    # The data sets to transfer to. Only a study of retrieval needs none.
    targets: Annotated[tuple[str, ...], Listed(unique=True)] = ("tfds:mnist",)
    # Target -> metric, a key of jax_transfer.records.METRICS: {"folder:/my/birds": "mean_class_accuracy"}. Any other
    # target has the metric that papers report for it (jax_transfer.data.catalog), or accuracy if there is none. The
    # metric decides which checkpoint is best and what tables and figures show, but changes no computed result. The
    # settings of a probe are always chosen by accuracy, and scores that are accuracies do not depend on the metric.
    metrics: dict[str, Annotated[str, OneOf(METRICS, "metric")]] = dataclasses.field(default_factory=dict)
    probe: ProbeSettings = ProbeSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    select: SelectSettings = SelectSettings()
    fewshot: FewShotSettings = FewShotSettings()
    retrieval: RetrievalSettings = RetrievalSettings()
    # Target -> fields of probe and finetune whose values differ for this target:
    # {"tfds:cifar10": {"probe": {"epochs": 150}}}.
    overrides: dict[str, dict] = dataclasses.field(default_factory=dict)
    # Keys of jax_transfer.analysis.SCORES, with or without options ("nleep?energy=0.5"), and of
    # jax_transfer.transfer.finetune.FINETUNE_SCORES. finetune_5 follows the schedule of config.finetune but stops after
    # 5 epochs, so the schedule must have at least 5 epochs.
    scores: Annotated[tuple[Annotated[str, Parsed(_check_score, "score")], ...], Listed(unique=True)] = (
        "logme",
        "leep",
        "nce",
    )
    # An order of the checkpoints, the best first, which the scores have to beat: names of checkpoints, or how they
    # begin up to a "/" ("resnet50" stands for "resnet50/imagenet/90" too). The others share the last place.
    static: Annotated[tuple[str, ...], Listed(unique=True)] = ()
    # Accuracies from the paper, which the report shows beside ours; see `PaperAccuracy`:
    # ({"target": "tfds:mnist", "what": "FE main", "accuracy": 0.9, "where": "Table 1", "epoch": 5}, ...).
    paper: tuple[PaperAccuracy, ...] = ()
    # Tables from the paper on how well scores rank checkpoints, which the report shows beside ours; see `PaperTable`.
    paper_tables: tuple[PaperTable, ...] = ()
    spectral: SpectralSettings = SpectralSettings()
    data: DataSettings = DataSettings()


def pretrain_schema() -> Schema:
    """Returns the fields of `config.pretrain`, which include a section for each objective with its arguments.

    >>> pretrain_schema()["supervised"]["label_smoothing"].default
    0.0
    """
    return fields.schema(PretrainSettings()) | {name: fields.keywords(make) for name, make in OBJECTIVES.items()}


def schema() -> Schema:
    """Returns the fields of a config.

    >>> schema()["seed"].default, schema()["pretrain"]["epochs"].default
    (0, 200)
    """
    return {**fields.schema(Study()), "pretrain": pretrain_schema()}


def default_config() -> StudyConfig:
    """Returns a complete config, which pre-trains a ResNet-18 on CIFAR-10 and transfers it to MNIST.

    >>> config = default_config()
    >>> config.model.name, config.source.dataset, config.targets
    ('resnet18', 'tfds:cifar10', ('tfds:mnist',))
    """
    return fields.section(schema())


def at(config: StudyConfig, field: str) -> Any:
    """Returns the value of a field by its path.

    >>> at(default_config(), "select.dataset")
    ''
    """
    return functools.reduce(lambda section, name: section[name], field.split("."), config)


def follow_targets(config: StudyConfig, names: Sequence[str]) -> None:
    """Drops the entries for targets that are no longer in `config.targets`, which the command line has replaced.

    >>> config = default_config()
    >>> config.metrics = {"tfds:pets": "mean_class_accuracy"}
    >>> follow_targets(config, ["metrics"])
    >>> config.metrics.to_dict()
    {}

    Args:
      config: changed in place.
      names: the fields whose entries are dropped, a subset of BY_TARGET.
    """
    for name in names:
        entries = at(config, name)
        if not isinstance(entries, StudyConfig):
            continue
        dropped = [target for target in entries if target not in config.targets]
        with entries.unlocked():
            for target in dropped:
                del entries[target]
        if dropped:
            log.info("config.%s of %s is ignored: not in config.targets.", name, ", ".join(dropped))


def differences(old: dict, new: dict) -> list[str]:
    """Lists the fields in which two configs differ in a way that changes results, one readable line for each.

    >>> old, new = default_config(), default_config()
    >>> new.pretrain.epochs = 5
    >>> differences(to_json(old), to_json(new))
    ['config.pretrain.epochs was 200, is 5']

    Args:
      old: a config as `to_json` returns it, possibly from an earlier version. Missing fields get their default values.
      new: the config to compare with.
    """
    defaults = to_json(default_config())
    before, after = (_by_name(_used(_completed(_renamed(config), defaults))) for config in (old, new))
    return _differences(before, after, "config")


def _renamed(config: dict) -> dict:
    """Renames fields and values that had another name or meaning in an earlier version."""
    pretrain = dict(config.get("pretrain") or {})
    if "label_smoothing" in pretrain:
        pretrain["supervised"] = {"label_smoothing": pretrain.pop("label_smoothing")}
    renamed = {**config, "pretrain": pretrain}
    return renamed if "remat" in pretrain else _with_square_crops(renamed)


def _with_square_crops(config: Any) -> Any:
    """Renames `resized_crop` in a config from before it was cut from the full image."""
    if isinstance(config, dict):
        return {name: _with_square_crops(value) for name, value in config.items()}
    if isinstance(config, list):
        return [_with_square_crops(value) for value in config]
    return "resized_crop of the central square" if config == "resized_crop" else config


def _completed(config: dict, defaults: dict) -> dict:
    """Adds missing fields with their defaults, in nested sections too."""
    return {
        **config,
        **{
            name: _completed(config.get(name) or {}, default)
            if isinstance(default, dict) and name not in fields.NAMED_BY_USER
            else config.get(name, default)
            for name, default in defaults.items()
        },
    }


def _used(config: dict) -> dict:
    """Removes the settings of objectives that the config does not use."""
    pretrain = config["pretrain"]
    used = {pretrain["objective"], *(entry.get("objective") for entry in pretrain["others"])}
    pretrain = {name: value for name, value in pretrain.items() if name in used or name not in OBJECTIVES}
    return {**config, "pretrain": pretrain}


def with_earlier_entries(old: dict, new: dict) -> dict:
    """Returns the config `new` with the entries of GROWING that only an earlier config of the same study has.

    They are written to config.json, so that an entry cannot come back with other settings than those of its rows.

    >>> old, new = ({"finetune": {"reuse": [{"objective": name}]}} for name in ("joint", "cotuning"))
    >>> with_earlier_entries(old, new)["finetune"]["reuse"]
    [{'objective': 'cotuning'}, {'objective': 'joint'}]
    """
    result = dict(new)
    for name, earlier in old.items():
        if name in GROWING and isinstance(earlier, list | tuple):
            own = [_way(entry) for entry in new.get(name, ())]
            result[name] = [*new.get(name, ()), *(entry for entry in earlier if _way(entry) not in own)]
        elif isinstance(earlier, dict) and isinstance(new.get(name), dict):
            missing = {key: entry for key, entry in earlier.items() if key not in new[name]} if name in GROWING else {}
            result[name] = {**with_earlier_entries(earlier, new[name]), **missing}
    return result


def _way(entry: Mapping) -> str:
    """Returns what identifies an entry of `reuse`."""
    return " with ".join(filter(None, (entry["objective"], entry.get("selection"))))


def _by_name(config: Any) -> Any:
    """Completes the entries of `reuse` and `selections` with their defaults, and names those of `reuse`."""
    if not isinstance(config, dict):
        return config
    named = {name: _by_name(value) for name, value in config.items()}
    if isinstance(entries := named.get("reuse"), list | tuple):
        usual = dataclasses.asdict(Reuse("joint"))
        named["reuse"] = {_way(entry): {**usual, **entry} for entry in entries}
    if isinstance(entries := named.get("selections"), dict):
        usual = dataclasses.asdict(SelectionSettings())
        named["selections"] = {name: {**usual, **entry} for name, entry in entries.items()}
    return named


def _differences(old: Mapping, new: Mapping, where: str) -> list[str]:
    lines = []
    for name in sorted(old.keys() | new.keys()):
        if (where == "config" and name in CHANGEABLE) or name in CHANGEABLE_ANYWHERE:
            continue
        a, b = old.get(name), new.get(name)
        if where.rpartition(".")[2] in GROWING and (a is None or b is None):
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            lines += _differences(a, b, f"{where}.{name}")
        elif a != b:
            lines.append(f"{where}.{name} was {a!r}, is {b!r}")
    return lines
