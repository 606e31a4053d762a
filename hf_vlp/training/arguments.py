"""Arguments of the training scripts as dataclasses, and the parser that reads them from the command line and YAML."""

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from hf_vlp.training.launch import say, start_missing_processes

T = TypeVar("T")


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with a help text.

    Args:
        default: value, or a callable that makes it (`list`, `dict`).
        help: shown by `--help`.
        metadata: `aliases`, `choices` and what else argparse takes.
    """
    metadata = {"help": help, **metadata}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


# Fields of `TrainingArguments`, ours included, that cannot change the weights a run ends with.
_NOT_SETTINGS_TEXT = """
    output_dir logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter
    include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id
    trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size
    prediction_loss_only eval_on_start eval_do_concat_batches eval_use_gather_object eval_accumulation_steps
    include_for_metrics batch_eval_metrics bf16_full_eval fp16_full_eval save_only_model save_strategy save_steps
    save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id
    hub_strategy hub_always_push hub_revision load_best_model_at_end metric_for_best_model greater_is_better
    ignore_data_skip restore_callback_states_from_checkpoint dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
    remove_unused_columns label_names length_column_name ddp_bucket_cap_mb ddp_backend ddp_timeout
    ddp_find_unused_parameters ddp_static_graph debug skip_memory_metrics do_train do_eval do_predict
    resume_from_checkpoint local_rank use_cpu accelerator_config torch_empty_cache_steps use_cache
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    deepspeed fsdp fsdp_config parallelism_config grad_cache_chunk_size resume allow_changed_settings sanity
    sanity_steps sanity_check_step save_frozen"""
_NOT_SETTINGS = frozenset(_NOT_SETTINGS_TEXT.split())


def run_settings(arguments: Any) -> dict[str, Any]:
    """The fields of a dataclass that decide which weights a run ends with, by name.

    A dataclass names those that do not in a class variable `not_settings`.
    """
    left_out = _NOT_SETTINGS | getattr(arguments, "not_settings", frozenset())
    return {
        entry.name: getattr(arguments, entry.name)
        for entry in dataclasses.fields(arguments)
        if entry.init and entry.name not in left_out
    }


def say_unused(arguments: Any, names: Iterable[str], reason: str) -> None:
    """Says on the terminal which of the named arguments were given but are not looked at.

    Args:
        arguments: a dataclass of arguments.
        names: of its fields.
        reason: why they are not.
    """
    defaults = {entry.name: entry.default for entry in dataclasses.fields(arguments)}
    given = [f"--{name}" for name in names if getattr(arguments, name) != defaults[name]]
    if given:
        say(f"not used: {', '.join(given)} ({reason})")


@dataclass
class VLPTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with what vision-language pretraining adds.

    Where defaults differ from the parent's: AdamW's betas, weight decay and the cosine schedule are BLIP-2's
    (2301.12597, section 4); columns are never removed; a non-finite loss stops the run instead of being filtered.
    """

    _argument_group_name: ClassVar[str] = "training"

    output_dir: str = option("outputs/run", "Folder of the checkpoints and, at the end, of the exported model.")
    stage: str = option(
        "", "Which parts train: a stage of the model's table. Empty: the stage that the script is for."
    )
    learning_rate: float = option(1e-4, "Peak learning rate.")
    part_learning_rates: list[str] = option(
        list, "Learning rates of single parts, as PATH=RATE, e.g. qformer=1e-4 vision_model=1e-6."
    )
    weight_decay: float = option(0.05, "AdamW's weight decay; gains, biases and temperatures do not decay.")
    adam_beta2: float = option(0.98, "AdamW's second beta.")
    lr_scheduler_type: str = option("cosine", "Schedule of the learning rate after the warm-up.")
    warmup_steps: float = option(0, "Steps of linear warm-up; below 1, a share of all steps.")
    grad_cache_chunk_size: int = option(
        0,
        "Gradient caching: records whose activations are held at a time, 0 for none. The step equals the plain one of "
        "the whole batch, which gradient accumulation does not for a contrastive loss.",
    )
    resume: str = option(
        "auto",
        "'auto' goes on from the newest whole checkpoint of --output_dir if there is one; 'never' starts anew and "
        "refuses a folder that has checkpoints; else the folder of a checkpoint.",
    )
    allow_changed_settings: bool = option(
        False, "Resume although settings that decide the result have changed since the checkpoint."
    )
    sanity: bool = option(
        True,
        "Print each loss beside its value for a model that knows nothing, and check that it rises when the images of "
        "the batch are permuted. Changes nothing in the run.",
    )
    sanity_steps: int = option(2, "First steps for which the sanity pass prints its table.")
    sanity_check_step: int = option(
        0,
        "Step at which the sanity pass warns of losses at chance level or blind to the images; 0: at the end of the "
        "warm-up, but not before step 100.",
    )
    sync_batchnorm: bool = option(False, "Share batch-norm statistics over the GPUs (ResNet and EfficientNet towers).")
    per_device_eval_batch_size: int = option(64, "Records a device and step in evaluation.")
    logging_steps: float = option(10, "Steps between log lines; below 1, a share of all steps.")
    logging_first_step: bool = option(True, "Log the first step as well.")
    logging_nan_inf_filter: bool = option(False, "Hide non-finite losses from the log; leave it off.")
    save_steps: float = option(500, "Steps between checkpoints; below 1, a share of all steps.")
    save_frozen: bool = option(
        True,
        "Keep the frozen weights in checkpoints too. Without them a checkpoint is small, and resuming loads them from "
        "where the run started and checks that they are the same.",
    )
    save_total_limit: int | None = option(2, "Checkpoints kept; the oldest are removed.")
    report_to: None | str | list[str] = option("none", "Trackers: tensorboard, trackio, wandb, none or all.")
    remove_unused_columns: bool = option(False, "Leave this off: the collator picks the columns it needs.")


# What `--help` lists of `TrainingArguments`; `--help_all` lists everything.
_COMMON_TEXT = """
    output_dir stage per_device_train_batch_size num_train_epochs max_steps learning_rate part_learning_rates
    weight_decay adam_beta1 adam_beta2 lr_scheduler_type warmup_steps optim max_grad_norm gradient_accumulation_steps
    grad_cache_chunk_size bf16 fp16 activation_checkpointing torch_compile seed data_seed full_determinism use_cpu
    dataloader_num_workers dataloader_drop_last eval_strategy eval_steps per_device_eval_batch_size logging_steps
    report_to run_name save_strategy save_steps save_frozen save_total_limit resume allow_changed_settings sanity
    sanity_steps sanity_check_step sync_batchnorm push_to_hub hub_model_id"""
COMMON_TRAINING_OPTIONS = frozenset(_COMMON_TEXT.split())


class _ScriptParser(HfArgumentParser):
    """Says what is wrong without the two screens of usage that argparse prints for so many options."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\nTry --help.\n")


def parse_arguments(
    types: type[T] | list[type], argv: list[str] | None = None, *, description: str | None = None
) -> tuple[Any, ...]:
    """Reads the given dataclasses from `--config file.yaml` and the command line, which wins.

    Args:
        types: dataclasses, in the order in which they are returned.
        argv: arguments without the program's name; None: those of the process.
        description: shown at the top of `--help`.

    Raises:
        SystemExit: after `--help` or `--help_all`; or, with status 2 and a message, on an unknown or ill-typed
            argument, a missing file, or a key of the YAML file that no argument has.
    """
    if argv is None:
        start_missing_processes()
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _ScriptParser(
        types, description=description, formatter_class=_HelpFormatter, add_help=False, allow_abbrev=False
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of arguments; the command line wins over it.")
    parser.add_argument("-h", "--help", action="store_true", help="Show the usual arguments and exit.")
    parser.add_argument("--help_all", action="store_true", help="Show every argument of the trainer too and exit.")
    if {"-h", "--help", "--help_all"} & set(argv):
        _print_help(parser, everything="--help_all" in argv)
        parser.exit(0)

    config, _ = _config_parser().parse_known_args(argv)
    if config.config is not None:
        parser.set_defaults(**_read_config(parser, Path(config.config)))
        for action in parser._actions:
            # What the file gives is no longer required.
            action.required = action.required and action.default in (None, argparse.SUPPRESS)
    try:
        *parsed, _, unknown = parser.parse_args_into_dataclasses(
            argv, look_for_args_file=False, return_remaining_strings=True
        )
    except ValueError as error:
        parser.error(str(error))
    if unknown:
        known = [action.dest for action in parser._actions]
        parser.error(f"there is no argument {unknown[0]!r}{_did_you_mean(unknown[0].lstrip('-'), known, '--')}")
    return tuple(parsed)


def _did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name.partition("=")[0].replace("-", "_"), known, n=3)
    return f"; did you mean {' or '.join(prefix + one for one in near)}?" if near else ""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)

    def _format_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any) -> str:
        return f"usage: {self._prog} [--config FILE] [--ARGUMENT VALUE ...]\n\n"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "", [], argparse.SUPPRESS) or action.default is False:
            return action.help
        return super()._get_help_string(action)


_METAVARS = {int: "INT", float: "FLOAT", string_to_bool: "BOOL"}


def _print_help(parser: HfArgumentParser, *, everything: bool) -> None:
    own = {entry.name for kind in parser.dataclass_types for entry in dataclasses.fields(kind) if _is_ours(kind)}
    for action in parser._actions:
        known = action.dest in own or action.dest in COMMON_TRAINING_OPTIONS | {"config", "help", "help_all"}
        if (not everything and not known) or any(name.startswith("--no") for name in action.option_strings):
            action.help = argparse.SUPPRESS
        if action.choices and len(action.choices) > 8:
            action.choices, action.metavar = None, "NAME"
        elif action.choices is None and action.metavar is None and action.nargs != 0:
            action.metavar = _METAVARS.get(action.type, "TEXT")
        # One spelling each; `--train-data` and `--train_data` are the same.
        action.option_strings = [name for name in action.option_strings if "-" not in name.lstrip("-")]
    parser.print_help()


def _is_ours(kind: type) -> bool:
    return not issubclass(kind, TrainingArguments)


def _config_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    return parser


def _read_config(parser: HfArgumentParser, path: Path) -> dict[str, Any]:
    """The YAML file as defaults of the parser, checked against its arguments."""
    if not path.is_file():
        parser.error(f"--config {path}: no such file")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        parser.error(f"--config {path} is not YAML: {error}")
    if not isinstance(values, dict):
        parser.error(f"--config {path} must hold 'argument: value' lines")
    actions = {action.dest: action for action in parser._actions}
    unknown = sorted(set(values) - set(actions))
    if unknown:
        parser.error(f"--config {path}: no argument is called {unknown[0]!r}{_did_you_mean(str(unknown[0]), actions)}")
    return {name: _typed(parser, path, actions[name], value) for name, value in values.items()}


def _typed(parser: HfArgumentParser, path: Path, action: argparse.Action, value: Any) -> Any:
    # YAML reads 1e-4 as a string; argparse's own conversion makes the number of it, or the error.
    if isinstance(value, list):
        return [_typed(parser, path, action, item) for item in value]
    if value is None or isinstance(value, bool | dict):
        return value
    try:
        typed = parser._get_value(action, str(value))
    except argparse.ArgumentError as error:
        parser.error(f"--config {path}: {error}")
    if action.choices is not None and typed not in action.choices:
        parser.error(f"--config {path}: {action.dest} may be one of {list(action.choices)}, not {value!r}")
    return typed
