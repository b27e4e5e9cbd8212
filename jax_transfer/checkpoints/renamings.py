"""Maps names and shapes of released checkpoints to ours, and back.

Our names are those of torchvision's ResNets, MobileNet v2, GoogLeNet and Inception v3, of timm's ResNets v2, MobileNet
v1, Inception v4, Inception-ResNet v2, ViT and DeiT, of pretrainedmodels' bninception, and of the T2T-ViT release. The
names of torchvision's ViT and of timm's MobileNet v2 are mapped to these. Two more differences are handled:

- timm's ResNets v2 have a 1x1 convolution [s, d, 1, 1] as their head, where we have a matrix.
- bninception comes from Caffe: its first convolution takes the channels in the order blue, green, red, so they are
  reversed. Its file may hold BatchNorm arrays of shape [1, d].
"""

import re
from collections.abc import Collection, Mapping

import numpy as np

from jax_transfer.records import InputError

State = dict[str, np.ndarray]

# Names of torchvision's ViT -> timm's; substitutions applied in this order.
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
# Layers of a block of timm's MobileNet v2 -> torchvision's: in the first block (without expansion), and in the others.
MOBILENET_V2_FIRST = {"conv_dw": "0.0", "bn1": "0.1", "conv_pw": "1", "bn2": "2"}
MOBILENET_V2_BLOCK = {"conv_pw": "0.0", "bn1": "0.1", "conv_dw": "1.0", "bn2": "1.1", "conv_pwl": "2", "bn3": "3"}
MOBILENET_V2_STAGES = (1, 2, 3, 4, 3, 3, 1)  # number of blocks in each stage


def _mobilenet_v2() -> dict[str, str]:
    """Returns timm's name -> torchvision's name of each layer: blocks.1.0.conv_dw -> features.2.conv.1.0."""
    blocks = [(stage, block) for stage, num_blocks in enumerate(MOBILENET_V2_STAGES) for block in range(num_blocks)]
    names = {"conv_stem": "features.0.0", "bn1": "features.0.1"}
    for k, (i, j) in enumerate(blocks, start=1):
        layers = MOBILENET_V2_FIRST if k == 1 else MOBILENET_V2_BLOCK
        names |= {f"blocks.{i}.{j}.{theirs}": f"features.{k}.conv.{ours}" for theirs, ours in layers.items()}
    last = len(blocks) + 1
    return {**names, "conv_head": f"features.{last}.0", "bn2": f"features.{last}.1", "classifier": "classifier.1"}


TIMM_MOBILENET_V2 = _mobilenet_v2()


def our_names(names: Collection[str]) -> dict[str, str]:
    """Returns name -> our name for all arrays of a file; unknown names are kept.

    >>> our_names(["class_token", "encoder.layers.encoder_layer_0.ln_1.weight"])
    {'class_token': 'cls_token', 'encoder.layers.encoder_layer_0.ln_1.weight': 'blocks.0.norm1.weight'}
    """
    if "encoder.layers.encoder_layer_0.ln_1.weight" in names:
        return {name: _substituted(name) for name in names}
    if "blocks.1.0.conv_pwl.weight" in names:
        return {name: _layer_renamed(name, TIMM_MOBILENET_V2) for name in names}
    return {name: name for name in names}


def to_ours(state: Mapping[str, np.ndarray], what: str = "the file") -> State:
    """Converts a state from any of these libraries to our names and shapes; unknown arrays are kept.

    Args:
      state: name -> array.
      what: the name of the file, for the error message.

    Raises:
      InputError: if two names map to the same name.
    """
    new = our_names(state)
    if len(set(new.values())) < len(new):
        duplicate = next(name for name in new if list(new.values()).count(new[name]) > 1)
        raise InputError(f"{what}: holds {new[duplicate]} under two names, one of them {duplicate}.")
    return {new[name]: _to_our_layout(new[name], value) for name, value in state.items()}


def to_released(state: Mapping[str, np.ndarray]) -> State:
    """Converts the state of one of our models to timm's names and shapes; `to_ours` reverses it.

    Models that timm lacks get the names and shapes that their releases use.
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
    """Replaces the layer in a name, that is, all but its last part."""
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
    """Reverses the input channels of bninception's first convolution (blue, green, red <-> red, green, blue)."""
    return x[:, ::-1] if name == "conv1_7x7_s2.weight" and x.ndim == 4 else x
