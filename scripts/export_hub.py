"""Export a checkpoint as a self-contained folder: weights, config, code, tokenizer, model card.

The folder loads with AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True) where this repo is not
installed. Training state is left out unless asked for.

examples:
  python scripts/export_hub.py runs/pretrain/checkpoint-1200 runs/export
  python scripts/export_hub.py runs/pretrain/checkpoint-1200 runs/resumable --training_state
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from tokenization_arb import ArbTokenizer
from training_arb.atomic_files import new_folder
from training_arb.command_line import HelpFormatter, load_model, run

MODEL_CARD = Path(__file__).resolve().parent / "model_card.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("model", help="a checkpoint folder or hub name")
    parser.add_argument("output", help="the folder to write; must not exist")
    parser.add_argument("--training_state", action="store_true", help="keep the update rule's accumulators")
    args = parser.parse_args()
    if Path(args.output).exists():
        raise ValueError(f"output={args.output!r} exists already")
    model = load_model(args.model)
    with new_folder(args.output) as folder:
        model.save_pretrained(folder, training_state=args.training_state)
        ArbTokenizer().save_pretrained(folder)
        shutil.copyfile(MODEL_CARD, folder / "README.md")
    size = sum(path.stat().st_size for path in Path(args.output).glob("*.safetensors"))
    per_weight = size / model.num_parameters()
    print(f"{args.output}: {model.num_parameters():,} weights in {size:,} bytes, {per_weight:.4f} bytes a weight")


if __name__ == "__main__":
    run(main)
