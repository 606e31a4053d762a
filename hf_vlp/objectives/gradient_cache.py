"""Gradient caching (GradCache, arXiv 2101.06983, section 3): the exact gradient of a contrastive loss over a large
batch in the activation memory of a small one.

1. All chunks of the batch are embedded without a graph. 2. The loss is taken on all embeddings, and its gradient with
respect to them. 3. Each chunk is embedded again, now with a graph, and the gradient of its embeddings sent through.
The price is a second forward of the towers.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from .distributed import exchange_integers, world

Batch = Mapping[str, Any]
Through = Callable[[Callable[[Batch], Any], Batch], Any]


def cached_backward(
    embed: Callable[[Batch], Sequence[Tensor]],
    objective: Callable[..., Any],
    batch: Batch | Sequence[Batch],
    chunk_size: int | None = None,
    *,
    backward: Callable[[Tensor], None] | None = None,
    no_sync: Callable[[], AbstractContextManager[None]] | None = None,
    through: Through | None = None,
) -> Any:
    """Accumulates in `.grad` what `objective(*embed(batch)).loss.backward()` would, holding the activations of one
    chunk at a time.

    Exact in value and gradient, also for parameters that only the objective uses (the temperature), on several ranks
    (the objective is called once, on all embeddings of this rank), and with dropout: each chunk draws the same random
    numbers in its two passes, and afterwards the generators stand where one pass would have left them. Call it inside
    the autocast context of the step, if there is one. Not exact for layers that take statistics over the batch
    (batch normalisation in training mode), as they see a chunk; random draws of `embed` must come from torch's
    default generators.

    Args:
        embed: the towers: from (a chunk of) the batch to tensors with one row a pair. It treats each row for itself.
        objective: from the embeddings of the whole local batch to a scalar, or to something with a `loss`.
        batch: tensors with one row a pair; anything else in it goes to every chunk as it is. Or the chunks themselves.
        chunk_size: rows embedded at a time. On several ranks all get as many chunks as the one with the most rows
            needs, as evenly filled as can be.
        backward: what to call instead of `Tensor.backward`, once a chunk: a loss scaler's, or `accelerator.backward`.
            It may scale its argument.
        no_sync: the context in which the wrapper leaves gradients unreduced (`DistributedDataParallel.no_sync`); used
            for all but the last chunk, which then reduces what all have accumulated.
        through: calls a function of a chunk within the wrapper's forward; see `inside_forward`.

    Returns:
        What `objective` returned, detached.

    Raises:
        ValueError: rows that don't fit together, chunk sizes below 1, chunk counts that differ between ranks, or a
            loss without gradient.
    """
    chunks = _chunks(batch, chunk_size)
    no_sync = no_sync or nullcontext
    through = through or _call
    backward = backward or torch.Tensor.backward
    devices = [value for chunk in chunks for value in chunk.values() if isinstance(value, Tensor)]

    states, parts = [], []
    with torch.no_grad(), no_sync():
        for chunk in chunks:
            states.append(_RandomState(devices))
            parts.append(tuple(through(embed, chunk)))
    # Weights that autocast has converted without a graph must not serve the passes with one (torch 2.13 sees to it
    # itself, older versions did not).
    torch.clear_autocast_cache()

    embeds = [_leaf(torch.cat(column)) for column in zip(*parts)]
    found: dict[str, Any] = {}

    def take_gradients(_: Batch) -> None:
        with torch.enable_grad():
            output = objective(*embeds)
            loss = _loss_of(output)
            leaves = _leaves(loss)
            grads = torch.autograd.grad(loss, leaves)
        by_leaf = {id(leaf): grad for leaf, grad in zip(leaves, grads)}
        own = {id(embed) for embed in embeds}
        found["output"] = _detached(output)
        found["grads"] = [by_leaf.get(id(embed)) for embed in embeds]
        found["direct"] = [(leaf, grad) for leaf, grad in zip(leaves, grads) if id(leaf) not in own]

    with no_sync():
        through(take_gradients, chunks[-1])
    torch.clear_autocast_cache()
    after = _RandomState(devices)

    start, trained = 0, False
    for index, chunk in enumerate(chunks):
        rows = slice(start, start + len(parts[index][0]))
        start = rows.stop
        last = index + 1 == len(chunks)

        def surrogate(chunk: Batch, rows: slice = rows, last: bool = last) -> Tensor | None:
            """Linear in the embeddings (and the objective's own parameters), with the gradients found as weights."""
            terms = [
                (value.to(grad.dtype) * grad[rows]).sum()
                for value, grad in zip(embed(chunk), found["grads"])
                if grad is not None and value.requires_grad
            ]
            if last:
                terms += [(leaf * grad).sum() for leaf, grad in found["direct"]]
            return torch.stack([term.float() for term in terms]).sum() if terms else None

        with nullcontext() if last else no_sync():
            states[index].restore()
            value = through(surrogate, chunk)
            if value is not None:
                backward(value)
                trained = True
    after.restore()
    if not trained:
        raise ValueError("the objective's loss has no gradient: nothing that it depends on is trainable")
    return found["output"]


def cached_step(
    model: nn.Module,
    batch: Batch,
    chunk_size: int,
    *,
    backward: Callable[[Tensor], None] | None = None,
) -> Any:
    """`cached_backward` for a pretraining model with the methods `embed(**batch)` and `objective(*embeds, **extras)`,
    bare or wrapped in `DistributedDataParallel` or FSDP.

    Args:
        model: the model or its wrapper.
        batch: keyword arguments of `embed`; those that `objective` takes as well go to it whole.
        chunk_size: rows embedded at a time.
        backward: as of `cached_backward`.

    Raises:
        ValueError: the model has batch normalisation in training mode, whose statistics would be those of a chunk.
    """
    inner = model
    while isinstance(getattr(inner, "module", None), nn.Module):
        inner = inner.module
    for name, layer in inner.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training:
            raise ValueError(
                f"`{name}` normalises over the batch, so gradient caching in chunks of {chunk_size} would train "
                "another model; train without caching, or put these layers in eval mode"
            )
    accepted = inspect.signature(inner.objective).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    extras = {key: value for key, value in batch.items() if takes_all or key in accepted}
    return cached_backward(
        lambda chunk: inner.embed(**chunk),
        lambda *embeds: inner.objective(*embeds, **extras),
        batch,
        chunk_size,
        backward=backward,
        no_sync=_no_sync(model),
        through=inside_forward(model, inner),
    )


def inside_forward(wrapper: nn.Module, module: nn.Module) -> Through:
    """Lets a wrapper treat any function as the forward of the module that it wraps.

    DDP prepares its gradient reduction, and FSDP gathers its weights, around the wrapped module's `forward` only; this
    puts the function in the place of `forward` for the duration of one call.

    Args:
        wrapper: what is called.
        module: whose `forward` it calls; `wrapper` itself where the wrapping works by hooks.
    """

    def run(function: Callable[[Batch], Any], chunk: Batch) -> Any:
        replaced = module.__dict__.get("forward")
        module.forward = function
        try:
            return wrapper(chunk)
        finally:
            if replaced is None:
                del module.forward
            else:
                module.forward = replaced

    return run


def _no_sync(model: nn.Module) -> Callable[[], AbstractContextManager[None]] | None:
    if hasattr(model, "no_sync"):
        return model.no_sync
    if not hasattr(model, "set_requires_gradient_sync"):
        return None

    @contextmanager
    def without_reduction() -> Iterator[None]:
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    return without_reduction


def _call(function: Callable[[Batch], Any], chunk: Batch) -> Any:
    return function(chunk)


def _chunks(batch: Batch | Sequence[Batch], chunk_size: int | None) -> list[Batch]:
    if not isinstance(batch, Mapping):
        chunks = list(batch)
        tensors = [value for chunk in chunks for value in chunk.values() if isinstance(value, Tensor)]
        counts = [row[0] for row in exchange_integers([len(chunks)], tensors[0].device if tensors else "cpu")]
        if min(counts) != max(counts) or not chunks:
            raise ValueError(f"every rank must be given as many chunks, and at least one; got {counts}")
        return chunks
    if chunk_size is None or chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}")
    split = {key: value for key, value in batch.items() if isinstance(value, Tensor) and value.dim() > 0}
    lengths = {key: len(value) for key, value in split.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"the tensors of `batch` must have one row a pair, got rows {lengths}")
    rows = next(iter(lengths.values()))
    device = next(iter(split.values())).device
    most = max(counts[0] for counts in exchange_integers([rows], device)) if world()[1] > 1 else rows
    count = max(-(-most // chunk_size), 1)
    edges = [rows * index // count for index in range(count + 1)]
    return [
        {**batch, **{key: value[start:stop] for key, value in split.items()}} for start, stop in zip(edges, edges[1:])
    ]


class _RandomState:
    """State of torch's default generators: the CPU's and those of the devices of the given tensors."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.cpu = torch.get_rng_state()
        self.devices, self.device_states = get_device_states(*tensors)
        kinds = {tensor.device.type for tensor in tensors} - {"cpu", "meta"}
        self.kind = kinds.pop() if kinds else None

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.kind is not None:
            set_device_states(self.devices, self.device_states, device_type=self.kind)


def _leaf(x: Tensor) -> Tensor:
    """A start of a new graph. Under autocast in float32, so that the stored gradient loses nothing to rounding."""
    if not x.is_floating_point():
        return x
    if torch.is_autocast_enabled(x.device.type) and x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    return x.detach().requires_grad_()


def _leaves(loss: Tensor) -> list[Tensor]:
    """The tensors at the ends of the graph of `loss` that would get a `.grad`, in the order of a walk through it."""
    found, seen, stack = [], set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        stack.extend(following for following, _ in node.next_functions)
    return found


def _loss_of(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(f"`objective` must return a scalar or something with a `loss`, got {type(output).__name__}")
    return loss


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return type(value)(**{key: _detached(item) for key, item in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_detached, value))
    if isinstance(value, list | tuple):
        return type(value)(map(_detached, value))
    return value
