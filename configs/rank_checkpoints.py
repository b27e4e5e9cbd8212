"""Ranks any checkpoints for your own images: which one to use, and how far to trust the ranking.

    python -m jax_transfer.main --config=configs/rank_checkpoints.py --workdir=runs/ranking \
        --config.checkpoints=a.safetensors,b.pth,run/checkpoints --config.target=folder:/my/images

Checkpoints can be .safetensors, .pth, .ckpt and .bin files with the parameter names of torchvision or timm (use
`FILE=MODEL` if neither the file nor its name identifies the model), epochs and whole trajectories of a study, folders
of such files, and `random:MODEL`, an untrained network as a baseline. You can mix architectures. The images need one
folder per class.

Each checkpoint gets the accuracy of a converged linear probe, cross-validated over all images, and scores that need no
training, from "Ranking Neural Checkpoints" and others. The results are written to `report/index.html` and
`report/ranking.csv` and printed as a table.

Variants: `full`; `smoke`, untrained networks of three families on the scanned digits of scikit-learn.
"""

from jax_transfer.choose import choose
from jax_transfer.ranking.command import default_config


def full():
    return default_config()


def smoke():
    config = default_config()
    config.checkpoints = "random:resnet10,random:mobilenet_v1,random:vit_tiny_patch4_32"
    config.target = "embedded:digits?per_class=20"
    config.preprocessing.image_size = 32
    config.preprocessing.crop_fraction = 1.0
    config.shots = (1, 5)
    return config


def get_config(variant: str = "full"):
    return choose({"full": full, "smoke": smoke}, variant, "variant of configs/rank_checkpoints.py")()
