"""Report on a run, finished or in progress, from its folder.

Curves of loss and bits per byte, flip rates per step and per layer, zeros per layer, the levels of each area, the
state table, samples and settings: one HTML file with its plots inside, or the plots as a PNG.

examples:
  python scripts/report.py runs/pretrain                          # runs/pretrain/report.html
  python scripts/report.py runs/pretrain --html now.html --png now.png
"""

from __future__ import annotations

import training_arb.common.thread_waiting  # noqa: F401

import argparse
from pathlib import Path

from training_arb.cli.command_line import run, script_parser
from training_arb.report.run_report import write_report


def build_parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    parser.add_argument("run_dir", help="the folder that pretrain.py writes to")
    parser.add_argument("--html", metavar="OUT", help="the page; default: report.html in the folder")
    parser.add_argument("--png", metavar="OUT", help="write the plots as a picture")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    html = args.html if args.html or args.png else Path(args.run_dir) / "report.html"
    for line in write_report(args.run_dir, html, args.png):
        print(f"missing     {line}")
    print(f"written     {', '.join(str(path) for path in (html, args.png) if path)}")


if __name__ == "__main__":
    run(main)
