"""What the demo's report shows: pictures, rankings and curves out of the demo's folders and findings."""

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_vlp.cli.report import CaptionCard, Curve, Metric, RetrievalQuery, captions_picture, write_report
from hf_vlp.data.images import decode_image

SHOWN_SCENES = 12
PICTURED_SCENES = 6
SHOWN_QUERIES = 6
MATRIX_SIDE = 12

_MEANINGS = {
    "object_accuracy_unseen": "objects of unseen scenes whose colour and shape the caption names together",
    "object_accuracy_heldout": "the same in scenes of colour-shape combinations that no training picture had",
    "scene_accuracy_unseen": "unseen scenes with every object right and nothing else named",
    "scene_accuracy_heldout": "the same for the held-out combinations",
    "t2i_r1_itc": "captions whose own scene comes first by similarity, among all test scenes",
    "t2i_r1_itm": "the same after the matching head has put the best candidates in order again",
    "i2t_r1_itc": "scenes for which one of their own captions comes first by similarity",
    "i2t_r1_itm": "the same after re-ranking",
}


def loss_curves(folder: Path) -> list[Curve]:
    """Curves of a step's loss terms, out of the `trainer_state.json` that its trainer left.

    The terms by name where there are several, the whole loss where there is one.
    """
    state = folder / "trainer_state.json"
    history = json.loads(state.read_text())["log_history"] if state.is_file() else []
    rows = [row for row in history if "loss" in row]
    terms = sorted({name for row in rows for name in row if name.startswith("loss_")}) or ["loss"]
    curves = []
    for term in terms:
        points = [(row["step"], row[term]) for row in rows if term in row]
        curves.append(Curve(term.removeprefix("loss_").upper(), [s for s, _ in points], [v for _, v in points]))
    return curves


def demo_report(
    path: Path,
    *,
    metrics: Mapping[str, Any],
    steps: Sequence[tuple[str, Path]],
    usage: str,
    captions: Mapping[str, Mapping[str, Any]],
    rows: Mapping[str, Any],
    matcher: tuple[Any, Any],
) -> None:
    """Writes the demo's report, and its captions as a picture, `captions.png`, beside it.

    Args:
        path: the HTML file.
        metrics: what `metrics.json` holds.
        steps: title and output folder of each training step.
        usage: lines that load the result.
        captions: results of `evaluate_shapes_captions` with details, under `unseen` and `heldout`.
        rows: the data sets of the same names, and the `gallery` of retrieval.
        matcher: stage 1's retrieval model and its processor.
    """
    sections = {
        "Captions of unseen scenes": (
            "unseen",
            "Scenes of the test split, in the order drawn, with the caption that stage 2 gives to the picture alone.",
        ),
        "Captions of combinations that no training picture had": (
            "heldout",
            "Every object here pairs a colour with a shape that never stood together in a picture during training. "
            "(The language model has read the words together: it was trained on text about all combinations.)",
        ),
    }
    cards = {name: _cards(captions[name], rows[name]) for name, _ in sections.values()}
    captions_picture([card for name in cards for card in cards[name][:PICTURED_SCENES]], PICTURED_SCENES).save(
        path.with_name("captions.png"), optimize=True
    )
    queries, by_matching, matrix = _retrieval(*matcher, rows["gallery"])
    write_report(
        path,
        title="From CLIP to BLIP-2 on drawn scenes",
        summary=(
            "A small EVA-CLIP was trained from scratch on pairs of scenes and captions, then frozen; a Q-Former "
            "learnt to read its features (stage 1), then to speak to a frozen language model that had only ever seen "
            f"text (stage 2). Everything ran on this machine in {metrics['seconds'] / 60:.1f} minutes."
        ),
        metrics=[
            Metric(name, f"{value:.1%}", _MEANINGS.get(name, ""))
            for name, value in metrics.items()
            if name != "seconds" and (name in _MEANINGS or name.startswith("t2i"))
        ],
        captions={heading: (text, cards[name]) for heading, (name, text) in sections.items()},
        retrieval={
            "Retrieval by contrast (ITC)": (
                "For a caption, the five scenes of the gallery with the most similar features. Framed: its own scene.",
                queries,
            ),
            "Retrieval after matching (ITM)": (
                "The same captions after the matching head has read each caption together with each candidate.",
                by_matching,
            ),
        },
        matrix=matrix,
        curves={title: loss_curves(folder) for title, folder in steps},
        usage=usage,
        footer=f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}.",
    )


def _cards(result: Mapping[str, Any], rows: Any) -> list[CaptionCard]:
    cards = []
    for index, detail in enumerate(result["details"][:SHOWN_SCENES]):
        row = rows[index]
        marks = dict(zip(detail["objects"], detail["correct"], strict=True))
        marks |= {f"not there: {name}": False for name in detail["spurious"]}
        image = decode_image(row["image"]).resize((160, 160), resample=0)
        cards.append(CaptionCard(image, detail["caption"] or "(empty)", row["text"][0], marks))
    return cards


@torch.no_grad()
def _retrieval(model: Any, processor: Any, gallery: Any) -> tuple[list[RetrievalQuery], list[RetrievalQuery], tuple]:
    images = [decode_image(row["image"]) for row in gallery]
    texts = [row["text"][-1] for row in gallery]
    embedded = model.embed_images(processor(images=images, return_tensors="pt")["pixel_values"])
    tokens = processor(text=texts, return_tensors="pt", padding=True)
    text_itc = model.embed_texts(tokens["input_ids"], tokens["attention_mask"])
    similarity = model.similarity(embedded, text_itc).T  # (texts, images)

    # The longest captions say most about one scene.
    asked = sorted(range(len(texts)), key=lambda index: -len(texts[index]))[:SHOWN_QUERIES]
    by_similarity, by_matching = [], []
    for index in asked:
        candidates = similarity[index].topk(min(16, len(images))).indices
        row = {name: tokens[name][index].expand(len(candidates), -1) for name in ("input_ids", "attention_mask")}
        scores = model.matching_scores(embedded, candidates, **row) + similarity[index][candidates]
        for found, order in (
            (by_similarity, candidates),
            (by_matching, candidates[scores.argsort(descending=True)]),
        ):
            shown = order[:5].tolist()
            pictures = [images[image].resize((110, 110), resample=0) for image in shown]
            found.append(RetrievalQuery(texts[index], pictures, [image == index for image in shown]))
    side = asked + [index for index in range(len(texts)) if index not in asked][: MATRIX_SIDE - len(asked)]
    matrix = ([images[i] for i in side], [texts[i] for i in side], similarity[side][:, side].tolist())
    return by_similarity, by_matching, matrix
