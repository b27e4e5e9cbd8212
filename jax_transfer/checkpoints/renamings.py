"""Names and shapes of released checkpoints that are not our own, by explicit maps, in both directions.

Our names are those of torchvision's ResNets, MobileNet v2, GoogLeNet and Inception v3, of timm's ResNets v2, MobileNet v1,
Inception-ResNet v2, ViT and DeiT, of pretrainedmodels' bninception and of the T2T-ViT release. Read besides are
torchvision's ViT and timm's MobileNet v2, and two differences that are not of names:

- timm's ResNets v2 have a 1x1 convolution [s, d, 1, 1] as head, where we have a matrix.
- bninception is Caffe's: its first convolution reads blue, green, red, so its input channels change places. Its file may
  hold BatchNorm arrays as [1, d].
"""

import re
from collections.abc import Collection, Mapping

import numpy as np

from jax_transfer.records import InputError

State = dict[str, np.ndarray]

# torchvision's ViT -> timm's, in this order.
TORCHVISION_VIT = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
)
# timm's MobileNet v2 -> torchvision's: a block's layers, of the first block (without expansion) and of the others.
MOBILENET_V2_FIRST = {"conv_dw": "0.0", "bn1": "0.1", "conv_pw": "1", "bn2": "2"}
MOBILENET_V2_BLOCK = {"conv_pw": "0.0", "bn1": "0.1", "conv_dw": "1.0", "bn2": "1.1", "conv_pwl": "2", "bn3": "3"}
MOBILENET_V2_STAGES = (1, 2, 3, 4, 3, 3, 1)  # blocks


def _mobilenet_v2() -> dict[str, str]:
    """timm's names of layers -> torchvision's: blocks.1.0.conv_dw -> features.2.conv.1.0."""
    places = [(i, j) for i, num_blocks in enumerate(MOBILENET_V2_STAGES) for j in range(num_blocks)]
    names = {"conv_stem": "features.0.0", "bn1": "features.0.1"}
    for k, (i, j) in enumerate(places, start=1):
        layers = MOBILENET_V2_FIRST if k == 1 else MOBILENET_V2_BLOCK
        names |= {f"blocks.{i}.{j}.{theirs}": f"features.{k}.conv.{ours}" for theirs, ours in layers.items()}
    last = len(places) + 1
    return {**names, "conv_head": f"features.{last}.0", "bn2": f"features.{last}.1", "classifier": "classifier.1"}


TIMM_MOBILENET_V2 = _mobilenet_v2()


def our_names(names: Collection[str]) -> dict[str, str]:
    """name -> our name, of all arrays of a file; what is unknown stays as it is."""
    if "encoder.layers.encoder_layer_0.ln_1.weight" in names:
        return {name: _substituted(name) for name in names}
    if "blocks.1.0.conv_pwl.weight" in names:
        return {name: _layer_renamed(name, TIMM_MOBILENET_V2) for name in names}
    return {name: name for name in names}


def to_ours(state: Mapping[str, np.ndarray], what: str = "the file") -> State:
    """The state of any of the libraries above with our names and shapes; what is unknown stays as it is.

    Raises:
      InputError: if two names become one; `what` is what the message calls the file.
    """
    new = our_names(state)
    if len(set(new.values())) < len(new):
        twice = next(name for name in new if list(new.values()).count(new[name]) > 1)
        raise InputError(f"{what}: holds {new[twice]} under two names, one of them {twice}.")
    return {new[name]: _to_our_layout(new[name], value) for name, value in state.items()}


def to_released(state: Mapping[str, np.ndarray]) -> State:
    """The state of one of our models with timm's names and shapes, or the release's where timm has no such model.

    `to_ours` undoes it.
    """
    if "features.0.0.weight" in state:
        theirs = {ours: name for name, ours in TIMM_MOBILENET_V2.items()}
        return {_layer_renamed(name, theirs): value for name, value in state.items()}
    return {name: _to_released_layout(name, value) for name, value in state.items()}


def _substituted(name: str) -> str:
    for pattern, replacement in TORCHVISION_VIT:
        name = re.sub(pattern, replacement, name)
    return name


def _layer_renamed(name: str, layers: Mapping[str, str]) -> str:
    """Replaces all of a name but its last part."""
    layer, _, leaf = name.rpartition(".")
    return f"{layers[layer]}.{leaf}" if layer in layers else name


def _to_our_layout(name: str, x: np.ndarray) -> np.ndarray:
    if name == "head.fc.weight" and x.ndim == 4 and x.shape[2:] == (1, 1):
        return x[:, :, 0, 0]
    if re.search(r"_bn\.\w+$", name) and x.ndim == 2 and len(x) == 1:
        return x[0]
    return _channels_reversed(name, x)


def _to_released_layout(name: str, x: np.ndarray) -> np.ndarray:
    return x[:, :, None, None] if name == "head.fc.weight" else _channels_reversed(name, x)


def _channels_reversed(name: str, x: np.ndarray) -> np.ndarray:
    """Blue, green, red <-> red, green, blue."""
    return x[:, ::-1] if name == "conv1_7x7_s2.weight" and x.ndim == 4 else x
