"""Bits per byte of a model on text, by a sliding window.

examples:
  python scripts/evaluate.py runs/pretrain/final --data book.txt
  python scripts/evaluate.py runs/pretrain/final --data corpus/ --max_bytes 100000 --ctx 512 --json score.json
"""

from __future__ import annotations

import argparse

from training_arb.atomic_files import write_json
from training_arb.bits_per_byte import bits_per_byte
from training_arb.byte_data import collect_files, read_ids
from training_arb.command_line import HelpFormatter, load_model, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("model", help="a checkpoint folder or hub name")
    parser.add_argument("--data", nargs="+", required=True, help="files, folders, globs")
    parser.add_argument("--max_bytes", type=int, default=0, help="stop after so many; 0: all")
    parser.add_argument("--ctx", type=int, default=256, help="bytes per window")
    parser.add_argument("--stride", type=int, default=0, help="bytes between windows; 0: half a window")
    parser.add_argument("--batch", type=int, default=16, help="windows at a time")
    parser.add_argument("--json", metavar="OUT", help="write the scores here")
    args = parser.parse_args()
    if args.max_bytes < 0 or args.batch < 1:
        raise ValueError(f"max_bytes={args.max_bytes}, batch={args.batch}: need max_bytes >= 0 and batch >= 1")
    ids = read_ids(collect_files(args.data))[:-1]  # the end of the last document is nothing to score
    if not len(ids):
        raise ValueError(f"data={' '.join(args.data)!r} is empty: 0 bytes")
    ids = ids[: args.max_bytes] if args.max_bytes else ids
    scores = bits_per_byte(
        load_model(args.model), ids, args.ctx, args.stride or args.ctx // 2, args.batch, progress=True
    )
    print(f"{scores['bits_per_byte']:.4f} bits per byte, {scores['nats_per_byte']:.4f} nats, {scores['bytes']:,} bytes")
    if args.json:
        write_json(args.json, scores)


if __name__ == "__main__":
    run(main)
