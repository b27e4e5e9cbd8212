"""Fields of a config, declared where they are read: in a settings dataclass or as keyword arguments of a function.

The annotation of a field describes its valid values. It contains a type: `int | None` may be unset, and a tuple
holds any number of values. `Annotated` adds conditions: Rule for numbers, OneOf for names, Parsed for names with
options, UpTo for numbers limited by another field, and Listed for tuples. The same declaration serves to build a
section of a config with its defaults (`section`), to check a config (`check`), and to check settings that are
constructed directly (`check_itself`).
"""

import dataclasses
import inspect
import json
import reprlib
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, NamedTuple

from ml_collections import ConfigDict, config_dict

from jax_transfer.choose import choose
from jax_transfer.records import UNPRINTABLE, InputError

LARGEST_FLOAT32 = 3.4028e38

# Fields whose keys are names that the user chooses: targets, selections, or the additional data sets of an objective.
NAMED_BY_USER = ("overrides", "metrics", "feeds", "selections", "labels")


class Rule(NamedTuple):
    """Condition on a number: a predicate, and words that describe it after "must", such as "be positive"."""

    fits: Callable[[float], bool]
    words: str


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity: `Annotated[...] | None` needs a hash
class OneOf:
    """Condition on a string: it is a key of `options`. Messages describe the string with the words in `label`."""

    options: Mapping[str, Any]
    label: str


class Parsed(NamedTuple):
    """Condition on a string: parse(string, description) raises no InputError. The words in `label` describe it."""

    parse: Callable[[str, str], Any]
    label: str


class UpTo(NamedTuple):
    """Condition on a number: it lies between 0 and the value of another field, or the smallest one of a tuple."""

    field: str


class Listed(NamedTuple):
    """Conditions on a tuple: not empty if `filled`, no duplicates if `unique`; names in `first` only as its first."""

    filled: bool = False
    unique: bool = False
    first: Collection[str] = ()


class Field(NamedTuple):
    """Annotation and default of a field. The default is `inspect.Parameter.empty` for a required field."""

    annotation: Any
    default: Any


Schema = dict[str, "Field | Schema"]  # name -> field, or a nested schema for a section


def between(least: int, most: int) -> Rule:
    """Returns the rule that a number lies in the closed interval [least, most].

    >>> between(1, 1000).words
    'lie in [1, 1000]'
    """
    return Rule(lambda x: least <= x <= most, f"lie in [{least}, {most}]")


Positive = Annotated[float, Rule(lambda x: x > 0, "be positive")]
NotNegative = Annotated[float, Rule(lambda x: x >= 0, "not be negative")]
Probability = Annotated[float, Rule(lambda x: 0 <= x < 1, "lie in [0, 1); 0 turns it off")]
Part = Annotated[float, Rule(lambda x: 0 <= x <= 1, "lie in [0, 1]")]
Count = Annotated[int, between(1, 100_000)]
Few = Annotated[int, between(1, 1000)]
Steps = Annotated[int, between(1, 10**9)]


class StudyConfig(ConfigDict):
    """A ConfigDict whose keys may contain dots, because the names of targets can (`folder:/data/v1.2/x`)."""

    def __init__(self, *args, allow_dotted_keys: bool = True, **kwargs):
        super().__init__(*args, allow_dotted_keys=allow_dotted_keys, **kwargs)

    if typing.TYPE_CHECKING:
        # The types of fields are checked by `check`.
        def __getattr__(self, name: str) -> Any: ...
        def __getitem__(self, key) -> Any: ...

    def get_type(self, key: str) -> type:
        """Returns the type of a field, which decides how the command line parses it.

        For fields in NAMED_BY_USER the type is `object`, which is parsed as a Python literal, because ml_collections'
        parser for a ConfigDict rejects keys with dots.
        """
        return object if key in NAMED_BY_USER else super().get_type(key)


def schema(of) -> Schema:
    """Returns the fields that a settings dataclass or a function declares.

    >>> schema(lambda epochs=5, rate=0.1: None)["epochs"].default
    5

    Args:
      of: a settings dataclass, an instance of one (whose values are then the defaults), or a function.
    """
    fields: Schema = {}
    for name, parameter in inspect.signature(of if callable(of) else type(of)).parameters.items():
        default = parameter.default if callable(of) else getattr(of, name)
        annotation = type(default) if parameter.annotation is parameter.empty else parameter.annotation
        fields[name] = schema(default) if dataclasses.is_dataclass(default) else Field(annotation, default)
    return fields


def keywords(function: Callable) -> Schema:
    """Returns the fields for those parameters of a function that have a default.

    >>> keywords(lambda net, temperature=0.2: None)
    {'temperature': Field(annotation=<class 'float'>, default=0.2)}
    """
    return {
        name: field
        for name, field in schema(function).items()
        if not isinstance(field, Field) or field.default is not inspect.Parameter.empty
    }


def section(fields: Schema) -> StudyConfig:
    """Returns a section of a config that holds these fields, set to their defaults.

    >>> section(keywords(lambda epochs=5, rate=0.1: None)).to_dict()
    {'epochs': 5, 'rate': 0.1}
    """
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
    """Returns the plain type of a field and whether it may be unset, such as (tuple, False) for tuple[float, ...]."""
    bare, _ = _split(annotation)
    if typing.get_origin(bare) in (typing.Union, types.UnionType):
        return _kind(typing.get_args(bare)[0])[0], True
    return typing.get_origin(bare) or bare, False


def _split(annotation) -> tuple[Any, tuple]:
    """Returns the type inside an `Annotated` and the conditions attached to it; () for any other annotation."""
    if typing.get_origin(annotation) is Annotated:
        return annotation.__origin__, annotation.__metadata__
    return annotation, ()


def check_itself(settings) -> None:
    """Checks settings that are constructed directly, without a config. Call it in `__post_init__`.

    Raises:
      InputError: if a value is not valid. The message names the class, the field and what was expected.
    """
    check(dataclasses.asdict(settings), schema(type(settings)), type(settings).__name__)


def make(kind: type, values: Mapping, where: str):
    """Builds a settings dataclass from the values of a section of a config, after checking them.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Settings:
    ...     epochs: Count = 5
    >>> make(Settings, {"epochs": 7}, "config.probe")
    Settings(epochs=7)

    Args:
      kind: the settings dataclass.
      values: field -> value.
      where: the name of the section in messages.

    Raises:
      InputError: if a value is not valid. The message names the field with its section, and what was expected.
    """
    check(values, schema(kind), where)
    return _build(kind, values)


def _build(kind: type, values: Mapping):
    types: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(kind)}
    return kind(**{name: _built(types[name], value) for name, value in values.items()})


def _built(annotation, value):
    """Returns a value of a field, with settings dataclasses in place of the dictionaries that a config holds."""
    annotation, _ = _split(annotation)
    origin, arguments = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _built(arguments[0], value)
    if dataclasses.is_dataclass(origin):
        return _build(typing.cast(type, origin), value)
    if origin is dict and arguments:
        return {name: _built(arguments[1], element) for name, element in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_built(arguments[0], element) for element in value) if arguments else tuple(value)
    return value


def check(values: Mapping, fields: Schema, where: str, partial: bool = False) -> None:
    """Checks that a section holds exactly these fields, each with a valid value.

    >>> check({"epochs": 0}, keywords(lambda epochs=5: None), "config.probe")
    >>> check({"epochs": "7"}, keywords(lambda epochs=5: None), "config.probe")
    Traceback (most recent call last):
      ...
    jax_transfer.records.InputError: config.probe.epochs = '7': must be of type int, not str.

    Args:
      values: field -> value.
      fields: the fields that the section declares.
      where: the name of the section in messages, such as "config.probe".
      partial: whether fields may be missing.

    Raises:
      InputError: if a field is unknown or missing, or its value is not valid. The message names the field and what was
        expected.
    """
    for name in values:
        choose(fields, name, f"field of {where}")
    if not partial and (missing := [name for name in fields if name not in values]):
        raise InputError(f"{where} lacks {', '.join(missing)}: add what is missing.")
    for name, value in values.items():
        field, full_name = fields[name], f"{where}.{name}"
        if isinstance(field, dict):
            if not isinstance(value, Mapping | ConfigDict):
                raise InputError(f"{full_name} must be a section with fields, not {_short_repr(value)}.")
            check(dict(value), field, full_name, partial)
            continue
        _check_value(value, field.annotation, full_name, full_name, field.default)
    for name, limit in _limits(values, fields):  # after all values, since a limit must be valid itself
        most = values[limit]
        if not 0 <= values[name] <= (min(most) if isinstance(most, tuple | list) else most):
            raise InputError(f"{where}.{name} = {values[name]}: must lie between 0 and {limit} = {most}.")


def _limits(values: Mapping, fields: Schema) -> list[tuple[str, str]]:
    """Lists the fields that another field limits, each with the name of that field, if the section holds both."""
    return [
        (name, rule.field)
        for name in values
        if isinstance(field := fields[name], Field)
        for rule in _split(field.annotation)[1]
        if isinstance(rule, UpTo) and rule.field in values
    ]


def _check_value(value, annotation, where: str, field: str, default) -> None:
    """Checks a value, or one element of it.

    Args:
      where: the name of the element in messages, such as "config.probe.l2[0]".
      field: the name of the field that holds it, such as "config.probe.l2".
      default: the field's default, shown as an example of a valid value; `inspect.Parameter.empty` for none.
    """
    annotation, rules = _split(annotation)
    origin, arguments = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        if value is not None:
            _check_value(value, arguments[0], where, field, default)
        return
    example = f", such as {default!r}" if default is not inspect.Parameter.empty else ""
    if value is None:
        raise InputError(f"{where} is unset: give it a value{example}.")
    if origin is tuple:
        kind: Any = arguments[0] if arguments else type(default[0])  # pyright: ignore  a tuple has an element
        if not isinstance(value, tuple | list):
            name = _kind(kind)[0].__name__
            raise InputError(f"{where} = {_short_repr(value)}: must be a tuple of {name}{example}.")
        for index, element in enumerate(value):
            _check_value(element, kind, f"{where}[{index}]", field, inspect.Parameter.empty)
        for rule in rules:
            _check_listed(value, rule, where)
    elif origin is dict and arguments:
        if not isinstance(value, Mapping | ConfigDict):
            raise InputError(f"{where} = {_short_repr(value)}: must be a dictionary from names to values.")
        for key, element in dict(value).items():
            name = f"a name in {where}"
            _check_value(key, arguments[0], name, name, inspect.Parameter.empty)
            _check_value(element, arguments[1], f"{where}[{key!r}]", f"{where}[{key!r}]", inspect.Parameter.empty)
    elif dataclasses.is_dataclass(origin):
        _check_type(value, dict, where)
        _check_entry(dict(value), schema(origin), where)
    else:
        _check_type(value, origin, where)
        for rule in rules:
            _check_rule(value, rule, where, field)


def _check_entry(values: Mapping, fields: Schema, where: str) -> None:
    """Checks an entry of a list or dictionary, in which fields with a default may be missing."""
    required = [
        n for n, field in fields.items() if isinstance(field, Field) and field.default is inspect.Parameter.empty
    ]
    if missing := [name for name in required if name not in values]:
        raise InputError(f"{where} lacks {', '.join(missing)}: add what is missing.")
    check(values, fields, where, partial=True)


def _check_type(value, kind: type, where: str) -> None:
    accepted: tuple[type, ...] = {float: (float, int), dict: (Mapping, ConfigDict)}.get(kind, (kind,))
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise InputError(
            f"{where} = {_short_repr(value)}: must be of type {kind.__name__}, not {type(value).__name__}."
        )
    if isinstance(value, str) and kind is str and UNPRINTABLE.search(value):
        raise InputError(f"{where} = {_short_repr(value)}: must be valid Unicode without control characters.")
    if isinstance(value, int | float) and not abs(value) <= LARGEST_FLOAT32:
        raise InputError(f"{where} = {_short_repr(value)}: must be finite.")


def _check_rule(value, rule, where: str, field: str) -> None:
    if isinstance(rule, OneOf):
        choose(rule.options, value, f"{rule.label} ({field})")
    elif isinstance(rule, Parsed):
        rule.parse(value, f"{rule.label} ({field})")
    elif isinstance(rule, Rule) and not rule.fits(value):
        raise InputError(f"{where} = {_short_repr(value)}: must {rule.words}.")


def _check_listed(value, rule, where: str) -> None:
    if isinstance(rule, Listed) and rule.filled and not len(value):
        raise InputError(f"{where} is empty: name at least one.")
    if isinstance(rule, Listed) and rule.unique:
        check_unique(value, where)
    if isinstance(rule, Listed) and (late := [name for name in value[1:] if name in rule.first]):
        if late[0] == value[0]:
            raise InputError(f"{where} lists {late[0]!r} twice: once is enough.")
        raise InputError(f"{where} lists {late[0]!r} after {value[0]!r}: list it first, its only place.")


def check_unique(names, where: str) -> None:
    """Checks that no name occurs twice.

    >>> check_unique(("a", "b"), "config.source")

    Raises:
      InputError: if a name occurs twice.
    """
    if duplicates := [name for name in dict.fromkeys(names) if list(names).count(name) > 1]:
        raise InputError(f"{where} lists {duplicates[0]!r} twice.")


def _short_repr(value) -> str:
    """Returns the repr of any value, shortened to fit in a message."""
    try:
        return reprlib.repr(value.to_dict() if isinstance(value, ConfigDict) else value)
    except ValueError:  # an integer with more digits than Python prints
        return f"a {type(value).__name__}"


def check_path(path: str, known: Mapping) -> None:
    """Checks that a field named on the command line exists.

    >>> check_path("config.pretrain.epoch", {"pretrain": {"epochs": 5}})
    Traceback (most recent call last):
      ...
    jax_transfer.records.InputError: Unknown field of config.pretrain: 'epoch'. Did you mean 'epochs'? Valid: epochs.

    Args:
      path: the field, such as "config.pretrain.epochs".
      known: the fields of the config, nested.

    Raises:
      InputError: if the field does not exist. The message lists the fields of its section.
    """
    where, *names = path.split(".")
    for name in names:
        if not isinstance(known, Mapping):
            raise InputError(f"{where} is a value and has no field {name!r}.")
        known, where = choose(known, name, f"field of {where}"), f"{where}.{name}"
        if name in NAMED_BY_USER:
            return


def to_json(config: ConfigDict) -> dict:
    """Converts a config to the plain dictionary that `config.json` holds, with tuples as lists.

    >>> to_json(StudyConfig({"stages": ("probe", "scores")}))
    {'stages': ['probe', 'scores']}
    """
    return json.loads(json.dumps(config.to_dict()))
