"""The command lines that README, docs, scripts and help texts show name commands and arguments that exist."""

import dataclasses
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from hf_vlp.cli.main import COMMANDS, main
from tests.scripts.running import FOLDER, script

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(FOLDER.glob("*.py")),
    *sorted((ROOT / "hf_vlp" / "cli").glob("*.py")),
]
# A line that begins with one of these, as a user would type it.
_START = re.compile(r"^(?:python|accelerate launch|hf-vlp)\b")
_SCRIPT = re.compile(r"(?:\$S|training_scripts)/(\w+)\.py")


class _Stop(Exception):  # noqa: N818
    """Ends a script once it has said which arguments it takes."""


def command_lines(page: Path) -> list[str]:
    """Lines of a page that are commands, with their continuations."""
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    lines = (line.strip().strip("`").removesuffix('"""') for line in text.splitlines())
    # A back-tick inside is prose that goes on behind a command.
    return [line.split(" #")[0] for line in lines if _START.match(line) and " --" in line and "`" not in line]


COMMAND_LINES = sorted(
    {(str(page.relative_to(ROOT)), line) for page in PAGES for line in command_lines(page) if "…" not in line}
)


@cache
def arguments_of(name: str) -> frozenset[str]:
    """Arguments of a training script."""
    module = script(name)
    names = {"config", "help", "help_all"}

    def stop(types: Any, *_: Any, **__: Any) -> Any:
        kinds = types if isinstance(types, list | tuple) else (types,)
        names.update(entry.name for kind in kinds for entry in dataclasses.fields(kind) if entry.init)
        raise _Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "parse_arguments", stop)
        with pytest.raises(_Stop):
            module.main([])
    return frozenset(names)


def flags(words: list[str]) -> set[str]:
    """Names of the arguments among the words of a command line."""
    return {word[2:].partition("=")[0].replace("-", "_") for word in words if re.match(r"--[a-z]", word)}


def test_there_are_commands_to_look_at() -> None:
    assert len(COMMAND_LINES) > 50
    assert {"README.md", "docs/training.md", "training_scripts/clip.py"} <= {page for page, _ in COMMAND_LINES}


@pytest.mark.parametrize(("page", "line"), COMMAND_LINES)
def test_a_command_line_names_what_exists(page: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(line)
    if words[0] == "hf-vlp" and words[1] != "train":
        assert words[1] in COMMANDS
        # Options of a task or a format are shown with it.
        named = words[2:3] if words[1] in ("evaluate", "convert") and not words[2].startswith("-") else []
        if words[1] == "demo":
            with pytest.raises(SystemExit):
                main_of_demo(["--help"])
        else:
            assert main([words[1], *named, "--help"]) == 0
        known = set(re.findall(r"--([a-z][\w-]*)", capsys.readouterr().out))
        assert flags(words[2:]) <= {name.replace("-", "_") for name in known}
        return
    found = _SCRIPT.search(line)
    if found is None and words[0] == "hf-vlp":
        place = next(i for i, word in enumerate(words) if (FOLDER / f"{word}.py").is_file())
        name, own = words[place], words[place + 1 :]
    elif found is not None:
        name, own = found[1], shlex.split(line[found.end() :])
    else:
        assert "benchmarks/" in line or " -m " in line, line
        return
    assert flags(own) <= arguments_of(name)
    for config in (own[i + 1] for i, word in enumerate(own) if word == "--config"):
        if config.startswith(("training_scripts/", "$S/")):
            assert (FOLDER / Path(config).name).is_file()


def main_of_demo(argv: list[str]) -> int:
    from hf_vlp.cli.demo import main as demo

    return demo(argv)
