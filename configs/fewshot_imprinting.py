"""Weight imprinting from epochs 50 to 90 of ResNet-50 on ImageNet: new classes from 1 to 20 images, on CUB-200-2011.

    python -m jax_transfer.main --config=configs/fewshot_imprinting.py --workdir=runs/fewshot_imprinting

Reproduces Table 4 of "Towards Inadequately Pre-trained Models in Transfer Learning" (Deng et al., ICCV 2023): each
epoch is tuned on 100 of the 200 classes, and the weights of the other 100 are imprinted from N images of each (Qi,
Brown and Lowe, CVPR 2018, arXiv:1712.07136). The accuracy on the 100 classes is to choose the epoch. The paper's
numbers, in percent; it does not say whether an unseen class competes with the 100 others only or with all 200, and ours
show both:

    epoch   N = 1   N = 2   N = 5  N = 10  N = 20   100 classes
       50   52.07   55.64   60.77   63.95   65.64         81.28
       60   51.28   55.68   61.11   63.86   65.95         82.16
       70   52.92   57.44   62.20   65.08   67.05         82.82
       80   52.36   56.44   61.77   64.58   66.66         82.68
       90   52.11   57.34   61.49   64.83   67.17         82.47

Pre-training is that of `resnet50_imagenet.py`: to use its checkpoints, copy its working directory's `checkpoints`.

Ours, because the paper does not give them: tuning, with SGD (momentum 0.9, cosine learning rate from 0.01, the new
layers ten times as fast, weight decay 1e-4, batches of 64) for 30 epochs with random crops and flips; an embedding of
256 columns and a scale that begins at 10; the first 100 classes as the seen ones; imprinting from the mean over five
augmented copies of each image; 100 draws of the images.

Our results: not measured on ImageNet. The reduced variant, 20 epochs of a ResNet-10 on Tiny-ImageNet with half of the
classes of Caltech101 seen, is in docs/results/fewshot_caltech101.

Variants: `full`; `reduced`; `smoke`, on CIFAR-10 to MNIST, in a minute on two CPU cores.
"""

from jax_transfer.choose import choose
from jax_transfer.study.config import default_config
from jax_transfer.study.smoke import tiny

CUB = "tfds:cub200"
TABLE_4 = {
    50: (0.5207, 0.5564, 0.6077, 0.6395, 0.6564, 0.8128),
    60: (0.5128, 0.5568, 0.6111, 0.6386, 0.6595, 0.8216),
    70: (0.5292, 0.5744, 0.6220, 0.6508, 0.6705, 0.8282),
    80: (0.5236, 0.5644, 0.6177, 0.6458, 0.6666, 0.8268),
    90: (0.5211, 0.5734, 0.6149, 0.6483, 0.6717, 0.8247),
}


def full():
    config = default_config()
    config.name = "Weight imprinting on CUB-200"
    config.model.name = "resnet50"
    config.model.batch_norm_group = 32  # as in configs/resnet50_imagenet.py, with whose checkpoints it is shared
    config.source.dataset = "tfds:imagenet2012"
    config.preprocessing.image_size = 224
    config.preprocessing.crop_fraction = 0.875
    config.pretrain.epochs = 90
    config.pretrain.batch_size = 256
    config.pretrain.augment = ("resized_crop", "flip")
    config.pretrain.optimizer.schedule = "step"
    config.pretrain.optimizer.milestones = (1 / 3, 2 / 3)
    config.pretrain.optimizer.weight_decay = 1e-4
    config.trajectory.epochs = "50,60,70,80,90"
    config.targets = (CUB,)
    config.metrics = dict.fromkeys(config.targets, "accuracy")
    config.finetune.epochs = 30
    config.finetune.batch_size = 64
    config.finetune.augment = ("random_crop", "flip")
    config.finetune.optimizer.head_learning_rate_factor = 10.0
    config.finetune.optimizer.weight_decay = 1e-4
    config.finetune.optimizer.schedule = "cosine"
    config.fewshot.embedding_dim = 256
    config.fewshot.augmented_copies = 5
    config.stages = ("pretrain", "features", "fewshot", "report")
    config.paper = tuple(
        {"target": CUB, "epoch": epoch, "what": what, "accuracy": accuracy, "where": f"Table 4, epoch {epoch}"}
        for epoch, accuracies in TABLE_4.items()
        for what, accuracy in zip(
            ("1-shot", "2-shot", "5-shot", "10-shot", "20-shot", "seen classes"), accuracies, strict=True
        )
    )
    return config


def reduced():
    """Pre-trains a narrow ResNet-10 on Tiny-ImageNet for 20 epochs, and imprints half of the classes of Caltech101."""
    config = full()
    config.name = "Weight imprinting, Tiny-ImageNet to Caltech101"
    config.model.name, config.model.width, config.model.batch_norm_group = "resnet10", 16, None
    config.source.dataset = "tfds:tiny_imagenet"
    config.preprocessing.image_size = 48
    config.preprocessing.crop_fraction = 1.0
    config.pretrain = default_config().pretrain
    config.pretrain.epochs = 20
    config.pretrain.augment = ("resized_crop", "flip")
    config.trajectory.epochs = "0,1,2,4,8,12,16,20"
    config.targets = ("tfds:caltech101",)
    # Its classes have 31 to 800 images, so the mean over classes is reported.
    config.metrics = dict.fromkeys(config.targets, "mean_class_accuracy")
    config.finetune.batch_size = 32
    config.paper = ()
    return config


def smoke():
    config = tiny(full())
    config.fewshot.shots = (1, 5)
    config.fewshot.num_episodes = 20
    config.fewshot.embedding_dim = 32
    config.fewshot.augmented_copies = 2
    return config


def get_config(variant: str = "full"):
    variants = {"full": full, "reduced": reduced, "smoke": smoke}
    return choose(variants, variant, "variant of configs/fewshot_imprinting.py")()
