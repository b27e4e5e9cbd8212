"""ResNet-50 on ImageNet, 90 epochs, transferred to the nine targets of the paper.

    python -m jax_transfer.main --config=configs/resnet50_imagenet.py --workdir=runs/resnet50_imagenet

Reproduces Figures 2 and 6 of "Towards Inadequately Pre-trained Models in Transfer Learning" (Deng et al., ICCV 2023):
76.06 % top-1 on ImageNet after 90 epochs. On most targets, FE is best before the last epoch (epochs 40 to 70), while FT
improves until the end. Pre-training follows the paper: SGD with momentum 0.9, learning rate 0.1 divided by 10 every 30
epochs, weight decay 1e-4, batch size 256. Crops cover 8 % to 100 % of the area of the full image, the usual recipe.
Retraining takes 6,000 iterations (FE) and 9,000 (FT) with learning rates 0.01 and 0.1; on CIFAR-10 and CIFAR-100 it
takes 150 epochs (settings of the arXiv version). Our results: not measured; this config has not been run on ImageNet.

Prepare the data sets once with `python -m jax_transfer.data.prepare imagenet2012`, and so on. Aircraft, MIT Indoor-67
and MURA have no TFDS builder: store them as folders below FOLDERS, with the layouts in `jax_transfer.data.catalog`.

Variants: `full`; `smoke`, a ResNet-10 from CIFAR-10 to MNIST, within a minute on two CPU cores.
"""

from jax_transfer.choose import choose
from jax_transfer.study.config import default_config
from jax_transfer.study.smoke import tiny

FOLDERS = "folder:data/"
TARGETS = (
    "tfds:cifar10",
    "tfds:cifar100",
    "tfds:food101",
    FOLDERS + "fgvc_aircraft",
    "tfds:cars196",
    "tfds:caltech_birds2011",
    "tfds:oxford_flowers102",
    FOLDERS + "indoor67",
    FOLDERS + "mura",
)


def full():
    config = default_config()
    config.name = "ResNet-50 on ImageNet"
    config.model.name = "resnet50"
    config.model.batch_norm_group = 32  # as on eight GPUs with 32 images each, whatever the number of devices
    config.source.dataset = "tfds:imagenet2012"
    config.preprocessing.image_size = 224
    config.preprocessing.crop_fraction = 0.875
    config.pretrain.epochs = 90
    config.pretrain.batch_size = 256
    config.pretrain.augment = ("resized_crop", "flip")
    config.pretrain.optimizer.schedule = "step"
    config.pretrain.optimizer.milestones = (1 / 3, 2 / 3)
    config.pretrain.optimizer.weight_decay = 1e-4
    config.trajectory.epochs = "every:10"
    config.targets = TARGETS
    config.metrics = dict.fromkeys(config.targets, "accuracy")  # as in the paper, on every target
    config.probe.steps = 6000
    config.finetune.steps = 9000
    config.finetune.augment = ("random_crop", "flip")
    config.finetune.optimizer.learning_rate = 0.1
    config.finetune.optimizer.schedule = "step"
    config.finetune.optimizer.milestones = (1 / 3, 2 / 3)
    by_epochs = {"probe": {"steps": None, "epochs": 150}, "finetune": {"steps": None, "epochs": 150}}
    config.overrides = {"tfds:cifar10": by_epochs, "tfds:cifar100": by_epochs}
    config.paper = ({"target": "", "epoch": 90, "what": "source", "accuracy": 0.7606, "where": "section 3, epoch 90"},)
    return config


def smoke():
    config = tiny(full())
    return config


def get_config(variant: str = "full"):
    return choose({"full": full, "smoke": smoke}, variant, "variant of configs/resnet50_imagenet.py")()
