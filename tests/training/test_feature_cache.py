import json
import os

import pytest
import torch

from hf_vlp.data import CaptioningCollator, ImageTextCollator, PairDataset, TrainTransform
from hf_vlp.training import VLPTrainer, apply_stage
from hf_vlp.training import feature_cache as caching
from hf_vlp.training.feature_cache import FeatureCache, StaleCacheError, frozen_encoder, image_digest, use_cache
from tests.tiny import blip2 as tiny
from tests.training import runs

SHAPE = (3, 4)


def features(count, seed=0):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def digests(count, start=0):
    return [image_digest(b"image %d" % index) for index in range(start, start + count)]


def filled(folder, dtype="float32", count=5, key="k"):
    cache = FeatureCache(folder, {"encoder": key}, SHAPE, dtype)
    with cache.writer() as writer:
        writer.add(digests(count), features(count))
    cache.refresh()
    return cache


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_features_come_back_in_the_storage_type(tmp_path, dtype):
    cache = filled(tmp_path, dtype)
    expected = features(5).to(getattr(torch, dtype))
    for index, digest in enumerate(digests(5)):
        assert torch.equal(cache.get(digest), expected[index])
    assert len(cache) == 5
    assert digests(1, 9)[0] not in cache
    with pytest.raises(KeyError):
        cache.get(digests(1, 9)[0])


def test_another_key_shape_or_type_is_another_cache(tmp_path):
    filled(tmp_path)
    assert len(FeatureCache(tmp_path, {"encoder": "k"}, SHAPE, "float32")) == 5
    assert len(FeatureCache(tmp_path, {"encoder": "other"}, SHAPE, "float32")) == 0
    assert len(FeatureCache(tmp_path, {"encoder": "k"}, (3, 5), "float32")) == 0
    assert len(FeatureCache(tmp_path, {"encoder": "k"}, SHAPE, "float16")) == 0


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    cache = filled(tmp_path)
    meta = json.loads((cache.folder / "meta.json").read_text())
    (cache.folder / "meta.json").write_text(json.dumps({**meta, "key": {"encoder": "newer"}}))
    with pytest.raises(StaleCacheError, match="remove the folder"):
        FeatureCache(tmp_path, {"encoder": "k"}, SHAPE, "float32")


@pytest.mark.parametrize("cut", range(1, 36, 5))
def test_an_index_cut_anywhere_loses_only_what_was_being_written(tmp_path, cut):
    cache = filled(tmp_path)
    (index,) = cache.folder.glob("*.index")
    content = index.read_bytes()
    index.write_bytes(content[:-cut])
    reopened = FeatureCache(tmp_path, {"encoder": "k"}, SHAPE, "float32")
    assert len(reopened) == (4 if cut <= len(content) // 5 else 3)
    for position, digest in enumerate(digests(len(reopened))):
        assert torch.equal(reopened.get(digest), features(5)[position])


def test_rows_without_an_entry_and_entries_without_a_row_do_not_count(tmp_path):
    cache = filled(tmp_path)
    (path,) = cache.folder.glob("*.features")
    size = path.stat().st_size
    with open(path, "ab") as file:
        file.write(b"half a row")
    assert len(FeatureCache(tmp_path, {"encoder": "k"}, SHAPE, "float32")) == 5
    os.truncate(path, size - 1)
    assert len(FeatureCache(tmp_path, {"encoder": "k"}, SHAPE, "float32")) == 4


def test_a_damaged_row_is_noticed(tmp_path):
    cache = filled(tmp_path)
    (path,) = cache.folder.glob("*.features")
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(bytes(content))
    fresh = FeatureCache(tmp_path, {"encoder": "k"}, SHAPE, "float32")
    with pytest.raises(StaleCacheError, match="row 0 .* is damaged"):
        fresh.get(digests(1)[0])


def test_several_writers_share_a_cache(tmp_path):
    one = FeatureCache(tmp_path, {}, SHAPE, "float32")
    two = FeatureCache(tmp_path, {}, SHAPE, "float32")
    with one.writer() as first, two.writer() as second:
        first.add(digests(2), features(2))
        second.add(digests(2, 2), features(2, seed=1))
    one.refresh()
    assert len(one) == 4
    assert torch.equal(one.get(digests(1, 3)[0]), features(2, seed=1)[1])
    with one.writer():
        pass
    assert len(list(one.folder.glob("*.index"))) == 2, "a writer that wrote nothing leaves nothing"


def test_features_that_do_not_fit_the_type(tmp_path):
    cache = FeatureCache(tmp_path, {}, SHAPE, "float16")
    with cache.writer() as writer:
        with pytest.raises(ValueError, match="--feature_dtype bfloat16"):
            writer.add(digests(1), features(1) * 1e6)
        with pytest.raises(ValueError, match="have shape"):
            writer.add(digests(2), features(1))
    with pytest.raises(ValueError, match="feature_dtype"):
        FeatureCache(tmp_path, {}, SHAPE, "int8")


def test_an_image_is_known_by_its_content(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"content")
    known = image_digest(b"content")
    assert known == image_digest(str(path)) == image_digest({"bytes": None, "path": str(path)})
    assert known == image_digest({"bytes": b"content", "path": "elsewhere.png"})
    path.write_bytes(b"other content")
    assert image_digest(str(path)) != known
    assert image_digest(tiny.images(1)[0]) == image_digest(tiny.images(1)[0])
    assert image_digest(None) is None
    assert image_digest(str(tmp_path / "none.png")) is None


def test_the_fingerprint_is_of_the_frozen_weights():
    model = tiny.pretraining_model()
    apply_stage(model, "stage1")
    before = frozen_encoder(model).fingerprint()
    with torch.no_grad():
        model.retrieval.vision_model.post_layernorm.weight.add_(1)
        model.itg_head.bias.add_(1)
    assert frozen_encoder(model).fingerprint() == before, "what trains is not cached"
    with torch.no_grad():
        model.retrieval.vision_model.encoder.layers[0].mlp.fc1.bias[0] += 1e-6
    assert frozen_encoder(model).fingerprint() != before


def test_an_encoder_that_trains_cannot_be_cached():
    model = tiny.pretraining_model()
    with pytest.raises(ValueError, match="--feature_cache needs a frozen image encoder"):
        frozen_encoder(model)
    with pytest.raises(ValueError, match="no vision_model"):
        frozen_encoder(torch.nn.Linear(2, 2))


def trainer_of(kind, folder, cache=None, dtype="float32", **changes):
    """A run of `kind` on 22 rows, of which one is bad, with or without a cache."""
    if kind == "stage1":
        model, processor, stage = tiny.pretraining_model(seed=3), tiny.retrieval_processor(), "stage1"
    elif kind == "stage2":
        model, processor, stage = tiny.generation_model(seed=3), tiny.generation_processor(), "stage2"
    else:
        (model, processor), stage = runs.clip_model(), "locked_image"
    apply_stage(model, stage)
    data = PairDataset(runs.rows(bad=(4,)), seed=1)
    args = runs.arguments(folder, **changes)
    collator = (CaptioningCollator if kind == "stage2" else ImageTextCollator)(processor)
    collator = use_cache(model, collator, [data, None], cache, dtype=dtype, args=args)
    return VLPTrainer(model, args, collator, data, processing_class=processor)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stage1", "stage2", "clip"])
def test_training_from_the_cache_is_training_without_it(tmp_path, kind):
    plain = trainer_of(kind, tmp_path / "plain", max_steps=8)
    plain.train()
    cached = trainer_of(kind, tmp_path / "cached", cache=tmp_path / "cache", max_steps=8)
    assert "pixel_values" not in cached.data_collator([cached.train_dataset[0]])
    cached.train()
    for one, two in zip(runs.losses(plain), runs.losses(cached), strict=True):
        assert one == pytest.approx(two, abs=2e-5)
    assert plain.records.bad == cached.records.bad
    assert plain.records.bad_total > 0


def test_a_filled_cache_is_used_by_later_runs_and_the_encoder_rests(tmp_path, monkeypatch):
    first = trainer_of("stage1", tmp_path / "a", cache=tmp_path / "cache")
    first.train()
    calls = []
    real = caching.FrozenEncoder.fingerprint
    monkeypatch.setattr(caching.FrozenEncoder, "fingerprint", lambda self: calls.append(self) or real(self))
    second = trainer_of("stage1", tmp_path / "b", cache=tmp_path / "cache")
    monkeypatch.setattr(type(second.model.retrieval), "tower_states", lambda *_: pytest.fail("the encoder ran"))
    second.train()
    assert len(calls) == 1
    assert runs.fingerprint(runs.weights(first.model)) == runs.fingerprint(runs.weights(second.model))
    (folder,) = (tmp_path / "cache").iterdir()
    assert len(list(folder.glob("*.index"))) == 1


def test_an_interrupted_filling_ends_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "GROUP", 4)
    whole = trainer_of("stage1", tmp_path / "a", cache=tmp_path / "whole").data_collator.cache

    class KilledError(Exception):
        pass

    real, added = caching.FeatureWriter.add, []

    def add(self, keys, values):
        if len(added) == 2:
            # Dies between the rows and their entries.
            self._features.write(b"torn")
            raise KilledError
        added.append(keys)
        real(self, keys, values)

    monkeypatch.setattr(caching.FeatureWriter, "add", add)
    with pytest.raises(KilledError):
        trainer_of("stage1", tmp_path / "b", cache=tmp_path / "broken")
    monkeypatch.setattr(caching.FeatureWriter, "add", real)
    again = trainer_of("stage1", tmp_path / "c", cache=tmp_path / "broken").data_collator.cache
    assert len(again) == len(whole) == 21
    for digest in whole._places:
        assert torch.equal(whole.get(digest), again.get(digest))


def test_two_processes_fill_it_together(tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "GROUP", 4)
    one = trainer_of("stage1", tmp_path / "a", cache=tmp_path / "one").data_collator.cache
    model = tiny.pretraining_model(seed=3)
    apply_stage(model.eval(), "stage1")
    encoder = frozen_encoder(model)
    collator = ImageTextCollator(tiny.retrieval_processor())
    preprocess = caching.ImagePreprocessor(collator.processor.image_processor, collator.limits, collator.background)
    images = [row["image"] for row in runs.rows(bad=(4,))]
    two = FeatureCache(tmp_path / "two", {}, one.shape, "float32")
    stored = [
        caching.fill(two, images, encoder, preprocess, rank=rank, world_size=2, progress=False) for rank in range(2)
    ]
    two.refresh()
    assert min(stored) > 0
    assert sum(stored) == len(two) == 21
    for digest in one._places:
        assert torch.equal(one.get(digest), two.get(digest))


def test_equal_images_are_stored_once(tmp_path):
    rows = runs.rows(3) * 4
    model = tiny.pretraining_model()
    apply_stage(model, "stage1")
    collator = ImageTextCollator(tiny.retrieval_processor())
    cached = use_cache(model, collator, [PairDataset(rows)], tmp_path, args=runs.arguments(tmp_path))
    assert len(cached.cache) == 3


def test_what_excludes_a_cache(tmp_path):
    model = tiny.pretraining_model()
    apply_stage(model, "stage1")
    collator = ImageTextCollator(tiny.retrieval_processor())
    augmented = PairDataset(runs.rows(), transform=TrainTransform(16))
    with pytest.raises(ValueError, match="random augmentation"):
        use_cache(model, collator, [augmented], tmp_path)
    with pytest.raises(ValueError, match="needs data with an index"):
        use_cache(model, collator, [iter(runs.rows())], tmp_path)
    with pytest.raises(ValueError, match="no image of the data can be read"):
        use_cache(model, collator, [PairDataset(runs.rows(2, bad=(0, 1)))], tmp_path)
    assert use_cache(model, collator, [], None) is collator


def test_an_image_that_the_cache_was_not_filled_with(tmp_path):
    model = tiny.pretraining_model()
    apply_stage(model, "stage1")
    collator = ImageTextCollator(tiny.retrieval_processor())
    cached = use_cache(model, collator, [PairDataset(runs.rows(3))], tmp_path)
    with pytest.raises(KeyError, match="not in"):
        cached([PairDataset(runs.rows(5))[4]])
