"""Evaluation on the tasks of the papers: retrieval, zero-shot classification, captioning, question answering,
reasoning over two images, entailment, dialogs, grounding."""

from hf_vlp._exports import lazy_exports

# Public name -> module that defines it.
_EXPORTS = {
    "TASKS": "run",
    "bleu": "caption_scores",
    "caption_metrics": "caption_scores",
    "cider": "caption_scores",
    "cider_d": "caption_scores",
    "consistency": "visual_reasoning",
    "dialog_metrics": "dialog",
    "evaluate_captioning": "captioning",
    "evaluate_dialog": "dialog",
    "evaluate_grounding": "grounding",
    "evaluate_instructions": "instructions",
    "evaluate_retrieval": "retrieval",
    "evaluate_shapes_captions": "shapes",
    "evaluate_visual_entailment": "visual_entailment",
    "evaluate_visual_reasoning": "visual_reasoning",
    "evaluate_vqa": "vqa",
    "evaluate_zero_shot": "zero_shot",
    "format_table": "results",
    "load_metric": "metrics",
    "load_model_and_processor": "run",
    "ndcg": "dialog",
    "normalize_answer": "vqa_scores",
    "rouge_l": "caption_scores",
    "run_evaluation": "run",
    "task_options": "run",
    "to_eval_result_entries": "results",
    "to_eval_results": "results",
    "tokenize_captions": "ptb_tokenizer",
    "vqa_accuracy": "vqa_scores",
    "write_json": "results",
}

__all__ = sorted(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
