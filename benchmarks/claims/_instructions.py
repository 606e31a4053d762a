"""What the claims of the LLM line share: a small tower, a small language model that has read of scenes in words, and
exact answers about scenes that no part has seen."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from _claims import RUNNING, WORLD, Arm, Results, arguments, changes_of, measured, report, trained, write_text

from hf_vlp.resources import resource_folder

TEST_CONVERSATIONS = 300
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def preset(name: str) -> dict[str, Any]:
    """Settings of `training_scripts/<name>.yaml` that decide a run's result."""
    path = resource_folder("training_scripts") / f"{name}.yaml"
    return {
        option: str(value).lower() if isinstance(value, bool) else value
        for option, value in yaml.safe_load(path.read_text(encoding="utf-8")).items()
        if option not in RUNNING
    }


TOWER = preset("clip_row_cpu")


def language_model(given: argparse.Namespace) -> Path:
    """Folder of the language model, which all recipes and seeds share, as recipes share a Vicuna."""
    from hf_vlp.training.told import told_texts

    settings = preset("language_model_told_cpu")
    count, scenes = settings.pop("told_scenes"), settings.pop("shapes_preset")
    # In a file, where it can be looked at.
    path = given.output_dir / "text" / f"told_{count}.jsonl"
    if not path.is_file():
        write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in told_texts(count, scenes)))
    return run("language_model", "language model", settings, 0, given, text_file=str(path)) / "model"


def run(
    script: str, name: str, settings: Mapping[str, Any], seed: int, given: argparse.Namespace, **more: Any
) -> Path:
    """Folder of a run, trained unless it is there."""
    options = {**settings, **more}
    if given.steps is not None and options["max_steps"] > given.steps:
        options |= changes_of(given)
    return trained(Arm(name, (), script, tuple(options.items())), seed, given.output_dir, {})


def exact_answers(model: Path, given: argparse.Namespace, template: str | None = None) -> dict[str, float]:
    """Share of right answers, over all and by kind."""
    from hf_vlp.evaluation.run import run_evaluation

    result = run_evaluation(
        "instructions", model, "shapes", split=given.split, batch_size=50, show_progress=False,
        data_options={**WORLD, "short": True, "size": given.conversations},
        **({} if template is None else {"template": template}),
    )  # fmt: skip
    metrics = {name: value for name, value in result["metrics"].items() if isinstance(value, int | float)}
    return metrics | {f"exact_{kind}": value for kind, value in (result.get("per_kind") or {}).items()}


def compare_answers(
    description: str,
    arms: Sequence[str],
    trained_arm: Callable[[str, int, argparse.Namespace], Path],
    path: str,
    measure: Callable[[Path, int, argparse.Namespace], dict[str, float]],
    more_columns: Mapping[str, str] | None = None,
) -> None:
    """Trains and measures arms over seeds and reports their exact answers; the first one is what others are compared
    with.

    Args:
        description: of `--help`.
        trained_arm: folder of the last run of an arm.
        path: of the JSON, in the output folder.
        measure: (exported model, seed, command line) to metrics.
        more_columns: column -> metric.
    """

    def options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--conversations", type=int, default=TEST_CONVERSATIONS, help="Of the evaluation.")
        parser.add_argument("--split", default="test", choices=["test", "validation"], help="Tune on validation.")

    from hf_vlp.data.shapes.instructions import KINDS

    given = arguments(description, list(arms), options)
    changes_of(given)  # For the threads.
    results: Results = {}
    name = f"instructions_{given.split}_{given.conversations}"
    for seed in given.seeds:
        for arm in given.arms:
            folder = trained_arm(arm, seed, given)
            results.setdefault(arm, {})[seed] = measured(
                folder, name, lambda model, seed=seed: measure(model, seed, given)
            )
            print(f"{arm}, seed {seed}: {results[arm][seed]} ({folder})", flush=True)
    columns = {"exact": "exact", "first turn": "exact_first_turn", "later turns": "exact_later_turns"}
    columns |= {kind: f"exact_{kind}" for kind in KINDS} | dict(more_columns or {})
    report(
        f"Exact answers about unseen scenes ({given.split} split): ± over seeds",
        results,
        {column: {"": metric} for column, metric in columns.items()},
        arms[0],
        given.output_dir / path,
    )
