"""Studies checkpoints that exist already: features, probes, fine-tuning over a grid of settings, scores, spectra.

    python -m jax_transfer.main --config=configs/study_checkpoints.py --workdir=runs/checkpoints \
        --config.checkpoints="('a.safetensors', 'b.pth=resnet50', 'run/checkpoints')" \
        --config.targets="('folder:/my/images',)"

Checkpoints are files, epochs, trajectories, folders and `random:MODEL`, as in configs/rank_checkpoints.py. Each keeps
its own architecture, image size and preprocessing. Where that file ranks frozen features within minutes, this study
also fine-tunes every checkpoint and measures how far each score can be trusted.

Fine-tuning tries a grid of learning rates and weight decays on a stratified fifth of the training images and tests the
best setting once. "Ranking Neural Checkpoints" (Li et al., CVPR 2021) takes the best of such a grid on the test images
as its ground truth G: --config.finetune.choose=test. The paper does not give its grid; the values here are ours, as are
the epochs and batch sizes. LEEP and NCE need checkpoints with a classification head:
--config.scores="('logme', 'nleep', 'leep', 'nce')".

Variants: `full`; `smoke`, two untrained networks on the scanned digits of scikit-learn, within a minute on two cores.
"""

from jax_transfer.choose import choose
from jax_transfer.study.config import default_config


def full():
    config = default_config()
    config.name = "Given checkpoints"
    config.stages = ("features", "probe", "finetune", "scores", "spectral", "report")
    config.targets = ()
    config.probe.methods = ("probe_converged",)
    config.probe.l2 = (1e-4, 1e-3, 1e-2)
    config.finetune.epochs = 30
    config.finetune.batch_size = 64
    config.finetune.augment = ("random_crop", "flip")
    config.finetune.optimizer.schedule = "cosine"
    config.finetune.learning_rates = (0.003, 0.01, 0.03)
    config.finetune.weight_decays = (0.0, 1e-4)
    config.scores = ("logme", "nleep", "h_score_shrunk", "transrate")
    config.data.on_corrupt = "skip"
    return config


def smoke():
    config = full()
    config.checkpoints = ("random:resnet10?width=8&stem=cifar", "random:resnet18_v2?width=8&stem=cifar")
    config.checkpoint_preprocessing.image_size = 8
    config.checkpoint_preprocessing.crop_fraction = 1.0
    config.targets = ("embedded:digits?train=200&test=100",)
    config.finetune.steps = 6
    config.finetune.batch_size = 32
    config.finetune.augment = ()
    config.finetune.weight_decays = (0.0,)
    config.spectral.epochs = 5
    config.spectral.embedded_images = 50
    return config


def get_config(variant: str = "full"):
    return choose({"full": full, "smoke": smoke}, variant, "variant of configs/study_checkpoints.py")()
