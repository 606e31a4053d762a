"""`hf-vlp caption`: captions of images, one JSON object a line."""

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from hf_vlp.cli.errors import EXIT_FAILED, EXIT_PARTIAL, UsageError
from hf_vlp.cli.main import parser

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif")

_EXAMPLES = """\
  hf-vlp caption outputs/blip2-opt/model picture.jpg
  hf-vlp caption org/blip2-opt photos/ --output captions.jsonl --batch_size 16
  hf-vlp caption Salesforce/blip2-opt-2.7b https://example.org/cat.jpg --prompt "a photo of" --num_beams 5
  hf-vlp caption org/blip2-opt cat.jpg --question "what colour is the cat?"

Each line of the output is {"image": ..., "caption": ...}. An image that can't be read is reported on the standard
error, left out, and makes the exit status 3 (1 if none could be read)."""


def main(argv: list[str]) -> int:
    command = parser("caption", "Writes captions for images.", _EXAMPLES)
    command.add_argument("model", metavar="MODEL", help="folder or Hub id of a model that generates")
    command.add_argument("images", nargs="+", metavar="IMAGE", help="image file, folder (searched to its end) or URL")
    asked = command.add_mutually_exclusive_group()
    asked.add_argument("--prompt", help="what the captions start with")
    asked.add_argument("--question", help="ask this about each image instead of captioning it")
    command.add_argument("--output", metavar="FILE", help="write here instead of to the standard output")
    command.add_argument("--batch_size", type=int, default=8, help="images at a time (%(default)s)")
    command.add_argument("--num_workers", type=int, default=0, help="processes that read images (%(default)s)")
    command.add_argument("--max_new_tokens", type=int, help="longest caption in tokens")
    command.add_argument("--num_beams", type=int, help="width of the beam search")
    command.add_argument("--do_sample", action="store_true", help="draw from the model instead of searching")
    command.add_argument("--top_p", type=float, help="nucleus, with --do_sample")
    command.add_argument("--temperature", type=float, help="with --do_sample")
    command.add_argument("--seed", type=int, default=0, help="of the draws (%(default)s)")
    command.add_argument("--num_return_sequences", type=int, help="captions an image")
    command.add_argument("--device", help="where to run; the first accelerator, or the CPU, if left out")
    command.add_argument("--dtype", default="auto", help="of the model; as it was saved if left out")
    command.add_argument("--timeout", type=float, default=30.0, help="seconds to wait for a URL (%(default)s)")
    command.add_argument(
        "--trust_remote_code", action="store_true", help="run the code that the model's repository carries"
    )
    options = command.parse_args(argv)
    if options.batch_size < 1:
        raise UsageError(f"--batch_size must be at least 1, got {options.batch_size}")
    names = list(find_images(options.images))

    from transformers import pipeline, set_seed

    import hf_vlp  # noqa: F401  (registers the pipelines)

    set_seed(options.seed)
    task = "image-to-text" if options.question is None else "image-question-answering"
    captioner = pipeline(
        task,
        model=options.model,
        device=options.device,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code or None,
    )
    wanted = ("max_new_tokens", "num_beams", "top_p", "temperature", "num_return_sequences")
    generation = {name: getattr(options, name) for name in wanted if getattr(options, name) is not None}
    if options.do_sample:
        generation["do_sample"] = True
    text = {"question": options.question} if options.question is not None else {"text": options.prompt}
    failed = 0
    with open(options.output, "w", encoding="utf-8") if options.output else nullcontext(sys.stdout) as out:
        for names_of_batch, images, broken in batches(names, options.batch_size, options.timeout):
            for name, error in broken:
                failed += 1
                print(f"hf-vlp caption: skipped {name}: {error}", file=sys.stderr)
            if not images:
                continue
            results = captioner(images, batch_size=options.batch_size, **text, **generation)
            for name, result in zip(names_of_batch, results, strict=True):
                out.write(json.dumps(line(name, result), ensure_ascii=False) + "\n")
            out.flush()
    if failed:
        print(f"hf-vlp caption: {failed} of {len(names)} image(s) skipped", file=sys.stderr)
        return EXIT_FAILED if failed == len(names) else EXIT_PARTIAL
    return 0


def line(name: str, result: list[dict[str, str]]) -> dict[str, Any]:
    """One record of the output: `caption` or `answer`, a list where several were asked for."""
    texts = [next(iter(entry.values())) for entry in result]
    key = "answer" if "answer" in result[0] else "caption"
    return {"image": name, key: texts[0] if len(texts) == 1 else texts}


def find_images(sources: list[str]) -> Iterator[str]:
    """Files, the image files of folders in the order of their names, and URLs.

    Raises:
        FileNotFoundError: a source is none of these.
        UsageError: a folder holds no image.
    """
    for source in sources:
        path = Path(source)
        if source.startswith(("http://", "https://")) or path.is_file():
            yield source
        elif path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not inside:
                raise UsageError(f"the folder {source} holds no image ({', '.join(SUFFIXES)})")
            yield from map(str, inside)
        else:
            raise FileNotFoundError(f"{source} is no file, no folder and no http(s) address")


def batches(
    names: list[str], size: int, timeout: float
) -> Iterator[tuple[list[str], list[Any], list[tuple[str, ValueError]]]]:
    """Opened images, `size` at a time, with the names and errors of those that can't be read."""
    from hf_vlp.pipelines.image_pipeline import open_image

    for start in range(0, len(names), size):
        read: list[str] = []
        images: list[Any] = []
        broken: list[tuple[str, ValueError]] = []
        for name in names[start : start + size]:
            try:
                images.append(open_image(name, timeout=timeout))
                read.append(name)
            except ValueError as error:
                broken.append((name, error))
        yield read, images, broken
