"""Conversations answered turn by turn, by a model that says what it is told to."""

import pytest
import torch
from torch import nn

from hf_vlp.data import decode_image
from hf_vlp.data.conversations import load_conversations, make_template, prompt_batch
from hf_vlp.data.conversations.prompts import answer_text
from hf_vlp.evaluation.instructions import evaluate_instructions, own_template
from hf_vlp.evaluation.run import TASKS, task_options
from tests.data.conversations import TinyProcessor, record


class Oracle(nn.Module):
    """Answers a prompt by what `answer(prompt)` says, and keeps the prompts."""

    def __init__(self, processor, answer):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.processor, self.answer, self.prompts = processor, answer, []

    def generate(self, input_ids, attention_mask, pixel_values=None, eos_token_id=None, **options):
        tokenizer = self.processor.tokenizer
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            prompt = tokenizer.decode(ids[mask.bool()])
            self.prompts.append(prompt)
            rows.append(tokenizer(f" {self.answer(prompt)}</s>", add_special_tokens=False).input_ids)
        width = max(map(len, rows))
        added = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
        return torch.cat([input_ids, added], dim=1)


def truth_of(rows):
    """Question -> true answer; the questions of these rows are all different."""
    said = {}
    for row in rows:
        texts = ["".join(entry["text"] or "" for entry in message["content"]).strip() for message in row["messages"]]
        said |= dict(zip(texts[::2], texts[1::2], strict=True))
    return said


ROWS = [
    record("<image>first a?", "one", "second a?", "two", images=(2,), key="a"),
    record("first b?", "three", key="b"),
    record("<image>first c?", "four", "second c?", "five", "third c?", "six", images=(3,), key="c"),
]


def asked(prompt: str) -> str:
    return prompt.rsplit("USER: ", 1)[1].removesuffix(" ASSISTANT:").replace("<image>", "").strip()


def test_right_answers_are_right():
    processor = TinyProcessor()
    truth = truth_of(ROWS)
    model = Oracle(processor, lambda prompt: truth[asked(prompt)] + ".")
    result = evaluate_instructions(model, processor, ROWS, batch_size=2, show_progress=False, details=True)
    assert result["metrics"] == {
        "exact": 1.0,
        "exact_first_turn": 1.0,
        "exact_later_turns": 1.0,
        "exact_conversations": 1.0,
    }
    assert result["samples"]["answers"] == 6 and len(result["details"]) == 6
    # Each image counts for its width.
    assert all(prompt.count("<image>") in (0, 2, 3) for prompt in model.prompts)


def test_wrong_answers_count_where_they_are():
    processor = TinyProcessor()
    truth = truth_of(ROWS) | {"second c?": "wrong"}
    result = evaluate_instructions(
        Oracle(processor, lambda prompt: truth[asked(prompt)]), processor, ROWS, show_progress=False
    )
    assert result["metrics"]["exact"] == pytest.approx(5 / 6)
    assert result["metrics"]["exact_later_turns"] == pytest.approx(2 / 3)
    assert result["metrics"]["exact_conversations"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(("history", "heard"), [("own", "nonsense"), ("true", "four")])
def test_the_history_is_the_models_own_or_the_true_one(history, heard):
    processor = TinyProcessor()
    model = Oracle(processor, lambda prompt: "nonsense")
    evaluate_instructions(model, processor, ROWS, history=history, show_progress=False)
    third = next(prompt for prompt in model.prompts if "third c?" in prompt)
    assert f"first c? ASSISTANT: {heard}</s>" in third
    with pytest.raises(ValueError, match="history='both'"):
        evaluate_instructions(model, processor, ROWS, history="both")


def test_shapes_are_scored_by_kind():
    processor = TinyProcessor()
    rows = load_conversations("shapes:simple", size=15)
    model = Oracle(processor, lambda prompt: "It is red, I think.")
    result = evaluate_instructions(model, processor, rows, show_progress=False, details=True)
    for one in result["details"]:
        truth = rows[one["row"]]["answers"][one["turn"]]
        assert one["right"] == (truth["kind"] == "color" and truth["answer"] == "red")
    assert set(result["per_kind"]) == {truth["kind"] for row in rows for truth in row["answers"]}


def test_broken_pictures_are_left_out_or_stop():
    processor = TinyProcessor()
    rows = [*ROWS, record("<image>broken?", "x", images=(2,), key="broken")]
    rows[-1]["images"] = [{"bytes": b"nothing", "path": None}]
    truth = truth_of(rows)
    model = Oracle(processor, lambda prompt: truth[asked(prompt)])
    result = evaluate_instructions(model, processor, rows, max_bad_rate=0.5, show_progress=False)
    assert result["metrics"]["exact"] == 1.0 and result["samples"]["skipped_images"] == 1
    with pytest.raises(RuntimeError, match="broken"):
        evaluate_instructions(model, processor, rows, show_progress=False)


def test_the_task_is_known():
    assert TASKS["instructions"].role == "chat"
    assert {"template", "history", "max_new_tokens"} <= set(task_options("instructions"))


@pytest.mark.parametrize("kind", ["llava", "cogvlm", "qwen_vl", "instructblip"])
def test_answers_are_what_a_model_says_behind_the_prompt(kind: str) -> None:
    from tests.tiny import cogvlm, instructblip, llava, qwen_vl
    from tests.training.cogvlm_runs import tiny_processor

    if kind == "llava":
        model, processor = llava.llava()
    elif kind == "cogvlm":
        model = cogvlm.model(2)
        processor = tiny_processor(model)
    else:
        tiny = {"qwen_vl": qwen_vl, "instructblip": instructblip}[kind]
        model, processor = tiny.model(), tiny.processor()
    rows = load_conversations("shapes:row", "test", size=3, max_turns=1)
    result = evaluate_instructions(model, processor, rows, max_new_tokens=4, show_progress=False, details=True)
    template = make_template(own_template(model, processor), processor)
    for row, answer in zip(rows, result["details"], strict=True):
        batch = prompt_batch(processor, template, [([decode_image(row["images"][0])], row["messages"][:1])])
        with torch.no_grad():
            ids = model.eval().generate(**batch, max_new_tokens=4, do_sample=False)
        assert torch.equal(ids[:, : batch["input_ids"].shape[1]], batch["input_ids"])
        assert answer["answer"] == answer_text(processor, template, ids[0, batch["input_ids"].shape[1] :])


def test_a_model_is_asked_in_its_own_template() -> None:
    from hf_vlp.models.llava.processing_llava import CHAT_TEMPLATES, use_template
    from tests.tiny import cogvlm, instructblip, llava, qwen_vl
    from tests.training.cogvlm_runs import tiny_processor

    model, processor = llava.llava()
    for name in CHAT_TEMPLATES:
        assert own_template(model, use_template(processor, name)) == name
    processor.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    assert own_template(model, processor) == "chat"
    seen = cogvlm.model(2)
    assert own_template(seen, tiny_processor(seen)) == "cogvlm_chat"
    short = tiny_processor(seen)
    short.template = "vqa"
    assert own_template(seen, short) == "cogvlm_vqa"
    assert own_template(qwen_vl.model(), qwen_vl.processor()) == "qwen_vl"
    assert own_template(instructblip.model(), instructblip.processor()) == "instructblip"
