"""`hf-vlp train`: the scripts of `training_scripts/`, by name."""

import importlib.util
import runpy
import subprocess
import sys
from pathlib import Path

from hf_vlp.cli.errors import UsageError
from hf_vlp.cli.main import parser
from hf_vlp.resources import resource_folder

_EXAMPLES = """\
  hf-vlp train                                     # the scripts there are
  hf-vlp train clip --help                         # the arguments of a script
  hf-vlp train clip --train_data pairs.parquet --output_dir outputs/clip
  hf-vlp train --num_processes 8 blip2_stage1 --config blip2_stage1.yaml
  hf-vlp train --accelerate_config fsdp.yaml blip2_stage2 --output_dir outputs/blip2

The same command started again goes on where it was stopped."""


def scripts() -> dict[str, Path]:
    """Name -> file of the training scripts."""
    return {path.stem: path for path in sorted(resource_folder("training_scripts").glob("*.py"))}


def summary(path: Path) -> str:
    """The first line of a script's docstring."""
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.strip().lstrip("r").strip('"').strip()
        if text:
            return text
    return ""


def main(argv: list[str]) -> int:
    found = scripts()
    command = parser("train", "Runs a training script.", _EXAMPLES)
    command.add_argument(
        "--num_processes", type=int, metavar="N", help="processes, one a GPU; started by `accelerate launch`"
    )
    command.add_argument(
        "--accelerate_config",
        metavar="FILE",
        help="configuration of `accelerate launch` (FSDP, DeepSpeed, several machines), or the name of one in "
        "training_scripts/accelerate_configs",
    )
    command.add_argument("script", nargs="?", metavar="SCRIPT", help=f"one of: {', '.join(found)}")
    # What follows the script's name is the script's, `--help` included.
    place = next((index for index, word in enumerate(argv) if word in found), len(argv))
    own = command.parse_args(argv[: place + 1])
    rest = argv[place + 1 :]
    if own.script is None:
        for name, path in found.items():
            print(f"{name:<20} {summary(path)}")
        return 0
    if own.script not in found:
        raise UsageError(f"there is no script {own.script!r}; there are: {', '.join(found)}")
    if own.num_processes is not None and own.num_processes < 1:
        raise UsageError(f"--num_processes must be at least 1, got {own.num_processes}")
    if own.num_processes in (None, 1) and own.accelerate_config is None:
        return run_here(found[own.script], rest)
    return subprocess.run(launch_command(found[own.script], rest, own.num_processes, own.accelerate_config)).returncode


def run_here(script: Path, arguments: list[str]) -> int:
    """Runs a script in this process, as `python script arguments` would."""
    before = sys.argv
    sys.argv = [str(script), *arguments]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = before
    return 0


def launch_command(
    script: Path, arguments: list[str], num_processes: int | None = None, accelerate_config: str | None = None
) -> list[str]:
    """The `accelerate launch` line for a script."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    if accelerate_config is not None:
        command += ["--config_file", str(_configuration(accelerate_config))]
    if num_processes is not None:
        command += ["--num_processes", str(num_processes)]
        if accelerate_config is None:
            # Named one by one: accelerate warns of every value that it has to choose. Port 0 is any free one.
            command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
            # On the CPU the launcher starts one process; the scripts start the others.
            command += ["--main_process_port", "0", "--multi_gpu"] if _has_accelerator() else ["--cpu"]
    return [*command, str(script), *arguments]


def _configuration(name: str) -> Path:
    given = Path(name)
    shipped = resource_folder("training_scripts") / "accelerate_configs"
    for path in (given, shipped / given.name, shipped / f"{given.name}.yaml"):
        if path.is_file():
            return path
    names = sorted(path.stem for path in shipped.glob("*.yaml"))
    raise UsageError(f"there is no accelerate configuration {name!r}; give a file, or one of: {', '.join(names)}")


def _has_accelerator() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.accelerator.is_available()
