"""Gradient caching: equal to the plain step in value and gradient, on one process and under DDP and FSDP."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import ModelOutput

from hf_vlp.objectives.contrastive import contrastive_loss, sigmoid_loss
from hf_vlp.objectives.distributed import offset_of, world
from hf_vlp.objectives.gradient_cache import cached_backward, cached_step
from hf_vlp.objectives.matching import matching_loss
from tests.distributed import run_ranks


class TwoTowers(nn.Module):
    """A small model with all that matters: towers, parameters of the objective alone, several terms."""

    def __init__(self, dropout: float = 0.0, frozen_images: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image_tower = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Dropout(dropout), nn.Linear(8, 4))
        self.text_tower = nn.Sequential(nn.Linear(5, 8), nn.Dropout(dropout), nn.Tanh(), nn.Linear(8, 4))
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(5.0)))
        self.logit_bias = nn.Parameter(torch.full((1,), -1.0))
        self.head = nn.Linear(8, 2)
        self.image_tower.requires_grad_(not frozen_images)
        self.calls = 0

    def embed(self, pixels: Tensor, tokens: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return F.normalize(self.image_tower(pixels), dim=-1), F.normalize(self.text_tower(tokens), dim=-1)

    def objective(self, images: Tensor, texts: Tensor, image_ids: Tensor | None = None) -> ModelOutput:
        itc = contrastive_loss(images, texts, self.logit_scale.exp(), image_ids=image_ids)
        sig = sigmoid_loss(images, texts, self.logit_scale.exp(), self.logit_bias, tile_size=3)
        pairs = torch.cat([torch.cat([images, texts], 1), torch.cat([images, texts.roll(1, 0)], 1)])
        labels = torch.arange(2, device=images.device).flip(0).repeat_interleave(len(images))
        itm = matching_loss(self.head(pairs), labels)
        return ModelOutput(loss=itc.loss + 0.5 * sig.loss + itm, loss_itc=itc.loss, images=images)

    def forward(self, pixels: Tensor, tokens: Tensor, image_ids: Tensor) -> ModelOutput:
        return self.objective(*self.embed(pixels, tokens), image_ids=image_ids)


def batch(rows: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "pixels": torch.randn(rows, 6, generator=generator),
        "tokens": torch.randn(rows, 5, generator=generator),
        "image_ids": torch.randint(9, (rows,), generator=generator),
    }


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-6) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(ours[name], value, rtol=tolerance, atol=tolerance), name


def plain_step(model: TwoTowers, rows: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(**rows).loss
    loss.backward()
    return loss.detach(), grads(model)


@pytest.mark.parametrize("chunk_size", [1, 5, 12, 100])
def test_equals_the_plain_step(chunk_size: int) -> None:
    expected_loss, expected = plain_step(TwoTowers(), batch())
    model = TwoTowers()
    output = cached_step(model, batch(), chunk_size)
    assert torch.allclose(output.loss, expected_loss)
    assert output.images.shape == (12, 4)
    assert not any(value.requires_grad for value in output.values())
    assert_same(grads(model), expected)
    assert model.calls == 2 * -(-12 // chunk_size)
    assert "forward" not in model.__dict__
    # A second step accumulates, as `backward` does.
    cached_step(model, batch(), chunk_size)
    assert_same(grads(model), {name: 2 * value for name, value in expected.items()}, 4e-6)


def test_a_frozen_tower_gets_no_gradient() -> None:
    _, expected = plain_step(TwoTowers(frozen_images=True), batch())
    model = TwoTowers(frozen_images=True)
    cached_step(model, batch(), 5)
    assert_same(grads(model), expected)
    assert not any(name.startswith("image_tower") for name in grads(model))


def in_chunks_with_graph(
    model: TwoTowers, rows: dict[str, Tensor], sizes: list[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same chunks with all graphs held at once: what caching must equal if random numbers are drawn by chunk."""
    parts, start = [], 0
    for size in sizes:
        parts.append(model.embed(**{key: value[start : start + size] for key, value in rows.items()}))
        start += size
    loss = model.objective(*map(torch.cat, zip(*parts)), image_ids=rows["image_ids"]).loss
    loss.backward()
    return loss.detach(), grads(model)


def test_dropout_is_replayed() -> None:
    model = TwoTowers(dropout=0.5)
    torch.manual_seed(7)
    expected_loss, expected = in_chunks_with_graph(model, batch(), [4, 4, 4])
    after = torch.rand(3)
    model = TwoTowers(dropout=0.5)
    torch.manual_seed(7)
    output = cached_step(model, batch(), 4)
    assert torch.equal(torch.rand(3), after)
    assert torch.allclose(output.loss, expected_loss)
    assert_same(grads(model), expected)


def test_draws_of_the_objective_count() -> None:
    def noisy(images: Tensor, texts: Tensor) -> Tensor:
        return contrastive_loss(images + 0.1 * torch.randn_like(images), texts, 5.0).loss

    model = TwoTowers(dropout=0.5)
    torch.manual_seed(7)
    noisy(*map(torch.cat, zip(*(model.embed(**{k: v[i : i + 4] for k, v in batch().items()}) for i in (0, 4, 8)))))
    after = torch.rand(3)
    torch.manual_seed(7)
    cached_backward(lambda chunk: model.embed(**chunk), noisy, batch(), 4)
    assert torch.equal(torch.rand(3), after)


def test_autocast() -> None:
    sides = []
    for step in (in_chunks_with_graph, lambda model, rows, _: cached_step(model, rows, 4)):
        model = TwoTowers()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            step(model, batch(), [4, 4, 4])
        sides.append(grads(model))
    assert sides[0].keys() == dict(TwoTowers().named_parameters()).keys()
    assert_same(sides[1], sides[0], 2e-2)


def test_a_scaled_backward() -> None:
    _, expected = plain_step(TwoTowers(), batch())
    model = TwoTowers()
    cached_step(model, batch(), 5, backward=lambda value: (value * 64).backward())
    assert_same(grads(model), {name: 64 * value for name, value in expected.items()}, 2e-5)


def test_chunks_given_by_the_caller_and_other_values() -> None:
    model, rows = TwoTowers(), batch()
    _, expected = plain_step(TwoTowers(), rows)
    seen = []

    def embed(chunk: dict[str, Any]) -> tuple[Tensor, Tensor]:
        seen.append(chunk["note"])
        return model.embed(chunk["pixels"], chunk["tokens"])

    def objective(images: Tensor, texts: Tensor) -> Tensor:
        return model.objective(images, texts, rows["image_ids"]).loss

    chunks = [
        {"note": "a", **{k: v[:5] for k, v in rows.items()}},
        {"note": "b", **{k: v[5:] for k, v in rows.items()}},
    ]
    loss = cached_backward(embed, objective, chunks)
    assert isinstance(loss, Tensor)
    assert_same(grads(model), expected)
    assert seen == ["a", "b", "a", "b"]
    seen.clear()
    model.zero_grad()
    cached_backward(embed, objective, {"note": "c", "factor": torch.tensor(2.0), **rows}, 7)
    assert_same(grads(model), expected)
    assert seen == ["c"] * 4


def test_integers_beside_the_embeddings_pass_through() -> None:
    model, rows = TwoTowers(), batch()
    _, expected = plain_step(TwoTowers(), rows)
    cached_backward(
        lambda chunk: (*model.embed(**chunk), chunk["image_ids"]), lambda *embeds: model.objective(*embeds), rows, 5
    )
    assert_same(grads(model), expected)


def test_what_cannot_be_exact_raises() -> None:
    model = TwoTowers()
    model.image_tower.insert(1, nn.BatchNorm1d(8))
    with pytest.raises(ValueError, match=r"image_tower\.1.*gradient caching in chunks of 4"):
        cached_step(model, batch(), 4)
    model.image_tower[1].eval()
    cached_step(model, batch(), 4)
    with pytest.raises(ValueError, match="chunk_size"):
        cached_step(TwoTowers(), batch(), 0)
    with pytest.raises(ValueError, match="'tokens': 11"):
        cached_step(TwoTowers(), {**batch(), "tokens": torch.randn(11, 5)}, 4)
    with pytest.raises(ValueError, match="no gradient"):
        cached_step(TwoTowers().requires_grad_(False), batch(), 4)
    with pytest.raises(ValueError, match="a `loss`"):
        cached_backward(lambda chunk: TwoTowers().embed(**chunk), lambda *embeds: 3, batch(), 4)


def peak_of_activations(model: nn.Module, step: Callable[[], object]) -> int:
    """Largest number of bytes that autograd held at a time for the backward, weights not counted."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held = {"now": 0, "peak": 0}

    class Saved:
        def __init__(self, value: Tensor) -> None:
            self.value = value
            own = value.untyped_storage().data_ptr() not in weights
            self.bytes = value.numel() * value.element_size() if own else 0
            held["now"] += self.bytes
            held["peak"] = max(held["peak"], held["now"])

        def __del__(self) -> None:
            held["now"] -= self.bytes

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.value):
        step()
    return held["peak"]


def test_activations_of_one_chunk_at_a_time() -> None:
    class Deep(TwoTowers):
        def __init__(self) -> None:
            super().__init__()
            self.image_tower = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.GELU()) for _ in range(40)))
            self.text_tower = nn.Linear(5, 6)

        def objective(self, images: Tensor, texts: Tensor, image_ids: Tensor | None = None) -> Tensor:
            return contrastive_loss(images, texts, self.logit_scale.exp(), image_ids=image_ids, tile_size=8).loss

        def forward(self, **rows: Tensor) -> Tensor:
            return self.objective(*self.embed(**rows))

    deep = Deep()
    small = peak_of_activations(deep, lambda: deep(**batch(8)).backward())
    whole = peak_of_activations(deep, lambda: deep(**batch(128)).backward())
    cached = peak_of_activations(deep, lambda: cached_step(deep, batch(128), 8))
    assert whole > 12 * small
    assert cached < 1.25 * small


def under_ddp(sizes: list[int], find_unused: bool) -> dict[str, Any]:
    own = slice(offset_of(sizes), offset_of(sizes) + sizes[world()[0]])
    model = TwoTowers()
    model.unused = nn.Linear(2, 2).requires_grad_(find_unused)
    wrapped = DistributedDataParallel(model, find_unused_parameters=find_unused)
    rows = {key: value[own] for key, value in batch().items()}
    # Two micro-batches accumulate; only the second is reduced.
    with wrapped.no_sync():
        cached_step(wrapped, rows, 3)
    unreduced = grads(model)
    output = cached_step(wrapped, rows, 3)
    return {"loss": output.loss, "grads": grads(model), "unreduced": unreduced}


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "find_unused"), [([7, 5], False), ([7, 1, 4], True), ([12, 0], False)])
def test_ddp_equals_one_process(sizes: list[int], find_unused: bool) -> None:
    ranks = run_ranks(under_ddp, len(sizes), sizes, find_unused)
    model = TwoTowers()

    def joined(images: Tensor, texts: Tensor) -> Tensor:
        # The mismatched texts of the matching term are drawn within each rank's rows.
        parts, start = [], 0
        for size in sizes:
            parts.append(texts[start : start + size].roll(1, 0))
            start += size
        itc = contrastive_loss(images, texts, model.logit_scale.exp(), image_ids=batch()["image_ids"]).loss
        sig = sigmoid_loss(images, texts, model.logit_scale.exp(), model.logit_bias).loss
        pairs = torch.cat([torch.cat([images, texts], 1), torch.cat([images, torch.cat(parts)], 1)])
        return itc + 0.5 * sig + matching_loss(model.head(pairs), torch.tensor([1, 0]).repeat_interleave(12))

    loss = joined(*model.embed(batch()["pixels"], batch()["tokens"]))
    loss.backward()
    expected = grads(model)
    assert torch.allclose(sum(rank["loss"] for rank in ranks) / len(sizes), loss.detach())
    for rank in ranks:
        assert_same(
            {name: value for name, value in rank["grads"].items() if "unused" not in name},
            {name: 2 * value for name, value in expected.items()},
            4e-6,
        )
    assert any(
        not torch.allclose(ranks[0]["unreduced"][name], ranks[1]["unreduced"][name], atol=1e-4) for name in expected
    )


def under_fsdp(sizes: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    own = slice(offset_of(sizes), offset_of(sizes) + sizes[world()[0]])
    model = TwoTowers()
    mesh = init_device_mesh("cpu", (len(sizes),))
    fully_shard(model.image_tower, mesh=mesh)
    fully_shard(model, mesh=mesh)
    output = cached_step(model, {key: value[own] for key, value in batch().items()}, 3)
    return output.loss, {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
def test_fsdp_equals_ddp() -> None:
    sizes = [7, 5]
    sharded, replicated = run_ranks(under_fsdp, 2, sizes), run_ranks(under_ddp, 2, sizes, False)
    for (loss, found), rank in zip(sharded, replicated):
        assert torch.allclose(loss, rank["loss"])
        assert_same({name: 2 * value for name, value in found.items()}, rank["grads"], 4e-6)
