"""ArbModel and ArbForCausalLM: the byte-level ternary language model as transformers models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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
from modeling_arb.blocks.ternary_codebook import Quantised
from modeling_arb.blocks.text_sequencer import TextSequencer
from modeling_arb.generation.cache_layers import SideLayers
from modeling_arb.generation.generation_mixin import ArbGenerationMixin
from modeling_arb.layers.rotary import rotary_angles
from modeling_arb.layers.training_notice import say_when_nothing_learns

from .pretrained import ArbPreTrainedModel

# transformers' Trainer shifts the labels for smoothing only for the architectures in this list
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


class Reading(NamedTuple):
    """The input of one forward, the same for all layers. P: cached positions before it."""

    ids: torch.Tensor  # int64 (B, T), PAD where the mask is False
    history: torch.Tensor  # int64 (B, at most P), the ids before them as far as blocks look back
    is_byte: torch.Tensor | None  # bool (B, T), False under padding: it must not reach its neighbours. None: all True
    positions: torch.Tensor  # int64 (1 or B, T)
    attention_mask: torch.Tensor | None  # as the caller gave it
    cache: Cache | None
    is_plain: bool  # whole rows of bytes from their start: causal attention needs no mask


@dataclass
class ArbModelOutput(BaseModelOutputWithPast):
    """auxiliary_loss (): the blocks' own losses, summed; None without such a block."""

    auxiliary_loss: torch.Tensor | None = None


class ArbModel(ArbPreTrainedModel):
    """The backbone and the blocks of the config: byte ids (B, T) -> hidden states (B, T, D)."""

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
        """input_ids (B, T), attention_mask (B, P + T) with P cached positions. hidden_states, where requested: the
        input of each context block, and the last hidden state."""
        reading = self._read(input_ids, attention_mask, position_ids, past_key_values, use_cache)
        x = self.byte_embedding(reading.ids, reading.history, self.dtype)  # (B, T, D), and so after every line
        x = self._add_text_sequencer(x, reading)
        x = self._add_memgram(x, reading)
        x, layers = self._run_context_blocks(x, reading, output_hidden_states)
        x, motifs = self._add_motifs(x)
        x, ponder_loss = self._add_moe_graph(x, motifs, reading)
        x, pair_loss = self._add_composite(x, motifs, reading)
        return ArbModelOutput(
            last_hidden_state=x,
            past_key_values=reading.cache,
            hidden_states=None if layers is None else (*layers, x),
            auxiliary_loss=total(None if motifs is None else motifs.loss, ponder_loss, pair_loss),
        )

    def _read(self, input_ids, attention_mask, position_ids, past_key_values, use_cache) -> Reading:
        """Check and complete the arguments of `forward`, and add the ids to the cache."""
        if input_ids is None:
            raise ValueError(
                "input_ids=None: inputs_embeds is not supported, because blocks read neighbouring ids; give input_ids"
            )
        cache = self._cache(past_key_values, use_cache)
        is_byte = None
        if attention_mask is not None and attention_mask.dim() == 2:
            is_byte = attention_mask[:, -input_ids.shape[1] :] != 0
        ids = input_ids if is_byte is None else input_ids.masked_fill(~is_byte, self.config.pad_token_id)
        past = 0 if cache is None else cache.get_seq_length()
        history = self.side_layers.append_tokens(cache, "ids", ids)
        is_plain = attention_mask is None and position_ids is None and cache is None
        positions = self._positions(position_ids, attention_mask, input_ids, past)
        return Reading(ids, history, is_byte, positions, attention_mask, cache, is_plain)

    def _add_text_sequencer(self, x: torch.Tensor, reading: Reading) -> torch.Tensor:
        """Add the text sequencer, whose state goes through the cache."""
        if self.text_sequencer is None:
            return x
        cache = reading.cache
        states = None if cache is None else []
        addition, _ = self.text_sequencer(x, reading.is_byte, self.side_layers.read_state(cache, "sequencer"), states)
        if cache is not None and states is not None:
            self.side_layers.write_states(cache, "sequencer", states)
        return x + addition

    def _add_memgram(self, x: torch.Tensor, reading: Reading) -> torch.Tensor:
        """Add the n-gram memory."""
        return x if self.memgram is None else x + self.memgram(x, reading.ids, reading.history)

    def _run_context_blocks(
        self, x: torch.Tensor, reading: Reading, output_hidden_states: bool | None
    ) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
        """Run the context blocks. Returns also the input of each, where hidden states are requested."""
        config, cache, positions = self.config, reading.cache, reading.positions
        mask = None
        if not reading.is_plain:
            mask = create_causal_mask(config, x, reading.attention_mask, cache, position_ids=positions)
        angles = rotary_angles(positions, config.qk_rope_head_dim, config.rope_theta)
        windowed = None
        if config.windowed_attention is not None:
            keys = key_positions(positions, reading.attention_mask, 0 if cache is None else cache.get_seq_length())
            windowed = windowed_context(mask, keys, x.shape[1], **config.windowed_attention)
        wanted = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        layers = [] if wanted else None
        for block in self.blocks:
            if layers is not None:
                layers.append(x)
            x = block(x, mask, angles, cache, windowed)
        return x, layers

    def _add_motifs(self, x: torch.Tensor) -> tuple[torch.Tensor, Quantised | None]:
        """Add the nearest motifs of the codebook. Returns them, too."""
        if self.shared_vq is None:
            return x, None
        addition, motifs = self.shared_vq(x)
        return x + addition, motifs

    def _add_moe_graph(
        self, x: torch.Tensor, motifs: Quantised | None, reading: Reading
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Add the output of the looped experts on x and messages between motifs. Returns also the ponder loss."""
        if self.moe_graph is None:
            return x, None
        ids = rows_of = None
        if motifs is not None and self.shared_vq is not None:
            ids, rows_of = motifs.ids, self.shared_vq.book.rows_of
        addition, ponder = self.moe_graph(x, ids, rows_of, reading.is_byte)
        return x + addition, self.config.block("moe_graph")["ponder_cost"] * ponder

    def _add_composite(
        self, x: torch.Tensor, motifs: Quantised | None, reading: Reading
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Add the proposal for each motif and the one before it. Returns also the loss of the pairs' book."""
        if self.composite is None or motifs is None:
            return x, None
        ids = motifs.ids if reading.is_byte is None else motifs.ids.masked_fill(~reading.is_byte, NO_MOTIF)
        history = self.side_layers.append_tokens(reading.cache, "motifs", ids)
        previous = preceded_by(history, ids, 1, NO_MOTIF)[:, :-1]  # (B, T)
        addition, loss = self.composite(x, motifs.ids, previous)
        return x + addition, loss

    def _cache(self, past_key_values: Cache | None, use_cache: bool | None) -> Cache | None:
        """The caller's cache, or a new one in evaluation mode, with our side layers added. None: no cache."""
        if past_key_values is None:
            wanted = self.config.use_cache and not self.training if use_cache is None else use_cache
            if not wanted:
                return None
            past_key_values = DynamicCache(config=self.config)
        self.side_layers.add_to(past_key_values)
        return past_key_values

    def _positions(self, position_ids, attention_mask, input_ids, past: int) -> torch.Tensor:
        """(B, T): the caller's, or counted from the first unmasked byte of each row."""
        if position_ids is not None:
            return position_ids
        if attention_mask is not None and attention_mask.dim() == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        return torch.arange(past, past + input_ids.shape[1], device=input_ids.device)[None]


def total(*losses: torch.Tensor | None) -> torch.Tensor | None:
    """The sum of the losses that are given; None where none is."""
    given = [loss for loss in losses if loss is not None]
    return sum(given[1:], given[0]) if given else None


@dataclass
class ArbCausalLMOutput(CausalLMOutputWithPast):
    """loss in nats per byte. auxiliary_loss () as in ArbModelOutput, with the losses of the other heads; video_latents
    and talker_logits (B, T, ...) where the heads exist and their output was requested."""

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
        """Raises ValueError for another size than 288: the vocabulary is fixed, 256 bytes and 32 specials."""
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

        The loss is the language model's. Losses of blocks and other heads, and label_smoothing, change its gradient and
        not its value.
        video_targets (B, T, latent_dim) and talker_labels (B, T) train those heads; output_modalities: return their
        output.
        """
        outputs = self.model(input_ids, attention_mask, position_ids, past_key_values, use_cache, output_hidden_states)
        say_when_nothing_learns(self, outputs.last_hidden_state)
        x = self._add_output_router(outputs.last_hidden_state)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.byte_head(x[:, kept])
        video, video_loss = _ask(self.video_head, x, video_targets, output_modalities)
        talker, talker_loss = _ask(self.talker_head, x, talker_labels, output_modalities)
        auxiliary_loss = total(outputs.auxiliary_loss, video_loss, talker_loss)
        loss = None
        if labels is not None:
            loss = next_byte_loss(logits, labels, num_items_in_batch, label_smoothing)
            loss = _with_gradient_of(loss, auxiliary_loss, batch_share(labels, num_items_in_batch))
        return ArbCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            auxiliary_loss=auxiliary_loss,
            video_latents=video,
            talker_logits=talker,
        )

    def _add_output_router(self, x: torch.Tensor) -> torch.Tensor:
        """Add the output router."""
        return x if self.output_router is None else x + self.output_router(x)


def _ask(
    head: VideoHead | TalkerHead | None, x: torch.Tensor, targets: torch.Tensor | None, output_modalities: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A head's output and loss, each None where it is not requested or the head does not exist."""
    if head is None or not (output_modalities or targets is not None):
        return None, None
    spoken = head(x)
    return spoken, None if targets is None else head.loss(spoken, targets)


def _with_gradient_of(
    loss: torch.Tensor, auxiliary_loss: torch.Tensor | None, share: torch.Tensor | float
) -> torch.Tensor:
    """The value of `loss`, with the gradient of share * auxiliary_loss beside its own."""
    if auxiliary_loss is None:
        return loss
    weighted = auxiliary_loss * share
    return loss + (weighted - weighted.detach())
