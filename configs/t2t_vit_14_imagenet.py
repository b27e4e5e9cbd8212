"""T2T-ViT_t-14 on ImageNet, 300 epochs, transferred to the nine targets of the paper.

    python -m jax_transfer.main --config=configs/t2t_vit_14_imagenet.py --workdir=runs/t2t_vit_14_imagenet

Reproduces Figure 3 of "Towards Inadequately Pre-trained Models in Transfer Learning" (Deng et al., ICCV 2023): 81.55 %
top-1 on ImageNet after 300 epochs. On most targets, FE is best before the last epoch, while FT improves until the end.
The paper only says that it trains like "the official T2T-ViT implementation" (section 3). The settings come from these
sources:

- Command for T2T-ViT_t-14 in the released README (github.com/yitu-opensource/T2T-ViT): 8 GPUs with 64 images each,
  learning rate 5e-4, weight decay 0.05 (0.065 is for T2T-ViT-19 and -24), 224 pixels.
- Defaults of the released main.py: AdamW, 300 epochs, cosine to 1e-5, 10 epochs of warm-up from 1e-6, no gradient
  clipping, moving average with decay 0.99996, RandAugment "rand-m9-mstd0.5-inc1", mixup 0.8 or cutmix 1.0 with
  probability 0.5 each, random erasing with noise and probability 0.25, label smoothing 0.1, stochastic depth 0.1, crops
  of 8 % to 100 % of the area, flips.
- The released models/t2t_vit.py: bicubic interpolation, 224 of 249 pixels (0.9), mean and std of ImageNet, no weight
  decay on the class token. timm 0.3 defines what these names mean, and the order of the augmentations.
- `resnet50_imagenet.py`, because the paper gives none for this model: all of FE, and the iterations and epochs of FT.
- The released command for transfer: FT's learning rate 0.05.

Ours: the optimizer of FT (SGD with momentum 0.9 and no weight decay), its cosine schedule, batch size (128) and
augmentation (random crops and flips), and what `resnet50_imagenet.py` calls ours.

Differences: timm trains ten more epochs at 1e-5, changes the learning rate once per epoch, and starts the cosine during
warm-up. It chooses bilinear or bicubic interpolation for each crop and warp; here every crop is bicubic and every warp
bilinear. Crops are cut from the full image, as in the release. Batch statistics and mixup pairs are global instead of
per GPU.

As in the release, the moving average is evaluated and transferred. It averages over about 20 epochs, so the checkpoints
of the first epochs are still close to the initialisation. `--config.pretrain.ema_decay=0` transfers the weights
themselves. Every epoch is stored with the full training state: 340 MB each, 100 GB in total. Our results: not measured
at this size.

Prepare the data sets as for `resnet50_imagenet.py`.

Variants: `full`; `smoke`, CIFAR-10 to MNIST at 32 pixels with all augmentations and the moving average, within
a minute on two CPU cores.
"""

from jax_transfer.choose import choose
from jax_transfer.study.config import default_config

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
CIFAR = {
    "probe": {
        "steps": None,
        "epochs": 150,
        "learning_rates": (0.1,),
        "schedule": "step",
        "milestones": (1 / 3, 2 / 3),
    },
    "finetune": {"steps": None, "epochs": 150},
}


def full():
    config = default_config()
    config.name = "T2T-ViT_t-14 on ImageNet"
    config.model.name = "t2t_vit_t_14"
    config.model.stochastic_depth = 0.1
    config.source.dataset = "tfds:imagenet2012"
    config.preprocessing.image_size = 224
    config.preprocessing.crop_fraction = 0.9
    config.preprocessing.interpolation = "bicubic"
    config.pretrain.epochs = 300
    config.pretrain.batch_size = 512
    config.pretrain.augment = ("resized_crop", "flip", "rand_augment", "mixup_or_cutmix", "random_erase")
    config.pretrain.supervised.label_smoothing = 0.1
    config.pretrain.ema_decay = 0.99996
    config.pretrain.optimizer.name = "adamw"
    config.pretrain.optimizer.learning_rate = 5e-4
    config.pretrain.optimizer.min_learning_rate = 1e-5
    config.pretrain.optimizer.warmup = 10 / 300
    config.pretrain.optimizer.warmup_learning_rate = 1e-6
    config.pretrain.optimizer.weight_decay = 0.05
    config.pretrain.optimizer.decay_norm_and_bias = False
    config.trajectory.epochs = "every:30"
    config.targets = TARGETS
    config.metrics = dict.fromkeys(config.targets, "accuracy")  # as in the paper, on every target
    config.probe.steps = 6000
    config.finetune.steps = 9000
    config.finetune.augment = ("random_crop", "flip")
    config.finetune.optimizer.learning_rate = 0.05
    config.finetune.optimizer.schedule = "cosine"
    config.overrides = {"tfds:cifar10": CIFAR, "tfds:cifar100": CIFAR}
    config.paper = (
        {"target": "", "epoch": 300, "what": "source", "accuracy": 0.8155, "where": "section 3, epoch 300"},
    )
    return config


def smoke():
    config = full()
    config.source.dataset = "tfds:cifar10?train=256&test=128"
    config.preprocessing.image_size = 32
    config.pretrain.epochs = 1
    config.pretrain.batch_size = 64
    config.pretrain.ema_decay = 0.9
    config.pretrain.optimizer.warmup = 0.5
    config.trajectory.epochs = "all"
    config.targets = ("tfds:mnist?per_class=20&test=128",)
    config.metrics = dict.fromkeys(config.targets, "accuracy")
    config.overrides = {}
    config.paper = ()
    config.stages = ("pretrain", "features", "probe", "report")
    config.probe.steps = 50
    config.data.eval_batch_size = 128
    return config


def get_config(variant: str = "full"):
    return choose({"full": full, "smoke": smoke}, variant, "variant of configs/t2t_vit_14_imagenet.py")()
