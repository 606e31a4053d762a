"""ITC: closed forms, a naive loop, tiles, queue, options, and N ranks against one process."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_vlp.objectives.contrastive import ContrastiveOutput, contrastive_loss, query_contrastive_loss
from hf_vlp.objectives.distributed import offset_of, world
from hf_vlp.objectives.tiled import tiled_statistics
from tests.distributed import run_ranks

IDS = torch.tensor([4, 4, 9, 1, 9, 9, 2, 4])


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def naive(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    old_images: Tensor | None = None,
    old_texts: Tensor | None = None,
    old_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both directions, pair by pair."""
    count = len(images)
    ids = torch.arange(count) if ids is None else ids

    def similarity(image: Tensor, text: Tensor) -> Tensor:
        return scale * (torch.stack([query @ text for query in image]).max() if image.dim() == 2 else image @ text)

    losses = []
    for direction in range(2):
        total = torch.zeros((), dtype=torch.float64)
        for i in range(count):
            keys, key_ids = list(texts if direction == 0 else images), ids.tolist()
            more = old_texts if direction == 0 else old_images
            if more is not None:
                keys += list(more)
                key_ids += old_ids.tolist() if old_ids is not None else [-1] * len(more)
            row = [similarity(images[i], key) if direction == 0 else similarity(key, texts[i]) for key in keys]
            log_sum = torch.stack(row).exp().sum().log()
            positives = [j for j, other in enumerate(key_ids) if other == ids[i]]
            for j, logit in enumerate(row):
                target = (1 - label_smoothing) * (j in positives) / len(positives) + label_smoothing / len(row)
                total = total + target * (log_sum - logit)
        losses.append(total / count)
    return losses[0], losses[1]


def gradients(loss: Tensor, *tensors: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, tensors))


def assert_close(ours: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for a, b in zip(ours, expected, strict=True):
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance), (a, b)


def leaves(*tensors: Tensor | float) -> list[Tensor]:
    return [torch.as_tensor(tensor, dtype=torch.float64).clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("tile_size", [None, 3])
def test_equal_similarities_cost_the_logarithm_of_the_batch(tile_size: int | None) -> None:
    same = torch.ones(7, 4) / 2
    for ids in (None, IDS[:7]):
        for smoothing in (0.0, 0.1):
            output = contrastive_loss(same, same, 5.0, image_ids=ids, label_smoothing=smoothing, tile_size=tile_size)
            for loss in (output.loss, output.loss_i2t, output.loss_t2i):
                assert loss.item() == pytest.approx(math.log(7), abs=1e-5)


@pytest.mark.parametrize("tile_size", [None, 1])
def test_two_pairs_by_hand(tile_size: int | None) -> None:
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    # scale 2: logits [[1.2, 0], [1.6, 2]]
    i2t = (math.log(1 + math.exp(-1.2)) + math.log(1 + math.exp(-0.4))) / 2
    t2i = (math.log(1 + math.exp(0.4)) + math.log(1 + math.exp(-2.0))) / 2
    output = contrastive_loss(images, texts, 2.0, tile_size=tile_size)
    assert output.loss_i2t.item() == pytest.approx(i2t, abs=1e-6)
    assert output.loss_t2i.item() == pytest.approx(t2i, abs=1e-6)
    assert output.loss.item() == pytest.approx((i2t + t2i) / 2, abs=1e-6)
    if tile_size is None:
        assert torch.allclose(output.logits_per_image, torch.tensor([[1.2, 0.0], [1.6, 2.0]]))
        assert torch.equal(output.logits_per_text, output.logits_per_image.t())


@pytest.mark.parametrize("queries", [None, 3])
@pytest.mark.parametrize("tile_size", [None, 3, 100])
@pytest.mark.parametrize("with_queue", [False, True])
@pytest.mark.parametrize("ids", [None, IDS])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_equals_the_naive_loop(
    queries: int | None, tile_size: int | None, with_queue: bool, ids: Tensor | None, label_smoothing: float
) -> None:
    shape = (8, 5) if queries is None else (8, queries, 5)
    images, texts, scale = leaves(unit(*shape, seed=1), unit(8, 5, seed=2), 3.0)
    queue = None
    if queries is None:
        old_images, old_texts = unit(4, 5, seed=3), unit(4, 5, seed=4)
    else:
        old_images, old_texts = unit(4, queries, 5, seed=3), unit(4, 5, seed=4)
    old_ids = torch.tensor([9, -100, 1, 77])
    if with_queue:
        queue = SimpleNamespace(image_embeds=old_images, text_embeds=old_texts, image_ids=old_ids)
    output = contrastive_loss(
        images, texts, scale, image_ids=ids, label_smoothing=label_smoothing, tile_size=tile_size, queue=queue
    )
    i2t, t2i = naive(
        images,
        texts,
        scale,
        ids,
        label_smoothing,
        old_images if with_queue else None,
        old_texts if with_queue else None,
        old_ids if ids is not None else None,
    )
    assert_close([output.loss_i2t, output.loss_t2i, output.loss], [i2t, t2i, (i2t + t2i) / 2])
    found, expected = (gradients(loss, images, texts, scale) for loss in (output.loss, (i2t + t2i) / 2))
    assert_close(found, expected)
    if tile_size is None:
        assert output.logits_per_image.shape == output.logits_per_text.shape == (8, 8)
    else:
        assert output.logits_per_image is None


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    queries=st.integers(0, 3),
    tile=st.integers(1, 12),
    scale=st.floats(-20, 100),
    seed=st.integers(0, 10_000),
)
def test_tiles_equal_the_dense_statistics(
    rows: int, columns: int, queries: int, tile: int, scale: float, seed: int
) -> None:
    shape = (rows, queries, 4) if queries else (rows, 4)
    images, texts, factor = leaves(unit(*shape, seed=seed), unit(columns, 4, seed=seed + 1), scale)
    generator = torch.Generator().manual_seed(seed)
    image_ids = torch.randint(4, (rows,), generator=generator)
    text_ids = torch.randint(4, (columns,), generator=generator)
    by_row, by_column = tiled_statistics(images, texts, factor, image_ids, text_ids, tile, totals=True)
    logits = images @ texts.t() if not queries else (images @ texts.t()).max(dim=1).values
    logits = logits * factor
    positives = image_ids[:, None] == text_ids
    dense = [
        statistic
        for axis in (1, 0)
        for statistic in (logits.logsumexp(axis), (logits * positives).sum(axis), logits.sum(axis))
    ]
    assert_close([*by_row, *by_column], dense, 1e-9)
    weights = [torch.randn(value.shape, generator=generator, dtype=torch.float64) for value in dense]
    ours = sum((a * b).sum() for a, b in zip([*by_row, *by_column], weights))
    expected = sum((a * b).sum() for a, b in zip(dense, weights))
    assert_close(gradients(ours, images, texts, factor), gradients(expected, images, texts, factor), 1e-8)


def test_tiles_neither_overflow_nor_compute_what_is_not_wanted() -> None:
    images = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    texts = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    ids = torch.arange(3)
    rows, columns = tiled_statistics(images, texts, torch.tensor(500.0), ids[:2], ids, 1, columns=False)
    assert columns is None
    assert rows.total is None
    assert rows.logsumexp.tolist() == [500.0, 500.0]
    with pytest.raises(ValueError, match="tile_size"):
        tiled_statistics(images, texts, torch.tensor(1.0), ids[:2], ids, 0)


@settings(max_examples=20, deadline=None)
@given(count=st.integers(2, 8), seed=st.integers(0, 10_000))
def test_the_order_of_the_pairs_does_not_matter(count: int, seed: int) -> None:
    images, texts = unit(count, 4, seed=seed), unit(count, 4, seed=seed + 1)
    ids = torch.randint(3, (count,), generator=torch.Generator().manual_seed(seed))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    one = contrastive_loss(images, texts, 4.0, image_ids=ids, label_smoothing=0.2)
    two = contrastive_loss(images[order], texts[order], 4.0, image_ids=ids[order], label_smoothing=0.2)
    swapped = contrastive_loss(texts, images, 4.0, image_ids=ids, label_smoothing=0.2)
    assert_close([one.loss, one.loss_i2t, one.loss_t2i], [two.loss, two.loss_i2t, two.loss_t2i])
    assert_close([one.loss_i2t, one.loss_t2i], [swapped.loss_t2i, swapped.loss_i2t])


def test_distinct_ids_are_no_ids() -> None:
    images, texts, ids = unit(6, 4), unit(6, 4, seed=1), torch.tensor([7, -3, 2**62, 0, 5, 1])
    plain = contrastive_loss(images, texts, 4.0, label_smoothing=0.1).loss
    for tile_size in (None, 2):
        loss = contrastive_loss(images, texts, 4.0, image_ids=ids, label_smoothing=0.1, tile_size=tile_size).loss
        assert_close([loss], [plain])


@pytest.mark.parametrize("tile_size", [None, 2])
def test_detached_keys_train_one_side_per_direction(tile_size: int | None) -> None:
    images, texts, scale = leaves(unit(5, 4), unit(5, 4, seed=1), 6.0)
    output = contrastive_loss(images, texts, scale, gather_keys="detached", tile_size=tile_size)
    plain = contrastive_loss(images, texts, scale)
    assert_close([output.loss_i2t, output.loss_t2i], [plain.loss_i2t, plain.loss_t2i])
    assert torch.autograd.grad(output.loss_i2t, texts, retain_graph=True, allow_unused=True)[0] is None
    assert torch.autograd.grad(output.loss_t2i, images, retain_graph=True, allow_unused=True)[0] is None
    one_sided = [
        gradients(contrastive_loss(images, texts.detach(), scale).loss_i2t / 2, images)[0],
        gradients(contrastive_loss(images.detach(), texts, scale).loss_t2i / 2, texts)[0],
        gradients(plain.loss, scale)[0],
    ]
    assert_close(gradients(output.loss, images, texts, scale), one_sided)


def test_soft_targets() -> None:
    images, texts, scale = leaves(unit(4, 3), unit(4, 3, seed=1), 2.0)
    to_texts = torch.rand(4, 4, dtype=torch.float64).softmax(1)
    to_images = torch.rand(4, 4, dtype=torch.float64).softmax(1)
    output = contrastive_loss(images, texts, scale, soft_targets=(to_texts, to_images), label_smoothing=0.1)
    logits = scale * images @ texts.t()
    smooth = [0.9 * targets + 0.1 / 4 for targets in (to_texts, to_images)]
    expected = [
        -(smooth[0] * logits.log_softmax(1)).sum(1).mean(),
        -(smooth[1] * logits.t().log_softmax(1)).sum(1).mean(),
    ]
    assert_close([output.loss_i2t, output.loss_t2i], expected)
    assert_close(gradients(output.loss, images, texts, scale), gradients(sum(expected) / 2, images, texts, scale))
    hard = contrastive_loss(images, texts, scale, soft_targets=torch.eye(4)).loss
    assert_close([hard], [contrastive_loss(images, texts, scale).loss])


@pytest.mark.parametrize("tile_size", [None, 2])
def test_keys_of_a_momentum_twin(tile_size: int | None) -> None:
    images, texts, scale = leaves(unit(4, 3), unit(4, 3, seed=1), 2.0)
    image_keys, text_keys = unit(4, 3, seed=2), unit(4, 3, seed=3)
    output = contrastive_loss(images, texts, scale, image_keys=image_keys, text_keys=text_keys, tile_size=tile_size)
    target = torch.arange(4)
    expected = [
        F.cross_entropy(scale * images @ text_keys.t(), target),
        F.cross_entropy(scale * texts @ image_keys.t(), target),
    ]
    assert_close([output.loss_i2t, output.loss_t2i], expected)
    assert_close(gradients(output.loss, images, texts, scale), gradients(sum(expected) / 2, images, texts, scale))


def test_half_precision_and_autocast_do_not_reach_the_loss() -> None:
    images, texts = unit(6, 8).float(), unit(6, 8, seed=1).float()
    plain = contrastive_loss(images, texts, 50.0).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for tile_size in (None, 4):
            assert torch.allclose(contrastive_loss(images, texts, 50.0, tile_size=tile_size).loss, plain)
    half = contrastive_loss(images.bfloat16(), texts.bfloat16(), torch.tensor(50.0, dtype=torch.bfloat16))
    assert half.loss.dtype == half.logits_per_image.dtype == torch.float32
    exact = contrastive_loss(images.bfloat16().float(), texts.bfloat16().float(), 50.0)
    assert torch.equal(half.loss, exact.loss)


def test_the_query_form_takes_the_nearest_query() -> None:
    feats, texts = unit(4, 3, 5), unit(4, 5, seed=1)
    output = query_contrastive_loss(feats, texts, 2.0)
    nearest = torch.einsum("iqd,td->iqt", feats, texts).amax(1) * 2
    assert_close([output.logits_per_image, output.logits_per_text], [nearest, nearest.t()])
    single = query_contrastive_loss(feats[:, :1], texts, 2.0)
    assert_close([single.loss], [contrastive_loss(feats[:, 0], texts, 2.0).loss])
    with pytest.raises(ValueError, match="queries"):
        query_contrastive_loss(texts, texts, 2.0)


@pytest.mark.parametrize("tile_size", [None, 2])
def test_an_empty_batch_raises(tile_size: int | None) -> None:
    with pytest.raises(ValueError, match="empty on all ranks"):
        contrastive_loss(torch.ones(0, 4), torch.ones(0, 4), 1.0, tile_size=tile_size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_embeds": torch.zeros(3, 4)}, "same batch"),
        ({"text_embeds": torch.zeros(4, 5)}, "one width"),
        ({"image_ids": torch.arange(3)}, "image_ids"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"gather_keys": "some"}, "gather_keys"),
        ({"rows": "some"}, "rows"),
        ({"rows": "all", "gather_keys": "detached"}, "rows"),
        ({"soft_targets": torch.eye(3)}, r"soft_targets.*\(4, 4\)"),
        ({"soft_targets": torch.eye(4), "tile_size": 2}, "soft_targets"),
        ({"soft_targets": torch.eye(4), "image_ids": torch.arange(4)}, "soft_targets"),
        ({"image_keys": torch.zeros(4, 3)}, "image_keys"),
        ({"tile_size": 0}, "tile_size"),
        (
            {
                "image_ids": torch.arange(4),
                "queue": SimpleNamespace(image_embeds=torch.ones(1, 4), text_embeds=torch.ones(1, 4), image_ids=None),
            },
            "queue keeps none",
        ),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {"image_embeds": torch.ones(4, 4), "text_embeds": torch.ones(4, 4), "logit_scale": 1.0, **change}
    with pytest.raises(ValueError, match=message):
        contrastive_loss(**arguments)


# Each option once; what is exact on N ranks must equal one process.
OLD = {"image_embeds": unit(3, 5, seed=8), "text_embeds": unit(3, 5, seed=9), "image_ids": torch.tensor([9, 50, 1])}
EXACT: dict[str, dict[str, Any]] = {
    "plain": {},
    "rows_all": {"rows": "all"},
    "ids": {"image_ids": IDS, "label_smoothing": 0.1},
    "tiles": {"tile_size": 3},
    "tiles_ids": {"tile_size": 2, "image_ids": IDS, "label_smoothing": 0.1},
    "tiles_rows_all": {"tile_size": 3, "rows": "all", "image_ids": IDS},
    "detached": {"gather_keys": "detached", "label_smoothing": 0.1},
    "detached_tiles": {"gather_keys": "detached", "tile_size": 3, "image_ids": IDS},
    "queue": {"queue": SimpleNamespace(**OLD), "image_ids": IDS, "label_smoothing": 0.1},
    "queue_tiles": {"queue": SimpleNamespace(**OLD), "tile_size": 3, "image_ids": IDS, "label_smoothing": 0.1},
    "soft": {"soft_targets": (torch.eye(8).roll(1, 0), torch.full((8, 8), 1 / 8))},
    "momentum": {"image_keys": unit(8, 5, seed=10), "text_keys": unit(8, 5, seed=11)},
    "momentum_tiles": {"image_keys": unit(8, 5, seed=10), "text_keys": unit(8, 5, seed=11), "tile_size": 3},
}
PER_ROW = ("image_ids", "image_keys", "text_keys", "soft_targets")


def on_this_rank(sizes: list[int], queries: bool) -> dict[str, dict[str, Any]]:
    own = slice(offset_of(sizes), offset_of(sizes) + sizes[world()[0]])
    results = {}
    for name, options in EXACT.items():
        if queries and ("queue" in name or "momentum" in name):
            continue
        options = dict(options)
        for key in PER_ROW:
            if key in options:
                value = options[key]
                options[key] = tuple(v[own] for v in value) if isinstance(value, tuple) else value[own]
        images = unit(8, 3, 5, seed=1) if queries else unit(8, 5, seed=1)
        images, texts, scale = leaves(images[own], unit(8, 5, seed=2)[own], 7.0)
        output = contrastive_loss(images, texts, scale, **options)
        output.loss.backward()
        results[name] = summary(output, images, texts, scale)
    return results


def summary(output: ContrastiveOutput, images: Tensor, texts: Tensor, scale: Tensor) -> dict[str, Any]:
    return {
        "losses": torch.stack([output.loss, output.loss_i2t, output.loss_t2i]).detach(),
        "images": images.grad,
        "texts": texts.grad,
        "scale": scale.grad,
        "per_image": None if output.logits_per_image is None else output.logits_per_image.detach(),
        "per_text": None if output.logits_per_text is None else output.logits_per_text.detach(),
        "offset": output.offset,
    }


@pytest.mark.parametrize(
    ("sizes", "queries"), [([4, 4], False), ([3, 0, 5], False), ([3, 0, 5], True), ([6, 2], True)]
)
def test_ranks_equal_one_process(sizes: list[int], queries: bool) -> None:
    ranks = run_ranks(on_this_rank, len(sizes), sizes, queries)
    single = on_this_rank([8], queries)
    for name, expected in single.items():
        found = [rank[name] for rank in ranks]
        size = len(sizes)
        assert_close([sum(f["losses"] for f in found) / size], [expected["losses"]])
        assert_close([sum(f["scale"] for f in found) / size], [expected["scale"]])
        for side in ("images", "texts"):
            assert_close([torch.cat([f[side] for f in found]) / size], [expected[side]])
        for logits in ("per_image", "per_text"):
            if expected[logits] is None:
                assert all(f[logits] is None for f in found)
            else:
                assert_close([torch.cat([f[logits] for f in found])], [expected[logits]])
        assert [f["offset"] for f in found] == [sum(sizes[:rank]) for rank in range(size)]


def local_only(sizes: list[int]) -> dict[str, Any]:
    own = slice(offset_of(sizes), offset_of(sizes) + sizes[world()[0]])
    images, texts, scale = leaves(unit(8, 5, seed=1)[own], unit(8, 5, seed=2)[own], 7.0)
    output = contrastive_loss(images, texts, scale, gather_keys="local", image_ids=IDS[own])
    output.loss.backward()
    return summary(output, images, texts, scale)


def test_local_negatives_weigh_each_rank_by_its_rows() -> None:
    sizes = [5, 3]
    ranks = run_ranks(local_only, 2, sizes)
    images, texts, scale = leaves(unit(8, 5, seed=1), unit(8, 5, seed=2), 7.0)
    parts = [slice(0, 5), slice(5, 8)]
    loss = sum(
        contrastive_loss(images[p], texts[p], scale, image_ids=IDS[p]).loss * rows / 8 for p, rows in zip(parts, sizes)
    )
    expected = gradients(loss, images, texts, scale)
    assert_close([sum(rank["losses"][0] for rank in ranks) / 2], [loss])
    assert_close([torch.cat([rank["images"] for rank in ranks]) / 2], expected[:1])
    assert_close([torch.cat([rank["texts"] for rank in ranks]) / 2], expected[1:2])
    assert_close([sum(rank["scale"] for rank in ranks) / 2], expected[2:])
    assert all(rank["per_image"].shape == (rows, rows) for rank, rows in zip(ranks, sizes))
