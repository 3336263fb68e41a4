"""ArbModel and ArbForCausalLM: the byte-level ternary language model in Hugging Face's terms."""

from __future__ import annotations

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from configuration_arb.configuration_arb import ArbConfig

from .byte_embedding import ByteEmbedding
from .byte_head import ByteHead, next_byte_loss
from .checkpoint_integrity import check_loading_info, check_tensor_files, check_trits
from .context_attention import ContextAttention
from .integer_state import IntegerState
from .rotary import rotary_angles
from .ternary_matrix import TernaryMatrix
from .ternary_mlp import TernaryMLP


class ArbPreTrainedModel(PreTrainedModel):
    """What ARB models share: no parameter at all, so device, dtype and counts come from buffers and config."""

    config_class = ArbConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ContextBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _export_code = None  # set by the repo's package: writes the remote-code files beside a checkpoint

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations; integer state has its own."""
        dtype = self.config.dtype
        return getattr(torch, dtype) if isinstance(dtype, str) else dtype

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Logical ternary weights, plus whatever float parameters an adapter brought."""
        ternary = sum(matrix.logical_weights for matrix in self.ternary_matrices().values())
        return ternary + super().num_parameters(only_trainable, exclude_embeddings)

    def integer_states(self) -> dict[str, IntegerState]:
        """Every module with persistent integer buffers by its name: matrices, tables, counts, edges."""
        return {name: module for name, module in self.named_modules() if isinstance(module, IntegerState)}

    def ternary_matrices(self) -> dict[str, TernaryMatrix]:
        """Every ternary matrix by its name."""
        return {name: module for name, module in self.named_modules() if isinstance(module, TernaryMatrix)}

    def add_training_state(self) -> None:
        """Make a model from an inference checkpoint trainable: residual and momentum start at zero."""
        for module in self.integer_states().values():
            module.add_training_state()
        self.config.training_state = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, IntegerState):
            module.reset_state()

    def save_pretrained(
        self, save_directory, *, training_state: bool | None = None, state_dict: dict | None = None, **kwargs
    ) -> None:
        """Write the checkpoint, its config and its code.

        training_state: False leaves out the update rule's accumulators (an inference checkpoint); None or True keep
        what the model has.
        """
        if training_state and not self.config.training_state:
            raise ValueError("training_state=True: this model was loaded without training state")
        if training_state is False and self.config.training_state:
            state_dict = self._inference_state(state_dict if state_dict is not None else self.state_dict())
            self.config.training_state = False
            try:
                self._save(save_directory, state_dict, **kwargs)
            finally:
                self.config.training_state = True
        else:
            self._save(save_directory, state_dict, **kwargs)

    def _save(self, save_directory, state_dict: dict | None, is_main_process: bool = True, **kwargs) -> None:
        super().save_pretrained(save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs)
        if self._export_code is not None and is_main_process:
            self._export_code(save_directory)

    def _inference_state(self, state_dict: dict) -> dict:
        training = {
            f"{name}.{tensor}"
            for name, module in self.integer_states().items()
            for tensor, spec in module.layout().items()
            if not spec.inference
        }
        return {key: tensor for key, tensor in state_dict.items() if key not in training}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs,
    ):
        """As transformers', but refuses a checkpoint whose tensors are missing, mistyped, misshapen or not trits."""
        source = str(pretrained_model_name_or_path)
        check_tensor_files(source)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        if not ignore_mismatched_sizes:
            check_loading_info(source, info)
        check_trits(source, model)
        return (model, info) if output_loading_info else model


class ContextBlock(GradientCheckpointingLayer):
    """One layer of the backbone: context attention, then the MLP, each added to the residual stream."""

    def __init__(self, config: ArbConfig, layer_idx: int):
        super().__init__()
        self.attention = ContextAttention(config, layer_idx)
        self.mlp = TernaryMLP(config)

    def forward(self, x, attention_mask, angles, past_key_values):
        x = x + self.attention(x, attention_mask, angles, past_key_values)
        return x + self.mlp(x)


class ArbModel(ArbPreTrainedModel):
    """The backbone: byte ids (B, T) -> hidden states (B, T, D)."""

    def __init__(self, config: ArbConfig):
        super().__init__(config)
        self.byte_embedding = ByteEmbedding(config)
        self.blocks = nn.ModuleList(ContextBlock(config, i) for i in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.byte_embedding.tables[0]

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """input_ids (B, T), attention_mask (B, P + T) with P cached positions."""
        cache = self._cache(past_key_values, use_cache)
        input_ids = self._pad_masked(input_ids, attention_mask)
        history = self._remember(input_ids, cache)
        x = self.byte_embedding(input_ids, history, self.dtype)  # (B, T, D)
        position_ids = self._positions(position_ids, attention_mask, input_ids, history)
        mask = create_causal_mask(self.config, x, attention_mask, cache, position_ids=position_ids)
        angles = rotary_angles(position_ids, self.config.qk_rope_head_dim, self.config.rope_theta)
        for block in self.blocks:
            x = block(x, mask, angles, cache)  # (B, T, D)
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=cache)

    def _cache(self, past_key_values: Cache | None, use_cache: bool | None) -> Cache | None:
        """The caller's cache, or a new one outside training. One layer more than the model: the ids seen so far."""
        if past_key_values is None:
            wanted = self.config.use_cache and not self.training if use_cache is None else use_cache
            if not wanted:
                return None
            past_key_values = DynamicCache(config=self.config)
        if len(past_key_values.layers) == self.config.num_hidden_layers:
            past_key_values.layers.append(DynamicLayer())
        return past_key_values

    def _pad_masked(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """What stands under a masked position must not reach its neighbours' trigrams."""
        if attention_mask is None or attention_mask.dim() != 2:
            return input_ids
        return input_ids.masked_fill(attention_mask[:, -input_ids.shape[1] :] == 0, self.config.pad_token_id)

    def _remember(self, input_ids: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        """The ids before `input_ids`, (B, P); the cache gains `input_ids`."""
        if cache is None:
            return input_ids[:, :0]
        seen = input_ids.to(torch.int16)[:, None, :, None]
        seen, _ = cache.update(seen, seen[..., :0], self.config.num_hidden_layers)
        return seen[:, 0, : -input_ids.shape[1], 0].long()

    def _positions(self, position_ids, attention_mask, input_ids, history) -> torch.Tensor:
        """(B, T): counted from each row's first unmasked byte, unless the caller gave them."""
        if position_ids is not None:
            return position_ids
        if attention_mask is not None and attention_mask.dim() == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        start = history.shape[1]
        return torch.arange(start, start + input_ids.shape[1], device=input_ids.device)[None]


class ArbForCausalLM(ArbPreTrainedModel, GenerationMixin):
    """The language model: byte ids (B, T) -> logits (B, T, 288) and the loss in nats per byte."""

    def __init__(self, config: ArbConfig):
        super().__init__(config)
        self.model = ArbModel(config)
        self.byte_head = ByteHead(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.byte_head.proj

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Module:
        """The vocabulary is the 256 bytes and 32 specials: there is nothing to resize."""
        if new_num_tokens not in (None, self.config.vocab_size):
            raise ValueError(f"new_num_tokens={new_num_tokens} must be {self.config.vocab_size}: bytes and specials")
        return self.get_input_embeddings()

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """labels (B, T): the ids themselves, -100 where not scored; the shift by one byte happens inside."""
        outputs = self.model(input_ids, attention_mask, position_ids, past_key_values, use_cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.byte_head(outputs.last_hidden_state[:, kept])
        loss = None if labels is None else next_byte_loss(logits, labels, num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)
