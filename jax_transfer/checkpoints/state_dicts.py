"""Where in a file the weights of a model are: the mapping, at any depth, and the prefix under which its names fit best.

Training code wraps a network in others, and keeps it among averages, momentum copies, losses and optimizers. Nothing of
that is listed here by name: every mapping that holds arrays is tried with every prefix that its names have. Words decide
only between places that fit equally well.
"""

import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from jax_transfer.checkpoints import renamings, torch_files
from jax_transfer.checkpoints.renamings import State
from jax_transfer.records import InputError

# What wrappers of parts of a network put into names: torch.compile, FSDP, checkpointed activations, DataParallel.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
# Which of several places that fit equally is taken: the moving average of the weights, as timm does, and DINO's teacher is
# one; then the network itself; then what follows it slowly in contrastive learning, or came before it; last an
# optimizer's state.
AVERAGES = {"ema", "modelema", "emamodel", "average", "averaged", "avg", "swa", "polyak", "shadow", "teacher"}
FOLLOWERS = {"momentum", "target", "key", "k", "m", "init", "initial", "pretrained", "old", "prev", "previous", "last"}
OPTIMIZERS = {"optimizer", "optimizers", "optim", "opt", "sgd", "adam", "adamw", "mu", "nu", "exp", "grad", "grads"}
# What the encoders of contrastive methods are called: what stands at their head tells images apart, not classes.
CONTRASTIVE = re.compile(
    r"encoder_[qkm]\b|(base|online|momentum|target|query|key)_(encoder|network|net|model|backbone)|\bonline\b"
)
# Not weights of the network that gives features: counters, and heads used in training alone.
IGNORED = re.compile(r"(^|\.)num_batches_tracked$|^(AuxLogits|aux1|aux2|aux_head)\.|^mask(ed)?_(token|embed)$")
# First parts of names that may belong to the way from image to features: a file with one that the model lacks is of
# another model. Others, such as losses, metrics, projections, predictors, prototypes and decoders, are left out.
ON_THE_WAY = re.compile(
    r"(layers?|blocks?|stages?|stem|conv|bn|gn|norm|patch|rope|reg|register|head_dist|features|trunk|maxpool|avgpool|pool|"
    r"attn|attention|attnpool|se|aa|gamma|beta|ls|ln|ssf|freqs?|cls_pos|pre_logits|prompts?|adapt[a-z]*|lora)(\d|[._]|$)|"
    r"\w*(norm|token|pool|embed|embedding)\d*(\.|$)"
)
# Heads for segmentation, where their kernels are those of convolutions.
SEGMENTATION = re.compile(r"(^|\.)(aux_classifier|decode_head|auxiliary_head|classifier)\.")
TRAINING_ALONE = re.compile(r"decoder|mask_token|proj|pred|criterion|loss")  # although they may look like the above


class Found(NamedTuple):
    """The weights of a model in a file.

    state: name -> float32 array, without the prefix and what is no weight. where: mappings and prefix, for messages.
    contrastive: it is of a contrastive method, whose head classifies nothing. segments: beside it is a head for
    segmentation. notes: what was left out, in sentences.
    """

    state: State
    where: str = ""
    contrastive: bool = False
    segments: bool = False
    notes: tuple[str, ...] = ()


class _Place(NamedTuple):
    keys: tuple[str, ...]  # of the mappings, from the outermost
    arrays: Mapping[str, object]
    prefix: str
    inside: Mapping[str, str]  # name after the prefix, without wrappers -> whole name
    fitting: int  # names of the model, those of its head not counted
    rank: int  # of its words; the lowest is preferred

    @property
    def words(self) -> str:
        return " > ".join([*self.keys, *([self.prefix + "*"] if self.prefix else [])])


def find(
    contents: object, expected: frozenset[str], head: str, path: pathlib.Path, count_shapes: Callable[[State], int]
) -> Found:
    """The weights that fit a model best.

    Args:
      contents: of the file, as `torch_files.read` gives them.
      expected: the names of the model's arrays.
      head: how those of its classification head begin, such as "fc.".
      path: the file, for messages.
      count_shapes: how many arrays of a state fit the model in shape too; asked where names fit equally.

    Raises:
      InputError: if there are no arrays, or one that is wanted is not finite, or not dense.
    """
    containers = list(_containers(contents))
    if not containers:
        raise InputError(f"{path}: holds no weights; {outline(contents)}.")
    trunk = frozenset(name for name in expected if not name.startswith(head))
    places = [place for keys, arrays in containers for place in _places(keys, arrays, trunk)]
    if not places:  # of another model, as an error will say
        keys, arrays = max(containers, key=lambda container: len(container[1]))
        return Found(_read(arrays, {name: name for name in arrays if not IGNORED.search(name)}, path), " > ".join(keys))

    def is_more(name: str) -> bool:
        return name not in expected and not name.startswith(head) and _may_matter(name, expected, head)

    place, *others = _best(places, count_shapes, is_more)
    inside = place.inside
    ignored = {full for name, full in inside.items() if IGNORED.search(name)}
    ours = _ours(inside)
    whole = trunk <= set(ours.values())
    wanted = {name: inside[name] for name in ours if not whole or _may_matter(ours[name], expected, head)}
    known = ignored | set(wanted.values())
    names = [name for name in place.arrays if name not in known and not torch_files.UNREAD.search(name)]
    segments = any(SEGMENTATION.search(name) and len(place.arrays[name].shape) == 4 for name in names)
    state = _read(place.arrays, wanted, path)
    contrastive = bool(CONTRASTIVE.search(place.words.lower()))
    return Found(state, place.words, contrastive, segments, tuple(_notes(place, others, _grouped(names, place.prefix))))


def _ours(inside: Mapping[str, str]) -> dict[str, str]:
    """name -> the model's name, of the arrays of a place."""
    return renamings.our_names([name for name in inside if not IGNORED.search(name)])


def _best(places: list[_Place], count_shapes: Callable[[State], int], is_more: Callable[[str], bool]) -> list[_Place]:
    """The places that fit best, equally well; the preferred one first."""

    def most(places: list[_Place], count: Callable[[_Place], int]) -> list[_Place]:
        counts = [count(place) for place in places] if len(places) > 1 else [0]
        return [place for place, n in zip(places, counts, strict=True) if n == max(counts)]

    equal = most(places, lambda place: place.fitting)
    equal = most(equal, lambda place: -sum(map(is_more, _ours(place.inside).values())))  # not of a larger network
    equal = most(equal, lambda place: count_shapes(_shapes(place)))
    return sorted(equal, key=lambda place: (place.rank, place.prefix.count(".")))


def _notes(place: _Place, others: list[_Place], left: list[str]) -> Iterator[str]:
    if others:
        named = ", ".join(repr(other.words or "the file itself") for other in others[:3]) + ", ..." * bool(others[3:])
        yield (
            f"The weights are those under {place.words or 'the file itself'!r}; {named} would fit as well and "
            f"{'were' if others[1:] else 'was'} left out."
        )
        left = [group for group in left if not any(_covers(other, place, group) for other in others)]
    if left:
        listed = ", ".join(left[:6]) + (f" and {len(left) - 6} more" if left[6:] else "")
        yield f"Left out, because the model has no such parts: {listed}."


def outline(contents: object) -> str:
    """What a file holds, for messages: its keys, and the first names of its arrays."""
    keys = list(contents) if isinstance(contents, Mapping) else []
    largest = max((arrays for _, arrays in _containers(contents)), key=len, default={})
    shown = ", ".join(map(repr, keys[:6])) + (f" and {len(keys) - 6} more" if keys[6:] else "")
    names = f", with arrays such as {', '.join(list(largest)[:3])}" if largest and list(largest) != keys else ""
    return f"the file's keys are {shown}{names}" if keys else f"the file is a {type(contents).__name__} without keys"


def _containers(contents: object) -> Iterator[tuple[tuple[str, ...], Mapping[str, object]]]:
    """The mappings that hold arrays, at any depth, outermost first: (keys on the way to it, name -> array)."""
    level, seen = [((), contents)], set()
    while level:
        below = []
        for keys, x in level:
            if id(x) in seen or torch_files.is_array(x):
                continue
            seen.add(id(x))
            items = x.items() if isinstance(x, Mapping) else enumerate(x) if isinstance(x, list) else ()
            items = [(str(key), value) for key, value in items]
            arrays = {key: value for key, value in items if isinstance(x, Mapping) and torch_files.is_array(value)}
            if any(not torch_files.UNREAD.search(name) for name in arrays):
                yield keys, arrays
            below += [((*keys, key), value) for key, value in items if isinstance(value, Mapping | list)]
        level = below


def _places(keys, arrays, trunk) -> Iterator[_Place]:
    """The prefixes that are followed by at least one name of the model."""
    followed: dict[str, dict[str, str]] = {}
    for name in arrays:
        parts = name.split(".")
        for i in range(len(parts)):
            if parts[i] not in WRAPPERS:
                inner = ".".join(part for part in parts[i:] if part not in WRAPPERS)
                followed.setdefault("".join(f"{part}." for part in parts[:i]), {})[inner] = name
    for prefix, inside in followed.items():
        fitting = len(trunk.intersection(renamings.our_names(inside).values()))
        if fitting:
            place = _Place(keys, arrays, prefix, inside, fitting, 0)
            yield place._replace(rank=_rank(place))


def _words(place: _Place) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", " ".join((*place.keys, place.prefix)).lower()))


def _rank(place: _Place) -> int:
    words, parts = _words(place), place.prefix.split(".")
    counters = (place.arrays.get(".".join([*parts[:i], "n_averaged"])) for i in range(len(parts)))
    counts = [int(counter) for counter in counters if counter is not None and math.prod(counter.shape) == 1]
    if words & OPTIMIZERS or 0 in counts:  # an average that no weights have entered is the initialisation
        return 3
    if words & FOLLOWERS:
        return 2
    return 0 if counts or words & AVERAGES else 1


def _may_matter(name: str, expected: frozenset[str], head: str) -> bool:
    """Whether an array that the model does not have could be on the way from image to features."""
    if name in expected or name.startswith(head):
        return True
    if TRAINING_ALONE.match(name):
        return False
    first = name.partition(".")[0]
    return any(other.partition(".")[0] == first for other in expected) or bool(ON_THE_WAY.match(name))


def _covers(other: _Place, place: _Place, group: str) -> bool:
    """Whether a group of names lies in a place that a note speaks of already."""
    return other.keys == place.keys and other.prefix.startswith(group.partition("*")[0])


def _grouped(names: list[str], prefix: str) -> list[str]:
    """Names by the first part in which they differ from the prefix: module.queue, module.predictor.* (4 arrays)."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parts, known = name.split("."), prefix.split(".")
        same = next((i for i, (a, b) in enumerate(zip(parts, known, strict=False)) if a != b), 0)
        groups.setdefault(".".join(parts[: same + 1]), []).append(name)
    return [f"{group}.* ({len(of)} arrays)" if of[1:] else of[0] for group, of in groups.items()]


def _shapes(place: _Place) -> State:
    """Stand-ins of no size in memory, for what needs names and shapes alone."""
    return {name: np.broadcast_to(np.False_, tuple(place.arrays[full].shape)) for name, full in place.inside.items()}


def _read(arrays: Mapping[str, object], wanted: Mapping[str, str], path: pathlib.Path) -> State:
    """wanted: the new name of each array -> its name in `arrays`."""
    state = {name: torch_files.to_numpy(arrays[full], path, full) for name, full in wanted.items()}
    if broken := [name for name, value in state.items() if not np.isfinite(value).all()]:
        raise InputError(f"{path}: {broken[0]} holds values that are NaN or infinite ({len(broken)} such tensors).")
    return state
