r"""CapFilt (arXiv 2201.12086, section 3.3): a captioner and a filter make the next pretraining set out of web data.

    python training_scripts/capfilt.py --data shapes --shapes size=2000 caption_noise=0.4 \
        --captioner outputs/captioner/model --filter outputs/filter/model --output outputs/capfilt
On 16 GPUs, over web data and with the human pairs of COCO added:
    accelerate launch --num_processes 16 training_scripts/capfilt.py --config training_scripts/capfilt_paper.yaml \
        --data path/to/cc12m --human_data path/to/dataset_coco.json --image_root path/to/images \
        --captioner path/to/captioner --filter path/to/filter --output path/to/capfilt

The same command started again goes on where it was stopped, on any number of processes, and ends with the same set.
The set is a folder of parquet files (or tars) for --train_data of every training script. `hf-vlp capfilt` is the same.
"""

import sys
from typing import Any

from hf_vlp.bootstrapping import CapFiltArguments, JobError, run_arguments
from hf_vlp.data import ErrorRateExceeded
from hf_vlp.training import parse_arguments
from hf_vlp.training.launch import say


def main(argv: list[str] | None = None) -> dict[str, Any]:
    (arguments,) = parse_arguments((CapFiltArguments,), argv, description=__doc__)
    try:
        return run_arguments(arguments, say)
    except (ValueError, OSError, KeyError, JobError, ErrorRateExceeded) as error:
        sys.exit(f"capfilt.py: {error.args[0] if isinstance(error, KeyError) else error}")


if __name__ == "__main__":
    main()
