"""Freezing as data: a stage is a table `path -> trainable?`, applied, checked and printed in one place.

The tables belong to the models (`model.stages`, see `hf_vlp.models.pretraining.PreTrainingMixin`), because each paper
says which of its parts learn in which stage. Here they are put into effect.
"""

import difflib
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

logger = logging.getLogger(__name__)

# What AdamW keeps for a trainable parameter: two moments in fp32, and a gradient in fp32 while a step runs.
OPTIMIZER_BYTES = 8
GRADIENT_BYTES = 4
_STAGE_ATTRIBUTE = "_hf_vlp_stage"


@dataclass(frozen=True)
class StageRow:
    """One entry of a stage's table and what it covers.

    Attributes:
        path: module or parameter path, `""` for what no longer path names.
        trainable: whether its parameters learn.
        parameters: number of scalars.
        bytes: memory of the weights as they are stored now.
    """

    path: str
    trainable: bool
    parameters: int
    bytes: int


@dataclass(frozen=True)
class StageReport:
    """What trains and what it costs; `str(report)` is the table that is printed.

    Attributes:
        stage: name of the stage.
        rows: one per path of the table, in the order of the model.
    """

    stage: str
    rows: tuple[StageRow, ...]

    @property
    def trainable_parameters(self) -> int:
        return sum(row.parameters for row in self.rows if row.trainable)

    @property
    def frozen_parameters(self) -> int:
        return sum(row.parameters for row in self.rows if not row.trainable)

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of AdamW's two fp32 moments."""
        return OPTIMIZER_BYTES * self.trainable_parameters

    def __str__(self) -> str:
        width = max([len(row.path) for row in self.rows] + [len("(everything else)")])
        lines = [f"stage {self.stage!r}", f"  {'part':<{width}}  {'trains':<6}  {'parameters':>14}  {'weights':>10}"]
        for row in self.rows:
            name = row.path or ("(everything else)" if len(self.rows) > 1 else "(everything)")
            lines.append(
                f"  {name:<{width}}  {'yes' if row.trainable else 'no':<6}  {row.parameters:>14,}  "
                f"{format_bytes(row.bytes):>10}"
            )
        trainable = sum(row.bytes for row in self.rows if row.trainable)
        frozen = sum(row.bytes for row in self.rows if not row.trainable)
        lines.append(
            f"  trainable {self.trainable_parameters:,} ({format_bytes(trainable)}), "
            f"frozen {self.frozen_parameters:,} ({format_bytes(frozen)}), "
            f"optimizer {format_bytes(self.optimizer_bytes)}, "
            f"gradients {format_bytes(GRADIENT_BYTES * self.trainable_parameters)}"
        )
        return "\n".join(lines)


def format_bytes(count: int) -> str:
    """`1536` -> `"1.5 KiB"`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def stage_table(model: nn.Module, stage: str) -> Mapping[str, bool]:
    """The table of `stage` in `model.stages`.

    Raises:
        ValueError: the model has no such stage; the message lists those that it has.
    """
    stages = getattr(model, "stages", None) or {}
    if stage not in stages:
        raise ValueError(
            f"{type(model).__name__} has no training stage {stage!r}; --stage may be one of {sorted(stages) or 'none'}"
        )
    return stages[stage]


def apply_stage(model: nn.Module, stage: str, *, table: Mapping[str, bool] | None = None) -> StageReport:
    """Sets `requires_grad` of every parameter, both ways, and remembers which parts stay in eval mode.

    The longest path that covers a parameter decides. Applying a stage twice, or one stage after another, gives what
    the last one says. Apply LoRA after it, not before.

    Args:
        model: any module; its class may carry the tables as `stages`.
        stage: name of the stage.
        table: path -> trainable, instead of `model.stages[stage]`. `""` is the whole model.

    Returns:
        What trains, with parameter counts and bytes.

    Raises:
        ValueError: unknown stage, a path that names nothing in the model, a parameter that no path covers, or a tied
            parameter that the table both trains and freezes.
    """
    table = dict(stage_table(model, stage) if table is None else table)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    _check_paths(model, stage, table, parameters)

    decided: dict[int, tuple[str, str]] = {}
    counts: dict[str, list[int]] = {path: [0, 0] for path in table}
    for name, parameter in parameters.items():
        path = _longest_path(name, table)
        if path is None:
            raise ValueError(
                f"stage {stage!r} of {type(model).__name__} does not say whether {name!r} trains; "
                'add its path, or "" for everything else'
            )
        first = decided.get(id(parameter))
        if first is not None:
            if table[first[1]] != table[path]:
                raise ValueError(
                    f"{first[0]!r} and {name!r} are one tied parameter, but stage {stage!r} trains one and freezes "
                    "the other; give both paths the same value"
                )
            continue
        decided[id(parameter)] = (name, path)
        if table[path] and not (parameter.is_floating_point() or parameter.is_complex()):
            raise ValueError(f"{name!r} is stored as {parameter.dtype} (quantized) and cannot train; freeze {path!r}")
        parameter.requires_grad_(table[path])
        counts[path][0] += parameter.numel()
        counts[path][1] += parameter.numel() * parameter.element_size()

    setattr(model, _STAGE_ATTRIBUTE, table)
    order = sorted(table, key=lambda path: (path == "", _first_position(path, parameters)))
    rows = tuple(StageRow(path, table[path], *counts[path]) for path in order)
    return StageReport(stage, rows)


def keep_frozen_in_eval(model: nn.Module) -> None:
    """Puts the frozen parts of the applied stage in eval mode; to be called after `model.train()`.

    A frozen tower must give the same features in every step: no dropout, no update of running statistics. Parts of a
    frozen part that train again (a longer path of the table, LoRA's own dropout) are put back in train mode.
    """
    table = getattr(model, _STAGE_ATTRIBUTE, None)
    if table is None:
        return
    modules = dict(model.named_modules())
    for path in sorted((path for path in table if path in modules), key=len):
        modules[path].train(table[path])
    # A composite is in train mode when one of its parts learns; only its own flag is set, not its other children's.
    for path, trainable in table.items():
        while trainable and path:
            path = path.rpartition(".")[0]
            modules[path].training = True
    for name, module in modules.items():
        if name.rpartition(".")[2] == "lora_dropout":
            module.train()


def _longest_path(name: str, table: Mapping[str, bool]) -> str | None:
    covering = [path for path in table if path == "" or name == path or name.startswith(f"{path}.")]
    return max(covering, key=len) if covering else None


def _first_position(path: str, parameters: Mapping[str, nn.Parameter]) -> int:
    for position, name in enumerate(parameters):
        if name == path or name.startswith(f"{path}."):
            return position
    return len(parameters)


def _check_paths(
    model: nn.Module, stage: str, table: Mapping[str, bool], parameters: Mapping[str, nn.Parameter]
) -> None:
    modules = dict(model.named_modules())
    for path in table:
        if path and path not in modules and path not in parameters:
            near = difflib.get_close_matches(path, [*modules, *parameters], n=3)
            top = sorted({name.split(".")[0] for name in parameters})
            raise ValueError(
                f"stage {stage!r} names {path!r}, which {type(model).__name__} does not have; "
                + (f"did you mean {near}?" if near else f"its parts are {top}")
            )
