"""`hf-vlp train`: the scripts by name, here or by `accelerate launch`."""

import json
import sys
from pathlib import Path

import pytest

from hf_vlp.cli import train
from hf_vlp.cli.errors import EXIT_USAGE
from hf_vlp.cli.main import main

SCRIPT = '''r"""Writes down how it was started.

More text.
"""

import json
import os
import sys

if __name__ == "__main__":
    if "--help" in sys.argv:
        print("help of the script")
        sys.exit(0)
    if "--fail" in sys.argv:
        sys.exit(5)
    with open(os.environ["REPORT"], "w") as file:
        json.dump(sys.argv, file)
'''


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "training_scripts"
    (folder / "accelerate_configs").mkdir(parents=True)
    (folder / "mine.py").write_text(SCRIPT)
    (folder / "accelerate_configs" / "cpu_2.yaml").write_text("num_processes: 2\n")
    monkeypatch.setattr(train, "resource_folder", lambda name: tmp_path / name)
    monkeypatch.setenv("REPORT", str(tmp_path / "report.json"))
    return folder


def test_the_real_scripts_are_found() -> None:
    found = train.scripts()
    assert {"clip", "blip2_stage1", "blip2_stage2", "evaluate"} <= set(found)
    assert all(train.summary(path) for path in found.values())


def test_arguments_go_to_the_script(scripts: Path, tmp_path: Path) -> None:
    before = list(sys.argv)
    assert main(["train", "mine", "--output_dir", "x", "--num_processes", "9"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == [str(scripts / "mine.py"), "--output_dir", "x", "--num_processes", "9"]
    assert sys.argv == before
    assert main(["train", "--num_processes", "1", "mine", "clip"]) == 0
    assert json.loads((tmp_path / "report.json").read_text())[1:] == ["clip"]


def test_help_and_status_are_the_scripts(scripts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "mine", "--help"]) == 0
    assert capsys.readouterr().out == "help of the script\n"
    assert main(["train", "mine", "--fail"]) == 5


def test_the_list(scripts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 0
    assert capsys.readouterr().out.split(maxsplit=1) == ["mine", "Writes down how it was started.\n"]


def test_several_processes_go_through_accelerate(scripts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    class Done:
        returncode = 4

    def run(command: list[str]) -> Done:
        started.append(command)
        return Done()

    monkeypatch.setattr(train.subprocess, "run", run)
    monkeypatch.setattr(train, "_has_accelerator", lambda: False)
    assert main(["train", "--num_processes", "2", "mine", "--x", "1"]) == 4
    assert started[0][:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    assert started[0][-3:] == [str(scripts / "mine.py"), "--x", "1"]
    assert "--cpu" in started[0]
    assert started[0][started[0].index("--num_processes") + 1] == "2"
    monkeypatch.setattr(train, "_has_accelerator", lambda: True)
    main(["train", "--num_processes", "8", "mine"])
    assert "--multi_gpu" in started[1]
    assert "--cpu" not in started[1]
    main(["train", "--accelerate_config", "cpu_2", "mine"])
    configuration = started[2][started[2].index("--config_file") + 1]
    assert configuration == str(scripts / "accelerate_configs" / "cpu_2.yaml")


def test_the_launch_command_starts_a_script(scripts: Path, tmp_path: Path) -> None:
    import subprocess

    command = train.launch_command(scripts / "mine.py", ["--x", "1"], 1)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "report.json").read_text()) == [str(scripts / "mine.py"), "--x", "1"]


def test_failures(scripts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "yours"]) == EXIT_USAGE
    assert "there is no script 'yours'; there are: mine" in capsys.readouterr().err
    assert main(["train", "--num_processes", "0", "mine"]) == EXIT_USAGE
    assert "--num_processes must be at least 1, got 0" in capsys.readouterr().err
    assert main(["train", "--num_processes", "many", "mine"]) == EXIT_USAGE
    assert main(["train", "--accelerate_config", "nowhere.yaml", "mine"]) == EXIT_USAGE
    assert "no accelerate configuration 'nowhere.yaml'; give a file, or one of: cpu_2" in capsys.readouterr().err
