"""The options of the job, as the script and `hf-vlp capfilt` take them, and the job that they describe."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

logger = logging.getLogger(__name__)


def _option(default: Any, help: str, **metadata: Any) -> Any:
    metadata = {"help": help, **metadata}
    return field(default_factory=default, metadata=metadata) if callable(default) else field(
        default=default, metadata=metadata
    )  # fmt: skip


@dataclass
class CapFiltArguments:
    """What is captioned and filtered, by which models, and what is written."""

    _argument_group_name: ClassVar[str] = "capfilt"

    output: str = _option("", "Folder of the set. The same command again goes on where it was stopped.")
    data: list[str] = _option(
        list,
        "Web data, one or several: 'shapes', a folder (of images, parquet or tar files), a file (.parquet, .json, "
        ".jsonl, .csv, .tar, COCO or Karpathy annotations), or a Hub id. Images are captioned, texts filtered.",
    )
    split: str = _option("train", "Split of --data.")
    human_data: list[str] = _option(list, "Data written by people, one or several: taken into the set as it is.")
    human_split: str = _option("train", "Split of --human_data.")
    columns: list[str] = _option(list, "Names of columns in --data, as image=IMG text=CAPTION image_id=ID.")
    human_columns: list[str] = _option(list, "The same for --human_data.")
    image_root: str | None = _option(None, "Folder that image paths in annotation files are relative to.")
    streaming: bool = _option(False, "Read the data as a stream, without an index.")
    shapes: list[str] = _option(list, "Options of Shapes, as NAME=VALUE: size=2000 caption_noise=0.4 preset=simple.")
    captioner: str | None = _option(
        None, "Folder or Hub id of a model that captions (BLIP, BLIP-2); left out: no synthetic texts."
    )
    filter: str | None = _option(
        None, "Folder or Hub id of a model that matches (ALBEF, BLIP, BLIP-2 stage 1); left out: every text is kept."
    )
    method: str = _option("nucleus", "How captions are made.", choices=["nucleus", "beam"])
    top_p: float = _option(0.9, "Nucleus: probability mass that is drawn from.")
    temperature: float = _option(1.0, "Nucleus: divisor of the logits.")
    top_k: int = _option(0, "Nucleus: tokens that are drawn from at most; 0 for no limit.")
    samples: int = _option(1, "Nucleus: captions an image.")
    num_beams: int = _option(3, "Beam: width.")
    max_new_tokens: int = _option(30, "Longest caption, in tokens.")
    min_new_tokens: int = _option(0, "Shortest caption, in tokens.")
    repetition_penalty: float = _option(1.0, "Penalty on repeated tokens; 1 for none.")
    prompt: str | None = _option(None, "Words that captions go on from; left out: the model's own start.")
    itm_threshold: float = _option(0.5, "Least matching probability of a kept text; below 0: ITM is not asked.")
    itc_threshold: float | None = _option(None, "Least contrastive cosine of a kept text; left out: not asked.")
    max_length: int | None = _option(None, "Longest text that the filter reads, in tokens.")
    seed: int = _option(0, "Of the sampled captions, and of Shapes.")
    format: str = _option("parquet", "Files that are written.", choices=["parquet", "webdataset"])
    unit_size: int = _option(1000, "Records of a unit of work, which is one file of the set.")
    gallery: int = _option(48, "Records on the page gallery.html; 0 for no page.")
    batch_size: int = _option(32, "Images at a time; may change between restarts.")
    text_batch_size: int = _option(128, "Texts that the filter compares at a time.")
    workers: int = _option(2, "Threads that decode and resize images in each process.")
    dtype: str = _option("float32", "Type of the weights: float32, bfloat16, float16, or auto.")
    max_bad_rate: float = _option(0.05, "Share of unusable records above which the job stops.")
    max_pixels: int = _option(50_000_000, "Images with more pixels are left out and counted.")
    log_seconds: float = _option(10.0, "Time between lines about throughput and yield.")


def run_arguments(arguments: CapFiltArguments, say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Runs the job that the options describe, on this process of however many there are.

    Args:
        say: see `capfilt`.

    Returns:
        The summary.

    Raises:
        ValueError: an option is missing or makes no sense; and what `capfilt` and the loading of models raise.
    """
    if not arguments.output:
        raise ValueError("--output is missing: the folder of the set")
    if not arguments.data:
        raise ValueError("--data is missing: the web data to caption and filter")
    if arguments.captioner is None and arguments.filter is None:
        raise ValueError("give --captioner, --filter, or both; without either the set would be the data itself")
    for line in unused_options(arguments):
        (say or logger.warning)(line)

    from hf_vlp.bootstrapping.captioner import Captioner, CaptionSettings
    from hf_vlp.bootstrapping.job import CapFiltSettings, Pace, capfilt
    from hf_vlp.bootstrapping.sources import HUMAN, WEB, open_source
    from hf_vlp.bootstrapping.text_filter import FilterSettings, TextFilter
    from hf_vlp.data import RecordLimits
    from hf_vlp.evaluation.run import load_model_and_processor

    # Before the models are loaded, which takes longer.
    settings = CapFiltSettings(arguments.seed, arguments.unit_size, arguments.format, arguments.gallery)
    pace = Pace(arguments.batch_size, arguments.text_batch_size, arguments.workers)
    limits = RecordLimits(max_bad_rate=arguments.max_bad_rate, max_pixels=arguments.max_pixels)
    captions = CaptionSettings(
        method=arguments.method,
        top_p=arguments.top_p,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        num_beams=arguments.num_beams,
        samples=arguments.samples,
        max_new_tokens=arguments.max_new_tokens,
        min_new_tokens=arguments.min_new_tokens,
        repetition_penalty=arguments.repetition_penalty,
        prompt=arguments.prompt,
    )
    itm = None if arguments.itm_threshold < 0 else arguments.itm_threshold
    if arguments.filter is not None:
        thresholds = FilterSettings(itm, arguments.itc_threshold, arguments.max_length)
    sources = []
    for origin, specs, split, columns in (
        (WEB, arguments.data, arguments.split, arguments.columns),
        (HUMAN, arguments.human_data, arguments.human_split, arguments.human_columns),
    ):
        for spec in specs:
            options: dict[str, Any] = {}
            if _is_shapes(spec):
                options = {"seed": arguments.seed, **_values("--shapes", arguments.shapes)}
            try:
                source = open_source(
                    spec,
                    origin,
                    split,
                    streaming=arguments.streaming,
                    columns=_pairs("--columns" if origin == WEB else "--human_columns", columns) or None,
                    image_root=arguments.image_root,
                    **options,
                )
            except TypeError as error:
                if not options:
                    raise
                raise ValueError(f"--shapes: {error}") from error
            sources.append(source)
    captioner = text_filter = None
    if arguments.captioner is not None:
        loaded = load_model_and_processor(arguments.captioner, "captioning", dtype=arguments.dtype)
        captioner = Captioner(*loaded, captions)
    if arguments.filter is not None:
        loaded = load_model_and_processor(arguments.filter, "retrieval", dtype=arguments.dtype)
        text_filter = TextFilter(*loaded, thresholds)
    return capfilt(
        Path(arguments.output),
        sources,
        captioner=captioner,
        text_filter=text_filter,
        settings=settings,
        limits=limits,
        **asdict(pace),
        log_seconds=arguments.log_seconds,
        say=say,
    )


def _is_shapes(spec: str) -> bool:
    return spec.partition(":")[0] == "shapes"


def unused_options(arguments: CapFiltArguments) -> list[str]:
    """A line for each group of options that were given and that nothing looks at."""
    defaults = CapFiltArguments()
    captions = (
        "method top_p temperature top_k samples num_beams max_new_tokens min_new_tokens repetition_penalty prompt"
    )
    writes = arguments.captioner and arguments.method
    shapes = any(_is_shapes(spec) for spec in (*arguments.data, *arguments.human_data))
    groups = (
        ("there is no --captioner", arguments.captioner, captions),
        ("there is no --filter", arguments.filter, "itm_threshold itc_threshold max_length"),
        ("there is no --human_data", arguments.human_data, "human_columns human_split"),
        ("no data is Shapes", shapes, "shapes"),
        ("beams are not sampled", writes != "beam", "top_p temperature top_k"),
        ("samples have no beams", writes != "nucleus", "num_beams"),
    )
    lines = []
    for reason, used, names in groups:
        given = [f"--{name}" for name in names.split() if getattr(arguments, name) != getattr(defaults, name)]
        if given and not used:
            lines.append(f"not used: {', '.join(given)} ({reason})")
    return lines


def _pairs(flag: str, entries: list[str]) -> dict[str, str]:
    pairs = {}
    for entry in entries:
        name, sign, value = entry.partition("=")
        if not (name and sign and value):
            raise ValueError(f"{flag} takes NAME=VALUE, not {entry!r}")
        pairs[name] = value
    return pairs


def _values(flag: str, entries: list[str]) -> dict[str, Any]:
    import yaml

    return {name: yaml.safe_load(value) for name, value in _pairs(flag, entries).items()}
