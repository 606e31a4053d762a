"""Exchanges between ranks, and the runner of ranks that all such tests use."""

import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hf_vlp.objectives.distributed import (
    batch_sizes,
    exchange_integers,
    gather,
    global_mean,
    offset_of,
    transpose_shards,
    world,
)
from tests.distributed import run_ranks

SIZES = [2, 0, 3]


def own_rows(x: Tensor) -> Tensor:
    rank, _ = world()
    return x[offset_of(SIZES) : offset_of(SIZES) + SIZES[rank]].clone()


def exchange_everything(features: Tensor, matrix: Tensor) -> dict[str, object]:
    rank, size = world()
    x = own_rows(features).requires_grad_()
    everyone = gather(x)
    # Every rank weighs the rows in its own way, so the backward must add up what the ranks want.
    (everyone * (rank + 1) * torch.arange(5.0)[:, None, None]).sum().backward()

    rows = own_rows(matrix).requires_grad_()
    columns = transpose_shards(rows, SIZES, [1, 2, 1])
    (columns * (rank + 1)).sum().backward()

    # Only rank 2 has something to train; the others must take part in its backward all the same.
    partly = own_rows(features).requires_grad_(rank == 2)
    gather(partly).square().sum().backward()

    weight = torch.ones((), requires_grad=True)
    mean = global_mean((own_rows(features) * weight).sum(), SIZES[rank])
    mean.backward()

    mismatch = []
    for bad in (torch.zeros(1, 2 + rank), torch.zeros(1, 2, dtype=torch.int64 if rank else torch.float32)):
        try:
            gather(bad)
        except ValueError as error:
            mismatch.append(str(error))
    return {
        "gathered": everyone.detach(),
        "grad": x.grad,
        "columns": columns.detach(),
        "rows_grad": rows.grad,
        "partly_grad": partly.grad,
        "mean": mean.detach(),
        "mean_grad": weight.grad,
        "empty_mean": global_mean(torch.zeros(()), 0),
        "dtypes": {d: gather(own_rows(features).to(d)) for d in (torch.bool, torch.int64, torch.bfloat16, torch.half)},
        "constant": gather(own_rows(features).requires_grad_(), with_grad=False).requires_grad,
        "without_grad_mode": _gathered_without_grad(features),
        "sizes": batch_sizes(SIZES[rank], "cpu"),
        "integers": exchange_integers([rank, 7], "cpu"),
        "mismatch": mismatch,
    }


def _gathered_without_grad(features: Tensor) -> bool:
    with torch.no_grad():
        return gather(own_rows(features).requires_grad_()).requires_grad


def test_exchanges_of_uneven_and_empty_batches() -> None:
    torch.manual_seed(0)
    features, matrix = torch.randn(5, 2, 3), torch.randn(5, 4)
    ranks = run_ranks(exchange_everything, 3, features, matrix)
    column_edges = [0, 1, 3, 4]
    weights = torch.cat([torch.full((width,), rank + 1.0) for rank, width in enumerate([1, 2, 1])])
    for rank, found in enumerate(ranks):
        start, stop = sum(SIZES[:rank]), sum(SIZES[: rank + 1])
        assert torch.equal(found["gathered"], features)
        expected = 6.0 * torch.arange(5.0)[start:stop, None, None].expand(stop - start, 2, 3)
        assert torch.equal(found["grad"], expected)
        assert torch.equal(found["columns"], matrix[:, column_edges[rank] : column_edges[rank + 1]].t())
        assert torch.equal(found["rows_grad"], weights.expand(stop - start, 4))
        if rank == 2:
            assert torch.allclose(found["partly_grad"], 2 * 3 * features[start:stop])
        else:
            assert found["partly_grad"] is None
        assert found["empty_mean"] == 0
        for dtype, gathered in found["dtypes"].items():
            assert torch.equal(gathered, features.to(dtype))
        assert found["constant"] is False
        assert found["without_grad_mode"] is False
        assert found["sizes"] == SIZES
        assert found["integers"] == [[0, 7], [1, 7], [2, 7]]
        assert len(found["mismatch"]) == 2
        assert "rank 1 has 2 dimensions, 3 elements a row" in found["mismatch"][0]
        assert "torch.int64" in found["mismatch"][1]
    mean = features.sum() / 5
    assert torch.allclose(sum(found["mean"] for found in ranks) / 3, mean)
    assert torch.allclose(sum(found["mean_grad"] for found in ranks) / 3, mean)


def test_without_a_process_group() -> None:
    assert world() == (0, 1)
    x = torch.randn(3, 2, requires_grad=True)
    assert gather(x) is x
    assert not gather(x, with_grad=False).requires_grad
    assert torch.equal(transpose_shards(x, [3], [2]), x.t())
    assert batch_sizes(3, "cpu") == [3]
    assert exchange_integers([4, 5], "cpu") == [[4, 5]]
    assert global_mean(torch.tensor(6.0), 3) == 2
    assert global_mean(torch.tensor(6.0), torch.tensor(3)) == 2
    assert global_mean(torch.tensor(0.0), 0) == 0


def rank_and_argument(value: Tensor) -> tuple[int, Tensor]:
    return dist.get_rank(), value + dist.get_rank()


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise KeyError("rank one has its reasons")
    dist.barrier()


def die_on_rank_1() -> None:
    if dist.get_rank() == 1:
        import os

        os._exit(3)
    dist.barrier()


def sleep_on_rank_0() -> None:
    if dist.get_rank() == 0:
        time.sleep(60)


def test_results_come_in_rank_order() -> None:
    results = run_ranks(rank_and_argument, 3, torch.tensor([1.5]))
    assert [rank for rank, _ in results] == [0, 1, 2]
    assert [value.item() for _, value in results] == [1.5, 2.5, 3.5]


def test_a_failing_rank_fails_the_run_with_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2 failed.*rank one has its reasons"):
        run_ranks(fail_on_rank_1, 2)


@pytest.mark.slow
def test_a_dying_or_hanging_rank_fails_the_run() -> None:
    with pytest.raises(RuntimeError, match="rank [01] of 2 (died|failed)"):
        run_ranks(die_on_rank_1, 2)
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"ranks \[0.* gave no result"):
        run_ranks(sleep_on_rank_0, 2, timeout=3.0)
    assert time.monotonic() - started < 30
