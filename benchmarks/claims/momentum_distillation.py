"""Claim: with 40% wrong captions, soft targets of the momentum twin beat the one-hot targets of the data.

    python benchmarks/claims/momentum_distillation.py [--seeds 0 1 2] [--output_dir outputs/claims]

ALBEF (arXiv 2107.07651), section 3.3 and table 1. Both arms contrast against the twin's features and the queue; only
one takes the twin's opinion into the targets of ITC and MLM (alpha 0.4, warmed up over the first epoch). The test
scenes are clean. Both arms train for longer than those of the other claims, because under this much noise matching
starts to be learnt only after some 600 steps.
"""

from _claims import arguments, arm, over_arms, report, retrieval_metrics

NOISY = {"shapes_noise": 0.4, "max_steps": 1500}
ARMS = (arm("no distillation", distill="false", **NOISY), arm("momentum distillation", **NOISY))


def main() -> None:
    given = arguments(__doc__, [one.name for one in ARMS])
    results = over_arms(ARMS, given, "recall", retrieval_metrics)
    report(
        "Momentum distillation at 40% caption noise: mean Recall@1 of both directions, ± over seeds",
        results,
        {
            "R@1, re-ranked": {"": "r1_itm"},
            "R@1, contrast alone": {"": "r1_itc"},
            "R@1 of 200, matching alone": {"": "r1_matching"},
        },
        "no distillation",
        given.output_dir / "momentum_distillation.json",
    )


if __name__ == "__main__":
    main()
