"""Image-text data: sources, records, collators, and the built-in Shapes world. Names are resolved on first use."""

from hf_vlp._exports import lazy_exports

# Public name -> module that defines it.
_EXPORTS = {
    "BadRecord": "records",
    "CaptioningCollator": "collators",
    "CaptionScore": "shapes",
    "DialogCollator": "tasks",
    "ErrorRateExceeded": "records",
    "ImageTextCollator": "collators",
    "InstructionCollator": "instructions",
    "InstructionDataset": "instructions",
    "InstructionSource": "instructions",
    "PairDataset": "pairs",
    "RecordLimits": "records",
    "RecordReport": "records",
    "ShapesConfig": "shapes",
    "ShapesWorld": "shapes",
    "TaskDataset": "tasks",
    "TaskIterableDataset": "tasks",
    "TrainTransform": "transforms",
    "VQACollator": "tasks",
    "VisualEntailmentCollator": "tasks",
    "VisualReasoningCollator": "tasks",
    "decode_image": "images",
    "flatten_texts": "pairs",
    "image_id_hash": "hashing",
    "PairIterableDataset": "streams",
    "load_pairs": "sources",
    "load_questions": "sources",
    "load_shapes": "shapes",
    "load_shapes_questions": "shapes",
    "load_task": "tasks",
    "task_records": "tasks",
    "shapes_texts": "shapes",
    "train_bert_tokenizer": "tokenizers",
    "train_opt_tokenizer": "tokenizers",
    "parse_caption": "shapes",
    "score_caption": "shapes",
}

__all__ = sorted(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
