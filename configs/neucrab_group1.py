"""NeuCRaB, group I: how well scores rank checkpoints of mixed supervision, from labels to generative models.

    python -m jax_transfer.main --config=configs/neucrab_group1.py --workdir=runs/neucrab_group1

Reproduces Table 1 of "Ranking Neural Checkpoints" (Li et al., CVPR 2021): 16 ResNet-50s, ranked for
Caltech101, Flowers102, SUN397 and Patch Camelyon. The run prints the table at the end. From scratch: one more
ResNet-50, with random weights, goes through the same fine-tuning; it is shown, as in Figure 1, but not ranked. The
paper's table, in percent, averaged over the four targets:

                            Recall@1   Rel@1  Recall@3   Rel@3  Pearson  Kendall   GFLOPS
    Linear (1 epoch)            0.00   96.97     25.00   98.79    23.56    18.44   4.95E4
    Linear (5 epochs)          25.00   98.79     50.00   98.94    49.77    32.33   4.97E4
    Linear (converged)         50.00   99.63     75.00   99.65    68.97    53.43   5.33E4
    Fine-tune (1 epoch)        25.00   97.45     25.00   97.66    30.25    22.15   6.51E5
    Fine-tune (5 epochs)        0.00   91.09     25.00   98.61    48.19    36.78   4.28E6
    MI (alpha 0.01)             0.00   64.67      0.00   87.96     2.39    -0.31   1.62E5
    MI (alpha 0.50)             0.00   66.71     25.00   90.31    -4.91   -13.05   1.62E5
    MI w/ PCA (alpha 0.01)      0.00   89.45     50.00   99.27    16.16    20.67   5.58E4
    MI w/ PCA (alpha 0.50)      0.00   86.49     25.00   94.28   -24.72   -16.06   5.58E4
    LEEP                           -       -         -       -        -        -        -
    N-LEEP                     75.00   99.65     75.00   99.65    84.30    76.00    12.85

LEEP and NCE need a classification head, which most of these checkpoints lack: they have "-".

In equation 4 of the paper, LEEP and N-LEEP average over the test images, with counts (equation 5) over the training
images. Ours use the training images for both, so that no score has seen the images on which accuracy is measured.

Of the 16 checkpoints, 14 are trained here: supervised on ImageNet (Sup-100%-Img), iNaturalist 2018 (8,142 species; the
paper says more than 8,000) and Places-365; supervised with the exemplar loss (Sup-Exemplar-100%); rotation, relative
patch location, jigsaw and exemplar; semi-supervised rotation and exemplar with 10 % of the labels; and the encoders of
VAE, WAE-MMD, WAE-UKL and WAE-GAN. Two are the discriminators of BigGAN, conditional and unconditional, which are not
trained here: give their weights as checkpoints beside the random initialisation,

    --config.checkpoints="('random:resnet50', 'cond_biggan.safetensors=resnet50', 'uncond_biggan.safetensors=resnet50')"

The paper takes its 14 checkpoints on ImageNet from "The Visual Task Adaptation Benchmark" (Zhai et al., 2019,
arXiv:1910.04867); how each was trained differs from objective to objective and is not in the document at hand. Ours:
one recipe for all, that of `neucrab_group2.py` for 90 epochs (SGD with momentum 0.9, learning rate 0.1 with a cosine
schedule, weight decay 1e-4, batches of 256 images, crops and flips), with colour jitter and grayscale where copies of
an image are told apart; and the settings of fine-tuning and its sweep, which are those of `neucrab_group2.py`.
BatchNorm normalises the global batch. Our results: not measured at this size; what each objective teaches a small net
is in docs/results/objectives.md.

Variants: `full`; `reduced`, which pre-trains on 5,000 images of CIFAR-10 with each objective, and DINO, and judges
every epoch; `reduced_mae`, the same for masked autoencoding, which needs a vision transformer;
`smoke`, on CIFAR-10 to MNIST, in two minutes on two CPU cores.
"""

from jax_transfer.choose import choose
from jax_transfer.study.config import default_config
from jax_transfer.study.smoke import tiny

# Its numbers are means over four targets, in percent but for GFLOPS.
COLUMNS = ("Recall@1", "Rel@1", "Recall@3", "Rel@3", "Pearson", "Kendall", "GFLOPS")
TABLE_1 = {
    "linear_1": (0.00, 96.97, 25.00, 98.79, 23.56, 18.44, 4.95e4),
    "linear_5": (25.00, 98.79, 50.00, 98.94, 49.77, 32.33, 4.97e4),
    "linear_converged": (50.00, 99.63, 75.00, 99.65, 68.97, 53.43, 5.33e4),
    "finetune_1": (25.00, 97.45, 25.00, 97.66, 30.25, 22.15, 6.51e5),
    "finetune_5": (0.00, 91.09, 25.00, 98.61, 48.19, 36.78, 4.28e6),
    "mi_alpha_0.01": (0.00, 64.67, 0.00, 87.96, 2.39, -0.31, 1.62e5),
    "mi_alpha_0.5": (0.00, 66.71, 25.00, 90.31, -4.91, -13.05, 1.62e5),
    "mi_pca_alpha_0.01": (0.00, 89.45, 50.00, 99.27, 16.16, 20.67, 5.58e4),
    "mi_pca_alpha_0.5": (0.00, 86.49, 25.00, 94.28, -24.72, -16.06, 5.58e4),
    "leep": (None,) * 7,
    "nleep": (75.00, 99.65, 75.00, 99.65, 84.30, 76.00, 12.85),
}
# Figure 2 of the paper: N-LEEP by PCA energy and Gaussian components a class. "nleep" itself has 0.8 and 5.
HEAT_MAP = tuple(
    f"nleep?energy={energy}&components_per_class={components}"
    for energy in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    for components in (1, 2, 5, 10)
    if (energy, components) != (0.8, 5)
)
IMAGENET = "tfds:imagenet2012"
COPIES = ("resized_crop", "jitter", "gray", "flip")


def objectives(source: str, num_labelled: int = 64) -> tuple[dict, ...]:
    """Returns the pre-trainings on a source beside the supervised one, some with `num_labelled` labels in a step."""
    tenth = f"{source}{'&' if '?' in source else '?'}fraction=0.1"
    labelled = {"labelled": {"dataset": tenth, "batch_size": num_labelled}}
    return (
        {"objective": "sup_exemplar", "augment": COPIES},
        *({"objective": name} for name in ("rotation", "relative_patch", "jigsaw")),
        {"objective": "exemplar", "augment": COPIES},
        {"objective": "semi_rotation", "feeds": labelled},
        {"objective": "semi_exemplar", "augment": COPIES, "feeds": labelled},
        *({"objective": name} for name in ("vae", "wae_mmd", "wae_ukl", "wae_gan")),
    )


def full():
    config = default_config()
    config.name = "NeuCRaB, group I"
    config.model.name = "resnet50"
    config.source.dataset = IMAGENET
    config.preprocessing.image_size = 224
    config.preprocessing.crop_fraction = 0.875
    config.pretrain.epochs = 90
    config.pretrain.batch_size = 256
    config.pretrain.augment = ("resized_crop", "flip")
    config.pretrain.optimizer.learning_rate = 0.1
    config.pretrain.optimizer.weight_decay = 1e-4
    config.pretrain.others = (
        *objectives(IMAGENET),
        *({"source": source} for source in ("tfds:inaturalist2018", "tfds:places365")),
    )
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
    config.scores = (*TABLE_1, "logme", "nce", "h_score", "transrate", *HEAT_MAP)
    table = {"where": "Table 1", "method": "finetune", "targets": config.targets, "num_checkpoints": 16}
    config.paper_tables = ({**table, "columns": COLUMNS, "scores": TABLE_1},)
    return config


def reduced():
    """Pre-trains a narrow ResNet-10 on 5,000 images of CIFAR-10 with every objective, judged after each epoch."""
    config = full()
    config.name = "Objectives on CIFAR-10"
    config.model.name, config.model.stem, config.model.width = "resnet10", "cifar", 8
    config.source.dataset = "tfds:cifar10?train=5000&test=2000"
    config.preprocessing.image_size = 32
    config.preprocessing.crop_fraction = 1.0
    config.pretrain.epochs = 5
    config.pretrain.batch_size = 64
    config.pretrain.judged_images = 2000
    config.pretrain.optimizer = default_config().pretrain.optimizer
    config.pretrain.optimizer.name, config.pretrain.optimizer.learning_rate = "adam", 1e-3
    for name in ("relative_patch", "jigsaw"):
        config.pretrain[name].embedding, config.pretrain[name].hidden = 64, 256
    for name in ("exemplar", "sup_exemplar", "semi_exemplar"):
        config.pretrain[name].embedding, config.pretrain[name].copies = 64, 2
    dino = {"output_dim": 1024, "hidden_dim": 256, "bottleneck_dim": 64, "momentum": 0.99}
    config.pretrain.others = (
        *objectives("tfds:cifar10?train=5000"),
        {"objective": "dino", "augment": ("global_crop", "jitter_byol", "gray", "blur_always", "flip"), "dino": dino},
    )
    config.trajectory.epochs = "0,5"
    config.checkpoints = ()
    config.paper_tables = ()
    config.targets = ("tfds:cifar10?train=2000&test=2000", "tfds:mnist?per_class=20&test=2000")
    config.metrics = dict.fromkeys(config.targets, "accuracy")
    config.probe.steps, config.probe.epochs = None, 30
    config.probe.num_seeds = 3
    config.stages = ("pretrain", "features", "probe", "scores", "report")
    config.scores = ("logme", "nleep")
    return config


def reduced_mae():
    """Pre-trains a small vision transformer by masked autoencoding, on the images of `reduced`, for longer.

    In 5 epochs it forgets more of the random features than it learns. The optimizer is that of the paper, but for the
    learning rate. The converged probe is there because the features vary little around their mean, which the papers'
    probe of a fixed length cannot correct in time.
    """
    config = reduced()
    config.name = "Masked autoencoding on CIFAR-10"
    config.model.name, config.model.stem, config.model.width = "vit_tiny_patch4_32", None, None
    config.pretrain.objective, config.pretrain.others = "mae", ()
    config.pretrain.epochs = 20
    config.pretrain.optimizer.name, config.pretrain.optimizer.b2 = "adamw", 0.95
    config.pretrain.optimizer.weight_decay, config.pretrain.optimizer.warmup = 0.05, 0.1
    config.pretrain.mae.decoder_layers, config.pretrain.mae.decoder_width, config.pretrain.mae.decoder_heads = 2, 96, 4
    config.trajectory.epochs = "0,5,10,15,20"
    config.probe.methods = ("probe", "probe_converged")
    return config


def smoke():
    config = tiny(full())
    config.source.dataset = "tfds:cifar10?train=512&test=256"
    config.pretrain.epochs = 1
    config.pretrain.batch_size = 32
    config.pretrain.others = objectives("tfds:cifar10?train=512", num_labelled=16)
    for name in ("exemplar", "sup_exemplar", "semi_exemplar"):
        config.pretrain[name].copies = 2
    config.trajectory.epochs = "1"
    config.checkpoints = ("random:resnet10",)
    config.finetune.learning_rates, config.finetune.weight_decays = (0.02,), (0.0,)
    config.finetune.choose = "validation"
    config.scores = ("linear_1", "leep", "nleep", "logme")
    return config


def get_config(variant: str = "full"):
    variants = {"full": full, "reduced": reduced, "reduced_mae": reduced_mae, "smoke": smoke}
    return choose(variants, variant, "variant of configs/neucrab_group1.py")()
