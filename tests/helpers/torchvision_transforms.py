"""torchvision's transforms, also where its operators cannot be loaded."""

import importlib
import importlib.util
import sys


def load():
    """Returns the module `torchvision.transforms`, or None if torchvision is not installed.

    A torchvision that was built for another torch (CUDA beside the CPU's) fails to load its operators. The transforms
    of PIL images use none of them, so they are imported without running `torchvision/__init__.py`.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        return None
    try:
        return importlib.import_module("torchvision.transforms")
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision"] = importlib.util.module_from_spec(spec)
        return importlib.import_module("torchvision.transforms")
