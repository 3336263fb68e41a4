"""Windowed attention: what a query sees against a count by hand, cached decoding, padding, and what decoding costs."""

import pytest
import torch

from configuration_arb import preset_config
from modeling_arb import ArbForCausalLM
from modeling_arb.backbone.windowed_context import key_positions, summarise_blocks, windowed_context
from modeling_arb.layers.norm import rms_norm
from modeling_arb.layers.ternary_linear import TernaryLinear
from support.gradients import Sink
from support.tensors import assert_same, decode

PAD = 256
SETTINGS = [pytest.param(*row, id="W{}-s{}".format(*row)) for row in [(5, 0), (5, 2), (4, 4), (3, 1), (7, 3), (50, 8)]]
PADDING = [pytest.param(0, id="unpadded"), pytest.param(6, id="padded")]


def make_model(window, stride, **overrides):
    settings = {"window": window, "stride": stride}
    return ArbForCausalLM(preset_config("arb-tiny", windowed_attention=settings, compute="float", **overrides)).eval()


def assert_close(out, ref):
    assert (out - ref).abs().max() < 1e-4 * ref.abs().max()


def left_padded(length, pad):
    """Two rows, the first with `pad` masked positions before it: bool (2, length)."""
    return torch.arange(length) >= torch.tensor([[pad], [0]])


def seen_by_hand(real, query, window, stride):
    """What key index `query` of a row may see: (single keys, blocks as tuples of keys), from the text's own count."""
    text = [index for index in range(len(real)) if real[index]]
    single = {index for index in text if 0 <= query - index < window}
    blocks = [tuple(text[n : n + stride]) for n in range(0, len(text), stride)] if stride else []
    return single, {block for block in blocks if len(block) == stride and block[-1] <= query - window}


@pytest.mark.parametrize("queries", [1, 4, 23])
@pytest.mark.parametrize("pad", [0, 1, 6])
@pytest.mark.parametrize("window, stride", SETTINGS)
def test_a_query_sees_its_window_and_the_blocks_before(window, stride, pad, queries):
    real = left_padded(23, pad)
    past = 23 - queries
    causal = torch.ones(23, 23, dtype=torch.bool).tril()[past:]
    mask = (causal & real[:, None])[:, None]
    position_ids = (real.long().cumsum(1) - 1).clamp(min=0)[:, past:]
    context = windowed_context(mask, key_positions(position_ids, real.long(), past), queries, window, stride)
    N = context.block_ends.shape[1]
    assert context.mask.shape == (2, 1, queries, N + 23 - context.start)
    assert context.start == max(0, past - window + 1)
    for row in range(2):
        for t in range(queries):
            visible = context.mask[row, 0, t]
            single = {context.start + k for k in visible[N:].nonzero().flatten().tolist()}
            ends = context.block_ends[row, visible[:N].nonzero().flatten()].tolist()
            blocks = {tuple(range(end - stride + 1, end + 1)) for end in ends}
            assert len(blocks) == len(ends)
            assert (single, blocks) == seen_by_hand(real[row].tolist(), past + t, window, stride)


@pytest.mark.parametrize("window, stride", [(5, 2), (7, 3)])
def test_a_float_mask_and_no_mask_say_the_same(window, stride):
    positions = torch.arange(21)[None]
    causal = torch.ones(21, 21, dtype=torch.bool).tril()[None, None]
    added = torch.zeros(1, 1, 21, 21).masked_fill(~causal, torch.finfo(torch.float32).min)
    expected = windowed_context(causal, positions, 21, window, stride)
    for mask in (None, added):
        context = windowed_context(mask, positions, 21, window, stride)
        assert torch.equal(context.mask, expected.mask) and torch.equal(context.block_ends, expected.block_ends)


def test_blocks_count_from_each_packed_text_and_stay_in_it():
    """Two texts in one row, told apart by positions that begin again and by a mask between them."""
    positions = torch.cat([torch.arange(5), torch.arange(8)])[None]
    text = torch.tensor([0] * 5 + [1] * 8)
    mask = (text[:, None] == text) & torch.ones(13, 13, dtype=torch.bool).tril()
    context = windowed_context(mask[None, None], positions, 13, 3, 2)
    ends = context.block_ends[0]
    assert ends[context.mask[0, 0, 12, : len(ends)]].tolist() == [6, 8]
    assert ends[context.mask[0, 0, 4, : len(ends)]].tolist() == [1]


def test_a_masked_position_inside_breaks_its_block_only():
    real = torch.arange(12)[None] != 3
    mask = (real[:, None] & torch.ones(12, 12, dtype=torch.bool).tril())[:, None]
    positions = real.long().cumsum(1) - 1  # 0 1 2 2 3 4 5 6 ...
    context = windowed_context(mask, positions, 12, 2, 2)
    ends = context.block_ends[0]
    assert ends[context.mask[0, 0, 11, : len(ends)]].tolist() == [1, 6, 8]


def test_a_summary_is_the_normalised_mean_and_the_last_rotary_key():
    latent, rotary_key = torch.randn(2, 1, 19, 8), torch.randn(2, 1, 19, 4)
    context = windowed_context(None, torch.arange(19)[None], 1, 6, 3)
    assert context.block_ends.tolist() == [[2, 5, 8, 11]]
    latents, keys = summarise_blocks(context, latent, rotary_key, 1e-6)
    assert torch.equal(latents[:, :, 4:], latent[:, :, 13:]) and torch.equal(keys[:, :, 4:], rotary_key[:, :, 13:])
    for n, end in enumerate([2, 5, 8, 11]):
        assert_same("latent", rms_norm(latent[:, :, end - 2 : end + 1].mean(2), 1e-6), latents[:, :, n])
        assert torch.equal(keys[:, :, n], rotary_key[:, :, end])


@pytest.mark.parametrize("pad", PADDING)
@pytest.mark.parametrize(
    "pieces", [[1] * 29, [12] + [1] * 17, [9, 1, 7, 2, 10], [3, 26]], ids=lambda p: f"{len(p)}pieces"
)
@pytest.mark.parametrize("window, stride", SETTINGS)
def test_cached_decode_equals_full_forward(window, stride, pieces, pad):
    model, ids = make_model(window, stride), torch.randint(0, 256, (2, 29))
    real = left_padded(29, pad)
    mask = real.long() if pad else None
    full = model(ids, attention_mask=mask, use_cache=False).logits
    assert_close(decode(model, ids, pieces, mask)[real], full[real])


@pytest.mark.parametrize("window, stride", SETTINGS)
def test_left_padding_changes_no_row(window, stride):
    model, ids = make_model(window, stride), torch.randint(0, 256, (2, 29))
    mask = left_padded(29, 7)
    batch = model(ids, attention_mask=mask.long()).logits
    assert_close(batch[0, 7:], model(ids[:1, 7:]).logits[0])
    assert_close(batch[1], model(ids[1:]).logits[0])


@pytest.mark.parametrize("window, stride", SETTINGS)
def test_position_sees_no_later_byte(window, stride):
    model, ids = make_model(window, stride), torch.randint(0, 256, (2, 29))
    changed = ids.clone()
    changed[:, 13] = (changed[:, 13] + 1) % 256
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :13], after[:, :13])
    assert (before[:, 13:16] - after[:, 13:16]).abs().amax((0, 2)).min() > 0


@pytest.mark.parametrize("stride, reaches", [(0, False), (4, True)])
def test_only_summaries_reach_beyond_the_window(stride, reaches):
    """One layer sees W bytes, and trigrams two more; an earlier byte arrives through its block or not at all."""
    model, ids = make_model(4, stride, num_hidden_layers=1), torch.randint(0, 256, (1, 29))
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 256
    before, after = model(ids).logits[:, 15:], model(changed).logits[:, 15:]
    assert torch.equal(before, after) != reaches


def test_a_window_over_everything_is_plain_attention():
    ids = torch.randint(0, 256, (2, 29))
    plain = ArbForCausalLM(preset_config("arb-tiny", compute="float")).eval()
    windowed = make_model(29, 4)
    windowed.load_state_dict(plain.state_dict())
    assert_close(windowed(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("stride, rows", [(0, 6), (4, 6 + 8), (3, 6 + 11)])
def test_decoding_expands_the_window_and_the_summaries_only(stride, rows, monkeypatch):
    """After 40 cached bytes one more costs W + (41 - W) / s rows of kv_up_proj; the cache keeps every latent."""
    model, ids = make_model(6, stride), torch.randint(0, 256, (1, 41))
    cache = model(ids[:, :40], use_cache=True).past_key_values
    expanded = []
    matrix, forward = model.model.blocks[0].attention.kv_up_proj, TernaryLinear.forward

    def counting(layer, x):
        expanded.extend([x.shape[-2]] if layer is matrix else [])
        return forward(layer, x)

    monkeypatch.setattr(TernaryLinear, "forward", counting)
    model(ids[:, 40:], past_key_values=cache)
    assert expanded == [rows]
    assert cache.layers[0].keys.shape[2] == 41


def test_gradients_reach_bytes_through_summaries():
    """Also under gradient checkpointing, which makes the same forward again."""
    ids = torch.randint(0, 256, (2, 29))

    def table_gradient(checkpointing):
        torch.manual_seed(0)
        model = make_model(4, 3, num_hidden_layers=1).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        seen = []
        model.get_input_embeddings().gradient_sink = Sink(lambda _, dW: seen.append(dW.clone()))
        model(ids).logits[:, 20].square().sum().backward()
        return seen[0]

    plain = table_gradient(False)
    assert plain[ids[:, :12].flatten()].abs().amax(1).min() > 0
    assert_same("dW", plain, table_gradient(True))


def test_generation_cached_uncached_and_batched():
    model, ids = make_model(5, 2), torch.randint(0, 256, (1, 13))
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    alone = model.generate(ids, **settings)
    assert torch.equal(alone, model.generate(ids, use_cache=False, **settings))
    padded = torch.cat([torch.full((1, 4), PAD), ids], 1)
    both = torch.cat([padded, torch.randint(0, 256, (1, 17))])
    batch = model.generate(both, attention_mask=(both != PAD).long(), **settings)
    assert torch.equal(batch[0, 4:], alone[0])
