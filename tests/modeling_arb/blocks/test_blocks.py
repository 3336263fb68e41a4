"""Every optional block: causal in training too, cached, resumable, learning; small checkpoints in larger stacks."""

import json

import pytest
import torch

from arb_kernels.blocks.ngram_hash import hash_tokens, mix_bits, ngram_slots, to_slot
from configuration_arb import preset_config
from configuration_arb.optional_blocks import OPTIONAL_BLOCKS
from modeling_arb import ArbForCausalLM
from modeling_arb.checkpoints.integrity import OPTIONAL_PARTS
from support.gradients import Sink
from support.tensors import assert_same, decode, random_text, training_step
from training_arb.memory.state_audit import audit_model, state_hash
from training_arb.optim.integer_optimizer import IntegerOptimizer

BOOK = {"size": 32, "dim": 8}
EXPERTS = {"num_experts": 4}
BLOCKS = {
    "text_sequencer": {"text_sequencer": {"hidden_size": 24}},
    "memgram": {"memgram": {"slots": 64, "dim": 8}},
    "windowed_attention": {"windowed_attention": {"window": 6, "stride": 3}},
    "codebook": {"codebook": BOOK},
    "large-codebook": {"codebook": {"size": 1 << 15, "dim": 8}},
    "experts": {"moe_graph": EXPERTS},
    "graph": {"codebook": BOOK, "moe_graph": {**EXPERTS, "active_edges": 64}},
    "composite": {"codebook": BOOK, "composite": BOOK},
    "output_router": {"output_router": {"num_heads": 2, "gate_size": 8}},
    "head_layers": {"head_layers": 2, "head_intermediate_size": 40},
    "full": {},
}


def make(block, rule="momentum", **settings):
    torch.manual_seed(0)
    preset = "arb-tiny-full" if block == "full" else "arb-tiny"
    model = ArbForCausalLM(preset_config(preset, update_rule=rule, **BLOCKS[block]))
    return model, IntegerOptimizer(model, table_threshold=2, **settings)


@pytest.mark.parametrize("block", BLOCKS)
def test_training_never_looks_ahead(block):
    """After steps that filled books and graphs: later bytes change no earlier logit, and a forward changes no state."""
    model, optimizer = make(block)
    for seed in range(3):
        training_step(model, optimizer, random_text(seed, 3))
    ids = random_text(9, 3)
    changed = ids.clone()
    changed[:, 15:] = random_text(10, 3)[:, 15:]
    before = state_hash(model)
    first, second = model(ids, labels=ids).logits, model(changed, labels=changed).logits
    assert torch.equal(first[:, :15], second[:, :15])
    assert not torch.equal(first[:, 15:], second[:, 15:])
    assert state_hash(model) == before


TEXTS = [(9, 24), (10, 31), (11, 38)]  # seed and length


@pytest.fixture(scope="module", params=[*BLOCKS, "memgram-correlation"])
def trained(request):
    """A model of each block in eval mode after two steps."""
    block = request.param.removesuffix("-correlation")
    model, optimizer = make(block, "momentum" if block == request.param else "correlation")
    for seed in range(2):
        training_step(model, optimizer, random_text(seed, 3))
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("seed, length", TEXTS)
def test_cached_decode_equals_the_full_forward(trained, seed, length):
    """Bit for bit, one byte at a time and in unequal pieces."""
    ids = random_text(seed, 3, length)
    full = trained(ids, use_cache=False).logits
    for pieces in (1, [9, 1, 1, 5, 1, length - 17], [3, 13, length - 16]):
        assert torch.equal(decode(trained, ids, pieces), full), pieces


@torch.no_grad()
@pytest.mark.parametrize("seed, length", TEXTS)
def test_logits_depend_on_the_bytes_before_and_nothing_else(trained, seed, length):
    """Not on what follows, on other rows, on padding to the left, nor on whether gradients are wanted: bit for bit."""
    ids = random_text(seed, 3, length)
    full = trained(ids, use_cache=False).logits
    for prefix in (1, 5, 16, 17):
        assert torch.equal(trained(ids[:, :prefix], use_cache=False).logits, full[:, :prefix]), prefix
    for row in range(3):
        assert torch.equal(trained(ids[row : row + 1], use_cache=False).logits, full[row : row + 1])
    padded = torch.cat([torch.full((3, 7), 256), ids], 1)
    mask = (torch.arange(length + 7) >= 7).long().expand(3, -1)
    assert torch.equal(trained(padded, attention_mask=mask, use_cache=False).logits[:, 7:], full)
    assert torch.equal(decode(trained, padded, [9, 1, 1, 5, length - 9], mask)[:, 7:], full)
    with torch.enable_grad():
        assert torch.equal(trained(ids, use_cache=False).logits, full)


@pytest.mark.parametrize("rule", ["momentum", "flip", "correlation"])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_checkpoint_goes_on_bit_for_bit(tmp_path, block, rule):
    model, optimizer = make(block, rule)
    for seed in range(2):
        training_step(model, optimizer, random_text(seed, 3))
    model.save_pretrained(tmp_path)
    resumed = ArbForCausalLM.from_pretrained(tmp_path).train()
    again = IntegerOptimizer(resumed, table_threshold=2)
    again.load_state_dict(optimizer.state_dict())
    for seed in range(2, 4):
        training_step(model, optimizer, random_text(seed, 3))
        training_step(resumed, again, random_text(seed, 3))
    assert state_hash(model) == state_hash(resumed)
    assert audit_model(resumed, again).clean


@pytest.mark.parametrize("block", [name for name in BLOCKS if name != "windowed_attention"])
def test_every_matrix_of_a_block_is_trained(block):
    model, optimizer = make(block)
    handed = set()
    for name, matrix in model.ternary_matrices().items():
        matrix.gradient_sink = Sink(lambda *_, name=name: handed.add(name), then=optimizer)
    for seed in range(2):  # before the first step there are no edges, and no message to project
        training_step(model, optimizer, random_text(seed, 3))
    assert handed == set(model.ternary_matrices())


@pytest.mark.parametrize("block", ["memgram", "full"])
def test_a_block_learns(block):
    model, optimizer = make(block, lr=0.05)
    ids = random_text(0, rows=4, ctx=48)
    losses = [training_step(model, optimizer, ids) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]


def test_auxiliary_losses_join_the_gradient_and_not_the_value():
    model, _ = make("full")
    ids = random_text(0, 3)
    with torch.no_grad():
        value = model(ids, labels=ids).loss
    out = model(ids, labels=ids)
    assert out.auxiliary_loss > 0.1
    assert_same("loss", value, out.loss.detach())
    handed = {}
    for share in (None, 4):
        bridge = model.model.shared_vq.bridge_in
        bridge.gradient_sink = Sink(lambda _, dW, share=share: handed.__setitem__(share, dW.clone()))
        model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=share).loss.backward()
    assert not handed[4].any() and handed[None].any()  # no scored byte: no share of the step


def test_modality_heads_train_beside_the_text():
    config = preset_config(
        "arb-tiny",
        video_head={"latent_dim": 6, "hidden_size": 20},
        talker_head={"num_codes": 9, "hidden_size": 20},
    )
    torch.manual_seed(0)
    model = ArbForCausalLM(config)
    optimizer = IntegerOptimizer(model, lr=0.05)
    ids, latents, codes = random_text(0, 3), torch.randn(3, 24, 6), torch.randint(0, 9, (3, 24))
    assert model(ids).video_latents is None
    spoken = model(ids, output_modalities=True)
    assert spoken.video_latents.shape == (3, 24, 6) and spoken.talker_logits.shape == (3, 24, 9)
    losses = []
    for _ in range(40):
        out = model(ids, labels=ids, video_targets=latents, talker_labels=codes)
        out.loss.backward()
        optimizer.step()
        losses.append(out.auxiliary_loss.item())
    assert losses[-1] < 0.8 * losses[0]
    ignored = torch.full_like(codes, -100)
    assert model(ids, labels=ids, talker_labels=ignored).auxiliary_loss == 0


def test_a_small_checkpoint_starts_a_larger_stack(tmp_path):
    small, _ = make("memgram")
    small.save_pretrained(tmp_path)
    config = preset_config("arb-tiny-full", memgram=BLOCKS["memgram"]["memgram"])
    large = ArbForCausalLM.from_pretrained(tmp_path, config=config)
    loaded = large.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in small.state_dict().items())
    for name, matrix in large.ternary_matrices().items():
        assert (matrix.T_packed.any() and matrix.E.any()) or matrix.init_fan_in == 1, name
    assert (large.model.moe_graph.motif_graph.active_edge_src == -1).all()
    assert training_step(large, IntegerOptimizer(large), random_text(0, 3)) < 20


def test_new_parts_are_named_in_one_warning(tmp_path, monkeypatch):
    small, _ = make("memgram")
    small.save_pretrained(tmp_path)
    said = []
    monkeypatch.setattr("modeling_arb.checkpoints.integrity.logger.warning", said.append)
    ArbForCausalLM.from_pretrained(tmp_path, codebook=BOOK, head_layers=1)
    assert len(said) == 1 and "byte_head.layers, model.shared_vq" in said[0] and "memgram" not in said[0]
    said.clear()
    ArbForCausalLM.from_pretrained(tmp_path)
    assert not said


def test_a_stored_block_may_not_be_missing_or_misshapen(tmp_path):
    small, _ = make("memgram")
    kept = {name: tensor for name, tensor in small.state_dict().items() if "memgram" not in name}
    small.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(ValueError, match=r"tensor model\.memgram\.\S+ is missing"):
        ArbForCausalLM.from_pretrained(tmp_path)
    small.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.memgram\.table\.\w+ has shape \(64, \d+\), the config requires \(65"):
        ArbForCausalLM.from_pretrained(tmp_path, memgram={"slots": 65, "dim": 8})
    with pytest.raises(ValueError, match=r"memgram\.slots=0 must be"):
        ArbForCausalLM.from_pretrained(tmp_path, memgram={"slots": 0, "dim": 8})


def test_a_checkpoint_from_before_the_blocks_still_loads(tmp_path):
    model = ArbForCausalLM(preset_config("arb-tiny"))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for field in (*OPTIONAL_BLOCKS, "head_layers", "head_intermediate_size", "table_rule"):
        config.pop(field, None)
    path.write_text(json.dumps({**config, "sidecars": None, "composite": None}))
    assert state_hash(ArbForCausalLM.from_pretrained(tmp_path)) == state_hash(model)


def test_every_optional_part_is_known_to_the_loader():
    plain = {name for name, _ in ArbForCausalLM(preset_config("arb-tiny")).named_modules()}
    config = preset_config("arb-tiny-full", video_head={"latent_dim": 3}, talker_head={"num_codes": 3})
    new = {name for name, _ in ArbForCausalLM(config).named_modules()} - plain
    assert all(any(f"{name}.".startswith(f"{part}.") for part in OPTIONAL_PARTS) for name in new)


def test_hashes_spread_and_keep_order():
    pairs = torch.cartesian_prod(torch.arange(-1, 60), torch.arange(60))
    assert hash_tokens(pairs, 0).unique().numel() == len(pairs)
    assert not torch.equal(hash_tokens(pairs, 0), hash_tokens(pairs, 1))
    slots = to_slot(hash_tokens(pairs, 0), 100)
    counts = torch.bincount(slots, minlength=100)
    assert slots.min() >= 0 and len(counts) == 100 and counts.max() < 3 * counts.float().mean()
    flipped = (mix_bits(torch.arange(1000)) ^ mix_bits(torch.arange(1000) ^ 1)) & 0xFFFFFFFF
    share = sum((flipped >> bit & 1).float().mean() for bit in range(32)) / 32
    assert 0.4 < share < 0.6


def test_ngram_slots_end_at_their_position():
    ids = torch.randint(0, 256, (2, 12))
    slots = ngram_slots(ids, 4, 1000)
    assert slots.shape == (2, 9)
    for t in range(9):
        assert torch.equal(slots[:, t], to_slot(hash_tokens(ids[:, t : t + 4], 4), 1000))
