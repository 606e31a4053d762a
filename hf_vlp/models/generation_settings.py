"""Generation settings of a language model that becomes a part of another model."""

from transformers import GenerationConfig

# Settings that act on drawn tokens only, and are checked against `do_sample` when a model is saved.
_SAMPLING = ("temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def drop_idle_settings(settings: GenerationConfig) -> None:
    """Takes out the settings of sampling where `do_sample` is not on, in place.

    They do nothing there, but transformers refuses to save settings that hold them once anything else in them has been
    changed. Vicuna 1.5 is published with such settings: a temperature without `do_sample`.
    """
    if settings.do_sample is not True:
        for name in _SAMPLING:
            setattr(settings, name, None)


__all__ = ["drop_idle_settings"]
