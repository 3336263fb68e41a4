"""Runs lm-evaluation-harness on a model, with ARB's own tasks besides the harness's; ours need no download.

The tasks are the YAML files in `lm_eval_tasks`; from a shell:
`lm_eval --include_path training_arb/evaluation/lm_eval_tasks`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from importlib.metadata import distribution
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

from transformers import PreTrainedTokenizerBase

TASKS_FOLDER = Path(__file__).parent / "lm_eval_tasks"


def own_tasks() -> list[str]:
    """The names of ARB's tasks."""
    return sorted(path.stem for path in TASKS_FOLDER.glob("*.yaml"))


def import_installed(name: str) -> ModuleType:
    """The package of an installed distribution, imported as `name`, whatever else on sys.path is called so.

    Raises ImportError when it is not installed.
    """
    folder = Path(str(distribution(name).locate_file("")))
    loaded = sys.modules.get(name)
    if loaded is not None and Path(str(loaded.__file__)).is_relative_to(folder / name):
        return loaded
    spec = PathFinder.find_spec(name, [str(folder)])
    if spec is None or spec.loader is None:
        raise ImportError(f"{name} is not in {folder}")
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def harness_scores(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    device: str,
    batch_size: int,
    max_length: int,
    prefix_token_id: int | None,
    trust_remote_code: bool,
) -> dict[str, dict[str, float]]:
    """{task: {metric: value}} of lm-eval's `hf` model, loaded by folder or hub name.

    max_length: ids that a window predicts. prefix_token_id: what stands before a document; None: BOS, or EOS.
    Raises ValueError where lm-eval is not installed or does not know a task.
    """
    try:
        import_installed("evaluate")  # by the harness's metrics; scripts/evaluate.py may come first on sys.path
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(
            f"lm_eval={','.join(tasks)!r}: lm-eval is not installed: pip install 'arb[eval]' ({error})"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # the harness reads thousands of files for the names of its own tasks
    manager = TaskManager(include_path=str(TASKS_FOLDER), include_defaults=not {*tasks} <= {*own_tasks()})
    for task in tasks:
        if not manager.match_tasks([task]):
            raise ValueError(f"lm_eval={task!r} is not a task; ARB's own are {', '.join(own_tasks())}")
    results = simple_evaluate(
        model="hf",
        model_args={  # pyright: ignore[reportArgumentType], a tokenizer may be an object
            "pretrained": name,
            "tokenizer": tokenizer,
            "trust_remote_code": trust_remote_code,
            "max_length": max_length,
            "prefix_token_id": prefix_token_id,
        },
        tasks=list(tasks),
        task_manager=manager,
        batch_size=batch_size,
        device=device,
        log_samples=False,
        bootstrap_iters=0,
    )
    assert results is not None  # as on every rank but the first, and there is one
    return {
        task: {metric.removesuffix(",none"): value for metric, value in row.items() if isinstance(value, float)}
        for task, row in results["results"].items()  # pyright: ignore[reportTypedDictNotRequiredAccess]
    }
