"""OpenCLIP's contrastive and sigmoid losses over several ranks: every mode, value and gradient, by real ranks."""

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_vlp.objectives.contrastive import contrastive_loss, sigmoid_loss
from hf_vlp.objectives.distributed import world
from tests.distributed import run_ranks
from tests.reference.cases import Case, reference

# `local{0|1}_grad{0|1}` of the original (local_loss, gather_with_grad) in the words of `contrastive_loss`.
SOFTMAX_MODES = {
    "single": {},
    "local0_grad0": {"rows": "all", "gather_keys": "own_rows"},
    "local0_grad1": {"rows": "all", "gather_keys": "exact"},
    "local1_grad0": {"rows": "own", "gather_keys": "detached"},
    "local1_grad1": {"rows": "own", "gather_keys": "exact"},
}
# The original has four ways to exchange texts, which all give the same; ours are two, each also in tiles.
SIGMOID_MODES = {
    "single": {},
    "bidir": {"exchange": "ring"},
    "shift": {"exchange": "ring", "tile_size": 3},
    "reduce": {"tile_size": 3},
    "gather": {},
}


class LinearTowers(nn.Module):
    """The stand-in for a model that the cases were recorded with."""

    def __init__(self, weights: dict[str, Tensor], mode: str, options: dict[str, object]) -> None:
        super().__init__()
        self.image_projection = nn.Parameter(weights["image_projection"].clone())
        self.text_projection = nn.Parameter(weights["text_projection"].clone())
        self.logit_scale = nn.Parameter(weights["logit_scale"].clone())
        if mode == "siglip":
            self.logit_bias = nn.Parameter(weights["logit_bias"].clone())
        self.mode, self.options = mode, options

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        image_features = F.normalize(images @ self.image_projection, dim=-1)
        text_features = F.normalize(texts @ self.text_projection, dim=-1)
        scale = self.logit_scale.exp()
        for tensor in (image_features, text_features, scale):
            tensor.retain_grad()
        if self.mode == "siglip":
            output = sigmoid_loss(image_features, text_features, scale, self.logit_bias, **self.options)
        else:
            output = contrastive_loss(image_features, text_features, scale, **self.options)
        return output.loss, image_features, text_features, scale


def run_mode(
    weights: dict[str, Tensor], images: Tensor, texts: Tensor, mode: str, options: dict[str, object]
) -> dict[str, Tensor]:
    """Loss and gradients of this rank, under the names of the case."""
    rank, size = world()
    share = len(images) // size
    own = slice(rank * share, (rank + 1) * share)
    model = LinearTowers(weights, mode, options)
    wrapped = model if size == 1 else DistributedDataParallel(model)
    loss, image_features, text_features, scale = wrapped(images[own], texts[own])
    loss.backward()
    return {
        "loss_per_rank": loss.detach().reshape(1),
        "grad_image_features": image_features.grad,
        "grad_text_features": text_features.grad,
        "grad_exp_logit_scale_per_rank": scale.grad.reshape(1),
        **{f"ddp_grad/{name}": parameter.grad for name, parameter in model.named_parameters()},
        "image_features": image_features.detach(),
        "text_features": text_features.detach(),
    }


def run_modes(
    weights: dict[str, Tensor], images: Tensor, texts: Tensor, modes: list[tuple[str, str]]
) -> dict[tuple[str, str], dict[str, Tensor]]:
    options = {"clip": SOFTMAX_MODES, "siglip": SIGMOID_MODES}
    return {(loss, mode): run_mode(weights, images, texts, loss, options[loss][mode]) for loss, mode in modes}


@reference("clip/loss")
def test_loss_over_ranks(case: Case) -> None:
    modes: dict[int, set[tuple[str, str]]] = {}
    for name in case.output_names:
        if found := re.match(r"(clip|siglip)/(?:single|world(\d+)/(\w+))/", name):
            loss, size, mode = found.groups()
            modes.setdefault(int(size or 1), set()).add((loss, mode or "single"))
    assert set(modes) == set(case.config["world_sizes"])

    arguments = case.weights, case.inputs["image_input"], case.inputs["text_input"]
    for size, wanted in modes.items():
        ranks = (
            [run_modes(*arguments, sorted(wanted))]
            if size == 1
            else run_ranks(run_modes, size, *arguments, sorted(wanted))
        )
        for loss, mode in wanted:
            outputs = [rank[loss, mode] for rank in ranks]
            for name in outputs[0]:
                if name in ("image_features", "text_features"):
                    if size == 1:
                        case.compare(name, outputs[0][name])
                    continue
                where = f"{loss}/single" if size == 1 else f"{loss}/world{size}/{mode}"
                if name.startswith("ddp_grad/"):
                    for output in outputs:
                        case.compare(f"{where}/{name}", output[name])
                else:
                    case.compare(f"{where}/{name}", torch.cat([output[name] for output in outputs]))
