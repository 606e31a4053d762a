"""`hf-vlp merge`: LoRA adapters and the weights trained with them, put into their base: a native folder."""

from pathlib import Path

from hf_vlp.cli.main import parser

_EXAMPLES = """\
  hf-vlp merge outputs/llava-lora/adapters outputs/llava-merged
  hf-vlp merge outputs/llava-lora/adapters outputs/llava-merged --base outputs/llava-stage1/model

The result gives the same answers as base and adapters together, and plain transformers opens it."""


def main(argv: list[str]) -> int:
    command = parser("merge", "Merges LoRA adapters into the model that they were trained on.", _EXAMPLES)
    command.add_argument("adapters", metavar="ADAPTERS", help="folder that a script with --lora_r wrote")
    command.add_argument("out", metavar="OUT", help="folder to write")
    command.add_argument("--base", help="folder or Hub id of the base, if it is no longer where it was")
    options = command.parse_args(argv)
    adapters, out = Path(options.adapters), Path(options.out)
    if not adapters.is_dir():
        raise FileNotFoundError(f"there is no folder {adapters}")
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists; name a place where nothing is, so that nothing is lost")

    from hf_vlp.training.adapters import merge_folder

    print(merge_folder(adapters, out, base=options.base))
    return 0
