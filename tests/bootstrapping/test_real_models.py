"""Real (tiny) models: BLIP-2 writes, BLIP-2 and ALBEF judge, and what comes out trains with the scripts."""

from pathlib import Path
from typing import Any

import pytest

from hf_vlp.bootstrapping import CapFiltSettings, Captioner, Source, TextFilter, capfilt, read_texts
from hf_vlp.bootstrapping.captioner import CaptionSettings
from hf_vlp.bootstrapping.text_filter import FilterSettings
from hf_vlp.data import load_pairs
from tests.bootstrapping.jobs import contents
from tests.bootstrapping.scripts import script
from tests.bootstrapping.test_text_filter import albef_filter
from tests.distributed import run_ranks
from tests.tiny import blip2

ROWS = {"size": 9, "preset": "simple", "caption_noise": 0.4}


def run(output: Path, judge: TextFilter | None = None, **options: Any) -> dict[str, Any]:
    captioner = Captioner(
        blip2.generation_model(), blip2.generation_processor(), CaptionSettings(max_new_tokens=8, samples=2)
    )
    judge = judge or TextFilter(blip2.retrieval_model(), blip2.retrieval_processor(), FilterSettings(0.4, -0.9))
    return capfilt(
        output,
        [Source(load_pairs("shapes", **ROWS))],
        captioner=captioner,
        text_filter=judge,
        settings=CapFiltSettings(unit_size=4, gallery=4),
        say=lambda line: None,
        **{"batch_size": 4, "workers": 0, **options},
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("real") / "set"
    run(output)
    return output


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_do_not_change_the_texts(whole: Path, tmp_path: Path, batch_size: int):
    run(tmp_path / "set", batch_size=batch_size, text_batch_size=2)
    first, other = read_texts(whole), read_texts(tmp_path / "set")
    assert [text["text"] for text in first] == [text["text"] for text in other]
    assert [text["itm"] for text in other] == pytest.approx([text["itm"] for text in first], abs=2e-5)
    assert len({text["text"] for text in first if text["origin"] == "synthetic"}) > 9


def on_a_rank(output: Path) -> None:
    run(output)


@pytest.mark.slow
def test_two_processes_write_the_set_of_one(whole: Path, tmp_path: Path):
    run_ranks(on_a_rank, 2, tmp_path / "set")
    assert contents(tmp_path / "set") == contents(whole)


def test_albef_as_the_filter(tmp_path: Path):
    summary = run(tmp_path / "set", albef_filter(FilterSettings(0.5)))
    texts = read_texts(tmp_path / "set")
    assert all(text["kept"] == (text["itm"] >= 0.5) for text in texts if text["reason"] in ("", "itm"))
    assert summary["texts"]["synthetic"]["seen"] == 18


def test_the_set_trains_with_the_scripts(whole: Path, tmp_path: Path):
    line = (
        "--size nano --image_size 32 --vocab_size 600 --use_cpu --max_steps 2 --per_device_train_batch_size 4 "
        "--eval_split none --logging_steps 1 --save_strategy no --disable_tqdm true --sanity false"
    )
    script("clip").main([*line.split(), "--train_data", str(whole), "--output_dir", str(tmp_path)])
    assert (tmp_path / "model" / "model.safetensors").is_file()
