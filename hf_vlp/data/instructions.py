"""Instruction tuning over many data sets, as InstructBLIP does it (arXiv 2305.06500, sections 2.2 to 2.4).

Each of eleven families of tasks has its own wordings, one of which is drawn for a record in an epoch; data sets are
drawn with probabilities proportional to the square roots of their sizes. The wordings, ten or more for each task, are
this package's own: the paper's appendix gives others to the same ends, among them "short" where an answer is short, so
that a model does not learn to be short always.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from .collators import Record, RecordCollator
from .conversations.instructblip import as_instruction
from .conversations.lengths import length_grouped_order
from .conversations.messages import MessagesError, text_of, to_messages
from .hashing import record_seed, stable_hash
from .images import decode_image
from .pairs import ImageTransform, problem_of
from .records import BadRecord, texts_of

_CAPTIONING = (
    "Write a short caption for this picture.",
    "Briefly say what the image shows.",
    "In one sentence, what can be seen here?",
    "Give a short summary of the scene.",
    "What does the picture show, in a few words?",
    "Describe the photo briefly.",
    "A short caption of the image:",
    "The image shows",
    "Tell in a few words what you are looking at.",
    "How would you sum up this image in one short sentence?",
    "Suppose the picture stood in a newspaper: give the short line printed below it.",
    "Someone cannot see this image. Say in one sentence what is on it.",
)
# Wordings that fit every question with a short answer.
_QUESTIONS = (
    "{question}",
    "Question: {question}",
    "{question} Give a short answer:",
    "Here is a question about the image. {question} The answer in brief:",
    "Question: {question} Short answer:",
)
_VISUAL_QUESTIONS = (
    "Look at the image and answer in a few words: {question}",
    "{question} Answer briefly.",
    "Answer the question about the picture in as few words as you can. {question}",
    "Going by what can be seen: {question} Keep the answer short.",
    "Somebody asks about this picture: {question} Reply with a word or two:",
    "{question} Find the answer in the image and say it in a few words.",
    "A word or a short phrase is enough. {question}",
)
# Family (figure 2 of the paper) -> wordings. {question}, {options}, {answer} and {history} come from the record.
TASK_FAMILIES: dict[str, tuple[str, ...]] = {
    "captioning": _CAPTIONING,
    "text_captioning": (
        "Caption the image briefly, using the words that are written in it.",
        "Read the text in the picture and describe the picture in one sentence.",
        "A short caption that takes up the written words:",
        "What is shown and written here, in one sentence?",
        "Say briefly what the picture shows and what stands written on it.",
        "Sum up the image in a few words, its lettering included.",
        "Write one sentence about the photo that mentions the text in it.",
        "Which objects are there and what do their labels say? One short sentence:",
        "Describe the image in brief; where it has words, quote them.",
        "There is something to read in this picture. Give a short caption with it:",
    ),
    "visual_reasoning": (
        "{question}",
        "Compare what you see and answer in a word: {question}",
        "Think about how the things in the image relate. {question} Short answer:",
        "Question: {question} Answer with one word.",
        "Look where everything stands and how it belongs together. {question} Answer in a word:",
        "{question} It takes more than one look; the answer in short:",
        "Find each thing that the question names, then answer briefly. {question}",
        "Reason about the picture step by step for yourself and say only the result. {question}",
        "From the places and properties of the objects: {question} Short answer:",
        "{question} Check it against the image and answer with a word or two.",
    ),
    "vqa": (*_QUESTIONS, *_VISUAL_QUESTIONS),
    "knowledge_vqa": (
        *_QUESTIONS,
        "Use what you know beyond the image. {question} Short answer:",
        "{question} The answer is not in the picture alone; answer briefly:",
        "The image gives the topic, your knowledge the answer. {question} In a few words:",
        "Recognise what is shown, then recall what you know of it. {question} Short answer:",
        "{question} Think of what is commonly known and answer in a word or two.",
        "Someone who knows the subject sees this picture. {question} Their short answer:",
    ),
    "text_vqa": (
        *_QUESTIONS,
        "Read what is written in the image. {question} Short answer:",
        "{question} The answer is written in the picture:",
        "Find the words or numbers in the photo that answer this: {question}",
        "{question} Copy the answer from the text in the image.",
        "Signs, labels and print count here. {question} Answer briefly:",
        "Look for lettering, read it and answer in a few words. {question}",
    ),
    "question_generation": (
        "Ask a question about the image whose answer is: {answer}.",
        "The answer is {answer}. What was asked about the picture?",
        "Think of a question to this image that {answer} answers.",
        "Somebody looked at the picture and said: {answer}. Which question was it?",
        "{answer}: write the question about the image to which this is the reply.",
        "Make up a quiz question on this picture; its solution is {answer}.",
        "What would you have to ask about the scene to hear {answer}?",
        "Turn it round: the reply is {answer}, the question about the image is",
        "Which question can be settled by this image with the words {answer}?",
        "You want a viewer of the picture to say {answer}. Ask for it:",
    ),
    "video_vqa": (
        "{question}",
        "Question about the video: {question} Short answer:",
        "From what happens in these frames, answer in a few words: {question}",
        "Watch the clip. {question} Answer briefly:",
        "The pictures follow one another in time. {question} Short answer:",
        "{question} Say it in a word or two, by what the video shows.",
        "Look at all of the frames, then answer in short: {question}",
        "Somebody asks about this clip: {question} A brief reply:",
        "What goes on from frame to frame tells the answer. {question} In a few words:",
        "{question} The whole clip counts; keep the answer short.",
    ),
    "dialog": (
        "{history} Question: {question} Short answer:",
        "Talk so far: {history} Now answer briefly: {question}",
        "{history} {question}",
        "Two people talk about the image. {history} Then one of them asks: {question} A short reply:",
        "What was said before: {history} What is asked now: {question} Short answer:",
        "Go on with this talk about the picture. {history} {question} In a few words:",
        "Already known of the image: {history} Next question: {question} Answer briefly.",
        "{history} Keeping in mind what was said: {question} Short answer:",
        "Earlier: {history} Now: {question} Reply in a few words.",
        "You are asked about a picture, one question after the other. {history} {question} Your short answer:",
    ),
    "classification": (
        "What is in the image? Answer with the name of its class.",
        "Name the category of this picture:",
        "Which class does the image belong to?",
        "Is the image one of these: {options}? Name it:",
        "What kind of thing is this?",
        "Say in a word what the picture is of.",
        "Under which label would you file this image?",
        "Sort the picture into its class:",
        "The image is to be put under one of {options}. Which one?",
        "Pick the label that fits the picture best from {options}:",
        "One name for what is shown here:",
        "The category of the main object in the photo is",
    ),
    # The instructions of a conversation are its own, as in the paper.
    "conversation": ("{question}",),
}
# Added where a question comes with its possible answers.
_OPTIONS = ("Options: {options}.", "Choose from: {options}.", "The answer is one of {options}.")


@dataclass(frozen=True)
class InstructionSource:
    """One data set of a mixture.

    Args:
        family: key of `TASK_FAMILIES`.
        rows: a `datasets.Dataset` or a sequence of rows with the columns of the family's task:
            pairs for captioning, `text` being the class for classification; `question`, `answers` and optionally
            `options` for questions; `caption` and `turns` for dialogs; `images` and `messages` for conversations.
        name: in reports; by default the family.
        weight: factor on the square root of its size, as the paper lowers and raises single data sets.
    """

    family: str
    rows: Any
    name: str | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.family not in TASK_FAMILIES:
            raise ValueError(f"unknown family {self.family!r}; there are {', '.join(TASK_FAMILIES)}")
        if not len(self.rows):
            raise ValueError(f"source {self.name or self.family!r} is empty")
        if self.weight <= 0:
            raise ValueError(f"source {self.name or self.family!r}: weight must be positive, not {self.weight}")


def square_root_probabilities(sizes: Sequence[int], weights: Sequence[float] | None = None) -> list[float]:
    """Probability of each data set: proportional to the square root of its size (section 2.4).

    Args:
        sizes: records of each.
        weights: factors on the square roots.
    """
    roots = np.sqrt(np.asarray(sizes, dtype=np.float64)) * (1.0 if weights is None else np.asarray(weights))
    return list(roots / roots.sum())


class InstructionDataset(Dataset):
    """A map-style dataset of (image, instruction, answer) records, balanced over its sources.

    Which source, row and wording record `index` is depends on (seed, epoch, index) alone, so that neither a restart
    nor another number of workers or ranks changes it. The rows of a source are walked through in an order of their
    own, so that none is read a second time before all have been read once.

    Args:
        sources: the data sets.
        length: records of an epoch; by default the sizes of the sources together.
        seed: of all draws.
        transform: augmentation `(PIL image, seed) -> PIL image`.
        group_by_length: batches hold instructions of like length, so that less of them is padding. Each epoch begins
            with a look at the texts of all its records.
    """

    def __init__(
        self,
        sources: Sequence[InstructionSource],
        *,
        length: int | None = None,
        seed: int = 0,
        transform: ImageTransform | None = None,
        group_by_length: bool = False,
    ) -> None:
        if not sources:
            raise ValueError("a mixture needs at least one source")
        self.sources, self.seed, self.transform = list(sources), seed, transform
        sizes = [len(source.rows) for source in self.sources]
        self.probabilities = square_root_probabilities(sizes, [source.weight for source in self.sources])
        self.length = length or sum(sizes)
        self._texts = [_without_images(source.rows) for source in self.sources] if group_by_length else None
        # In shared memory, so that `set_epoch` in the main process reaches workers that live on between epochs.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._drawn: tuple[int, np.ndarray, np.ndarray] | None = None

    @property
    def epoch(self) -> int:
        return int(self._epoch[0])

    def set_epoch(self, epoch: int) -> None:
        """Draws the records of another epoch."""
        self._epoch[0] = epoch

    def __len__(self) -> int:
        return self.length

    def plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and row of each record of an epoch, (length,) each."""
        if self._drawn is None or self._drawn[0] != epoch:
            choice = np.random.default_rng(stable_hash("sources", self.seed, epoch))
            chosen = choice.choice(len(self.sources), size=self.length, p=self.probabilities)
            rows = np.empty(self.length, dtype=np.int64)
            for number, source in enumerate(self.sources):
                places = np.flatnonzero(chosen == number)
                rows[places] = self._order(number, len(source.rows), epoch, len(places))
            self._drawn = (epoch, chosen, rows)
        return self._drawn[1], self._drawn[2]

    def epoch_order(self, epoch: int, global_batch_size: int, world_size: int) -> torch.Tensor | None:
        """The order in which an epoch reads the records; None leaves it to the loader. See
        `length_grouped_order`."""
        if self._texts is None:
            return None
        lengths = []
        for index, (number, row) in enumerate(zip(*self.plan(epoch), strict=True)):
            record = instruction_record(
                self._texts[number][int(row)], self.sources[number].family, record_seed(self.seed, epoch, index)
            )
            said = f"{record.get('instruction', '')} {record.get('answer', '')}"
            # Of a record that cannot be used, nothing will be read.
            lengths.append(max(1, len(said.split())))
        order = length_grouped_order(lengths, global_batch_size, seed=self.seed, epoch=epoch, world_size=world_size)
        return torch.from_numpy(order)

    def _order(self, number: int, size: int, epoch: int, count: int) -> np.ndarray:
        rounds = [
            np.random.default_rng(stable_hash("rows", self.seed, epoch, number, i)).permutation(size)
            for i in range(-(-count // size))
        ]
        return np.concatenate(rounds)[:count] if rounds else np.empty(0, dtype=np.int64)

    def __getitem__(self, index: int) -> Record:
        if not -self.length <= index < self.length:
            raise IndexError(f"record {index} of {self.length}")
        index = int(index) % self.length
        chosen, rows = self.plan(self.epoch)
        source, row = self.sources[chosen[index]], int(rows[index])
        return instruction_record(
            source.rows[row],
            source.family,
            record_seed(self.seed, self.epoch, index),
            index=index,
            key=str(row),
            source=source.name or source.family,
            transform=self.transform,
        )


def _without_images(rows: Any) -> Any:
    """Rows of which an image is not read only to look at the text."""
    if not hasattr(rows, "select_columns"):
        return rows
    return rows.select_columns([name for name in rows.column_names if name not in ("image", "images")])


def instruction_record(
    row: Mapping[str, Any],
    family: str,
    seed: int,
    *,
    index: int = 0,
    key: str | None = None,
    source: str | None = None,
    transform: ImageTransform | None = None,
) -> Record:
    """The record of a row: `images`, `instruction`, `answer`, with everything random drawn from `seed`."""
    record: Record = {
        "source": str(row.get("source") or source or "rows"),
        "key": str(row["key"] if row.get("key") is not None else key if key is not None else index),
        "index": index,
        "seed": seed,
        "family": family,
        "transform": transform,
        "images": row["images"] if "images" in row else [row.get("image")],
    }
    if row.get("problem"):
        record["problem"] = row["problem"]
        return record
    try:
        record["instruction"], record["answer"] = instruct(row, family, seed)
    except BadRecord as error:
        record["problem"] = f"{error.reason}: {error.detail}"
    return record


def instruct(row: Mapping[str, Any], family: str, seed: int) -> tuple[str, str]:
    """An instruction and its answer for a row.

    Args:
        row: with the columns of the family's task, see `InstructionSource`.
        family: key of `TASK_FAMILIES`.
        seed: decides the wording, the caption among several, the answer among several, the turn of a dialog.

    Raises:
        BadRecord: the row lacks what its family needs.
    """
    wordings = TASK_FAMILIES[family]

    def pick(name: str, options: Sequence[Any]) -> Any:
        return options[stable_hash(name, seed) % len(options)]

    if family in ("captioning", "text_captioning", "classification"):
        texts = [text.strip() for text in texts_of(row.get("text")) if isinstance(text, str) and text.strip()]
        if not texts:
            raise BadRecord("text_missing", f"a row of {family} has no text")
        options = list(row.get("options") or ())
        if not options:
            wordings = tuple(wording for wording in wordings if "{options}" not in wording)
        return pick("wording", wordings).format(options=", ".join(options)), pick("text", texts)
    if family == "conversation":
        return _from_messages(row, pick)
    if family == "dialog":
        turns = row.get("turns") or ()
        if not turns:
            raise BadRecord("turns_missing", "a row of dialog has no turns")
        at = stable_hash("turn", seed) % len(turns)
        told = [str(row.get("caption") or "").strip()]
        told += [f"{turn['question'].strip()} {turn['answer'].strip()}." for turn in turns[:at]]
        words = {"history": " ".join(filter(None, told)), "question": turns[at]["question"].strip()}
        # A first question about an image without a caption is like any other.
        wording = pick("wording", wordings if words["history"] else TASK_FAMILIES["vqa"])
        return wording.format(**words), turns[at]["answer"].strip()
    question = str(row.get("question") or "").strip()
    answers = [str(answer).strip() for answer in row.get("answers") or () if str(answer).strip()]
    if not question or not answers:
        raise BadRecord("answers_missing", f"a row of {family} has no question or no answer")
    answer = _weighted(answers, row.get("weights"), stable_hash("answer", seed))
    if family == "question_generation":
        return pick("wording", wordings).format(answer=answer), question
    options = list(row.get("options") or ())
    if options:
        question = f"{question} {pick('options', _OPTIONS).format(options=', '.join(options))}"
    return pick("wording", wordings).format(question=question), answer


def _weighted(answers: list[str], weights: Any, draw: int) -> str:
    """An answer, drawn in proportion to its weight: people who gave it."""
    shares = np.asarray(weights if weights and len(weights) == len(answers) else [1.0] * len(answers), dtype=float)
    place = (draw % (1 << 30)) / (1 << 30) * shares.sum()
    return answers[min(int(np.searchsorted(shares.cumsum(), place, side="right")), len(answers) - 1)]


def _from_messages(row: Mapping[str, Any], pick: Any) -> tuple[str, str]:
    """A turn of the assistant, and all that was said before it."""
    try:
        messages, _ = to_messages(row.get("messages"))
    except MessagesError as error:
        raise BadRecord("messages_wrong", str(error)) from None
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i]
    if not places:
        raise BadRecord("messages_wrong", "the assistant answers nothing")
    at = pick("turn", places)
    return as_instruction(messages[:at]), text_of(messages[at]).strip()


class InstructionCollator(RecordCollator):
    """Records of (image, instruction, answer) for a model whose eyes read the instruction too.

    A batch holds what `processor.training_inputs` makes of them: `pixel_values`, `qformer_input_ids`,
    `qformer_attention_mask`, `input_ids`, `attention_mask`, `labels`, and `decoder_attention_mask` for an
    encoder-decoder.

    Args:
        processor: has `training_inputs(images, texts, prompt, max_length, max_prompt_length)`.
        max_length: most tokens of an answer.
        max_prompt_length: most tokens of an instruction.
        options: `limits`, `transform`, `prepare`, `background` as in `ImageTextCollator`.

    Raises:
        TypeError: the processor has no `training_inputs`.
    """

    keys = frozenset(
        {
            "pixel_values",
            "qformer_input_ids",
            "qformer_attention_mask",
            "input_ids",
            "attention_mask",
            "labels",
            "decoder_input_ids",
            "decoder_attention_mask",
        }
    )
    gives_image_ids = False

    def __init__(
        self,
        processor: Any,
        *,
        max_length: int | None = None,
        max_prompt_length: int | None = None,
        **options: Any,
    ) -> None:
        if not hasattr(processor, "training_inputs"):
            raise TypeError(
                f"{type(processor).__name__} has no training_inputs; instructions need a processor such as hf_vlp's "
                "InstructBlipProcessor"
            )
        super().__init__(processor, max_length=max_length, **options)
        self.max_prompt_length = max_prompt_length

    def _read(self, record: Record) -> tuple[Image.Image, tuple[str, str]]:
        problem = problem_of(record)
        if problem is not None:
            raise problem
        images = record.get("images") or ()
        if len(images) != 1:
            raise BadRecord("image_count", f"the record has {len(images)} images; an instruction goes with one")
        image = decode_image(images[0], self.limits, self.background)
        transform = record.get("transform") or self.transform
        if transform is not None:
            image = transform(image, record.get("seed", 0))
        return image, (record["instruction"], record["answer"])

    def _encode(self, images: list[Image.Image], texts: list[tuple[str, str]]) -> Mapping[str, Any]:
        instructions, answers = zip(*texts, strict=True)
        return self.processor.training_inputs(
            images,
            list(answers),
            prompt=list(instructions),
            max_length=self.max_length,
            max_prompt_length=self.max_prompt_length,
        )


__all__ = [
    "TASK_FAMILIES",
    "InstructionCollator",
    "InstructionDataset",
    "InstructionSource",
    "instruct",
    "instruction_record",
    "square_root_probabilities",
]
