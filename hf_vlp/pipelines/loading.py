"""Loads the class of the catalogue that plays a role; stands beside the Auto classes in the table of tasks."""

from pathlib import Path
from typing import Any, ClassVar

from hf_vlp.models.catalog import ARCHITECTURES


class RoleLoader:
    """What `transformers.pipeline` needs of a model class: `from_pretrained`.

    Class attributes:
        role (`str`): role of the catalogue.
    """

    role: ClassVar[str]

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, config: Any = None, **kwargs: Any) -> Any:
        """Our class for `cls.role`.

        Raises:
            ValueError: the catalogue has no such class for this model type; `transformers.pipeline` then goes on to
                the next class in its list.
        """
        if config is None:
            from transformers import AutoConfig

            config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=kwargs.get("trust_remote_code"))
        architecture = ARCHITECTURES.get(config.model_type)
        if architecture is None or cls.role not in architecture.classes:
            raise ValueError(f"hf_vlp has no {cls.role!r} class for the model type {config.model_type!r}")
        for name in ("_from_pipeline", "code_revision", "trust_remote_code"):
            kwargs.pop(name, None)
        return architecture.load(cls.role).from_pretrained(name_or_path, config=config, **kwargs)


class RetrievalLoader(RoleLoader):
    """Models with the retrieval protocol: an image is encoded once however many texts it is compared with."""

    role = "retrieval"
