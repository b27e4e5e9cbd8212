"""Facts about a network that its weights do not show, read from the graph of a TensorFlow module."""

from collections.abc import Iterable, Mapping
from typing import Any

from jax_transfer.checkpoints.tensorflow_names import Layer, Layout
from jax_transfer.records import InputError

NORMS = ("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3")


def read_settings(nodes: Iterable[Any], layout: Layout, what: str) -> dict[str, Any]:
    """Returns the settings of the model that the nodes of a graph show: "stem", "last_stride" and "batch_norm_eps".

    Args:
      nodes: protocol buffers with `name`, `op`, `input` and `attr`.
      layout: the layout of the weights.
      what: the checkpoint, for messages.

    Raises:
      InputError: if the graph lacks a layer, has another network, or changes the pixels before the first convolution;
        the message says what to do.
    """
    by_name = {node.name.removeprefix("module/"): node for node in nodes}
    first, *others = [layer for layer in layout.layers if layer.stride]
    strides = {layer.ours: _stride(by_name, layer, what) for layer in (first, *others)}
    last = {layer.ours for layer in others if layer.stride == 2 and layer.ours.startswith(("stages.3.", "layer4."))}
    allowed = {first.ours: (1, 2)} | dict.fromkeys(last, (1, 2))
    for layer in (first, *others):
        if strides[layer.ours] not in allowed.get(layer.ours, (layer.stride,)):
            raise InputError(
                f"{what}: {layer.theirs} has stride {strides[layer.ours]}, where {layout.model} has {layer.stride}."
            )
    last_strides, epsilons = {strides[name] for name in last}, _epsilons(by_name, layout, what)
    if len(last_strides) > 1 or len(epsilons) > 1:
        raise InputError(
            f"{what}: strides {sorted(last_strides)} of its last stage or epsilons {sorted(epsilons)} of its BatchNorm "
            "layers differ from each other, which no model here has."
        )
    _check_pool(by_name, what)
    _check_pixels(by_name, first, what)
    return {
        "stem": stem(strides[first.ours]),
        "last_stride": last_strides.pop(),
        "batch_norm_eps": round(epsilons.pop(), 9),  # a float32 in the graph
    }


def stem(stride: int) -> str:
    """Returns the key of STEMS for a 7x7 convolution with a stride, and a pool that sees zeros around the image.

    >>> stem(2)
    '7x7_zero_padded_pool'
    """
    return {2: "7x7_zero_padded_pool", 1: "7x7_stride1_zero_padded_pool"}[stride]


def _node(nodes: Mapping[str, Any], layer: Layer, ops: tuple[str, ...], what: str) -> Any:
    found = next((nodes[name] for op in ops if (name := f"{layer.theirs}/{op}") in nodes), None)
    if found is None:
        raise InputError(
            f"{what}: its graph has no {layer.theirs}/{ops[-1]}, so it does not show the strides and epsilons: convert "
            "its variables alone (variables/variables) and check what is assumed then."
        )
    return found


def _stride(nodes: Mapping[str, Any], layer: Layer, what: str) -> int:
    _, height, width, _ = _node(nodes, layer, ("Conv2D",), what).attr["strides"].list.i
    return height if height == width else -1


def _epsilons(nodes: Mapping[str, Any], layout: Layout, what: str) -> set[float]:
    return {_node(nodes, layer, NORMS, what).attr["epsilon"].f for layer in layout.layers if not layer.stride}


def _check_pool(nodes: Mapping[str, Any], what: str) -> None:
    """Checks that the only pool is a 3x3 max pool with stride 2 that does not pad by itself."""
    pools = [node for node in nodes.values() if node.op == "MaxPool"]
    kinds = {(tuple(p.attr["ksize"].list.i), tuple(p.attr["strides"].list.i), p.attr["padding"].s) for p in pools}
    if kinds != {((1, 3, 3, 1), (1, 2, 2, 1), b"VALID")}:
        raise InputError(f"{what}: its graph has the max pools {sorted(kinds)}; expected one of 3x3, stride 2, VALID.")


def _check_pixels(nodes: Mapping[str, Any], first: Layer, what: str) -> None:
    """Checks that nothing but padding lies between the input and the first convolution."""
    level, ops = [_node(nodes, first, ("Conv2D",), what).input[0]], set()
    while level:  # from the first convolution back to the input
        names = {name.partition(":")[0].removeprefix("^").removeprefix("module/") for name in level}
        sources = [nodes[name] for name in names if name in nodes]
        ops |= {source.op for source in sources}
        level = [name for source in sources for name in source.input]
    if others := sorted(ops - {"Placeholder", "PlaceholderWithDefault", "Const", "Identity", "Pad"}):
        raise InputError(
            f"{what}: its graph changes the pixels before the first convolution ({', '.join(others)}): convert its "
            "variables alone (variables/variables), with the --mean and --std that do the same."
        )
