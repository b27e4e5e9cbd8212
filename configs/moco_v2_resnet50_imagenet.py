"""MoCo-v2 with ResNet-50 on ImageNet: does the frozen feature extractor of a self-supervised trajectory keep improving?

    python -m jax_transfer.main --config=configs/moco_v2_resnet50_imagenet.py --workdir=runs/moco_v2_resnet50_imagenet

Reproduces Figure 7 of "Towards Inadequately Pre-trained Models in Transfer Learning" (Deng et al., ICCV 2023): with
supervised pre-training FE is best before the last epoch, but with MoCo-v2 it keeps improving. The paper prints no
numbers for this figure. Our results: not measured at this size; `reduced` is recorded in
docs/results/moco_v2_tiny_imagenet. There, FE of MoCo-v2 on MNIST is best at the last epoch (91.7) and that of
supervised pre-training before it (90.6 at epoch 16, 89.7 at 20), within chance; on Caltech101 both are best at 16.

Pre-training is that of MoCo-v2's public release (Chen et al., 2020, arXiv:2003.04297): SGD with momentum 0.9, learning
rate 0.03 with a cosine schedule, weight decay 1e-4, batches of 256, 200 epochs, a queue of 65,536 keys, a momentum of
0.999, temperature 0.2 and the projection 2048-2048-128; crops of 20 to 100 % of the area, colour jitter (0.4, 0.4, 0.4,
0.1) with probability 0.8, grayscale with 0.2, blur with 0.5, and flips. BatchNorm normalises groups of 32 images, as on
the release's eight GPUs.

Transfer, FE and FT, is that of `resnet50_imagenet.py`, on the same targets. Every 20th epoch is evaluated.

Variants: `full`; `reduced`, which compares supervised, MoCo-v2, SimCLR and CLIP pre-training (with captions made from
the names of the classes) on the 20,000 images of Tiny-ImageNet that are at hand, for equal numbers of steps,
transferred to Caltech101 and MNIST, in about an hour and a quarter on two idle CPU cores; `smoke`, from CIFAR-10 to
MNIST within a minute on two CPU cores.
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
AUGMENT = ("resized_crop_20", "jitter", "gray", "blur", "flip")


def full():
    config = default_config()
    config.name = "MoCo-v2 with ResNet-50 on ImageNet"
    config.model.name = "resnet50"
    config.model.batch_norm_group = 32
    config.source.dataset = "tfds:imagenet2012"
    config.preprocessing.image_size = 224
    config.preprocessing.crop_fraction = 0.875
    config.pretrain.objective = "moco_v2"
    config.pretrain.epochs = 200
    config.pretrain.batch_size = 256
    config.pretrain.augment = AUGMENT
    config.pretrain.optimizer.learning_rate = 0.03
    config.pretrain.optimizer.weight_decay = 1e-4
    config.trajectory.epochs = "every:20"
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
    return config


# The objectives that `reduced` compares with supervised pre-training, at the size of its net and data. The queue is a
# fifth of an epoch, as in the release it is a twentieth; with a momentum of 0.99 the keys are 100 steps old, of 156 in
# an epoch, and not 1,000.
ADAMW = {"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1, "decay_norm_and_bias": False, "warmup": 0.1}
REDUCED = (
    {
        "objective": "moco_v2",
        "model": {"batch_norm_group": 32},
        "augment": AUGMENT,
        "optimizer": {"learning_rate": 0.06, "weight_decay": 1e-4},
        "moco_v2": {"queue_size": 4096, "momentum": 0.99, "hidden_dim": 128},
    },
    {
        "objective": "simclr",
        "augment": ("resized_crop", "jitter", "gray", "blur", "flip"),
        "optimizer": ADAMW,
        "simclr": {"hidden_dim": 512, "projection_dim": 128},
    },
    {
        "objective": "clip",
        "augment": ("resized_crop_90",),
        "optimizer": ADAMW,
        "clip": {
            "vocabulary_size": 1024,
            "context_length": 24,
            "embedding_dim": 128,
            "text_width": 64,
            "text_layers": 2,
            "text_heads": 2,
        },
    },
)


def reduced():
    config = full()
    config.name = "Supervised, MoCo-v2, SimCLR and CLIP on Tiny-ImageNet"
    config.model.name, config.model.width, config.model.batch_norm_group = "resnet10", 16, None
    config.source.dataset = "tfds:tiny_imagenet?captions=templates"
    config.preprocessing.image_size = 48
    config.preprocessing.crop_fraction = 1.0
    config.pretrain = default_config().pretrain
    config.pretrain.epochs = 20
    config.pretrain.batch_size = 128
    config.pretrain.augment = ("resized_crop", "flip")
    config.pretrain.judged_images = 2000
    config.pretrain.others = REDUCED
    config.trajectory.epochs = "0,1,2,4,8,12,16,20"
    config.targets = ("tfds:caltech101", "tfds:mnist?train=2000&test=2000")
    config.metrics = dict.fromkeys(config.targets, "accuracy")
    config.probe.methods = ("probe_converged",)
    config.probe.steps = None
    config.finetune.steps = 200
    config.finetune.batch_size = 32
    config.finetune.num_seeds = config.probe.num_seeds = 3
    config.finetune.optimizer.learning_rate = 0.03
    config.finetune.optimizer.schedule = "cosine"
    config.finetune.checkpoints = "0,4,12,20"
    config.overrides = {}
    config.scores = ("logme",)
    config.stages = ("pretrain", "features", "probe", "finetune", "scores", "report")
    return config


def smoke():
    config = tiny(full())
    config.model.batch_norm_group = 16
    config.pretrain.objective = "moco_v2"
    config.pretrain.augment = AUGMENT
    config.pretrain.moco_v2.queue_size = 256
    config.pretrain.moco_v2.hidden_dim = 64
    return config


def get_config(variant: str = "full"):
    variants = {"full": full, "reduced": reduced, "smoke": smoke}
    return choose(variants, variant, "variant of configs/moco_v2_resnet50_imagenet.py")()
