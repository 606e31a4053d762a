"""Arguments of the recipes with a momentum twin: ALBEF and BLIP."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from hf_vlp.training.arguments import option


@dataclass
class MomentumArguments:
    """The momentum twin, its queue and its opinion; what is left out keeps the model's own value."""

    _argument_group_name: ClassVar[str] = "momentum"

    momentum: float | None = option(None, "Share of itself that the twin keeps in a step; the papers: 0.995.")
    alpha: float | None = option(None, "Weight of the twin's opinion in the targets; the papers: 0.4.")
    alpha_warmup_steps: int | None = option(
        None, "Steps over which alpha grows from 0; left out: those of the first epoch (BLIP's pretraining: two)."
    )
    distill: bool | None = option(None, "Whether the twin's opinion enters the targets at all.")

    def settings(self, dataset: Any, args: Any, *, epochs: int = 1) -> dict[str, Any]:
        """Keyword arguments of the training class.

        Args:
            dataset: rows or records that the run trains on, for the length of an epoch.
            args: of the run.
            epochs: over which alpha grows.

        Raises:
            ValueError: the data is a stream, whose epoch has no known length, and alpha's warm-up is left out.
        """
        values = given(self)
        if "alpha_warmup_steps" not in values and values.get("distill", True):
            values["alpha_warmup_steps"] = epochs * steps_of_an_epoch(dataset, args)
        return values


@dataclass
class ObjectiveArguments:
    """The objectives and their ablations; what is left out keeps the model's own value."""

    _argument_group_name: ClassVar[str] = "objectives"

    objectives: list[str] = option(
        list, "Which terms make up the loss, as itc itm mlm (BLIP: itc itm lm); left out: all of them."
    )
    negatives: str | None = option(
        None, "Negatives of matching: drawn by similarity or all alike.", choices=["hard", "random"]
    )
    queue_size: int | None = option(None, "Pairs in the queue of momentum features; the papers: 65,536 and 57,600.")
    across_ranks: str | None = option(
        None,
        "Contrast and match over all processes, or within each as the originals do.",
        choices=["joined", "local"],
    )

    def chosen(self, *more: str) -> tuple[str, ...]:
        """The terms of the loss; `more` than ITC and ITM are what the model has by default."""
        return tuple(self.objectives) or ("itc", "itm", *more)

    def settings(self) -> dict[str, Any]:
        """Keyword arguments of the training class."""
        values = given(self)
        if not self.objectives:
            values.pop("objectives")
        return values


def given(arguments: Any) -> dict[str, Any]:
    """The fields of a dataclass of arguments that were not left out."""
    values = {entry.name: getattr(arguments, entry.name) for entry in dataclasses.fields(arguments)}
    return {name: value for name, value in values.items() if value is not None}


def steps_of_an_epoch(dataset: Any, args: Any) -> int:
    """Batches in which the model sees the data once; with accumulation there are several in an optimizer step.

    Raises:
        ValueError: the data is a stream.
    """
    if not hasattr(dataset, "__len__"):
        raise ValueError("--alpha_warmup_steps is needed with --streaming: how long an epoch is cannot be known")
    batch = args.train_batch_size * args.world_size
    whole, rest = divmod(len(dataset), batch)
    return max(1, whole + bool(rest and not args.dataloader_drop_last))


def accepted_settings(
    model_class: type, settings: Mapping[str, Any], *, required: Mapping[str, Any]
) -> dict[str, Any]:
    """Those of `settings` that a training class knows.

    Args:
        model_class: with a dataclass `settings_class`, or without settings.
        settings: name -> value.
        required: those that somebody asked for; the others are dropped where the class does not know them.

    Raises:
        ValueError: one that was asked for is not known.
    """
    kind = getattr(model_class, "settings_class", None)
    known = {entry.name for entry in dataclasses.fields(kind)} if kind is not None else set()
    unknown = sorted(set(required) - known)
    if unknown:
        raise ValueError(
            f"{model_class.__name__} has no setting {unknown[0]!r}; it has {sorted(known) or 'none'}: leave "
            f"--{unknown[0]} out"
        )
    return {name: value for name, value in settings.items() if name in known}
