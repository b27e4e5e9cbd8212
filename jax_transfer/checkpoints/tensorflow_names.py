"""Names of the variables of published TensorFlow ResNet-50s, and what they are called in this package.

Two code bases are known; both pad explicitly and have the stride in the 3x3 convolution, as the models here:

- S4L (Zhai et al., 2019, arXiv:1905.03670; github.com/google-research/s4l, models/resnet.py): ResNet v2 with a scope
  for each unit, as in block1/unit1/a/conv2d/kernel.
- Revisiting Self-Supervised Visual Representation Learning (Kolesnikov et al., 2019, arXiv:1901.09005;
  github.com/google/revisiting-self-supervised, models/resnet.py): ResNet v1 or v2, whose layers are numbered in the
  order of their creation, as in conv2d_7/kernel and batch_normalization_6/gamma.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping

import numpy as np

from jax_transfer.checkpoints.renamings import State
from jax_transfer.records import InputError

STAGES = (3, 4, 6, 3)
# Names of what training keeps beside the weights: steps, states of optimizers, moving averages.
TRAINING = re.compile(
    r"(^|/)(global_step|save_counter|beta[12]_power|_CHECKPOINTABLE_OBJECT_GRAPH)$|/(Momentum|Adam(_1)?|RMSProp(_1)?|"
    r"ExponentialMovingAverage|EMA|LARSOptimizer)(/|$)"
)
# TF-slim has the stride in the last unit of a stage, where the models here have it in the first.
SLIM = re.compile(r"(^|/)bottleneck_v[12]/")
NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution or a BatchNorm.

    Attributes:
      theirs: its name in TensorFlow, such as block1/unit1/a/conv2d.
      ours: its name here, such as stages.0.blocks.0.conv1.
      stride: of a convolution; 0 for a BatchNorm.
    """

    theirs: str
    ours: str
    stride: int = 0

    @property
    def variables(self) -> dict[str, str]:
        """Name of each variable -> name of the array here."""
        parts = {"kernel": "weight"} if self.stride else NORM
        return {f"{self.theirs}/{theirs}": f"{self.ours}.{ours}" for theirs, ours in parts.items()}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A ResNet-50 in TensorFlow.

    Attributes:
      source: the code base, for messages.
      model: a key of MODELS.
      layers: without the head; the first one is the first convolution.
      heads: pattern of the names of the layers after the features.
      classifier: the layer among them that classifies, if it has a kernel.
      our_classifier: its name here.
    """

    source: str
    model: str
    layers: tuple[Layer, ...]
    heads: re.Pattern
    classifier: str
    our_classifier: str


def _s4l() -> Iterator[Layer]:
    yield Layer("root_block/conv2d", "stem.conv", 2)
    for stage, num_units in enumerate(STAGES):
        for i in range(num_units):
            unit, block = f"block{stage + 1}/unit{i + 1}", f"stages.{stage}.blocks.{i}"
            stride = 2 if stage and i == 0 else 1
            yield Layer(f"{unit}/batch_normalization", f"{block}.norm1")
            if i == 0:
                yield Layer(f"{unit}/proj/conv2d", f"{block}.downsample.conv", stride)
            yield Layer(f"{unit}/a/conv2d", f"{block}.conv1", 1)
            yield Layer(f"{unit}/b/batch_normalization", f"{block}.norm2")
            yield Layer(f"{unit}/b/conv2d", f"{block}.conv2", stride)
            yield Layer(f"{unit}/c/batch_normalization", f"{block}.norm3")
            yield Layer(f"{unit}/c/conv2d", f"{block}.conv3", 1)
    yield Layer("batch_normalization", "norm")


def _created_v2() -> Iterator[tuple[str, int]]:
    """Yields (our name, stride) of the layers of a ResNet v2 in the order of their creation."""
    yield "stem.conv", 2
    for stage, num_units in enumerate(STAGES):
        for i in range(num_units):
            block, stride = f"stages.{stage}.blocks.{i}", 2 if stage and i == 0 else 1
            yield f"{block}.norm1", 0
            if i == 0:
                yield f"{block}.downsample.conv", stride
            yield f"{block}.conv1", 1
            yield f"{block}.norm2", 0
            yield f"{block}.conv2", stride
            yield f"{block}.norm3", 0
            yield f"{block}.conv3", 1
    yield "norm", 0


def _created_v1() -> Iterator[tuple[str, int]]:
    """Yields (our name, stride) of the layers of a ResNet v1 in the order of their creation."""
    yield from (("conv1", 2), ("bn1", 0))
    for stage, num_units in enumerate(STAGES):
        for i in range(num_units):
            block, stride = f"layer{stage + 1}.{i}", 2 if stage and i == 0 else 1
            if i == 0:
                yield from ((f"{block}.downsample.0", stride), (f"{block}.downsample.1", 0))
            yield from ((f"{block}.conv1", 1), (f"{block}.bn1", 0))
            yield from ((f"{block}.conv2", stride), (f"{block}.bn2", 0))
            yield from ((f"{block}.conv3", 1), (f"{block}.bn3", 0))


def _numbered(created: Iterator[tuple[str, int]]) -> Iterator[Layer]:
    """Yields layers whose names TensorFlow numbered by their kind: conv2d, conv2d_1, ..."""
    counts = {"conv2d": 0, "batch_normalization": 0}
    for ours, stride in created:
        kind = "conv2d" if stride else "batch_normalization"
        yield Layer(f"{kind}_{counts[kind]}" if counts[kind] else kind, ours, stride)
        counts[kind] += 1


REVISITING = "revisiting-self-supervised"
S4L_V2 = Layout("S4L", "resnet50_v2", tuple(_s4l()), re.compile(r"head/conv2d|[a-z]+(_[a-z]+)*"), "classes", "head.fc")
LATER = re.compile(r"(conv2d|batch_normalization|dense)(_\d+)?")
REVISITING_V1 = Layout(REVISITING, "resnet50", tuple(_numbered(_created_v1())), LATER, "conv2d_53", "fc")
REVISITING_V2 = Layout(REVISITING, "resnet50_v2", tuple(_numbered(_created_v2())), LATER, "conv2d_53", "head.fc")


def without_training(names: Mapping[str, object]) -> tuple[dict[str, str], list[str]]:
    """Returns {name without the scope of a module: name} of the weights, and the names of everything else.

    >>> without_training({"module/conv2d/kernel": 0, "module/conv2d/kernel/Momentum": 0, "global_step": 0})
    ({'conv2d/kernel': 'module/conv2d/kernel'}, ['global_step', 'module/conv2d/kernel/Momentum'])
    """
    skipped = sorted(name for name in names if TRAINING.search(name))
    return {name.removeprefix("module/"): name for name in names if name not in skipped}, skipped


def find_layout(shapes: Mapping[str, tuple[int, ...]], what: str) -> Layout:
    """Returns the layout of a checkpoint.

    Args:
      shapes: name -> shape of the weights.
      what: the checkpoint, for messages.

    Raises:
      InputError: if none fits; the message lists the first names that are unknown and missing.
    """
    if slim := next((name for name in shapes if SLIM.search(name)), None):
        raise InputError(
            f"{what}: is a ResNet of TF-slim ({slim}), whose stages have the stride in their last unit; those of the "
            "models here have it in their first."
        )
    if "conv2d/kernel" in shapes:  # the second BatchNorm of v1 is that of the first shortcut
        width = shapes["conv2d/kernel"][-1]
        layout = REVISITING_V1 if shapes.get("batch_normalization_1/gamma") == (4 * width,) else REVISITING_V2
    else:
        layout = S4L_V2
    expected = [name for layer in layout.layers for name in layer.variables]
    missing = [name for name in expected if name not in shapes]
    unknown = sorted(name for name in set(shapes) - set(expected) if not layout.heads.fullmatch(_layer(name)))
    if missing or unknown:
        raise InputError(
            f"{what}: is not a ResNet-50 with the names of S4L or {REVISITING}; "
            f"unknown: {_shortened(unknown)}; missing: {_shortened(missing)}."
        )
    return layout


def to_ours(weights: Mapping[str, np.ndarray], layout: Layout) -> tuple[State, list[str]]:
    """Returns the arrays with our names in torch's layout, and the names of the heads that were left out.

    A head is kept if it classifies: it is called classes, or is the next layer and has ImageNet's 1,000 or 1,001
    outputs.
    """
    names = {theirs: ours for layer in layout.layers for theirs, ours in layer.variables.items()}
    kernel = weights.get(f"{layout.classifier}/kernel")
    named = layout.classifier == "classes"
    if kernel is not None and kernel.shape[:2] == (1, 1) and (named or kernel.shape[-1] in (1000, 1001)):
        names |= {f"{layout.classifier}/{part}": f"{layout.our_classifier}.{ours}"
                  for part, ours in (("kernel", "weight"), ("bias", "bias"))}  # fmt: skip
    state = {ours: _to_torch_layout(ours, weights[theirs], layout) for theirs, ours in names.items()}
    return state, sorted(name for name in weights if name not in names)


def _to_torch_layout(name: str, x: np.ndarray, layout: Layout) -> np.ndarray:
    """Transposes kernels [h, w, i, o] -> [o, i, h, w]; that of the head becomes a matrix [s, d]."""
    if x.ndim != 4:
        return x
    return x[0, 0].T if name.startswith(f"{layout.our_classifier}.") else x.transpose(3, 2, 0, 1)


def _layer(name: str) -> str:
    return name.rpartition("/")[0]


def _shortened(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if names[3:] else ""
    return f"{', '.join(names[:3])}{more}" if names else "none"
