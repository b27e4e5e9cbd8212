"""Settings are validated in code, in configs and for single targets; configs of earlier versions can still be read."""

import contextlib
import copy
import json
import pathlib
from typing import Annotated

import pytest

from jax_transfer import fields
from jax_transfer.fields import Listed, OneOf, Part, Probability, to_json
from jax_transfer.records import InputError
from jax_transfer.study import checks, config, settings
from jax_transfer.study.config import default_config, differences
from jax_transfer.study.settings import DataSettings, PretrainSettings, SpectralSettings
from jax_transfer.training.objectives import OBJECTIVES
from jax_transfer.training.optimizers import OptimizerSettings
from jax_transfer.transfer.finetune import FinetuneSettings
from jax_transfer.transfer.probe import ProbeSettings

# The default config.json of the version before objectives had sections.
EARLIER = json.loads((pathlib.Path(__file__).parent / "earlier_config.json").read_text())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProbeSettings(epochs=0), r"ProbeSettings\.epochs = 0: must lie in \[1, 100000\]\.$"),
        (lambda: ProbeSettings(learning_rates=()), r"ProbeSettings\.learning_rates is empty"),
        (lambda: ProbeSettings(learning_rates=(0.1, 0.0)), r"ProbeSettings\.learning_rates\[1\] = 0\.0: .* positive"),
        (lambda: ProbeSettings(methods=("probe", "probe")), r"ProbeSettings\.methods lists 'probe' twice"),
        (lambda: ProbeSettings(l2=0.1), r"ProbeSettings\.l2 = 0\.1: must be a tuple of float, such as \(0\.0001,\)"),
        (lambda: FinetuneSettings(batch_size=True), r"FinetuneSettings\.batch_size = True: must be of type int"),
        (lambda: FinetuneSettings(augment=("fli",)), r"augmentation \(FinetuneSettings\.augment\): 'fli'.*'flip'"),
        (lambda: OptimizerSettings(name="lion"), r"optimizer \(OptimizerSettings\.name\): 'lion'"),
        (lambda: OptimizerSettings(min_learning_rate=0.2), "min_learning_rate = 0.2: .* 0 and learning_rate = 0.1"),
        (lambda: OptimizerSettings(head_learning_rate_factor=-1.0), "head_learning_rate_factor = -1.0"),
        (lambda: PretrainSettings(objective="none"), "objective"),
        (lambda: SpectralSettings(embedded_images=3), "embedded_images = 3: must be 4 to 5,000, or 0"),
        (lambda: DataSettings(on_corrupt="ignore"), "on_corrupt"),
    ],
)
def test_settings_validate_their_fields(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ("nleep?energy=0.5&components_per_class=2", None),
        ("finetune_5", None),
        ("logmee", r"^Unknown score \(config\.scores\): 'logmee'.*'logme'.* Valid: .*finetune_1.*transrate"),
        ("logmee?k=1", r"^Unknown score \(config\.scores\): 'logmee'.*'logme'"),
        ("finetune_5?k=1", r"^'finetune_5\?k=1': this score has no options: write 'finetune_5'\.$"),
        ("nleep?energy=2", r"^'nleep\?energy=2': energy is 2"),
        ("nleep?k=1", "Unknown option .* Valid: components_per_class, energy"),
    ],
)
def test_a_score_may_have_options(score, message):
    scores = config.schema()["scores"]
    with pytest.raises(InputError, match=message) if message else contextlib.nullcontext():
        fields.check({"scores": ("leep", score)}, {"scores": scores}, "config")


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ((0.1, 0.3), None),
        ((0.3, 0.1), r"min_learning_rate = 0\.2: must lie between 0 and learning_rates = \(0\.3, 0\.1\)"),
        ((), "learning_rates is empty"),
        (("a",), r"learning_rates\[0\] = 'a': must be of type float"),
    ],
)
def test_limit_is_checked_before_what_it_limits(rates, message):
    values = {"min_learning_rate": 0.2 if message else 0.1, "learning_rates": rates}
    with pytest.raises(InputError, match=message) if message else contextlib.nullcontext():
        fields.check(values, fields.schema(ProbeSettings), "config.probe", partial=True)


def test_none_is_allowed_only_for_optional_fields():
    assert SpectralSettings(batch_size=None).batch_size is FinetuneSettings().steps is None
    with pytest.raises(InputError, match=r"ProbeSettings\.epochs is unset: give it a value, such as 100"):
        ProbeSettings(epochs=None)


def test_error_names_the_full_path_of_an_override():
    study = default_config()
    study.overrides = {"tfds:mnist": {"probe": {"epochs": 0}}}
    with pytest.raises(InputError, match=r"config\.overrides\['tfds:mnist'\]\.probe\.epochs = 0"):
        checks.check(study)
    study.overrides = {"tfds:mnist": {"finetune": {"optimizer": {"min_learning_rate": 0.5}}}}
    with pytest.raises(InputError, match=r"'tfds:mnist'\]\.finetune\.optimizer\.min_learning_rate = 0\.5.* = 0\.01"):
        checks.check(study)


# --- objectives


def toy(net, augment, temperature: Part = 0.2, queue: int = 64, parts: tuple[str, ...] = ("a",), plain=1.5):
    """An objective with settings."""


def test_objective_settings_become_a_config_section(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "toy", toy)
    study = default_config()
    assert study.pretrain.toy.to_dict() == {"temperature": 0.2, "queue": 64, "parts": ("a",), "plain": 1.5}
    assert settings.objective_settings(study.pretrain) == {"label_smoothing": 0.0}
    study.pretrain.objective, study.pretrain.toy.queue = "toy", 128
    assert settings.objective_settings(study.pretrain) == {
        "temperature": 0.2,
        "queue": 128,
        "parts": ("a",),
        "plain": 1.5,
    }
    checks.check(study)
    study.pretrain.toy.temperature = 2.0
    with pytest.raises(InputError, match=r"config\.pretrain\.toy\.temperature = 2\.0: must lie in \[0, 1\]"):
        checks.check(study)


def test_settings_of_unused_objectives_are_ignored(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "toy", toy)
    old, new = default_config(), default_config()
    new.pretrain.toy.queue = 1
    assert differences(to_json(old), to_json(new)) == []
    old.pretrain.objective = new.pretrain.objective = "toy"
    assert differences(to_json(old), to_json(new)) == ["config.pretrain.toy.queue was 64, is 1"]


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({"more": {"dataset": "tfds:cifar10"}}, r"config\.pretrain\.feeds\['more'\] lacks batch_size"),
        ({"more": {"dataset": "tfds:cifar10", "batch_size": 0}}, r"feeds\['more'\]\.batch_size = 0"),
        ({"more": {"dataset": 3, "batch_size": 8}}, r"feeds\['more'\]\.dataset = 3: must be of type str"),
        ({"more": {"dataset": "x", "batch_size": 8, "size": 1}}, r"field of config\.pretrain\.feeds\['more'\]: 'size'"),
        ({"more": "tfds:cifar10"}, r"feeds\['more'\]"),
    ],
)
def test_feeds_are_checked(feeds, message):
    study = default_config()
    study.pretrain.feeds = {"a.b": {"dataset": "tfds:cifar10", "batch_size": 64}}
    checks.check(study)
    study.pretrain.feeds = feeds
    with pytest.raises(InputError, match=message):
        checks.check(study)


# --- configs of earlier versions


def test_config_of_an_earlier_version_has_no_differences():
    assert "label_smoothing" in EARLIER["pretrain"] and "feeds" not in EARLIER["pretrain"]
    assert differences(EARLIER, to_json(default_config())) == []


def test_differences_from_an_earlier_version_are_named():
    earlier, new = copy.deepcopy(EARLIER), default_config()
    earlier["pretrain"]["label_smoothing"] = 0.1
    assert differences(earlier, to_json(new)) == ["config.pretrain.supervised.label_smoothing was 0.1, is 0.0"]
    new.pretrain.supervised.label_smoothing = 0.1
    assert differences(earlier, to_json(new)) == []
    new.finetune.optimizer.head_learning_rate_factor = 10.0
    (line,) = differences(earlier, to_json(new))
    assert line == "config.finetune.optimizer.head_learning_rate_factor was 1.0, is 10.0"


def test_random_crops_of_an_earlier_version_differ():
    """They were cut from the central square."""
    earlier, new = copy.deepcopy(EARLIER), default_config()
    earlier["pretrain"]["augment"] = ["resized_crop", "flip"]
    new.pretrain.augment = ("resized_crop", "flip")
    (line,) = differences(earlier, to_json(new))
    assert line.startswith("config.pretrain.augment was") and "resized_crop of the central square" in line
    assert differences(to_json(new), to_json(new)) == []


def test_defaults_equal_those_of_the_earlier_version():
    new = to_json(default_config())
    assert new["model"].pop("batch_norm_group") is None
    assert new["trajectory"].pop("steps") is None
    for name in EARLIER.keys() - {"pretrain", "finetune", "probe", "stages"}:
        assert new[name] == EARLIER[name]
    assert EARLIER["probe"].items() <= new["probe"].items()
    assert [stage for stage in new["stages"] if stage in EARLIER["stages"]] == EARLIER["stages"]


# --- the fields themselves


def test_section_accepts_values_for_unset_fields():
    study = default_config()
    study.model.width, study.finetune.steps, study.spectral.batch_size = 16, 10, None
    checks.check(study)
    assert settings.finetune_settings(study, "tfds:mnist") == FinetuneSettings(steps=10)
    assert settings.probe_settings(study, "tfds:mnist") == ProbeSettings()
    assert settings.pretrain_optimizer(study.pretrain) == PretrainSettings().optimizer


def test_options_are_read_at_validation_time():
    options = {"a": 1}
    schema = {"x": fields.Field(tuple[Annotated[str, OneOf(options, "letter")], ...], ("a",))}
    with pytest.raises(InputError, match=r"Unknown letter \(here\.x\): 'b'. Valid: a"):
        fields.check({"x": ("a", "b")}, schema, "here")
    options["b"] = 2
    fields.check({"x": ("a", "b")}, schema, "here")


def test_errors_state_the_expected_value():
    schema = {"x": fields.Field(Annotated[tuple[Probability, ...], Listed(filled=True)], (0.5,))}
    for value, message in ((1.0, r"must lie in \[0, 1\); 0 turns it off"), (float("nan"), "must be finite")):
        with pytest.raises(InputError, match=message):
            fields.check({"x": (value,)}, schema, "here")
    with pytest.raises(InputError, match=r"here\.x is empty: name at least one"):
        fields.check({"x": ()}, schema, "here")
    with pytest.raises(InputError, match="here lacks x"):
        fields.check({}, schema, "here")
    fields.check({}, schema, "here", partial=True)


def test_default_config_has_every_field_of_a_study():
    assert default_config().to_dict().keys() == fields.schema(config.Study()).keys()


# --- numbers of a paper


def test_a_number_of_a_paper_needs_no_epoch_or_way():
    study = default_config()
    earlier = {"target": "tfds:mnist", "epoch": 5, "what": "FE main", "accuracy": 0.9, "where": "Table 1"}
    way = {"target": "tfds:mnist", "what": "FT", "accuracy": 0.9, "where": "Table 1", "objective": "joint"}
    study.paper = (earlier, way, {**way, "selection": "uot", "what": "recall", "epoch": None})
    checks.check(study)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": -1}, r"config\.paper\[0\]\.epoch = -1: must not be negative"),
        ({"what": "FTs"}, r"what \(config\.paper\[0\]\.what\): 'FTs'.*'FT'"),
        ({"objective": "join"}, r"objective \(config\.paper\[0\]\.objective\): 'join'.*'joint'"),
        ({"select": "uot"}, r"field of config\.paper\[0\]: 'select'.*'selection'"),
        ({"where": None}, r"config\.paper\[0\]\.where is unset"),
    ],
)
def test_a_wrong_number_of_a_paper_is_named(change, message):
    study = default_config()
    study.paper = ({"target": "tfds:mnist", "what": "FT", "accuracy": 0.9, "where": "Table 1", **change},)
    with pytest.raises(InputError, match=message):
        checks.check(study)


def test_what_has_no_default_must_be_given():
    study = default_config()
    study.paper = ({"target": "tfds:mnist", "what": "FT", "where": "Table 1"},)
    with pytest.raises(InputError, match=r"config\.paper\[0\] lacks accuracy: add what is missing"):
        checks.check(study)
