"""Every field of a study's config, its default, and what the stages read from it.

`configs/*.py` start from `default_config()` and set what differs.
"""

import dataclasses
import inspect
import json
from collections.abc import Sequence

from ml_collections import ConfigDict, config_dict

from jax_transfer.choose import choose
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.logs import log
from jax_transfer.models import MODELS
from jax_transfer.records import InputError
from jax_transfer.training.optimizers import OptimizerSettings
from jax_transfer.transfer.finetune import FinetuneSettings
from jax_transfer.transfer.probe import ProbeSettings

STAGES = ("pretrain", "features", "probe", "finetune", "scores", "spectral", "report")

# What may change between two runs in one working directory: it adds or leaves out work, but no result
# that is already there would come out otherwise. So may `checkpoints` of finetune and of its overrides.
CHANGEABLE = ("stages", "targets", "metrics", "scores", "trajectory", "data", "paper")

# Fields whose keys are targets.
BY_TARGET = ("overrides", "metrics")


class StudyConfig(ConfigDict):
    """A ConfigDict whose keys may hold dots, as the names of targets do (`folder:/data/v1.2/x`)."""

    def __init__(self, *arguments, allow_dotted_keys: bool = True, **named):
        super().__init__(*arguments, allow_dotted_keys=allow_dotted_keys, **named)

    def get_type(self, key: str) -> type:
        """Returns the type of a field; `object`, a literal on the command line, for those in BY_TARGET.

        The parser that ml_collections has for a ConfigDict refuses keys with dots.
        """
        return object if key in BY_TARGET else super().get_type(key)


def follow_targets(config: ConfigDict, fields: Sequence[str]) -> None:
    """Drops what a config file says in `fields` of targets that the command line has replaced."""
    for name in fields:
        found = config.get(name)
        if not isinstance(found, ConfigDict):
            continue
        dropped = [target for target in found if target not in config.targets]
        with found.unlocked():
            for target in dropped:
                del found[target]
        if dropped:
            log.info("config.%s of %s is dropped: no longer in config.targets.", name, ", ".join(dropped))


def default_config() -> ConfigDict:
    """A complete config: a ResNet-18 on CIFAR-10 and its transfer to MNIST."""
    config = StudyConfig()
    # Shown at the head of the report.
    config.name = "study"
    # Seeds initialisation, data order, augmentation, subsets and splits.
    config.seed = 0
    # What runs, in this order: any of STAGES.
    config.stages = STAGES

    config.model = ConfigDict()
    # A key of jax_transfer.models.MODELS.
    config.model.name = "resnet18"
    # What follows is unset for the published model, and for models that do not have it.
    # ResNets only. imagenet: 7x7 stride 2 and max-pool; cifar: 3x3 stride 1.
    config.model.stem = config_dict.placeholder(str)
    # ResNets: channels after the stem, 64 if unset. MobileNets and Inceptions: multiplier of all channels.
    config.model.width = config_dict.placeholder(float)
    # Transformers only: probability with which the last block is left out of an image in training.
    config.model.stochastic_depth = config_dict.placeholder(float)
    # Further models, each pre-trained for itself: ({"name": "mobilenet_v1", "width": 0.5}, ...). The checkpoints of all
    # are ranked together.
    config.model.others = ()

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
    # Keys of jax_transfer.data.augment.AUGMENTATIONS and jax_transfer.data.mixing.MIXINGS, applied in this order on the
    # device.
    config.pretrain.augment = ("pad_crop", "flip")
    # Probability taken from the true class and spread over all.
    config.pretrain.label_smoothing = 0.0
    # Decay, per step, of a moving average of the weights, which is then evaluated and transferred. 0: none.
    config.pretrain.ema_decay = 0.0
    config.pretrain.feeds = StudyConfig()
    config.pretrain.optimizer = _optimizer(weight_decay=5e-4, schedule="cosine")

    config.trajectory = ConfigDict()
    # The epochs that are evaluated: "all", "every:K", "log", or a list such as "0,1,5,20".
    config.trajectory.epochs = "log"

    # The data sets to transfer to.
    config.targets = ("tfds:mnist",)
    # What counts on single targets, a key of jax_transfer.records.METRICS: {"folder:/my/birds": "mean_class_accuracy"}. A
    # target without one has the metric that the field uses for it (jax_transfer.data.catalog), else accuracy. It decides
    # which checkpoint is best and what tables and figures show; it changes no result. Learning rates and l2 of probes are
    # chosen by accuracy on a validation split, and scores that are accuracies stay accuracies.
    config.metrics = StudyConfig()

    config.probe = ConfigDict()
    # Keys of jax_transfer.transfer.probe.PROTOCOLS: "probe" is the papers' FE, "probe_converged" L-BFGS.
    config.probe.methods = ("probe",)
    config.probe.epochs = 100
    # In place of epochs, if set: the papers give iterations for some data sets.
    config.probe.steps = config_dict.placeholder(int)
    config.probe.batch_size = 128
    # Adam's. Several: the best on a validation split is used.
    config.probe.learning_rates = (0.01,)
    # Strength of probe_converged's penalty: l2/2 |w|^2 is added to the mean cross-entropy. Several: chosen likewise.
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
    config.overrides = StudyConfig()

    # Keys of jax_transfer.analysis.SCORES, and of jax_transfer.transfer.finetune.FINETUNE_SCORES: finetune_5 is the
    # schedule of config.finetune stopped after 5 epochs, so it must have as many.
    config.scores = ("logme", "leep", "nce")

    # The paper's accuracies, which the report shows beside ours: ({"target": ("" for the source), "epoch": (ours), "what":
    # "source", "FE", "FT", "FE main", "FE residual", "FT main" or "FT residual", "accuracy": 0.9, "where": "Table 1"}, ...).
    config.paper = ()

    config.spectral = ConfigDict()
    # The stage "spectral" keeps the features of fine-tuned models too: images x dimensions x 4 bytes a checkpoint on disk.
    # Rows of a feature matrix that are decomposed together, as in the paper; unset: the whole data set.
    config.spectral.batch_size = config_dict.placeholder(int)
    config.spectral.batch_size = 128
    # Epochs for the probes on the components.
    config.spectral.epochs = 50
    # Test images that t-SNE shows; 0 for none.
    config.spectral.embedded_images = 2000

    config.data = ConfigDict()
    # A decoded data set of at most this size is held in device memory; a larger one is streamed.
    config.data.resident_gigabytes = 4.0
    # Stacked features of all checkpoints of a target: more than this is processed in groups.
    config.data.features_gigabytes = 2.0
    # Threads that read and decode when streaming.
    config.data.num_threads = 16
    config.data.eval_batch_size = 512
    # error: stop at a corrupt image; skip: name, count and leave out what is corrupt.
    config.data.on_corrupt = "error"
    return config


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


def _optimizer(**settings) -> ConfigDict:
    return ConfigDict(dataclasses.asdict(OptimizerSettings(**settings)))


def check_names(found: dict, known: dict, where: str) -> None:
    """Every field of `found` exists in `known`, and holds fields where `known` does."""
    for name, value in found.items():
        choose(known, name, f"field of {where}")
        if isinstance(known[name], dict) and not (where == "config" and name in BY_TARGET):
            if not isinstance(value, dict):
                raise InputError(f"{where}.{name} must hold fields, not {value!r}.")
            check_names(value, known[name], f"{where}.{name}")


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
    return _settings(ProbeSettings, config, "probe", target)


def finetune_settings(config: ConfigDict, target: str) -> FinetuneSettings:
    settings = _settings(FinetuneSettings, config, "finetune", target)
    return dataclasses.replace(settings, optimizer=OptimizerSettings(**_frozen(settings.optimizer)))


def pretrain_optimizer(config: ConfigDict) -> OptimizerSettings:
    return OptimizerSettings(**_frozen(config.pretrain.optimizer.to_dict()))


def objective_settings(config: ConfigDict) -> dict:
    return {"label_smoothing": config.pretrain.label_smoothing} if config.pretrain.objective == "supervised" else {}


def _settings(kind, config, section: str, target: str):
    fields = config[section].to_dict()
    override = config.overrides.get(target, ConfigDict()).get(section, ConfigDict()).to_dict()
    check_names(override, fields, f"config.overrides[{target!r}].{section}")
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
