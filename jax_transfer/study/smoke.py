"""The tiny study from which the smoke variants of the configs start, so that all of them share one pre-training."""

from jax_transfer.fields import StudyConfig
from jax_transfer.study.config import default_config


def tiny(config: StudyConfig) -> StudyConfig:
    """Shrinks a study to two epochs of a narrow ResNet-10 on CIFAR-10, transferred to MNIST.

    The stages, scores and probing methods of the study are kept, as are the optimizer, schedule and augmentation of its
    fine-tuning. Any two studies that are shrunk in this way pre-train the same models on the same images, so one can
    reuse the pre-training in the working directory of the other, unless it sets `config.pretrain.steps` again.

    Returns:
      The same config, changed in place.
    """
    default = default_config()
    for section in ("model", "source", "preprocessing", "pretrain", "trajectory"):
        config[section] = default[section]
    config.model.name, config.model.stem, config.model.width = "resnet10", "cifar", 8
    config.source.dataset = "tfds:cifar10?train=1024&test=256"
    config.preprocessing.image_size = 32
    config.pretrain.epochs = 2
    config.pretrain.batch_size = 64
    config.pretrain.optimizer.learning_rate = 0.05
    config.trajectory.epochs = "all"
    config.targets = ("tfds:mnist?per_class=20&test=256",)
    config.metrics = dict.fromkeys(config.targets, "accuracy")
    config.overrides = {}
    config.paper = config.paper_tables = ()
    config.probe.steps, config.probe.epochs = None, 10
    config.finetune.steps = 12
    config.finetune.batch_size = 32
    config.finetune.optimizer.learning_rate = 0.02
    config.spectral.epochs = 5
    config.spectral.embedded_images = 100
    return config
