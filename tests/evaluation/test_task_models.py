"""The tasks' evaluations with real (tiny) models, from a saved folder and Shapes, as the command line runs them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_vlp.data import shapes_texts, train_bert_tokenizer
from hf_vlp.evaluation import run_evaluation
from hf_vlp.models.albef.modeling_albef import AlbefForImageTextRetrieval
from hf_vlp.models.albef.modeling_albef_tasks import (
    AlbefForQuestionAnswering,
    AlbefForVisualEntailment,
    AlbefForVisualReasoning,
)
from hf_vlp.models.albef.processing_albef import AlbefProcessor
from tests.tiny import albef

CLASSES = {
    "vqa": AlbefForQuestionAnswering,
    "visual-reasoning": AlbefForVisualReasoning,
    "visual-entailment": AlbefForVisualEntailment,
    "grounding": AlbefForImageTextRetrieval,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tokenizer = train_bert_tokenizer(shapes_texts(200, questions=True), max_length=24)
    processor = AlbefProcessor.for_image_size(tokenizer, albef.IMAGE_SIZE)
    for name, kind in CLASSES.items():
        config = albef.albef_config(images_per_text=2 if name == "visual-reasoning" else 1)
        for text in (config.text_config, getattr(config, "decoder_config", None)):
            if text is not None:
                text.vocab_size = len(tokenizer)
                text.bos_token_id, text.eos_token_id = tokenizer.cls_token_id, tokenizer.sep_token_id
                text.pad_token_id = tokenizer.pad_token_id
        torch.manual_seed(0)
        albef.spread_weights(kind(config)).save_pretrained(root / name)
        processor.save_pretrained(root / name)
    return root


@pytest.mark.parametrize(
    ("task", "options", "metrics"),
    [
        ("vqa", {"num_beams": 2}, {"vqa_accuracy", "exact_match"}),
        ("vqa", {"answer_list": ["red", "yes", "no", "2"], "top_k": 3}, {"vqa_accuracy", "exact_match"}),
        ("visual_reasoning", {}, {"accuracy", "consistency"}),
        ("visual-entailment", {}, {"accuracy"}),
        (
            "grounding",
            {"source": "contrastive"},
            {
                "pointing_game",
                "pointing_game_chance",
                "map_box_accuracy",
                "map_box_mean_iou",
                "proposal_accuracy",
                "proposal_accuracy_chance",
            },
        ),
        ("grounding", {}, None),
    ],
)
def test_from_folder_to_numbers(root: Path, task: str, options: dict[str, Any], metrics: set[str] | None) -> None:
    folder = root / task.replace("_", "-")
    result = run_evaluation(task, folder, "shapes", batch_size=5, limit=12, show_progress=False, **options)
    assert result["samples"] and all(0 <= value <= 1 for value in result["metrics"].values())
    if metrics is not None:
        assert set(result["metrics"]) == metrics
    # The size of a batch changes nothing.
    again = run_evaluation(task, folder, "shapes", batch_size=12, limit=12, show_progress=False, **options)
    assert again["metrics"] == pytest.approx(result["metrics"])


def test_a_role_that_the_architecture_lacks(root: Path) -> None:
    with pytest.raises(KeyError, match="ALBEF.*has no 'dialog' class; it has: .*visual_reasoning"):
        run_evaluation("dialog", root / "vqa", "shapes")
