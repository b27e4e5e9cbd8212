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
TIMM_INCEPTION_V3 = Preprocessing(299, 299 / 341, HALF, HALF, "bicubic")
# 0 to 255 minus the mean, which the release has in the order blue, green, red; see `renamings`.
BN_INCEPTION = Preprocessing(224, 224 / 256, (128 / 255, 117 / 255, 104 / 255), (1 / 255, 1 / 255, 1 / 255))

# timm's own ResNets, by the tag of a release: resnet50.a1_in1k, resnet50_a1_0-14fe96d1.pth. Sides after resizing as above.
TIMM_95 = Preprocessing(224, 224 / 235, interpolation="bicubic")
TIMM_A3 = Preprocessing(160, 160 / 168, interpolation="bicubic")
TIMM_TV2 = Preprocessing(176, 176 / 201)
TIMM_TAGS = {
    "a1": TIMM_95, "a1h": TIMM_95, "a2": TIMM_95, "a3": TIMM_A3, "am": BICUBIC, "b1k": TIMM_95, "b2k": TIMM_95,
    "bt": BICUBIC, "c1": TIMM_95, "c2": TIMM_95, "d_in1k": TIMM_95, "fb": IMAGENET, "gluon": BICUBIC, "ra": BICUBIC,
    "ram": BICUBIC, "ra4": VIT, "tv": IMAGENET, "tv2": TIMM_TV2,
}  # fmt: skip
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
# What timm called some of them before it had tags, in front of the model or around it.
TIMM_BEFORE = {
    "gluon_{}_v1b": BICUBIC, "rw_{}": BICUBIC, "tv_{}": IMAGENET, "ssl_{}": IMAGENET, "swsl_{}": IMAGENET,
    "semi_supervised_{}": IMAGENET, "semi_weakly_supervised_{}": IMAGENET,
}  # fmt: skip
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}

# How the name of a released file begins (in lower case, other characters as "_") -> the model, and the preprocessing of
# that release. Names of torchvision, timm (also on its hub), pretrainedmodels, DeiT, DINO, MAE, MoCo and T2T-ViT.
RELEASED: dict[str, tuple[str, Preprocessing]] = {
    **{f"{model}_{tag}": (model, found) for model in RESNETS for tag, found in TIMM_TAGS.items()},
    **{name.format(model): (model, found) for model in RESNETS for name, found in TIMM_BEFORE.items()},
    "resnet50_a1h": ("resnet50", Preprocessing(176, 176 / 195, interpolation="bicubic")),
    "resnet50_a1h2_176": ("resnet50", Preprocessing(176, 176 / 195, interpolation="bicubic")),
    "resnet50_d_f39db8af": ("resnet50", TIMM_95),
    "resnet34_43635321": ("resnet34", BICUBIC),
    "resnet50_bamboo": ("resnet50", Preprocessing(224, interpolation="bicubic")),
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
    "mobilenetv1_125": ("mobilenet_v1", VIT),
    "mobilenetv2_050": ("mobilenet_v2", BICUBIC),
    "mobilenetv2_100": ("mobilenet_v2", BICUBIC),
    "mobilenetv2_140": ("mobilenet_v2", BICUBIC),
    "inception_v1": ("inception_v1", GOOGLENET),
    "googlenet": ("inception_v1", GOOGLENET),
    "inception_v2": ("inception_v2", BN_INCEPTION),
    "bninception": ("inception_v2", BN_INCEPTION),
    "bn_inception": ("inception_v2", BN_INCEPTION),
    "inception_v3": ("inception_v3", INCEPTION_V3),
    "inception_v3_gluon": ("inception_v3", Preprocessing(299, 299 / 341, interpolation="bicubic")),
    "inception_v3_tf": ("inception_v3", TIMM_INCEPTION_V3),
    "inception_v3_tv": ("inception_v3", TIMM_INCEPTION_V3),
    "inception_resnet_v2": ("inception_resnet_v2", Preprocessing(299, 299 / 333, HALF, HALF, "bicubic")),
    "vit_tiny_patch4_32": ("vit_tiny_patch4_32", Preprocessing(32, 1.0, HALF, HALF, "bicubic")),
    "vit_tiny_patch8_64": ("vit_tiny_patch8_64", Preprocessing(64, 1.0, HALF, HALF, "bicubic")),
    "vit_tiny_patch16": ("vit_tiny_patch16_224", VIT),
    "vit_tiny_patch16_224": ("vit_tiny_patch16_224", VIT),
    "vit_tiny_patch16_384": ("vit_tiny_patch16_224", VIT_384),
    "vit_small_patch16": ("vit_small_patch16_224", VIT),
    "vit_small_patch16_224": ("vit_small_patch16_224", VIT),
    "vit_small_patch16_224_dino": ("vit_small_patch16_224", BICUBIC_248),
    "vit_s_300ep": ("vit_small_patch16_224", IMAGENET),
    "linear_vit_s_300ep": ("vit_small_patch16_224", IMAGENET),
    "dino_deitsmall16": ("vit_small_patch16_224", BICUBIC_248),
    "vit_small_patch16_384": ("vit_small_patch16_224", VIT_384),
    "vit_base_patch16": ("vit_base_patch16_224", VIT),
    "vit_base_patch16_224": ("vit_base_patch16_224", VIT),
    "vit_base_patch16_224_dino": ("vit_base_patch16_224", BICUBIC_248),
    "vit_base_patch16_224_bamboo": ("vit_base_patch16_224", Preprocessing(224, interpolation="bicubic", **CLIP)),
    "vit_b_300ep": ("vit_base_patch16_224", IMAGENET),
    "linear_vit_b_300ep": ("vit_base_patch16_224", IMAGENET),
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


# What training code calls some models: the `arch` of DINO, MoCo v3 and MAE.
ARCHITECTURES = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "mae_vit_base_patch16": "vit_base_patch16_224",
}
# The end of a released file's name, before its ending: eight or more digits of a hash (not of a date), or the data set of a tag.
RELEASE = re.compile(r"_((?=\d*[a-f])[0-9a-f]{8,10}|\w*in(1|12|21|22)k)(_(pth|pt|tar|ckpt|bin|safetensors))*$")


def released(file_name: str) -> tuple[str, Preprocessing] | None:
    """(model, preprocessing) of the longest name in RELEASED that a file's name begins with, None if there is none.

    resnet18-f37072fd.pth and resnet18.a1_in1k are a resnet18; resnet18d, resnext50_32x4d and wide_resnet50_2 are none.
    """
    name = _released_name(file_name)
    return RELEASED[name] if name else None


def _released_name(file_name: str) -> str | None:
    plain = _plain(file_name)
    return max((name for name in RELEASED if plain == name or plain.startswith(f"{name}_")), key=len, default=None)


def is_release(file_name: str) -> bool:
    """Whether a name is one that a library gives a release: it ends in a hash (resnet18-f37072fd.pth) or is a tag
    (resnet50.a1_in1k). resnet18_mine.pth only begins like one."""
    name = _released_name(file_name)
    return name is not None and bool(RELEASE.search(_plain(file_name)) or re.search(r"_[0-9a-f]{8}$", name))


def architecture(name: str) -> str | None:
    """The key of MODELS that an `arch` names, None if there is none."""
    return ARCHITECTURES.get(name) or (released(name) or (None,))[0]


def named(text: str) -> tuple[str, dict[str, int | float | str]]:
    """(name, settings) of a model in words: vit_small_patch16_224?num_heads=12, resnet18?stem=3x3_pool&width=32."""
    name, _, said = text.partition("?")
    pairs = [pair.partition("=") for pair in said.split("&") if pair]
    return name, {key: _value(value) for key, _, value in pairs}


def _value(text: str) -> int | float | str:
    return int(text) if re.fullmatch(r"\d{1,9}", text) else float(text) if re.fullmatch(r"\d*\.\d+", text) else text


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower())


def released_preprocessing(name: str) -> Preprocessing:
    """What released weights of a model expect; `name` is a key of MODELS."""
    return RELEASED[name][1] if name in RELEASED else IMAGENET
