"""NeuCRaB, ResNet-101: how well scores rank checkpoints of deeper nets, saved after each learning-rate decay.

    python -m jax_transfer.main --config=configs/neucrab_resnet101.py --workdir=runs/neucrab_resnet101

"Ranking Neural Checkpoints" (Li et al., CVPR 2021) adds "one more group of checkpoints with ResNet-101s to evaluate
checkpoint ranking on deeper models" (section 4.2, appendix A.4). Which checkpoints these are, and the paper's numbers,
are in the appendix, which is not in the document at hand. Ours: group II with ResNet-101, that is, ImageNet,
iNaturalist 2018 and Places-365 with four checkpoints each, ranked for Caltech101, Flowers102, SUN397 and Patch
Camelyon. The run prints the table at the end.

All settings are those of configs/neucrab_group2.py, whose docstring explains them: 300k steps of 256 images on each
source, checkpoints after 90k, 180k, 270k and 300k steps, the sweep of fine-tuning, and how GFLOPS are counted. LEEP and
N-LEEP use the training images for both equations, 4 and 5, of the paper. A ResNet-101 with random weights is fine-tuned
for comparison, and not ranked.

BatchNorm normalises the global batch. Our results: not measured at this size.

Variants: `full`; `smoke`, two epochs of a small ResNet on CIFAR-10 and one target, within a minute on two CPU cores.
"""

from jax_transfer.choose import choose
from jax_transfer.study.config import default_config
from jax_transfer.study.smoke import tiny

DECAYS = (0.3, 0.6, 0.9)  # 90k, 180k and 270k of 300k steps
TABLE = (
    "linear_1",
    "linear_5",
    "linear_converged",
    "finetune_1",
    "finetune_5",
    "mi_alpha_0.01",
    "mi_alpha_0.5",
    "mi_pca_alpha_0.01",
    "mi_pca_alpha_0.5",
    "leep",
    "nleep",
)


def full():
    config = default_config()
    config.name = "NeuCRaB, ResNet-101"
    config.model.name = "resnet101"
    config.source.dataset = "tfds:imagenet2012"
    config.source.others = ("tfds:inaturalist2018", "tfds:places365")
    config.preprocessing.image_size = 224
    config.preprocessing.crop_fraction = 0.875
    config.pretrain.update(steps=300_000, batch_size=256, augment=("resized_crop", "flip"))
    config.pretrain.optimizer.update(schedule="step", milestones=DECAYS, weight_decay=1e-4)
    config.trajectory.steps = "90k,180k,270k,300k"
    config.checkpoints = ("random:resnet101",)
    config.targets = ("tfds:caltech101", "tfds:flowers102", "tfds:sun397", "tfds:patch_camelyon")
    config.metrics = dict.fromkeys(config.targets, "accuracy")  # as in the paper, on every target
    config.finetune.steps = 9000
    config.finetune.augment = ("random_crop", "flip")
    config.finetune.optimizer.schedule = "cosine"
    # The paper's G: the best test accuracy of a sweep.
    config.finetune.learning_rates = (0.001, 0.01, 0.1)
    config.finetune.weight_decays = (0.0, 1e-4)
    config.finetune.choose = "test"
    config.stages = ("pretrain", "features", "probe", "finetune", "scores", "report")
    config.scores = (*TABLE, "logme", "nce", "h_score", "transrate")
    return config


def smoke():
    config = tiny(full())
    config.trajectory.epochs = "1,2"
    config.checkpoints = ("random:resnet10?stem=cifar&width=8",)
    config.checkpoint_preprocessing.image_size = 32
    config.finetune.learning_rates, config.finetune.weight_decays = (0.01, 0.1), (0.0,)
    config.scores = ("linear_1", "leep", "nleep", "logme")
    return config


def get_config(variant: str = "full"):
    return choose({"full": full, "smoke": smoke}, variant, "variant of configs/neucrab_resnet101.py")()
