"""Scripts of `training_scripts/` as modules, and the arguments of a run of two steps."""

import importlib.util
import sys
from types import ModuleType

from hf_vlp.resources import resource_folder

FOLDER = resource_folder("training_scripts")
_COMMON = (
    "--use_cpu --max_steps 2 --per_device_train_batch_size 6 --shapes_size 24 --shapes_preset simple "
    "--max_eval_samples 6 --per_device_eval_batch_size 6 --logging_steps 1 --save_strategy no --disable_tqdm true"
)
COMMON = _COMMON.split()


def script(name: str) -> ModuleType:
    """The module of a script."""
    spec = importlib.util.spec_from_file_location(f"training_scripts_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up while they are made.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
