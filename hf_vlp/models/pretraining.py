"""What every pretraining model of the package has in common.

A pretraining model *contains* the inference model of its paper, adds what only training needs (prediction heads,
temperatures, momentum twins, queues) and calls the functions of `hf_vlp.objectives`. It is a `PreTrainedModel`, so
`Trainer` checkpoints it whole; `export` writes what the world should load: the inference model alone, in its native
format, with the training-only parameters in a side file that plain transformers does not look at.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import cached_file

EXTRAS_FILE = "pretraining_extras.safetensors"
# Arguments of `from_pretrained` that say where a file of the Hub is found.
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class PreTrainingMixin:
    """Mixed into `<Arch>ForPreTraining(PreTrainingMixin, <Arch>PreTrainedModel)`.

    Class attributes:
        stages (`dict[str, dict[str, bool]]`): freezing as data. Stage name -> module or parameter path -> trainable?
            Longer paths win over shorter ones, `""` is the whole model. Read by `hf_vlp.training.freezing`.
        inference_attribute (`str`): name of the submodule that is the inference model.
    """

    stages: ClassVar[dict[str, dict[str, bool]]] = {}
    inference_attribute: ClassVar[str]
    # A loss that several objectives sum is a mean over pairs, not over tokens: `Trainer` must divide it by the
    # accumulation steps itself instead of trusting the model to have done so.
    accepts_loss_kwargs = False

    @property
    def inference_model(self) -> PreTrainedModel:
        """The model that ships: the one `AutoModel.from_pretrained` gives back after `export`."""
        return getattr(self, self.inference_attribute)

    def chance_levels(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """Value of each loss term (`"loss_itc"`, ...) for a model that knows nothing, in nats, for this batch."""
        raise NotImplementedError

    def pretraining_extras(self) -> dict[str, Tensor]:
        """State that `export` keeps beside the inference model (heads, temperature), by name in `self`."""
        prefix = f"{self.inference_attribute}."
        return {name: value for name, value in self.state_dict().items() if not name.startswith(prefix)}

    def export(self, folder: str | Path, **save_kwargs: Any) -> None:
        """Writes the inference model in its native format, and the training-only state to `EXTRAS_FILE` beside it.

        Args:
            folder: where to write; made if missing.
            save_kwargs: passed to `save_pretrained` of the inference model (`max_shard_size`, ...).
        """
        folder = Path(folder)
        self.inference_model.save_pretrained(folder, **save_kwargs)
        self.save_extras(folder)

    def save_extras(self, folder: str | Path) -> None:
        """Writes the training-only state to `EXTRAS_FILE` in `folder`; nothing if there is none."""
        extras = {name: value.detach().cpu().contiguous().clone() for name, value in self.pretraining_extras().items()}
        if extras:
            save_file(extras, Path(folder) / EXTRAS_FILE, metadata={"format": "pt", "class": type(self).__name__})


def hub_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `from_pretrained`'s keyword arguments that say where a file is found, for its config and side file."""
    return {name: arguments[name] for name in _HUB_ARGUMENTS if name in arguments}


def read_extras(name_or_path: str | Path, **where: Any) -> dict[str, Tensor]:
    """What `export` wrote beside an inference model, by name; empty where there is no such file.

    Args:
        name_or_path: folder or Hub id.
        where: see `hub_arguments`.
    """
    path = cached_file(
        str(name_or_path),
        EXTRAS_FILE,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **where,
    )
    return {} if path is None else load_file(path)
