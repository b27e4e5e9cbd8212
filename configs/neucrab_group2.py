"""NeuCRaB, group II: how well scores rank checkpoints of several pre-trainings, saved after each learning-rate decay.

    python -m jax_transfer.main --config=configs/neucrab_group2.py --workdir=runs/neucrab_group2

Reproduces Table 2 of "Ranking Neural Checkpoints" (Li et al., CVPR 2021): ResNet-50 on ImageNet, iNaturalist and
Places-365, with four checkpoints each (Img-90k, Img-180k, Img-270k and Img-300k are those of ImageNet after so many
iterations), ranked for Caltech101, Flowers102, SUN397 and Patch Camelyon. The run prints the table at the end. The
paper's table, in percent, averaged over the four targets:

                            Recall@1   Rel@1  Recall@3   Rel@3  Pearson  Kendall   GFLOPS
    Linear (1 epoch)            0.00   96.46     25.00   98.79    27.01    24.24   4.95E4
    Linear (5 epochs)          50.00   99.57    100.00  100.00    55.07    51.28   4.97E4
    Linear (converged)         75.00   99.95    100.00  100.00    79.30    68.60   5.33E4
    Fine-tune (1 epoch)        25.00   99.05     25.00   99.47    19.61    15.52   6.51E5
    Fine-tune (5 epochs)       25.00   99.55    100.00  100.00    68.47    58.33   4.28E6
    MI (alpha 0.01)             0.00   94.84     25.00   97.43   -29.41   -17.81   1.62E5
    MI (alpha 0.50)             0.00   96.66      0.00   97.03   -11.36   -10.21   1.62E5
    MI w/ PCA (alpha 0.01)     50.00   99.60     75.00   99.85    52.14    51.34   5.58E4
    MI w/ PCA (alpha 0.50)      0.00   96.68     50.00   99.52    23.73    17.09   5.58E4
    LEEP                       75.00   99.44     75.00   99.90    50.36    55.49   378.31
    N-LEEP                    100.00  100.00    100.00  100.00    72.84    67.49    12.95

GFLOPS. The paper counts a multiply-add as one operation and excludes one forward pass over the training images,
F = 3.04E5, which all scores share. Let T be one forward pass over the test images (4.94E4, the linear classifiers minus
their training). Then fine-tuning for k epochs costs (3k - 1) F + T, that is 6.57E5 and 4.31E6, within 1 % of the
numbers above. A linear classifier costs slightly more than T, and the other scores cost their computation on features
and outputs. Our column "GFLOPS" counts a multiply-add as two operations, and only what runs here: for early-stopped
fine-tuning the training steps, forward and backward, on four fifths of the training images; for the other scores the
work on the features. It excludes forward passes over the images on which a score is tested. The column "as in the
paper" follows the paper's rule.

The accuracy to predict is the paper's G, the best test accuracy of a sweep of learning rates and weight decays. One
difference is intentional: the paper tests linear classifiers and early-stopped fine-tuning on the same test images as
the accuracy that they predict; here they are tested on a fifth of the training images.

In equation 4 of the paper, LEEP and N-LEEP average over the test images, with counts (equation 5) over the training
images. Ours use the training images for both, so that no score has seen the images on which accuracy is measured.

The iNaturalist of the paper has "more than 8000 classes": that of 2018 (8,142 species, 437,513 images for training).

Every net trains for 300k steps, whatever the size of its data set: 60 epochs of ImageNet, 176 of iNaturalist and 43 of
Places-365. The learning rate falls after 90k, 180k and 270k steps, and the checkpoints are named by step.

From scratch: a ResNet-50 with random weights (`random:resnet50`) goes through the same fine-tuning. Its accuracies
stand beside those of the checkpoints, as in Figure 1 of the paper, but it is not ranked: the tables rank checkpoints,
and LEEP needs a classification head.

Ours, because the paper does not give them: pre-training with SGD (momentum 0.9, learning rate 0.1 divided by 10 at
each decay, weight decay 1e-4, batches of 256 images, crops and flips); fine-tuning with SGD (momentum 0.9, cosine
schedule) for 9,000 iterations of 128 images, with crops and flips; and the sweep, learning rates 0.001, 0.01 and 0.1 by
weight decays 0 and 1e-4. Early-stopped fine-tuning starts from a learning rate of 0.01.

BatchNorm normalises the global batch, because the paper does not say on how many devices its nets were trained. Our
results: not measured at this size.

Variants: `full`; `smoke`, small ResNets on CIFAR-10 and Fashion-MNIST and one target, within a minute on two cores.
"""

from jax_transfer.choose import choose
from jax_transfer.study.config import default_config
from jax_transfer.study.smoke import tiny

DECAYS = (0.3, 0.6, 0.9)  # 90k, 180k and 270k of 300k steps
# Its numbers are means over four targets, in percent but for GFLOPS.
COLUMNS = ("Recall@1", "Rel@1", "Recall@3", "Rel@3", "Pearson", "Kendall", "GFLOPS")
TABLE_2 = {
    "linear_1": (0.00, 96.46, 25.00, 98.79, 27.01, 24.24, 4.95e4),
    "linear_5": (50.00, 99.57, 100.00, 100.00, 55.07, 51.28, 4.97e4),
    "linear_converged": (75.00, 99.95, 100.00, 100.00, 79.30, 68.60, 5.33e4),
    "finetune_1": (25.00, 99.05, 25.00, 99.47, 19.61, 15.52, 6.51e5),
    "finetune_5": (25.00, 99.55, 100.00, 100.00, 68.47, 58.33, 4.28e6),
    "mi_alpha_0.01": (0.00, 94.84, 25.00, 97.43, -29.41, -17.81, 1.62e5),
    "mi_alpha_0.5": (0.00, 96.66, 0.00, 97.03, -11.36, -10.21, 1.62e5),
    "mi_pca_alpha_0.01": (50.00, 99.60, 75.00, 99.85, 52.14, 51.34, 5.58e4),
    "mi_pca_alpha_0.5": (0.00, 96.68, 50.00, 99.52, 23.73, 17.09, 5.58e4),
    "leep": (75.00, 99.44, 75.00, 99.90, 50.36, 55.49, 378.31),
    "nleep": (100.00, 100.00, 100.00, 100.00, 72.84, 67.49, 12.95),
}
# Figure 2 of the paper: N-LEEP by PCA energy and Gaussian components a class. "nleep" itself has 0.8 and 5.
HEAT_MAP = tuple(
    f"nleep?energy={energy}&components_per_class={components}"
    for energy in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    for components in (1, 2, 5, 10)
    if (energy, components) != (0.8, 5)
)


def full():
    config = default_config()
    config.name = "NeuCRaB, group II"
    config.model.name = "resnet50"
    config.source.dataset = "tfds:imagenet2012"
    config.source.others = ("tfds:inaturalist2018", "tfds:places365")
    config.preprocessing.image_size = 224
    config.preprocessing.crop_fraction = 0.875
    config.pretrain.steps = 300_000
    config.pretrain.batch_size = 256
    config.pretrain.augment = ("resized_crop", "flip")
    config.pretrain.optimizer.schedule = "step"
    config.pretrain.optimizer.milestones = DECAYS
    config.pretrain.optimizer.weight_decay = 1e-4
    config.trajectory.steps = "90k,180k,270k,300k"
    config.checkpoints = ("random:resnet50",)
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
    config.scores = (*TABLE_2, "logme", "nce", "h_score", "transrate", *HEAT_MAP)
    table = {"where": "Table 2", "method": "finetune", "targets": config.targets, "num_checkpoints": 12}
    config.paper_tables = ({**table, "columns": COLUMNS, "scores": TABLE_2},)
    return config


def smoke():
    config = tiny(full())
    config.source.others = ("tfds:fashion_mnist?train=1024&test=256",)
    config.pretrain.steps = 40  # two and a half epochs, with a checkpoint within the second
    config.trajectory.steps = "20,40"
    config.checkpoints = ("random:resnet10?stem=cifar&width=8",)
    config.checkpoint_preprocessing.image_size = 32
    config.scores = ("linear_1", "finetune_1", "leep", "nleep", "logme")
    return config


def get_config(variant: str = "full"):
    return choose({"full": full, "smoke": smoke}, variant, "variant of configs/neucrab_group2.py")()
