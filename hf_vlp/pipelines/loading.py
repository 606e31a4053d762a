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


def _named_class(config: Any) -> str:
    """The class that a folder was saved from."""
    return (getattr(config, "architectures", None) or [""])[0]


class ZeroShotLoader(RoleLoader):
    """Models that classify by class names, where the Auto class of transformers gives another network than the one
    that the folder holds (BLIP's retrieval model)."""

    role = "zero_shot"

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, config: Any = None, **kwargs: Any) -> Any:
        if config is not None:
            from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES

            stock = MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES.get(config.model_type)
            if stock in (None, _named_class(config)):
                raise ValueError(f"the Auto class gives what {name_or_path} holds")
        return super().from_pretrained(name_or_path, config=config, **kwargs)


class AnsweringLoader(RoleLoader):
    """Models that were trained to answer questions: those whose folder names the class of the role, which is not that
    of captioning. For BLIP the Auto class would leave the question encoder out without a word."""

    role = "vqa"

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, config: Any = None, **kwargs: Any) -> Any:
        architecture = None if config is None else ARCHITECTURES.get(config.model_type)
        if architecture is not None and cls.role in architecture.classes:
            own, named = architecture.classes[cls.role], _named_class(config)
            if own == architecture.classes.get("captioning") or own.partition(":")[2] != named:
                raise ValueError(f"{name_or_path} holds a {named}, not the class of {cls.role!r}")
        return super().from_pretrained(name_or_path, config=config, **kwargs)
