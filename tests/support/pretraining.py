"""A short run of scripts/pretrain.py: its text, its options, and what it leaves in report.json."""

import json

from training_arb.checkpoints.run_checkpoints import pointed, step_of, unfinished_checkpoints

STEPS = 8
TEXT = b"".join(f"def function_{i}(a, b):\n    return a * {i} + b\n\n\n".encode() for i in range(400))


def write_corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.py"
    path.write_bytes(TEXT)
    return path


def arguments(corpus, output_dir, **changes):
    settings = {
        "preset": "arb-tiny",
        "data": corpus,
        "output_dir": output_dir,
        "ctx": 32,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "save_steps": 2,
        "eval_steps": 4,
        "logging_steps": 2,
        "save_total_limit": 9,
        "eval_bytes": 200,
        "use_cpu": "true",
        **changes,
    }
    return [part for key, value in settings.items() if value is not None for part in (f"--{key}", value)]


def report(output_dir):
    return json.loads((output_dir / "report.json").read_text())


def final_hash(output_dir):
    return report(output_dir)["state_sha256"]


def step_pointed_to(output_dir):
    """Of the newest checkpoint, in a folder that is being written to."""
    checkpoint = pointed(output_dir, "latest")
    return step_of(checkpoint) if checkpoint else 0


def is_saving(output_dir):
    """Whether a checkpoint is being written at this moment."""
    try:
        return bool(unfinished_checkpoints(output_dir))
    except FileNotFoundError:  # one that was deleted while we looked
        return False
