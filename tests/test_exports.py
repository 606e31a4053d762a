"""Every public name of a lazy package is defined where its table says, and a wrong name says so."""

from importlib import import_module

import pytest

PACKAGES = (
    "hf_vlp",
    "hf_vlp.bootstrapping",
    "hf_vlp.data",
    "hf_vlp.data.conversations",
    "hf_vlp.data.tasks",
    "hf_vlp.evaluation",
    "hf_vlp.hub",
    "hf_vlp.objectives",
    "hf_vlp.pipelines",
    "hf_vlp.training",
)


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_resolve(package):
    module = import_module(package)
    for name in module.__all__:
        assert getattr(module, name) is not None
    assert set(module._EXPORTS) <= set(dir(module))
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        _ = module.nothing
