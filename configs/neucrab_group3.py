"""NeuCRaB, group III: how well scores rank checkpoints of different architectures.

    python -m jax_transfer.main --config=configs/neucrab_group3.py --workdir=runs/neucrab_group3

Reproduces Table 3 of "Ranking Neural Checkpoints" (Li et al., CVPR 2021): thirteen architectures trained on ImageNet
until convergence (four Inceptions, Inception-ResNet v2, six MobileNets, two ResNets), ranked for Caltech101,
Flowers102, SUN397 and Patch Camelyon. The run prints the table at the end. The paper's table, in percent, averaged over
the four targets:

                            Recall@1   Rel@1  Recall@3   Rel@3  Pearson  Kendall   GFLOPS
    Linear (1 epoch)           25.00   98.17     25.00   99.35    30.14    13.80   3.37E4
    Linear (5 epochs)          25.00   98.98     25.00   99.63    33.45    18.95   3.38E4
    Linear (converged)         25.00   99.66     25.00   99.72    63.55    36.91   3.62E4
    Fine-tune (1 epoch)         0.00   98.28     25.00   99.80    17.61    11.59   4.43E5
    Fine-tune (5 epochs)       25.00   98.62     25.00   99.68    25.72    15.72   2.91E6
    MI (alpha 0.01)            25.00   98.29     25.00   99.34     4.42     2.94   1.30E5
    MI (alpha 0.50)            25.00   98.36     25.00   99.37    -9.79    -6.81   1.30E5
    MI w/ PCA (alpha 0.01)      0.00   99.18     50.00   99.82    61.94    38.83   5.56E4
    MI w/ PCA (alpha 0.50)      0.00   96.34      0.00   98.47    33.17    21.26   5.56E4
    LEEP                       25.00   97.36     75.00   99.90    42.99    45.06   247.56
    N-LEEP                     25.00   99.66     25.00   99.70    66.94    51.14    12.68

GFLOPS. The paper counts a multiply-add as one operation and excludes one forward pass over the training images, F,
which all scores share. In groups I and II, where T is one forward pass over the test images, fine-tuning for k epochs
costs (3k - 1) F + T within 1 %. In group III the printed numbers do not fit: F = 2.73E5 and T = 3.37E4 give 5.80E5 and
3.86E6, 31 and 32 % more than the table, whose two rows would need F = 2.06E5. Our column "GFLOPS" counts a multiply-add
as two operations, and only what runs here: for early-stopped fine-tuning the training steps, forward and backward, on
four fifths of the training images; for the other scores the work on the features. It excludes forward passes over the
images on which a score is tested. The column "as in the paper" follows the rule of groups I and II.

The paper names families instead of models. We use Inception v1 to v4, Inception-ResNet v2, MobileNet v1 with four
widths and v2 with two, ResNet-50 and ResNet-101, all at 224 pixels. As in group II, linear classifiers and
early-stopped fine-tuning are tested on a fifth of the training images. For checkpoints that exist already, use
configs/study_checkpoints.py.

In equation 4 of the paper, LEEP and N-LEEP average over the test images, with counts (equation 5) over the training
images. Ours use the training images for both, so that no score has seen the images on which accuracy is measured.

From scratch: a ResNet-50 with random weights (`random:resnet50`) goes through the same fine-tuning. Its accuracies
stand beside those of the checkpoints, as in Figure 1 of the paper, but it is not ranked: the tables rank checkpoints,
and LEEP needs a classification head.

Ours, because the paper does not give them: pre-training for 90 epochs with SGD (momentum 0.9, cosine learning rate
from 0.1, weight decay 4e-5, batches of 256 images, crops and flips); fine-tuning with SGD (momentum 0.9, cosine
schedule) for 9,000 iterations of 128 images, with crops and flips; and the sweep of the paper's G, learning rates
0.001, 0.01 and 0.1 by weight decays 0 and 1e-4. Early-stopped fine-tuning starts from a learning rate of 0.01.

BatchNorm normalises the global batch, because the paper does not say on how many devices its nets were trained. Our
results: not measured at this size.

Variants: `full`; `smoke`, two small architectures on CIFAR-10 and one target, within a minute on two CPU cores.
"""

from jax_transfer.choose import choose
from jax_transfer.study.config import default_config
from jax_transfer.study.smoke import tiny

# Its numbers are means over four targets, in percent but for GFLOPS.
COLUMNS = ("Recall@1", "Rel@1", "Recall@3", "Rel@3", "Pearson", "Kendall", "GFLOPS")
TABLE_3 = {
    "linear_1": (25.00, 98.17, 25.00, 99.35, 30.14, 13.80, 3.37e4),
    "linear_5": (25.00, 98.98, 25.00, 99.63, 33.45, 18.95, 3.38e4),
    "linear_converged": (25.00, 99.66, 25.00, 99.72, 63.55, 36.91, 3.62e4),
    "finetune_1": (0.00, 98.28, 25.00, 99.80, 17.61, 11.59, 4.43e5),
    "finetune_5": (25.00, 98.62, 25.00, 99.68, 25.72, 15.72, 2.91e6),
    "mi_alpha_0.01": (25.00, 98.29, 25.00, 99.34, 4.42, 2.94, 1.30e5),
    "mi_alpha_0.5": (25.00, 98.36, 25.00, 99.37, -9.79, -6.81, 1.30e5),
    "mi_pca_alpha_0.01": (0.00, 99.18, 50.00, 99.82, 61.94, 38.83, 5.56e4),
    "mi_pca_alpha_0.5": (0.00, 96.34, 0.00, 98.47, 33.17, 21.26, 5.56e4),
    "leep": (25.00, 97.36, 75.00, 99.90, 42.99, 45.06, 247.56),
    "nleep": (25.00, 99.66, 25.00, 99.70, 66.94, 51.14, 12.68),
}

# Figure 2 of the paper: N-LEEP by PCA energy and Gaussian components a class. "nleep" itself has 0.8 and 5.
HEAT_MAP = tuple(
    f"nleep?energy={energy}&components_per_class={components}"
    for energy in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    for components in (1, 2, 5, 10)
    if (energy, components) != (0.8, 5)
)
# Nets of 0.17 to 0.22 million parameters, and others of 0.02 to 1.4 million, for images of 32 pixels.
EQUAL = (
    {"name": "resnet10", "stem": "cifar", "width": 12},
    {"name": "resnet18_v2", "stem": "cifar", "width": 8},
    {"name": "mobilenet_v1", "width": 0.25},
    {"name": "inception_v1", "width": 0.18},
)
UNEQUAL = (
    {"name": "resnet10", "stem": "cifar", "width": 4},
    {"name": "resnet10", "stem": "cifar", "width": 16},
    {"name": "inception_v2", "width": 0.2},
    {"name": "inception_v1", "width": 0.5},
)
CALTECH = "+".join(
    [
        "airplanes",
        "bonsai",
        "brain",
        "buddha",
        "butterfly",
        "car_side",
        "chandelier",
        "ewer",
        "faces",
        "grand_piano",
        "hawksbill",
        "helicopter",
        "kangaroo",
        "ketch",
        "leopards",
        "menorah",
        "motorbikes",
        "starfish",
        "trilobite",
        "watch",
    ]
)


def full():
    config = default_config()
    config.name = "NeuCRaB, group III"
    config.model.name = "resnet50"
    config.model.others = (
        {"name": "resnet101"},
        {"name": "inception_v1"},
        {"name": "inception_v2"},
        {"name": "inception_v3"},
        {"name": "inception_v4"},
        {"name": "inception_resnet_v2"},
        {"name": "mobilenet_v1", "width": 0.25},
        {"name": "mobilenet_v1", "width": 0.5},
        {"name": "mobilenet_v1", "width": 0.75},
        {"name": "mobilenet_v1", "width": 1.0},
        {"name": "mobilenet_v2", "width": 1.0},
        {"name": "mobilenet_v2", "width": 1.4},
    )
    config.source.dataset = "tfds:imagenet2012"
    config.preprocessing.image_size = 224
    config.preprocessing.crop_fraction = 0.875
    config.pretrain.epochs = 90
    config.pretrain.batch_size = 256
    config.pretrain.augment = ("resized_crop", "flip")
    config.pretrain.optimizer.weight_decay = 4e-5
    config.trajectory.epochs = "90"
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
    config.scores = (*TABLE_3, "logme", "nce", "h_score", "transrate")
    table = {"where": "Table 3", "method": "finetune", "targets": config.targets, "num_checkpoints": 13}
    config.paper_tables = ({**table, "columns": COLUMNS, "scores": TABLE_3},)
    return config


def reduced():
    """Compares eight narrow nets on three sources, halfway and at the end, for three targets on two CPU cores."""
    config = full()
    config.name = "NeuCRaB, reduced"
    config.model.name, config.model.stem, config.model.width = EQUAL[0]["name"], EQUAL[0]["stem"], EQUAL[0]["width"]
    config.model.others = (*EQUAL[1:], *UNEQUAL)
    # The target on CIFAR-10 has the other four classes.
    config.source.dataset = "tfds:cifar10?classes=bird+cat+deer+dog+frog+horse&train=5000&test=500"
    config.source.others = ("tfds:tiny_imagenet?train=5000&test=500", "tfds:fashion_mnist?train=5000&test=500")
    config.preprocessing.image_size = 32
    config.preprocessing.crop_fraction = 1.0
    config.pretrain.epochs = 6
    config.pretrain.batch_size = 32
    config.pretrain.augment = ("flip",)
    config.pretrain.optimizer.name, config.pretrain.optimizer.learning_rate = "adam", 1e-3
    config.pretrain.optimizer.weight_decay = 0.0
    config.trajectory.epochs = "3,6"
    config.checkpoints = ()
    config.paper_tables = ()
    config.targets = (
        "tfds:mnist?per_class=40&test=800",
        "tfds:cifar10?classes=airplane+automobile+ship+truck&per_class=100&test=800",
        f"tfds:caltech101?classes={CALTECH}&per_class=20&test=800",
    )
    config.metrics = dict.fromkeys(config.targets, "accuracy")
    config.finetune.steps = 64
    config.finetune.batch_size = 32
    config.finetune.augment = ()
    config.finetune.num_seeds = 3
    config.finetune.learning_rates, config.finetune.weight_decays = (0.01, 0.03, 0.1), (0.0,)
    config.probe.methods = ("probe_converged",)
    ncti = ("ncti_variability", "ncti_geometry", "ncti_nearest")
    config.scores = (*config.scores, "h_score_shrunk", "knn", "effective_rank", *ncti, *HEAT_MAP)
    return config


def smoke():
    config = tiny(full())
    config.model.others = ({"name": "resnet18_v2", "stem": "cifar", "width": 8},)
    config.trajectory.epochs = "2"
    config.checkpoints = ("random:resnet10?stem=cifar&width=8",)
    config.checkpoint_preprocessing.image_size = 32
    config.scores = ("finetune_1", "mi_pca_alpha_0.01", "leep", "nleep", "logme")
    return config


def get_config(variant: str = "full"):
    return choose({"full": full, "reduced": reduced, "smoke": smoke}, variant, "variant of configs/neucrab_group3.py")()
