r"""Instruction tuning of InstructBLIP (arXiv 2305.06500, section 2): the Q-Former learns to look for what is asked.

On the built-in Shapes, on two CPU cores, after training_scripts/blip2_stage1.py and a language model:
    python training_scripts/instructblip.py --config training_scripts/instructblip_cpu.yaml \
        --stage1 outputs/stage1/model --language_model outputs/lm/model --output_dir outputs/instructblip
The paper's setting (16 A100 40G, under 1.5 days for the largest), from a BLIP-2 stage-1 folder:
    accelerate launch --num_processes 16 training_scripts/instructblip.py \
        --config training_scripts/instructblip_paper.yaml --stage1 outputs/stage1/model \
        --language_model lmsys/vicuna-7b-v1.3 --output_dir outputs/instructblip \
        --sources captioning=coco.json vqa=path/to/vqav2 knowledge_vqa=okvqa.json conversation=llava_instruct_150k.json

--stage instruct   Q-Former, queries, projection and the LayerNorm behind the tower learn, as in the authors' code
--stage qformer    without that LayerNorm
--sources takes FAMILY=DATA, or FAMILY=DATA@WEIGHT; data sets are drawn with probabilities proportional to the square
roots of their sizes. Families: captioning, text_captioning, visual_reasoning, vqa, knowledge_vqa, text_vqa,
question_generation, video_vqa, dialog, classification, conversation. Without it --train_data is read as conversations.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import AutoTokenizer, set_seed

from hf_vlp.data import InstructionCollator, InstructionDataset, InstructionSource, load_pairs, load_task
from hf_vlp.data.conversations import load_conversations
from hf_vlp.data.instructions import TASK_FAMILIES
from hf_vlp.models.blip2.processing_blip_2 import Blip2Processor
from hf_vlp.models.catalog import load_class
from hf_vlp.models.instructblip.modeling_instructblip import InstructBlipForConditionalGeneration
from hf_vlp.models.instructblip.processing_instructblip import InstructBlipProcessor
from hf_vlp.training import DataArguments, VLPTrainer, VLPTrainingArguments, apply_stage, parse_arguments
from hf_vlp.training.arguments import option, run_settings, say_unused
from hf_vlp.training.data import main_process_first
from hf_vlp.training.evaluators import TaskEvaluator
from hf_vlp.training.instructions import ShapesConversations, conversation_rows
from hf_vlp.training.launch import say
from hf_vlp.training.lora import LoraArguments, add_lora, language_model_options


@dataclass
class ModelArguments:
    """Stage 1 of BLIP-2, the language model behind it, and the mixture of data sets."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str | None = option(None, "InstructBLIP folder or Hub id to go on from.")
    stage1: str | None = option(None, "BLIP-2 stage-1 folder or Hub id to start from.")
    language_model: str | None = option(None, "Folder or Hub id of a causal or encoder-decoder language model.")
    sources: list[str] = option(list, "Data sets of the mixture, each FAMILY=DATA or FAMILY=DATA@WEIGHT.")
    group_by_length: bool = option(False, "Batches of instructions of like length: less padding.")
    max_prompt_length: int | None = option(128, "Most tokens of an instruction; longer ones lose their beginning.")


def main(argv: list[str] | None = None) -> dict[str, float]:
    data, conversations, model_args, lora, args = parse_arguments(
        (DataArguments, ShapesConversations, ModelArguments, LoraArguments, VLPTrainingArguments),
        argv,
        description=__doc__,
    )
    if not model_args.model_name_or_path and not (model_args.stage1 and model_args.language_model):
        raise SystemExit("instructblip.py: --stage1 and --language_model are missing (or --model_name_or_path)")
    if data.streaming:
        raise SystemExit("instructblip.py: a balanced mixture needs data sets of known size; leave --streaming out")
    set_seed(args.seed)

    # 1. Data
    with main_process_first(args):
        sources = [source_of(entry, data, args.seed) for entry in model_args.sources]
        if not sources:
            sources = [InstructionSource("conversation", conversation_rows(data, conversations, train=True))]
        # With --sources nobody looks at --train_data, so its evaluation split says nothing about this training.
        evaluated = data.eval_data or not model_args.sources
        eval_rows = conversation_rows(data, conversations, train=False) if evaluated else None
        if not evaluated and data.eval_split.lower() != "none":
            say("no evaluation: --sources are training data; name conversations to evaluate on by --eval_data")

    # 2. Processor and model
    if model_args.model_name_or_path:
        say_unused(model_args, ("stage1", "language_model"), "--model_name_or_path brings its own")
        processor = InstructBlipProcessor.from_pretrained(model_args.model_name_or_path)
        model = InstructBlipForConditionalGeneration.from_pretrained(
            model_args.model_name_or_path, **({"dtype": "float32"} | language_model_options(lora))
        )
    else:
        stage1 = Blip2Processor.from_pretrained(model_args.stage1)
        queries = load_class(model_args.stage1, "config").from_pretrained(model_args.stage1).num_query_tokens
        processor = InstructBlipProcessor.for_language_model(
            AutoTokenizer.from_pretrained(model_args.language_model),
            stage1.tokenizer,
            queries,
            image_processor=stage1.image_processor,
        )
        model = InstructBlipForConditionalGeneration.from_stage1(
            model_args.stage1, model_args.language_model, processor, **language_model_options(lora)
        )
    say(apply_stage(model, args.stage or "instruct"))
    adapted = add_lora(model, lora)
    if adapted:
        say(f"  LoRA of rank {lora.lora_r} on {len(adapted)} layers of the language model, e.g. {adapted[0]}")

    # 3. Dataset and collator
    train = InstructionDataset(
        sources,
        seed=args.seed,
        transform=data.transform(model.config.vision_config.image_size),
        group_by_length=model_args.group_by_length,
    )
    for source, share in zip(train.sources, train.probabilities, strict=True):
        say(f"  {source.name or source.family}: {len(source.rows):,} rows, drawn with probability {share:.3f}")
    collator = InstructionCollator(
        processor,
        max_length=data.max_length,
        max_prompt_length=model_args.max_prompt_length,
        limits=data.limits,
    )

    # 4. Trainer
    trainer = VLPTrainer(
        model,
        args,
        collator,
        train,
        processing_class=processor,
        evaluator=TaskEvaluator(
            "instructions", processor, eval_rows, args.per_device_eval_batch_size, {"template": "instructblip"}
        )
        if eval_rows is not None
        else None,
        settings={
            "data": run_settings(data),
            "conversations": run_settings(conversations),
            "model_arguments": run_settings(model_args),
            "lora": run_settings(lora),
        },
    )

    # 5. Train, evaluate, export
    trainer.train()
    return trainer.finish()


def source_of(entry: str, data: DataArguments, seed: int) -> InstructionSource:
    """`FAMILY=DATA@WEIGHT` as a source.

    Raises:
        SystemExit: the entry is of another form, or of an unknown family.
        ValueError: the data set is empty, or the weight not positive.
    """
    family, separator, spec = entry.partition("=")
    if not separator or not spec:
        raise SystemExit(f"instructblip.py: --sources takes FAMILY=DATA, e.g. vqa=questions.json, not {entry!r}")
    if family not in TASK_FAMILIES:
        raise SystemExit(f"instructblip.py: --sources: no family {family!r}; there are {', '.join(TASK_FAMILIES)}")
    spec, _, weight = spec.partition("@")
    try:
        share = float(weight) if weight else 1.0
    except ValueError:
        raise SystemExit(f"instructblip.py: --sources {entry}: the weight {weight!r} is no number") from None
    options: dict[str, Any] = {"image_root": data.image_root, "seed": seed}
    if spec == "shapes":
        options |= {"preset": data.shapes_preset} | ({"size": data.shapes_size} if data.shapes_size else {})
    if family in ("captioning", "text_captioning", "classification"):
        rows = load_pairs(spec, data.train_split, **options)
    elif family == "conversation":
        rows = load_conversations(spec, data.train_split, **options)
    else:
        rows = load_task("dialog" if family == "dialog" else "vqa", spec, data.train_split, **options)
    if data.max_train_samples is not None:
        rows = rows.select(range(min(data.max_train_samples, len(rows))))
    return InstructionSource(family, rows, name=entry, weight=share)


if __name__ == "__main__":
    main()
