"""The command as a whole: help, dispatch, errors in one line, exit statuses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_vlp
from hf_vlp.cli import main as module
from hf_vlp.cli.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, UsageError, one_line
from hf_vlp.cli.main import COMMANDS, main, run

WITH_PARSERS = [name for name in COMMANDS if name != "demo"]


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, (_, summary) in COMMANDS.items():
        assert f"  {name}" in text
        assert summary in text
    assert "examples:" in text
    assert max(map(len, text.splitlines())) <= 120


def test_the_documentation_lists_every_command() -> None:
    text = (Path(hf_vlp.__file__).parent.parent / "docs" / "hub.md").read_text()
    table = [row for row in text.splitlines() if row.startswith("| `")]
    missing = [name for name in COMMANDS if not any(re.search(rf"`{name}\b", row) for row in table)]
    assert not missing


@pytest.mark.parametrize("name", WITH_PARSERS)
def test_help_of_a_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: hf-vlp {name}")
    assert "examples:" in text
    assert f"  hf-vlp {name}" in text


def test_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == EXIT_USAGE
    assert "usage: hf-vlp COMMAND" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hf-vlp {hf_vlp.__version__}\n"


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "there is no command 'trian'; there are: demo, train" in error


@pytest.mark.parametrize("name", WITH_PARSERS)
def test_an_unknown_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--no_such_option"]) == EXIT_USAGE
    assert f"hf-vlp {name}: error: " in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import json, sys; from hf_vlp.cli.main import main; main(['--help']); main(['list']); "
        "main(['convert', 'openai-clip', '--help']); main(['caption', '--help']); main(['train']); "
        "print(json.dumps(sorted({'torch', 'transformers', 'datasets', 'huggingface_hub'} & set(sys.modules))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(hf_vlp.__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


# Errors


def failing(error: BaseException) -> int:
    def command(arguments: list[str]) -> int:
        raise error

    return run("caption", command, [])


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("the batch is empty\n  give more"), EXIT_FAILED, "the batch is empty give more"),
        (UsageError("no such thing"), EXIT_USAGE, "no such thing"),
        (KeyError("no role 'vqa'"), EXIT_FAILED, "no role 'vqa'"),
        (
            FileNotFoundError(2, "No such file or directory", "x.png"),
            EXIT_FAILED,
            "No such file or directory: 'x.png'",
        ),
        (FloatingPointError("the loss is nan at step 3"), EXIT_FAILED, "the loss is nan at step 3"),
        (ModuleNotFoundError("No module named 'tensorboard'"), EXIT_FAILED, "No module named 'tensorboard'"),
    ],
)
def test_errors_are_one_line(error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(error) == status
    printed = capsys.readouterr().err
    assert printed.startswith("hf-vlp caption: error: ")
    assert line in printed
    assert printed.count("\n") == 1


def test_defects_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        failing(ZeroDivisionError("division by zero"))


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(arguments: list[str]) -> int:
        raise ValueError("on purpose")

    monkeypatch.setattr("hf_vlp.cli.catalogue.main", command)
    with pytest.raises(ValueError, match="on purpose"):
        module.main(["--debug", "list"])
    monkeypatch.setenv("HF_VLP_DEBUG", "1")
    with pytest.raises(ValueError, match="on purpose"):
        module.main(["list"])
    monkeypatch.delenv("HF_VLP_DEBUG")
    assert module.main(["list"]) == EXIT_FAILED


def test_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(KeyboardInterrupt()) == EXIT_INTERRUPTED
    assert failing(SystemExit(3)) == 3
    assert failing(SystemExit(None)) == 0
    assert failing(SystemExit("because")) == EXIT_FAILED
    assert capsys.readouterr().err.endswith("because\n")
    assert run("x", lambda arguments: None, []) == 0
    assert run("x", lambda arguments: 3, []) == 3


def test_a_reader_that_goes_away_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m hf_vlp.cli.main list | head -1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(hf_vlp.__file__).parent.parent,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert done.stdout.startswith("model type")
    assert "Error" not in done.stderr


def test_one_line() -> None:
    assert one_line(ValueError("a\n\n   b\tc")) == "a b c"
    assert one_line(ValueError()) == "ValueError"
