"""Claim: ITC + ITM + MLM, re-ranked by matching, retrieves better than ITC alone.

    python benchmarks/claims/objectives.py [--seeds 0 1 2] [--output_dir outputs/claims]

ALBEF (arXiv 2107.07651), table 1. Equal data, batches and steps; each arm is scored the best way it can: ITC alone by
its contrast, the others re-ranked by matching.
"""

from _claims import arguments, arm, over_arms, report, retrieval_metrics

ARMS = (
    arm("ITC", objectives=["itc"]),
    arm("ITC + ITM", objectives=["itc", "itm"]),
    arm("ITC + ITM + MLM"),
)


def main() -> None:
    given = arguments(__doc__, [one.name for one in ARMS])
    results = over_arms(ARMS, given, "recall", retrieval_metrics)
    report(
        "Objectives: mean Recall@1 of both directions, ± over seeds",
        results,
        {
            "R@1, final ranking": {"": "r1_itm", "ITC": "r1_itc"},
            "R@1, contrast alone": {"": "r1_itc"},
            # The arm without ITM has no matching to rank by.
            "R@1 of 200, matching alone": {one.name: "r1_matching" for one in ARMS[1:]},
        },
        "ITC",
        given.output_dir / "objectives.json",
    )


if __name__ == "__main__":
    main()
