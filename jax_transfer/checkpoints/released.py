"""Finds the model and the preprocessing that the name of a released file refers to."""

import re

from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models.spec import IMAGENET
from jax_transfer.models.zoo import MODELS

# The end of a released file's name, before its extension: 8 to 10 hexadecimal digits of a hash (not a date), or a tag
# that ends with the name of a data set.
RELEASE = re.compile(r"_((?=\d*[a-f])[0-9a-f]{8,10}|\w*in(1|12|21|22)k)(_(pth|pt|tar|ckpt|bin|safetensors))*$")


def releases() -> dict[str, tuple[str, Preprocessing]]:
    """Returns name -> (model, preprocessing) of the known released files, from the `Spec.released` of all models.

    They are releases of torchvision, timm and its hub, pretrainedmodels, DeiT, DINO, MAE, MoCo and T2T-ViT.
    """
    return {name: (model, config) for model, spec in MODELS.items() for name, config in spec.released.items()}


def released(file_name: str) -> tuple[str, Preprocessing] | None:
    """Returns (model, preprocessing) for the longest name in `releases()` with which a file's name begins, or None.

    >>> released("resnet18-f37072fd.pth")[0], released("resnet18.a1_in1k")[0]
    ('resnet18', 'resnet18')
    >>> released("resnext50_32x4d.pth") is None
    True
    """
    name = _released_name(file_name)
    return releases()[name] if name else None


def _released_name(file_name: str) -> str | None:
    plain = _plain(file_name)
    return max((name for name in releases() if plain == name or plain.startswith(f"{name}_")), key=len, default=None)


def is_release(file_name: str) -> bool:
    """Returns whether the name of a file has the hash or the tag that libraries give to their releases.

    >>> is_release("resnet18-f37072fd.pth"), is_release("resnet50.a1_in1k"), is_release("resnet18_mine.pth")
    (True, True, False)
    """
    name = _released_name(file_name)
    return name is not None and bool(RELEASE.search(_plain(file_name)) or re.search(r"_[0-9a-f]{8}$", name))


def architecture(name: str) -> str | None:
    """Returns the key of MODELS for the `arch` name that a training script used, or None if there is none.

    >>> architecture("resnet50"), architecture("vit_small"), architecture("alexnet")
    ('resnet50', 'vit_small_patch16_224', None)
    """
    model = next((model for model, spec in MODELS.items() if name in spec.architectures), None)
    return model or (released(name) or (None,))[0]


def named(text: str) -> tuple[str, dict[str, int | float | str]]:
    """Parses the text of a model, with or without settings, into (name, settings).

    >>> named("resnet18?stem=3x3_pool&width=32")
    ('resnet18', {'stem': '3x3_pool', 'width': 32})
    """
    name, _, settings = text.partition("?")
    pairs = [pair.partition("=") for pair in settings.split("&") if pair]
    return name, {key: _value(value) for key, _, value in pairs}


def _value(text: str) -> int | float | str:
    return int(text) if re.fullmatch(r"\d{1,9}", text) else float(text) if re.fullmatch(r"\d*\.\d+", text) else text


def _plain(name: str) -> str:
    """Returns a name in lower case, with "_" in place of everything but letters and digits."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower())


def released_preprocessing(name: str) -> Preprocessing:
    """Returns the preprocessing that the usual released weights of a model expect; `name` is a key of MODELS.

    >>> released_preprocessing("resnet18").image_size
    224
    """
    return MODELS[name].released.get(name, IMAGENET)
