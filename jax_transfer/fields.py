"""The fields of a config, declared once by what reads them: a settings dataclass, or a function's keyword arguments.

A field's annotation says what it may hold, in types (`int | None` may be unset, `tuple[float, ...]` is a list) and in what
is attached to them by `Annotated`: a Rule for numbers, OneOf for names, UpTo for one number below another, LISTED for
tuples. From it come the section of a config with its defaults (`section`), the checks of a config (`check`), and the
same checks of settings made by hand (`check_itself`).
"""

import dataclasses
import inspect
import json
import reprlib
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

from ml_collections import ConfigDict, config_dict

from jax_transfer.choose import choose
from jax_transfer.records import UNPRINTABLE, InputError

# The largest float32.
LARGEST = 3.4028e38

# Fields whose keys are names that the user gives: targets, or what an objective calls its further data sets.
NAMED_BY_USER = ("overrides", "metrics", "feeds")


class Rule(NamedTuple):
    """What a number must fulfil, in code and in words after "must"."""

    fits: Callable[[float], bool]
    words: str


@dataclasses.dataclass(frozen=True, eq=False)  # equal only to itself: `Annotated[...] | None` needs a hash
class OneOf:
    """Text that is a key of `options`; messages call it `what`."""

    options: Mapping[str, Any]
    what: str


class UpTo(NamedTuple):
    """A number from 0 to that of another field."""

    field: str


class Listed(NamedTuple):
    """What a tuple must fulfil: to hold something, and nothing twice."""

    filled: bool = False
    unique: bool = False


class Field(NamedTuple):
    """The annotation and the default of a field; `inspect.Parameter.empty` for a field that must be given."""

    annotation: Any
    default: Any


Schema = dict[str, "Field | Schema"]  # a dictionary stands for a section


def between(least: int, most: int) -> Rule:
    return Rule(lambda x: least <= x <= most, f"lie in [{least}, {most}]")


Positive = Annotated[float, Rule(lambda x: x > 0, "be positive")]
NotNegative = Annotated[float, Rule(lambda x: x >= 0, "not be negative")]
Probability = Annotated[float, Rule(lambda x: 0 <= x < 1, "lie in [0, 1); 0 turns it off")]
Part = Annotated[float, Rule(lambda x: 0 <= x <= 1, "lie in [0, 1]")]
Count = Annotated[int, between(1, 100_000)]
Few = Annotated[int, between(1, 1000)]
Steps = Annotated[int, between(1, 10**9)]


class StudyConfig(ConfigDict):
    """A ConfigDict whose keys may hold dots, as the names of targets do (`folder:/data/v1.2/x`)."""

    def __init__(self, *arguments, allow_dotted_keys: bool = True, **named):
        super().__init__(*arguments, allow_dotted_keys=allow_dotted_keys, **named)

    if typing.TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # the types of fields are checked by `check`

    def get_type(self, key: str) -> type:
        """Returns the type of a field; `object`, a literal on the command line, for those in NAMED_BY_USER.

        The parser that ml_collections has for a ConfigDict refuses keys with dots.
        """
        return object if key in NAMED_BY_USER else super().get_type(key)


def schema(of) -> Schema:
    """Returns the fields of a settings dataclass, of settings (whose values are the defaults), or a function's parameters."""
    found: Schema = {}
    for name, parameter in inspect.signature(of if callable(of) else type(of)).parameters.items():
        default = parameter.default if callable(of) else getattr(of, name)
        annotation = type(default) if parameter.annotation is parameter.empty else parameter.annotation
        found[name] = schema(default) if dataclasses.is_dataclass(default) else Field(annotation, default)
    return found


def keywords(function: Callable) -> Schema:
    """Returns the fields of those of a function's parameters that have a default."""
    return {name: field for name, field in schema(function).items() if field.default is not inspect.Parameter.empty}


def section(fields: Schema) -> StudyConfig:
    """Returns the part of a config that holds these fields, with their defaults."""
    config = StudyConfig()
    for name, field in fields.items():
        if isinstance(field, dict):
            config[name] = section(field)
            continue
        kind, optional = _kind(field.annotation)
        if optional:
            config[name] = config_dict.placeholder(kind)
        if field.default is not None:
            config[name] = StudyConfig(field.default) if kind is dict else field.default
    return config


def _kind(annotation) -> tuple[type, bool]:
    """(the plain type of a field, whether it may be unset): (tuple, False) for tuple[float, ...]."""
    bare, _ = _split(annotation)
    if typing.get_origin(bare) in (typing.Union, types.UnionType):
        return _kind(typing.get_args(bare)[0])[0], True
    return typing.get_origin(bare) or bare, False


def _split(annotation) -> tuple[Any, tuple]:
    """(annotation, what is attached to it)."""
    if typing.get_origin(annotation) is Annotated:
        return annotation.__origin__, annotation.__metadata__
    return annotation, ()


def check_itself(settings) -> None:
    """Checks settings that were made by hand; to be called by `__post_init__`.

    Raises:
      InputError: naming the class and the field, and what was expected.
    """
    check(dataclasses.asdict(settings), schema(type(settings)), type(settings).__name__)


def make(kind: type, values: Mapping, where: str):
    """Returns the settings dataclass `kind` of the values of a config's section.

    Raises:
      InputError: naming the field in full (`where` is the section), and what was expected.
    """
    check(values, schema(kind), where)
    return _build(kind, values)


def _build(kind: type, values: Mapping):
    parts = {field.name: field.type for field in dataclasses.fields(kind)}
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    sections = {
        name: _build(parts[name], value) for name, value in plain.items() if dataclasses.is_dataclass(parts[name])
    }
    return kind(**plain | sections)


def check(values: Mapping, fields: Schema, where: str, partial: bool = False) -> None:
    """Checks that there are these fields and no others, each with a value that its annotation allows.

    Args:
      where: what messages call the whole, such as "config.probe".
      partial: fields may be missing.

    Raises:
      InputError: naming the field, and what was expected.
    """
    for name in values:
        choose(fields, name, f"field of {where}")
    if not partial and (missing := [name for name in fields if name not in values]):
        raise InputError(f"{where} lacks {', '.join(missing)}: give it.")
    for name, value in values.items():
        field, full = fields[name], f"{where}.{name}"
        if isinstance(field, dict):
            if not isinstance(value, Mapping | ConfigDict):
                raise InputError(f"{full} must hold fields, not {shown(value)}.")
            check(dict(value), field, full, partial)
            continue
        _check_value(value, field.annotation, full, full, field.default)
        for above in (rule.field for rule in _split(field.annotation)[1] if isinstance(rule, UpTo)):
            if above in values and not 0 <= value <= values[above]:
                raise InputError(f"{full} = {value}: must lie between 0 and {above} = {values[above]}.")


def _check_value(value, annotation, where: str, field: str, default) -> None:
    """`field` is what messages call the whole of which `where` is an element."""
    annotation, rules = _split(annotation)
    origin, parts = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        if value is not None:
            _check_value(value, parts[0], where, field, default)
        return
    example = f", such as {default!r}" if default is not inspect.Parameter.empty else ""
    if value is None:
        raise InputError(f"{where} is unset: give it a value{example}.")
    if origin is tuple:
        kind = parts[0] if parts else type(default[0])
        if not isinstance(value, tuple | list):
            name = _kind(kind)[0].__name__
            raise InputError(f"{where} = {shown(value)}: must be a tuple of {name}{example}.")
        for place, part in enumerate(value):
            _check_value(part, kind, f"{where}[{place}]", field, inspect.Parameter.empty)
        for rule in rules:
            _check_listed(value, rule, where)
    elif origin is dict and parts:
        if not isinstance(value, Mapping | ConfigDict):
            raise InputError(f"{where} = {shown(value)}: must hold names and what belongs to each.")
        for key, part in dict(value).items():
            _check_type(key, str, f"a name in {where}")
            _check_value(part, parts[1], f"{where}[{key!r}]", f"{where}[{key!r}]", inspect.Parameter.empty)
    elif dataclasses.is_dataclass(origin):
        _check_type(value, dict, where)
        check(dict(value), schema(origin), where)
    else:
        _check_type(value, origin, where)
        for rule in rules:
            _check_rule(value, rule, where, field)


def _check_type(value, kind: type, where: str) -> None:
    accepted = {float: (float, int), dict: (Mapping, ConfigDict)}.get(kind, (kind,))
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{where} = {shown(value)}: must be of type {kind.__name__}, not {type(value).__name__}.")
    if kind is str and UNPRINTABLE.search(value):
        raise InputError(f"{where} = {shown(value)}: must hold no control characters, and be valid Unicode.")
    if kind in (int, float) and not abs(value) <= LARGEST:
        raise InputError(f"{where} = {shown(value)}: must be finite.")


def _check_rule(value, rule, where: str, field: str) -> None:
    if isinstance(rule, OneOf):
        choose(rule.options, value, f"{rule.what} ({field})")
    elif isinstance(rule, Rule) and not rule.fits(value):
        raise InputError(f"{where} = {shown(value)}: must {rule.words}.")


def _check_listed(value, rule, where: str) -> None:
    if isinstance(rule, Listed) and rule.filled and not len(value):
        raise InputError(f"{where} is empty: name at least one.")
    if isinstance(rule, Listed) and rule.unique:
        check_no_twice(value, where)


def check_no_twice(names, where: str) -> None:
    """Raises InputError if a name occurs twice."""
    if twice := [name for name in dict.fromkeys(names) if list(names).count(name) > 1]:
        raise InputError(f"{where} names {twice[0]!r} twice.")


def shown(value) -> str:
    """How a message shows a value that may be anything."""
    try:
        return reprlib.repr(value.to_dict() if isinstance(value, ConfigDict) else value)
    except ValueError:  # a whole number of more digits than Python prints
        return f"a {type(value).__name__}"


def check_path(path: str, known: Mapping) -> None:
    """Checks a field named on the command line, such as "config.pretrain.epochs".

    Raises:
      InputError: if there is no such field; lists those that exist beside it.
    """
    where, *names = path.split(".")
    for name in names:
        if not isinstance(known, Mapping):
            raise InputError(f"{where} is a value and has no field {name!r}.")
        known, where = choose(known, name, f"field of {where}"), f"{where}.{name}"
        if name in NAMED_BY_USER:
            return


def to_json(config: ConfigDict) -> dict:
    """The config as `config.json` holds it: plain, tuples as lists."""
    return json.loads(json.dumps(config.to_dict()))
