"""Finds the folders that lie beside the package: `training_scripts/` and `model_cards/`."""

import sys
from pathlib import Path


def resource_folder(name: str) -> Path:
    """The folder `name` of a checkout, or of an installed wheel (`<prefix>/share/hf_vlp/<name>`).

    Args:
        name: `"training_scripts"` or `"model_cards"`.

    Raises:
        FileNotFoundError: neither place has it, which means a broken installation.
    """
    beside_the_package = Path(__file__).resolve().parent.parent / name
    installed = Path(sys.prefix) / "share" / "hf_vlp" / name
    for folder in (beside_the_package, installed):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"hf_vlp's {name!r} folder is neither at {beside_the_package} nor at {installed}; reinstall hf-vlp"
    )
