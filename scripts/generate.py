"""Continue a prompt, or chat.

Prints two lines on standard error at the end: tokens per second, and the cache's bytes per token compared with plain
multi-head keys and values of the same width. In a chat, /reset forgets the conversation, /exit or Ctrl-D ends it,
Ctrl-C ends a reply; typed text is never parsed as special tokens.

examples:
  python scripts/generate.py runs/pretrain/final --prompt 'import os'
  python scripts/generate.py runs/pretrain/final --prompt 'class ' --max_new_tokens 400 --temperature 0.6 --stream
  head -c 300 setup.py | python scripts/generate.py runs/pretrain/final --prompt - --num_beams 4 --temperature 0
  python scripts/generate.py runs/pretrain/final --prompt 'def f(' --stop $'\\n\\n' --repetition_penalty 1.1 --quiet
  python scripts/generate.py runs/chat/final --chat --system 'Be brief.'
"""

from __future__ import annotations

import training_arb.common.thread_waiting  # noqa: F401

import argparse
import io
import os
import sys

from transformers import set_seed
from transformers.utils import logging

from tokenization_arb import SPECIAL_IDS, ArbTokenizer
from training_arb.chat.terminal_chat import TURN_ENDS, Conversation, TerminalStreamer, talk, without_controls
from training_arb.chat.text_generation import TextGenerator
from training_arb.cli.command_line import run, script_parser
from training_arb.lora.load_model import load_model


def build_parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("model", help="a checkpoint folder or hub name")
    add("--prompt", default="", help="text to continue; -: all of standard input")
    add("--chat", action="store_true", help="talk turn by turn; replies are streamed")
    add("--system", help="system message of the chat")
    add("--max_new_tokens", type=int, default=200, help="bytes to generate at most")
    add("--temperature", type=float, default=0.7, help="0: always the most likely byte")
    add("--top_k", type=int, default=0, help="sample from the k most likely bytes; 0: from all")
    add("--top_p", type=float, default=1.0, help="sample from the most likely bytes with this total probability")
    add("--num_beams", type=int, default=1, help="number of beams")
    add("--repetition_penalty", type=float, default=1.0, help="above 1: bytes that occurred become less likely")
    add("--stop", nargs="+", metavar="STRING", help="stop after any of these strings")
    add("--seed", type=int, default=0, help="of the sampling")
    add("--stream", action="store_true", help="show characters as they come")
    add("--no_cache", action="store_true", help="recompute the whole text for every byte")
    add("--quiet", action="store_true", help="nothing on standard error")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises ValueError naming an option that is out of range or conflicts with another."""
    for field in ("max_new_tokens", "num_beams"):
        if getattr(args, field) < 1:
            raise ValueError(f"{field}={getattr(args, field)} must be at least 1")
    for field in ("temperature", "top_k"):
        if not getattr(args, field) >= 0:
            raise ValueError(f"{field}={getattr(args, field)} must not be negative")
    if not 0 < args.top_p <= 1:
        raise ValueError(f"top_p={args.top_p} must be above 0 and at most 1")
    if not args.repetition_penalty > 0:
        raise ValueError(f"repetition_penalty={args.repetition_penalty} must be positive")
    if args.stop and "" in args.stop:
        raise ValueError("stop='' must not be empty")
    if args.stream and args.num_beams > 1:
        raise ValueError(f"num_beams={args.num_beams}: beams cannot be streamed; leave out --stream")
    if args.chat and args.prompt:
        raise ValueError(f"prompt={args.prompt!r}: not used in a chat; give --system")
    if args.system is not None and not args.chat:
        raise ValueError(f"system={args.system!r}: only used with --chat")


def options(args: argparse.Namespace, tokenizer: ArbTokenizer) -> dict:
    """Arguments of `generate`."""
    told = {name: getattr(args, name) for name in ("max_new_tokens", "num_beams", "repetition_penalty")}
    told |= {"use_cache": not args.no_cache, "do_sample": args.temperature > 0}
    if args.temperature > 0:
        told |= {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    if args.stop:
        told |= {"stop_strings": args.stop, "tokenizer": tokenizer}
    if args.chat:
        told["eos_token_id"] = TURN_ENDS
    return told


def complete(generator: TextGenerator, tokenizer: ArbTokenizer, data: bytes, stream: bool) -> None:
    """Print the prompt and its continuation."""
    spell_controls = sys.stdout.isatty()
    ids = tokenizer.encode_bytes(data) or [SPECIAL_IDS["EOS"]]
    streamer = TerminalStreamer(tokenizer, skip_prompt=False, spell_controls=spell_controls) if stream else None
    new = generator(ids, streamer)
    if not stream:
        text = tokenizer.decode_bytes([*ids, *new]).decode("utf-8", errors="replace")
        print(without_controls(text) if spell_controls else text)


def chat(generator: TextGenerator, tokenizer: ArbTokenizer, args: argparse.Namespace) -> None:
    if sys.stdin.isatty():
        import readline  # noqa: F401  line editing and history for input()
    streamer = TerminalStreamer(tokenizer, spell_controls=sys.stdout.isatty()) if args.num_beams == 1 else None
    talk(Conversation(generator, tokenizer, args.system), streamer)


def main() -> None:
    args = build_parser().parse_args()
    check(args)
    if args.quiet:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    data = sys.stdin.buffer.read() if args.prompt == "-" else os.fsencode(args.prompt)
    tokenizer = ArbTokenizer()
    generator = TextGenerator(load_model(args.model), **options(args, tokenizer))
    set_seed(args.seed)
    if args.chat:
        chat(generator, tokenizer, args)
    else:
        complete(generator, tokenizer, data, args.stream)
    if not args.quiet:
        print(generator.summary(), file=sys.stderr)


if __name__ == "__main__":
    run(main)
