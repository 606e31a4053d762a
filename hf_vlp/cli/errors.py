"""What a failed command says, and its exit status."""

import sys

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_PARTIAL = 3
EXIT_INTERRUPTED = 130


class UsageError(ValueError):
    """The command line asks for something that can't be."""


def user_errors() -> tuple[type[BaseException], ...]:
    """The errors that are reported in a line, because they speak of what the user gave: names, files, data, settings
    under which a loss is no number, the Hub.

    Anything else is a defect of the program and keeps its traceback. Classes of modules that were never imported can't
    have been raised, and are not imported for this.
    """
    found: list[type[BaseException]] = [ValueError, OSError, KeyError, ImportError, FloatingPointError]
    for module, names in {
        "hf_vlp.hub.pushing": ("PushError", "FolderError"),
        "hf_vlp.hub.verification": ("VerificationError",),
        "hf_vlp.data.records": ("ErrorRateExceeded",),
        "huggingface_hub.errors": ("HfHubHTTPError",),
        "safetensors": ("SafetensorError",),
        "datasets.exceptions": ("DatasetsError",),
    }.items():
        if module in sys.modules:
            found += [getattr(sys.modules[module], name) for name in names if hasattr(sys.modules[module], name)]
    return tuple(found)


def one_line(error: BaseException) -> str:
    """The message without line breaks; the class where there is no message."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or type(error).__name__
