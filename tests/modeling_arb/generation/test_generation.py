"""generate(): every mode that transformers ships gives the ids of its uncached twin; caches, padding, limits, sizes."""

import copy
import json
import logging

import pytest
import torch
from transformers import DynamicCache, StaticCache, StoppingCriteria, StoppingCriteriaList, pipeline
from transformers.cache_utils import Cache

from configuration_arb import PRESETS, preset_config
from modeling_arb import ArbForCausalLM, contrastive_search
from tokenization_arb import ArbTokenizer
from training_arb.chat.cache_audit import CacheSize, cache_size

PAD, EOS, BOS = 256, 257, 258
TOKENIZER = ArbTokenizer()
PROMPTS = ["def read(self, name):\n    return self.name\ndef read(self", "Gr\u00f6\u00dfe 42"]
SAMPLE = {"do_sample": True, "temperature": 0.8}
MODES = {
    "greedy": {},
    "sample": SAMPLE,
    "filters": {**SAMPLE, "top_k": 60, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.9, "repetition_penalty": 1.5},
    "several_samples": {**SAMPLE, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "beam_sample": {**SAMPLE, "num_beams": 3},
    "several_beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5, "early_stopping": True},
    "words": {"no_repeat_ngram_size": 2, "bad_words_ids": [[32, 32], [101]], "sequence_bias": {(97, 98): 9.0}},
    "guidance": {"guidance_scale": 1.5},
    "ends": {"min_new_tokens": 3, "eos_token_id": [*range(128), EOS]},
    "watermark": {**SAMPLE, "watermarking_config": {"bias": 2.5}},
    "processor": {"logits_processor": [lambda ids, scores: scores.roll(1, -1)]},
}


@pytest.fixture(scope="module", params=["arb-tiny", "arb-tiny-full"])
def model(request):
    torch.manual_seed(0)
    return ArbForCausalLM(preset_config(request.param)).eval()


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return ArbForCausalLM(preset_config("arb-tiny", max_position_embeddings=64)).eval()


@pytest.fixture
def batch():
    """Two prompts of unequal length, the shorter one padded on the left."""
    return TOKENIZER(PROMPTS, padding=True, return_tensors="pt")


def new_ids(model, batch, seed=7, max_new_tokens=6, **settings):
    torch.manual_seed(seed)
    return model.generate(**batch, max_new_tokens=max_new_tokens, **settings)[:, batch.input_ids.shape[1] :]


def one_row(text):
    return TOKENIZER([text], return_tensors="pt")


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_equals_its_uncached_twin(model, batch, mode):
    expected = new_ids(model, batch, use_cache=False, **MODES[mode])
    assert torch.equal(new_ids(model, batch, **MODES[mode]), expected)
    assert torch.equal(new_ids(model, batch, cache_implementation="static", **MODES[mode]), expected)


def unhesitating(assistant):
    """An untrained model is sure of nothing: let it propose several bytes all the same."""
    assistant.generation_config.assistant_confidence_threshold = 0.0
    return assistant


@pytest.mark.parametrize("settings", [{"prompt_lookup_num_tokens": 4}, {"assistant_model": None}], ids=list)
def test_assisted_decoding_equals_greedy(model, settings, monkeypatch):
    """Candidates are read, most of them refused, and the cache goes back, the sequencer's state with it."""
    removed, crop = [], Cache.crop

    def counting(cache, tokens_to_remove):
        removed.append(-tokens_to_remove)
        crop(cache, tokens_to_remove)

    monkeypatch.setattr(Cache, "crop", counting)
    if "assistant_model" in settings:
        torch.manual_seed(1)
        settings = {"assistant_model": unhesitating(ArbForCausalLM(model.config).eval())}
    prompt = one_row("abcabcabdabcabcabdabc")
    out = new_ids(model, prompt, max_new_tokens=12, **settings)
    assert max(removed) > 1
    assert torch.equal(out, new_ids(model, prompt, max_new_tokens=12, use_cache=False))


def test_an_assistant_that_is_right_saves_steps(model):
    """The model as its own assistant: every candidate is accepted, and the ids are the same."""
    prompt, steps = one_row(PROMPTS[0]), []
    hook = model.byte_head.register_forward_hook(lambda _module, inputs, _out: steps.append(inputs[0].shape[1]))
    try:
        out = new_ids(model, prompt, max_new_tokens=12, assistant_model=unhesitating(copy.deepcopy(model)))
    finally:
        hook.remove()
    assert max(steps) > 2
    assert torch.equal(out, new_ids(model, prompt, max_new_tokens=12, use_cache=False))


@pytest.mark.parametrize("text", ["e", "\u00e9", "fo\u00df"])
def test_stop_strings(tiny, text):
    """Bytes are biased to spell the string, in every row at a place of its own; the characters before it go on."""
    spelled = list(text.encode())
    rows, script = 2, [120, 120, *spelled, 121, 121, *spelled, 122]

    def spell(ids, scores):
        step = ids.shape[1] - 1
        wanted = torch.tensor([script[step], script[step + 1]])
        return torch.full_like(scores, -100.0).scatter(1, wanted[:, None], 0.0)

    start = {"input_ids": torch.full((rows, 1), 120), "attention_mask": torch.ones(rows, 1, dtype=torch.long)}
    settings = {"max_new_tokens": len(script) - 1, "logits_processor": [spell]}
    out = tiny.generate(**start, stop_strings=[text, "never"], tokenizer=TOKENIZER, **settings)
    ends = [2 + len(spelled), 1 + len(spelled)]
    for row, end in zip(out[:, 1:].tolist(), ends, strict=True):
        assert row[:end][-len(spelled) :] == spelled
        assert row[end:] == [PAD] * (max(ends) - end)
    with pytest.raises(ValueError, match="tokenizer"):
        tiny.generate(**start, stop_strings=[text], **settings)


def test_a_stopping_criterion_ends_generation(model, batch):
    class AfterThree(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            return torch.full((len(ids),), ids.shape[1] >= batch.input_ids.shape[1] + 3)

    out = new_ids(model, batch, stopping_criteria=StoppingCriteriaList([AfterThree()]))
    assert torch.equal(out, new_ids(model, batch)[:, :3])


def test_generation_stops_at_eos_by_itself(model, batch, tmp_path):
    config = model.generation_config
    assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == (EOS, PAD, BOS)
    out = new_ids(model, batch, sequence_bias={(EOS,): 100.0})
    assert out.tolist() == [[EOS], [EOS]]
    assert new_ids(model, batch, min_new_tokens=6, sequence_bias={(EOS,): 100.0}).shape == (2, 6)
    model.save_pretrained(tmp_path, training_state=False)
    stored = json.loads((tmp_path / "generation_config.json").read_text())
    assert (stored["eos_token_id"], stored["pad_token_id"], stored["bos_token_id"]) == (EOS, PAD, BOS)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"repetition_penalty": 1.2}], ids=str)
def test_a_padded_row_gives_what_it_gives_alone(model, batch, settings):
    both = new_ids(model, batch, **settings)
    for row, text in zip(both, PROMPTS, strict=True):
        alone = new_ids(model, one_row(text), **settings)[0]
        assert torch.equal(row[: len(alone)], alone)
        assert (row[len(alone) :] == PAD).all()


def test_cached_logits_are_those_of_the_full_forward_bit_for_bit(tiny):
    ids, seen = torch.randint(0, 256, (3, 40)), []
    hook = tiny.byte_head.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits))
    force = {"max_new_tokens": 20, "logits_processor": [lambda read, scores: forced(ids[:, read.shape[1]], scores)]}
    try:
        for use_cache in (True, False):
            tiny.generate(ids[:, :20], use_cache=use_cache, eos_token_id=None, **force)
    finally:
        hook.remove()
    assert len(seen) == 40
    assert all(torch.equal(cached, full) for cached, full in zip(seen[:20], seen[20:], strict=True))


def forced(tokens, scores):
    return torch.full_like(scores, -100.0).scatter(1, tokens[:, None], 0.0)


def test_prefill_in_chunks(model):
    prompt = one_row(PROMPTS[0])
    assert torch.equal(new_ids(model, prompt, prefill_chunk_size=16), new_ids(model, prompt, use_cache=False))


@pytest.mark.parametrize("kind", ["dynamic", "static", "bare"])
def test_a_cache_goes_on_where_it_stopped(model, kind):
    """Two calls of generate share a cache; the second reads what the first has not."""
    caches = {"dynamic": lambda: DynamicCache(config=model.config), "bare": DynamicCache}
    caches["static"] = lambda: StaticCache(config=model.config, max_cache_len=100)
    cache, prompt = caches[kind](), one_row(PROMPTS[0])
    first = model.generate(**prompt, max_new_tokens=6, past_key_values=cache)
    longer = torch.cat([first, torch.tensor([list(b"and on")])], 1)
    assert cache.get_seq_length() == first.shape[1] - 1
    whole = {"input_ids": longer, "attention_mask": torch.ones_like(longer), "max_new_tokens": 6}
    assert torch.equal(model.generate(**whole, past_key_values=cache), model.generate(**whole, use_cache=False))


def test_a_cropped_cache_has_never_read_what_was_removed(model):
    ids = torch.randint(0, 256, (2, 40))
    expected = model(ids[:, 30:], past_key_values=model(ids[:, :30], use_cache=True).past_key_values).logits
    cache = DynamicCache(config=model.config)
    model.model.side_layers.add_to(cache)
    cache.activate_past_recording()
    model(ids[:, :24], past_key_values=cache)
    cache.crop(0)
    model(torch.cat([ids[:, 24:30], torch.full((2, 5), 7)], 1), past_key_values=cache)
    cache.crop(-5)
    assert torch.equal(model(ids[:, 30:], past_key_values=cache).logits, expected)


def test_a_cache_that_does_not_record_refuses_to_go_back(model):
    cache = model(torch.randint(0, 256, (1, 30)), use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-1)


def test_a_reset_cache_is_a_fresh_one(model):
    ids = torch.randint(0, 256, (2, 20))
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=20)):
        expected = model(ids, past_key_values=cache).logits
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(model(ids, past_key_values=cache).logits, expected)


def test_a_static_cache_stays_where_it_is_and_ends_with_its_length(tiny):
    cache, ids = StaticCache(config=tiny.config, max_cache_len=9), torch.randint(0, 256, (1, 8))
    tiny(ids, past_key_values=cache)
    place = cache.layers[1].keys.data_ptr()
    tiny(ids[:, :1], past_key_values=cache)
    assert (cache.get_seq_length(), cache.layers[1].keys.data_ptr()) == (9, place)
    assert cache.layers[1].keys.shape[2] == 9
    with pytest.raises(ValueError, match="max_cache_len=9: 10 positions do not fit"):
        tiny(ids[:, :1], past_key_values=cache)


def test_caches_of_other_models_are_refused(tiny):
    ids = torch.randint(0, 256, (1, 8))
    other = ArbForCausalLM(preset_config("arb-tiny", num_hidden_layers=5)).eval()
    with pytest.raises(ValueError, match="past_key_values has 6 layers: this model's has 3"):
        tiny(ids, past_key_values=other(ids, use_cache=True).past_key_values)
    filled = StaticCache(config=tiny.config, max_cache_len=9)
    filled.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    with pytest.raises(ValueError, match="filled by another model"):
        tiny(ids, past_key_values=filled)


def test_modes_that_transformers_does_not_ship_say_so(tiny, batch):
    """Contrastive search is remote code since transformers 5; ours is tested below."""
    with pytest.raises(ValueError, match="transformers-community/contrastive-search"):
        new_ids(tiny, batch, penalty_alpha=0.6, top_k=4)
    with pytest.raises(ValueError, match="inputs_embeds is not supported"):
        tiny.generate(inputs_embeds=torch.zeros(1, 3, 64), max_new_tokens=2)
    with pytest.raises(ValueError, match="Static cache"):
        new_ids(tiny, one_row("abcabc"), prompt_lookup_num_tokens=3, cache_implementation="static")


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_contrastive_search_equals_its_uncached_twin(model, batch, alpha):
    settings = {"custom_generate": contrastive_search, "penalty_alpha": alpha, "top_k": 3}
    both = new_ids(model, batch, **settings)
    assert torch.equal(both, new_ids(model, batch, use_cache=False, **settings))
    assert torch.equal(both[1:], new_ids(model, one_row(PROMPTS[1]), **settings))
    assert torch.equal(both, new_ids(model, batch)) == (alpha == 0)


def test_contrastive_search_chooses_by_the_formula(model):
    """Each byte by hand: probability against the greatest cosine with what stands before."""
    ids, expected = torch.randint(0, 256, (1, 12)), []
    for _ in range(5):
        read = torch.cat([ids, torch.tensor([expected], dtype=torch.long)], 1)
        before = model.model(read).last_hidden_state[0]
        probability, candidates = model(read).logits[0, -1].softmax(-1).topk(4)
        scores = []
        for p, candidate in zip(probability, candidates, strict=True):
            hidden = model.model(torch.cat([read, candidate[None, None]], 1)).last_hidden_state[0, -1]
            scores.append(0.4 * p - 0.6 * torch.cosine_similarity(before, hidden, dim=-1).max())
        expected.append(candidates[torch.stack(scores).argmax()].item())
    start = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 5}
    search = {"custom_generate": contrastive_search, "penalty_alpha": 0.6, "top_k": 4}
    out = model.generate(**start, **search, return_dict_in_generate=True)
    assert out.sequences[0, 12:].tolist() == expected
    with pytest.raises(ValueError, match="past_key_values must be empty"):
        model.generate(**start, **search, past_key_values=out.past_key_values)
    with pytest.raises(ValueError, match="penalty_alpha=None"):
        model.generate(**start, custom_generate=contrastive_search, top_k=4)
    with pytest.raises(ValueError, match="top_k=0"):
        model.generate(**start, custom_generate=contrastive_search, penalty_alpha=0.6, top_k=0)


def test_hidden_states(model, batch):
    out = model(**batch, output_hidden_states=True)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    assert {tuple(hidden.shape) for hidden in out.hidden_states} == {(*batch.input_ids.shape, 64)}
    assert torch.equal(out.hidden_states[-1], model.model(**batch).last_hidden_state)
    block = model.model.blocks[0]
    seen = []
    hook = block.register_forward_hook(lambda _module, inputs, y: seen.extend([inputs[0], y]))
    try:
        again = model(**batch, output_hidden_states=True).hidden_states
    finally:
        hook.remove()
    assert torch.equal(again[0], seen[0]) and torch.equal(again[1], seen[1])
    assert model(**batch).hidden_states is None


def test_up_to_the_last_position_and_beyond(tiny, caplog):
    """Within the model's positions nothing is said; past them transformers warns, and the twins stay equal."""
    logging.Logger.warning_once.cache_clear()
    prompt = one_row("x" * 50)
    within = new_ids(tiny, prompt, max_new_tokens=14)
    assert torch.equal(within, new_ids(tiny, prompt, max_new_tokens=14, use_cache=False))
    assert "predefined maximum length" not in caplog.text
    beyond = new_ids(tiny, prompt, max_new_tokens=20, eos_token_id=None)
    assert torch.equal(beyond, new_ids(tiny, prompt, max_new_tokens=20, eos_token_id=None, use_cache=False))
    assert "predefined maximum length (64)" in caplog.text


def test_a_long_context_equals_its_uncached_twin(model):
    prompt = one_row("".join(map(chr, torch.randint(97, 105, (300,)))))
    expected = new_ids(model, prompt, use_cache=False, max_new_tokens=3)
    assert torch.equal(new_ids(model, prompt, max_new_tokens=3), expected)


def test_pipeline(model):
    pipe = pipeline("text-generation", model=model, tokenizer=TOKENIZER)
    greedy = {"max_new_tokens": 6, "do_sample": False}
    expected = [
        TOKENIZER.decode(new_ids(model, one_row(text), max_new_tokens=6)[0], skip_special_tokens=True)
        for text in PROMPTS
    ]
    alone = [pipe(text, **greedy)[0]["generated_text"] for text in PROMPTS]
    assert alone == [text + new for text, new in zip(PROMPTS, expected, strict=True)]
    assert [row[0]["generated_text"] for row in pipe(PROMPTS, batch_size=2, **greedy)] == alone
    assert [row[0]["generated_text"] for row in pipe(PROMPTS, return_full_text=False, **greedy)] == expected
    messages = [{"role": "user", "content": "hello"}]
    said = pipe(messages, **greedy)[0]["generated_text"]
    ids = torch.tensor([TOKENIZER.encode_chat(messages, add_generation_prompt=True)])
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), **greedy)[0, ids.shape[1] :]
    content = TOKENIZER.decode(answer, skip_special_tokens=True)
    assert said == [*messages, {"role": "assistant", "content": content}]


SMALL = {"num_hidden_layers": 1, "intermediate_size": 64, "head_layers": 0}
SMALL |= dict.fromkeys(["codebook", "moe_graph", "composite", "output_router", "video_head", "talker_head"])


@pytest.mark.parametrize("preset", PRESETS)
def test_latents_take_a_quarter_of_plain_keys_and_values(preset):
    """Read off the tensors of a cache; blocks that keep nothing for each byte are left out of what is built."""
    model = ArbForCausalLM(preset_config(preset, training_state=False, **SMALL)).eval()
    caches = [model(torch.randint(0, 256, (2, n)), use_cache=True).past_key_values for n in (20, 45)]
    size = cache_size(caches[0], model.config)
    assert size.plain_per_token == 2 * model.config.hidden_size * 4
    assert 0 < size.per_token <= size.plain_per_token / 4
    assert cache_size(caches[1], model.config) == size


def test_cache_size_counts_every_tensor(model):
    cache = model(torch.randint(0, 256, (2, 20)), use_cache=True).past_key_values
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    size = cache_size(cache, model.config)
    assert 2 * (20 * size.per_token + size.fixed) == sum(tensor.nbytes for tensor in tensors)
    static = StaticCache(config=model.config, max_cache_len=50)
    model(torch.randint(0, 256, (2, 20)), past_key_values=static)
    assert cache_size(static, model.config) == size
    with pytest.raises(ValueError, match="past_key_values is empty"):
        cache_size(DynamicCache(config=model.config), model.config)
    assert str(CacheSize(1152, 16, 4608)) == (
        "cache: 1,152 bytes a token, 25.0% of plain multi-head keys and values' 4,608; 16 bytes beside"
    )
