from dataclasses import dataclass, field
from typing import ClassVar

import pytest

from hf_vlp.training import DataArguments, VLPTrainingArguments, parse_arguments
from hf_vlp.training.arguments import run_settings, say_unused
from hf_vlp.training.data import parse_columns


@dataclass
class ModelArguments:
    """A model."""

    _argument_group_name: ClassVar[str] = "model"

    width: int = field(default=8, metadata={"help": "Width."})
    kind: str = field(default="a", metadata={"help": "Kind.", "choices": ["a", "b"]})
    name: str = field(default=None, metadata={"help": "Name."})
    parts: list[str] = field(default_factory=list, metadata={"help": "Parts."})


TYPES = (DataArguments, ModelArguments, VLPTrainingArguments)


def parse(*argv):
    return parse_arguments(TYPES, ["--use_cpu", *argv])


def test_defaults_and_command_line(tmp_path):
    data, model, args = parse("--width", "16", "--output_dir", str(tmp_path), "--part_learning_rates", "a=1", "b=2")
    assert (data.train_data, model.width, args.adam_beta2, args.weight_decay) == ("shapes", 16, 0.98, 0.05)
    assert args.part_learning_rates == ["a=1", "b=2"]
    assert not args.remove_unused_columns


def test_command_line_wins_over_the_file(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "train_data: emoji\nwidth: 32\nlearning_rate: 2e-4\nparts: [x, y]\nbf16: false\nlr_scheduler_type: "
        "cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1.0e-5}\nmax_train_samples: 10\n"
    )
    data, model, args = parse("--config", str(config), "--width", "64", "--output_dir", str(tmp_path))
    assert (data.train_data, data.max_train_samples) == ("emoji", 10)
    assert (model.width, model.parts) == (64, ["x", "y"])
    assert args.learning_rate == 2e-4
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("widht: 3\n", "no argument is called 'widht'; did you mean"),
        ("width: wide\n", "invalid int value: 'wide'"),
        ("kind: c\n", "kind may be one of"),
        ("- width\n", "must hold 'argument: value' lines"),
        ("width: [\n", "is not YAML"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, capsys, text, message):
    config = tmp_path / "run.yaml"
    config.write_text(text)
    with pytest.raises(SystemExit) as stop:
        parse("--config", str(config))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--widht", "3"], "--widht"),
        (["--width", "three"], "invalid int value"),
        (["--kind", "c"], "invalid choice"),
        (["--config", "nowhere.yaml"], "no such file"),
        (["--lr_scheduler_type", "sinus"], "sinus"),
    ],
)
def test_arguments_that_cannot_be_used(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) <= 3, "an error is not buried under the usage"


def test_help_shows_the_usual_arguments_and_help_all_every_one(capsys):
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as stop:
            parse_arguments(TYPES, [flag], description="Trains a thing.")
        assert stop.value.code == 0
    both = capsys.readouterr().out
    usual, everything = both.split("usage:")[1:]
    assert "Trains a thing." in usual
    for argument in ("--train_data", "--width", "--grad_cache_chunk_size", "--resume", "--sanity"):
        assert argument in usual
    assert "--torch_empty_cache_steps" not in usual
    assert "--torch_empty_cache_steps" in everything
    assert "--train-data" not in both


def test_every_argument_of_ours_has_a_help_text():
    from dataclasses import fields

    parent = {entry.name for entry in fields(VLPTrainingArguments.__mro__[1])}
    for kind in (DataArguments, VLPTrainingArguments):
        for entry in fields(kind):
            if kind is DataArguments or entry.name not in parent:
                assert entry.metadata.get("help", "").endswith("."), entry.name


def test_settings_leave_out_what_cannot_change_the_weights(tmp_path):
    _, _, one = parse("--output_dir", str(tmp_path / "a"), "--logging_steps", "5", "--save_steps", "7")
    _, _, two = parse("--output_dir", str(tmp_path / "b"), "--sanity", "false", "--dataloader_num_workers", "2")
    assert run_settings(one) == run_settings(two)
    _, _, other = parse("--output_dir", str(tmp_path / "a"), "--learning_rate", "1e-5")
    assert run_settings(one) != run_settings(other)
    assert {"learning_rate", "per_device_train_batch_size", "seed", "stage"} <= set(run_settings(one))
    assert "max_bad_rate" not in run_settings(DataArguments())


def test_columns():
    assert parse_columns(["image=img", "text=caption"]) == {"image": "img", "text": "caption"}
    assert parse_columns([]) is None
    with pytest.raises(ValueError, match="--columns takes OURS=THEIRS"):
        parse_columns(["caption"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning-rat", "1"], "there is no argument '--learning-rat'; did you mean --learning_rate"),
        (["--widht=3"], "there is no argument '--widht=3'; did you mean --width"),
        (["--zzz", "1"], "there is no argument '--zzz'\n"),
        (["--width", "3", "stray"], "there is no argument 'stray'"),
    ],
)
def test_unknown_arguments_are_named(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_arguments_that_are_not_looked_at_are_said(capsys):
    names = ("width", "kind", "name")
    say_unused(ModelArguments(), names, "the folder brings its own")
    assert capsys.readouterr().out == ""
    say_unused(ModelArguments(width=9, name="b", parts=["x"]), names, "the folder brings its own")
    assert capsys.readouterr().out == "not used: --width, --name (the folder brings its own)\n"
