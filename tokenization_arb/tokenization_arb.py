"""ArbTokenizer: one id per byte, 32 specials above them, backed by `tokenizers` so that no remote code is needed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

NUM_BYTES = 256
SPECIAL_NAMES = (
    *("PAD", "EOS", "BOS", "SYSTEM", "USER", "ASSISTANT", "SCRATCHPAD", "PLAN", "REFLECTION", "SUMMARY", "ACTION"),
    *("TOOL", "TOOL_RESULT", "FUNCTION", "CODE", "CODE_BLOCK", "PATCH", "EXECUTION", "SEARCH", "RETRIEVAL"),
    *("CONTEXT", "CITATION", "JSON", "XML", "TABLE", "LIST", "MARKDOWN", "ERROR", "WARNING", "POLICY", "STOP"),
    "RESERVED",
)
SPECIAL_TOKENS = {name: f"<|{name.lower()}|>" for name in SPECIAL_NAMES}
SPECIAL_IDS = {name: NUM_BYTES + i for i, name in enumerate(SPECIAL_NAMES)}
CHAT_ROLES = {"system": "SYSTEM", "user": "USER", "assistant": "ASSISTANT", "tool": "TOOL_RESULT"}
CHAT_TEMPLATE = (
    f"{{%- set tokens = { {role: SPECIAL_TOKENS[name] for role, name in CHAT_ROLES.items()} } -%}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] not in tokens -%}{{- raise_exception('unknown role ' + message['role']) -}}{%- endif -%}"
    "{{- tokens[message['role']] -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|eos|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + '<|eos|>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def _byte_tokenizer() -> Tokenizer:
    """A BPE without merges: every byte is its own token, and its id is its value."""
    vocab = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    return tokenizer


class ArbTokenizer(PreTrainedTokenizerFast):
    """Ids 0-255 are the bytes, 256-287 the specials in SPECIAL_NAMES' order. Nothing is added around a text.

    The spelling of a special in a text (`<|eos|>`) becomes that special, unless split_special_tokens=True. A saved
    folder is that of a stock tokenizer, which AutoTokenizer loads without this class.
    """

    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, **kwargs):
        defaults = {
            "tokenizer_object": None if "tokenizer_file" in kwargs else _byte_tokenizer(),
            "pad_token": SPECIAL_TOKENS["PAD"],
            "eos_token": SPECIAL_TOKENS["EOS"],
            "bos_token": SPECIAL_TOKENS["BOS"],
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",
        }
        super().__init__(**{**defaults, **kwargs})

    def encode_bytes(self, data: bytes) -> list[int]:
        """The ids of any bytes, valid UTF-8 or not."""
        return list(data)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of ids; specials are left out."""
        return bytes(i for i in ids if i < NUM_BYTES)

    def encode_turn(self, message: Mapping[str, str | bytes]) -> list[int]:
        """The ids of one message, {"role": ..., "content": ...}: its role's special, the content's bytes, EOS.

        Special spellings in the content (`<|eos|>`) stay bytes, so no content can end its turn or imitate another role.
        """
        role, content = (message.get(field) for field in ("role", "content"))
        if role not in CHAT_ROLES:
            raise ValueError(f"role={role!r} is not one of {', '.join(CHAT_ROLES)}")
        if not isinstance(content, str | bytes):
            raise ValueError(f"content={content!r} of the {role} must be text or bytes")
        data = content.encode("utf-8", errors="surrogateescape") if isinstance(content, str) else content
        return [SPECIAL_IDS[CHAT_ROLES[role]], *data, SPECIAL_IDS["EOS"]]

    def encode_chat(
        self, messages: Iterable[Mapping[str, str | bytes]], add_generation_prompt: bool = False
    ) -> list[int]:
        """Equals `apply_chat_template` for contents without special spellings, and is safe for all others.

        add_generation_prompt: end with the assistant's special, so that the model answers.
        """
        prompt = [SPECIAL_IDS["ASSISTANT"]] if add_generation_prompt else []
        return [i for message in messages for i in self.encode_turn(message)] + prompt

    def save_pretrained(self, save_directory, *args, **kwargs) -> tuple[str, ...]:
        """Write a folder that loads as a stock fast tokenizer."""
        files = super().save_pretrained(save_directory, *args, **kwargs)
        path = next(Path(file) for file in files if file.endswith("tokenizer_config.json"))
        config = json.loads(path.read_text(encoding="utf-8"))
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
        return files
