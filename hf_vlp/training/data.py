"""Data arguments, and the datasets they describe."""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from hf_vlp.data import PairDataset, RecordLimits, TrainTransform
from hf_vlp.data.splits import NoSplitError
from hf_vlp.data.tasks import load_task
from hf_vlp.training.arguments import option
from hf_vlp.training.launch import say


@dataclass
class DataArguments:
    """What a run trains on and is evaluated on: image-text pairs, or the rows of a task."""

    _argument_group_name: ClassVar[str] = "data"
    # Neither evaluation nor the limits on bad records decide which weights a run ends with.
    not_settings: ClassVar[frozenset[str]] = frozenset(
        {"eval_data", "eval_split", "max_eval_samples", "max_bad_rate", "feature_cache"}
    )

    train_data: str = option(
        "shapes",
        "Data of the task (image-text pairs in pretraining): 'shapes' (drawn on the fly), a folder (images, parquet "
        "or tar files), a file (.parquet, .json, .jsonl, .csv, .tar, annotations of the data set), or a Hub id.",
    )
    train_split: str = option("train", "Split of --train_data to train on.")
    eval_data: str | None = option(None, "Data for evaluation; --train_data if left out.")
    eval_split: str = option(
        "validation", "Split for evaluation; 'none' for no evaluation, as in data without a split of this name."
    )
    columns: list[str] = option(list, "Names of columns in the data, as image=IMG text=CAPTION image_id=ID.")
    image_root: str | None = option(None, "Folder that image paths in annotation files are relative to.")
    streaming: bool = option(False, "Read the data as a stream, without an index; needs --max_steps.")
    max_train_samples: int | None = option(None, "Use only the first rows of the training split.")
    max_eval_samples: int | None = option(1000, "Use only the first rows of the evaluation split.")
    max_length: int | None = option(None, "Most tokens of a text; the tokenizer's limit if left out.")
    crop_scale: float = option(
        1.0,
        "Smallest share of the image's area that the random crop of the training images keeps; 1 for no augmentation.",
    )
    flip: float = option(0.0, "Probability of a mirrored training image; off because captions say left and right.")
    color_jitter: float = option(0.0, "Largest relative change of brightness, contrast and saturation in training.")
    max_pixels: int = option(50_000_000, "Images with more pixels are left out and counted.")
    max_bad_rate: float = option(0.05, "Share of unusable records above which the run stops.")
    shapes_size: int | None = option(None, "Shapes: number of training scenes.")
    shapes_preset: str = option("default", "Shapes: 'default', 'simple' or 'row' scenes and captions.")
    shapes_noise: float = option(
        0.0, "Shapes: share of the training captions that are another scene's or have a word changed."
    )
    feature_cache: str | None = option(
        None, "Folder for the frozen image encoder's features: later epochs and runs then skip the encoder."
    )
    feature_dtype: str = option(
        "float16",
        "Type in which features are cached; float32 makes the run equal to an uncached one.",
        choices=["float32", "float16", "bfloat16"],
    )

    @property
    def limits(self) -> RecordLimits:
        """Which records are usable and how many may not be."""
        return RecordLimits(max_bad_rate=self.max_bad_rate, max_pixels=self.max_pixels)

    @property
    def augments(self) -> bool:
        """Whether the training images change at random."""
        return self.crop_scale < 1 or self.flip > 0 or self.color_jitter > 0

    def transform(self, image_size: int) -> TrainTransform | None:
        """The augmentation of the training images, None for none."""
        if not self.augments:
            return None
        return TrainTransform(image_size, scale=(self.crop_scale, 1.0), flip=self.flip, color_jitter=self.color_jitter)

    def train_rows(self, seed: int = 0, task: str = "retrieval") -> Any:
        """Rows of the training split, of a task of `hf_vlp.data.tasks.load_task`."""
        return self._rows(self.train_data, self.train_split, seed, self.max_train_samples, self.streaming, task)

    def more_rows(self, spec: str, task: str, seed: int = 0) -> Any:
        """Rows of the training split of data beside `--train_data`, of which `--columns` and `--shapes_noise` say
        nothing."""
        alike = replace(self, columns=[], shapes_noise=0.0)
        return alike._rows(spec, self.train_split, seed, self.max_train_samples, False, task)

    def eval_rows(self, seed: int = 0, task: str = "retrieval") -> Any | None:
        """Rows of the evaluation split; None with `--eval_split none`, and where the training data has no validation
        split and nobody asked for an evaluation, which is said on the terminal.

        Raises:
            NoSplitError: the data has no split of the name that was asked for.
        """
        spec = self.eval_data or self.train_data
        return self.for_evaluation(lambda: self._rows(spec, self.eval_split, seed, self.max_eval_samples, False, task))

    def for_evaluation(self, load: Callable[[], Any]) -> Any | None:
        """What `load` gives for the evaluation, or None, as `eval_rows`.

        Raises:
            NoSplitError: the data has no split of the name that was asked for.
        """
        if self.eval_split.lower() == "none":
            return None
        try:
            return load()
        except NoSplitError as error:
            if self.eval_data or self.eval_split != type(self).eval_split:
                raise
            say(f"no evaluation: {error}. Name another split by --eval_split, or other data by --eval_data")
            return None

    def _rows(self, spec: str, split: str, seed: int, limit: int | None, streaming: bool, task: str) -> Any:
        options: dict[str, Any] = {}
        if spec == "shapes":
            options["preset"] = self.shapes_preset
            if split == self.train_split:
                options["size"] = self.shapes_size
                if self.shapes_noise:
                    options["caption_noise"] = self.shapes_noise
        rows = load_task(
            task,
            spec,
            split,
            streaming=streaming,
            columns=parse_columns(self.columns),
            image_root=self.image_root,
            seed=seed,
            **options,
        )
        if limit is not None:
            rows = rows.take(limit) if streaming else rows.select(range(min(limit, len(rows))))
        return rows


def parse_columns(entries: list[str]) -> dict[str, str] | None:
    """`["image=img", "text=caption"]` -> `{"image": "img", "text": "caption"}`.

    Raises:
        ValueError: an entry is not `ours=theirs`.
    """
    columns = {}
    for entry in entries:
        ours, separator, theirs = entry.partition("=")
        if not (separator and ours and theirs):
            raise ValueError(f"--columns takes OURS=THEIRS, e.g. text=caption, not {entry!r}")
        columns[ours] = theirs
    return columns or None


def pair_dataset(rows: Any, *, seed: int, transform: Any = None) -> Any:
    """Records of rows: one text an image and epoch, by (seed, epoch, index); a stream stays a stream."""
    if hasattr(rows, "__len__"):
        return PairDataset(rows, seed=seed, transform=transform)
    from hf_vlp.data import PairIterableDataset

    return PairIterableDataset(rows, seed=seed, transform=transform)


def whole_batches(rows: Any, args: Any) -> Any | None:
    """Rows without those that would be an evaluation's last, smaller batch; None if there is no whole one.

    For models that cannot do with a small batch.
    """
    if rows is None:
        return None
    batch = args.eval_batch_size * args.world_size
    count = len(rows) // batch * batch
    return rows.select(range(count)) if count else None


def texts_of_rows(rows: Any, limit: int = 100_000) -> Iterable[str]:
    """Texts of the first rows, for training a tokenizer."""
    if hasattr(rows, "select_columns"):
        rows = rows.select_columns(["text"])
    for index, row in enumerate(rows):
        if index >= limit:
            return
        texts = [row["text"]] if isinstance(row["text"], str) else row["text"] or []
        for text in texts:
            if isinstance(text, str):
                yield text


@contextlib.contextmanager
def main_process_first(args: Any) -> Any:
    """Lets the main process prepare files (downloads, caches) before the others read them."""
    with args.main_process_first(desc="preparing the data"):
        yield
