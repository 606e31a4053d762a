"""The command `hf-vlp`: reads the command line and hands over to the file of the subcommand.

Nothing heavy is imported before a subcommand runs, so that `--help` answers at once. An error that the user can mend
is one line on the standard error, with what is wrong, where, and what to do; `--debug` (or `HF_VLP_DEBUG=1`) adds the
traceback. Exit status: 0 done, 1 failed, 2 wrong usage, 3 done in part (some inputs were skipped), 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from hf_vlp.cli.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, UsageError, one_line, user_errors

# Command -> (module, what it does, in the order of `--help`).
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("hf_vlp.cli.demo", "train CLIP -> BLIP-2 on synthetic scenes and write a report (ten minutes of CPU)"),
    "train": ("hf_vlp.cli.train", "run a training script, on one process or several"),
    "evaluate": ("hf_vlp.cli.evaluate", "measure a model: retrieval, zero-shot, captioning, vqa"),
    "caption": ("hf_vlp.cli.caption", "write captions for images"),
    "capfilt": ("hf_vlp.cli.capfilt", "caption and filter image-text data into the next pretraining set"),
    "convert": ("hf_vlp.cli.convert", "turn an original checkpoint into a folder for transformers"),
    "new": ("hf_vlp.cli.new", "put a vision tower and a language model together with a new connector"),
    "merge": ("hf_vlp.cli.merge", "put LoRA adapters into the model that they were trained on"),
    "conversations": ("hf_vlp.cli.conversations", "show conversations as a template writes them, and what is learned"),
    "card": ("hf_vlp.cli.card", "write the model card of a folder and complete it for the Hub"),
    "push": ("hf_vlp.cli.push", "upload a folder to the Hub"),
    "list": ("hf_vlp.cli.catalogue", "show the architectures, scripts and formats"),
}

_EPILOG = """\
examples:
  hf-vlp demo --output outputs/demo
  hf-vlp train clip --train_data path/to/pairs --output_dir outputs/clip
  hf-vlp train --num_processes 8 blip2_stage1 --train_data path/to/pairs --vision_model outputs/clip/model
  hf-vlp evaluate retrieval --model outputs/stage1/model --data path/to/pairs --split test --rerank 128
  hf-vlp caption outputs/blip2-opt/model photos/ --output captions.jsonl
  hf-vlp convert openai-clip RN50.pt outputs/clip-rn50
  hf-vlp push outputs/blip2-opt/model org/blip2-opt --private

`hf-vlp COMMAND --help` tells more about a command.
"""


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return (
        "usage: hf-vlp COMMAND ...\n\nVision-language pretraining on the Hugging Face stack.\n\n"
        f"commands:\n{lines}\n\noptions:\n  --help     show this\n  --version  show the version\n"
        f"  --debug    show the traceback of an error\n\n{_EPILOG}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: arguments without the program's name; those of the process where None.

    Returns:
        The exit status.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = bool(os.environ.get("HF_VLP_DEBUG"))
    if arguments[:1] == ["--debug"]:
        debug = True
        arguments = arguments[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else EXIT_USAGE
    if arguments[0] in ("-V", "--version"):
        from hf_vlp import __version__

        print(f"hf-vlp {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        print(f"hf-vlp: error: there is no command {name!r}; there are: {', '.join(COMMANDS)}", file=sys.stderr)
        return EXIT_USAGE
    return run(name, import_module(COMMANDS[name][0]).main, rest, debug=debug)


def run(name: str, command: Callable[[list[str]], int | None], arguments: list[str], *, debug: bool = False) -> int:
    """Runs a subcommand and turns what it raises into a line and an exit status."""
    try:
        return command(arguments) or 0
    except SystemExit as leave:  # argparse
        if isinstance(leave.code, str):
            print(leave.code, file=sys.stderr)
            return EXIT_FAILED
        return int(leave.code or 0)
    except KeyboardInterrupt:
        print(f"hf-vlp {name}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (`| head`) has gone; Python would complain again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except user_errors() as error:
        if debug:
            raise
        print(f"hf-vlp {name}: error: {one_line(error)}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED


def parser(command: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A parser for a subcommand, with its examples under the options."""
    return argparse.ArgumentParser(
        prog=f"hf-vlp {command}",
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


if __name__ == "__main__":
    sys.exit(main())
