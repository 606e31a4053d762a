"""`VLPTrainer`: `transformers.Trainer` with named loss terms, batches exact over ranks, checkpoints safe to a kill.

What differs from the parent, and why:

- A step's batch is defined over all ranks (`hf_vlp.training.batching`): N ranks see the records of one process.
- The loss terms of the model's output are averaged over steps and ranks and logged under their names.
- Checkpoints are written aside and renamed (`hf_vlp.training.checkpoints`); resuming compares the settings of the run.
- The counts of bad records travel with the batches and are summed over ranks; a batch in which some rank has no good
  record is skipped by all ranks together.
- Random draws inside the objectives come from a generator seeded by (seed, step), the same on all ranks.
"""

import inspect
import logging
import math
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import ProcessorMixin, TrainerCallback
from transformers.trainer_utils import speed_metrics

from hf_vlp.data.hashing import stable_hash
from hf_vlp.data.records import RecordLimits, RecordReport
from hf_vlp.objectives.distributed import exchange_integers
from hf_vlp.objectives.gradient_cache import cached_step
from hf_vlp.training import checkpoints
from hf_vlp.training.arguments import VLPTrainingArguments
from hf_vlp.training.batching import STREAM_POSITION, data_loader
from hf_vlp.training.exporting import export_model
from hf_vlp.training.freezing import keep_frozen_in_eval
from hf_vlp.training.launch import say
from hf_vlp.training.lora import lora_layers
from hf_vlp.training.optimization import check_master_weights, parameter_groups, parse_rates
from hf_vlp.training.resuming import ResumableTrainer
from hf_vlp.training.sanity import SanityPass, chance_levels_of, check_batch
from hf_vlp.training.terms import TermMeter, loss_terms

logger = logging.getLogger(__name__)

RECORD_REPORT = "record_report"
# Scalars of an output that are worth a curve although they are no losses.
_LOGGED_SCALARS = ("logit_scale", "temperature", "alpha")
# Arguments of the scripts that name a model to start from.
_STARTS = ("model_name_or_path", "vision_model", "text_model", "stage1", "qformer", "language_model")
_HUB_ID = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*")
# Ends of the names of what `evaluate` reports besides: its own speed, and when it was.
_NO_METRICS = ("_runtime", "_per_second", "epoch")


class VLPTrainer(ResumableTrainer):
    """Trains a pretraining model of the package, or any model whose output has `loss` and `loss_<term>` entries.

    Args:
        model: the model, with its stage applied. Trainable weights must be float32.
        args: see `VLPTrainingArguments`.
        data_collator: makes a batch of rows; a `record_report` in the batch is taken out and summed.
        train_dataset: map-style (`__len__`, `__getitem__`, optionally `set_epoch`) or iterable.
        eval_dataset: as `train_dataset`, or a dict of them.
        processing_class: processor or tokenizer, saved with the model.
        evaluator: called with the model at each evaluation; its metrics are logged as `eval_<name>`.
        settings: what else decides the result of the run (data and model arguments); kept in checkpoints and compared
            on resuming.
        callbacks: further callbacks.

    Raises:
        ValueError: trainable weights in 16 bits, a model without trainable parameters, fewer records than a batch, or
            an argument that does not fit the model; see the messages.
    """

    def __init__(
        self,
        model: nn.Module,
        args: VLPTrainingArguments,
        data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: ProcessorMixin | Any | None = None,
        *,
        evaluator: Callable[[nn.Module], Mapping[str, float]] | None = None,
        settings: Mapping[str, Any] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        check_master_weights(model)
        self.evaluator = evaluator
        self.extra_settings = dict(settings or {})
        self.terms = TermMeter()
        self._takes_generator = "generator" in inspect.signature(model.forward).parameters
        self._steps: list[_MicroBatch] = []
        self._micro: _MicroBatch | None = None
        self._resumed_from: Path | None = None
        self._sanity: SanityPass | None = None
        self._stream_position: dict[str, Any] | None = None
        # This rank's account of the records it has trained on, and the counts of all ranks together.
        self.records = RecordReport()
        self._seen_and_bad = [0, 0]
        self.skipped_batches = 0
        _check_arguments(model, args)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[_StepCallback(self), *(callbacks or [])],
        )
        # Losses are means of the micro-batch; `compute_loss` weighs micro-batches and ranks itself.
        self.model_accepts_loss_kwargs = False
        self._loss_is_local = not hasattr(model, "accepts_loss_kwargs")
        parameter_groups(
            model,
            learning_rate=args.learning_rate,
            weight_decay=args.weight_decay,
            rates=parse_rates(args.part_learning_rates),
        )
        if train_dataset is not None:
            # Says now, not after minutes of preparation, if the records do not fill a batch.
            self.get_train_dataloader()
        # Now, because saving writes the dtype of the weights into the model's config.
        self.settings = self._run_settings()

    # Data

    def get_train_dataloader(self) -> DataLoader:
        """Loader of this rank's parts of the global batches."""
        if self.train_dataset is None:
            raise ValueError("VLPTrainer needs a train_dataset to train")
        return self._loader(self.train_dataset, self._train_batch_size, training=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Loader of this rank's parts of the global batches, in the order of the dataset."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if dataset is None:
            raise ValueError("VLPTrainer needs an eval_dataset to evaluate")
        return self._loader(dataset, self.args.eval_batch_size, training=False)

    def _loader(self, dataset: Any, batch_size: int, *, training: bool) -> DataLoader:
        args = self.args
        options: dict[str, Any] = {
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory and args.device.type == "cuda",
        }
        if args.dataloader_num_workers:
            options["prefetch_factor"] = args.dataloader_prefetch_factor
            options["multiprocessing_context"] = args.dataloader_multiprocessing_context
        return data_loader(
            dataset,
            self.data_collator,
            batch_size=batch_size,
            rank=args.process_index,
            world_size=args.world_size,
            shuffle=training,
            seed=args.seed if args.data_seed is None else args.data_seed,
            drop_last=training and args.dataloader_drop_last,
            stream_start=self._stream_position if training else None,
            **options,
        )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, None]:
        """The micro-batches of an optimizer step, with what all ranks have to know of them agreed upon."""
        batches = []
        for _ in range(num_batches):
            try:
                batches.append(next(epoch_iterator))
            except StopIteration:
                break
        for batch in batches:
            self._stream_position = batch.pop(STREAM_POSITION, None)
        shifted = self._loss_shifts_labels
        micro = [_MicroBatch.of(batch, index, shifted=shifted) for index, batch in enumerate(batches)]
        self._agree(micro, device)
        self._count_records(micro, device)
        # A skipped batch must not be the last one: gradients are averaged over ranks in the last backward.
        order = sorted(range(len(micro)), key=lambda index: not micro[index].skip)
        self._steps = [micro[index] for index in order]
        return [batches[index] for index in order], None

    def _agree(self, micro: list["_MicroBatch"], device: torch.device) -> None:
        """Which micro-batches are skipped and how each is weighed, the same on all ranks; and the records' counts."""
        table = exchange_integers([value for batch in micro for value in (batch.usable, batch.targets)], device)
        for index, batch in enumerate(micro):
            batch.skip = not all(row[2 * index] for row in table)
            everyone = sum(row[2 * index + 1] for row in table)
            batch.share = batch.targets * len(table) / everyone if everyone else 1.0
            batch.targets = everyone
        total = sum(batch.targets for batch in micro if not batch.skip)
        used = sum(not batch.skip for batch in micro)
        for batch in micro:
            # Supervised tokens are what a language loss is a mean over; without labels, each batch counts the same.
            share = batch.targets / total if batch.has_labels and total else 1 / max(used, 1)
            batch.weight = share * len(micro)

    def _count_records(self, micro: list["_MicroBatch"], device: torch.device) -> None:
        """Adds up the collators' reports, and stops all ranks together when too many records of all are bad.

        Raises:
            ErrorRateExceeded: with the table of all ranks.
        """
        seen, bad = 0, 0
        for batch in micro:
            if batch.report is not None:
                self.records.merge(batch.report)
                seen, bad = seen + batch.report.seen, bad + batch.report.bad_total
        self.skipped_batches += sum(batch.skip for batch in micro)
        for row in exchange_integers([seen, bad], device):
            self._seen_and_bad = [self._seen_and_bad[0] + row[0], self._seen_and_bad[1] + row[1]]
        limits = getattr(self.data_collator, "limits", None) or RecordLimits()
        seen, bad = self._seen_and_bad
        enough = seen >= limits.min_records or limits.max_bad_rate == 0
        if bad and enough and bad > limits.max_bad_rate * seen:
            self.record_report().check(limits, final=True)

    def record_report(self) -> RecordReport:
        """The account of the records of all ranks so far. Every rank has to call it."""
        merged = RecordReport()
        for report in gather_object([self.records]) if self.args.world_size > 1 else [self.records]:
            merged.merge(report)
        return merged

    # A step

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch; nothing for one that all ranks skip."""
        self._micro = self._steps.pop(0)
        if self._micro.skip:
            return torch.zeros((), device=self.args.device)
        if self._micro.index == 0 and self._sanity is not None and self._sanity.is_due(self.state.global_step):
            self._look(model, self._prepare_inputs(inputs))
        if self.args.grad_cache_chunk_size:
            loss = self._cached_training_step(model, inputs)
        else:
            loss = super().training_step(model, inputs)
        self._micro = None
        return loss

    def _cached_training_step(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The same step with the activations of `grad_cache_chunk_size` records held at a time."""
        model.train()
        keep_frozen_in_eval(self.accelerator.unwrap_model(model))
        inputs = self._prepare_inputs(inputs)
        factor = self._micro.weight / self.current_gradient_accumulation_steps
        with self.accelerator.autocast():
            outputs = cached_step(
                model,
                {**inputs, **self._generator_argument()},
                self.args.grad_cache_chunk_size,
                backward=lambda loss: self.accelerator.backward(loss * factor),
            )
        self.terms.add(logged_values(outputs))
        return outputs["loss"] * factor

    def _look(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """The sanity pass on the batch that is about to be trained on."""
        step = self.state.global_step
        limit = self.args.grad_cache_chunk_size
        checks = check_batch(
            model,
            inputs,
            chance_levels=chance_levels_of(self.accelerator.unwrap_model(model)),
            forward_arguments=self._generator_argument,
            gather=self._gather,
            **({"max_rows": limit} if limit else {}),
        )
        self._sanity.report(checks, step)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Loss of a batch; its terms go to the meter in training."""
        if model.training:
            keep_frozen_in_eval(self.accelerator.unwrap_model(model))
        outputs = model(**inputs, **self._generator_argument())
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
        if loss is None:
            raise ValueError(
                f"{type(self.accelerator.unwrap_model(model)).__name__} gave no loss for the inputs {sorted(inputs)}"
            )
        if self._micro is not None:
            self.terms.add(logged_values(outputs))
            # A foreign model's loss is a mean over this rank's tokens; ours are over those of all ranks already.
            weight = self._micro.weight * (self._micro.share if self._loss_is_local else 1.0)
            if weight != 1:
                loss = loss * weight
        return (loss, outputs) if return_outputs else loss

    def _generator_argument(self) -> dict[str, torch.Generator]:
        """`generator` for models that draw inside their objective: the same on all ranks, a function of the step."""
        if not self._takes_generator:
            return {}
        index = self._micro.index if self._micro is not None else "eval"
        seed = stable_hash(self.args.seed, "objective", self.state.global_step, index)
        return {"generator": torch.Generator(self.args.device).manual_seed(seed)}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW or what `--optim` names, over the groups of `hf_vlp.training.optimization`."""
        if self.optimizer is None:
            trained = self.model if model is None else model
            groups = parameter_groups(
                trained,
                learning_rate=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                rates=parse_rates(self.args.part_learning_rates),
            )
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)) or (
                {"params", "model", "optimizer_dict"} & set(options)
            ):
                raise ValueError(f"--optim {self.args.optim} makes its own parameter groups, which is not supported")
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def floating_point_ops(self, inputs: Any) -> int:
        """0: the parent's estimate (tokens times parameters) means nothing for images, frozen towers and skipped
        positions."""
        return 0

    # Logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of the loss terms and the rates of the parts to the training logs."""
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise FloatingPointError(
                    f"the loss is {logs['loss']} at step {self.state.global_step}; lower --learning_rate, lengthen "
                    "--warmup_steps or use --bf16 instead of --fp16. Checkpoints of earlier steps are kept"
                )
            logs.update(self.terms.means(self._gather))
            self.terms.clear()
            if self._seen_and_bad[1] or self.skipped_batches:
                logs["records_bad"] = self._seen_and_bad[1]
                logs["batches_skipped"] = self.skipped_batches
            if self.args.part_learning_rates:
                for group in self.optimizer.param_groups:
                    logs[f"learning_rate_{group['part']}"] = group["lr"]
        super().log(logs, start_time)

    def _gather(self, value: Tensor) -> Tensor:
        return self.accelerator.gather(value)

    # Evaluation

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean loss and loss terms over the evaluation set, and the metrics of `evaluator`.

        A contrastive loss depends on the batch size; compare only evaluations of one size. Draws nothing from the
        global random generators, so evaluating more or less often leaves the run as it is.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            metrics: dict[str, float] = {}
            for name, part in dataset.items():
                metrics |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        start = time.time()
        state = checkpoints.random_state()
        model = self.model_wrapped if self.is_in_train else self.model
        model.eval()
        try:
            metrics = self._evaluation_means(model, dataset, metric_key_prefix) if dataset is not None else {}
            if self.evaluator is not None:
                metrics |= {f"{metric_key_prefix}_{key}": value for key, value in self.evaluator(self.model).items()}
        finally:
            model.train()
            checkpoints.set_random_state(state)
        metrics |= speed_metrics(metric_key_prefix, start)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _evaluation_means(self, model: nn.Module, dataset: Any, prefix: str) -> dict[str, float]:
        meter = TermMeter()
        loader = self.get_eval_dataloader(dataset)
        self.callback_handler.eval_dataloader = loader
        for batch in loader:
            batch.pop(STREAM_POSITION, None)
            micro = _MicroBatch.of(batch, 0, shifted=self._loss_shifts_labels)
            self._agree([micro], self.args.device)
            if micro.skip:
                continue
            with self.compute_loss_context_manager():
                loss, outputs = self.compute_loss(model, self._prepare_inputs(batch), return_outputs=True)
            # The mean of a batch's values over ranks is that of the joined batch, so all ranks weigh it alike.
            weight = micro.targets * (micro.share if self._loss_is_local else 1.0)
            meter.add({"loss": loss.detach().float(), **loss_terms(outputs)}, weight=weight)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        return {f"{prefix}_{name}": value for name, value in meter.means(self._gather).items()}

    # The end

    def _summarise_records(self) -> None:
        report = self.record_report()
        if report.bad_total and self.args.process_index == 0:
            logger.warning("records of this run (each epoch counts again):\n%s", report.table())

    def export(
        self, folder: str | Path | None = None, *, metrics: Mapping[str, float] | None = None, card: Any = None
    ) -> Path:
        """Writes the model that the world should load, with processor, generation config and model card.

        LoRA adapters are merged, and written alone beside the model. Training-only state (heads, temperature) goes to
        the side file from which a later stage starts.

        Args:
            folder: by default `<output_dir>/model`.
            metrics: for the card.
            card: a `hf_vlp.hub.CardData`; by default one that tells the recipe of this run.

        Returns:
            The folder.
        """
        folder = Path(folder or Path(self.args.output_dir) / "model")
        model = self._whole_model()
        if self.args.should_save:
            export_model(model, self.processing_class, folder, card or self._card(metrics or {}))
        self.accelerator.wait_for_everyone()
        return folder

    def _whole_model(self) -> nn.Module:
        """The model with all its weights on this process; under FSDP and ZeRO put together on the CPU."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if self._is_plain():
            return model
        if lora_layers(model):
            raise ValueError(
                "adapters cannot be merged while the weights are sharded: go on from the last checkpoint in one "
                "process (--allow_changed_settings), which exports at once"
            )
        state = self.accelerator.get_state_dict(self.model_wrapped)
        if not self.args.should_save:
            return model
        whole = type(model)(model.config)
        whole.load_state_dict(state)
        return whole

    def _card(self, metrics: Mapping[str, float]) -> Any:
        from hf_vlp.hub import CardData, Metric, recipe_of

        data = self.extra_settings.get("data", {})
        name = str(data.get("train_data", "unnamed data"))
        evaluated = self._evaluated_on() or name
        return CardData(
            name=(self.args.hub_model_id or Path(self.args.output_dir).resolve().name).rpartition("/")[2],
            data=name,
            base_models=self._base_models(),
            recipe={self.args.stage or "training": recipe_of(self.args)},
            command=" ".join([*(["accelerate launch"] if self.args.world_size > 1 else ["python"]), *sys.argv]),
            metrics=[
                Metric(name=key.removeprefix("eval_"), value=float(value), dataset=evaluated)
                for key, value in metrics.items()
                if isinstance(value, int | float) and math.isfinite(value) and not key.endswith(_NO_METRICS)
            ],
        )

    def _evaluated_on(self) -> str | None:
        """Name of the data of the evaluation, which need not be the training data; None where its rows do not say."""
        for holder in (self.evaluator, self.eval_dataset):
            rows = getattr(holder, "rows", None)
            if hasattr(rows, "__len__") and len(rows) and rows[0].get("source"):
                return str(rows[0]["source"])
        return None

    def _base_models(self) -> list[str]:
        """Hub ids among the models that the run started from."""
        given = self.extra_settings.get("model_arguments", {})
        named = [given.get(name) for name in _STARTS]
        ids = [name for name in named if name and name != "scratch" and _HUB_ID.fullmatch(name)]
        return list(dict.fromkeys(name for name in ids if not Path(name).exists()))

    def finish(self) -> dict[str, float]:
        """What every script does after training: evaluates, exports, pushes if asked to; gives the metrics.

        Leaves `trainer_state.json` (the log), `eval_results.json` and `model/` in the output folder.
        """
        metrics: dict[str, float] = {}
        # The log of the whole run, for whoever draws its curves.
        self.save_state()
        if self.eval_dataset is not None or self.evaluator is not None:
            metrics = self.evaluate()
            self.log_metrics("eval", metrics)
            self.save_metrics("eval", metrics, combined=False)
        folder = self.export(metrics=metrics)
        say(f"The model is in {folder}")
        if self.args.push_to_hub and self.args.process_index == 0:
            from hf_vlp.hub import push

            name = self.args.hub_model_id or folder.resolve().parent.name
            say(f"Pushed: {push(folder, name, private=self.args.hub_private_repo, token=self.args.hub_token)}")
        return metrics


class _MicroBatch:
    """What the ranks tell each other of a micro-batch.

    Attributes:
        index: place in the optimizer step.
        usable: whether this rank has a good record in it.
        has_labels: whether it is for a language loss over `labels`.
        targets: supervised tokens (rows without labels) of this rank, after `_agree` of all ranks.
        share: this rank's targets over the mean of all ranks'.
        rows: good records of this rank.
        skip: whether all ranks leave it out.
        weight: factor of its loss, whose mean over the micro-batches of the step is 1.
        report: the collator's report on bad records.
    """

    def __init__(self, index: int, rows: int, targets: int, has_labels: bool, report: Any) -> None:
        self.index = index
        self.rows = rows
        self.targets = targets
        self.has_labels = has_labels
        self.report = report
        self.usable = rows > 0
        self.skip = False
        self.share = 1.0
        self.weight = 1.0

    @classmethod
    def of(cls, batch: dict[str, Any], index: int, *, shifted: bool = False) -> "_MicroBatch":
        """Describes a batch and takes the report out of it; `shifted`: the first label of a row is no target."""
        report = batch.pop(RECORD_REPORT, None)
        tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.ndim]
        rows = len(tensors[0]) if tensors else 0
        labels = batch.get("labels")
        # A loss over the answers to questions is a mean over the questions.
        if isinstance(labels, Tensor) and "answers_per_question" not in batch:
            labels = labels[..., 1:] if shifted else labels
            return cls(index, rows, int((labels != -100).sum()), True, report)
        return cls(index, rows, rows, False, report)


class _StepCallback(TrainerCallback):
    """What has to happen at given moments of the parent's loop."""

    def __init__(self, trainer: VLPTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer.terms.clear()
        trainer._sanity = (
            SanityPass(
                args.sanity_steps,
                args.sanity_check_step,
                args.get_warmup_steps(state.max_steps),
                quiet=args.process_index != 0,
            )
            if args.sanity
            else None
        )
        if trainer._resumed_from is not None:
            trainer._load_progress(trainer._resumed_from)
        elif args.world_size > 1:
            # Other dropout masks on each rank; a resumed run restores each rank's own state.
            torch.manual_seed(stable_hash(args.seed, "rank", args.process_index))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        for name in ("after_step", "clamp_temperature"):
            if hasattr(model, name):
                getattr(model, name)()
                break


def _check_arguments(model: nn.Module, args: VLPTrainingArguments) -> None:
    """Refuses or warns of arguments that would not do what they say with this model."""
    two_halves = hasattr(model, "embed") and hasattr(model, "objective")
    if args.grad_cache_chunk_size < 0:
        raise ValueError(f"--grad_cache_chunk_size must not be negative, not {args.grad_cache_chunk_size}")
    if args.grad_cache_chunk_size and not two_halves:
        raise ValueError(
            f"--grad_cache_chunk_size: {type(model).__name__} has no embed/objective halves to cache between; leave "
            "it out, and use --gradient_accumulation_steps or --activation_checkpointing to save memory"
        )
    contrastive = two_halves or "itc" in getattr(getattr(model, "settings", None), "objectives", ())
    if args.gradient_accumulation_steps > 1 and contrastive:
        logger.warning(
            "--gradient_accumulation_steps %d: a contrastive loss compares the pairs of one micro-batch only, so "
            "accumulating is not the same as a batch %d times as large%s",
            args.gradient_accumulation_steps,
            args.gradient_accumulation_steps,
            "; --grad_cache_chunk_size is" if two_halves else "",
        )


def logged_values(outputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Loss terms of an output, and the other scalars that belong in the log."""
    scalars = {
        name: torch.as_tensor(outputs[name]).detach().float()
        for name in _LOGGED_SCALARS
        if isinstance(outputs.get(name), Tensor | float) and torch.as_tensor(outputs[name]).numel() == 1
    }
    return {**loss_terms(outputs), **scalars}


__all__ = ["VLPTrainer", "logged_values"]
