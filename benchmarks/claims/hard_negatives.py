"""Claim: matching trained on hard negatives ranks better than matching trained on random ones.

    python benchmarks/claims/hard_negatives.py [--seeds 0 1 2] [--output_dir outputs/claims]

ALBEF (arXiv 2107.07651), section 3.2 and table 1. Two arms that differ in the draw of ITM's negatives only; retrieval
on 500 test scenes, the 32 nearest by contrast re-ranked by matching.
"""

from _claims import arguments, arm, over_arms, report, retrieval_metrics

ARMS = (arm("random", negatives="random"), arm("hard"))


def main() -> None:
    given = arguments(__doc__, [one.name for one in ARMS])
    results = over_arms(ARMS, given, "recall", retrieval_metrics)
    report(
        "Hard against random negatives: mean Recall@1 of both directions, ± over seeds",
        results,
        {
            "R@1, re-ranked": {"": "r1_itm"},
            "R@1, contrast alone": {"": "r1_itc"},
            "R@1 of 200, matching alone": {"": "r1_matching"},
        },
        "random",
        given.output_dir / "hard_negatives.json",
    )


if __name__ == "__main__":
    main()
