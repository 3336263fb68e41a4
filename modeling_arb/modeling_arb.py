"""ArbModel and ArbForCausalLM: the byte-level ternary language model in Hugging Face's terms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from configuration_arb.configuration_arb import ArbConfig
from modeling_arb.backbone.byte_embedding import ByteEmbedding, preceded_by
from modeling_arb.backbone.byte_head import ByteHead, batch_share, next_byte_loss
from modeling_arb.backbone.context_attention import ContextAttention
from modeling_arb.backbone.ternary_mlp import TernaryMLP
from modeling_arb.backbone.windowed_context import key_positions, windowed_context
from modeling_arb.blocks.composite_proposal import NO_MOTIF, CompositeProposal
from modeling_arb.blocks.memgram import MemGram
from modeling_arb.blocks.modality_heads import TalkerHead, VideoHead
from modeling_arb.blocks.moe_graph import MoEGraph
from modeling_arb.blocks.output_router import OutputRouter
from modeling_arb.blocks.shared_vq import SharedVQ
from modeling_arb.blocks.text_sequencer import TextSequencer
from modeling_arb.generation.cache_layers import SideLayers
from modeling_arb.generation.generation_mixin import ArbGenerationMixin
from modeling_arb.layers.rotary import rotary_angles
from modeling_arb.layers.training_notice import say_when_nothing_learns

from .pretrained import ArbPreTrainedModel

# transformers' Trainer shifts the labels that it smooths for the architectures listed there, and for no other
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["arb"] = "ArbForCausalLM"


class ContextBlock(GradientCheckpointingLayer):
    """One layer of the backbone: context attention, then the MLP, each added to the residual stream."""

    def __init__(self, config: ArbConfig, layer_idx: int):
        super().__init__()
        self.attention = ContextAttention(config, layer_idx)
        self.mlp = TernaryMLP(config, config.intermediate_size)

    def forward(self, x, attention_mask, angles, past_key_values, windowed):
        x = x + self.attention(x, attention_mask, angles, past_key_values, windowed)
        return x + self.mlp(x)


@dataclass
class ArbModelOutput(BaseModelOutputWithPast):
    """auxiliary_loss (): what the blocks ask for beside the language loss; None where no block asks."""

    auxiliary_loss: torch.Tensor | None = None


class ArbModel(ArbPreTrainedModel):
    """The backbone and the blocks that the config asks for: byte ids (B, T) -> hidden states (B, T, D)."""

    def __init__(self, config: ArbConfig):
        super().__init__(config)
        self.side_layers = SideLayers(config)
        self.byte_embedding = ByteEmbedding(config)
        self.text_sequencer = TextSequencer(config) if config.text_sequencer else None
        self.memgram = MemGram(config) if config.memgram else None
        self.blocks = nn.ModuleList(ContextBlock(config, i) for i in range(config.num_hidden_layers))
        self.shared_vq = SharedVQ(config) if config.codebook else None
        self.moe_graph = MoEGraph(config) if config.moe_graph else None
        self.composite = CompositeProposal(config) if config.composite else None
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
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> ArbModelOutput:
        """input_ids (B, T), attention_mask (B, P + T) with P cached positions. hidden_states, where asked for: what
        each block reads, and the last hidden state."""
        if input_ids is None:
            raise ValueError("input_ids=None: a byte is read with those before it, so inputs_embeds cannot replace ids")
        cache = self._cache(past_key_values, use_cache)
        is_byte = _unmasked(attention_mask, input_ids)  # (B, T) or None
        input_ids = input_ids if is_byte is None else input_ids.masked_fill(~is_byte, self.config.pad_token_id)
        past = 0 if cache is None else cache.get_seq_length()
        history = self.side_layers.append_tokens(cache, "ids", input_ids)
        x = self.byte_embedding(input_ids, history, self.dtype)  # (B, T, D)
        if self.text_sequencer is not None:
            x = x + self._sequence(x, is_byte, cache)
        if self.memgram is not None:
            x = x + self.memgram(x, input_ids, history)
        positions = self._positions(position_ids, attention_mask, input_ids, past)
        plain = attention_mask is None and position_ids is None and cache is None
        layers = [] if self._wanted(output_hidden_states) else None
        x = self._attend(x, attention_mask, positions, cache, plain, layers)
        losses = []
        if self.shared_vq is not None:
            addition, motifs = self.shared_vq(x)
            x = x + addition
            losses.append(motifs.loss)
        if self.moe_graph is not None:
            on_motifs = (None, None) if self.shared_vq is None else (motifs.ids, self.shared_vq.book.rows_of)
            addition, ponder = self.moe_graph(x, *on_motifs, is_byte)
            x = x + addition
            losses.append(self.config.moe_graph["ponder_cost"] * ponder)
        if self.composite is not None:
            addition, loss = self.composite(x, motifs.ids, self._previous(motifs.ids, is_byte, cache))
            x = x + addition
            losses.append(loss)
        return ArbModelOutput(
            last_hidden_state=x,
            past_key_values=cache,
            hidden_states=None if layers is None else (*layers, x),
            auxiliary_loss=sum(losses) if losses else None,
        )

    def _sequence(self, x: torch.Tensor, is_byte: torch.Tensor | None, cache: Cache | None) -> torch.Tensor:
        states = None if cache is None else []
        addition, _ = self.text_sequencer(x, is_byte, self.side_layers.read_state(cache, "sequencer"), states)
        if cache is not None:
            self.side_layers.write_states(cache, "sequencer", states)
        return addition

    def _wanted(self, output_hidden_states: bool | None) -> bool:
        return self.config.output_hidden_states if output_hidden_states is None else output_hidden_states

    def _attend(self, x, attention_mask, position_ids, cache: Cache | None, plain: bool, layers) -> torch.Tensor:
        """plain: whole rows of bytes from their start, for which transformers would look at the ids to find as much.
        layers: None, or a list that takes what each block reads."""
        mask = None
        if not plain:
            mask = create_causal_mask(self.config, x, attention_mask, cache, position_ids=position_ids)
        angles = rotary_angles(position_ids, self.config.qk_rope_head_dim, self.config.rope_theta)
        windowed = None
        if self.config.windowed_attention is not None:
            past = 0 if cache is None else cache.get_seq_length()
            positions = key_positions(position_ids, attention_mask, past)
            windowed = windowed_context(mask, positions, x.shape[1], **self.config.windowed_attention)
        for block in self.blocks:
            if layers is not None:
                layers.append(x)
            x = block(x, mask, angles, cache, windowed)
        return x

    def _previous(self, ids: torch.Tensor, is_byte: torch.Tensor | None, cache: Cache | None) -> torch.Tensor:
        """The motif before each position, (B, T)."""
        ids = ids if is_byte is None else ids.masked_fill(~is_byte, NO_MOTIF)
        history = self.side_layers.append_tokens(cache, "motifs", ids)
        return preceded_by(history, ids, 1, NO_MOTIF)[:, :-1]

    def _cache(self, past_key_values: Cache | None, use_cache: bool | None) -> Cache | None:
        """The caller's cache, or a new one outside training."""
        if past_key_values is None:
            wanted = self.config.use_cache and not self.training if use_cache is None else use_cache
            if not wanted:
                return None
            past_key_values = DynamicCache(config=self.config)
        self.side_layers.add_to(past_key_values)
        return past_key_values

    def _positions(self, position_ids, attention_mask, input_ids, past: int) -> torch.Tensor:
        """(B, T): counted from each row's first unmasked byte, unless the caller gave them."""
        if position_ids is not None:
            return position_ids
        if attention_mask is not None and attention_mask.dim() == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        return torch.arange(past, past + input_ids.shape[1], device=input_ids.device)[None]


def _unmasked(attention_mask: torch.Tensor | None, input_ids: torch.Tensor) -> torch.Tensor | None:
    """bool (B, T), False under padding: what stands there must not reach its neighbours. None where nothing is."""
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    return attention_mask[:, -input_ids.shape[1] :] != 0


@dataclass
class ArbCausalLMOutput(CausalLMOutputWithPast):
    """loss in nats per byte. auxiliary_loss () as ArbModelOutput's; video_latents and talker_logits (B, T, ...) where
    the heads exist and were asked."""

    auxiliary_loss: torch.Tensor | None = None
    video_latents: torch.Tensor | None = None
    talker_logits: torch.Tensor | None = None


class ArbForCausalLM(ArbPreTrainedModel, ArbGenerationMixin):
    """The language model: byte ids (B, T) -> logits (B, T, 288) and the loss in nats per byte."""

    def __init__(self, config: ArbConfig):
        super().__init__(config)
        self.model = ArbModel(config)
        self.output_router = OutputRouter(config) if config.output_router else None
        self.video_head = VideoHead(config) if config.video_head else None
        self.talker_head = TalkerHead(config) if config.talker_head else None
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
        label_smoothing: float = 0.0,
        output_hidden_states: bool | None = None,
        video_targets: torch.Tensor | None = None,
        talker_labels: torch.LongTensor | None = None,
        output_modalities: bool = False,
        **kwargs,
    ) -> ArbCausalLMOutput:
        """labels (B, T): the ids themselves, -100 where not scored; the shift by one byte happens inside.

        The loss is the language model's; what blocks and other heads ask for, and label_smoothing, join its gradient,
        not its value.
        video_targets (B, T, latent_dim) and talker_labels (B, T) train those heads; output_modalities: return theirs.
        """
        outputs = self.model(input_ids, attention_mask, position_ids, past_key_values, use_cache, output_hidden_states)
        x = outputs.last_hidden_state
        if self.training and x.requires_grad:
            say_when_nothing_learns(self, x)
        if self.output_router is not None:
            x = x + self.output_router(x)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.byte_head(x[:, kept])
        loss = None if labels is None else next_byte_loss(logits, labels, num_items_in_batch, label_smoothing)
        asked = {"video": (self.video_head, video_targets), "talker": (self.talker_head, talker_labels)}
        spoken, auxiliary = {}, [outputs.auxiliary_loss]
        for name, (head, targets) in asked.items():
            if head is not None and (output_modalities or targets is not None):
                spoken[name] = head(x)
                auxiliary.append(None if targets is None else head.loss(spoken[name], targets))
        given = [term for term in auxiliary if term is not None]
        auxiliary_loss = sum(given) if given else None
        if loss is not None and auxiliary_loss is not None:
            weighted = auxiliary_loss * batch_share(labels, num_items_in_batch)
            loss = loss + (weighted - weighted.detach())
        return ArbCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            auxiliary_loss=auxiliary_loss,
            video_latents=spoken.get("video"),
            talker_logits=spoken.get("talker"),
        )
