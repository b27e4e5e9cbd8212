"""The source files and the configs of the project."""

import functools
import importlib.util
import pathlib

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent.parent
PACKAGE = REPOSITORY / "jax_transfer"
FILES = sorted(PACKAGE.rglob("*.py"))


@functools.cache
def config_file(name: str):
    """Imports and returns the module `configs/<name>.py`."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def get_config(name: str, variant: str):
    """Returns the config of `--config=configs/NAME.py:VARIANT`."""
    return config_file(name).get_config(variant)
