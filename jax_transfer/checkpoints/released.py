"""Which model and which preprocessing the name of a released file stands for."""

import re

from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models.spec import IMAGENET
from jax_transfer.models.zoo import MODELS

# The end of a released file's name, before its ending: eight or more digits of a hash (not of a date), or the data set of a tag.
RELEASE = re.compile(r"_((?=\d*[a-f])[0-9a-f]{8,10}|\w*in(1|12|21|22)k)(_(pth|pt|tar|ckpt|bin|safetensors))*$")


def releases() -> dict[str, tuple[str, Preprocessing]]:
    """The names of released files (of torchvision, timm and its hub, pretrainedmodels, DeiT, DINO, MAE, MoCo, T2T-ViT) ->
    (model, preprocessing), as the models' `Spec.released` have them."""
    return {name: (model, found) for model, spec in MODELS.items() for name, found in spec.released.items()}


def released(file_name: str) -> tuple[str, Preprocessing] | None:
    """(model, preprocessing) of the longest name in `releases()` that a file's name begins with, None if there is none.

    resnet18-f37072fd.pth and resnet18.a1_in1k are a resnet18; resnet18d, resnext50_32x4d and wide_resnet50_2 are none.
    """
    name = _released_name(file_name)
    return releases()[name] if name else None


def _released_name(file_name: str) -> str | None:
    plain = _plain(file_name)
    return max((name for name in releases() if plain == name or plain.startswith(f"{name}_")), key=len, default=None)


def is_release(file_name: str) -> bool:
    """Whether a name is one that a library gives a release: it ends in a hash (resnet18-f37072fd.pth) or is a tag
    (resnet50.a1_in1k). resnet18_mine.pth only begins like one."""
    name = _released_name(file_name)
    return name is not None and bool(RELEASE.search(_plain(file_name)) or re.search(r"_[0-9a-f]{8}$", name))


def architecture(name: str) -> str | None:
    """The key of MODELS that an `arch` names, None if there is none."""
    called = next((model for model, spec in MODELS.items() if name in spec.architectures), None)
    return called or (released(name) or (None,))[0]


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
    return MODELS[name].released.get(name, IMAGENET)
