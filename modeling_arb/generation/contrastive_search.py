"""Contrastive search (Su et al. 2022, arXiv:2202.06417, eq. 5) as a `custom_generate` of transformers.

transformers 5 downloads this mode from the hub as remote code. Here it needs no download: `model.generate(**inputs,
custom_generate=contrastive_search, penalty_alpha=0.6, top_k=4, max_new_tokens=100)`.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from transformers.generation.utils import GenerateDecoderOnlyOutput


def contrastive_search(
    model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """Of the `top_k` most likely bytes, takes the one with the highest (1 - penalty_alpha) * probability -
    penalty_alpha * (largest cosine of its hidden state with an earlier one). input_ids (B, T) -> ids (B, T + new).

    Raises ValueError without these two settings, or if the cache is not empty.
    """
    alpha, k = generation_config.penalty_alpha, generation_config.top_k
    if alpha is None or not 0 <= alpha <= 1:
        raise ValueError(f"penalty_alpha={alpha} must be between 0 and 1")
    if not k or k < 1:
        raise ValueError(f"top_k={k} must be at least 1")
    cache = model_kwargs.get("past_key_values") if model_kwargs.get("use_cache", True) else None
    if cache is not None and cache.get_seq_length():
        raise ValueError("past_key_values must be empty: the search needs the hidden states of the whole text")
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    rows = torch.arange(len(input_ids), device=input_ids.device)
    going = torch.ones_like(rows, dtype=torch.bool)
    logits, context = _read(model, input_ids, mask, cache)
    while going.any():
        scores = logits_processor(input_ids, logits[:, -1].float())
        probability, candidates = scores.softmax(-1).topk(k)  # (B, k) each
        tried = candidates.flatten()[:, None]
        if cache is None:
            tried = torch.cat([input_ids.repeat_interleave(k, 0), tried], 1)
        else:
            cache.batch_repeat_interleave(k)
        grown = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits, hidden = _read(model, tried, grown.repeat_interleave(k, 0), cache)
        hidden = hidden[:, -1].unflatten(0, (-1, k))  # (B, k, D)
        likeness = (hidden @ context.mT).masked_fill(mask[:, None] == 0, -1).amax(-1)
        best = ((1 - alpha) * probability - alpha * likeness).argmax(-1)
        chosen = rows * k + best
        if cache is not None:
            cache.batch_select_indices(chosen)
        logits, mask = logits[chosen], grown
        context = torch.cat([context, hidden[rows, best][:, None]], 1)
        new = torch.where(going, candidates[rows, best], model.config.pad_token_id)
        input_ids = torch.cat([input_ids, new[:, None]], 1)
        going = going & ~stopping_criteria(input_ids, scores)
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=cast(torch.LongTensor, input_ids), past_key_values=cache)
    return input_ids


def _read(model, ids, mask, cache) -> tuple[torch.Tensor, torch.Tensor]:
    """The last position's logits (B, 1, 288), and hidden states (B, T, D) of unit length."""
    out = model(
        ids, mask, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1, output_hidden_states=True
    )
    return out.logits, F.normalize(out.hidden_states[-1].float(), dim=-1)
