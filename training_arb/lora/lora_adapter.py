"""LoRA adapters by peft over a frozen ternary base: makes, measures, saves and loads them with their base's hash."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from modeling_arb import ArbForCausalLM
from modeling_arb.backbone.byte_head import IGNORE, mask_incomplete_trigrams, next_byte_loss
from modeling_arb.checkpoints.file_modes import follow_umask
from modeling_arb.checkpoints.integrity import open_tensor_file, read_json_object
from modeling_arb.layers.ternary_linear import TernaryLinear
from training_arb.checkpoints.checkpoint_files import verify_checksums
from training_arb.checkpoints.checkpoint_source import find_checkpoint
from training_arb.common.atomic_files import write_json
from training_arb.data.chat_data import Conversation, ConversationDataset, collate_conversations
from training_arb.memory.state_audit import hash_tensors

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE_FILE = "base.json"
ALL_LINEAR = "all-linear"


def add_adapter(
    model: ArbForCausalLM,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: Sequence[str] = (ALL_LINEAR,),
    dora: bool = False,
) -> PeftModel:
    """A fresh adapter on the named TernaryLinears; all-linear: every one but the head.

    Raises ValueError naming the setting that is impossible, or the module that is not found.
    """
    if r < 1:
        raise ValueError(f"r={r} must be at least 1")
    if not alpha > 0:
        raise ValueError(f"alpha={alpha} must be positive")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} must be in [0, 1)")
    names = [name for name, module in model.named_modules() if isinstance(module, TernaryLinear)]
    for wanted in target_modules:
        if wanted != ALL_LINEAR and not any(name == wanted or name.endswith(f".{wanted}") for name in names):
            known = sorted({name.rpartition(".")[2] for name in names})
            raise ValueError(f"target_modules={wanted!r}: no such linear layer; the layers are {', '.join(known)}")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType], peft multiplies by it whatever its type
        lora_dropout=dropout,
        target_modules=ALL_LINEAR if ALL_LINEAR in target_modules else list(target_modules),
        use_dora=dora,
    )
    return get_peft_model(model, config)


def adapter_parameters(model: nn.Module) -> int:
    """Number of float parameters of an adapter."""
    return sum(parameter.numel() for _, parameter in model.named_parameters())


def base_hash(model: nn.Module, training_state: bool = True) -> str:
    """sha256 over the integer state: the same before, under and after an adapter.

    training_state: False leaves out what only a resumed pretraining needs.
    """
    return hash_tensors(
        (f"{name.replace('.base_layer', '')}.{key}", tensor)
        for name, module in sorted(_bare(model).integer_states().items())
        for key, spec in module.layout().items()
        if (tensor := getattr(module, key, None)) is not None and (training_state or spec.inference)
    )


def _bare(model: nn.Module) -> ArbForCausalLM:
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(bare, ArbForCausalLM)
    return bare


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """Save what peft saves, and the hash of the base that the adapter belongs to."""
    model.save_pretrained(str(folder))
    follow_umask(Path(folder).rglob("adapter_model.safetensors"))
    write_json(Path(folder) / BASE_FILE, {"base_sha256": base_hash(model, training_state=False)})


def load_adapter(folder: str | Path, base: str | None = None) -> PeftModel:
    """The adapter of a folder over its base, in evaluation mode. base: another folder or hub name than the recorded.

    Raises ValueError when the adapter is damaged, or its base is not found or not the model that it was trained on.
    """
    folder = Path(folder)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"adapter={str(folder)!r}: {name} not found")
    verify_checksums(folder)
    with open_tensor_file(folder / ADAPTER_WEIGHTS):
        pass
    recorded = read_json_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    name = base or recorded
    if not isinstance(name, str):
        raise ValueError(f"{folder / ADAPTER_CONFIG}: base_model_name_or_path={recorded!r} does not name a base model")
    source = find_checkpoint(name, option="base_model_name_or_path")
    model = ArbForCausalLM.from_pretrained(source.folder)
    if (folder / BASE_FILE).is_file():
        wanted = read_json_object(folder / BASE_FILE).get("base_sha256")
        if wanted != (found := base_hash(model, training_state=False)):
            raise ValueError(f"adapter={str(folder)!r}: trained over {wanted}, {source.folder} is {found}")
    return PeftModel.from_pretrained(model, folder).eval()


def conversation_batches(
    conversations: Sequence[Conversation], batch_size: int, device: torch.device
) -> Iterator[dict[str, torch.Tensor]]:
    """input_ids and labels (B, T) of all conversations, those of similar length together."""
    dataset = ConversationDataset(sorted(conversations, key=lambda conversation: len(conversation.ids)))
    for first in range(0, len(dataset), batch_size):
        rows = [dataset[i] for i in range(first, min(first + batch_size, len(dataset)))]
        yield {name: tensor.to(device) for name, tensor in collate_conversations(rows).items()}


@torch.no_grad()
def assistant_loss(model: nn.Module, conversations: Sequence[Conversation], batch_size: int = 16) -> float:
    """Mean nats per byte of the assistant's text, EOS included, over all conversations."""
    model.eval()
    total, scored = 0.0, 0
    for batch in conversation_batches(conversations, batch_size, _bare(model).device):
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        labels = mask_incomplete_trigrams(batch["labels"])
        total += next_byte_loss(logits, labels, num_items_in_batch=1).item()
        scored += int((labels != IGNORE).sum())
    return total / max(scored, 1)


def is_adapter(name: str) -> bool:
    """Whether `name` is a folder that peft saved an adapter into."""
    return (Path(name) / ADAPTER_CONFIG).is_file()
