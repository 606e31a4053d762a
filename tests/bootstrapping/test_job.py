"""The job on fake models: what is kept, where it says it is from, what is counted, what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, List, Value

from hf_vlp.bootstrapping import JobError, SettingsChanged, Source, capfilt, read_texts, sampling_seed
from hf_vlp.data import ErrorRateExceeded, ImageTextCollator, PairDataset, RecordLimits, decode_image, load_pairs
from tests.bootstrapping.fakes import picture, rows
from tests.bootstrapping.jobs import captioner, contents, human_rows, run, text_filter
from tests.data.hostile import unusable_images, unusable_texts, usable_images
from tests.tiny import blip2


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("job") / "set"
    return output, run(output)


def test_every_text_is_judged_once_and_in_its_place(whole):
    output, _ = whole
    texts = read_texts(output)
    by_key: dict[tuple, list] = {}
    for text in texts:
        by_key.setdefault((text["source"], text["key"]), []).append(text)
    assert len(by_key) == 23 + 5
    for number, row in enumerate(rows(23)):
        own = by_key["fakes", f"key{number}"]
        assert [text["text"] for text in own if text["origin"] == "web"] == row["text"]
        assert [text["origin"] for text in own] == ["web"] * len(row["text"]) + ["synthetic"]
        assert own[-1]["sampling_seed"] == sampling_seed(0, ("web", 0, 0, number), 0)
        assert {text["image_id"] for text in own} == {f"image{number}"}
    assert all(text["kept"] and text["itm"] is None for text in texts if text["origin"] == "human")


def test_every_column_of_the_set(whole):
    output, _ = whole
    written, judge = captioner(), text_filter()
    kept = [text for text in read_texts(output) if text["kept"]]
    found = []
    for file in sorted(output.glob("train-*.parquet")):
        for row in pq.read_table(file).to_pylist():
            columns = [row[name] for name in ("text", "origin", "itm", "itc", "sampling_seed", "captioner", "filter")]
            for text, origin, itm, itc, seed, writer, by in zip(*columns, strict=True):
                found.append((row["source"], row["key"], text, origin, itm, itc, seed))
                assert by == (None if origin == "human" else judge.fingerprint)
                assert writer == (written.fingerprint if origin == "synthetic" else None)
                assert (seed is None) == (origin != "synthetic")
                assert itm is None if origin == "human" else itm >= 0.5
            number = int(row["key"].removeprefix("key"))
            if row["source"] == "fakes":
                assert row["image_id"] == f"web0:image{number}"
                assert decode_image(row["image"]).tobytes() == picture(number).tobytes()
            else:
                assert row["image_id"] == f"human-0-0-{number}"
                assert decode_image(row["image"]).tobytes() == picture(500 + number).tobytes()
    names = ("source", "key", "text", "origin", "itm", "itc", "sampling_seed")
    assert found == [tuple(text[name] for name in names) for text in kept]
    assert {"web", "synthetic", "human"} == {one[3] for one in found}


def test_dropped_texts_are_those_below_the_threshold(whole):
    texts = [text for text in read_texts(whole[0]) if text["origin"] != "human"]
    assert {text["reason"] for text in texts} == {"", "itm"}
    assert all((text["reason"] == "") == (text["itm"] >= 0.5) == text["kept"] for text in texts)


def test_the_summary_counts_all_of_it(whole):
    output, summary = whole
    texts = read_texts(output)
    for origin in ("web", "synthetic", "human"):
        own = [text for text in texts if text["origin"] == origin]
        counts = summary["texts"][origin]
        assert counts["seen"] == len(own)
        assert counts["kept"] == sum(text["kept"] for text in own)
        assert counts["seen"] == counts["kept"] + sum(counts["dropped"].values())
        assert sum(counts["histogram"]) == (0 if origin == "human" else len(own))
    assert summary["records"] == {"seen": 28, "bad": {}, "examples": {}}
    assert summary["images"] == len(load_pairs(output))
    assert json.loads((output / "_capfilt" / "summary.json").read_text()) == summary
    assert "web:" in summary["text"]
    assert "records a second" in summary["text"]


def test_the_set_opens_and_collates_as_any_other(whole):
    processor = blip2.retrieval_processor()
    pairs = load_pairs(whole[0])
    batch = ImageTextCollator(processor)([PairDataset(pairs)[index] for index in range(4)])
    assert batch["pixel_values"].shape[0] == batch["image_ids"].unique().numel() == 4
    streamed = list(load_pairs(whole[0], streaming=True))
    assert [row["text"] for row in streamed] == [row["text"] for row in pairs]


def test_the_webdataset_holds_the_same_pairs(whole, tmp_path: Path):
    run(tmp_path / "tars", settings={"format": "webdataset"})
    tars, tables = load_pairs(tmp_path / "tars"), load_pairs(whole[0])
    assert [row["text"] for row in tars] == [row["text"] for row in tables]
    assert [row["image_id"] for row in tars] == [row["image_id"] for row in tables]
    assert not list((tmp_path / "tars").glob("*.parquet"))


def test_a_second_run_does_nothing(whole):
    output, summary = whole
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.name != "gallery.html"}
    writer, judge = captioner(), text_filter()
    assert run(output, captioner=writer, text_filter=judge) == summary
    assert writer.model.batches == []
    assert judge.model.texts_scored == 0
    assert {p: p.stat().st_mtime_ns for p in output.rglob("*") if p.name != "gallery.html"} == before


@pytest.mark.parametrize(("batch_size", "workers", "texts"), [(1, 0, 3), (3, 2, 1), (64, 1, 500)])
def test_neither_batches_nor_threads_change_the_set(whole, tmp_path: Path, batch_size: int, workers: int, texts: int):
    run(tmp_path / "set", batch_size=batch_size, workers=workers, text_batch_size=texts)
    assert contents(tmp_path / "set") == contents(whole[0])


def test_the_seed_changes_sampled_texts_and_nothing_else(whole, tmp_path: Path):
    run(tmp_path / "set", settings={"seed": 1})
    first, other = read_texts(whole[0]), read_texts(tmp_path / "set")
    differs = [a["text"] != b["text"] for a, b in zip(first, other, strict=True)]
    assert sum(differs) > 15
    assert all(a["origin"] == "synthetic" for a, differ in zip(first, differs, strict=True) if differ)


def test_beams_have_no_seed(tmp_path: Path):
    run(tmp_path / "set", captioner=captioner(method="beam"))
    synthetic = [text for text in read_texts(tmp_path / "set") if text["origin"] == "synthetic"]
    assert len(synthetic) == 23
    assert all(text["sampling_seed"] is None for text in synthetic)


def test_several_samples(tmp_path: Path):
    summary = run(tmp_path / "set", captioner=captioner(samples=3))
    assert summary["texts"]["synthetic"]["seen"] == 3 * 23
    once = {text["key"]: text["text"] for text in read_texts(tmp_path / "set") if text["origin"] == "synthetic"}
    assert len(once) == 23


@pytest.mark.parametrize("arm", ["none", "filter", "captioner", "both"])
def test_the_four_arms(whole, tmp_path: Path, arm: str):
    models = {
        "captioner": captioner() if arm in ("captioner", "both") else None,
        "text_filter": text_filter() if arm in ("filter", "both") else None,
    }
    summary = run(tmp_path / "set", **models)
    texts = read_texts(tmp_path / "set")
    assert ("synthetic" in summary["texts"]) == (models["captioner"] is not None)
    assert any(text["reason"] == "itm" for text in texts) == (models["text_filter"] is not None)
    expected = {(t["source"], t["key"], t["text"], t["origin"]): t for t in read_texts(whole[0])}
    for text in texts:
        # A text gets the same scores in every arm; without a filter it gets none and stays.
        same = expected[text["source"], text["key"], text["text"], text["origin"]]
        assert text["itm"] == (same["itm"] if models["text_filter"] is not None else None)
        assert text["kept"] == (same["kept"] if models["text_filter"] is not None else True)


def test_both_thresholds(tmp_path: Path):
    run(tmp_path / "set", text_filter=text_filter(itc=0.5))
    texts = [text for text in read_texts(tmp_path / "set") if text["origin"] != "human"]
    for text in texts:
        assert text["reason"] == ("itm" if text["itm"] < 0.5 else "itc" if text["itc"] < 0.5 else "")
    assert {text["reason"] for text in texts} == {"", "itm", "itc"}


def test_a_stream_gives_the_set_of_the_table(tmp_path: Path):
    options = {"size": 14, "preset": "simple", "caption_noise": 0.4}
    sets = []
    for streaming in (False, True):
        output = tmp_path / str(streaming)
        run(output, sources=[Source(load_pairs("shapes", streaming=streaming, **options))])
        sets.append({name: value for name, value in contents(output).items() if name.startswith("train-")})
    assert sets[0] == sets[1]
    assert sets[0]


def test_duplicates_and_empty_captions(tmp_path: Path):
    source = Source([{"image": picture(1), "text": ["A red  Circle", "a red circle", "a star"], "key": "1"}])
    run(tmp_path / "set", sources=[source], text_filter=None, captioner=captioner(max_new_tokens=1, samples=4))
    texts = read_texts(tmp_path / "set")
    assert [text["reason"] for text in texts[:3]] == ["", "duplicate", ""]
    said = [text for text in texts if text["origin"] == "synthetic"]
    assert len(said) == 4
    assert {text["reason"] for text in said} <= {"", "duplicate", "text_empty"}
    assert len({text["text"] for text in said if text["kept"]}) == sum(text["kept"] for text in said)


def hostile_rows() -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows of every kind of damage, and how many records are bad for which reason."""
    bad: dict[str, int] = {}
    found = [
        {"image": value, "text": f"odd but whole: {name}", "key": name} for name, value in usable_images().items()
    ]
    for name, (value, reason) in unusable_images().items():
        found.append({"image": value, "text": "a text", "key": f"image {name}"})
        bad[reason] = bad.get(reason, 0) + 1
    for name, (value, reason) in unusable_texts().items():
        found.append({"image": picture(3), "text": value, "key": f"text {name}"})
        bad[reason] = bad.get(reason, 0) + 1
    found.append({"image": picture(1), "text": "x", "key": "left by a reader", "problem": "record_unparsable: line 3"})
    bad["record_unparsable"] = 1
    return found, bad


def test_hostile_records_are_counted_and_named(tmp_path: Path):
    found, bad = hostile_rows()
    summary = run(
        tmp_path / "set",
        sources=[Source(found), Source(found, "human")],
        captioner=None,
        limits=RecordLimits(max_bad_rate=1.0, max_examples=100),
    )
    # One picture is a single pixel wide: a processor fails on it, which human data does not need.
    thin = sum(decode_image(value).width == 1 for value in usable_images().values())
    doubled = {reason: 2 * count for reason, count in bad.items()} | {"processor_failed": thin}
    assert summary["records"]["bad"] == doubled
    assert summary["records"]["seen"] == 2 * len(found)
    named = {key for examples in summary["records"]["examples"].values() for _, key, _ in examples}
    assert {row["key"] for row in found if row["key"].startswith(("image ", "text ", "left"))} <= named
    kept = {row["key"] for row in load_pairs(tmp_path / "set") if row["image_id"].startswith("human")}
    assert kept == set(usable_images())


def test_an_image_without_a_usable_text_is_captioned_all_the_same(tmp_path: Path):
    found = [{"image": picture(3), "text": value, "key": name} for name, (value, _) in unusable_texts().items()]
    summary = run(tmp_path / "set", sources=[Source(found)], text_filter=None)
    assert summary["records"]["bad"] == {}
    assert summary["texts"]["synthetic"]["kept"] == summary["images"] == len(found)
    assert summary["texts"]["web"]["kept"] == 0


def test_too_many_bad_records_stop_the_job(tmp_path: Path):
    found = rows(20)
    for number in (2, 9, 15):
        found[number]["image"] = b""
    limits = RecordLimits(max_bad_rate=0.1, min_records=5)
    with pytest.raises(ErrorRateExceeded, match=r"(?s)1 of 4|fakes \[key"):
        run(tmp_path / "set", sources=[Source(found)], limits=limits)
    # It stays stopped, and goes on when told that so many are acceptable.
    with pytest.raises(ErrorRateExceeded):
        run(tmp_path / "set", sources=[Source(found)], limits=limits)
    summary = run(tmp_path / "set", sources=[Source(found)], limits=replace(limits, max_bad_rate=0.2))
    assert summary["records"]["bad"] == {"image_empty": 3}
    run(tmp_path / "other", sources=[Source(found)], limits=replace(limits, max_bad_rate=0.2))
    assert contents(tmp_path / "other") == contents(tmp_path / "set")


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"settings": {"seed": 1}}, r"seed was 0, now 1"),
    "unit size": ({"settings": {"unit_size": 5}}, r"unit_size was 4, now 5"),
    "format": ({"settings": {"format": "webdataset"}}, r'format was "parquet", now "webdataset"'),
    "captioner": ({"captioner": None}, r"captioner was \{.*now null"),
    "other captioner": ({"captioner": captioner(salt=0.5)}, r"captioner\.model was"),
    "top_p": ({"captioner": captioner(top_p=0.8)}, r"captioner\.top_p was 0\.9, now 0\.8"),
    "method": ({"captioner": captioner(method="beam")}, r'captioner\.method was "nucleus", now "beam"'),
    "other filter": ({"text_filter": text_filter(salt=0.5)}, r"filter\.model was"),
    "threshold": ({"text_filter": text_filter(itm=0.7)}, r"filter\.itm_threshold was 0\.5, now 0\.7"),
    "itc": ({"text_filter": text_filter(itc=0.1)}, r"filter\.itc_threshold was null, now 0\.1"),
    "more rows": ({"count": 24}, r"sources\[0\]\.rows was 23, now 24"),
    "another source": ({"sources": [Source(rows(23))]}, r"sources was"),
    "limits": ({"limits": RecordLimits(max_pixels=10_000)}, r"max_pixels was 50000000, now 10000"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_settings_are_refused_by_name(whole, change: str):
    options, words = CHANGES[change]
    before = contents(whole[0])
    with pytest.raises(SettingsChanged, match=words):
        run(whole[0], **options)
    assert contents(whole[0]) == before


def test_other_records_are_refused(whole):
    changed = rows(23)
    changed[2]["text"] = ["something else"]
    with pytest.raises(SettingsChanged, match="begun from other data"):
        run(whole[0], sources=[Source(changed), Source(human_rows(5), "human")])


def test_a_folder_with_other_things_in_it_is_refused(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(JobError, match=r"notes\.txt"):
        run(tmp_path)


def test_lost_and_damaged_files_are_made_again(whole, tmp_path: Path):
    run(tmp_path / "set")
    expected = contents(tmp_path / "set")
    assert expected == contents(whole[0])
    files = sorted((tmp_path / "set").glob("train-web*"))
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-7])
    (tmp_path / "set" / "_capfilt" / "summary.json").unlink()
    run(tmp_path / "set")
    assert contents(tmp_path / "set") == expected


def test_no_sources_and_wrong_numbers(tmp_path: Path):
    with pytest.raises(ValueError, match="no sources"):
        capfilt(tmp_path / "set", [])
    with pytest.raises(ValueError, match="unit_size=0"):
        run(tmp_path / "set", settings={"unit_size": 0})
    with pytest.raises(ValueError, match="batch_size=0"):
        run(tmp_path / "set", batch_size=0)


def test_progress_tells_throughput_and_yield(tmp_path: Path):
    lines: list[str] = []
    run(tmp_path / "set", say=lines.append, log_seconds=0.0)
    assert any("of 28 (" in line and "records," in line and "a second" in line for line in lines)
    assert any("web:" in line and "texts kept" in line and "to go" in line for line in lines)
    assert lines[-1].startswith("done\n")
    run(tmp_path / "set", say=lines.append)
    assert lines[-1].startswith("nothing to do")


def test_the_gallery_shows_pictures_texts_and_scores(whole):
    output, _ = whole
    page = (output / "gallery.html").read_text()
    assert 4 <= page.count("data:image/jpeg;base64,") <= 6
    assert "matching probability of at least 0.5" in page
    assert "✓ kept" in page
    assert "✗ dropped" in page
    assert "ITM 0." in page
    for title in ("A web text was dropped", "Nothing was dropped by the filter"):
        assert title in page


def test_markup_in_texts_stays_text(tmp_path: Path):
    source = Source([{"image": picture(0), "text": ["<script>alert(1)</script>"], "key": "<b>"}])
    run(tmp_path / "set", sources=[source], captioner=None, text_filter=None)
    page = (tmp_path / "set" / "gallery.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script>" not in page


def test_a_nested_dataset_with_ids_as_numbers(tmp_path: Path):
    features = Features({"image": Image(decode=False), "text": List(Value("string")), "image_id": Value("int64")})
    table = [
        {"image": {"bytes": usable_images()["rgb_png"], "path": None}, "text": ["a", "b"], "image_id": number}
        for number in (7, 8)
    ]
    Dataset.from_list(table, features=features).to_parquet(tmp_path / "in.parquet")
    run(tmp_path / "set", sources=[Source(load_pairs(tmp_path / "in.parquet"))], text_filter=None)
    assert [row["image_id"] for row in load_pairs(tmp_path / "set")] == ["7", "8"]
