"""The optional blocks' settings: which keys each takes, their defaults, and what they must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

REQUIRED = object()  # a key without a default: the block means nothing without it
# Limits far above any model. They bound what a config alone can make a program build: modules are Python objects, and
# the product of any two sizes, in bytes, is a 64-bit number.
MOST_MODULES = 1 << 10
LARGEST_WIDTH = 1 << 20
MOST_ROWS = (1 << 31) - 1
MOST_REPEATS = 1 << 10
LONGEST_NGRAM = 16


class Option(NamedTuple):
    """A key of a block: its default, whether a value is legal, and how to say what is."""

    default: Any
    holds: Callable[[Any], bool]
    expected: str


def is_int(value: object) -> bool:
    """Whether it is an integer and no bool, which Python takes for one."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _count(default: Any = REQUIRED, least: int = 1, most: int = LARGEST_WIDTH) -> Option:
    expected = f"an integer of at least {least} and at most {most:,}"
    return Option(default, lambda value: is_int(value) and least <= value <= most, expected)


def _number(default: float, low: float, high: float) -> Option:
    return Option(default, lambda value: _is_number(value) and low < value < high, f"between {low} and {high}")


def _orders(value: object) -> bool:
    """JSON gives lists, people write tuples."""
    if not isinstance(value, list | tuple) or not 0 < len(value) <= LONGEST_NGRAM:
        return False
    return all(is_int(n) and 1 <= n <= LONGEST_NGRAM for n in value)


BLOCK_OPTIONS: dict[str, dict[str, Option]] = {
    "text_sequencer": {"hidden_size": _count(0, 0)},
    "memgram": {
        "slots": _count(most=MOST_ROWS),
        "dim": _count(),
        "orders": Option([3, 4, 5], _orders, f"a list of n-gram lengths from 1 to {LONGEST_NGRAM}"),
    },
    "windowed_attention": {"window": _count(), "stride": _count(0, 0)},
    "codebook": {
        "size": _count(most=MOST_ROWS),
        "dim": _count(),
        "commitment": _number(0.25, 0, 100),
        "hashes": _count(4, most=MOST_REPEATS),
        "probes": _count(4, most=MOST_REPEATS),
    },
    "moe_graph": {
        "num_experts": _count(most=MOST_MODULES),
        "top_k": _count(2),
        "expert_size": _count(0, 0),
        "max_iterations": _count(4, most=MOST_REPEATS),
        "halt_threshold": _number(0.99, 0, 1),
        "ponder_cost": Option(0.01, lambda value: _is_number(value) and value >= 0, "a non-negative number"),
        "lti_decay": _number(0.9, 0, 1),
        "active_edges": _count(0, 0, MOST_ROWS),
        "neighbours": _count(8),
    },
    "composite": {
        "size": _count(most=MOST_ROWS),
        "dim": _count(),
        "hidden_size": _count(0, 0),
        "hashes": _count(4, most=MOST_REPEATS),
    },
    "output_router": {"num_heads": _count(most=MOST_MODULES), "gate_size": _count(128)},
    "video_head": {"latent_dim": _count(), "hidden_size": _count(0, 0)},
    "talker_head": {"num_codes": _count(), "hidden_size": _count(0, 0)},
}


def complete_block(name: str, given: Any) -> dict[str, Any] | None:
    """The block's settings with defaults filled in; None stays None. Raises ValueError naming block, key and value."""
    if given is None:
        return None
    options = BLOCK_OPTIONS[name]
    if not isinstance(given, dict):
        raise ValueError(f"{name}={given!r} must be None or a dict of {', '.join(options)}")
    for key in given:
        if key not in options:
            raise ValueError(f"{name}.{key}={given[key]!r} is unknown: {name} has {', '.join(options)}")
    complete = {}
    for key, option in options.items():
        value = given.get(key, option.default)
        if value is REQUIRED:
            raise ValueError(f"{name}.{key} is missing: {name} needs it, {option.expected}")
        if not option.holds(value):
            raise ValueError(f"{name}.{key}={value!r} must be {option.expected}")
        complete[key] = list(value) if isinstance(value, tuple) else value
    return complete


def check_blocks(config) -> None:
    """What blocks ask of each other. Raises ValueError naming the field and its value."""
    moe, window = config.moe_graph, config.windowed_attention
    if moe is not None and moe["top_k"] > moe["num_experts"]:
        raise ValueError(f"moe_graph.top_k={moe['top_k']} must be at most num_experts={moe['num_experts']}")
    if moe is not None and moe["active_edges"] and config.codebook is None:
        raise ValueError(f"moe_graph.active_edges={moe['active_edges']} needs codebook: edges join its motifs")
    if config.composite is not None and config.codebook is None:
        raise ValueError("composite is given but codebook is None: it pairs the codebook's motifs")
    if window is not None and window["stride"] > window["window"]:
        raise ValueError(f"windowed_attention.stride={window['stride']} must be at most window={window['window']}")
