"""`hf-vlp demo`: the whole line on a laptop's CPU, from drawn scenes to a folder that plain transformers loads.

A small EVA-CLIP learns from scratch on pairs of scenes and captions, and a small OPT from text alone. Then the image
encoder is frozen and a Q-Former learns from it (BLIP-2 stage 1), then the language model is frozen as well and the
Q-Former learns to speak to it (stage 2). Each step is a call of a script of `training_scripts/`, which the demo
prints, so that it can be repeated by hand with other data.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_vlp.resources import resource_folder

PRESET = "row"
MODEL_FOLDER = "blip2-opt-shapes"
FEATURES = "features"
TRAINING_SCENES = 20_000
TEXTS = 20_000
UNSEEN_SCENES = 300
# How many candidates ITM puts in order again. More helps little: the true one is nearly always among these.
RERANK = 16


@dataclass(frozen=True)
class Step:
    """A call of a training script.

    Attributes:
        folder: under the output folder.
        title: what happens, for the terminal and the report.
        script: name in `training_scripts/`.
        max_steps: optimizer steps at full length.
        arguments: the other arguments of the script. `{out}` stands for the output folder, `{scenes}`
            for the number of training scenes.
    """

    folder: str
    title: str
    script: str
    max_steps: int
    arguments: Mapping[str, Any]


_EVERYWHERE = {"eval_split": "none", "save_strategy": "no", "resume": "never", "logging_steps": 20, "sanity_steps": 1}
# The image encoder is frozen from stage 1 on, so each picture is encoded once.
_CACHED = {"feature_cache": "{out}/" + FEATURES}
_PAIRS = {"shapes_preset": PRESET, "shapes_size": "{scenes}"}

STEPS = (
    Step(
        "clip",
        "CLIP: image and text towers from scratch",
        "clip",
        700,
        {
            "model_type": "eva_clip",
            "image_size": 40,
            "learning_rate": 2e-3,
            "weight_decay": 0.05,
            "per_device_train_batch_size": 96,
            **_PAIRS,
        },
    ),
    Step(
        "language_model",
        "A language model on text alone",
        "language_model",
        400,
        {"text_file": "{out}/text.txt", "per_device_train_batch_size": 64},
    ),
    Step(
        "stage1",
        "BLIP-2 stage 1: a Q-Former before the frozen image tower",
        "blip2_stage1",
        1100,
        {
            "vision_model": "{out}/clip/model",
            # What an object looks like and where it stands is plainest in the middle of this small tower: its last
            # layers only prepare the one feature that CLIP compares.
            "drop_last_layers": 2,
            # In a deeper Q-Former from scratch all queries end up saying the same.
            "qformer_layers": 2,
            "num_query_tokens": 8,
            "cross_attention_frequency": 1,
            "qformer_dropout": 0,
            "per_device_train_batch_size": 64,
            **_CACHED,
            **_PAIRS,
        },
    ),
    Step(
        "stage2",
        "BLIP-2 stage 2: the Q-Former before the frozen language model",
        "blip2_stage2",
        3500,
        {
            "stage1": "{out}/stage1/model",
            "language_model": "{out}/language_model/model",
            # Small batches: what counts here is the number of steps in which the queries take different roles.
            "per_device_train_batch_size": 32,
            "learning_rate": 1.5e-3,
            **_CACHED,
            **_PAIRS,
        },
    ),
)


def scaled(count: int, scale: float, least: int = 100) -> int:
    """So many scenes or texts of a demo that takes the share `scale` of its steps."""
    return max(least, round(count * min(1.0, scale)))


def command_of(step: Step, output: Path, scale: float, seed: int) -> list[str]:
    """The command line of a step."""
    scripts = resource_folder("training_scripts")
    steps = max(2, round(step.max_steps * scale))
    arguments = {
        **step.arguments,
        "max_steps": steps,
        "warmup_steps": max(1, steps // 10),
        "output_dir": "{out}/" + step.folder,
        "seed": seed,
        **_EVERYWHERE,
    }
    command = [
        sys.executable,
        str(scripts / f"{step.script}.py"),
        "--config",
        str(scripts / f"{step.script}_cpu.yaml"),
    ]
    for name, value in arguments.items():
        command += [f"--{name}", str(value).format(out=output, scenes=scaled(TRAINING_SCENES, scale))]
    return command


class Demo:
    """One run of the demo.

    Args:
        output: folder of everything that it writes.
        scale: share of the training steps that are taken, and below 1 of the scenes and texts as well; the models then
            stay worse than they could be.
        seed: of weights, scenes and order.
        say: how it speaks.
    """

    def __init__(self, output: Path, *, scale: float = 1.0, seed: int = 0, say: Any = print) -> None:
        self.output = output
        self.scale = scale
        self.seed = seed
        self.say = say
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def run(self) -> dict[str, Any]:
        """Trains, measures, writes the report; returns what `metrics.json` holds."""
        from hf_vlp.hub import name_repository

        self.output.mkdir(parents=True, exist_ok=True)
        for step in STEPS:
            shutil.rmtree(self.output / step.folder, ignore_errors=True)
        for folder in (MODEL_FOLDER, FEATURES):
            shutil.rmtree(self.output / folder, ignore_errors=True)
        self.write_text()
        for step in STEPS:
            self.train(step)
        shutil.rmtree(self.output / FEATURES)
        shutil.move(self.output / "stage2" / "model", self.output / MODEL_FOLDER)
        name_repository(self.output / MODEL_FOLDER, MODEL_FOLDER)
        self.say(f"\n[{self.seconds:4.0f} s] Evaluation on scenes that were never trained", flush=True)
        findings = self.evaluate()
        metrics = {"seconds": round(self.seconds, 1), **findings.pop("metrics")}
        (self.output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        self.write_report(metrics, findings)
        return metrics

    def write_text(self) -> None:
        """The language model's text: scenes that are in no data set of pairs, each described twice.

        The second time behind another begin token: that is where a caption stands in stage 2, with the queries in
        front of it. A language model that has only read sentences one by one cannot be told what to say.
        """
        from hf_vlp.data.shapes import shapes_texts
        from hf_vlp.training.text import BREAK

        texts = shapes_texts(
            scaled(TEXTS, self.scale),
            preset=PRESET,
            seed=self.seed,
            sentences=2,
            separator=BREAK,
            all_combinations=True,
        )
        (self.output / "text.txt").write_text("\n".join(texts) + "\n")

    def train(self, step: Step) -> None:
        """Runs the script of a step as a process of its own, as a user would.

        Raises:
            RuntimeError: it failed.
        """
        command = command_of(step, self.output, self.scale, self.seed)
        self.say(f"\n[{self.seconds:4.0f} s] {step.title}", flush=True)
        self.say("  python " + " ".join(command[1:]), flush=True)
        status = subprocess.run(command, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"}).returncode
        if status:
            raise RuntimeError(f"{step.title!r} ended with status {status}; what it said stands above")

    def evaluate(self) -> dict[str, Any]:
        """Captions and retrieval on scenes of the splits `test` and `heldout`."""
        from hf_vlp.data.shapes import load_shapes
        from hf_vlp.evaluation import evaluate_retrieval, evaluate_shapes_captions, load_model_and_processor

        options = {"size": scaled(UNSEEN_SCENES, self.scale, 40), "seed": self.seed, "preset": PRESET}
        unseen, heldout = (load_shapes(split, **options) for split in ("test", "heldout"))
        captioner, processor = load_model_and_processor(self.output / MODEL_FOLDER, "captioning")
        captions = {
            name: evaluate_shapes_captions(captioner, processor, rows, details=True)
            for name, rows in (("unseen", unseen), ("heldout", heldout))
        }
        gallery = load_shapes("test", unique=True, **options)
        matcher, matcher_processor = load_model_and_processor(self.output / "stage1" / "model", "retrieval")
        retrieval = evaluate_retrieval(matcher, matcher_processor, gallery, rerank=RERANK)["metrics"]
        metrics = {
            f"{measure}_{name}": round(result["metrics"][measure], 4)
            for name, result in captions.items()
            for measure in ("object_accuracy", "scene_accuracy")
        }
        for direction in ("t2i", "i2t"):
            for depth in (1, 5, 10):
                for by in ("itc", "itm"):
                    key = f"{direction}_r{depth}_{by}"
                    metrics[key] = round(retrieval[key], 4)
        return {
            "metrics": metrics,
            "captions": captions,
            "rows": {"unseen": unseen, "heldout": heldout, "gallery": gallery},
            "matcher": (matcher, matcher_processor),
        }

    def write_report(self, metrics: Mapping[str, Any], findings: Mapping[str, Any]) -> None:
        """`report.html` beside the models."""
        from hf_vlp.cli.demo_report import demo_report

        demo_report(
            self.output / "report.html",
            metrics=metrics,
            steps=[(step.title, self.output / step.folder) for step in STEPS],
            usage=usage(self.output / MODEL_FOLDER),
            **findings,
        )


def usage(folder: Path) -> str:
    """The lines that load the result, as they are printed and stand in the report."""
    return f"""\
from transformers import AutoModelForImageTextToText, AutoProcessor
from PIL import Image

model = AutoModelForImageTextToText.from_pretrained("{folder}")
processor = AutoProcessor.from_pretrained("{folder}")
inputs = processor(images=Image.open("scene.png").convert("RGB"), text="", return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=30)
print(processor.batch_decode(ids, skip_special_tokens=True)[0].strip())

# or, with hf_vlp installed, from the picture alone:
import hf_vlp
from transformers import pipeline
print(pipeline("image-to-text", model="{folder}")("scene.png"))"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `hf-vlp demo`."""
    parser = argparse.ArgumentParser(prog="hf-vlp demo", description=__doc__.split("\n\n", 1)[1])
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="folder to write (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and scenes (%(default)s)")
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="share of the training steps to take; 0.01 only shows that everything runs (%(default)s)",
    )
    arguments = parser.parse_args(argv)
    if arguments.scale <= 0:
        parser.error("--scale must be above 0")
    demo = Demo(arguments.output, scale=arguments.scale, seed=arguments.seed)
    try:
        metrics = demo.run()
    except RuntimeError as error:
        print(f"hf-vlp demo: {error}", file=sys.stderr)
        return 1
    print(json.dumps(metrics, indent=2))
    print(f"\nDone in {metrics['seconds']:.0f} s. Look at {arguments.output / 'report.html'}; load the model with:\n")
    print(usage(arguments.output / MODEL_FOLDER))
    return 0


if __name__ == "__main__":
    sys.exit(main())
