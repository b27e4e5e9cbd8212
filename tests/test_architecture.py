"""The structure of the code: imports run one way, lines are short, and nothing needs TensorFlow or torch."""

import ast
import graphlib
import subprocess
import sys

import pytest

from helpers.source_files import FILES, PACKAGE, REPOSITORY

# A folder or file imports only from those before it, and the imports within a folder form no cycle.
FOUNDATION = (
    "xla_flags",
    "records",
    "choose",
    "trees",
    "numerics",
    "devices",
    "preemption",
    "logs",
    "usage",
    "flops",
    "results",
    "fields",
)
FOLDERS = (
    "data",
    "models",
    "checkpoints",
    "training",
    "features",
    "transfer",
    "analysis",
    "selection",
    "report",
    "trust",
    "ranking",
    "study",
)
ORDER = (*FOUNDATION, *FOLDERS, "main", "command", "__main__")


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
            assert ORDER.index(parts[1]) <= own, f"{path} imports {name}, which comes later in ORDER"


def test_imports_form_no_cycle():
    modules = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in FILES}
    graph = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): modules & set(_imported(path))
        for path in FILES
    }
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle


@pytest.mark.parametrize("path", sorted(REPOSITORY.rglob("*.py")), ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_lines_have_at_most_120_characters(path):
    assert [number for number, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 120] == []


def test_every_module_is_in_the_import_order():
    assert {_part(path) for path in FILES if path.name != "__init__.py"} <= set(ORDER)


def test_command_imports_neither_tensorflow_nor_torch():
    code = "import sys, jax_transfer.main; sys.exit('tensorflow' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent).returncode == 0
