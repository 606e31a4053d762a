"""Parameter groups: what decays, and which part learns at which rate."""

import torch
from torch import nn

# Dtypes in which an optimizer step of a usual size is lost to rounding.
_COARSE = (torch.float16, torch.bfloat16)


def parse_rates(entries: list[str] | None) -> dict[str, float]:
    """`["qformer=1e-4", "language_projection=5e-5"]` -> `{"qformer": 1e-4, ...}`.

    Raises:
        ValueError: an entry is not `path=rate`, or its rate is not a number above zero.
    """
    rates = {}
    for entry in entries or []:
        path, separator, text = entry.partition("=")
        try:
            rate = float(text)
        except ValueError:
            rate = -1.0
        if not separator or not path or rate <= 0:
            raise ValueError(f"--part_learning_rates takes PATH=RATE with a rate above 0, not {entry!r}")
        rates[path] = rate
    return rates


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: not to gains, biases and temperatures, i.e. anything with fewer than two axes.

    CLIP (2103.00020, section 2.5) decays "all weights that are not gains or biases"; BLIP-2's code does the same.
    """
    return parameter.ndim >= 2 and not name.endswith("bias")


def parameter_groups(
    model: nn.Module, *, learning_rate: float, weight_decay: float, rates: dict[str, float] | None = None
) -> list[dict]:
    """Optimizer groups over the trainable parameters.

    Args:
        model: the model; frozen parameters are left out.
        learning_rate: for everything that `rates` does not name.
        weight_decay: for the parameters that decay.
        rates: path of a module or parameter -> its own rate; the longest path that covers a parameter decides.

    Returns:
        Groups with `params`, `lr`, `weight_decay`, `part`; the base rate's come first, empty ones are left out.

    Raises:
        ValueError: nothing trains, or a path of `rates` covers no trainable parameter.
    """
    rates = rates or {}
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError(f"nothing in {type(model).__name__} trains: every parameter is frozen; check --stage")
    parts: dict[str, dict[bool, list[nn.Parameter]]] = {path: {True: [], False: []} for path in ["", *rates]}
    for name, parameter in trainable.items():
        covering = [path for path in rates if name == path or name.startswith(f"{path}.")]
        parts[max(covering, key=len, default="")][decays(name, parameter)].append(parameter)
    for path in rates:
        if not any(name == path or name.startswith(f"{path}.") for name in trainable):
            tops = sorted({name.split(".")[0] for name in trainable})
            raise ValueError(f"--part_learning_rates names {path!r}, under which nothing trains; what trains: {tops}")
    return [
        {
            "params": parameters,
            "lr": rates.get(path, learning_rate),
            "weight_decay": weight_decay if decayed else 0.0,
            "part": path or "base",
        }
        for path, by_decay in parts.items()
        for decayed, parameters in by_decay.items()
        if parameters
    ]


def check_master_weights(model: nn.Module) -> None:
    """Refuses to train weights that are stored in 16 bits.

    An update is about a thousandth of a weight, below the resolution of bfloat16 and near that of float16, whose range
    also overflows: such a run stalls or diverges without an error. Mixed precision keeps 32-bit weights and computes
    in 16 bits. Frozen weights may have any type.

    Raises:
        ValueError: a trainable parameter is float16 or bfloat16; the message names it.
    """
    coarse = {
        name: parameter.dtype
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.dtype in _COARSE
    }
    if coarse:
        name, dtype = next(iter(coarse.items()))
        raise ValueError(
            f"{len(coarse)} trainable parameters are stored in 16 bits, e.g. {name!r} as {dtype}; training needs "
            "float32 weights: load the model with dtype=torch.float32; --bf16 or --fp16 then compute in 16 bits"
        )
