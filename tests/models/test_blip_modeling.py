"""BLIP's inference models: native equality, one computation an image, generation, tasks, round trips, bad input."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from hf_vlp.models.blip.backbone_blip import MissingWeightsError, enc_token_id
from hf_vlp.models.blip.modeling_blip import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
)
from hf_vlp.models.blip.tasks_blip import (
    BlipForVisualDialog,
    BlipTasksForQuestionAnswering,
    BlipTasksForVisualReasoning,
    tasks_config,
)
from hf_vlp.objectives.language import AllLabelsIgnoredError
from tests.tiny.blip import DEC, ENC, SEP, VOCAB_SIZE, blip_config, images, spread_weights, texts

IDS, MASK = texts([5, 7, 3])


def native_config(config: transformers.BlipConfig) -> transformers.BlipConfig:
    config = copy.deepcopy(config)
    for part in (config, config.vision_config, config.text_config):
        part._attn_implementation_internal = None
    return config


def built(kind: type, **changes: object) -> torch.nn.Module:
    return spread_weights(kind(blip_config(**changes))).eval()


@torch.no_grad()
def test_retrieval_is_the_native_class():
    model = built(BlipForImageTextRetrieval, vision_width=48)
    native = transformers.BlipForImageTextRetrieval(native_config(model.config)).eval()
    native.load_state_dict(model.state_dict())
    for head in (True, False):
        ours = model(IDS, images(3), use_itm_head=head, attention_mask=MASK)
        theirs = native(IDS, images(3), use_itm_head=head, attention_mask=MASK)
        torch.testing.assert_close(ours.itm_score, theirs.itm_score, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_matching_of_any_pairs_is_that_of_the_native_class_with_enc():
    model = built(BlipForImageTextRetrieval)
    native = transformers.BlipForImageTextRetrieval(native_config(model.config)).eval()
    native.load_state_dict(model.state_dict())
    index, text = torch.tensor([2, 0, 0, 1, 2, 0]), torch.tensor([0, 1, 1, 2, 2, 0])
    found = model.embed_images(images(3))
    with_enc = IDS.clone()
    with_enc[:, 0] = ENC
    expected = native(with_enc[text], images(3)[index], attention_mask=MASK[text]).itm_score
    for rows in (512, 2):
        logits = model.matching_logits(found, index, IDS[text], MASK[text], rows_at_once=rows)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    scores = model.matching_scores(found, index, IDS[text], MASK[text])
    torch.testing.assert_close(scores, expected[:, 1], rtol=1e-4, atol=1e-5)
    assert model.matching_logits(found, index[:0], IDS[:0]).shape == (0, 2)


def test_an_image_is_projected_once_for_all_its_texts():
    model = built(BlipForImageTextRetrieval)
    found = model.embed_images(images(2))
    seen: list[int] = []
    layer = model.text_encoder.encoder.layer[0].crossattention.self.key
    layer.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    model.matching_scores(found, torch.zeros(3, dtype=torch.long), IDS, MASK)
    assert seen == [1]


@torch.no_grad()
@pytest.mark.parametrize("options", [{"num_beams": 3, "max_new_tokens": 8, "min_length": 4}, {"max_new_tokens": 6}])
def test_generation_has_the_native_ids_under_the_native_rule(options: dict[str, int]):
    model = built(BlipForConditionalGeneration, vision_width=48)
    native = transformers.BlipForConditionalGeneration(native_config(model.config)).eval()
    native.load_state_dict(model.state_dict())
    prompt = torch.tensor([[2, 8, 9, SEP]]).repeat(3, 1)
    for inputs in ({}, {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}):
        theirs = native.generate(images(3), **copy.deepcopy(inputs), **options)
        ours = model.generate(images(3), **inputs, count_prompt=False, **options)
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_beams_of_one_length_do_not_depend_on_the_rule():
    model = built(BlipForConditionalGeneration)
    options = {"num_beams": 3, "max_length": 8, "min_length": 8}
    ours = model.generate(images(2), **options)
    assert torch.equal(ours, model.generate(images(2), count_prompt=False, **options))
    assert (ours[:, 0] == DEC).all()


@torch.no_grad()
def test_beams_are_scored_by_the_start_and_what_follows_but_not_the_end():
    """As many beams as words: the best of all captions of at most two tokens, by the written-out rule."""
    model = built(BlipForConditionalGeneration)
    image, words = images(1), torch.arange(VOCAB_SIZE)
    first = model(image, torch.tensor([[DEC]])).logits[0, -1].log_softmax(-1)
    prefixes = torch.stack([torch.full_like(words, DEC), words], dim=1)
    second = model(image.expand(VOCAB_SIZE, -1, -1, -1), prefixes).logits[:, -1].log_softmax(-1)
    totals = first[:, None] + second
    scored = {(DEC, SEP): float(first[SEP])}
    for word in set(words.tolist()) - {SEP}:
        lengths = {other: 2 if other == SEP else 3 for other in words.tolist()}
        scored |= {(DEC, word, other): float(totals[word, other]) / length for other, length in lengths.items()}
    best = max(scored, key=scored.get)
    found = model.generate(image, num_beams=VOCAB_SIZE - 1, max_length=3, return_dict_in_generate=True)
    assert found.sequences[0, : len(best)].tolist() == list(best)
    assert float(found.sequences_scores[0]) == pytest.approx(scored[best], abs=1e-5)


@torch.no_grad()
def test_generation_is_the_most_likely_continuation():
    model = built(BlipForConditionalGeneration)
    found = model.generate(images(2), max_new_tokens=4, min_length=5)
    expected = torch.full((2, 1), DEC)
    for _ in range(4):
        logits = model(images(2), expected).logits[:, -1]
        logits[:, SEP] = -torch.inf
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, expected)


def caption_labels(prompt: int = 1) -> Tensor:
    labels = IDS.masked_fill(MASK == 0, -100)
    labels[:, :prompt] = -100
    return labels


def test_caption_loss_is_the_native_one_at_supervised_positions():
    model = built(BlipForConditionalGeneration)
    config = native_config(model.config)
    config.text_config.label_smoothing = 0.1
    native = transformers.BlipForConditionalGeneration(config).eval()
    native.load_state_dict(model.state_dict())
    with_dec = IDS.clone()
    with_dec[:, 0] = DEC
    for prompt in (1, 2):
        ours = model(images(3), IDS, MASK, labels=caption_labels(prompt)).loss
        theirs = native(images(3), with_dec, attention_mask=MASK, labels=caption_labels(prompt)).loss
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    ours.backward()
    theirs.backward()
    for (name, one), (_, other) in zip(model.named_parameters(), native.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_labels_that_would_train_wrongly_are_refused():
    model = built(BlipForConditionalGeneration)
    with pytest.raises(AllLabelsIgnoredError):
        model(images(3), IDS, MASK, labels=torch.full_like(IDS, -100))
    with pytest.raises(ValueError, match="PAD"):
        model(images(3), IDS, MASK, labels=IDS)
    with pytest.raises(ValueError, match="2 images for 3 texts"):
        model(images(2), IDS, MASK, labels=caption_labels())


def test_answers_do_not_depend_on_what_else_is_in_the_batch():
    model = built(BlipForQuestionAnswering)
    together = model.generate(IDS, images(3), MASK, num_beams=2, max_new_tokens=5)
    alone = model.generate(IDS[2:, :3], images(3)[2:], MASK[2:, :3], num_beams=2, max_new_tokens=5)
    width = min(together.shape[1], alone.shape[1])
    assert torch.equal(together[2:, :width], alone[:, :width])


def test_question_answering_is_the_native_class_where_nothing_is_padded():
    model = built(BlipForQuestionAnswering)
    native = transformers.BlipForQuestionAnswering(native_config(model.config)).eval()
    native.load_state_dict(model.state_dict())
    ids, mask = texts([5, 5])
    with_enc = ids.clone()
    with_enc[:, 0] = ENC
    ours = model.generate(ids, images(2), mask, num_beams=3, max_new_tokens=5, count_prompt=False)
    theirs = native.generate(with_enc, images(2), mask, num_beams=3, max_new_tokens=5)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("wide", [False, True])
def test_answers_are_trained_and_ranked(wide: bool):
    config = blip_config(vision_width=48 if wide else 32)
    model = BlipTasksForQuestionAnswering(tasks_config(config)) if wide else BlipForQuestionAnswering(config)
    model = spread_weights(model)
    answers, answer_mask = texts([3, 4, 3, 5, 3], seed=1)
    asked = {"pixel_values": images(3), "input_ids": IDS, "attention_mask": MASK}
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    per_question = torch.tensor([2, 1, 2])
    first = None
    for _ in range(40):
        output = model(
            **asked,
            labels=answers.masked_fill(answer_mask == 0, -100),
            answers_per_question=per_question,
            answer_weights=torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0]),
        )
        first = first or output.loss.item()
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert output.loss.item() < first / 2
    ranked = model.eval().rank_answers(**asked, candidate_ids=answers, candidate_attention_mask=answer_mask, top_k=5)
    assert ranked.answer_index[:, 0].tolist() == [0, 2, 3]
    with pytest.raises(ValueError, match="answers are missing"):
        model(**asked)
    with pytest.raises(ValueError, match="sum to the number of answers"):
        model(**asked, labels=answers, answers_per_question=torch.tensor([1, 1, 1]))
    with pytest.raises(ValueError, match="top_k"):
        model.rank_answers(**asked, candidate_ids=answers, top_k=9)


def test_the_native_question_class_is_refused_where_widths_differ():
    with pytest.raises(ValueError, match="BlipTasksForQuestionAnswering"):
        BlipForQuestionAnswering(blip_config(vision_width=48))


def test_two_images_are_told_apart_and_bad_input_is_refused():
    model = spread_weights(BlipTasksForVisualReasoning(tasks_config(blip_config(vision_width=48)))).eval()
    pairs = images(6).view(3, 2, 3, 32, 32)
    one, other = model(pairs, IDS, MASK).logits, model(pairs.flip(1), IDS, MASK).logits
    assert not torch.allclose(one, other, atol=1e-3)
    padded, mask = torch.nn.functional.pad(IDS, (0, 2)), torch.nn.functional.pad(MASK, (0, 2))
    torch.testing.assert_close(model(pairs, padded, mask).logits, one, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="exactly two images"):
        model(images(9).view(3, 3, 3, 32, 32), IDS, MASK)
    with pytest.raises(ValueError, match="0..1"):
        model(pairs, IDS, MASK, labels=torch.tensor([0, 1, 2]))


def test_two_equal_images_start_as_one():
    """Started from a one-image model the layers that average give, for two equal images, what it gives for one."""
    single = built(BlipForImageTextRetrieval)
    model = BlipTasksForVisualReasoning.from_single(single, merge_from=3).eval()
    pixels = images(3)
    states = model.text_encoder(model.with_enc(IDS), MASK, *[model.encode_images(pixels)] * 2)
    expected = single.extract_features(pixels, IDS, MASK).multimodal_embeds
    torch.testing.assert_close(states[MASK.bool()], expected[MASK.bool()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [32, 48])
def test_dialog_ranks_candidates(width: int):
    model = built(BlipForVisualDialog, vision_width=width)
    candidates, candidate_mask = texts([3, 4, 3, 5, 3, 3], seed=2)
    batch = {
        "pixel_values": images(3),
        "input_ids": IDS,
        "attention_mask": MASK,
        "candidate_ids": candidates,
        "candidate_attention_mask": candidate_mask,
        "candidates_per_dialog": torch.tensor([2, 3, 1]),
    }
    scores = model.candidate_scores(**batch)
    assert scores.shape == (6,) and scores.min() > 0 and scores.max() < 1
    alone = model.candidate_scores(
        images(3)[1:2], IDS[1:2], MASK[1:2], candidates[3:4], candidate_mask[3:4], torch.tensor([1])
    )
    torch.testing.assert_close(scores[3:4], alone, rtol=1e-4, atol=1e-5)
    labels = torch.tensor([1, 0, 0, 1, 0, 1])
    output = model(**batch, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits, labels)
    torch.testing.assert_close(output.loss, expected)
    with pytest.raises(ValueError, match="candidates are missing"):
        model(images(3), IDS, MASK)
    with pytest.raises(ValueError, match="sum to the number of candidates"):
        model.candidate_scores(**(batch | {"candidates_per_dialog": torch.tensor([2, 2, 1])}))


@pytest.mark.parametrize(
    ("kind", "native"),
    [
        (BlipForImageTextRetrieval, transformers.BlipForImageTextRetrieval),
        (BlipForConditionalGeneration, transformers.BlipForConditionalGeneration),
        (BlipForQuestionAnswering, transformers.BlipForQuestionAnswering),
        (BlipForVisualDialog, transformers.BlipForImageTextRetrieval),
    ],
)
def test_folders_are_native_in_both_directions(tmp_path: Path, kind: type, native: type):
    model = built(kind)
    model.save_pretrained(tmp_path / "ours")
    theirs, information = native.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not information["missing_keys"] and not information["unexpected_keys"]
    theirs.save_pretrained(tmp_path / "native")
    back = kind.from_pretrained(tmp_path / "native")
    assert all(torch.equal(back.state_dict()[name], value) for name, value in model.state_dict().items())
    assert theirs.config.architectures == [native.__name__]


def test_a_head_that_a_folder_lacks_is_named(tmp_path: Path):
    built(BlipForConditionalGeneration).save_pretrained(tmp_path)
    with pytest.raises(MissingWeightsError, match="no BlipForImageTextRetrieval.*itm_head"):
        BlipForImageTextRetrieval.from_pretrained(tmp_path)


def test_image_size_is_interpolated(tmp_path: Path):
    built(BlipForImageTextRetrieval).save_pretrained(tmp_path)
    model = BlipForImageTextRetrieval.from_pretrained(tmp_path, image_size=64)
    assert model.vision_model.embeddings.position_embedding.shape[1] == 17
    assert model.embed_images(images(1, size=64)).itc.shape == (1, 24)
    with pytest.raises(ValueError, match=r"are \(32, 32\) pixels, the vision tower was made for \(64, 64\)"):
        model.embed_images(images(1))
    with pytest.raises(ValueError, match="multiple of the patch size"):
        model.set_image_size(40)


def test_enc_is_the_token_behind_dec_where_the_config_does_not_say():
    config = blip_config()
    del config.text_config.enc_token_id
    assert enc_token_id(config) == ENC
    config.text_config.bos_token_id = ENC
    with pytest.raises(ValueError, match=r"\[ENC\]"):
        enc_token_id(config)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [BlipTasksForVisualReasoning, BlipTasksForQuestionAnswering])
def test_task_folders_open_without_the_package(tmp_path: Path, kind: type):
    model = spread_weights(kind(tasks_config(blip_config(vision_width=48)))).eval()
    model.save_pretrained(tmp_path)
    pixels = images(2)
    ids, mask = texts([4, 4])
    if kind is BlipTasksForVisualReasoning:
        call = "m(torch.stack([p, p.flip(0)], 1), i, k).logits"
        expected = model(torch.stack([pixels, pixels.flip(0)], 1), ids, mask).logits
    else:
        call = "m.generate(i, p, k, num_beams=2, max_new_tokens=4)"
        expected = model.generate(ids, pixels, mask, num_beams=2, max_new_tokens=4, count_prompt=False)
    torch.save({"p": pixels, "i": ids, "k": mask}, tmp_path / "inputs.pt")
    code = (
        "import sys, torch; from transformers import AutoModel\n"
        f"m = AutoModel.from_pretrained({str(tmp_path)!r}, trust_remote_code=True).eval()\n"
        f"d = torch.load({str(tmp_path / 'inputs.pt')!r}); p, i, k = d['p'], d['i'], d['k']\n"
        f"torch.save({call}.detach(), {str(tmp_path / 'out.pt')!r})\n"
        "assert not any(n.split('.')[0] == 'hf_vlp' for n in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), expected, rtol=1e-4, atol=1e-5)
