"""What the objectives exchange between processes, with exact gradients.

Every function works without a process group, on one process, and on ranks whose local batches differ in size or are
empty. The convention of the package: on N ranks each rank returns a value whose mean over ranks is the one-process
value of the joined batch, and whose gradients, averaged over ranks as `DistributedDataParallel` does, are the
one-process gradients. A sum over all rows divided by their number is therefore returned by each rank as
`N * own sum / number of rows of all ranks` (`global_mean`), and the backward of an exchange sums over ranks.

A call on one rank needs the same call on all others, backward included: the loss of each rank has to depend on what
it has gathered, which holds for every objective here also when the rank has no row.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def world() -> tuple[int, int]:
    """Rank of this process and number of processes; `(0, 1)` without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def exchange_integers(values: Sequence[int], device: torch.device | str) -> list[list[int]]:
    """The integers of every rank, in rank order: one row a rank. Each rank must give equally many."""
    _, size = world()
    own = torch.tensor([list(values)], dtype=torch.int64, device=device)
    if size == 1:
        return own.tolist()
    everyone = own.new_empty(size, own.shape[1])
    _all_gather(everyone, own)
    return everyone.tolist()


def batch_sizes(rows: int, device: torch.device | str) -> list[int]:
    """Number of rows on every rank, in rank order."""
    return [values[0] for values in exchange_integers([rows], device)]


def offset_of(sizes: Sequence[int], rank: int | None = None) -> int:
    """Index of a rank's first row in the joined batch (own rank when `rank` is None)."""
    return sum(sizes[: world()[0] if rank is None else rank])


def gather(x: Tensor, *, with_grad: bool = True) -> Tensor:
    """Concatenates the rows of all ranks, in rank order.

    Args:
        x: `(B, ...)`; B may differ between ranks and may be 0, the other dimensions and the dtype may not.
        with_grad: whether gradients flow back to the rows of every rank. The backward sums over ranks the gradients
            that each has for the rows of this one, so it is exact, not the constant of `torch.distributed.all_gather`.

    Returns:
        `(sum of B over ranks, ...)`, the same on all ranks. Without a process group: `x` itself, detached if
        `with_grad` is False.

    Raises:
        ValueError: the ranks disagree on dtype or on the shape of a row. All ranks raise.
    """
    return gather_with_sizes(x, with_grad=with_grad)[0]


def gather_with_sizes(x: Tensor, *, with_grad: bool = True) -> tuple[Tensor, list[int]]:
    """`gather`, and how many rows each rank gave."""
    _, size = world()
    if not with_grad:
        x = x.detach()
    if size == 1:
        return x, [x.shape[0]]
    wants_grad = x.requires_grad and torch.is_grad_enabled()
    own = [x.shape[0], int(wants_grad), x.dim(), _row_elements(x), _DTYPE_CODES[x.dtype]]
    everyone = exchange_integers(own, x.device)
    if any(row[2:] != everyone[0][2:] for row in everyone):
        found = [
            f"rank {r} has {row[2]} dimensions, {row[3]} elements a row, {_DTYPES[row[4]]}"
            for r, row in enumerate(everyone)
        ]
        raise ValueError(f"`x` must have rows of one shape and dtype on all ranks, but {'; '.join(found)}")
    sizes = [row[0] for row in everyone]
    if not any(row[1] for row in everyone):
        return _gather_rows(x.detach(), sizes), sizes
    if not wants_grad:
        # Some other rank will wait for this one in the backward.
        x = x.detach().requires_grad_()
    return _Gather.apply(x, sizes), sizes


def global_mean(local_sum: Tensor, local_count: int | Tensor) -> Tensor:
    """Mean over the rows (or tokens) of all ranks, in the form that DDP's averaging needs.

    Args:
        local_sum: sum over this rank's rows, any shape.
        local_count: how many rows that is; may be 0.

    Returns:
        `N * local_sum / sum of local_count over ranks`: its mean over ranks is the mean over all rows, and so for the
        gradient. Zero when no rank has a row.
    """
    _, size = world()
    if size == 1:
        total = local_count
        return local_sum / (total.clamp(min=1) if isinstance(total, Tensor) else max(total, 1))
    total = torch.as_tensor(local_count, device=local_sum.device).detach().clone().to(torch.int64)
    dist.all_reduce(total)
    return local_sum * size / total.clamp(min=1).to(local_sum.dtype)


def transpose_shards(x: Tensor, row_sizes: Sequence[int], column_sizes: Sequence[int]) -> Tensor:
    """From a matrix whose rows are spread over the ranks to its transpose, whose rows are spread over the ranks.

    Lets each rank compute only its own rows of a similarity matrix and still hold the columns of its own texts, for
    `B * G` numbers on the wire instead of the features of all images. Differentiable, exactly.

    Args:
        x: `(row_sizes[rank], sum(column_sizes))`.
        row_sizes: rows of the matrix on every rank.
        column_sizes: columns that will lie on every rank.

    Returns:
        `(column_sizes[rank], sum(row_sizes))`.
    """
    if world()[1] == 1:
        return x.t()
    return _TransposeShards.apply(x, list(row_sizes), list(column_sizes))


# torch 2.13 renames the two collectives and warns about the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
_DTYPE_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}


def _row_elements(x: Tensor) -> int:
    elements = 1
    for length in x.shape[1:]:
        elements *= length
    return elements


def _gather_rows(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """`all_gather` of uneven rows: padded to the longest, sent as bytes so that every dtype passes every backend."""
    longest, total = max(sizes), sum(sizes)
    width = _row_elements(x)
    if total == 0 or width == 0:
        return x.new_empty(total, *x.shape[1:])
    padded = x.new_zeros(longest, width)
    padded[: x.shape[0]] = x.reshape(x.shape[0], width)
    everyone = x.new_empty(len(sizes) * longest, width)
    _all_gather(everyone.view(torch.uint8), padded.view(torch.uint8))
    if min(sizes) == longest:
        return everyone.view(total, *x.shape[1:])
    kept = [everyone[r * longest : r * longest + rows] for r, rows in enumerate(sizes)]
    return torch.cat(kept).view(total, *x.shape[1:])


def _sum_own_rows(grad: Tensor, sizes: Sequence[int]) -> Tensor:
    """Sum over ranks of the gradients for the rows that this rank gave: a reduce-scatter of uneven rows."""
    rank, size = world()
    longest, width = max(sizes), _row_elements(grad)
    if grad.numel() == 0:
        return grad.new_zeros(sizes[rank], *grad.shape[1:])
    wire = torch.float64 if grad.dtype == torch.float64 else torch.float32
    padded = grad.new_zeros(size, longest, width, dtype=wire)
    for r, (rows, end) in enumerate(zip(sizes, accumulate(sizes))):
        padded[r, :rows] = grad[end - rows : end].reshape(rows, width)
    own = padded.new_empty(longest, width)
    _reduce_scatter(own, padded.view(size * longest, width))
    return own[: sizes[rank]].to(grad.dtype).view(sizes[rank], *grad.shape[1:])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        return _gather_rows(x.detach(), sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return _sum_own_rows(grad, ctx.sizes), None


class _TransposeShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, row_sizes: list[int], column_sizes: list[int]) -> Tensor:
        ctx.sizes = row_sizes, column_sizes
        return _exchange_blocks(x, row_sizes, column_sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        row_sizes, column_sizes = ctx.sizes
        return _exchange_blocks(grad, column_sizes, row_sizes), None, None


def _exchange_blocks(x: Tensor, row_sizes: Sequence[int], column_sizes: Sequence[int]) -> Tensor:
    rank, _ = world()
    rows, columns = row_sizes[rank], column_sizes[rank]
    # The transposed matrix is cut along its rows, so that what goes to each rank lies in one piece.
    sent = x.detach().t().contiguous().view(-1)
    received = sent.new_empty(columns * sum(row_sizes))
    dist.all_to_all_single(
        received,
        sent,
        output_split_sizes=[columns * other for other in row_sizes],
        input_split_sizes=[rows * other for other in column_sizes],
    )
    blocks = received.split([columns * other for other in row_sizes])
    return torch.cat([block.view(columns, other) for block, other in zip(blocks, row_sizes)], dim=1)
