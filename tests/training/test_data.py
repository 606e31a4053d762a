import json

import pytest
from datasets import load_dataset
from PIL import Image

from hf_vlp.data import PairDataset, PairIterableDataset, decode_image
from hf_vlp.data.splits import NoSplitError
from hf_vlp.training import DataArguments
from hf_vlp.training.data import pair_dataset, texts_of_rows
from hf_vlp.training.instructions import ShapesConversations, conversation_rows
from tests.training import runs


def test_shapes_by_default():
    data = DataArguments(shapes_size=7, shapes_preset="simple", max_eval_samples=3)
    rows = data.train_rows(seed=1)
    assert len(rows) == 7
    assert len(data.eval_rows()) == 3
    assert DataArguments(eval_split="none").eval_rows() is None
    assert rows[0]["text"] == data.train_rows(seed=1)[0]["text"]


def test_fewer_rows_on_request():
    assert len(DataArguments(shapes_size=9, max_train_samples=4).train_rows()) == 4
    stream = DataArguments(shapes_size=9, max_train_samples=4, streaming=True).train_rows()
    assert len(list(stream)) == 4


def test_rows_beside_the_training_data_keep_its_limits_but_not_its_columns():
    data = DataArguments(
        train_data="elsewhere", columns=["text=words"], shapes_preset="row", shapes_size=9, shapes_noise=0.4,
        max_train_samples=4,
    )  # fmt: skip
    rows = data.more_rows("shapes", "grounding")
    assert len(rows) == 4 and "boxes" in rows.column_names
    # Scenes of the preset: 40 pixels.
    assert decode_image(rows[0]["image"]).size == (40, 40)


def test_data_without_a_validation_split_trains_without_evaluation(tmp_path, capsys):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "nothing"}\n')
    folder = str(tmp_path)
    assert DataArguments(train_data=folder).eval_rows() is None
    said = capsys.readouterr().out
    assert f"no evaluation: {folder} has no split 'validation'; it has train" in said
    assert "--eval_split" in said
    # Who asks for an evaluation gets it, or the error.
    assert len(DataArguments(train_data=folder, eval_split="train").eval_rows()) == 1
    for asked in ({"eval_split": "test"}, {"eval_data": folder}):
        with pytest.raises(NoSplitError, match="it has train"):
            DataArguments(train_data=folder, **asked).eval_rows()


def test_conversations_without_a_validation_split_train_without_evaluation(tmp_path, capsys):
    file = tmp_path / "llava_instruct.json"
    file.write_text(
        json.dumps([{"id": "1", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}])
    )
    load_dataset("json", data_files=str(file), split="train").save_to_disk(str(tmp_path / "saved"))
    for source in (str(file), str(tmp_path / "saved")):
        data = DataArguments(train_data=source)
        assert len(conversation_rows(data, ShapesConversations(), train=True)) == 1
        assert conversation_rows(data, ShapesConversations(), train=False) is None
        assert f"no evaluation: {source} has no split 'validation'; it has train" in capsys.readouterr().out
        data.eval_split = "train"
        assert len(conversation_rows(data, ShapesConversations(), train=False)) == 1
        for asked in ({"eval_split": "test"}, {"eval_data": source}):
            with pytest.raises(NoSplitError, match="it has train"):
                conversation_rows(DataArguments(train_data=source, **asked), ShapesConversations(), train=False)


def test_records_of_a_table_and_of_a_stream():
    assert isinstance(pair_dataset(runs.rows(3), seed=0), PairDataset)
    stream = DataArguments(shapes_size=5, streaming=True).train_rows()
    records = pair_dataset(stream, seed=0)
    assert isinstance(records, PairIterableDataset)
    assert len(list(records)) == 5


@pytest.mark.parametrize(("option", "augments"), [({}, False), ({"crop_scale": 0.5}, True), ({"flip": 0.5}, True), ({"color_jitter": 0.1}, True)])  # fmt: skip  # noqa: E501
def test_augmentation_only_where_asked_for(option, augments):
    data = DataArguments(**option)
    assert data.augments is augments
    assert (data.transform(32) is not None) is augments


def test_limits_reach_the_collator():
    limits = DataArguments(max_pixels=100, max_bad_rate=0.5).limits
    assert (limits.max_pixels, limits.max_bad_rate) == (100, 0.5)


def test_texts_for_a_tokenizer():
    texts = list(texts_of_rows([{"text": ["a", None, "b"]}, {"text": "c"}, {"text": None}]))
    assert texts == ["a", "b", "c"]
    assert list(texts_of_rows([{"text": "a"}] * 5, limit=2)) == ["a", "a"]
