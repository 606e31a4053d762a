"""The part of `VLPTrainer` that writes checkpoints and goes on from them."""

import json
import logging
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import Trainer
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import TrainOutput

from hf_vlp.data.records import RecordReport
from hf_vlp.training import checkpoints
from hf_vlp.training.arguments import run_settings
from hf_vlp.training.batching import streams
from hf_vlp.training.terms import TermMeter

logger = logging.getLogger(__name__)

SETTINGS_FILE = "settings.json"
STATE_FILE = "trainer_state.json"
FROZEN_FILE = "frozen_weights.json"


class ResumableTrainer(Trainer):
    """A `Trainer` whose checkpoints are whole or not there, and that says what differs before it goes on from one.

    `VLPTrainer` sets the attributes that are named here.
    """

    extra_settings: dict[str, Any]
    settings: dict[str, Any]
    terms: TermMeter
    records: RecordReport
    skipped_batches: int
    _seen_and_bad: list[int]
    _stream_position: dict[str, Any] | None
    _resumed_from: Path | None
    # Hashes of the frozen weights, once they are asked for; names of those that the loaded checkpoint left out.
    _frozen: dict[str, str] | None = None
    _left_out: frozenset[str] | set[str] = frozenset()

    def _summarise_records(self) -> None:
        raise NotImplementedError

    def _run_settings(self) -> dict[str, Any]:
        """Everything that decides the weights this run ends with, as kept in its checkpoints."""
        config = getattr(self.model, "config", None)
        model_settings = config.to_dict() if config is not None else {}
        for key in ("transformers_version", "_name_or_path", "architectures"):
            model_settings.pop(key, None)
        size = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None
        return checkpoints.plain(
            {
                "arguments": {**run_settings(self.args), "world_size": self.args.world_size},
                "model": {"class": type(self.model).__name__, "config": model_settings},
                "train_dataset": {"class": type(self.train_dataset).__name__, "records": size},
                **self.extra_settings,
            }
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint beside its final place and renames it when every rank has written its part."""
        run_dir = Path(self._get_output_dir(trial=trial))
        final = run_dir / f"checkpoint-{self.state.global_step}"
        writing = run_dir / f"{checkpoints.WRITING_PREFIX}{final.name}"
        if self.args.should_save:
            shutil.rmtree(writing, ignore_errors=True)
            writing.mkdir(parents=True)
        self.accelerator.wait_for_everyone()

        self.store_flos()
        self.save_model(str(writing), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(writing))
            self._save_scaler(str(writing))
            checkpoints.save_random_state(writing, self.args.process_index)
            checkpoints.write_json(writing / f"progress_{self.args.process_index}.json", self._progress())
        self.accelerator.wait_for_everyone()

        if self.args.should_save:
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(final)
            self._store_callback_states()
            self.state.save_to_json(str(writing / STATE_FILE))
            checkpoints.write_json(writing / SETTINGS_FILE, self.settings)
            checkpoints.publish(writing, final)
            checkpoints.rotate(run_dir, self.args.save_total_limit, keep=self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _store_callback_states(self) -> None:
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()

    def _progress(self) -> dict[str, Any]:
        """What the next log line needs from before the checkpoint."""
        return {
            "loss": self._tr_loss.item(),
            "last_logged": self._globalstep_last_logged,
            "terms": self.terms.state(),
            "records": {"seen": self.records.seen, "bad": dict(self.records.bad)},
            "seen_and_bad": self._seen_and_bad,
            "skipped_batches": self.skipped_batches,
            "stream_position": self._stream_position,
        }

    def _saved_progress(self, folder: Path) -> dict[str, Any]:
        path = folder / f"progress_{self.args.process_index}.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def _load_progress(self, folder: Path) -> None:
        progress = self._saved_progress(folder)
        if not progress:
            return
        self._tr_loss = torch.tensor(progress["loss"], device=self.args.device)
        self._globalstep_last_logged = progress["last_logged"]
        self.terms.load_state(progress["terms"], self.args.device)
        records = progress["records"]
        self.records = RecordReport(seen=records["seen"], bad=Counter(records["bad"]))
        self._seen_and_bad = progress["seen_and_bad"]
        self.skipped_batches = progress["skipped_batches"]

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Model, processor and arguments, without pickles."""
        folder = Path(output_dir or self.args.output_dir)
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if state_dict is None and not self.args.save_frozen:
            frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
            state_dict = {name: value for name, value in model.state_dict().items() if name not in frozen}
            checkpoints.write_json(folder / FROZEN_FILE, self._frozen_weights())
        # Under the names that the parameters have: some native types (LLaVA) save older names, which only
        # `from_pretrained` knows how to read.
        model.save_pretrained(folder, state_dict=state_dict, save_original_format=False)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        checkpoints.write_json(folder / "training_args.json", self.args.to_sanitized_dict())

    def _frozen_weights(self) -> dict[str, str]:
        """Hash of each frozen parameter; they do not change, so they are hashed once."""
        if self._frozen is None:
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            self._frozen = {
                name: checkpoints.tensor_hash(parameter)
                for name, parameter in model.named_parameters()
                if not parameter.requires_grad
            }
        return self._frozen

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path = Path(resume_from_checkpoint) / FROZEN_FILE
        self._left_out = set(json.loads(path.read_text())) if path.is_file() else set()
        if self._left_out:
            changes = checkpoints.changed_settings(json.loads(path.read_text()), self._frozen_weights())
            if changes:
                raise ValueError(
                    f"{resume_from_checkpoint} was written without the frozen weights (--save_frozen false), and "
                    f"those loaded now are others: {len(changes)} differ, e.g. {changes[0].split(':')[0]!r}. Start "
                    "from the same image encoder and language model"
                )
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _is_plain(self) -> bool:
        """Whether this process holds whole weights and optimizer states (one process or DDP)."""
        return not (self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._is_plain():
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            checkpoints.save_optimizer(self.optimizer, self.model, Path(output_dir))
            (Path(output_dir) / "scheduler.json").write_text(json.dumps(self.lr_scheduler.state_dict()))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._is_plain():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        checkpoints.load_optimizer(self.optimizer, self.model, Path(checkpoint))
        self.lr_scheduler.load_state_dict(json.loads((Path(checkpoint) / "scheduler.json").read_text()))

    def _save_scaler(self, output_dir: str) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and self.args.should_save:
            (Path(output_dir) / "scaler.json").write_text(json.dumps(scaler.state_dict()))

    def _load_scaler(self, checkpoint: str | None) -> None:
        path = Path(checkpoint or "") / "scaler.json"
        if checkpoint is not None and path.is_file():
            self.accelerator.scaler.load_state_dict(json.loads(path.read_text()))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpoints.load_random_state(Path(checkpoint), self.args.process_index)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raises where the parent warns: a checkpoint that does not fit the model must not be trained on."""
        expected = self._left_out | set(getattr(self.model, "all_tied_weights_keys", None) or {})
        missing = [name for name in load_result.missing_keys if name not in expected]
        if missing or load_result.unexpected_keys:
            raise ValueError(
                f"the checkpoint does not fit {type(self.model).__name__}: missing {missing[:5]}, unexpected "
                f"{list(load_result.unexpected_keys)[:5]}"
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> TrainOutput:
        """Trains, or goes on from a checkpoint.

        Args:
            resume_from_checkpoint: folder of a checkpoint; True for the newest whole one, which must exist; False to
                start anew; None to do what `args.resume` says.

        Raises:
            ValueError: the run's settings differ from the checkpoint's, or `resume="never"` and the folder has
                checkpoints.
            IncompleteCheckpointError: the named checkpoint is not whole.
        """
        checkpoint = self._choose_checkpoint(resume_from_checkpoint)
        if checkpoint is not None:
            checkpoints.verify(checkpoint)
            self._check_settings(checkpoint)
        self._resumed_from = checkpoint
        if streams(self.train_dataset):
            # The loader itself goes on where the checkpoint stands; the parent would read everything again.
            self.args.ignore_data_skip = True
            self._stream_position = self._saved_progress(checkpoint).get("stream_position") if checkpoint else None
        # The parent would write the tokenizer's special tokens into the model's config, which both already agree on.
        processing_class, self.processing_class = self.processing_class, None
        try:
            if checkpoint is not None and self._is_finished(checkpoint):
                return self._load_finished(checkpoint)
            self.processing_class = _Hidden(processing_class) if processing_class is not None else None
            output = super().train(resume_from_checkpoint=str(checkpoint) if checkpoint else None, **options)
            self._summarise_records()
            return output
        finally:
            self.processing_class = processing_class

    def _choose_checkpoint(self, asked: str | bool | None) -> Path | None:
        if asked is None:
            asked = {"auto": None, "never": False}.get(self.args.resume, self.args.resume)
        chosen: list[Any] = [None, None]
        if self.args.process_index == 0:
            checkpoints.remove_leftovers(self.args.output_dir)
            newest = checkpoints.newest_checkpoint(self.args.output_dir)
            if isinstance(asked, str):
                chosen[0] = asked
            elif asked is False and newest is not None:
                chosen[1] = (
                    f"--output_dir {self.args.output_dir} has checkpoints of an earlier run ({newest.name}); remove "
                    "them, name another folder, or go on with --resume auto"
                )
            elif asked is True and newest is None:
                chosen[1] = f"--output_dir {self.args.output_dir} has no whole checkpoint to resume from"
            elif asked is not False:
                chosen[0] = str(newest) if newest else None
        chosen = broadcast_object_list(chosen)
        if chosen[1]:
            raise ValueError(chosen[1])
        return Path(chosen[0]) if chosen[0] else None

    def _check_settings(self, checkpoint: Path) -> None:
        path = checkpoint / SETTINGS_FILE
        if not path.is_file():
            return
        changes = checkpoints.changed_settings(json.loads(path.read_text()), self.settings)
        if not changes:
            return
        text = f"{checkpoint} was written with other settings:\n  " + "\n  ".join(changes)
        if not self.args.allow_changed_settings:
            raise ValueError(
                f"{text}\nResume with the settings of the first run, name another --output_dir, or say "
                "--allow_changed_settings if this is meant (the result is then no longer that of an unbroken run)"
            )
        logger.warning("%s", text)

    def _is_finished(self, checkpoint: Path) -> bool:
        state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
        *_, max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        return state.global_step >= max_steps

    def _load_finished(self, checkpoint: Path) -> TrainOutput:
        """The state at the end of a run that was killed after its last step: nothing is left to train."""
        logger.warning("%s is the end of the run: nothing is left to train", checkpoint)
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
        if self.args.should_save:
            # The kill may have come before the oldest checkpoint was removed.
            checkpoints.rotate(self.args.output_dir, self.args.save_total_limit, keep=self.state.best_model_checkpoint)
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        return TrainOutput(self.state.global_step, losses[-1] if losses else float("nan"), {})


class _Hidden:
    """A processor that `Trainer.train` does not recognise as one, but that still saves itself."""

    def __init__(self, processing_class: Any) -> None:
        self._processing_class = processing_class

    def save_pretrained(self, folder: str | Path) -> None:
        self._processing_class.save_pretrained(folder)
