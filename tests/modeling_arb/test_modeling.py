"""ArbModel and ArbForCausalLM: causality, cached decoding, generation, loss, gradient checkpointing."""

import math

import pytest
import torch
import torch.nn.functional as F

from configuration_arb import preset_config
from modeling_arb import ArbForCausalLM, ArbModel
from support.gradients import Sink
from support.tensors import assert_same

PAD = 256


@pytest.fixture(params=["arb-tiny", "arb-tiny-full"])
def model(request):
    return ArbForCausalLM(preset_config(request.param)).eval()


@pytest.fixture
def ids():
    return torch.randint(0, 256, (2, 21))


def assert_close(out, ref):
    assert (out - ref).abs().max() < 1e-4 * ref.abs().max()


def test_position_sees_no_later_byte(model, ids):
    changed = ids.clone()
    changed[:, 11] = (changed[:, 11] + 1) % 256
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :11], after[:, :11])
    assert (before[:, 11:] - after[:, 11:]).abs().amax((0, 2)).min() > 0


def test_trigram_embedding_sums_three_tables(model, ids):
    embedding = model.model.byte_embedding
    tables = [table.effective_weight(torch.float32) for table in embedding.tables]
    out = embedding(ids, ids[:, :0], torch.float32)
    for t in (0, 1, 2, 20):
        bytes_back = [ids[1, t - back] if t >= back else PAD for back in range(3)]
        assert_close(out[1, t], sum(table[byte] for table, byte in zip(tables, bytes_back, strict=True)))


@pytest.mark.parametrize("pieces", [[21], [1] * 21, [7, 1, 1, 12], [2, 19]], ids=str)
def test_cached_decode_equals_full_forward(model, ids, pieces):
    full = model(ids, use_cache=False).logits
    cache, logits = None, []
    for piece in ids.split(pieces, dim=1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    assert_close(torch.cat(logits, 1), full)


def test_cache_keeps_a_quarter_of_plain_keys_and_values(model, ids):
    config = model.config
    cache = model(ids, use_cache=True).past_key_values
    kept = sum(
        layer.keys[0, 0, 0].numel() + layer.values[0, 0, 0].numel()
        for layer in cache.layers[: config.num_hidden_layers]
    )
    plain = config.num_hidden_layers * config.num_attention_heads * 2 * config.v_head_dim
    assert kept * 4 <= plain


@pytest.mark.parametrize("garbage", [PAD, 65])
def test_left_padding_changes_no_row(model, ids, garbage):
    """Whatever stands under the mask, a padded row gives what it gives alone."""
    short = ids[:1, :9]
    padded = torch.cat([torch.full((1, 12), garbage), short], 1)
    mask = torch.cat([torch.zeros(1, 12), torch.ones(1, 9)], 1).long()
    batch = model(torch.cat([padded, ids[1:]]), attention_mask=torch.cat([mask, torch.ones(1, 21).long()])).logits
    assert_close(batch[0, 12:], model(short).logits[0])
    assert_close(batch[1], model(ids[1:]).logits[0])


def test_greedy_generation_cached_uncached_and_batched(model, ids):
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    alone = model.generate(ids[:1, :8], **settings)
    assert torch.equal(alone, model.generate(ids[:1, :8], use_cache=False, **settings))
    padded = torch.cat([torch.full((1, 5), PAD), ids[:1, :8]], 1)
    both = torch.cat([padded, ids[1:, :13]])
    batch = model.generate(both, attention_mask=(both != PAD).long(), **settings)
    assert torch.equal(batch[0, 5:], alone[0])
    assert torch.equal(batch[1:], model.generate(ids[1:, :13], **settings))


def test_sampling_and_beams(model, ids):
    torch.manual_seed(3)
    first = model.generate(ids[:1, :8], max_new_tokens=20, do_sample=True, top_k=50)
    torch.manual_seed(3)
    assert torch.equal(first, model.generate(ids[:1, :8], max_new_tokens=20, do_sample=True, top_k=50))
    torch.manual_seed(4)
    assert not torch.equal(first, model.generate(ids[:1, :8], max_new_tokens=20, do_sample=True, top_k=50))
    beams = {"max_new_tokens": 10, "num_beams": 3, "do_sample": False}
    cached, uncached = (model.generate(ids[:, :8], use_cache=use, **beams) for use in (True, False))
    assert torch.equal(cached, uncached)


def test_loss_is_cross_entropy_of_the_next_byte_after_full_trigrams(model, ids):
    out = model(ids, labels=ids)
    rows = [(b, t) for b in range(2) for t in range(2, 20)]
    expected = sum(F.cross_entropy(out.logits[b, t], ids[b, t + 1]) for b, t in rows) / len(rows)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert out.loss.item() < 2 * math.log(288)
    labels = ids.clone()
    labels[:, 10:] = -100
    assert model(ids, labels=labels).loss.item() != pytest.approx(out.loss.item(), rel=1e-3)
    summed = model(ids, labels=ids, num_items_in_batch=4 * len(rows)).loss
    assert summed.item() == pytest.approx(out.loss.item() / 4, rel=1e-5)


def test_logits_to_keep(model, ids):
    full = model(ids).logits
    assert_close(model(ids, logits_to_keep=1).logits, full[:, -1:])
    assert_close(model(ids, logits_to_keep=torch.tensor([3, 5])).logits, full[:, [3, 5]])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_weight_gradients(ids, use_reentrant):
    def weight_gradients(checkpointing):
        torch.manual_seed(0)
        model = ArbForCausalLM(preset_config("arb-tiny")).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        seen = {}
        for name, matrix in model.ternary_matrices().items():
            matrix.gradient_sink = Sink(lambda _, dW, name=name: seen.setdefault(name, dW.clone()))
        model(ids, labels=ids).loss.backward()
        assert seen.keys() == model.ternary_matrices().keys()
        return seen

    plain, checkpointed = weight_gradients(False), weight_gradients(True)
    for name in plain:
        assert_same(name, plain[name], checkpointed[name])


def test_model_has_no_float_and_counts_its_weights(model):
    assert list(model.named_parameters()) == []
    assert [parameter.numel() for parameter in model.parameters()] == [0]  # stands for none
    with pytest.raises(ValueError, match="no float parameters to optimize"):
        torch.optim.AdamW(model.parameters())
    assert not any(buffer.is_floating_point() for buffer in model.buffers())
    assert model.num_parameters() == sum(matrix.levels().numel() for matrix in model.ternary_matrices().values())
    assert (model.dtype, model.device.type) == (torch.float32, "cpu")
    assert model.resize_token_embeddings(288) is model.get_input_embeddings()
    with pytest.raises(ValueError, match="new_num_tokens=300"):
        model.resize_token_embeddings(300)


def test_backbone_loads_from_the_language_model(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    backbone = ArbModel.from_pretrained(tmp_path).eval()
    assert torch.equal(backbone(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_dtype_argument_changes_activations_only(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    half = ArbForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half(ids).logits.dtype == torch.bfloat16
    for name, tensor in half.state_dict().items():
        assert_same(name, model.state_dict()[name], tensor)
