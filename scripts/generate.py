"""Continue a prompt, or chat.

examples:
  python scripts/generate.py runs/pretrain/final --prompt 'import os'
  python scripts/generate.py runs/pretrain/final --prompt 'class ' --max_new_tokens 400 --temperature 0.6 --stream
  python scripts/generate.py runs/chat/final --chat
"""

from __future__ import annotations

import argparse
import sys

from transformers import TextStreamer, set_seed

from modeling_arb import ArbForCausalLM
from tokenization_arb import ArbTokenizer
from training_arb.command_line import HelpFormatter, load_model, run


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("model", help="a checkpoint folder or hub name")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="bytes to generate at most")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: the likeliest byte every time")
    parser.add_argument("--top_k", type=int, default=0, help="sample from so many likeliest bytes; 0: from all")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--chat", action="store_true", help="talk turn by turn; an empty line ends it")
    parser.add_argument("--stream", action="store_true", help="show bytes as they come")
    args = parser.parse_args()
    if args.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={args.max_new_tokens} must be at least 1")
    if args.temperature < 0:
        raise ValueError(f"temperature={args.temperature} must not be negative")
    if args.top_k < 0:
        raise ValueError(f"top_k={args.top_k} must not be negative")
    return args


def reply(model: ArbForCausalLM, tokenizer: ArbTokenizer, text: str, args: argparse.Namespace) -> str:
    """The text that the model adds to `text`; streamed to the terminal as it comes when asked for."""
    inputs = tokenizer(text or tokenizer.eos_token, return_tensors="pt").to(model.device)
    sampling = {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k} if args.temperature else {}
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if args.stream or args.chat else None
    ids = model.generate(**inputs, max_new_tokens=args.max_new_tokens, streamer=streamer, **sampling)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def chat(model: ArbForCausalLM, tokenizer: ArbTokenizer, args: argparse.Namespace) -> None:
    """Read a turn from standard input, answer it, until an empty line or the end of input."""
    messages: list[dict[str, str]] = []
    while True:
        print("> ", end="", flush=True)
        turn = sys.stdin.readline().strip()
        if not turn:
            return
        messages.append({"role": "user", "content": turn})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        messages.append({"role": "assistant", "content": reply(model, tokenizer, text, args)})


def main() -> None:
    args = parse()
    model, tokenizer = load_model(args.model), ArbTokenizer()
    set_seed(args.seed)
    if args.chat:
        chat(model, tokenizer, args)
    elif args.stream:
        print(args.prompt, end="", flush=True)
        reply(model, tokenizer, args.prompt, args)
    else:
        print(args.prompt + reply(model, tokenizer, args.prompt, args))


if __name__ == "__main__":
    run(main)
