"""Every field of a study's config, its default, and the checks made before anything is compiled.

`configs/*.py` start from `default_config()` and set what differs.
"""

import dataclasses
import json

from ml_collections import ConfigDict, config_dict

from jax_transfer.analysis import SCORES
from jax_transfer.analysis.embedding import MOST_POINTS
from jax_transfer.choose import choose
from jax_transfer.data.augment import AUGMENTATIONS
from jax_transfer.data.transforms import INTERPOLATIONS, Preprocessing
from jax_transfer.models import MODELS
from jax_transfer.models.trajectory import evaluated_epochs
from jax_transfer.records import InputError
from jax_transfer.training.objectives import OBJECTIVES
from jax_transfer.training.optimizers import OPTIMIZERS, SCHEDULES, OptimizerSettings
from jax_transfer.transfer.finetune import FINETUNE_SCORES, FinetuneSettings
from jax_transfer.transfer.probe import PROTOCOLS, ProbeSettings

STAGES = ("pretrain", "features", "probe", "finetune", "scores", "spectral", "report")

# What may change between two runs in one working directory: it adds or leaves out work, but no result
# that is already there would come out otherwise. So may `checkpoints` of finetune and of its overrides.
CHANGEABLE = ("stages", "targets", "scores", "trajectory", "data", "paper")


def default_config() -> ConfigDict:
    """A complete config: a ResNet-18 on CIFAR-10 and its transfer to MNIST."""
    config = ConfigDict()
    # Shown at the head of the report.
    config.name = "study"
    # Of initialisation, data order, augmentation, subsets and splits.
    config.seed = 0
    # What runs, in this order: any of STAGES.
    config.stages = STAGES

    config.model = ConfigDict()
    # A key of jax_transfer.models.MODELS.
    config.model.name = "resnet18"
    # imagenet: 7x7 stride 2 and max-pool; cifar: 3x3 stride 1.
    config.model.stem = "cifar"
    # Channels after the stem; 64 is the published size.
    config.model.width = 64

    config.source = ConfigDict()
    # What the model is pre-trained on: "kind:name?option=value", see jax_transfer.data.sources.
    config.source.dataset = "tfds:cifar10"
    # Further ones, each with a trajectory of its own; the checkpoints of all are ranked together.
    config.source.others = ()

    config.preprocessing = ConfigDict()
    # Side of the square that the model sees, in pixels.
    config.preprocessing.image_size = 32
    # image_size / side to which images are resized first; 0.875 is ImageNet's 224 of 256.
    config.preprocessing.crop_fraction = 1.0
    # Per channel, of images in [0, 1].
    config.preprocessing.mean = (0.485, 0.456, 0.406)
    config.preprocessing.std = (0.229, 0.224, 0.225)
    # A key of jax_transfer.data.transforms.INTERPOLATIONS.
    config.preprocessing.interpolation = "bilinear"

    config.pretrain = ConfigDict()
    # A key of jax_transfer.training.objectives.OBJECTIVES.
    config.pretrain.objective = "supervised"
    config.pretrain.epochs = 200
    # Global: over all devices.
    config.pretrain.batch_size = 128
    # Keys of jax_transfer.data.augment.AUGMENTATIONS, applied in this order on the device.
    config.pretrain.augment = ("pad_crop", "flip")
    # Probability taken from the true class and spread over all.
    config.pretrain.label_smoothing = 0.0
    config.pretrain.optimizer = _optimizer(weight_decay=5e-4, schedule="cosine")

    config.trajectory = ConfigDict()
    # The epochs that are evaluated: "all", "every:K", "log", or a list such as "0,1,5,20".
    config.trajectory.epochs = "log"

    # The data sets to transfer to.
    config.targets = ("tfds:mnist",)

    config.probe = ConfigDict()
    # Keys of jax_transfer.transfer.probe.PROTOCOLS: "probe" is the papers' FE, "probe_converged" L-BFGS.
    config.probe.methods = ("probe",)
    config.probe.epochs = 100
    # In place of epochs, if set: the papers give iterations for some data sets.
    config.probe.steps = config_dict.placeholder(int)
    config.probe.batch_size = 128
    # Adam's. Several: the best on a validation split is used.
    config.probe.learning_rates = (0.01,)
    # Of probe_converged: l2/2 |w|^2 is added to the mean cross-entropy. Several: chosen likewise.
    config.probe.l2 = (1e-4,)
    config.probe.validation_fraction = 0.2
    config.probe.num_seeds = 1

    config.finetune = ConfigDict()
    config.finetune.epochs = 100
    config.finetune.steps = config_dict.placeholder(int)
    config.finetune.batch_size = 128
    config.finetune.augment = ()
    config.finetune.num_seeds = 1
    # Those of the evaluated epochs that are fine-tuned, as in config.trajectory.epochs; unset: all.
    config.finetune.checkpoints = config_dict.placeholder(str)
    config.finetune.optimizer = _optimizer(learning_rate=0.01)

    # Fields of probe and finetune for single targets: {"tfds:cifar10": {"probe": {"epochs": 150}}}.
    config.overrides = ConfigDict()

    # Keys of jax_transfer.analysis.SCORES, and of jax_transfer.transfer.finetune.FINETUNE_SCORES.
    config.scores = ("logme", "leep", "nce")

    # The paper's accuracies, which the report shows beside ours: ({"target": ("" for the source), "epoch": (ours), "what":
    # "source", "FE", "FT", "FE main", "FE residual", "FT main" or "FT residual", "accuracy": 0.9, "where": "Table 1"}, ...).
    config.paper = ()

    config.spectral = ConfigDict()
    # The stage "spectral" keeps the features of fine-tuned models too: images x dimensions x 4 bytes a checkpoint on disk.
    # Rows of a feature matrix that are decomposed together, as in the paper; unset: the whole data set.
    config.spectral.batch_size = config_dict.placeholder(int)
    config.spectral.batch_size = 128
    # Of the probes on the components.
    config.spectral.epochs = 50
    # Test images that t-SNE shows; 0 for none.
    config.spectral.embedded_images = 2000

    config.data = ConfigDict()
    # A decoded data set of at most this size is held in device memory; a larger one is streamed.
    config.data.resident_gigabytes = 4.0
    # Stacked features of all checkpoints of a target: more than this is worked off in groups.
    config.data.features_gigabytes = 2.0
    # Threads that read and decode when streaming.
    config.data.num_threads = 16
    config.data.eval_batch_size = 512
    # error: stop at a corrupt image; skip: name and count them and go on.
    config.data.on_corrupt = "error"
    return config


def sources(config: ConfigDict) -> list[str]:
    """The data sets to pre-train on, each for itself."""
    return [config.source.dataset, *config.source.others]


def _optimizer(**settings) -> ConfigDict:
    return ConfigDict(dataclasses.asdict(OptimizerSettings(**settings)))


def check(config: ConfigDict) -> None:
    """Checks every name, size and number that needs no data.

    Raises:
      InputError: naming the field, what was expected and what to do.
    """
    _check_names(config.to_dict(), default_config().to_dict(), "config")
    _check_complete(config.to_dict(), default_config().to_dict(), "config")
    for stage in config.stages:
        choose(dict.fromkeys(STAGES), stage, "stage (config.stages)")
    choose(MODELS, config.model.name, "model (config.model.name)")
    choose(OBJECTIVES, config.pretrain.objective, "objective (config.pretrain.objective)")
    choose(INTERPOLATIONS, config.preprocessing.interpolation, "interpolation (config.preprocessing.interpolation)")
    for score in config.scores:
        choose({**SCORES, **FINETUNE_SCORES}, score, "score (config.scores)")
    if len(set(sources(config))) < len(sources(config)):
        raise InputError(f"config.source names a data set twice: {', '.join(sources(config))}.")
    if not config.targets:
        raise InputError("config.targets is empty: name at least one data set to transfer to.")
    for target in config.overrides:
        if target not in config.targets:
            raise InputError(f"config.overrides names {target!r}, which is none of config.targets: {config.targets}.")
    for name, section in [
        ("pretrain", config.pretrain),
        *[("finetune", finetune_settings(config, t)) for t in config.targets],
    ]:
        where = f"config.{name}"
        for augmentation in section.augment:
            choose(AUGMENTATIONS, augmentation, f"augmentation ({where}.augment)")
        choose(OPTIMIZERS, section.optimizer.name, f"optimizer ({where}.optimizer.name)")
        choose(SCHEDULES, section.optimizer.schedule, f"schedule ({where}.optimizer.schedule)")
        _positive(section.optimizer.learning_rate, f"{where}.optimizer.learning_rate")
        _positive(section.batch_size, f"{where}.batch_size")
        _positive(section.epochs, f"{where}.epochs")
        if name == "finetune" and section.checkpoints:
            evaluated_epochs(section.checkpoints, config.pretrain.epochs, f"{where}.checkpoints")
    for target in config.targets:
        settings = probe_settings(config, target)
        for method in settings.methods:
            choose(PROTOCOLS, method, "probe (config.probe.methods)")
        for field in ("epochs", "batch_size", "num_seeds"):
            _positive(getattr(settings, field), f"config.probe.{field}")
        if not settings.learning_rates or not settings.l2:
            raise InputError("config.probe.learning_rates and config.probe.l2 need at least one value each.")
        if not 0 < settings.validation_fraction < 1:
            raise InputError(f"config.probe.validation_fraction = {settings.validation_fraction}: must lie in (0, 1).")
    _positive(config.spectral.epochs, "config.spectral.epochs")
    if config.spectral.batch_size is not None:
        _positive(config.spectral.batch_size, "config.spectral.batch_size")
    if not 0 <= config.spectral.embedded_images <= MOST_POINTS or 0 < config.spectral.embedded_images < 4:
        raise InputError(
            f"config.spectral.embedded_images = {config.spectral.embedded_images}: t-SNE takes 4 to {MOST_POINTS:,} images, "
            "and 0 leaves it out."
        )
    _positive(config.data.eval_batch_size, "config.data.eval_batch_size")
    _positive(config.data.num_threads, "config.data.num_threads")
    evaluated_epochs(config.trajectory.epochs, config.pretrain.epochs)
    if not 0 < config.preprocessing.crop_fraction <= 1:
        raise InputError(
            f"config.preprocessing.crop_fraction = {config.preprocessing.crop_fraction}: must lie in (0, 1]."
        )
    smallest = make_net(config, num_classes=2).min_image_size
    if config.preprocessing.image_size < smallest:
        raise InputError(
            f"config.preprocessing.image_size = {config.preprocessing.image_size} does not suit {config.model.name} with "
            f"the {config.model.stem} stem, which needs at least {smallest} pixels: use a larger size or another stem."
        )


def check_field(path: str, known: dict) -> None:
    """Checks a field named on the command line, such as "config.pretrain.epochs".

    Raises:
      InputError: if there is no such field; lists those that exist beside it.
    """
    where, *names = path.split(".")
    for name in names:
        if not isinstance(known, dict):
            raise InputError(f"{where} is a value and has no field {name!r}.")
        if where == "config.overrides":
            return
        known, where = choose(known, name, f"field of {where}"), f"{where}.{name}"


def _check_names(found: dict, known: dict, where: str) -> None:
    """Every field of `found` exists in `known`, and holds fields where `known` does."""
    for name, value in found.items():
        choose(known, name, f"field of {where}")
        if isinstance(known[name], dict) and (where, name) != ("config", "overrides"):
            if not isinstance(value, dict):
                raise InputError(f"{where}.{name} must hold fields, not {value!r}.")
            _check_names(value, known[name], f"{where}.{name}")


def _check_complete(found: dict, known: dict, where: str) -> None:
    if missing := [name for name in known if name not in found]:
        raise InputError(f"{where} lacks {', '.join(missing)}: start from jax_transfer.config.default_config().")
    for name, value in known.items():
        if isinstance(value, dict):
            _check_complete(found[name], value, f"{where}.{name}")


def _positive(value, field: str) -> None:
    if not value > 0:
        raise InputError(f"{field} = {value}: must be positive.")


def make_net(config: ConfigDict, num_classes: int, dtype=None):
    """The config's model for so many classes."""
    make = choose(MODELS, config.model.name, "model (config.model.name)")
    settings = {"stem": config.model.stem, "width": config.model.width}
    return make(num_classes=num_classes, **settings, **({} if dtype is None else {"dtype": dtype}))


def preprocessing(config: ConfigDict) -> Preprocessing:
    return Preprocessing.from_json(config.preprocessing.to_dict())


def probe_settings(config: ConfigDict, target: str) -> ProbeSettings:
    return _settings(ProbeSettings, config, "probe", target)


def finetune_settings(config: ConfigDict, target: str) -> FinetuneSettings:
    settings = _settings(FinetuneSettings, config, "finetune", target)
    return dataclasses.replace(settings, optimizer=OptimizerSettings(**_frozen(settings.optimizer)))


def pretrain_optimizer(config: ConfigDict) -> OptimizerSettings:
    return OptimizerSettings(**_frozen(config.pretrain.optimizer.to_dict()))


def _settings(kind, config, section: str, target: str):
    fields = config[section].to_dict()
    override = config.overrides.get(target, ConfigDict()).get(section, ConfigDict()).to_dict()
    _check_names(override, fields, f"config.overrides[{target!r}].{section}")
    if "optimizer" in override:
        override["optimizer"] = {**fields["optimizer"], **override["optimizer"]}
    return kind(**_frozen({**fields, **override}))


def _frozen(fields: dict) -> dict:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def to_json(config: ConfigDict) -> dict:
    """The config as `config.json` holds it: plain, tuples as lists."""
    return json.loads(json.dumps(config.to_dict()))


def differences(old: dict, new: dict, where: str = "config") -> list[str]:
    """Readable lines for the fields in which two configs differ, those in CHANGEABLE left out."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        if (where == "config" and name in CHANGEABLE) or name == "checkpoints":
            continue
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{where}.{name}")
        elif a != b:
            lines.append(f"{where}.{name} was {a!r}, is {b!r}")
    return lines
