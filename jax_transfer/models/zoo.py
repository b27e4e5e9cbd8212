"""The models by name, the names that released files give them, and what each release expects of an image."""

import re
from collections.abc import Callable

from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models import (
    inception,
    inception_resnet_v2,
    inception_v3,
    mobilenet,
    resnet,
    resnet_v2,
    t2t_vit,
    vit,
)
from jax_transfer.models.net import Net

# A model takes num_classes, dtype and the settings of its family (`stem`, `width`, `image_size`, ...), all but the first
# optional, and gives the identical Net for equal arguments.
MODELS: dict[str, Callable[..., Net]] = {
    "resnet10": resnet.resnet10,
    "resnet18": resnet.resnet18,
    "resnet34": resnet.resnet34,
    "resnet50": resnet.resnet50,
    "resnet101": resnet.resnet101,
    "resnet152": resnet.resnet152,
    "resnet18_v2": resnet_v2.resnet18_v2,
    "resnet34_v2": resnet_v2.resnet34_v2,
    "resnet50_v2": resnet_v2.resnet50_v2,
    "resnet101_v2": resnet_v2.resnet101_v2,
    "resnet152_v2": resnet_v2.resnet152_v2,
    "mobilenet_v1": mobilenet.mobilenet_v1,
    "mobilenet_v2": mobilenet.mobilenet_v2,
    "inception_v1": inception.inception_v1,
    "inception_v2": inception.inception_v2,
    "inception_v3": inception_v3.inception_v3,
    "inception_resnet_v2": inception_resnet_v2.inception_resnet_v2,
    "vit_tiny_patch4_32": vit.vit_tiny_patch4_32,
    "vit_tiny_patch8_64": vit.vit_tiny_patch8_64,
    "vit_tiny_patch16_224": vit.vit_tiny_patch16_224,
    "vit_small_patch16_224": vit.vit_small_patch16_224,
    "vit_base_patch16_224": vit.vit_base_patch16_224,
    "vit_base_patch32_224": vit.vit_base_patch32_224,
    "deit_tiny_patch16_224": vit.deit_tiny_patch16_224,
    "deit_small_patch16_224": vit.deit_small_patch16_224,
    "deit_base_patch16_224": vit.deit_base_patch16_224,
    "t2t_vit_14": t2t_vit.t2t_vit_14,
    "t2t_vit_t_14": t2t_vit.t2t_vit_t_14,
}

# Images resized to a side and cut to 224 pixels; a fraction of 0.9 is 248 in timm, which rounds down.
IMAGENET = Preprocessing(224, 224 / 256)
BICUBIC = Preprocessing(224, 224 / 256, interpolation="bicubic")
BICUBIC_248 = Preprocessing(224, 224 / 248, interpolation="bicubic")
TORCHVISION_V2 = Preprocessing(224, 224 / 232)  # torchvision's second recipe ("IMAGENET1K_V2")
HALF = (0.5, 0.5, 0.5)
VIT = Preprocessing(224, 224 / 248, HALF, HALF, "bicubic")
VIT_384 = Preprocessing(384, 1.0, HALF, HALF, "bicubic")
# torchvision's two take ImageNet's mean and std and change them to these inside ("transform_input").
GOOGLENET = Preprocessing(224, 224 / 256, HALF, HALF)
INCEPTION_V3 = Preprocessing(299, 299 / 342, HALF, HALF)
# 0 to 255 minus the mean, which the release has in the order blue, green, red; see `renamings`.
BN_INCEPTION = Preprocessing(224, 224 / 256, (128 / 255, 117 / 255, 104 / 255), (1 / 255, 1 / 255, 1 / 255))

# How the name of a released file begins (in lower case, other characters as "_") -> the model, and the preprocessing of
# that release. Names of torchvision, timm (also on its hub), pretrainedmodels, DeiT, DINO, MAE, MoCo and T2T-ViT.
RELEASED: dict[str, tuple[str, Preprocessing]] = {
    "resnet10": ("resnet10", IMAGENET),
    "resnet18": ("resnet18", IMAGENET),
    "resnet34": ("resnet34", IMAGENET),
    "resnet50": ("resnet50", IMAGENET),
    "resnet50_11ad3fa6": ("resnet50", TORCHVISION_V2),
    "resnet101": ("resnet101", IMAGENET),
    "resnet101_cd907fc2": ("resnet101", TORCHVISION_V2),
    "resnet152": ("resnet152", IMAGENET),
    "resnet152_f82ba261": ("resnet152", TORCHVISION_V2),
    "moco_v1": ("resnet50", IMAGENET),
    "moco_v2": ("resnet50", IMAGENET),
    "resnet18_v2": ("resnet18_v2", VIT),
    "resnetv2_18": ("resnet18_v2", VIT),
    "resnet34_v2": ("resnet34_v2", VIT),
    "resnetv2_34": ("resnet34_v2", VIT),
    "resnet50_v2": ("resnet50_v2", Preprocessing(224, 224 / 235, HALF, HALF, "bicubic")),
    "resnetv2_50": ("resnet50_v2", Preprocessing(224, 224 / 235, HALF, HALF, "bicubic")),
    "resnet101_v2": ("resnet101_v2", Preprocessing(224, 224 / 235, HALF, HALF, "bicubic")),
    "resnetv2_101": ("resnet101_v2", Preprocessing(224, 224 / 235, HALF, HALF, "bicubic")),
    "resnet152_v2": ("resnet152_v2", Preprocessing(224, 224 / 256, HALF, HALF, "bicubic")),
    "resnetv2_152": ("resnet152_v2", Preprocessing(224, 224 / 256, HALF, HALF, "bicubic")),
    "mobilenet_v1": ("mobilenet_v1", Preprocessing(224, 224 / 256, HALF, HALF, "bicubic")),
    "mobilenetv1_100": ("mobilenet_v1", Preprocessing(224, 224 / 256, HALF, HALF, "bicubic")),
    "mobilenet_v2": ("mobilenet_v2", IMAGENET),
    "mobilenet_v2_7ebf99e0": ("mobilenet_v2", TORCHVISION_V2),
    "mobilenetv2_100": ("mobilenet_v2", BICUBIC),
    "inception_v1": ("inception_v1", GOOGLENET),
    "googlenet": ("inception_v1", GOOGLENET),
    "inception_v2": ("inception_v2", BN_INCEPTION),
    "bninception": ("inception_v2", BN_INCEPTION),
    "bn_inception": ("inception_v2", BN_INCEPTION),
    "inception_v3": ("inception_v3", INCEPTION_V3),
    "inception_resnet_v2": ("inception_resnet_v2", Preprocessing(299, 299 / 333, HALF, HALF, "bicubic")),
    "vit_tiny_patch4_32": ("vit_tiny_patch4_32", Preprocessing(32, 1.0, HALF, HALF, "bicubic")),
    "vit_tiny_patch8_64": ("vit_tiny_patch8_64", Preprocessing(64, 1.0, HALF, HALF, "bicubic")),
    "vit_tiny_patch16": ("vit_tiny_patch16_224", VIT),
    "vit_tiny_patch16_224": ("vit_tiny_patch16_224", VIT),
    "vit_tiny_patch16_384": ("vit_tiny_patch16_224", VIT_384),
    "vit_small_patch16": ("vit_small_patch16_224", VIT),
    "vit_small_patch16_224": ("vit_small_patch16_224", VIT),
    "vit_small_patch16_224_dino": ("vit_small_patch16_224", BICUBIC_248),
    "dino_deitsmall16": ("vit_small_patch16_224", BICUBIC_248),
    "vit_small_patch16_384": ("vit_small_patch16_224", VIT_384),
    "vit_base_patch16": ("vit_base_patch16_224", VIT),
    "vit_base_patch16_224": ("vit_base_patch16_224", VIT),
    "vit_base_patch16_224_dino": ("vit_base_patch16_224", BICUBIC_248),
    "dino_vitbase16": ("vit_base_patch16_224", BICUBIC_248),
    "vit_base_patch16_224_mae": ("vit_base_patch16_224", BICUBIC_248),
    "mae_pretrain_vit_base": ("vit_base_patch16_224", BICUBIC_248),
    "vit_base_patch16_384": ("vit_base_patch16_224", VIT_384),
    "vit_b_16": ("vit_base_patch16_224", IMAGENET),
    "vit_b_16_swag": ("vit_base_patch16_224", Preprocessing(384, interpolation="bicubic")),
    "vit_b_16_lc_swag": ("vit_base_patch16_224", Preprocessing(224, interpolation="bicubic")),
    "vit_base_patch32": ("vit_base_patch32_224", VIT),
    "vit_base_patch32_224": ("vit_base_patch32_224", VIT),
    "vit_base_patch32_384": ("vit_base_patch32_224", VIT_384),
    "vit_b_32": ("vit_base_patch32_224", IMAGENET),
    "deit_tiny_patch16": ("deit_tiny_patch16_224", BICUBIC_248),
    "deit_tiny_patch16_224": ("deit_tiny_patch16_224", BICUBIC_248),
    "deit_small_patch16": ("deit_small_patch16_224", BICUBIC_248),
    "deit_small_patch16_224": ("deit_small_patch16_224", BICUBIC_248),
    "deit_base_patch16": ("deit_base_patch16_224", BICUBIC_248),
    "deit_base_patch16_224": ("deit_base_patch16_224", BICUBIC_248),
    "deit_base_patch16_384": ("deit_base_patch16_224", Preprocessing(384, interpolation="bicubic")),
    "t2t_vit_14": ("t2t_vit_14", BICUBIC_248),
    "81_5_t2t_vit_14": ("t2t_vit_14", BICUBIC_248),
    "t2t_vit_t_14": ("t2t_vit_t_14", BICUBIC_248),
    "81_7_t2t_vitt_14": ("t2t_vit_t_14", BICUBIC_248),
}


def released(file_name: str) -> tuple[str, Preprocessing] | None:
    """(model, preprocessing) of the longest name in RELEASED that a file's name begins with, None if there is none.

    resnet18-f37072fd.pth and resnet18.a1_in1k are a resnet18; resnet18d, resnext50_32x4d and wide_resnet50_2 are none.
    """
    plain = re.sub(r"[^a-z0-9]+", "_", file_name.lower())
    fitting = [name for name in RELEASED if plain == name or plain.startswith(f"{name}_")]
    return RELEASED[max(fitting, key=len)] if fitting else None


def released_preprocessing(name: str) -> Preprocessing:
    """What released weights of a model expect; `name` is a key of MODELS."""
    return RELEASED[name][1] if name in RELEASED else IMAGENET
