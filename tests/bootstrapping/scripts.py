"""Loads a training script as a module."""

import importlib.util
import sys
from types import ModuleType

from hf_vlp.resources import resource_folder


def script(name: str) -> ModuleType:
    """The module of `training_scripts/<name>.py`."""
    path = resource_folder("training_scripts") / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"training_scripts_{name}", path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up while they are made.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
