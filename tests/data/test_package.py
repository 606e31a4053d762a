"""The package gives its names on demand."""

import subprocess
import sys

import pytest

import hf_vlp.data


def test_every_name_is_there() -> None:
    for name in hf_vlp.data.__all__:
        assert getattr(hf_vlp.data, name).__doc__, name
    assert set(hf_vlp.data.__all__) <= set(dir(hf_vlp.data))
    with pytest.raises(AttributeError, match="nonsense"):
        hf_vlp.data.nonsense  # noqa: B018


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, hf_vlp.data\nprint(sorted({'torch', 'datasets', 'PIL', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
