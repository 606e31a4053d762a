"""Random start of a CLIP from scratch, as the original authors' code draws it.

Differs from transformers, whose `CLIPModel` swaps the scales of the input and output projections of attention and
draws the vision tower by the text tower's rule. Parameters that were loaded from a checkpoint are left alone.
"""

import torch
from torch import nn
from transformers import CLIPTextModel, CLIPVisionModel
from transformers import initialization as init


@torch.no_grad()
def initialize_text_tower(tower: CLIPTextModel, factor: float = 1.0) -> None:
    """Normal weights scaled by width and depth (2103.00020, section 2.4, after GPT-2), zero attention biases."""
    width, depth = tower.config.hidden_size, tower.config.num_hidden_layers
    into, out_of = factor * width**-0.5, factor * width**-0.5 * (2 * depth) ** -0.5
    init.normal_(tower.embeddings.token_embedding.weight, std=factor * 0.02)
    init.normal_(tower.embeddings.position_embedding.weight, std=factor * 0.01)
    for layer in tower.encoder.layers:
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            init.normal_(projection.weight, std=into)
            init.zeros_(projection.bias)
        init.normal_(attention.out_proj.weight, std=out_of)
        init.zeros_(attention.out_proj.bias)
        init.normal_(layer.mlp.fc1.weight, std=factor * (2 * width) ** -0.5)
        init.normal_(layer.mlp.fc2.weight, std=out_of)
        for linear in (layer.mlp.fc1, layer.mlp.fc2):
            _uniform_by_fan_in(linear.bias, linear.in_features)


@torch.no_grad()
def initialize_vision_tower(tower: CLIPVisionModel, factor: float = 1.0) -> None:
    """The original leaves the image transformer's blocks as torch makes them; only the embeddings are scaled."""
    width = tower.config.hidden_size
    patches = tower.embeddings.patch_embedding
    _uniform_by_fan_in(patches.weight, patches.weight[0].numel())
    init.normal_(tower.embeddings.class_embedding, std=factor * width**-0.5)
    init.normal_(tower.embeddings.position_embedding.weight, std=factor * width**-0.5)
    for layer in tower.encoder.layers:
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            # Xavier over the packed (3 * width, width) matrix of the original, of which each of these is a third.
            bound = (6 / (4 * width)) ** 0.5
            init.uniform_(projection.weight, -bound, bound)
            init.zeros_(projection.bias)
        _uniform_by_fan_in(attention.out_proj.weight, width)
        init.zeros_(attention.out_proj.bias)
        for linear in (layer.mlp.fc1, layer.mlp.fc2):
            _uniform_by_fan_in(linear.weight, linear.in_features)
            _uniform_by_fan_in(linear.bias, linear.in_features)


def _uniform_by_fan_in(parameter: nn.Parameter, fan_in: int) -> None:
    """What `torch.nn.Linear` and `Conv2d` draw by default."""
    init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)
