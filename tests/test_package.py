"""The package's own names: cheap to import, each one there."""

import importlib.metadata
import subprocess
import sys

import pytest

import hf_vlp


@pytest.mark.parametrize("name", sorted(set(hf_vlp.__all__) - {"__version__"}))
def test_public_name_resolves(name: str) -> None:
    assert getattr(hf_vlp, name).__name__ == name


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Blip3"):
        _ = hf_vlp.Blip3


def test_version_is_that_of_the_distribution() -> None:
    assert importlib.metadata.version("hf-vlp") == hf_vlp.__version__


def test_import_brings_neither_torch_nor_models() -> None:
    code = "import sys, hf_vlp; print(sorted({'torch', 'datasets', 'hf_vlp.models.clip'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
