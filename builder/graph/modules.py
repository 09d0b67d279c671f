"""The three graphs as thin modules around upstream's submodules, traced under `patches.registry.applied`.

Each `forward` takes the ports of builder/graph/ports.py in their order. Guarantees: no parameter is copied or renamed,
so that a graph's initializers are found in the checkpoint by identity.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from patches.operators import layer_mark
from patches.text_attention import causal_bias, fused_mask


class VisionEncoder(nn.Module):
    """pixel_values [patches, C·T·P²], image_grid_thw [images, 3] → main and DeepStack features.

    Args:
        model: upstream's `Qwen3VLForConditionalGeneration`.
        packed: one output [tokens, (1 + D)·H]; else pooled [tokens, H] and, where D > 0, DeepStack [D, tokens, H].
    """

    def __init__(self, model: Any, packed: bool) -> None:
        super().__init__()
        self.visual, self.packed = model.model.visual, packed

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        main, deepstack = self.visual(pixel_values, image_grid_thw)
        if self.packed:
            return torch.cat((main, *deepstack), dim=-1)
        return (main, torch.stack(deepstack)) if deepstack else main


class Embeddings(nn.Module):
    """input_ids [batch, seq] → inputs_embeds [batch, seq, H]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.embed_tokens = model.model.language_model.embed_tokens

    def forward(self, input_ids: Tensor) -> Tensor:
        embeds: Tensor = self.embed_tokens(input_ids)
        return embeds


class PaddedEmbeddings(nn.Module):
    """input_ids [batch, seq] → inputs_embeds [batch, seq, (1 + D)·H]: embeddings, padded with zeros.

    The runtime puts an image token's DeepStack features in place of the zeros.
    """

    def __init__(self, model: Any, levels: int) -> None:
        super().__init__()
        self.embed_tokens, self.levels = model.model.language_model.embed_tokens, levels

    def forward(self, input_ids: Tensor) -> Tensor:
        embeds = self.embed_tokens(input_ids)
        return nn.functional.pad(embeds, (0, self.levels * embeds.shape[-1]))


class PackedEmbeddings(nn.Module):
    """input_ids [batch, seq], image_features [tokens, (1 + D)·H] → inputs_embeds [batch, seq, (1 + D)·H].

    The n-th image token gets the n-th row of the features, a text token its embedding padded with zeros.
    """

    def __init__(self, model: Any, image_token_id: int) -> None:
        super().__init__()
        self.embed_tokens = model.model.language_model.embed_tokens
        self.image_token_id = image_token_id

    def forward(self, input_ids: Tensor, image_features: Tensor) -> Tensor:
        embeds = self.embed_tokens(input_ids)
        text = nn.functional.pad(embeds, (0, image_features.shape[1] - embeds.shape[-1]))
        mask = input_ids == self.image_token_id
        nth = mask.flatten().to(torch.int64).cumsum(0).view_as(input_ids)
        # The zero row in front keeps the gather in range without features, as in every decode step.
        table = torch.cat((torch.zeros_like(image_features.sum(0, keepdim=True)), image_features))
        row = torch.where(mask & (nth < table.shape[0]), nth, 0)
        return torch.where((row > 0)[..., None], nn.functional.embedding(row, table), text)


class TextDecoder(nn.Module):
    """inputs_embeds (and deepstack_embeds), attention_mask, position_ids, past → logits, present.

    Args:
        model: upstream's `Qwen3VLForConditionalGeneration`.
        levels: D, the number of DeepStack levels.
        packed: inputs_embeds is [batch, seq, (1 + D)·H], slice i + 1 is added after layer i, and logits are those of
            the last position, [batch, 1, vocab]. Else deepstack_embeds is [D, batch, seq, H] and logits are
            [batch, seq, vocab].
        fused: attention is GroupQueryAttention, with its kind of mask; else standard operators, with an additive bias.
        bounded: clamp positions to the last token's index, which no prompt exceeds (an image takes fewer positions
            than it has tokens).
    """

    def __init__(self, model: Any, levels: int, packed: bool, fused: bool, bounded: bool = False) -> None:
        super().__init__()
        self.bounded = bounded
        self.language_model, self.lm_head = model.model.language_model, model.lm_head
        self.levels, self.packed, self.fused = levels, packed, fused
        self.hidden = model.config.text_config.hidden_size

    def forward(self, inputs_embeds: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        if self.packed:
            slices = [slice(i * self.hidden, (i + 1) * self.hidden) for i in range(1 + self.levels)]
            hidden, *deepstack = (inputs_embeds[..., part] for part in slices)
        else:
            hidden, deepstack = inputs_embeds, [rest[0][level] for level in range(self.levels)]
            rest = rest[1:] if self.levels else rest
        attention_mask, position_ids, past = rest
        if self.bounded:
            position_ids = torch.minimum(position_ids, (attention_mask.sum(-1) - 1)[None, :, None])
        seq = hidden.shape[1]
        mask = fused_mask(attention_mask) if self.fused else causal_bias(attention_mask, seq, hidden.dtype)
        rotary = self.language_model.rotary_emb(hidden, position_ids)
        kv = list(zip(past[::2], past[1::2], strict=True))
        hidden = layer_mark(hidden)
        for index, layer in enumerate(self.language_model.layers):
            hidden = layer(hidden, position_embeddings=rotary, attention_mask=mask, kv=kv)
            if index < len(deepstack):
                hidden = hidden + deepstack[index]
            hidden = layer_mark(hidden)
        if self.packed:
            hidden = hidden[:, -1:]
        logits = self.lm_head(self.language_model.norm(hidden))
        return (logits, *(tensor for pair in kv for tensor in pair))
