"""CLIP with ResNet-50 and ViT-B/16 on captioned images: how does the source of the captions matter for transfer?

    python -m jax_transfer.main --config=configs/pretraining_data_clip.py --workdir=runs/pretraining_data_clip

For "The Role of Pre-training Data in Transfer Learning" (Entezari et al., 2023). The document at hand is a summary
without numbers: sources differ in the few-shot regime, and the differences shrink with more images of the target; with
captions made from the names of ImageNet's classes, CLIP is close to supervised pre-training. Our results: not measured
at this size.

Pre-training follows public releases: AdamW with betas 0.9 and 0.999, learning rate 1e-3 with a cosine schedule after
5,000 steps of warm-up, weight decay 0.1 but not on biases and gains, batches of 1,024, a learned temperature that
scales similarities by at most 100, and random crops of 90 to 100 % of the area, "random square crops of resized
images". The release's README has the augmentations of SimCLR instead: --config.pretrain.augment="('resized_crop',
'jitter', 'gray', 'blur', 'flip')". BatchNorm normalises the global batch.

A source is a folder with captioned images (`jax_transfer.data.captions`): COCO, a table, or what img2dataset downloads;
or any data set with `?captions=templates`, whose captions are made from the names of its classes. Add further ones with
--config.source.others="('captions:data/laion?images=2700000', 'tfds:imagenet2012?captions=templates')".

Ours: 16 epochs and 2.7 million images, as for SimCLR; the targets' settings, which are those of
`pretraining_data_simclr.py`; and the evaluated epochs.

Variants: `full`; `smoke`, from CIFAR-10 with captions from the names of its classes to MNIST, within a minute on two
CPU cores.
"""

from jax_transfer.choose import choose
from jax_transfer.study.config import default_config
from jax_transfer.study.smoke import tiny

FOLDER = "captions:data/yfcc?images=2700000"
TARGETS = ("tfds:cifar100", "tfds:dtd", "tfds:caltech101", "tfds:pets")
EPOCHS, IMAGES, BATCH = 16, 2_700_000, 1024


def full():
    config = default_config()
    config.name = "CLIP on captioned images"
    config.model.name = "resnet50"
    config.model.others = ({"name": "vit_base_patch16_224"},)
    config.source.dataset = FOLDER
    config.preprocessing.image_size = 224
    config.pretrain.objective = "clip"
    config.pretrain.epochs = EPOCHS
    config.pretrain.batch_size = BATCH
    config.pretrain.augment = ("resized_crop_90",)
    config.pretrain.optimizer.name = "adamw"
    config.pretrain.optimizer.learning_rate = 1e-3
    config.pretrain.optimizer.weight_decay = 0.1
    config.pretrain.optimizer.decay_norm_and_bias = False
    config.pretrain.optimizer.warmup = 5000 / (EPOCHS * (IMAGES // BATCH))
    config.trajectory.epochs = "every:4"
    config.targets = TARGETS
    config.probe.methods = ("probe_converged", "zero_shot")
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
    config.source.dataset = "tfds:cifar10?train=1024&test=256&captions=templates"
    config.pretrain.objective = "clip"
    config.pretrain.augment = ("flip",)
    config.pretrain.optimizer.name = "adamw"
    config.pretrain.optimizer.learning_rate = 1e-3
    config.pretrain.clip.update(vocabulary_size=300, context_length=16, embedding_dim=32)
    config.pretrain.clip.update(text_width=32, text_layers=1, text_heads=2)
    config.finetune.learning_rates = (1e-3,)
    config.finetune.checkpoints = "2"
    return config


def get_config(variant: str = "full"):
    return choose({"full": full, "smoke": smoke}, variant, "variant of configs/pretraining_data_clip.py")()
