"""Configuration of BLIP's task models that transformers has no class for (arXiv 2201.12086, section 5)."""

from typing import Any

from transformers import BlipConfig


class BlipTasksConfig(BlipConfig):
    """`BlipConfig` and the fields below, for tasks that transformers' `blip` has no class for.

    Args:
        merge_from: first layer of the two-image text encoder whose cross-attention outputs are merged by a linear
            layer; below it they are averaged. Default: half of the layers.
        num_labels: classes of the two-image classifier.
    """

    model_type = "blip_tasks"
    _auto_class = "AutoConfig"

    merge_from: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.merge_from is None:
            self.merge_from = self.text_config.num_hidden_layers // 2


__all__ = ["BlipTasksConfig"]
