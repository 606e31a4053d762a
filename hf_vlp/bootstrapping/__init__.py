"""CapFilt (arXiv 2201.12086, section 3.3): captions are proposed and noisy texts dropped, as a resumable data job."""

from hf_vlp._exports import lazy_exports

# Public name -> module that defines it.
_EXPORTS = {
    "CapFiltArguments": "arguments",
    "CapFiltSettings": "job",
    "Captioner": "captioner",
    "JobError": "ledger",
    "SeededNucleus": "sampling",
    "SettingsChanged": "ledger",
    "Source": "sources",
    "TextFilter": "text_filter",
    "capfilt": "job",
    "model_fingerprint": "fingerprint",
    "open_source": "sources",
    "read_texts": "ledger",
    "run_arguments": "arguments",
    "sampling_seed": "sampling",
}

__all__ = sorted(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
