"""Rank any checkpoints for your own images: which one to take, and how far to trust it.

    python -m jax_transfer.main --config=configs/rank_checkpoints.py --workdir=runs/ranking \
        --config.checkpoints=a.safetensors,b.pth,run/checkpoints --config.target=folder:/my/images

Checkpoints: .safetensors, .pth, .ckpt and .bin files with the names of torchvision or timm (`FILE=MODEL` where neither the file nor
its name says which model it is), epochs and whole trajectories of a study here, folders of such files, and `random:MODEL`,
an untrained network to compare with. Architectures may be mixed. The images: a folder a class.

For each: the accuracy of a converged linear probe, cross-validated over all images, and the scores of "Ranking Neural
Checkpoints" and others that need no training. `report/index.html`, `report/ranking.csv`, and a table in the terminal.

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
    return config


def get_config(variant: str = "full"):
    return choose({"full": full, "smoke": smoke}, variant, "variant of configs/rank_checkpoints.py")()
