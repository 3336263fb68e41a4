"""The optional blocks, each declared once: its settings, and what other parts of the program need to know of it.

The name of a block is the field of ArbConfig that switches it on. From the declaration ArbConfig checks the settings,
the loader finds which tensors a config adds, the cache keeps what the block reads of earlier bytes, the audit counts
its weights, and docs/reference/ describes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Settings = dict[str, Any]
REQUIRED = object()  # the default of a key that must be given
# Limits far above any model. They bound what a config alone can make a program build: modules are Python objects, and
# the product of any two sizes, in bytes, is a 64-bit number.
MOST_MODULES = 1 << 10
LARGEST_WIDTH = 1 << 20
MOST_ROWS = (1 << 31) - 1
MOST_REPEATS = 1 << 10
LONGEST_NGRAM = 16


class Option(NamedTuple):
    """A key of a block: what it means, its default, whether a value is legal, and which values are."""

    meaning: str
    default: Any
    holds: Callable[[Any], bool]
    expected: str


def is_int(value: object) -> bool:
    """Whether it is an integer; a bool, which Python counts among them, is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _count(meaning: str, default: Any = REQUIRED, least: int = 1, most: int = LARGEST_WIDTH) -> Option:
    expected = f"an integer of at least {least} and at most {most:,}"
    return Option(meaning, default, lambda value: is_int(value) and least <= value <= most, expected)


def _number(meaning: str, default: float, low: float, high: float) -> Option:
    return Option(meaning, default, lambda value: _is_number(value) and low < value < high, f"between {low} and {high}")


def _orders(value: object) -> bool:
    """JSON gives lists, people write tuples."""
    if not isinstance(value, list | tuple) or not 0 < len(value) <= LONGEST_NGRAM:
        return False
    return all(is_int(n) and 1 <= n <= LONGEST_NGRAM for n in value)


def _nothing_cached(settings: Settings) -> dict[str, int]:
    return {}


def _no_fault(settings: Settings, config: Any) -> str | None:
    return None


@dataclass(frozen=True)
class OptionalBlock:
    """A declaration; the block itself is a module of modeling_arb.

    about: what it is, for people. part: the name of its module in ArbForCausalLM, None where it has no weights. area:
    the line of the audit that its weights count to. options: its keys. cached: settings -> how many positions back it
    reads, by what of them ("ids", "motifs", "sequencer"). fault: settings, config -> what is wrong between its settings
    or with other fields, or None.
    """

    about: str
    part: str | None = None
    area: str = ""
    options: Mapping[str, Option] = field(default_factory=dict)
    cached: Callable[[Settings], dict[str, int]] = _nothing_cached
    fault: Callable[[Settings, Any], str | None] = _no_fault


def _window_fault(settings: Settings, config: Any) -> str | None:
    if settings["stride"] > settings["window"]:
        return f"windowed_attention.stride={settings['stride']} must be at most window={settings['window']}"
    return None


def _graph_fault(settings: Settings, config: Any) -> str | None:
    if settings["top_k"] > settings["num_experts"]:
        return f"moe_graph.top_k={settings['top_k']} must be at most num_experts={settings['num_experts']}"
    if settings["active_edges"] and config.codebook is None:
        return f"moe_graph.active_edges={settings['active_edges']} needs codebook: edges join its motifs"
    return None


def _composite_fault(settings: Settings, config: Any) -> str | None:
    return (
        "composite is given but codebook is None: it pairs the codebook's motifs" if config.codebook is None else None
    )


EMBEDDING_AREA, OTHER_HEADS_AREA = "embedding + sequencer", "video/talker heads"
OPTIONAL_BLOCKS = {  # in the order of the data
    "text_sequencer": OptionalBlock(
        about="ternary LSTM over the byte embedding",
        part="model.text_sequencer",
        area=EMBEDDING_AREA,
        options={"hidden_size": _count("width of the LSTM; 0: `hidden_size` of the model", 0, 0)},
        cached=lambda settings: {"sequencer": 1},
    ),
    "memgram": OptionalBlock(
        about="table of hashed byte n-grams",
        part="model.memgram",
        area="MemGram",
        options={
            "slots": _count("rows of the table", most=MOST_ROWS),
            "dim": _count("width of a row"),
            "orders": Option(
                "n-gram lengths in bytes", [3, 4, 5], _orders, f"a list of n-gram lengths from 1 to {LONGEST_NGRAM}"
            ),
        },
        cached=lambda settings: {"ids": max(settings["orders"]) - 1},
    ),
    "windowed_attention": OptionalBlock(
        about="attention to the last bytes one by one and to older bytes in blocks",
        options={
            "window": _count("last bytes that are attended to one by one"),
            "stride": _count("bytes in a block of older context; 0: older context is not seen", 0, 0),
        },
        fault=_window_fault,
    ),
    "codebook": OptionalBlock(
        about="shared vector quantisation",
        part="model.shared_vq",
        area="shared VQ + bridge",
        options={
            "size": _count("entries", most=MOST_ROWS),
            "dim": _count("width of an entry"),
            "commitment": _number("weight of the commitment loss", 0.25, 0, 100),
            "hashes": _count("hash functions of the candidate search in large codebooks", 4, most=MOST_REPEATS),
            "probes": _count("buckets that are searched per hash", 4, most=MOST_REPEATS),
        },
    ),
    "moe_graph": OptionalBlock(
        about="looped top-k experts with messages along a graph of codebook entries",
        part="model.moe_graph",
        area="MoEGraph",
        options={
            "num_experts": _count("number of experts", most=MOST_MODULES),
            "top_k": _count("experts per position", 2),
            "expert_size": _count("width of an expert; 0: 2 x `hidden_size`", 0, 0),
            "max_iterations": _count("most iterations of the loop", 4, most=MOST_REPEATS),
            "halt_threshold": _number("halting probability at which a position stops", 0.99, 0, 1),
            "ponder_cost": Option(
                "weight of the mean number of iterations in the loss",
                0.01,
                lambda value: _is_number(value) and value >= 0,
                "a non-negative number",
            ),
            "lti_decay": _number("share of the state that an iteration keeps", 0.9, 0, 1),
            "active_edges": _count("edges kept in the graph; 0: no graph; needs `codebook`", 0, 0, MOST_ROWS),
            "neighbours": _count("edges read per entry", 8),
        },
        fault=_graph_fault,
    ),
    "composite": OptionalBlock(
        about="second codebook, of pairs of codebook entries",
        part="model.composite",
        area="KG VQ + composite",
        options={
            "size": _count("entries; needs `codebook`", most=MOST_ROWS),
            "dim": _count("width of an entry"),
            "hidden_size": _count("width of the projection to the head; 0: `hidden_size` of the model", 0, 0),
            "hashes": _count("hash functions of the candidate search", 4, most=MOST_REPEATS),
        },
        cached=lambda settings: {"motifs": 1},
        fault=_composite_fault,
    ),
    "output_router": OptionalBlock(
        about="several gated output projections",
        part="output_router",
        area="router",
        options={
            "num_heads": _count("output projections", most=MOST_MODULES),
            "gate_size": _count("width of the gate", 128),
        },
    ),
    "video_head": OptionalBlock(
        about="head for video latents",
        part="video_head",
        area=OTHER_HEADS_AREA,
        options={
            "latent_dim": _count("width of a video latent"),
            "hidden_size": _count("width of the head's MLP; 0: 4 x `hidden_size` of the model", 0, 0),
        },
    ),
    "talker_head": OptionalBlock(
        about="head for audio codes",
        part="talker_head",
        area=OTHER_HEADS_AREA,
        options={
            "num_codes": _count("size of the audio code vocabulary"),
            "hidden_size": _count("width of the head's MLP; 0: 4 x `hidden_size` of the model", 0, 0),
        },
    ),
}


def complete_settings(name: str, given: Any) -> Settings | None:
    """A block's settings with defaults filled in; None stays None. Raises ValueError naming block, key and value."""
    if given is None:
        return None
    options = OPTIONAL_BLOCKS[name].options
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


def switched_on(config: Any) -> Iterator[tuple[OptionalBlock, Settings]]:
    """The blocks that an ArbConfig has, with their settings."""
    for name, block in OPTIONAL_BLOCKS.items():
        settings = getattr(config, name)
        if settings is not None:
            yield block, settings


def check_blocks(config: Any) -> None:
    """Raises ValueError, naming field and value, where the settings of an ArbConfig's blocks contradict each other."""
    for block, settings in switched_on(config):
        fault = block.fault(settings, config)
        if fault is not None:
            raise ValueError(fault)
