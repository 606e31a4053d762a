"""`hf-vlp card`: the model card of a saved folder."""

import json
from dataclasses import replace
from pathlib import Path

from hf_vlp.cli.main import parser

_EXAMPLES = """\
  hf-vlp card outputs/blip2-opt/model --license mit --card card.yaml --results coco.json
  hf-vlp card outputs/clip/model --license apache-2.0 --print

card.yaml holds fields of `hf_vlp.hub.CardData`: data, datasets, recipe, command, base_models, language, limits, ...
A results file is what `hf-vlp evaluate --output` wrote; with several, name the Hub id of each data set in its order.

The folder is completed too: `config.json` names the pipelines, whose files are put beside it."""


def main(argv: list[str]) -> int:
    command = parser("card", "Writes the model card of a folder and completes the folder for the Hub.", _EXAMPLES)
    command.add_argument("folder", metavar="FOLDER", help="folder of `save_pretrained`")
    command.add_argument("--repo_id", help="name that the card's snippets load; the folder's name if left out")
    command.add_argument("--license", help="identifier of the Hub's list, e.g. mit; 'unknown' if left out")
    command.add_argument("--card", metavar="FILE", help="YAML or JSON with what the card says")
    command.add_argument("--results", nargs="+", default=[], metavar="FILE", help="results of `hf-vlp evaluate`")
    command.add_argument("--dataset_id", nargs="+", default=[], metavar="ID", help="Hub ids of the results' data sets")
    command.add_argument("--print", action="store_true", help="print the card and write nothing")
    command.add_argument("--verify", action="store_true", help="load the folder without hf_vlp and run the snippets")
    options = command.parse_args(argv)

    from hf_vlp.hub.card import CardData, metrics_from_result, render_card, write_card
    from hf_vlp.hub.saving import complete_folder

    card = CardData.from_file(options.card) if options.card else CardData()
    if options.license:
        card = replace(card, license=options.license)
    metrics = list(card.metrics)
    for number, file in enumerate(options.results):
        dataset_id = options.dataset_id[number] if number < len(options.dataset_id) else None
        metrics += metrics_from_result(json.loads(Path(file).read_text(encoding="utf-8")), dataset_id=dataset_id)
    card = replace(card, metrics=metrics)
    if options.print:
        print(render_card(options.folder, card, options.repo_id))
        return 0
    render_card(options.folder, card, options.repo_id)  # what is wrong with the folder is said before it is changed
    complete_folder(Path(options.folder))
    print(write_card(options.folder, card, options.repo_id))
    if options.verify:
        from hf_vlp.hub.verification import verify_folder

        report = verify_folder(options.folder)
        print(f"loads without hf_vlp; largest difference {report.largest:.2g}; {len(report.snippets)} snippet(s) ran")
    return 0
