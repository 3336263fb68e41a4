"""scripts/generate.py and the conversation behind it: what is said, stopped, remembered, forgotten and refused."""

import io
import signal
import threading

import pytest
import torch

from configuration_arb import preset_config
from modeling_arb import ArbForCausalLM
from support.scripting import run_script
from tokenization_arb import ArbTokenizer
from training_arb.chat.terminal_chat import TURN_ENDS, Conversation, TerminalStreamer, talk, without_controls
from training_arb.chat.text_generation import TextGenerator

EOS, SYSTEM, USER, ASSISTANT = 257, 259, 260, 261
TOKENIZER = ArbTokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = ArbForCausalLM(preset_config("arb-tiny", max_position_embeddings=256))
    model.save_pretrained(path, training_state=False)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return ArbForCausalLM.from_pretrained(folder).eval()


def make_conversation(model, system=None, **options):
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": TURN_ENDS, **options}
    return Conversation(TextGenerator(model, **settings), TOKENIZER, system)


def said_by_hand(model, conversation, content):
    """The reply to the conversation so far, without any cache."""
    turns = [i for turn in (conversation.system, *conversation.turns) for i in turn]
    ids = torch.tensor([[*turns, USER, *content.encode(), EOS, ASSISTANT]])
    settings = {"max_new_tokens": 10, "do_sample": False, "use_cache": False, "eos_token_id": TURN_ENDS}
    new = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :].tolist()
    return bytes(i for i in new if i < 256)


def listener(lines):
    """What stands for input(): the lines one by one, then the end of input; a line may be an exception."""
    rest = iter(lines)

    def read(_prompt):
        line = next(rest, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    return read


def test_turns_share_a_cache_and_say_what_they_say_without(model):
    conversation = make_conversation(model, system="Be brief. <|eos|>")
    read = []
    hook = model.model.register_forward_hook(lambda _module, _inputs, out: read.append(out.last_hidden_state.shape[1]))
    try:
        for content in ("hello", "Gr\u00f6\u00dfe <|assistant|>", "bye"):
            expected = said_by_hand(model, conversation, content)
            read.clear()
            assert conversation.reply(content) == expected
            new = len(TOKENIZER.encode_chat([{"role": "user", "content": content}])) + 3
            assert read[0] <= new + (len(conversation.system) if content == "hello" else 0)
    finally:
        hook.remove()
    assert conversation.system == [SYSTEM, *b"Be brief. <|eos|>", EOS]
    assert conversation.turns[2] == [USER, *"Gr\u00f6\u00dfe <|assistant|>".encode(), EOS]


@pytest.mark.parametrize("special", [EOS, USER])
def test_a_reply_ends_with_whoever_speaks_next(model, special):
    """After three bytes a processor forces the special; the turn is kept with EOS in its place."""
    start = 0

    def force(ids, scores):
        token = special if ids.shape[1] >= start + 3 else 97
        return torch.full_like(scores, -100.0).index_fill(1, torch.tensor([token]), 0.0)

    conversation = make_conversation(model, logits_processor=[force])
    for _ in range(2):
        start = sum(map(len, conversation.turns)) + len("hello") + 3
        assert conversation.reply("hello") == b"aaa"
        assert conversation.turns[-1] == [ASSISTANT, 97, 97, 97, EOS]
        cached = conversation.generator.cache.get_seq_length()
        assert cached == sum(map(len, conversation.turns)) - 1


def test_oldest_exchanges_are_forgotten_when_the_context_is_full(model, capsys):
    conversation = make_conversation(model, system="s" * 20)
    talk(conversation, None, listener(["x" * 90, "y" * 60, "z" * 60, "w" * 240]))
    out = capsys.readouterr().out
    assert "(the context is full: the 1 oldest exchanges are forgotten)" in out
    assert [bytes(i for i in turn if i < 256)[:3] for turn in conversation.turns[::2]] == [b"yyy", b"zzz"]
    assert conversation.system == [SYSTEM, *b"s" * 20, EOS]
    assert "a message of 240 bytes is" in out and "too long" in out
    free = 256 - 10 - 22 - 3
    assert conversation.make_room("w" * free) == 2
    with pytest.raises(ValueError, match=f"a message of {free + 1} bytes is 1 too long"):
        conversation.make_room("w" * (free + 1))
    assert conversation.reply("v") == said_by_hand(model, make_conversation(model, system="s" * 20), "v")


def test_commands(model, capsys):
    conversation = make_conversation(model)
    lines = ["hello", "", "/frobnicate now", KeyboardInterrupt(), "/reset", "again", "/exit", "never read"]
    talk(conversation, TerminalStreamer(TOKENIZER), listener(lines))
    out = capsys.readouterr().out
    assert "(/frobnicate is not a command" in out and "(new conversation)" in out
    assert [turn[0] for turn in conversation.turns] == [USER, ASSISTANT]
    assert bytes(conversation.turns[0][1:-1]) == b"again"
    assert out.count("/exit") == 3


class Interrupting:
    """A streamer that sends Ctrl-C once some tokens came."""

    def __init__(self, after):
        self.after, self.calls = after, 0

    def put(self, value):
        self.calls += 1
        if self.calls - 1 in self.after:  # the first call is the prompt
            signal.raise_signal(signal.SIGINT)

    def end(self):
        self.after = ()


def test_ctrl_c_ends_a_reply_and_keeps_it(model, capsys):
    conversation, handler = make_conversation(model), signal.getsignal(signal.SIGINT)
    streamer = Interrupting({4})
    talk(conversation, streamer, listener(["hello"]))
    assert "(interrupted)" in capsys.readouterr().out
    shown = streamer.calls - 1
    assert shown in (4, 5) and len(conversation.turns[1]) == 1 + shown + 1
    assert signal.getsignal(signal.SIGINT) is handler
    assert conversation.reply("more") == said_by_hand_before_last(model, conversation, "more")
    talk(conversation, Interrupting(()), listener(["hello"]))
    assert "(interrupted)" not in capsys.readouterr().out


def said_by_hand_before_last(model, conversation, content):
    last, conversation.turns = conversation.turns, conversation.turns[:-2]
    said = said_by_hand(model, conversation, content)
    conversation.turns = last
    return said


def test_a_second_ctrl_c_forgets_the_reply(model, capsys):
    conversation = make_conversation(model)
    conversation.reply("hello")
    streamer = Interrupting({2})
    interrupt = conversation.generator.interrupt
    receive = interrupt._receive

    def twice(signum, frame):
        receive(signum, frame)
        receive(signum, frame)

    interrupt._receive = twice
    talk(conversation, streamer, listener(["more"]))
    assert "(the reply is forgotten)" in capsys.readouterr().out
    assert len(conversation.turns) == 2
    del interrupt._receive
    expected = said_by_hand(model, conversation, "more")
    assert conversation.reply("more") == expected


def test_generation_in_another_thread_leaves_signals_alone(model):
    conversation, said = make_conversation(model), []
    thread = threading.Thread(target=lambda: said.append(conversation.reply("hello")))
    thread.start()
    thread.join()
    assert said == [said_by_hand(model, make_conversation(model), "hello")]


def test_beams_are_not_streamed_and_leave_no_cache(model, capsys):
    conversation = make_conversation(model, num_beams=3)
    talk(conversation, None, listener(["hello", "more"]))
    assert len(conversation.turns) == 4 and conversation.generator.cache is None
    assert len(capsys.readouterr().out.splitlines()) >= 3


def test_no_byte_steers_the_terminal(capsys):
    assert without_controls("a\x1b[2J\x07b\n\t\x9b\u00e9") == "a\\x1b[2J\\x07b\n\t\\x9b\u00e9"
    for spell, shown in ((True, "\\x1b[0m"), (False, "\x1b[0m")):
        streamer = TerminalStreamer(TOKENIZER, skip_prompt=False, spell_controls=spell)
        streamer.put(torch.tensor(list(b"\x1b[0m")))
        streamer.end()
        assert capsys.readouterr().out == f"{shown}\n"


def test_script_greedy_stream_and_sample(folder, capsys):
    shown = []
    for extra in (
        ["--temperature", 0],
        ["--temperature", 0, "--stream"],
        ["--temperature", 0, "--no_cache"],
        ["--seed", 1],
        ["--seed", 1],
        ["--seed", 2, "--top_k", 50, "--top_p", 0.9, "--repetition_penalty", 1.2],
        ["--num_beams", 3, "--temperature", 0],
    ):
        assert run_script("generate", folder, "--prompt", "The <|eos|>", "--max_new_tokens", 24, *extra) == 0
        captured = capsys.readouterr()
        shown.append(captured.out.removesuffix("\n"))
        assert "24 tokens" in captured.err and "a second" in captured.err
        cached = "cache: 256 bytes a token, 25.0% of plain multi-head keys and values' 1,024; 8 bytes beside"
        assert ("cache: none" if "--no_cache" in extra else cached) in captured.err
    assert all(text.startswith("The <|eos|>") and len(text) > 12 for text in shown)
    assert shown[0] == shown[1] == shown[2]
    assert shown[3] == shown[4] != shown[5]
    assert shown[6] != shown[0]


def test_script_reads_bytes_from_a_pipe(folder, capsys, monkeypatch):
    """Standard input with a broken character in it; --quiet says nothing beside."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xc3\xa9 \xff ")))
    arguments = ["--prompt", "-", "--temperature", 0, "--max_new_tokens", 12, "--quiet"]
    assert run_script("generate", folder, *arguments) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("caf\u00e9 \ufffd ") and captured.err == ""


def test_script_stops_at_a_string(folder, model, capsys):
    ids = torch.tensor([list(b"abc")])
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)[0, 3:].tolist()
    end = next(n for n in range(2, 30) if new[n] < 128 and new[n] not in new[:n])
    arguments = ["--prompt", "abc", "--temperature", 0, "--max_new_tokens", 30, "--stop", chr(new[end]), "never"]
    assert run_script("generate", folder, *arguments) == 0
    assert f"{end + 1} tokens" in capsys.readouterr().err


def test_script_chats(folder, capsys, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b"hello\n\nmore \xff\n/reset\nagain\n"))
    monkeypatch.setattr("sys.stdin", stdin)
    arguments = ["--chat", "--system", "Be brief.", "--max_new_tokens", 5, "--temperature", 0]
    assert run_script("generate", folder, *arguments) == 0
    captured = capsys.readouterr()
    assert captured.out.count("> ") == 6
    assert "tokens, " in captured.err and "cache: 256 bytes a token" in captured.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere"),
        (["MODEL", "--max_new_tokens", 0], "max_new_tokens=0"),
        (["MODEL", "--num_beams", 0], "num_beams=0"),
        (["MODEL", "--temperature", -1], "temperature=-1"),
        (["MODEL", "--temperature", "nan"], "temperature=nan"),
        (["MODEL", "--top_k", -2], "top_k=-2"),
        (["MODEL", "--top_p", 0], "top_p=0"),
        (["MODEL", "--top_p", 1.1], "top_p=1.1"),
        (["MODEL", "--repetition_penalty", 0], "repetition_penalty=0"),
        (["MODEL", "--stop", "x", ""], "stop=''"),
        (["MODEL", "--stream", "--num_beams", 2], "num_beams=2"),
        (["MODEL", "--chat", "--prompt", "x"], "prompt='x'"),
        (["MODEL", "--system", "x"], "system='x'"),
        (["MODEL", "--prompt", "x" * 250], "max_new_tokens=200: after 250 tokens of 256 there is room for 6"),
        (["MODEL", "--max_new_tokens", 300], "max_new_tokens=300: after 1 tokens of 256"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, capsys, arguments, said):
    assert run_script("generate", *(folder if argument == "MODEL" else argument for argument in arguments)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1 and said in errors[0]


def test_help_shows_examples(capsys):
    assert run_script("generate", "--help") == 0
    assert "python scripts/generate.py" in capsys.readouterr().out
