"""`hf-vlp push`: a saved folder to the Hub."""

import sys
from pathlib import Path

from hf_vlp.cli.main import parser

_EXAMPLES = """\
  hf-vlp push outputs/blip2-opt/model org/blip2-opt
  hf-vlp push outputs/clip/model my-clip --private --license mit
  hf-vlp push outputs/clip/model org/clip --create_pr

Log in first with `hf auth login`, or set HF_TOKEN. Pickles, trainer checkpoints and logs are never uploaded."""


def main(argv: list[str]) -> int:
    command = parser("push", "Uploads a folder to the Hub; makes the repository if there is none.", _EXAMPLES)
    command.add_argument("folder", metavar="FOLDER", help="folder of `save_pretrained`")
    command.add_argument("repo_id", metavar="REPO", help="'name' or 'organisation/name'")
    command.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    command.add_argument("--license", help="of the card that is written if the folder has none")
    command.add_argument("--revision", help="branch; made if missing")
    command.add_argument("--create_pr", action="store_true", help="open a pull request instead of committing")
    command.add_argument("--message", help="of the commit")
    command.add_argument("--verify", action="store_true", help="first load the folder without hf_vlp and compare")
    options = command.parse_args(argv)

    from hf_vlp.hub.pushing import push

    folder = Path(options.folder)
    if (folder / "config.json").is_file() and not (folder / "README.md").is_file():
        from hf_vlp.hub.card import CardData, write_card
        from hf_vlp.hub.saving import complete_folder

        complete_folder(folder)
        card = write_card(folder, CardData(license=options.license or "unknown"), options.repo_id)
        print(f"wrote {card}; fill it with `hf-vlp card {folder}`", file=sys.stderr)
    if options.verify:
        from hf_vlp.hub.verification import verify_folder

        verify_folder(folder)
    print(
        push(
            folder,
            options.repo_id,
            private=options.private,
            revision=options.revision,
            create_pr=options.create_pr,
            message=options.message,
        )
    )
    return 0
