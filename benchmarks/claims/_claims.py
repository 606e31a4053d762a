"""What the claims share: arms that are trained over seeds, kept on disk, and compared.

A run is named by a hash of what decides its result. It is trained once, whichever claim asks for it, and goes on from
its last checkpoint when it was stopped; its metrics are written last. So every script can be stopped and started
again, and may run arm by arm (`--arms`), seed by seed (`--seeds`), on several machines with one folder.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from hf_vlp.resources import resource_folder

# One world for all claims: 88 combinations of colour and shape, one or two objects side by side on white, 40 px.
WORLD = {"preset": "row"}
# The same as options of a training script.
SCENES = {f"shapes_{name}": value for name, value in WORLD.items()}
TEST_SCENES = 500
# Scenes of which every pair is scored by matching.
MATCHED_SCENES = 200
# A small ALBEF that learns this world in some minutes of one core.
ALBEF = {
    "size": "nano",
    "image_size": 40,
    "patch_size": 8,
    "projection_dim": 64,
    "dropout": 0.0,
    "vocab_size": 400,
    "queue_size": 512,
    "momentum": 0.99,
    "alpha": 0.4,
    **SCENES,
    "shapes_size": 8000,
    "per_device_train_batch_size": 64,
    "max_steps": 600,
    "learning_rate": 1e-3,
    "weight_decay": 0.02,
    "warmup_steps": 100,
}
# What does not decide the result.
RUNNING = {
    "eval_split": "none",
    "max_eval_samples": 1000,
    "sanity": "false",
    "save_steps": 250,
    "save_total_limit": 1,
    "logging_steps": 50,
    "disable_tqdm": "true",
    "use_cpu": "true",
}


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Attributes:
        name: in the table.
        options: arguments of `script` that differ from the common ones.
        script: of `training_scripts/`.
        common: arguments that all arms share.
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()
    script: str = "albef"
    common: tuple[tuple[str, Any], ...] = tuple(ALBEF.items())

    def settings(self, seed: int, changes: Mapping[str, Any]) -> dict[str, Any]:
        """All that decides the run's result."""
        return {**dict(self.common), **dict(self.options), **changes, "seed": seed}


def arm(name: str, script: str = "albef", **options: Any) -> Arm:
    """An `Arm` from keyword arguments."""
    return Arm(name, tuple(options.items()), script)


def training_script(name: str) -> ModuleType:
    """The module of a training script."""
    path = resource_folder("training_scripts") / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"training_scripts_{name}", path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up while they are made.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def command_line(settings: Mapping[str, Any]) -> list[str]:
    """`{"a": 1, "b": ["x", "y"]}` -> `["--a", "1", "--b", "x", "y"]`."""
    argv: list[str] = []
    for name, value in settings.items():
        argv += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return argv


def trained(arm: Arm, seed: int, folder: Path, changes: Mapping[str, Any]) -> Path:
    """Folder of the trained run of an arm; trains it unless it is there."""
    settings = arm.settings(seed, changes)
    described = json.dumps({"script": arm.script, **settings}, sort_keys=True)
    run = folder / "runs" / hashlib.sha256(described.encode()).hexdigest()[:16]
    done = run / "seconds.json"
    if not done.is_file():
        run.mkdir(parents=True, exist_ok=True)
        (run / "run.json").write_text(described + "\n")
        started = time.process_time()
        argv = command_line(settings | RUNNING | {"output_dir": run})
        training_script(arm.script).main(argv)
        for checkpoint in run.glob("checkpoint-*"):
            # The model is exported; what is left of the checkpoints only takes room.
            shutil.rmtree(checkpoint)
        write_json(done, {"process_seconds_of_the_last_start": time.process_time() - started})
    return run


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """As `write_text`."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def measured(run: Path, name: str, measure: Callable[[Path], dict[str, float]]) -> dict[str, float]:
    """The metrics of a run under a name; measured once."""
    path = run / f"{name}.json"
    if not path.is_file():
        write_json(path, measure(run / "model"))
    return json.loads(path.read_text())


def _retrieval(model: Path, scenes: int, rerank: int) -> dict[str, float]:
    from hf_vlp.evaluation.run import run_evaluation

    options = {**WORLD, "unique": True, "size": scenes}
    result = run_evaluation(
        "retrieval", model, "shapes", data_options=options, batch_size=100, rerank=rerank, show_progress=False
    )
    metrics = result["metrics"]
    for stage in ("itc", "itm"):
        metrics[f"r1_{stage}"] = (metrics[f"i2t_r1_{stage}"] + metrics[f"t2i_r1_{stage}"]) / 2
    return metrics


def retrieval_metrics(model: Path) -> dict[str, float]:
    """Recall on scenes of the test split that captions can tell apart: by contrast alone, re-ranked by matching, and,
    as `r1_matching`, among fewer scenes by matching alone, which no shortlist limits."""
    metrics = _retrieval(model, TEST_SCENES, rerank=32)
    return metrics | {"r1_matching": _retrieval(model, MATCHED_SCENES, rerank=MATCHED_SCENES)["r1_itm"]}


def arguments(
    description: str, arms: Sequence[str], more: Callable[[argparse.ArgumentParser], None] | None = None
) -> argparse.Namespace:
    """The command line that all claims have; `more` adds what one has alone."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/claims"), help="Runs and results.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(arms), choices=list(arms), help="Train only these.")
    parser.add_argument("--steps", type=int, help="Fewer training steps, to try the script; another result.")
    parser.add_argument("--threads", type=int, default=1, help="Of torch; the result may differ in rounding.")
    if more is not None:
        more(parser)
    return parser.parse_args()


def changes_of(given: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line changes in every arm; also puts `--threads` into effect."""
    import torch

    torch.set_num_threads(given.threads)
    if given.steps is None:
        return {}
    return {"max_steps": given.steps, "warmup_steps": max(1, given.steps // 10)}


Results = dict[str, dict[int, dict[str, float]]]


def over_arms(
    arms: Sequence[Arm], given: argparse.Namespace, name: str, measure: Callable[[Path], dict[str, float]]
) -> Results:
    """Trains and measures every arm with every seed: arm -> seed -> metrics."""
    changes = changes_of(given)
    results: Results = {}
    for seed in given.seeds:
        for one in arms:
            if one.name not in given.arms:
                continue
            run = trained(one, seed, given.output_dir, changes)
            results.setdefault(one.name, {})[seed] = measured(run, name, measure)
            print(f"{one.name}, seed {seed}: done ({run})", flush=True)
    return results


def report(
    claim: str, results: Results, metrics: Mapping[str, Mapping[str, str]], baseline: str, path: Path
) -> dict[str, Any]:
    """Prints the table of a claim and writes it, with every number behind it, as JSON.

    Args:
        claim: one sentence.
        results: of `over_arms`.
        metrics: column -> arm -> name of the metric; `""` is every other arm. An arm may lack a metric.
        baseline: the arm that the others are compared with, seed by seed.
        path: of the JSON.
    """
    table: dict[str, Any] = {}
    lines = [claim, "", "| arm | " + " | ".join(metrics) + " |", "|---|" + "---|" * len(metrics)]
    for name, seeds in results.items():
        cells = []
        for column, of_arm in metrics.items():
            metric = of_arm.get(name, of_arm.get(""))
            values = {seed: found[metric] for seed, found in seeds.items() if metric in found}
            if not values:
                cells.append("–")
                continue
            spread = statistics.stdev(values.values()) if len(values) > 1 else 0.0
            mean = statistics.fmean(values.values())
            entry = {"mean": mean, "std": spread, "seeds": values}
            cell = f"{mean:.3f} ± {spread:.3f}"
            if name != baseline and baseline in results:
                other = results[baseline]
                key = of_arm.get(baseline, of_arm.get(""))
                gains = [values[seed] - other[seed][key] for seed in values if key in other.get(seed, {})]
                if gains:
                    entry["gain"] = {"mean": statistics.fmean(gains), "seeds": gains}
                    above = sum(gain > 0 for gain in gains)
                    cell += f" ({statistics.fmean(gains):+.3f}; above on {above} of {len(gains)} seeds)"
            table.setdefault(name, {})[column] = entry
            cells.append(cell)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    text = "\n".join(lines)
    print(f"\n{text}\n")
    found = {"claim": claim, "baseline": baseline, "table": table, "markdown": text}
    write_json(path, found)
    return found
