"""Bits per byte of ARB models and of any causal language model of transformers with its tokenizer."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tokenization_arb import ArbTokenizer
from training_arb.lora.load_model import load_model

from .bits_per_byte import check_windows, per_byte, sequence_nats
from .eval_encoders import ByteEncoder, TokenizerEncoder

DEFAULT_CTX = 256
PROBE = 16


@dataclass
class EvaluatedModel:
    """A model in evaluation mode and its encoder. positions: its longest input in ids; None: no limit."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    encoder: ByteEncoder | TokenizerEncoder
    positions: int | None

    def ctx(self, wanted: int) -> int:
        """Ids per window. wanted=0: DEFAULT_CTX, or all positions if fewer. Raises ValueError beyond the positions."""
        most = self.positions or max(wanted, DEFAULT_CTX)
        if wanted > most:
            raise ValueError(f"ctx={wanted} is more than the {most} positions of model={self.name!r}")
        return wanted or min(DEFAULT_CTX, most)

    def lm_eval_prefix(self, start: str) -> int | None:
        """The id that lm-eval puts before a document: EOS for ARB, as in training; None: lm-eval's choice."""
        ids = self.encoder.start_ids(start, documents=2)
        return ids[0] if ids else None


def load_evaluated(name: str, device: torch.device, trust_remote_code: bool = False) -> EvaluatedModel:
    """A model by folder or hub name. Raises ValueError if it cannot be loaded or is not causal."""
    folder = Path(name)
    if not folder.is_dir() and (folder.is_absolute() or name.count("/") > 1 or name.startswith(".")):
        raise ValueError(f"model={name!r}: no such folder")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"model={name!r}: config.json not found")
    try:
        config, _ = PreTrainedConfig.get_config_dict(name)
    except OSError as error:
        where = "" if folder.is_dir() else " is not a folder, and was not found on the hub"
        raise ValueError(f"model={name!r}{where}: {_first_line(error)}") from error
    if config.get("model_type") == "arb":
        model, tokenizer = load_model(name), ArbTokenizer()
        encoder = ByteEncoder()
    else:
        model, tokenizer = _load_causal_lm(name, trust_remote_code), _load_tokenizer(name, trust_remote_code)
        encoder = TokenizerEncoder(name, tokenizer)
    nn.Module.to(model, device).eval()
    if isinstance(encoder, TokenizerEncoder):
        check_causal(name, model)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return EvaluatedModel(name, model, tokenizer, encoder, positions)


def _load_causal_lm(name: str, trust_remote_code: bool) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, trust_remote_code=trust_remote_code, output_loading_info=True
        )
        model, info = loaded
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise ValueError(f"model={name!r} needs its own code; --trust_remote_code allows it to run") from error
        if "Unrecognized configuration class" in str(error):
            raise ValueError(f"model={name!r} is not a causal language model") from error
        raise ValueError(f"model={name!r}: {_first_line(error)}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"model={name!r} lacks {len(missing)} tensors of a causal language model: {missing[0]}, ...")
    return model


def _load_tokenizer(name: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise ValueError(f"model={name!r}: tokenizer not found: {_first_line(error)}") from error
    # where the files are missing some classes come up with an empty vocabulary
    if not tokenizer.encode("text", add_special_tokens=False):
        raise ValueError(f"model={name!r}: tokenizer not found")
    return tokenizer


def check_causal(name: str, model: PreTrainedModel) -> None:
    """Raises ValueError if an id changes earlier outputs: such a model reads what it is to predict."""
    ids = torch.arange(PROBE, device=model.device)[None] % model.config.get_text_config().vocab_size
    other = ids.clone()
    other[0, -1] = 0
    with torch.no_grad():
        logits, again = (model(row, use_cache=False).logits[0, :-1].float() for row in (ids, other))
    if not torch.allclose(logits, again, rtol=1e-3, atol=1e-3 * logits.std().item()):
        raise ValueError(f"model={name!r} is not a causal language model: a token changes the predictions before it")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def score(
    evaluated: EvaluatedModel,
    documents: Sequence[bytes],
    ctx: int = 0,
    stride: int = 0,
    batch_size: int = 16,
    start: str = "auto",
    progress: bool = False,
) -> dict:
    """Bits per byte of a model on documents, each in windows of its own; UTF-8, unless the model reads any bytes.

    ctx, stride: ids, 0: as many as `EvaluatedModel.ctx` says, half a window. start: one of STARTS. Returns
    bits_per_byte and nats_per_byte over the `bytes` that scored ids stand for, and tokens_per_byte, documents,
    changed_documents (whose ids say something else than their bytes), ctx, stride, start (ids), seconds.
    """
    ctx = evaluated.ctx(ctx)
    stride = stride or max(ctx // 2, 1)
    start_ids = evaluated.encoder.start_ids(start, len(documents))
    began = time.perf_counter()
    encoded = [evaluated.encoder.encode(document, start_ids) for document in documents]
    check_windows(ctx, stride, max(document.scored.first for document in encoded))
    size = sum(document.scored_bytes for document in encoded)
    if not size:
        raise ValueError(f"bytes={sum(map(len, documents))}: too few for model={evaluated.name!r} to score any")
    rows = evaluated.model.config.get_text_config().vocab_size
    largest = max(int(document.scored.ids.max()) for document in encoded)
    if largest >= rows:
        raise ValueError(f"model={evaluated.name!r}: its tokenizer's id {largest} is outside the model's {rows} ids")
    nats = sequence_nats(evaluated.model, [document.scored for document in encoded], ctx, stride, batch_size, progress)
    tokens = sum(len(document.scored.ids) - document.scored.first for document in encoded if document.scored_bytes)
    return {
        **per_byte(sum(nats), size),
        "tokens_per_byte": tokens / size,
        "documents": len(documents),
        "changed_documents": sum(document.changed for document in encoded),
        "ctx": ctx,
        "stride": stride,
        "start": start_ids,
        "seconds": round(time.perf_counter() - began, 3),
    }
