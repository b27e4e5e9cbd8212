"""The shape of the code: imports run one way, files stay small, nothing needs TensorFlow or torch."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "jax_transfer"
# A folder or file imports only from those above it.
ORDER = ("records", "choose", "fields", "devices", "preemption", "flops", "numerics", "logs", "trees", "data", "models", "training",
         "features", "transfer", "analysis", "selection", "report", "settings", "workspace", "estimates", "pretraining",
         "probing", "finetuning", "scoring", "spectra", "reporting", "stages", "config", "checks", "plan", "study", "ranking",
         "main")  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


def _part(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    if path == PACKAGE / "__init__.py":
        return
    own = ORDER.index(_part(path))
    for name in _imported(path):
        parts = name.split(".")
        if parts[0] == "jax_transfer" and len(parts) > 1 and parts[1] in ORDER:
            assert ORDER.index(parts[1]) <= own, f"{path} imports {name}, which stands below it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= 350


def test_every_part_has_its_place():
    assert {_part(path) for path in FILES if path.name != "__init__.py"} <= set(ORDER)


def test_the_command_imports_neither_tensorflow_nor_torch():
    code = "import sys, jax_transfer.main; sys.exit('tensorflow' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent).returncode == 0
