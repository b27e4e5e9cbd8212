"""SimCLR with ResNet-50 and ViT-B/16 on image-text data: does a loss on images alone transfer better than CLIP's?

    python -m jax_transfer.main --config=configs/pretraining_data_simclr.py --workdir=runs/pretraining_data_simclr

For section "Effect of pre-training loss" of "The Role of Pre-training Data in Transfer Learning" (Entezari et al.,
2023), which replaces the loss of `pretraining_data_clip.py` with SimCLR's on the same images. The document at hand is a
summary without numbers: SimCLR transfers better in the few-shot regime, and the difference shrinks with more images.
Our results: not measured at this size.

Pre-training follows the public release of SLIP (Mu et al., 2022), as the summary says: AdamW with betas 0.9 and 0.98,
learning rate 1e-3 with a cosine schedule, weight decay 0.1, 16 epochs with two epochs of warm-up, batches of 1,024, the
projection 4096-256 and temperature 0.1; crops of 8 to 100 % of the area, colour jitter with probability 0.8, grayscale
with 0.2, blur with 0.5, and flips. BatchNorm normalises the global batch.

The images are those of an image-text data set, without their captions: download it with img2dataset to FOLDER.

Ours: the number of images, the targets' settings (a converged probe; fine-tuning for 128 epochs with AdamW at the best
of four learning rates, chosen on validation images), and the evaluated epochs.

Variants: `full`; `smoke`, from CIFAR-10 to MNIST within a minute on two CPU cores.
"""

from jax_transfer.choose import choose
from jax_transfer.study.config import default_config
from jax_transfer.study.smoke import tiny

FOLDER = "captions:data/yfcc?images=2700000"
TARGETS = ("tfds:cifar100", "tfds:dtd", "tfds:caltech101", "tfds:pets")
AUGMENT = ("resized_crop", "jitter", "gray", "blur", "flip")


def full():
    config = default_config()
    config.name = "SimCLR on image-text data"
    config.model.name = "resnet50"
    config.model.others = ({"name": "vit_base_patch16_224"},)
    config.source.dataset = FOLDER
    config.preprocessing.image_size = 224
    config.pretrain.objective = "simclr"
    config.pretrain.epochs = 16
    config.pretrain.batch_size = 1024
    config.pretrain.augment = AUGMENT
    config.pretrain.optimizer.name = "adamw"
    config.pretrain.optimizer.b2 = 0.98
    config.pretrain.optimizer.learning_rate = 1e-3
    config.pretrain.optimizer.weight_decay = 0.1
    config.pretrain.optimizer.decay_norm_and_bias = False
    config.pretrain.optimizer.warmup = 2 / 16
    config.trajectory.epochs = "every:4"
    config.targets = TARGETS
    config.probe.methods = ("probe_converged",)
    config.finetune.epochs = 128
    config.finetune.augment = ("random_crop", "flip")
    config.finetune.optimizer.name = "adamw"
    config.finetune.optimizer.schedule = "cosine"
    config.finetune.learning_rates = (1e-4, 3e-4, 1e-3, 3e-3)
    config.finetune.weight_decays = (0.1,)
    config.finetune.checkpoints = "16"
    config.scores = ("logme", "nleep")
    return config


def smoke():
    config = tiny(full())
    config.model.others = ()
    config.pretrain.objective = "simclr"
    config.pretrain.augment = AUGMENT
    config.pretrain.simclr.hidden_dim, config.pretrain.simclr.projection_dim = 128, 32
    config.pretrain.optimizer.name = "adamw"
    config.pretrain.optimizer.learning_rate = 1e-3
    config.finetune.learning_rates = (1e-3,)
    config.finetune.checkpoints = "2"
    return config


def get_config(variant: str = "full"):
    return choose({"full": full, "smoke": smoke}, variant, "variant of configs/pretraining_data_simclr.py")()
