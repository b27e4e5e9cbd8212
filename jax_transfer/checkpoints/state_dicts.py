"""Finds the weights of a model in a file: the mapping, at any depth, and the prefix of names that fit the model best.

Training scripts wrap a network in other modules and save it together with averages, momentum copies, losses and
optimizers. Instead of looking for known wrappers, this module tries every mapping that holds arrays with every prefix
of its names. The words in keys and prefixes only decide between candidates that fit equally well.
"""

import math
import pathlib
import re
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jax_transfer.checkpoints import renamings, torch_files
from jax_transfer.checkpoints.renamings import State
from jax_transfer.records import InputError

# Parts that wrappers insert into names: torch.compile, FSDP, checkpointed activations, DataParallel.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
# The order of preference between candidates that fit equally well: first the moving average of the weights, as in timm
# (DINO's teacher is one); then the network itself; then its momentum copy in contrastive learning, or an earlier
# network; last the state of an optimizer.
AVERAGES = {"ema", "modelema", "emamodel", "average", "averaged", "avg", "swa", "polyak", "shadow", "teacher"}
FOLLOWERS = {"momentum", "target", "key", "k", "m", "init", "initial", "pretrained", "old", "prev", "previous", "last"}
OPTIMIZERS = {"optimizer", "optimizers", "optim", "opt", "sgd", "adam", "adamw", "mu", "nu", "exp", "grad", "grads"}
# Names of the encoders of contrastive methods, whose heads distinguish images rather than classes.
CONTRASTIVE = re.compile(
    r"encoder_[qkm]\b|(base|online|momentum|target|query|key)_(encoder|network|net|model|backbone)|\bonline\b"
)
# Arrays that do not influence the features: counters, and heads used only in training.
IGNORED = re.compile(r"(^|\.)num_batches_tracked$|^(AuxLogits|aux1|aux2|aux_head)\.|^mask(ed)?_(token|embed)$")
# Beginnings of the names of arrays that may lie on the path from the image to the features. A file with such an array
# that the model lacks holds another model. Other arrays, such as those of losses, projections and decoders, are left
# out.
FEATURE_PATH = re.compile(
    r"(layers?|blocks?|stages?|stem|conv|bn|gn|norm|patch|rope|reg|register|head_dist|features|trunk|maxpool|avgpool|"
    r"pool|attn|attention|attnpool|se|aa|gamma|beta|ls|ln|ssf|freqs?|cls_pos|pre_logits|prompts?|adapt[a-z]*|lora)"
    r"(\d|[._]|$)|"
    r"\w*(norm|token|pool|embed|embedding)\d*(\.|$)"
)
# Names of segmentation heads, if their kernels are 4-dimensional, as those of convolutions are.
SEGMENTATION = re.compile(r"(^|\.)(aux_classifier|decode_head|auxiliary_head|classifier)\.")
# Names of projections that training code keeps beside the network rather than as its head.
PROJECTION = re.compile(r"(\w+_)?proj\w*|head")
# Names of parts used only in training; some also match FEATURE_PATH.
TRAINING_ONLY = re.compile(r"decoder|mask_token|proj|pred|criterion|loss")


class Found(NamedTuple):
    """The weights of a model in a file.

    Attributes:
      state: name -> float32 array, without the prefix and without arrays that are not weights.
      where: the keys of the nested mappings and the prefix of the names, for messages.
      contrastive: whether the weights are an encoder of a contrastive method, whose head does not classify.
      segments: whether the file also holds a segmentation head.
      notes: sentences on what was left out.
      projection: arrays of the projection beside the network, named as in it: "0.weight"; {} unless they are asked for.
    """

    state: State
    where: str = ""
    contrastive: bool = False
    segments: bool = False
    notes: tuple[str, ...] = ()
    projection: Mapping[str, np.ndarray] = types.MappingProxyType({})


class _Candidate(NamedTuple):
    """A mapping and a prefix under which the weights may be."""

    keys: tuple[str, ...]  # keys of the nested mappings, outermost first
    arrays: Mapping[str, Any]
    prefix: str
    names: Mapping[str, str]  # name after the prefix, without wrappers -> full name
    fitting: int  # number of names that the model also has, except for those of its head
    rank: int  # preference by the words in keys and prefix; the lowest is best

    @property
    def location(self) -> str:
        """Keys and prefix, for messages."""
        return " > ".join([*self.keys, *([self.prefix + "*"] if self.prefix else [])])


def find(
    contents: object,
    expected: frozenset[str],
    head: str,
    path: pathlib.Path,
    count_shapes: Callable[[State], int],
    keep_projection: bool = False,
) -> Found:
    """Finds the weights that fit a model best.

    Args:
      contents: the contents of the file, as `torch_files.read` returns them.
      expected: names of the model's arrays.
      head: beginning of the names in the model's classification head, such as "fc.".
      path: the file, for messages.
      count_shapes: returns the number of arrays of a state that also have the model's shapes; called if several
        candidates share equally many names with the model.
      keep_projection: whether to read a projection that lies beside the network.

    Raises:
      InputError: if there are no arrays, if any of the weights is not finite or not dense, or if there are several
        projections.
    """
    containers = list(_containers(contents))
    if not containers:
        raise InputError(f"{path}: holds no weights; {outline(contents)}.")
    backbone = frozenset(name for name in expected if not name.startswith(head))
    candidates = [candidate for keys, arrays in containers for candidate in _candidates(keys, arrays, backbone)]
    if not candidates:  # it holds another model, which the caller reports
        keys, arrays = max(containers, key=lambda container: len(container[1]))
        return Found(_read(arrays, {name: name for name in arrays if not IGNORED.search(name)}, path), " > ".join(keys))

    def is_extra(name: str) -> bool:
        """Returns whether an array that the model lacks may lie on the path to its features."""
        return name not in expected and not name.startswith(head) and _may_matter(name, expected, head)

    best, *others = _best(candidates, count_shapes, is_extra)
    ignored = {full for name, full in best.names.items() if IGNORED.search(name)}
    ours = _our_names(best.names)
    complete = backbone <= set(ours.values())
    wanted = {name: best.names[name] for name in ours if not complete or _may_matter(ours[name], expected, head)}
    known = ignored | set(wanted.values())
    left_out = [name for name in best.arrays if name not in known and not torch_files.UNREAD.search(name)]
    projection = _projection(best, left_out, path) if keep_projection else {}
    left_out = [name for name in left_out if name not in projection.values()]
    segments = any(SEGMENTATION.search(name) and len(best.arrays[name].shape) == 4 for name in left_out)
    state = _read(best.arrays, wanted, path)
    contrastive = bool(CONTRASTIVE.search(best.location.lower()))
    notes = tuple(_notes(best, others, _grouped(left_out, best.prefix)))
    return Found(state, best.location, contrastive, segments, notes, _read(best.arrays, projection, path))


def _our_names(names: Mapping[str, str]) -> dict[str, str]:
    """Returns name -> the model's name, for the arrays of a candidate."""
    return renamings.our_names([name for name in names if not IGNORED.search(name)])


def _best(
    candidates: list[_Candidate], count_shapes: Callable[[State], int], is_extra: Callable[[str], bool]
) -> list[_Candidate]:
    """Returns the candidates that fit best (several if they fit equally well), the preferred one first."""

    def with_most(candidates: list[_Candidate], count: Callable[[_Candidate], int]) -> list[_Candidate]:
        counts = [count(candidate) for candidate in candidates] if len(candidates) > 1 else [0]
        return [candidate for candidate, n in zip(candidates, counts, strict=True) if n == max(counts)]

    best = with_most(candidates, lambda candidate: candidate.fitting)
    # Then those with the fewest extra arrays, since extra arrays may be parts of a larger network.
    best = with_most(best, lambda candidate: -sum(map(is_extra, _our_names(candidate.names).values())))
    best = with_most(best, lambda candidate: count_shapes(_shapes(candidate)))
    return sorted(best, key=lambda candidate: (candidate.rank, candidate.prefix.count(".")))


def _projection(best: _Candidate, left_out: list[str], path: pathlib.Path) -> dict[str, str]:
    """Returns name in the projection -> full name, for the one among the arrays left out; {} if there is none.

    A projection lies in the network or beside it, and is an average or a momentum copy if the network is one.

    Raises:
      InputError: if there are several.
    """

    def marks(text: str) -> tuple[bool, bool]:
        words = set(re.split(r"[^a-z0-9]+", text.lower()))
        return bool(words & AVERAGES), bool(words & FOLLOWERS)

    def groups(level: str, expected: tuple[bool, bool]) -> dict[str, dict[str, str]]:
        """Returns name of a projection at a level -> {name in it: full name}."""
        found: dict[str, dict[str, str]] = {}
        for full in left_out:
            first, *rest = [part for part in full.removeprefix(level).split(".") if part not in WRAPPERS]
            if full.startswith(level) and PROJECTION.fullmatch(first.lower()) and marks(first) == expected:
                found.setdefault(level + first, {})[".".join(rest)] = full
        return found

    network = best.prefix.rstrip(".").rpartition(".")[2]
    inside, beside = (best.prefix, (False, False)), (best.prefix.removesuffix(f"{network}."), marks(network))
    found = groups(*inside) or groups(*beside)
    if len(found) > 1:
        raise InputError(
            f"{path}: holds several projections, {', '.join(sorted(found)[:4])}; load it without keep_projection."
        )
    return next(iter(found.values()), {})


def _notes(best: _Candidate, others: list[_Candidate], left_out: list[str]) -> Iterator[str]:
    """Yields sentences on the candidates and the groups of arrays that were left out."""
    if others:
        listed = ", ".join(repr(other.location or "the file itself") for other in others[:3])
        listed += ", ..." * bool(others[3:])
        yield (
            f"The weights used are those under {best.location or 'the file itself'!r}; {listed} would fit as well and "
            f"{'were' if others[1:] else 'was'} left out."
        )
        left_out = [group for group in left_out if not any(_covers(other, best, group) for other in others)]
    if left_out:
        listed = ", ".join(left_out[:6]) + (f" and {len(left_out) - 6} more" if left_out[6:] else "")
        yield f"Left out, because the model has no such parts: {listed}."


def outline(contents: object) -> str:
    """Returns a summary of a file for messages: its keys, and the first names of its arrays.

    >>> outline({"epoch": 3, "note": "x"})
    "the file's keys are 'epoch', 'note'"
    """
    keys = list(contents) if isinstance(contents, Mapping) else []
    largest = max((arrays for _, arrays in _containers(contents)), key=len, default={})
    shown = ", ".join(map(repr, keys[:6])) + (f" and {len(keys) - 6} more" if keys[6:] else "")
    names = f", with arrays such as {', '.join(list(largest)[:3])}" if largest and list(largest) != keys else ""
    return f"the file's keys are {shown}{names}" if keys else f"the file is a {type(contents).__name__} without keys"


def _containers(contents: object) -> Iterator[tuple[tuple[str, ...], Mapping[str, object]]]:
    """Yields the mappings that hold arrays, at any depth, outermost first: (keys that lead to it, name -> array)."""
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


def _candidates(keys, arrays, backbone) -> Iterator[_Candidate]:
    """Yields a candidate for each prefix that precedes at least one name of the model's backbone."""
    names_by_prefix: dict[str, dict[str, str]] = {}
    for name in arrays:
        parts = name.split(".")
        for i in range(len(parts)):
            if parts[i] not in WRAPPERS:
                inner = ".".join(part for part in parts[i:] if part not in WRAPPERS)
                names_by_prefix.setdefault("".join(f"{part}." for part in parts[:i]), {})[inner] = name
    for prefix, names in names_by_prefix.items():
        fitting = len(backbone.intersection(renamings.our_names(names).values()))
        if fitting:
            candidate = _Candidate(keys, arrays, prefix, names, fitting, 0)
            yield candidate._replace(rank=_rank(candidate))


def _words(candidate: _Candidate) -> set[str]:
    """Returns the words in the keys and the prefix of a candidate."""
    return set(re.split(r"[^a-z0-9]+", " ".join((*candidate.keys, candidate.prefix)).lower()))


def _rank(candidate: _Candidate) -> int:
    """Returns 0 for a moving average, 1 for a network, 2 for a momentum copy, 3 for the state of an optimizer."""
    words, parts = _words(candidate), candidate.prefix.split(".")
    counters = (candidate.arrays.get(".".join([*parts[:i], "n_averaged"])) for i in range(len(parts)))
    counts = [int(counter) for counter in counters if counter is not None and math.prod(counter.shape) == 1]
    if words & OPTIMIZERS or 0 in counts:  # an average that was never updated is just the initialisation
        return 3
    if words & FOLLOWERS:
        return 2
    return 0 if counts or words & AVERAGES else 1


def _may_matter(name: str, expected: frozenset[str], head: str) -> bool:
    """Returns whether an array could lie on the path from image to features, or belongs to the head."""
    if name in expected or name.startswith(head):
        return True
    if TRAINING_ONLY.match(name):
        return False
    first = name.partition(".")[0]
    return any(other.partition(".")[0] == first for other in expected) or bool(FEATURE_PATH.match(name))


def _covers(other: _Candidate, best: _Candidate, group: str) -> bool:
    """Returns whether a group of names belongs to a candidate that a note already mentions."""
    return other.keys == best.keys and other.prefix.startswith(group.partition("*")[0])


def _grouped(names: list[str], prefix: str) -> list[str]:
    """Groups names by the first part that differs from the prefix, as in module.predictor.* (4 arrays)."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parts, prefix_parts = name.split("."), prefix.split(".")
        first_different = next((i for i, (a, b) in enumerate(zip(parts, prefix_parts, strict=False)) if a != b), 0)
        groups.setdefault(".".join(parts[: first_different + 1]), []).append(name)
    return [f"{group}.* ({len(members)} arrays)" if members[1:] else members[0] for group, members in groups.items()]


def _shapes(candidate: _Candidate) -> State:
    """Returns name -> array of the right shape that takes no memory, for code that needs only names and shapes."""
    arrays = candidate.arrays
    return {name: np.broadcast_to(np.False_, tuple(arrays[full].shape)) for name, full in candidate.names.items()}


def _read(arrays: Mapping[str, Any], wanted: Mapping[str, str], path: pathlib.Path) -> State:
    """Reads arrays as float32; wanted: new name -> name in `arrays`.

    Raises:
      InputError: if an array has values that are not finite.
    """
    state = {name: torch_files.to_numpy(arrays[full], path, full) for name, full in wanted.items()}
    if not_finite := [name for name, value in state.items() if not np.isfinite(value).all()]:
        raise InputError(
            f"{path}: {not_finite[0]} holds values that are NaN or infinite ({len(not_finite)} such tensors)."
        )
    return state
