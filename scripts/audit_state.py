"""Audit a model's persistent state: every tensor by role, dtype and bytes, and the weights by area.

Exit code 1 when there is a float tensor, an unlisted one, or a byte that holds no trits; 2 when it cannot be read.

examples:
  python scripts/audit_state.py runs/pretrain/final
  python scripts/audit_state.py runs/pretrain/checkpoint-1200 --tensors
  python scripts/audit_state.py --preset arb-14m --json audit.json
"""

from __future__ import annotations

import argparse

from configuration_arb import PRESETS, preset_config
from training_arb.atomic_files import write_json
from training_arb.command_line import HelpFormatter, run
from training_arb.state_audit import audit_config, audit_folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("model_dir", nargs="?", help="a checkpoint folder")
    parser.add_argument("--preset", help=f"audit a shape without allocating it: {', '.join(PRESETS)}")
    parser.add_argument("--update_rule", default="momentum", help="of the preset")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--json", metavar="OUT", help="write the audit here")
    args = parser.parse_args()
    if (args.model_dir is None) == (args.preset is None):
        raise ValueError("give either MODEL_DIR or --preset NAME")
    if args.preset:
        audit = audit_config(preset_config(args.preset, update_rule=args.update_rule))
    else:
        audit = audit_folder(args.model_dir)
    if args.tensors:
        for row in audit.tensors:
            print(f"{row.name:<56}{row.role:<24}{row.dtype:<8}{row.bytes:>12,}  {row.shape}")
        print()
    print(audit.table())
    if args.json:
        write_json(args.json, audit.to_dict())
    return 0 if audit.clean else 1


if __name__ == "__main__":
    run(main)
