"""The README's table comes from the catalogue, and what the README names exists."""

import re
from pathlib import Path

import pytest

from hf_vlp.models.catalog import ARCHITECTURES, markdown_table

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_table_of_architectures_is_current():
    between = re.search(r"<!-- architectures:.*?-->\n(.*?)\n?<!-- /architectures -->", README, re.DOTALL)
    assert between, "README.md lost the markers around its table of architectures"
    assert between[1].strip() == markdown_table(), "put the output of markdown_table() between the markers"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!http)([\w./-]+)\)", README))))
def test_linked_files_exist(path: str):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"training_scripts/\w+\.py", README))))
def test_named_scripts_exist(path: str):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE))))
def test_named_targets_exist(target: str):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    ("model_type", "role"), [(a.model_type, role) for a in ARCHITECTURES.values() for role in a.classes]
)
def test_catalogue_names_classes_that_exist(model_type: str, role: str):
    assert isinstance(ARCHITECTURES[model_type].load(role), type)


def test_unknown_role_names_the_roles_there_are():
    with pytest.raises(KeyError, match="retrieval"):
        ARCHITECTURES["clip"].load("juggling")


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_every_page_is_in_the_index_and_its_links_lead_somewhere(page: str):
    if page != "README.md":
        assert f"]({page})" in (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
        assert f"](docs/{page})" in README
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([\w./-]+)(?:#[\w-]+)?\)", text):
        assert (ROOT / "docs" / target).exists(), target
