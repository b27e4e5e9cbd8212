"""Configs with any value in any field: a one-line error names it, or everything the stages need can be built."""

import copy
import json
import math
import pickle
import re
import string
import sys

import jax
import numpy as np
import pytest
from absl import flags
from hypothesis import example, given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from helpers.hostile import accepted_or_refused, examples
from helpers.source_files import REPOSITORY
from jax_transfer import main
from jax_transfer.fields import NAMED_BY_USER, to_json
from jax_transfer.ranking import command
from jax_transfer.records import InputError
from jax_transfer.study import checks, settings
from jax_transfer.study.config import BY_TARGET, default_config, differences
from jax_transfer.study.epochs import evaluated_numbers
from jax_transfer.study.workspace import Workspace
from jax_transfer.training.optimizers import make_optimizer, make_schedule

WORDS = st.sampled_from(
    ("adam", "adamw", "cosine", "step", "mixup", "flip", "rand_augment", "resnet18", "vit_tiny_patch4_32",
     "imagenet", "cifar",
     "lanczos", "all", "every:2", "log", "0,2", "9", "skip", "logme", "finetune_1", "probe_converged", "report",
     "pretrain",
     "embedded:digits", "embedded:digits?per_class=3", "embedded:digits?test=1", "embedded:digits?train=5", "")
)  # fmt: skip


def study():
    """Returns a valid config of a small study."""
    config = default_config()
    config.model.name, config.model.stem, config.model.width = "resnet10", "cifar", 8.0
    config.source.dataset = "embedded:digits?train=256&test=64"
    config.targets = ("embedded:digits?train=200&test=64",)
    config.preprocessing.image_size = 8
    config.pretrain.epochs, config.pretrain.batch_size = 2, 32
    config.overrides = {config.targets[0]: {"probe": {"epochs": 7}, "finetune": {"optimizer": {"momentum": 0.5}}}}
    config.metrics = {config.targets[0]: "mean_class_accuracy"}
    config.paper = ({"target": "", "epoch": 1, "what": "source", "accuracy": 0.5, "where": "Table 1"},)
    return config


def ranking():
    config = command.default_config()
    config.checkpoints, config.target = "random:resnet10", "embedded:digits?train=160&test=40"
    return config


def leaves(fields, path=()):
    """Yields the paths of all fields and sections."""
    for name, value in fields.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from leaves(value, (*path, name))


FIELDS = {"study": sorted(leaves(study().to_dict())), "ranking": sorted(leaves(ranking().to_dict()))}
NUMBERS = st.sampled_from(
    (
        0,
        -1,
        1,
        2,
        3.5,
        -0.0,
        0.5,
        1.0,
        1e-30,
        1e30,
        1e300,
        10**9,
        2**31,
        2**63,
        2**64,
        10**30,
        math.nan,
        math.inf,
        -math.inf,
    )
)
TEXTS = st.one_of(
    st.sampled_from(
        ("", " ", "8", "all", "every:0", "every:-1", "every:", "0,1,5", "1,,2", "log", "a\nb", "\x00", "\x1b[31m",
         "\ud800",
         "None", "flip", "adam", "../..", "embedded:digits", "~nobody/x", "1" * 5000)
    ),
    st.text(max_size=8),
)  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), NUMBERS, TEXTS, st.binary(max_size=3), st.just(np.float32(1)), st.just(object)
)
WRONG = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(string.ascii_letters, min_size=1, max_size=6), inner, max_size=2),
    ),
    max_leaves=4,
)


def value_at(fields, path):
    for name in path:
        fields = fields[name]
    return fields


def near(kind, path):
    """Draws values of the type of the field or a similar one, which are easily accepted by mistake."""
    value = value_at(KINDS[kind][0]().to_dict(), path)
    if isinstance(value, bool):
        return st.one_of(st.booleans(), NUMBERS)
    if isinstance(value, float | int | None):
        return st.one_of(st.integers(-2, 600), st.floats(0, 1), NUMBERS)
    if isinstance(value, tuple):
        parts = st.one_of(st.sampled_from(value), NUMBERS, WORDS) if value else st.one_of(NUMBERS, WORDS)
        return st.lists(parts, max_size=3).map(tuple)
    return WORDS


def put(config, path, value):
    """Sets a field without the type checks of ConfigDict, as a hostile config file can."""
    *parents, name = path
    with config.unlocked(), config.ignore_type():
        section = config
        for parent in parents:
            section = section[parent]
        section[name] = value


def build(config, workdir):
    """Builds everything cheap that the stages derive from a config."""
    json.dumps(to_json(config), ensure_ascii=False).encode()
    settings.preprocessing(config)
    jax.random.key(config.seed)
    np.uint32(config.seed + config.finetune.num_seeds)
    evaluated_numbers(config)
    for optimizer in (
        settings.pretrain_optimizer(config.pretrain),
        *(settings.finetune_settings(config, target).optimizer for target in config.targets),
    ):
        schedule = make_schedule(optimizer, 100)
        assert all(0 <= float(schedule(step)) < math.inf for step in (0, 50, 99)), optimizer
        make_optimizer(optimizer, 100).init({"layer": {"kernel": np.ones((2, 2), np.float32)}})
    for target in config.targets:
        probing = settings.probe_settings(config, target)
        assert all(np.isfinite(np.float32(x)) for x in (*probing.learning_rates, *probing.l2))
    work = Workspace(config, workdir)
    checks.check_data(work)
    work.source_net(work.pretrainings[0])


def check_study(config, workdir):
    checks.check(config)
    build(config, workdir)
    return True


def check_ranking(config, workdir):
    command.check(config)
    json.dumps(to_json(config), ensure_ascii=False).encode()
    return True


KINDS = {"study": (study, check_study), "ranking": (ranking, check_ranking)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_valid_config_passes(kind, tmp_path):
    make, check = KINDS[kind]
    assert check(make(), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_any_value_in_any_field(kind, tmp_path):
    make, check = KINDS[kind]

    pairs = st.sampled_from(FIELDS[kind]).flatmap(lambda path: st.tuples(st.just(path), near(kind, path) | WRONG))

    @examples(250)
    @given(pairs)
    def tried(pair):
        (path, value), config = pair, make()
        put(config, path, value)
        names = {path[-1], *path[-2:-1], value if isinstance(value, str) and value else path[-1]}
        if path[0] in (
            "targets",
            "source",
            "overrides",
            "metrics",
        ):  # errors about unknown data sets contain only their names
            names |= {"data set", "TFDS", "folder", "embedded", "option", "config.targets"}
        accepted_or_refused(f"config: a value ({kind})", lambda: check(config, tmp_path), *names)

    tried()


@pytest.mark.parametrize("kind", KINDS)
def test_missing_added_and_misspelt_fields(kind, tmp_path):
    make, check = KINDS[kind]

    @examples(60)
    @given(
        st.sampled_from([path for path in FIELDS[kind] if not {*path[:-1], path[0]} & {*BY_TARGET, *NAMED_BY_USER}]),
        st.sampled_from(("missing", "added", "misspelt", "section")),
        st.text(string.ascii_letters + "é\n \ud800", min_size=1, max_size=9),
    )
    def tried(path, what, word):
        config = make()
        *parents, name = path
        section = config
        for parent in parents:
            section = section[parent]
        expected = name
        with config.unlocked(), config.ignore_type():
            if what in ("missing", "misspelt"):
                value = section[name]
                del section[name]
            if what == "misspelt":
                section[name + word[0]], expected = value, ascii(name + word[0])[1:-1]
            if what == "added":
                section[word + "_"], expected = 1, ascii(word + "_")[1:-1]
            if what == "section":
                section[name] = ConfigDict({"x": 1})
        found = accepted_or_refused(
            f"config: {what} ({kind})", lambda: check(config, tmp_path), expected, *parents[-1:], name
        )
        assert found is None

    tried()


INVALID = [
    ("pretrain.batch_size", "8"),
    ("pretrain.epochs", 2.5),
    ("pretrain.optimizer.momentum", None),
    ("pretrain.optimizer.learning_rate", math.nan),
    ("pretrain.augment", "flip"),
    ("seed", -1),
    ("seed", 2**63),
    ("probe.l2", (1e-4, math.nan)),
    ("probe.learning_rates", "0.1"),
    ("preprocessing.image_size", 10**9),
    ("preprocessing.crop_fraction", 1e-9),
    ("preprocessing.mean", (0.5, 0.5)),
    ("stages", ("pretrain", "pretrain")),
    ("targets", "embedded:digits"),
    ("pretrain.optimizer.decay_norm_and_bias", "no"),
    ("pretrain.optimizer.warmup", 7.0),
    ("pretrain.epochs", 10**12),
    ("trajectory.epochs", "every:-1"),
    ("model.width", 8.5),
    ("model.others", ({"name": "resnet10", "num_classes": 3},)),
    ("model.others", ({"name": "mobilenet_v1", "width": "8"},)),
    ("paper", ({"target": "", "epoch": 1, "what": "knn", "accuracy": 0.5, "where": ""},)),
    ("paper", (5,)),
    ("overrides", None),
    ("overrides", {"embedded:digits?train=200&test=64": {"prob": {"epochs": 3}}}),
    ("overrides", {"embedded:digits?train=200&test=64": {"probe": {"epochs": "3"}}}),
    ("overrides", {"embedded:digits?train=200&test=64": 5}),
    ("overrides", {"folder:/data/v1.2/x": {"probe": {"epochs": 3}}}),
    ("metrics", None),
    ("metrics", ("accuracy",)),
    ("metrics", {"embedded:digits?train=200&test=64": "top5"}),
    ("metrics", {"embedded:digits?train=200&test=64": None}),
    ("metrics", {"embedded:digits?train=200&test=64": {"probe": "accuracy"}}),
    ("metrics", {"embedded:digits": "accuracy"}),
    ("metrics", {"folder:/data/v1.2/x": "accuracy"}),
]


@pytest.mark.parametrize(("path", "value"), INVALID)
def test_invalid_values_are_refused_before_the_run(path, value):
    config = study()
    put(config, path.split("."), copy.deepcopy(value))
    with pytest.raises(InputError, match=path.split(".")[-1]) as caught:
        checks.check(config)
    assert "\n" not in str(caught.value)


# --- the command line

FLAGS = [".".join(("config", *path)) for path in FIELDS["study"]]


def parse(arguments, config="configs/quickstart.py:smoke"):
    """Parses and checks the arguments like the command, without running anything."""
    sys.argv = ["main", f"--config={config}", "--workdir=unused", *arguments]
    main._define_flags()
    main._parse_flags(sys.argv)
    checks.check(main.FLAGS.config)
    return True


@pytest.fixture
def in_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", sys.argv)


@pytest.mark.usefixtures("in_repository")
def test_any_flag_with_any_value():
    @examples(150)
    @given(
        st.sampled_from(FLAGS),
        st.one_of(TEXTS, WRONG.map(str)),
        st.sampled_from(("", "", "", "x", ".x", ".name", "[0]")),
    )
    @example("config.pretrain.augment", "flip", "")
    @example("config.pretrain.augment", "('fli',)", "")
    @example("config.probe.l2", "(nan,)", "")
    def tried(flag, value, tail):
        accepted_or_refused("command line: a flag", lambda: parse([f"--{flag}{tail}={value}"]))

    tried()


# Names that the folder of a target may have.
NAMES = st.one_of(
    st.sampled_from(
        ("v1.2/x", "..", "a.b.c", ".hidden", "1.5", "it's.here", 'a"b.c', "鸟类.v2", "a b.jpg", "x[0].y", "a=b.c")
    ),
    st.text("ab./ -_'\"[]{}=,:é鸟0", min_size=1, max_size=12),
).map(lambda name: f"folder:/data/{name}")


def by_target(target):
    """Returns the overrides and metrics of a target."""
    overrides = {target: {"probe": {"epochs": 7}, "finetune": {"optimizer": {"momentum": 0.5}}}}
    return overrides, {target: "mean_class_accuracy"}


def assert_read(config, target):
    """Asserts that the fields of a target reach its settings and config.json."""
    overrides, metrics = by_target(target)
    assert settings.probe_settings(config, target).epochs == 7
    assert settings.finetune_settings(config, target).optimizer.momentum == 0.5
    assert config.metrics.get(target) == "mean_class_accuracy" and target in config.metrics
    written = json.loads(json.dumps(to_json(config), ensure_ascii=False))
    assert (written["overrides"], written["metrics"]) == (overrides, metrics)
    assert not differences(written, to_json(config))


def test_targets_with_dots_in_their_names_have_own_fields():
    @examples(60)
    @given(NAMES)
    def tried(target):
        overrides, metrics = by_target(target)
        whole, one_by_one = study(), study()
        for config in (whole, one_by_one):
            config.overrides, config.metrics, config.targets = {}, {}, (target,)
        whole.overrides, whole.metrics = overrides, metrics
        one_by_one.overrides[target], one_by_one.metrics[target] = overrides[target], metrics[target]
        copies = (copy.deepcopy(whole), whole.copy_and_resolve_references(), pickle.loads(pickle.dumps(whole)))
        for config in (whole, one_by_one, *copies):
            checks.check(config)
            assert_read(config, target)

    tried()


@pytest.mark.usefixtures("in_repository")
def test_targets_with_dots_on_the_command_line():
    @examples(40)
    @given(NAMES)
    def tried(target):
        overrides, metrics = by_target(target)
        fields = {"targets": (target,), "overrides": overrides, "metrics": metrics}
        for name in [name for name in flags.FLAGS if name.startswith("config.")]:
            delattr(flags.FLAGS, name)  # from the previous example
        parse([f"--config.{name}={value!r}" for name, value in fields.items()])
        assert_read(main.FLAGS.config, target)

    tried()


@pytest.mark.parametrize("field", BY_TARGET)
def test_a_field_of_an_unknown_target_lists_the_targets(field):
    config = study()
    value = {
        "overrides": {},
        "metrics": "accuracy",
        "select.labels": ("jay",),
        "fewshot.seen": ("1",),
        "fewshot.unseen": ("1",),
    }[field]
    put(config, field.split("."), {"folder:/data/v1.3/x": value})
    with pytest.raises(
        InputError, match=rf"config\.{re.escape(field)}.*v1\.3/x.*Valid: embedded:digits\?train=200&test=64"
    ):
        checks.check(config)


def test_an_unknown_metric_lists_the_valid_ones():
    config = study()
    config.metrics = {config.targets[0]: "mean_class_acuracy"}
    with pytest.raises(InputError, match=r"Did you mean 'mean_class_accuracy'.*Valid: accuracy, mean_class_accuracy"):
        checks.check(config)


@pytest.mark.usefixtures("in_repository")
@pytest.mark.parametrize(
    "text",
    ["def get_config(:", "import no_such_module", "x = 1 / 0", "no_such_name", "def get_config(): return 5", "", "\x00",
     "def get_config(): return {}['a']", "def get_config(): raise RuntimeError", "def get_config(): return None",
     "def get_config(): return {'checkpoints': ''}", "def get_config(): return [][1]"],
)  # fmt: skip
def test_an_invalid_config_file_is_a_one_line_error(text, tmp_path):
    (tmp_path / "bad.py").write_text(text)
    found = accepted_or_refused("command line: a config file", lambda: parse([], str(tmp_path / "bad.py")), "--config")
    assert found is None
