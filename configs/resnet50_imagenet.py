"""ResNet-50 on ImageNet, 90 epochs, transferred to the targets of both versions of the paper.

    python -m jax_transfer.main --config=configs/resnet50_imagenet.py --workdir=runs/resnet50_imagenet

Reproduces Figures 2 and 6 of "Towards Inadequately Pre-trained Models in Transfer Learning" (Deng et al., ICCV 2023):
76.06 % top-1 on ImageNet after 90 epochs. On most targets, FE is best before the last epoch (epochs 40 to 70), while FT
improves until the end. The nine targets of the ICCV version include MURA; the arXiv version (2022) has Shenzhen CXR in
its place. Our results: not measured; this config has not been run on ImageNet.

The settings of the paper are those of the arXiv version, since the ICCV version gives none for transfer:

- Pre-training: the official PyTorch example; SGD with momentum 0.9, learning rate 0.1 divided by 10 every 30 epochs,
  weight decay 1e-4.
- CIFAR-10 and CIFAR-100, FE and FT: Adam for 150 epochs, learning rate 0.1 divided by 10 every 50 epochs.
- The other natural targets: 6,000 iterations with learning rate 0.01 (FE), 9,000 with 0.1 (FT).
- Shenzhen CXR: 30 % of the images for training; 1,000 iterations with learning rate 0.001 (FE) and 0.01 (FT).

Ours, because the paper does not give them: the settings of MURA, which are those of the natural targets; all batch
sizes of transfer (128); the optimizers on targets other than CIFAR (FE: Adam at a constant learning rate; FT: SGD with
momentum 0.9, no weight decay, and a learning rate divided by 10 after each third); the augmentation of FT (random crops
and flips). Batch size 256 and crops of 8 % to 100 % of the area of the full image are what the PyTorch example does.

Prepare the data sets once with `python -m jax_transfer.data.prepare imagenet2012`, and so on. Aircraft, MIT Indoor-67,
MURA and Shenzhen CXR have no TFDS builder: store them as folders below FOLDERS, with the layouts in
`jax_transfer.data.catalog`.

Variants: `full`; `smoke`, a ResNet-10 from CIFAR-10 to MNIST, within a minute on two CPU cores.
"""

from jax_transfer.choose import choose
from jax_transfer.study.config import default_config
from jax_transfer.study.smoke import tiny

FOLDERS = "folder:data/"
SHENZHEN = FOLDERS + "shenzhen_cxr?train_fraction=0.3"
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
    SHENZHEN,
)
THIRDS = (1 / 3, 2 / 3)
CIFAR = {
    "probe": {"steps": None, "epochs": 150, "learning_rates": (0.1,), "schedule": "step", "milestones": THIRDS},
    "finetune": {"steps": None, "epochs": 150, "optimizer": {"name": "adam", "learning_rate": 0.1}},
}


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
    config.pretrain.optimizer.milestones = THIRDS
    config.pretrain.optimizer.weight_decay = 1e-4
    config.trajectory.epochs = "every:10"
    config.targets = TARGETS
    config.metrics = dict.fromkeys(config.targets, "accuracy")  # as in the paper, on every target
    config.probe.steps = 6000
    config.finetune.steps = 9000
    config.finetune.augment = ("random_crop", "flip")
    config.finetune.optimizer.learning_rate = 0.1
    config.finetune.optimizer.schedule = "step"
    config.finetune.optimizer.milestones = THIRDS
    config.overrides = {
        "tfds:cifar10": CIFAR,
        "tfds:cifar100": CIFAR,
        SHENZHEN: {
            "probe": {"steps": 1000, "learning_rates": (0.001,)},
            "finetune": {"steps": 1000, "optimizer": {"learning_rate": 0.01}},
        },
    }
    config.paper = ({"target": "", "epoch": 90, "what": "source", "accuracy": 0.7606, "where": "section 3, epoch 90"},)
    return config


def smoke():
    config = tiny(full())
    return config


def get_config(variant: str = "full"):
    return choose({"full": full, "smoke": smoke}, variant, "variant of configs/resnet50_imagenet.py")()
