"""Conversations: the model answers every turn, and each answer is right or not."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from hf_vlp.data import BadRecord, decode_image
from hf_vlp.data.conversations import make_template, prompt_batch, template_names
from hf_vlp.data.conversations.messages import text_of
from hf_vlp.data.conversations.prompts import answer_text, replaced_answers, stop_ids
from hf_vlp.data.conversations.templates import Template, tokenizer_of
from hf_vlp.data.shapes.instructions import score_answer
from hf_vlp.evaluation.generation import common_result, new_tokens
from hf_vlp.evaluation.images import Failure, Skipped, rows_of
from hf_vlp.evaluation.runtime import evaluating, gather_lists, progress, shard, to_device

Row = Mapping[str, Any]
Score = Callable[[Row, int, str, str], bool]
HISTORIES = ("own", "true")


def evaluate_instructions(
    model: nn.Module,
    processor: Any,
    rows: Any,
    *,
    template: str | Template | None = None,
    history: str = "own",
    batch_size: int = 16,
    max_new_tokens: int = 48,
    generation: dict[str, Any] | None = None,
    score: Score | None = None,
    max_bad_rate: float = 0.0,
    limit: int | None = None,
    workers: int = 0,
    details: bool = False,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Lets the model answer every turn of every conversation, turn after turn, and scores the answers.

    Args:
        model: of the role `chat`: `generate(input_ids=, attention_mask=, pixel_values=, …)`.
        processor: has `image_token`, `tokenizer`, `prepare_images`.
        rows: from `load_conversations`. Rows of Shapes bring `answers` and `scenes`, by which each answer is judged by
            its kind; of others an answer is right if it says what the row says, up to case, blanks and a full stop.
        template: name or object; the one that the model was trained with, which `own_template` finds if left out.
        history: what the earlier turns of the assistant say: `"own"`, what the model said, or `"true"`, what the row
            says.
        batch_size: conversations at a time.
        max_new_tokens: of an answer.
        generation: further arguments of `generate`.
        score: `(row, turn, prediction, reference) -> right or not`, in place of the above.
        max_bad_rate: share of conversations whose images may be unreadable; they are left out and counted.
        limit: use only so many rows.
        workers: processes that decode images.
        details: add every answer.
        show_progress: a progress bar on the main process.

    Returns:
        `metrics`: `exact` (share of right answers), `exact_first_turn`, `exact_later_turns` and `exact_conversations`
        (share of conversations with every answer right), later turns and kinds only where there are any;
        `per_kind` (Shapes); `samples`.

    Raises:
        ValueError: no rows, unknown template or history, unreadable images above the rate.
        ImageCountError: a row names more or fewer images than it has.
    """
    if history not in HISTORIES:
        raise ValueError(f"history={history!r} is none of {', '.join(HISTORIES)}")
    rows = rows_of(rows, limit)
    chosen = make_template(own_template(model, processor) if template is None else template, processor)
    judge = score or exact_answer
    options = {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "eos_token_id": stop_ids(processor, chosen),
        **(generation or {}),
    }
    answers: list[tuple[int, int, str]] = []
    failures: list[Failure] = []
    own = shard(len(rows))
    parameter = next(model.parameters())
    with evaluating(model):
        batches = DataLoader(_Decoded(rows, own), batch_size=batch_size, num_workers=workers, collate_fn=list)
        for batch in progress(batches, "answering", total=len(batches), show=show_progress):
            failures += [one for one in batch if isinstance(one, Failure)]
            held = {one[0]: one[1:] for one in batch if not isinstance(one, Failure)}
            said: dict[int, dict[int, str]] = {number: {} for number in held}
            turn = 0
            while open_rows := [number for number in held if turn < _turns(held[number][0])]:
                prompts = [
                    (held[number][1], _until(held[number][0], turn, said[number] if history == "own" else {}))
                    for number in open_rows
                ]
                names = [f"row {number} [{held[number][0].get('key', number)}]" for number in open_rows]
                inputs = prompt_batch(processor, chosen, prompts, names=names)
                inputs = to_device(inputs, parameter.device, parameter.dtype)
                outputs = new_tokens(model.generate(**inputs, **options), inputs["input_ids"])
                for number, ids in zip(open_rows, outputs, strict=True):
                    said[number][turn] = answer_text(processor, chosen, ids)
                turn += 1
            answers += [(number, turn, text) for number in held for turn, text in said[number].items()]
    answers = gather_lists(answers)
    skipped = Skipped(gather_lists(failures), len(rows))
    skipped.check(max_bad_rate)
    judged = [
        (number, turn, text, judge(rows[number], turn, text, _reference(rows[number], turn)))
        for number, turn, text in answers
    ]
    return _result(rows, judged, skipped, details)


def own_template(model: nn.Module, processor: Any) -> str:
    """Name of the template that a model answers in, as model and processor tell.

    Qwen-VL and InstructBLIP have one, CogVLM one for each of its formats, LLaVA the one whose prompts its processor
    writes. Others have the chat template of their processor or tokenizer, else Vicuna's.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in ("llava", "llava_next"):
        from hf_vlp.models.llava.processing_llava import trained_template

        return trained_template(processor)
    if kind == "cogvlm":
        return "cogvlm_vqa" if processor.template == "vqa" else "cogvlm_chat"
    if kind in template_names():
        return kind
    has_one = getattr(processor, "chat_template", None) or getattr(tokenizer_of(processor), "chat_template", None)
    return "chat" if has_one else "vicuna_v1"


class _Decoded(Dataset):
    """(number, row, pictures) of rows, or why a row's pictures cannot be used."""

    def __init__(self, rows: Any, numbers: Sequence[int]) -> None:
        self.rows, self.numbers = rows, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[int, Row, list[Image.Image]] | Failure:
        number = self.numbers[index]
        row = self.rows[number]
        try:
            return number, row, [decode_image(image) for image in row["images"] or ()]
        except BadRecord as error:
            where = f"{row.get('source', 'rows')} [{row.get('key', number)}]"
            return Failure(number, error.reason, error.detail, where)


def exact_answer(row: Row, turn: int, prediction: str, reference: str) -> bool:
    """Whether an answer is right: by its kind for rows of Shapes, else whether it says the same as the reference."""
    if row.get("answers") and row.get("scenes"):
        truth = row["answers"][turn]
        objects = row["scenes"][truth["scene"]]["objects"]
        return score_answer(truth["kind"], prediction, truth["answer"], objects)
    return _plain(prediction) == _plain(reference)


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(". ")


def _turns(row: Row) -> int:
    return sum(message["role"] == "assistant" for message in row["messages"])


def _until(row: Row, turn: int, said: Mapping[int, str]) -> list[dict[str, Any]]:
    """Messages before the assistant's turn number `turn`."""
    messages = replaced_answers(row["messages"], said)
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    return messages[: places[turn]]


def _reference(row: Row, turn: int) -> str:
    return text_of([message for message in row["messages"] if message["role"] == "assistant"][turn])


def _result(rows: Any, judged: list[tuple[int, int, str, bool]], skipped: Skipped, details: bool) -> dict[str, Any]:
    first = [right for _, turn, _, right in judged if turn == 0]
    later = [right for _, turn, _, right in judged if turn > 0]
    whole: dict[int, bool] = {}
    kinds: dict[str, list[bool]] = {}
    for number, turn, _, right in judged:
        whole[number] = whole.get(number, True) and right
        if rows[number].get("answers"):
            kinds.setdefault(rows[number]["answers"][turn]["kind"], []).append(right)
    metrics = {"exact": _share(first + later), "exact_first_turn": _share(first)}
    if later:
        metrics["exact_later_turns"] = _share(later)
    metrics["exact_conversations"] = _share(list(whole.values()))
    result = common_result("instructions", metrics, skipped, conversations=len(whole), answers=len(judged))
    if kinds:
        result["per_kind"] = {kind: _share(rights) for kind, rights in sorted(kinds.items())}
    if details:
        result["details"] = [
            {"row": number, "turn": turn, "answer": text, "reference": _reference(rows[number], turn), "right": right}
            for number, turn, text, right in judged
        ]
    return result


def _share(rights: list[bool]) -> float:
    return sum(rights) / len(rights) if rights else 0.0
