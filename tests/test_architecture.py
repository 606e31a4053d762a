"""The rules of the layout: imports point one way, code that ships with a checkpoint is self-contained."""

import ast
from pathlib import Path

import pytest

from hf_vlp.models.catalog import ARCHITECTURES

PACKAGE = Path(__file__).resolve().parent.parent / "hf_vlp"

# Which parts of the package a part may import, besides itself.
ALLOWED = {
    "nn": {"objectives"},  # the queue and the momentum twin agree over ranks by `objectives.distributed`
    "objectives": set(),
    "data": set(),
    "models": {"objectives", "nn"},
    "evaluation": {"models", "data", "objectives", "nn", "resources"},
    "bootstrapping": {"models", "data", "evaluation", "objectives", "nn"},
    "retrieval": {"models", "data", "objectives", "nn"},
    "pipelines": {"models", "data", "objectives", "nn"},
    "hub": {"models", "data", "pipelines", "evaluation", "objectives", "nn", "resources"},
    "training": {"models", "data", "objectives", "nn", "hub", "evaluation", "resources"},
    "cli": {
        "training", "evaluation", "bootstrapping", "retrieval", "pipelines", "hub", "models", "data", "objectives",
        "nn", "resources",
    },
    "_registration": {"models", "pipelines"},
    "resources": set(),
    "_exports": set(),
}  # fmt: skip
# What every package's face stands on.
GROUND = "_exports"

SHIPPING_STEMS = ("configuration_", "modeling_", "processing_")
SHIPPING_IMPORTS = {"torch", "transformers", "numpy", "PIL"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imported(tree: ast.AST) -> list[tuple[int, str]]:
    """(level, dotted name) of every import, also inside functions."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
    return found


def part_of(path: Path) -> str:
    """`hf_vlp/models/clip/x.py` -> `models`; `hf_vlp/resources.py` -> `resources`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def absolute(path: Path, level: int, name: str) -> str:
    """The dotted name that a (possibly relative) import in `path` means."""
    if level == 0:
        return name
    package = ("hf_vlp", *path.relative_to(PACKAGE).parent.parts)
    return ".".join((*package[: len(package) - level + 1], *filter(None, [name])))


def test_imports_point_one_way():
    wrong = []
    for path in modules():
        part = part_of(path)
        if part == "__init__":
            continue
        for level, name in imported(ast.parse(path.read_text())):
            target = absolute(path, level, name).split(".")
            allowed = {part, GROUND, *ALLOWED[part]}
            if target[0] == "hf_vlp" and len(target) > 1 and target[1] not in allowed:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {'.'.join(target)}")
    assert not wrong, "\n".join(wrong)


def shipping_files() -> list[Path]:
    """Files of the types that plain transformers does not have: they are copied beside their checkpoints."""
    files = set()
    for architecture in ARCHITECTURES.values():
        if architecture.native:
            continue
        for role in ("config", "model", "processor"):
            module = architecture.classes[role].split(":")[0]
            path = PACKAGE.parent.joinpath(*module.split(".")).with_suffix(".py")
            if path.name.endswith(f"_{architecture.model_type}.py"):
                files.add(path)
    return sorted(files)


def test_there_are_shipping_files():
    assert {path.name for path in shipping_files()} >= {"modeling_clip_resnet.py", "modeling_eva_clip.py"}


@pytest.mark.parametrize("path", shipping_files(), ids=lambda path: path.name)
def test_shipping_code_is_self_contained(path: Path):
    import sys

    assert path.name.startswith(SHIPPING_STEMS)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            roots = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                assert node.level == 1, f"{path.name}: only siblings ship, not {'.' * node.level}{node.module}"
                assert node.module, f"{path.name}: `from . import x` is not copied beside a checkpoint"
                assert (path.parent / f"{node.module}.py").is_file(), f"{path.name}: no sibling {node.module}"
                continue
            roots = {node.module.split(".")[0]}
        else:
            continue
        foreign = {root for root in roots if root not in SHIPPING_IMPORTS and root not in sys.stdlib_module_names}
        assert not foreign, f"{path.name} imports {foreign}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_says_what_it_is(path: Path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path} has no module docstring"
    assert len(path.read_text().splitlines()) <= 900, f"{path} is over 900 lines: split it at a seam"
