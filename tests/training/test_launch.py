import pytest

from hf_vlp.training import launch

LONE = {"ACCELERATE_DYNAMO_BACKEND": "NO", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "alone"),
    [
        (LONE, True),
        ({}, False),
        ({**LONE, "RANK": "0", "WORLD_SIZE": "2"}, False),
        ({"ACCELERATE_DYNAMO_BACKEND": "NO"}, False),
        ({"MASTER_ADDR": "127.0.0.1"}, False),
        ({**LONE, "OMPI_COMM_WORLD_RANK": "1"}, False),
    ],
)
def test_one_process_where_several_were_asked_for(environment, alone):
    assert launch.asked_for_but_alone(environment) is alone


@pytest.mark.parametrize(
    ("command", "count"),
    [
        (["accelerate", "launch", "--num_processes", "2", "--cpu", "clip.py"], 2),
        (["accelerate", "launch", "--num-processes=4", "clip.py"], 4),
        (["accelerate", "launch", "clip.py", "--num_processes", "9"], None),
        (["accelerate", "launch"], None),
    ],
)
def test_number_of_processes_of_a_command_line(command, count):
    assert launch.processes_in(command) == count


def test_number_of_processes_of_a_config_file(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("num_processes: 3\n")
    assert launch.processes_in(["accelerate", "launch", "--config_file", str(config), "clip.py"]) == 3


def test_no_process_is_started_without_a_launcher(monkeypatch):
    for name in LONE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch.os, "execv", pytest.fail)
    launch.start_missing_processes()


def test_an_unknown_number_of_processes_is_an_error(monkeypatch):
    for name, value in LONE.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch.os, "execv", pytest.fail)
    monkeypatch.setattr(launch, "processes_in", lambda command: None)
    with pytest.raises(SystemExit, match="started only this one"):
        launch.start_missing_processes()


def test_only_the_first_process_speaks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    launch.say("second")
    monkeypatch.setenv("RANK", "0")
    launch.say("first")
    assert capsys.readouterr().out == "first\n"
