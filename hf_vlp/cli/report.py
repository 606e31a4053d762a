"""The demo's report: one HTML file that holds its pictures, curves and tables itself."""

import base64
import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from markupsafe import Markup, escape
from PIL import Image, ImageDraw, ImageFont

TEMPLATE = Path(__file__).with_name("report.html.jinja")

# Distinguishable for most readers with a colour vision deficiency, on light and dark paper.
_LINE_COLOURS = ("#3457d5", "#d4602a", "#17804a", "#9b4dca", "#c2a000")


@dataclass
class Metric:
    """A row of the table of measures."""

    name: str
    value: str
    meaning: str


@dataclass
class CaptionCard:
    """A scene with the caption a model gave it. `marks`: object name -> was it named rightly?"""

    image: Image.Image
    generated: str
    truth: str
    marks: Mapping[str, bool] = field(default_factory=dict)


@dataclass
class RetrievalQuery:
    """A text with the images ranked first for it; `hits[i]` says whether `images[i]` is its true image."""

    text: str
    images: Sequence[Image.Image]
    hits: Sequence[bool]


@dataclass
class Curve:
    """Values of one loss over the steps of a stage; `chance` is the value at no knowledge, if it has one."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    chance: float | None = None


def captions_picture(cards: Sequence[CaptionCard], columns: int = 6) -> Image.Image:
    """The scenes in a grid with their generated captions below, in red where a mark says that something is wrong.

    Args:
        cards: at least one; their images are of one size.
        columns: scenes a row.
    """
    side, gap, line = cards[0].image.width, 12, 16
    font = ImageFont.load_default(size=13)
    wrapped = [textwrap.wrap(card.generated, width=side // 7) for card in cards]
    height = side + line * max(map(len, wrapped)) + 2 * gap
    rows = -(-len(cards) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (card, text) in enumerate(zip(cards, wrapped)):
        left, top = gap + place % columns * (side + gap), gap + place // columns * height
        sheet.paste(card.image.convert("RGB"), (left, top))
        draw.rectangle((left - 1, top - 1, left + side, top + side), outline="#d0d7de")
        ink = "#1f2328" if all(card.marks.values()) else "#b3261e"
        draw.multiline_text((left, top + side + gap // 2), "\n".join(text), fill=ink, font=font)
    return sheet


def data_uri(image: Image.Image) -> str:
    """PNG of the image as a `data:` URI, so that the page needs no other file."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def curve_svg(title: str, curves: Sequence[Curve], *, width: int = 340, height: int = 220) -> Markup:
    """Line chart of one stage as inline SVG.

    Raises:
        ValueError: no curve has a point.
    """
    drawn = [curve for curve in curves if len(curve.values)]
    if not drawn:
        raise ValueError(f"nothing to draw for {title!r}: no loss was logged; lower `logging_steps`")
    left, right, top, bottom = 40, 12, 30, 40
    last = max(max(curve.steps) for curve in drawn) or 1
    highest = max(max(curve.values) for curve in drawn)
    highest = max([highest, *(curve.chance for curve in drawn if curve.chance is not None)]) * 1.05 or 1.0

    def x(step: float) -> float:
        return left + (width - left - right) * step / last

    def y(value: float) -> float:
        return height - bottom - (height - top - bottom) * max(value, 0.0) / highest

    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">',
        f'<text x="{left}" y="18" style="font-size:13px">{escape(title)}</text>',
        f'<line class="axis" x1="{left}" y1="{y(0):.1f}" x2="{width - right}" y2="{y(0):.1f}"/>',
        f'<text x="{left - 6}" y="{y(0):.1f}" text-anchor="end">0</text>',
        f'<text x="{left - 6}" y="{y(highest / 1.05) + 4:.1f}" text-anchor="end">{highest / 1.05:.2g}</text>',
        f'<text x="{width - right}" y="{height - bottom + 14}" text-anchor="end">{last:.0f} steps</text>',
    ]
    for index, curve in enumerate(drawn):
        colour = _LINE_COLOURS[index % len(_LINE_COLOURS)]
        points = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in zip(curve.steps, curve.values, strict=True))
        parts.append(f'<polyline class="loss" stroke="{colour}" points="{points}"/>')
        if curve.chance is not None:
            level = f"{y(curve.chance):.1f}"
            parts.append(f'<path class="chance" d="M{left},{level} H{width - right}"/>')
        offset = left + index * (width - left - right) / len(drawn)
        label = f"{curve.name} {curve.values[-1]:.2f}"
        parts.append(f'<text x="{offset:.0f}" y="{height - 10}" style="fill:{colour}">{escape(label)}</text>')
    parts.append("</svg>")
    return Markup("".join(parts))


def _caption_section(title: str, text: str, cards: Iterable[CaptionCard]) -> dict:
    return {
        "title": title,
        "text": text,
        "cards": [
            {
                "image": data_uri(card.image),
                "generated": card.generated,
                "truth": card.truth,
                "marks": [{"name": name, "correct": correct} for name, correct in card.marks.items()],
            }
            for card in cards
        ],
    }


def write_report(
    path: Path,
    *,
    title: str,
    summary: str,
    metrics: Sequence[Metric],
    captions: Mapping[str, tuple[str, Sequence[CaptionCard]]],
    retrieval: Mapping[str, tuple[str, Sequence[RetrievalQuery]]],
    matrix: tuple[Sequence[Image.Image], Sequence[str], Sequence[Sequence[float]]],
    curves: Mapping[str, Sequence[Curve]],
    usage: str,
    footer: str,
) -> None:
    """Writes the page.

    Args:
        path: the HTML file.
        captions: heading -> (explanation, cards).
        retrieval: heading -> (explanation, queries).
        matrix: images (columns), texts (rows) and the similarity of each text to each image.
        curves: stage -> its loss terms.
    """
    images, texts, similarities = matrix
    flat = [value for row in similarities for value in row]
    low, high = min(flat), max(flat)
    span = (high - low) or 1.0
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        summary=summary,
        metrics=metrics,
        captions=[_caption_section(heading, text, cards) for heading, (text, cards) in captions.items()],
        retrieval=[
            {
                "title": heading,
                "text": text,
                "queries": [
                    {
                        "text": query.text,
                        "images": [
                            {"data": data_uri(image), "hit": hit}
                            for image, hit in zip(query.images, query.hits, strict=True)
                        ],
                    }
                    for query in queries
                ],
            }
            for heading, (text, queries) in retrieval.items()
        ],
        matrix={
            "text": f"Cosine similarity of captions (rows) and scenes (columns), from {low:.2f} to {high:.2f}: "
            "the darker, the closer. True pairs lie on the diagonal.",
            "images": [data_uri(image) for image in images],
            "rows": [
                {
                    "text": text,
                    "cells": [{"shade": f"{(value - low) / span:.3f}", "value": f"{value:.3f}"} for value in row],
                }
                for text, row in zip(texts, similarities, strict=True)
            ],
        },
        curves=[curve_svg(stage, terms) for stage, terms in curves.items()],
        usage=usage,
        footer=footer,
    )
    path.write_text(page, encoding="utf-8")
