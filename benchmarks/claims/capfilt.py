"""Claim: a set that a captioner and a filter made out of noisy web data is better to pretrain on than the web data.

    python benchmarks/claims/capfilt.py [--seeds 0 1 2] [--arms none "both (nucleus)"] [--recipe blip]

BLIP (arXiv 2201.12086), section 3.3 and tables 1 and 2, on Shapes with 40% wrong captions as the web and 1,000 clean
scenes as what people wrote. Per seed: pretrain on web and human data; fine-tune captioner and filter on the human
part; bootstrap; pretrain anew, from scratch and for as many steps, on every set; compare on clean test scenes. "none"
is the first pretraining itself. Each training and each set is made once and resumed where it was stopped, so arms and
seeds may be run one by one, or on several machines with one folder.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _claims
from _claims import Arm, Results, arguments, changes_of, measured, report, retrieval_metrics, trained

NOISE = 0.4
WEB_SCENES = 8000
HUMAN_SCENES = 1000
# Arm -> (method of the captioner or None, is there a filter?), in the order of the paper's table.
ARMS: dict[str, tuple[str | None, bool]] = {
    "none": (None, False),
    "filter only": (None, True),
    "captioner only (beam)": ("beam", False),
    "captioner only (nucleus)": ("nucleus", False),
    "both (beam)": ("beam", True),
    "both (nucleus)": ("nucleus", True),
}


@dataclass(frozen=True)
class Recipe:
    """How models are made. In options `{web}` is the first set, `{human}` the clean part, `{text}` a file of
    sentences, and `{name}` the model of an earlier step; `{pretrained}` is the model of the first pretraining.

    Attributes:
        pretraining: script and options, without the data.
        steps: name -> script and options; `captioner` and `filter` must be among them.
        prompt: what the captioner goes on from.
    """

    pretraining: tuple[str, dict[str, Any]]
    steps: dict[str, tuple[str, dict[str, Any]]]
    prompt: str | None = None


_ALBEF = {name: value for name, value in _claims.ALBEF.items() if not name.startswith("shapes_")}
_SHORT = {"per_device_train_batch_size": 64, "weight_decay": 0.05}
_FILTER = ("finetune_retrieval", {
    "model_name_or_path": "{pretrained}", "train_data": "{human}", **_SHORT,
    "max_steps": 300, "learning_rate": 3e-4, "warmup_steps": 30,
})  # fmt: skip

_CAPTIONER = ("finetune_captioning", {
    "model_name_or_path": "{pretrained}", "train_data": "{human}", "prompt": "a picture of", **_SHORT,
    "max_steps": 300, "learning_rate": 3e-4, "warmup_steps": 30,
})  # fmt: skip


def _from(start: str, step: tuple[str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """A step that goes on from another model."""
    return step[0], {**step[1], "model_name_or_path": start}


RECIPES: dict[str, Recipe] = {
    # As in the paper: one pretrained BLIP becomes captioner and filter.
    "blip": Recipe(("blip", _ALBEF), {"captioner": _CAPTIONER, "filter": _FILTER}, prompt="a picture of"),
    # Captioner and filter come from a pretraining of 1,500 steps; what is compared is as above. For the question
    # whether the loop gains more from models that have learned more.
    "blip_taught_longer": Recipe(
        ("blip", _ALBEF),
        {
            "teacher": ("blip", {**_ALBEF, "train_data": "{web}", "max_steps": 1500}),
            "captioner": _from("{teacher}", _CAPTIONER),
            "filter": _from("{teacher}", _FILTER),
        },
        prompt="a picture of",
    ),
    # ALBEF is what is compared and what filters; it writes nothing, so BLIP-2 captions.
    "albef": Recipe(
        ("albef", _ALBEF),
        {
            "tower": ("clip", {
                "model_type": "eva_clip", "size": "nano", "image_size": 40, "vocab_size": 600, "train_data": "{web}",
                **_SHORT, "max_steps": 500, "learning_rate": 1e-3, "warmup_steps": 50,
            }),
            "language": ("language_model", {
                "text_file": "{text}", "hidden_size": 96, "num_hidden_layers": 3, "vocab_size": 600,
                **_SHORT, "max_steps": 500, "learning_rate": 1e-3, "warmup_steps": 50,
            }),
            "stage1": ("blip2_stage1", {
                "vision_model": "{tower}", "qformer_size": "nano", "num_query_tokens": 8, "qformer_dropout": 0,
                "cross_attention_frequency": 1, "image_text_hidden_size": 64, "vocab_size": 600,
                "train_data": "{web}", **_SHORT, "max_steps": 400, "learning_rate": 1e-3, "warmup_steps": 40,
            }),
            "captioner": ("blip2_stage2", {
                "stage1": "{stage1}", "language_model": "{language}", "train_data": "{human}",
                **_SHORT, "max_steps": 400, "learning_rate": 1e-3, "warmup_steps": 40,
            }),
            "filter": _FILTER,
        },
    ),
}  # fmt: skip


class Loop:
    """The whole loop of one seed.

    Args:
        recipe: how models are made.
        seed: of weights, scenes and sampled captions.
        folder: of runs and sets.
        changes: settings that the command line changes in every training.
        scenes: web and human scenes.
    """

    def __init__(
        self, recipe: Recipe, seed: int, folder: Path, changes: Mapping[str, Any], scenes: tuple[int, int]
    ) -> None:
        self.recipe, self.seed, self.folder, self.changes = recipe, seed, folder, changes
        self.web_scenes, self.human_scenes = scenes
        self._models: dict[str, Path] = {}
        self._sets: dict[str, Path] = {}

    def sources(self, *origins: str) -> list[Any]:
        """Web scenes with wrong captions, and human ones behind them, which have none."""
        from hf_vlp.bootstrapping import open_source

        stop = self.web_scenes + self.human_scenes
        splits = {"web": f"train[:{self.web_scenes}]", "human": f"train[{self.web_scenes}:{stop}]"}
        noise = {"web": NOISE, "human": 0.0}
        return [
            open_source("shapes", origin, splits[origin], **_claims.WORLD, caption_noise=noise[origin], seed=self.seed)
            for origin in origins
        ]

    def written(self, name: str, origins: Sequence[str], **models: Any) -> Path:
        """Folder of a set; made, or made to its end, unless it is there."""
        from hf_vlp.bootstrapping import CapFiltSettings, capfilt

        parts = {key: model.recorded() for key, model in models.items() if model is not None}
        described = json.dumps([name, origins, self.seed, self.web_scenes, self.human_scenes, parts], sort_keys=True)
        folder = self.folder / "sets" / hashlib.sha256(described.encode()).hexdigest()[:16]
        if name not in self._sets:
            settings = CapFiltSettings(seed=self.seed, unit_size=1000)
            capfilt(folder, self.sources(*origins), settings=settings, batch_size=64, say=print, **models)
            self._sets[name] = folder
        return folder

    def model(self, name: str) -> Path:
        """Folder of the model of a step, trained unless it is there."""
        if name not in self._models:
            script, options = self.recipe.steps[name]
            filled = {key: self.filled(value) for key, value in options.items()}
            run = trained(Arm(name, tuple(filled.items()), script, ()), self.seed, self.folder, self.changes)
            self._models[name] = run / "model"
        return self._models[name]

    def filled(self, value: Any) -> Any:
        """An option with the folder that it names."""
        if not (isinstance(value, str) and value.startswith("{")):
            return value
        name = value.strip("{}")
        makers = {
            "web": lambda: self.written("none", ("web", "human")),
            "human": lambda: self.written("human", ("human",)),
            "text": self.text,
            "pretrained": lambda: self.pretrained("none") / "model",
        }
        return str(makers[name]() if name in makers else self.model(name))

    def text(self) -> Path:
        """Sentences for the language model, about scenes that are in no set."""
        from hf_vlp.data import shapes_texts

        path = self.folder / f"text-{self.seed}.txt"
        if not path.is_file():
            texts = shapes_texts(20_000, seed=self.seed, sentences=3, all_combinations=True, **_claims.WORLD)
            _claims.write_text(path, "\n".join(texts) + "\n")
        return path

    def set_of(self, arm: str) -> Path:
        """Folder of the set of an arm."""
        from hf_vlp.bootstrapping import Captioner, TextFilter
        from hf_vlp.bootstrapping.captioner import CaptionSettings
        from hf_vlp.evaluation.run import load_model_and_processor

        method, filtered = ARMS[arm]
        models: dict[str, Any] = {}
        if method is not None:
            settings = CaptionSettings(method=method, max_new_tokens=24, prompt=self.recipe.prompt)
            models["captioner"] = Captioner(*load_model_and_processor(self.model("captioner"), "captioning"), settings)
        if filtered:
            models["text_filter"] = TextFilter(*load_model_and_processor(self.model("filter"), "retrieval"))
        return self.written("none" if not models else arm, ("web", "human"), **models)

    def pretrained(self, arm: str) -> Path:
        """Run of the pretraining on the set of an arm."""
        script, options = self.recipe.pretraining
        common = tuple({**options, "train_data": str(self.set_of(arm))}.items())
        return trained(Arm(arm, (), script, common), self.seed, self.folder, self.changes)

    def metrics(self, arm: str) -> dict[str, float]:
        """Retrieval of the model that was pretrained on an arm's set, and how true the set is."""
        run = self.pretrained(arm)
        quality = truth_of(self.set_of(arm), self.seed)
        return {**measured(run, "recall", retrieval_metrics), **quality}


def truth_of(folder: Path, seed: int) -> dict[str, float]:
    """How many texts of web images a set has, and which share of them, of the web's and of the captioner's (those that
    are not the web's own) names every object of the scene and no other."""
    from hf_vlp.data import ShapesConfig, ShapesWorld, load_pairs, score_caption

    world = ShapesWorld(ShapesConfig.preset(_claims.WORLD["preset"]), "train", seed)
    right: dict[str, list[bool]] = {"web": [], "synthetic": []}
    for row in load_pairs(folder):
        scene = world.scene(int(row["key"]))
        for text, origin in zip(row["text"], row["origin"], strict=True):
            if origin != "human":
                right[origin].append(score_caption(text, scene).exact)
    everything = right["web"] + right["synthetic"]
    shares = {f"true_{origin}": sum(found) / len(found) for origin, found in right.items() if found}
    return {"texts": float(len(everything)), "true_texts": sum(everything) / max(1, len(everything)), **shares}


def over_seeds(given: Any) -> Iterator[tuple[int, Loop]]:
    """The loops of all seeds."""
    changes = changes_of(given)
    scenes = (WEB_SCENES, HUMAN_SCENES) if given.scenes is None else (given.scenes, max(1, given.scenes // 8))
    for seed in given.seeds:
        yield seed, Loop(RECIPES[given.recipe], seed, given.output_dir, changes, scenes)


def add_options(parser: Any) -> None:
    """The options of this claim alone."""
    parser.add_argument("--recipe", default=next(iter(RECIPES)), choices=list(RECIPES), help="Which models.")
    parser.add_argument("--scenes", type=int, help="Fewer web scenes, to try the script; another result.")


def main() -> None:
    given = arguments(__doc__, list(ARMS), add_options)
    results: Results = {}
    for seed, loop in over_seeds(given):
        for arm in given.arms:
            results.setdefault(arm, {})[seed] = loop.metrics(arm)
            print(f"{arm}, seed {seed}: {results[arm][seed]}", flush=True)
    report(
        f"CapFilt at {NOISE:.0%} caption noise ({given.recipe}): mean Recall@1 of both directions, ± over seeds",
        results,
        {
            "R@1, re-ranked": {"": "r1_itm"},
            "R@1, contrast alone": {"": "r1_itc"},
            "R@1 of 200, matching alone": {"": "r1_matching"},
            "texts of web images": {"": "texts"},
            "share of them that is true": {"": "true_texts"},
            "of the web's": {"": "true_web"},
            "of the captioner's": {"": "true_synthetic"},
        },
        "none",
        given.output_dir / f"capfilt_{given.recipe}.json",
    )


if __name__ == "__main__":
    main()
