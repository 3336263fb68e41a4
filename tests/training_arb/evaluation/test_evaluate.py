"""Bits per byte of ARB and of others' models: against plain computations, side by side, and what is refused."""

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from configuration_arb import preset_config
from modeling_arb import ArbForCausalLM
from support.scripting import run_script
from tokenization_arb import ArbTokenizer
from training_arb.evaluation.eval_documents import as_text, file_documents, first_bytes
from training_arb.evaluation.eval_encoders import TokenizerEncoder
from training_arb.evaluation.eval_models import check_causal, load_evaluated, score

CPU = torch.device("cpu")
END = "<|endoftext|>"
PROSE = "Snow fell on the r\u00e9gion \u2014 the cat sat by the door; \u732b \U0001f408 <|eos|> <|endoftext|>. "
VOCABULARY, POSITIONS = 320, 64
TINY = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}


def bpe(bos, normalizer=None):
    """A byte-level BPE trained on the spot, 320 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat by the door; snow fell on the region. " * 3], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END if bos else None)


def tiny_llama(**changes):
    sizes = {"intermediate_size": 48, "max_position_embeddings": POSITIONS, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(**{**TINY, **sizes, **changes}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved models by name; gpt2 has a BOS, llama has none."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=POSITIONS, initializer_range=0.3)
    )
    saved = {
        "gpt2": (gpt2, bpe(bos=True)),
        "llama": (tiny_llama(), bpe(bos=False)),
        "arb": (ArbForCausalLM(preset_config("arb-tiny")), ArbTokenizer()),
        "arb-full": (ArbForCausalLM(preset_config("arb-tiny-full")), ArbTokenizer()),
    }
    for name, (model, tokenizer) in saved.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: str(root / name) for name in saved}


def loaded(folders, name):
    return load_evaluated(folders[name], CPU)


def nats_of(model, ids, first):
    """What ids[first:] cost, from one forward over them all."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    return -sum((logits[at - 1] - logits[at - 1].logsumexp(-1))[ids[at]].item() for at in range(first, len(ids)))


def slow_nats(model, ids, first, ctx, stride):
    """Each id alone, at the end of the first window that reaches it."""
    total, ctx = 0.0, min(ctx, len(ids))
    for target in range(first, len(ids)):
        begin = 0
        while begin + ctx <= target:
            begin += stride
        begin = min(begin, len(ids) - ctx)
        with torch.no_grad():
            logits = model(torch.tensor([ids[begin:target]])).logits[0, -1].double()
        total -= (logits - logits.logsumexp(-1))[ids[target]].item()
    return total


@pytest.mark.parametrize("start", ["auto", "bos", "eos", "none"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "arb"])
def test_one_window_is_one_forward(folders, name, start):
    evaluated, text = loaded(folders, name), "The cat sat by the door."
    if (name, start) == ("llama", "bos"):
        with pytest.raises(ValueError, match="start='bos': the tokenizer of model="):
            score(evaluated, [text.encode()], start=start)
        return
    tokens = [*text.encode()] if name == "arb" else evaluated.tokenizer(text)["input_ids"]
    special = {"gpt2": 0, "llama": 0, "arb": 258 if start == "bos" else 257}[name]
    begins = {"auto": name == "gpt2", "none": False}.get(start, True)
    first = 3 if name == "arb" and not begins else 1
    size = len(text) - (0 if begins else 3 if name == "arb" else len(evaluated.tokenizer.decode(tokens[:1])))
    found = score(evaluated, [text.encode()], start=start)
    nats = nats_of(evaluated.model, [special] * begins + tokens, first)
    assert found["bytes"] == size and found["changed_documents"] == 0
    assert found["tokens_per_byte"] == pytest.approx((len(tokens) + begins - first) / size)
    assert found["nats_per_byte"] == pytest.approx(nats / size, abs=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / size / math.log(2), abs=1e-5)


@pytest.mark.parametrize("name, ctx, stride", [("gpt2", 16, 8), ("gpt2", 64, 63), ("llama", 20, 3), ("arb", 40, 20)])
def test_windows_against_one_token_at_a_time(folders, name, ctx, stride):
    evaluated, documents = loaded(folders, name), [(PROSE * 2).encode(), b"the door", PROSE[:40].encode()]
    start_ids = evaluated.encoder.start_ids("auto", 3)
    rows = [evaluated.encoder.encode(document, start_ids) for document in documents]
    nats = sum(slow_nats(evaluated.model, row.scored.ids.tolist(), row.scored.first, ctx, stride) for row in rows)
    found = score(evaluated, documents, ctx, stride)
    size = sum(map(len, documents)) - (5 if name == "llama" else 0)
    assert found["bytes"] == size
    assert found["nats_per_byte"] == pytest.approx(nats / size, abs=1e-5)
    if name == "llama":
        assert [evaluated.tokenizer.decode(row.scored.ids[: row.scored.first]) for row in rows] == ["S", "the", "S"]


@pytest.mark.parametrize("start", ["auto", "bos", "eos"])
def test_arb_through_its_tokenizer_is_arb_by_bytes(folders, start):
    """The stock tokenizer of the exported folder, as another library reads it, gives the score of the bytes."""
    evaluated = loaded(folders, "arb")
    documents = [PROSE.encode() * 3, b"short", PROSE.encode()]
    by_bytes = score(evaluated, documents, 48, 24, start=start)
    tokenizer = AutoTokenizer.from_pretrained(folders["arb"])
    evaluated.encoder = TokenizerEncoder("arb", tokenizer)
    by_tokens = score(evaluated, documents, 48, 24, start="eos" if start == "auto" else start)
    assert by_tokens["bytes"] == by_bytes["bytes"] == sum(map(len, documents))
    assert by_tokens["tokens_per_byte"] == 1 and by_tokens["changed_documents"] == 0
    assert by_tokens["bits_per_byte"] == pytest.approx(by_bytes["bits_per_byte"], abs=1e-9)


@pytest.mark.parametrize("name", ["gpt2", "llama", "arb", "arb-full"])
def test_batches_change_nothing(folders, name):
    evaluated, documents = loaded(folders, name), [PROSE.encode(), (PROSE * 2).encode(), b"the door", b"the cat sat"]
    alone = [score(evaluated, documents, 32, 12, batch_size=size) for size in (1, 1, 3, 100)]
    assert alone[0]["bits_per_byte"] == alone[1]["bits_per_byte"]
    assert [found["bytes"] for found in alone] == [alone[0]["bytes"]] * 4
    for found in alone[2:]:
        assert found["bits_per_byte"] == pytest.approx(alone[0]["bits_per_byte"], abs=1e-5)


def test_a_first_character_of_several_tokens_is_left_out_whole(folders):
    evaluated = loaded(folders, "llama")
    row = evaluated.encoder.encode("\u732b sat".encode(), [])
    assert row.scored.first == 3 and row.scored_bytes == len(" sat")
    row = evaluated.encoder.encode("\u732b".encode(), [])
    assert row.scored_bytes == 0 and len(row.scored.ids) == row.scored.first
    with pytest.raises(ValueError, match="bytes=3: too few"):
        score(evaluated, ["\u732b".encode()])


def test_specials_that_a_text_spells_stay_text(folders):
    evaluated = loaded(folders, "gpt2")
    row = evaluated.encoder.encode(END.encode(), [])
    assert len(row.scored.ids) > 5 and 0 not in row.scored.ids and not row.changed


def test_files_become_documents(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\x00 raw")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": ""}\n{"text": "tw\\u00f6"}\n')
    (tmp_path / "c.txt").touch()
    documents = [*file_documents(sorted(tmp_path.iterdir()))]
    assert documents == [b"\xff\x00 raw", b"one", "tw\u00f6".encode()]
    assert as_text(documents) == (["\ufffd\x00 raw".encode(), *documents[1:]], 1)


def test_documents_of_several_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("training_arb.data.document_readers.PIECE_BYTES", 7)
    (tmp_path / "a.txt").write_bytes(PROSE.encode())
    assert [*file_documents([tmp_path / "a.txt"])] == [PROSE.encode()]


def is_text(data):
    return data.decode(errors="replace").encode() == data


@pytest.mark.parametrize("most", [*range(23), 99])
def test_first_bytes_end_with_a_character(most):
    documents = ["ab", "\u732b\U0001f408c", "d\u00e9" * 4]
    whole = "".join(documents).encode()
    longest = max(size for size in range(most + 1) if is_text(whole[:size])) if most else len(whole)
    assert b"".join(first_bytes([document.encode() for document in documents], most)) == whole[:longest]


def test_first_bytes_of_what_is_no_text():
    assert first_bytes([b"\x80" * 9], 5) == [b"\x80" * 5]
    assert first_bytes(["\u732b".encode()], 2) == []


def test_models_side_by_side(folders, tmp_path, capsys):
    """One table, one JSON: the first model's keys on top, all of them below, on the same bytes."""
    (tmp_path / "a.txt").write_text(PROSE * 2)
    out = tmp_path / "score.json"
    names = [folders["arb"], folders["gpt2"]]
    arguments = ["--data", tmp_path / "a.txt", "--ctx", 48, "--start", "bos", "--device", "cpu", "--json", out]
    assert run_script("evaluate", *names, *arguments) == 0
    shown, scores = capsys.readouterr().out, json.loads(out.read_text())
    assert [row["model"] for row in scores["models"]] == names
    assert {key: scores[key] for key in scores["models"][0]} == scores["models"][0]
    for name, row in zip(("arb", "gpt2"), scores["models"], strict=True):
        expected = score(loaded(folders, name), [(PROSE * 2).encode()], 48, start="bos")
        for key in ("bits_per_byte", "nats_per_byte", "bytes", "tokens_per_byte"):
            assert row[key] == pytest.approx(expected[key], abs=1e-6)
        assert row["bytes"] == len((PROSE * 2).encode())
        (line,) = [line for line in shown.splitlines() if line.startswith(row["model"])]
        assert line.split()[1:4] == [f"{row[key]:.4f}" for key in ("bits_per_byte", "nats_per_byte", "tokens_per_byte")]


def test_what_is_no_utf8_is_replaced_for_every_model_and_said(folders, tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"the cat \xff\xfe sat")
    out = tmp_path / "score.json"
    arguments = ["--data", tmp_path / "a.txt", "--start", "eos", "--json", out]
    assert run_script("evaluate", folders["arb"], *arguments) == 0
    assert json.loads(out.read_text())["bytes"] == 14 and "UTF-8" not in capsys.readouterr().out
    assert run_script("evaluate", folders["arb"], folders["gpt2"], *arguments) == 0
    assert "1 of 1 documents are not UTF-8" in capsys.readouterr().out
    scores = json.loads(out.read_text())
    assert [row["bytes"] for row in scores["models"]] == [18, 18] and scores["replaced_documents"] == 1


def test_a_tokenizer_that_changes_the_text_is_told(folders, tmp_path, capsys):
    folder = tmp_path / "lower"
    tiny_llama().save_pretrained(folder)
    bpe(False, normalizers.Lowercase()).save_pretrained(folder)
    (tmp_path / "a.jsonl").write_text('{"text": "The Cat"}\n{"text": "the door"}\n')
    assert run_script("evaluate", folder, "--data", tmp_path / "a.jsonl") == 0
    assert "1 of 2 documents are changed by its tokenizer" in capsys.readouterr().out


def test_datasets(folders, tmp_path, capsys):
    """A dataset folder's split by its column is what the same rows are as a file."""
    rows = [{"story": PROSE}, {"story": None}, {"story": "the door"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "test.jsonl").write_text(lines)
    found = []
    for source in (["--dataset", tmp_path / "set"], ["--data", tmp_path / "set" / "test.jsonl"]):
        settings = ["--text_column", "story", "--max_bytes", 70, "--json", tmp_path / "score.json"]
        assert run_script("evaluate", folders["gpt2"], *source, *settings) == 0
        found.append(json.loads((tmp_path / "score.json").read_text()))
    assert found[0]["bits_per_byte"] == found[1]["bits_per_byte"] and found[0]["bytes"] == found[1]["bytes"] == 70
    for wrong in (["--text_column", "no"], ["--split", "train"], ["--dataset_config", "no"]):
        assert run_script("evaluate", folders["gpt2"], "--dataset", tmp_path / "set", *wrong) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: dataset=") and "cannot be read" in error


def test_code_that_a_checkpoint_brings_runs_when_asked(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    model = LlamaForCausalLM.from_pretrained(folders["llama"])
    model.save_pretrained(folder)
    bpe(False).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        'class OwnConfig(LlamaConfig):\n    model_type = "own"\n\n\n'
        "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    (tmp_path / "a.txt").write_text(PROSE)
    assert run_script("evaluate", folder, "--data", tmp_path / "a.txt") == 2
    assert "needs its own code; --trust_remote_code allows it to run" in capsys.readouterr().err
    out = tmp_path / "score.json"
    assert run_script("evaluate", folder, "--data", tmp_path / "a.txt", "--trust_remote_code", "--json", out) == 0
    expected = score(loaded(folders, "llama"), [PROSE.encode()])
    assert json.loads(out.read_text())["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], abs=1e-6)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Folders that are no causal language model with its tokenizer."""
    root = tmp_path_factory.mktemp("broken")
    bert = BertConfig(**TINY, intermediate_size=48)
    t5 = T5Config(vocab_size=VOCABULARY, d_model=16, num_layers=1, num_heads=2, d_ff=16, d_kv=8)
    saved = {
        "bidirectional": (BertForMaskedLM(bert), bpe(False)),
        "headless": (BertModel(bert), bpe(False)),
        "translator": (T5ForConditionalGeneration(t5), bpe(False)),
        "mute": (GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=1)), None),
        "narrow": (tiny_llama(vocab_size=100), bpe(False)),
    }
    for name, (model, tokenizer) in saved.items():
        model.save_pretrained(root / name)
        if tokenizer is not None:
            tokenizer.save_pretrained(root / name)
    (root / "bare").mkdir()
    (root / "garbled").mkdir()
    (root / "garbled" / "config.json").write_text("{")
    return {path.name: str(path) for path in root.iterdir()}


@pytest.mark.parametrize(
    "model, arguments, said",
    [
        ("bare", [], "config.json not found"),
        ("garbled", [], "garbled': "),
        ("./nowhere", [], "model='./nowhere': no such folder"),
        ("bidirectional", [], "is not a causal language model: a token changes the predictions before it"),
        ("headless", [], "lacks 6 tensors of a causal language model: cls.predictions.bias, ..."),
        ("translator", [], "translator' is not a causal language model"),
        ("mute", [], "tokenizer not found"),
        ("narrow", [], "is outside the model's 100"),
        ("gpt2", ["--ctx", 65], "ctx=65 is more than the 64 positions"),
        ("arb", ["--ctx", 100000], "ctx=100000 is more than the"),
        ("gpt2", ["--ctx", 1], "ctx=1, stride=1: need ctx > 1"),
        ("gpt2", ["--stride", -1], "stride=-1"),
        ("gpt2", ["--device", "abacus"], "device='abacus'"),
        ("gpt2", ["--dataset", "x"], "give one of them"),
        ("llama", ["--start", "bos"], "has no such token"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folders, broken, tmp_path, capsys, model, arguments, said):
    (tmp_path / "a.txt").write_text(PROSE)
    name = {**folders, **broken}.get(model, model)
    assert run_script("evaluate", name, "--data", tmp_path / "a.txt", *arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and said in error


def test_nothing_to_evaluate_on(folders, capsys):
    assert run_script("evaluate", folders["arb"]) == 2
    assert "--data, --dataset or --lm_eval" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_is_no_score(folders, tmp_path, capsys):
    model = LlamaForCausalLM.from_pretrained(folders["llama"])
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    evaluated = loaded(folders, "llama")
    evaluated.model = model
    with pytest.raises(FloatingPointError, match="not finite"):
        score(evaluated, [PROSE.encode()])


def test_causal_models_pass_the_check(folders):
    for name in ("gpt2", "llama", "arb", "arb-full"):
        check_causal(name, loaded(folders, name).model)
