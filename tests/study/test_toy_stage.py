"""A new stage, its result file and its section of the page need a function and a line each, and no change elsewhere."""

import ast
import dataclasses
import json

import pytest

from helpers.source_files import FILES, PACKAGE
from helpers.studies import TARGET, one_epoch_config
from jax_transfer import results, study
from jax_transfer.records import InputError
from jax_transfer.report import page
from jax_transfer.results import Rows
from jax_transfer.study import checks
from jax_transfer.study.config import Study, default_config
from jax_transfer.study.stages import STAGES, Stage, written_by


@dataclasses.dataclass(frozen=True)
class BrightnessRow:
    target: str
    split: str
    classes: int
    hue: float | None = None
    version: int = 1


def brightness(work):
    rows = Rows(work.results, "brightness")
    for target in work.config.targets:
        rows.append(BrightnessRow(target, "train", work.source(target, "train").num_classes))


def brightness_section(page):
    for row in page.results.get("brightness", []):
        yield f"<p>{row['classes']} classes in {row['split']}.</p>"


@pytest.fixture
def toy_stage(monkeypatch):
    last = STAGES["report"]
    monkeypatch.delitem(STAGES, "report")
    monkeypatch.setitem(
        STAGES, "brighten", Stage(brightness, ("brightness",), lambda work: "the brightness of targets")
    )
    monkeypatch.setitem(STAGES, "report", last)
    monkeypatch.setitem(results.ROWS, "brightness", (BrightnessRow, ("target", "split")))
    monkeypatch.setitem(results.VERSIONS, "brightness", 1)
    monkeypatch.setitem(page.SECTIONS, "Brightness", brightness_section)


@pytest.mark.usefixtures("toy_stage")
def test_toy_stage_is_checked_planned_run_and_reported(tmp_path, capsys):
    with pytest.raises(InputError, match=r"stage \(config\.stages\): 'brightn'.*Did you mean 'brighten'"):
        checks.check(one_epoch_config(stages=("brightn",)))
    assert study.run(one_epoch_config(stages=("report",)), tmp_path) == tmp_path / "results"
    text = (tmp_path / "report/index.html").read_text(encoding="utf-8")
    assert "brightness.jsonl</code>: stage brighten has not run" in text and "<h2>Brightness</h2>" not in text
    capsys.readouterr()
    for _ in range(2):  # the second run has nothing to do
        results = study.run(one_epoch_config(stages=("report", "brighten")), str(tmp_path))
    assert "the brightness of targets" in capsys.readouterr().err
    (line,) = (results / "brightness.jsonl").read_text().splitlines()
    assert json.loads(line) == {"target": TARGET, "split": "train", "classes": 10, "hue": None, "version": 1}
    assert Rows(results, "brightness").rows == [BrightnessRow(TARGET, "train", 10)]  # null is read as None
    text = (tmp_path / "report/index.html").read_text(encoding="utf-8")
    assert "<h2>Brightness</h2>\n<p>10 classes in train.</p>" in text
    assert "brightness (1 row)" in text and "<th>hue</th>" not in text  # a column without values is not shown


@pytest.mark.usefixtures("toy_stage")
def test_written_by_follows_the_order_of_stages():
    stages = written_by()
    assert stages["brightness"] == ("brighten",) and stages["transfer"] == ("probe", "finetune")
    assert next(iter(stages)) == "pretrain" and stages.keys() == results.ROWS.keys() - {"usage"}  # a row for each stage


def test_default_stages_are_all_stages_in_order_but_those_that_need_settings():
    expected = tuple(name for name in STAGES if name not in ("select", "fewshot", "retrieval"))
    assert default_config().stages == Study().stages == expected


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_stages_are_listed_once(path):
    """Only one literal holds more than half of their names."""
    literals = []
    for node in ast.walk(ast.parse(path.read_text())):
        parts = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
        names = {part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)}
        if len(names & STAGES.keys()) > len(STAGES) // 2:
            literals.append(ast.unparse(node))
    assert len(literals) == (path == PACKAGE / "study" / "stages.py"), literals
