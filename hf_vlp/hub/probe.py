"""What a saved folder computes on fixed inputs. Runs on its own, as a script, in a process that lacks this package.

    python probe.py FOLDER OUTPUT.safetensors

It loads the folder by the Auto classes and writes the tensors that `probe` gives.
"""

import json
import sys
from pathlib import Path
from typing import Any

TEXTS = ["a photo of two things", "a drawing"]


def picture(seed: int) -> Any:
    """A fixed image of 48 x 40 pixels with structure at several scales."""
    from PIL import Image

    width, height = 48, 40
    data = bytes(
        (x * (3 + seed) + y * y * (1 + channel) + 37 * seed * channel) % 256
        for y in range(height)
        for x in range(width)
        for channel in range(3)
    )
    return Image.frombytes("RGB", (width, height), data)


def probe(model: Any, processor: Any) -> dict[str, Any]:
    """Outputs on two fixed images and texts, by name; float32 on the CPU.

    A model that generates is asked for the tokens of its captions and for the logits of a prompt, any other for every
    tensor of its output. Without a processor, the parameters themselves are compared.
    """
    import torch

    model.eval()
    result: dict[str, Any] = {}
    if processor is None:
        return {name: value.detach().float().cpu() for name, value in model.named_parameters()}
    images = [picture(1), picture(2)]
    features = processor.image_processor(images=images, return_tensors="pt")
    tokens = processor.tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    result.update(inputs)
    if model.can_generate():
        inputs = dict(processor(images=images, text=TEXTS, padding=True, return_tensors="pt"))
        result.update({f"processor.{name}": value for name, value in inputs.items()})
    else:
        inputs |= {name: value for name, value in features.items() if isinstance(value, torch.Tensor)}
    device, dtype = next(model.parameters()).device, model.dtype
    inputs = {
        name: (value.to(dtype) if value.is_floating_point() else value).to(device) for name, value in inputs.items()
    }
    text_config = model.config.get_text_config()
    with torch.no_grad():
        start = {}
        if model.can_generate() and getattr(text_config, "is_encoder_decoder", False):
            start = {"decoder_input_ids": torch.full((2, 1), text_config.decoder_start_token_id or 0, device=device)}
        outputs = model(**inputs, **start)
        for name, value in outputs.items():
            if isinstance(value, torch.Tensor) and name != "loss":
                result[f"output.{name}"] = value
        if model.can_generate():
            result["generated"] = model.generate(**inputs, max_new_tokens=8, do_sample=False, num_beams=1)
    return {
        name: (value.float() if value.is_floating_point() else value).cpu().contiguous().clone()
        for name, value in result.items()
    }


def load(folder: str) -> tuple[Any, Any]:
    """Model and processor of a folder, by what its `config.json` says."""
    import transformers
    from transformers import AutoProcessor

    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    remote = [name for name in config.get("auto_map", {}) if name != "AutoConfig"]
    name = (config.get("architectures") or ["AutoModel"])[0]
    loader = getattr(transformers, remote[0] if remote else name)
    model = loader.from_pretrained(folder, **({"trust_remote_code": True} if remote else {}))
    has_processor = any((Path(folder) / file).is_file() for file in ("processor_config.json", "tokenizer_config.json"))
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=bool(remote)) if has_processor else None
    return model, processor


def main(folder: str, output: str) -> None:
    from safetensors.torch import save_file

    model, processor = load(folder)
    if any(name == "hf_vlp" or name.startswith("hf_vlp.") for name in sys.modules if sys.modules[name] is not None):
        raise SystemExit("the folder's code imported hf_vlp")
    save_file(probe(model, processor), output, metadata={"class": type(model).__name__})


if __name__ == "__main__":
    main(*sys.argv[1:])
