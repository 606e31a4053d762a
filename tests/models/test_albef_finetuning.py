"""ALBEF's tasks: where they start from, distillation, and what they refuse."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_vlp.models.albef.finetuning_albef import (
    AlbefForQuestionAnsweringFineTuning,
    AlbefForRetrievalFineTuning,
    AlbefForTextAssignment,
    AlbefForVisualEntailmentFineTuning,
    AlbefForVisualReasoningFineTuning,
    start_task,
)
from hf_vlp.models.albef.modeling_albef import AlbefForImageTextRetrieval, AlbefModel
from hf_vlp.models.albef.modeling_albef_tasks import (
    AlbefForQuestionAnswering,
    AlbefForVisualEntailment,
    AlbefForVisualReasoning,
)
from hf_vlp.models.albef.pretraining_albef import AlbefForPreTraining
from hf_vlp.models.pretraining import EXTRAS_FILE
from tests.tiny import albef as tiny

IDS, MASK = tiny.texts([4, 6, 5])
ANSWERS, _ = tiny.texts([3, 5, 4, 3], seed=1)
TASKS = [AlbefForVisualEntailmentFineTuning, AlbefForVisualReasoningFineTuning, AlbefForQuestionAnsweringFineTuning]


def inputs_of(cls: type) -> dict[str, Any]:
    pixels = tiny.images(6).view(3, 2, 3, 32, 32) if cls is AlbefForVisualReasoningFineTuning else tiny.images(3)
    batch = {"pixel_values": pixels, "input_ids": IDS, "attention_mask": MASK}
    if cls is AlbefForQuestionAnsweringFineTuning:
        weights = torch.tensor([0.3, 0.7, 1.0, 1.0])
        return batch | {"labels": ANSWERS, "answers_per_question": torch.tensor([2, 1, 1]), "answer_weights": weights}
    return batch | {"labels": torch.tensor([0, 1, 1])}


def build(cls: type, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = cls(tiny.albef_config(images_per_text=2 if cls is AlbefForVisualReasoningFineTuning else 1), **settings)
    tiny.spread_weights(model)
    model.tie_weights()
    model.reset_momentum()
    return model.train()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported pretraining, with its MLM head in the side file."""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    model = tiny.spread_weights(AlbefForPreTraining(tiny.albef_config(), queue_size=8))
    model.export(folder)
    return folder


@pytest.mark.parametrize("cls", TASKS)
def test_distillation_from_a_copy_that_has_not_moved(cls: type) -> None:
    """alpha = 0 is the inference model's own loss; a twin that stays put has the model's own logits."""
    model, batch = build(cls, momentum=1.0), inputs_of(cls)
    plain = model.model(**batch)
    hard = model(**batch, alpha=0.0)
    torch.testing.assert_close(hard.loss, plain.loss)
    assert hard.logits_m is None
    output = model(**batch, alpha=0.5)
    torch.testing.assert_close(output.logits_m, output.logits)
    soft = model(**batch, alpha=1.0)
    torch.testing.assert_close(output.loss, (hard.loss + soft.loss) / 2)
    output.loss.backward()
    assert all(p.grad is not None for p in model.model.parameters())
    assert all(p.grad is None for p in model.momentum.parameters())


@pytest.mark.parametrize("cls", TASKS)
def test_twin_follows_in_training_only_and_is_not_exported(cls: type, tmp_path: Path) -> None:
    model, batch = build(cls, momentum=0.9, alpha=0.4, alpha_warmup_steps=2), inputs_of(cls)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.add_(0.5)
    before = {name: value.clone() for name, value in model.momentum.state_dict().items()}
    model.eval()(**batch)
    assert all(torch.equal(value, before[name]) for name, value in model.momentum.state_dict().items())
    model.train()
    assert [model(**batch).alpha for _ in range(4)] == pytest.approx([0.0, 0.2, 0.4, 0.4])
    online = model.model.state_dict()
    for name, value in model.momentum.state_dict().items():
        torch.testing.assert_close(value, 0.9**4 * before[name] + (1 - 0.9**4) * online[name])
    model.export(tmp_path / "exported")
    assert not (tmp_path / "exported" / EXTRAS_FILE).exists()
    exported = cls.task_class.from_pretrained(tmp_path / "exported")
    assert all(torch.equal(value, exported.state_dict()[name]) for name, value in online.items())
    model.save_pretrained(tmp_path / "whole")
    again = cls.from_pretrained(tmp_path / "whole")
    own, loaded = model.state_dict(), again.state_dict()
    assert own.keys() == loaded.keys() and all(torch.equal(own[name], loaded[name]) for name in own)
    assert again.settings == model.settings
    larger = cls.from_pretrained(tmp_path / "whole", image_size=48)
    for part in (larger.model, larger.momentum):
        assert part.albef.vision_model.embeddings.position_embeddings.shape[1] == 10


def test_no_twin_without_distillation() -> None:
    model = build(AlbefForVisualEntailmentFineTuning, distill=False)
    assert model.momentum is None
    batch = inputs_of(type(model))
    torch.testing.assert_close(model(**batch).loss, model.model(**batch).loss)


def test_entailment_starts_with_a_new_head(pretrained: Path) -> None:
    model = AlbefForVisualEntailmentFineTuning.from_pretrained(pretrained, image_size=48)
    source = AlbefModel.from_pretrained(pretrained)
    for name, value in model.model.albef.state_dict().items():
        if "position_embeddings" not in name or "vision" not in name:
            assert torch.equal(value, source.state_dict()[name])
    assert model.model.classifier[-1].out_features == 3
    assert model.config.id2label == {0: "contradiction", 1: "neutral", 2: "entailment"}
    assert model(tiny.images(3, size=48), IDS, MASK, labels=torch.tensor([0, 1, 2])).loss.isfinite()
    assert model.chance_levels({})["loss_classification"] == pytest.approx(1.0986, abs=1e-4)


def test_twin_layers_start_as_copies(pretrained: Path) -> None:
    model = AlbefForVisualReasoningFineTuning.from_pretrained(pretrained).model
    source = AlbefModel.from_pretrained(pretrained)
    for i, pair in enumerate(model.albef.text_model.encoder.layer[2:], start=2):
        one = source.text_model.encoder.layer[i].state_dict()
        for name, value in {**pair.first.state_dict(), **pair.second.state_dict()}.items():
            assert torch.equal(value, one[name])
    assert model.config.text_config.images_per_text == 2


def test_decoder_starts_as_the_fusion_encoder_with_the_mlm_head(pretrained: Path) -> None:
    from safetensors.torch import load_file

    model = AlbefForQuestionAnsweringFineTuning.from_pretrained(pretrained).model
    for i, layer in enumerate(model.decoder.text_model.encoder.layer):
        wanted = model.albef.text_model.encoder.layer[2 + i].state_dict()
        assert all(torch.equal(value, wanted[name]) for name, value in layer.state_dict().items())
    extras = load_file(pretrained / EXTRAS_FILE)
    assert torch.equal(model.decoder.lm_head.bias, extras["mlm_head.bias"])
    words = model.decoder.text_model.embeddings.word_embeddings.weight
    assert model.decoder.lm_head.decoder.weight is words
    assert torch.equal(words, model.albef.text_model.embeddings.word_embeddings.weight)
    answers = model.generate(tiny.images(2), IDS[:2], MASK[:2], num_beams=2, max_new_tokens=3)
    assert answers.shape[0] == 2


def test_towers_of_other_widths_start_with_a_warning() -> None:
    config = tiny.albef_config()
    config.vision_config.hidden_size, config.text_config.encoder_width = 48, 48
    model = AlbefForQuestionAnswering(config)
    with pytest.warns(UserWarning, match="keys and values of the decoder's cross-attention start at random"):
        model.initialise_decoder()
    source, target = model.albef.text_model.encoder.layer[2], model.decoder.text_model.encoder.layer[0]
    assert torch.equal(source.crossattention.self.query.weight, target.crossattention.self.query.weight)
    assert target.crossattention.self.key.weight.shape == (32, 32)


def implementations(model: nn.Module) -> set[str]:
    return {m.config._attn_implementation for m in model.modules() if isinstance(m, PreTrainedModel)}


@pytest.mark.parametrize("cls", [*TASKS, AlbefForRetrievalFineTuning, AlbefForPreTraining])
def test_chosen_attention_reaches_model_and_twin(cls: type, tmp_path: Path) -> None:
    config = tiny.albef_config(images_per_text=2 if cls is AlbefForVisualReasoningFineTuning else 1)
    config._attn_implementation = "eager"
    model = cls(config)
    assert implementations(model) == {"eager"}
    model.save_pretrained(tmp_path)
    assert implementations(cls.from_pretrained(tmp_path, attn_implementation="eager")) == {"eager"}


@pytest.mark.parametrize("cls", [AlbefForVisualReasoning, AlbefForQuestionAnswering])
def test_chosen_attention_reaches_a_task(cls: type, pretrained: Path) -> None:
    assert implementations(start_task(cls, pretrained, attn_implementation="eager")) == {"eager"}


def test_own_checkpoint_is_continued_and_pairs_are_not_singles(pretrained: Path, tmp_path: Path) -> None:
    model = build(AlbefForVisualReasoningFineTuning).model
    model.save_pretrained(tmp_path)
    again = start_task(AlbefForVisualReasoning, tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="twin layers for pairs of images"):
        start_task(AlbefForVisualEntailment, tmp_path)


def test_text_assignment_gives_texts_to_images() -> None:
    weights = torch.ones(4, 4)
    others = torch.tensor([[1, 2], [2, 3], [3, 0], [0, 1]])
    labels, index = AlbefForTextAssignment.assign(
        weights, torch.tensor([0.9, 0.5, 0.1, 0.34]), torch.tensor([0.7, 0.2, 0.9, 0.51]), others
    )
    assert labels.tolist() == [0, 1, 2, 0]
    assert index.tolist() == [[0, 2, 3, 3], [1, 1, 0, 0]]


def test_text_assignment_starts_from_retrieval_and_trains(pretrained: Path, tmp_path: Path) -> None:
    model = AlbefForTextAssignment.from_retrieval(pretrained).train()
    retrieval = AlbefForImageTextRetrieval.from_pretrained(pretrained)
    assert torch.equal(model.vision_projection.weight, retrieval.vision_projection.weight)
    pixels = tiny.images(3)
    seen: set[int] = set()
    for seed in range(6):
        output = model(pixels, IDS, MASK, generator=torch.Generator().manual_seed(seed))
        own = torch.arange(3)
        first, second = output.image_index
        assert (first != second).all()
        for label, expected in ((0, first), (1, second)):
            assert torch.equal(expected[output.labels == label], own[output.labels == label])
        neither = output.labels == 2
        assert (first[neither] != own[neither]).all() and (second[neither] != own[neither]).all()
        seen |= set(output.labels.tolist())
    assert seen == {0, 1, 2}
    output.loss.backward()
    assert model.assignment_head.weight.grad is not None
    assert model.vision_projection.weight.grad is None
    model.export(tmp_path)
    assert start_task(AlbefForVisualReasoning, tmp_path).config.text_config.images_per_text == 2
    with pytest.raises(ValueError, match="use 3 or more"):
        model(pixels[:2], IDS[:2], MASK[:2])
    given = (torch.tensor([0.9, 0.5]), torch.tensor([0.7, 0.2]), torch.tensor([[1, -1], [0, -1]]))
    assert model(pixels[:2], IDS[:2], MASK[:2], draws=given).image_index.tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize("cls", TASKS)
def test_missing_labels_are_named(cls: type) -> None:
    model, batch = build(cls), inputs_of(cls)
    with pytest.raises(ValueError, match="missing"):
        model(**{name: value for name, value in batch.items() if name in ("pixel_values", "input_ids")})
    wrong: Tensor = batch["labels"]
    if cls is not AlbefForQuestionAnsweringFineTuning:
        with pytest.raises(ValueError, match="labels must lie in"):
            model(**(batch | {"labels": wrong + 5}))
    else:
        with pytest.raises(ValueError, match="answers_per_question"):
            model(**(batch | {"answers_per_question": torch.tensor([1, 1, 1])}))
        with pytest.raises(ValueError, match="answer_weights"):
            model(**(batch | {"answer_weights": torch.ones(2)}))
    with pytest.raises(ValueError, match="alpha must lie in"):
        build(cls, alpha=2.0)
