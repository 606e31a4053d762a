"""`hf-vlp conversations`: what a model is shown of conversations, and what of it it learns."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_vlp.cli.errors import UsageError
from hf_vlp.cli.main import parser

_EXAMPLES = """\
  hf-vlp conversations show --template vicuna_v1
  hf-vlp conversations show --data llava_instruct.json --image_root coco/ --rows 5 --output conversations.html
  hf-vlp conversations show --processor outputs/llava/model --template chat --output conversations.html"""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em; color: #222 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f4; padding: .8em; color: #777 }
.learned { background: #c9ecc9; color: #123d12 } .image { background: #cfdcf7; color: #1a2f66 }
.token { border-right: 1px solid #0003 } h2 { margin-top: 2em } h3 { font-weight: 600; font-size: 1em }
"""


def main(argv: list[str]) -> int:
    command = parser("conversations", "Shows conversations as a template writes them.", _EXAMPLES)
    command.add_argument("action", choices=["show"], help="show: which characters or tokens are learned")
    command.add_argument(
        "--template", nargs="+", metavar="NAME", help="templates; all that need no tokenizer if left out"
    )
    command.add_argument(
        "--data", default="shapes:simple", metavar="SPEC", help="conversations: a file, folder, Hub id or shapes"
    )
    command.add_argument("--split", default="train", help="split of the data")
    command.add_argument("--image_root", metavar="FOLDER", help="where image paths start from")
    command.add_argument("--rows", type=int, default=3, help="conversations to show")
    command.add_argument(
        "--processor", metavar="FOLDER", help="show the tokens of this processor instead of characters"
    )
    command.add_argument("--max_length", type=int, help="with --processor: cut conversations at so many tokens")
    command.add_argument("--output", type=Path, metavar="FILE", help="an HTML page; the terminal if left out")
    options = command.parse_args(argv)
    if options.rows < 1:
        raise UsageError("--rows: at least 1")
    if options.max_length is not None and not options.processor:
        raise UsageError("--max_length counts tokens; give a --processor")
    processor = _processor(options.processor) if options.processor else None
    shown = _shown(options, processor)
    if options.output is None:
        print(_text(shown))
    else:
        options.output.write_text(_page(shown), encoding="utf-8")
        print(f"wrote {options.output}")
    return 0


Part = tuple[str, str]
Shown = list[tuple[str, list[tuple[str, list[Part]]]]]


def _shown(options: Any, processor: Any) -> Shown:
    """Template -> (name of the conversation, its pieces)."""
    from hf_vlp.data.conversations import load_conversations, make_template
    from hf_vlp.data.conversations.messages import check_images
    from hf_vlp.data.conversations.templates import rendered_parts, template_classes

    rows = load_conversations(options.data, options.split, image_root=options.image_root, streaming=True)
    held = []
    for row in rows:
        if len(held) == options.rows:
            break
        held.append(row)
    known = template_classes()
    names = options.template or [name for name in known if name != "chat"]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"--template: there is no {unknown[0]!r}; there are {', '.join(known)}")
    shown: Shown = []
    for name in names:
        if processor is not None:
            template = make_template(name, processor)
        elif name == "chat":
            raise UsageError("--template chat is a tokenizer's own: give the --processor that has it")
        else:
            template = known[name]()
        conversations = []
        for row in held:
            title = f"{row['source']} [{row['key']}]"
            if row.get("problem"):
                conversations.append((f"{title} {row['problem']}", []))
            elif processor is None:
                check_images(row["messages"], len(row["images"]), title)
                conversations.append((title, rendered_parts(template.render(row["messages"]))))
            else:
                conversations.append(_tokens(title, row, template, processor, options.max_length))
        shown.append((name, conversations))
    return shown


def _tokens(title: str, row: Any, template: Any, processor: Any, max_length: int | None) -> tuple[str, list[Part]]:
    from hf_vlp.data.conversations import encode_conversation
    from hf_vlp.data.conversations.encoding import IGNORED
    from hf_vlp.data.images import decode_image

    encoded = encode_conversation(template.render(row["messages"]), template, processor, where=title)
    images = [decode_image(image) for image in row["images"] or ()]
    counts = processor.prepare_images(images)[1] if images else []
    ids, labels, left = encoded.expanded(counts, max_length)
    image_id = processor.tokenizer.convert_tokens_to_ids(template.image_token)
    parts: list[Part] = []
    run = 0
    for place, (number, label) in enumerate(zip(ids, labels, strict=True)):
        if number == image_id:
            run += 1
            if place + 1 == len(ids) or ids[place + 1] != image_id:
                parts.append(("image token", f"{template.image_token} x {run}"))
                run = 0
            continue
        parts.append(("read token" if label == IGNORED else "learned token", processor.tokenizer.decode([number])))
    learned = sum(label != IGNORED for label in labels)
    return f"{title}: {len(ids)} tokens, {learned} learned, {left} of {len(counts)} images", parts


def _processor(folder: str) -> Any:
    import hf_vlp  # noqa: F401  makes the processors known to transformers
    from hf_vlp.models.catalog import load_class

    processor = load_class(folder, "processor").from_pretrained(folder)
    if not hasattr(processor, "prepare_images"):
        raise UsageError(f"--processor {folder}: a {type(processor).__name__} does not take conversations")
    return processor


def _text(shown: Shown) -> str:
    lines = ["learned words stand between [+ and +], images between [~ and ~]", ""]
    marks = {"learned": ("[+", "+]"), "image": ("[~", "~]"), "read": ("", "")}
    for name, conversations in shown:
        lines.append(f"== {name}")
        for title, parts in conversations:
            lines.append(f"-- {title}")
            joined: list[Part] = []
            for kind, piece in parts:
                kind = kind.split()[0]
                if joined and joined[-1][0] == kind:
                    joined[-1] = (kind, joined[-1][1] + piece)
                else:
                    joined.append((kind, piece))
            lines.append("".join(marks[kind][0] + piece + marks[kind][1] for kind, piece in joined))
        lines.append("")
    return "\n".join(lines)


def _page(shown: Sequence[tuple[str, list[tuple[str, list[Part]]]]]) -> str:
    body = []
    for name, conversations in shown:
        body.append(f"<h2>{html.escape(name)}</h2>")
        for title, parts in conversations:
            pieces = "".join(f'<span class="{kind}">{_visible(piece)}</span>' for kind, piece in parts)
            body.append(f"<h3>{html.escape(title)}</h3>\n<pre>{pieces}</pre>")
    legend = '<p><span class="learned">learned</span>, <span class="image">image</span>, and only read.</p>'
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Conversations</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>Conversations as a model reads them</h1>\n{legend}\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _visible(piece: str) -> str:
    return html.escape(piece).replace("\n", "\u23ce\n")
