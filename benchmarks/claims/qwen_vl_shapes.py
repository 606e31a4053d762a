"""Claim: a small Qwen-VL answers questions about scenes it has not seen.

    python benchmarks/claims/qwen_vl_shapes.py [--arms two-stage …] [--seeds 0 1 2] [--output_dir outputs/claims]

Qwen-VL (arXiv 2308.12966): a tower trained by clip.py and a new resampler learn captions in front of a language model
that was trained on text alone and stays frozen (pretraining), then resampler and language model learn conversations
(SFT, tower frozen), all on the built-in Shapes. Measured is the share of exact answers (colour, shape, count,
relation; several turns) on scenes of the test split. The language model is trained once, the other parts once a seed;
a run that was stopped goes on from its checkpoint.
"""

import argparse
from pathlib import Path

from _instructions import TOWER, compare_answers, exact_answers, language_model, preset, run

PRETRAIN, SFT = preset("qwen_vl_pretrain_cpu"), preset("qwen_vl_sft_cpu")
ARMS = ("two-stage",)


def trained_arm(name: str, seed: int, given: argparse.Namespace) -> Path:
    """The last run of an arm, with all that it starts from."""
    clip = run("clip", "clip", TOWER, seed, given, model_type="clip")
    parts = {"vision_model": str(clip / "model"), "language_model": str(language_model(given))}
    first = run("qwen_vl", "pretrain", PRETRAIN, seed, given, stage="pretrain", **parts)
    return run("qwen_vl", name, SFT, seed, given, stage="sft", model_name_or_path=str(first / "model"))


if __name__ == "__main__":
    compare_answers(
        __doc__,
        ARMS,
        trained_arm,
        "qwen_vl_shapes.json",
        lambda model, _, given: exact_answers(model, given, "qwen_vl"),
    )
