"""How many trits the weights of each part of the model have: one (three levels) or two (nine levels)."""

from __future__ import annotations

from .optional_blocks import is_int

ROLES = ("embedding", "attention", "mlp", "head", "tables", "experts", "blocks")  # blocks: all other matrices
CHOICES = (1, 2)

TritsPerWeight = int | dict[str, int]


def fault_of(value: object) -> str:
    """What `value` must be instead, if it is neither a number of trits nor a dict of them by role; otherwise ''."""
    numbers = list(value.values()) if isinstance(value, dict) else [value]
    if isinstance(value, dict) and not all(role in ROLES for role in value):
        return f"a number for some of the roles {', '.join(ROLES)}, and no other name"
    return "" if all(is_int(number) and number in CHOICES for number in numbers) else "1, 2, or a dict of them by role"


def trits_of(value: TritsPerWeight, role: str) -> int:
    """Trits a weight of the matrices with a role. A role that a dict leaves out has one."""
    assert role in ROLES, role
    return value.get(role, 1) if isinstance(value, dict) else value


def parse_trits(text: str) -> TritsPerWeight:
    """From a command line: '2', or 'embedding:2,head:2'. Raises ValueError on anything else."""
    try:
        pairs = [part.split(":") for part in text.split(",")]
        value = int(text) if ":" not in text else {role.strip(): int(number) for role, number in pairs}
    except ValueError:
        raise ValueError(f"trits_per_weight={text!r} must be 1, 2, or ROLE:TRITS,ROLE:TRITS") from None
    if fault := fault_of(value):
        raise ValueError(f"trits_per_weight={text!r} must be {fault}")
    return value


def describe_trits(value: TritsPerWeight) -> str:
    """As `parse_trits` reads it."""
    return ",".join(f"{role}:{number}" for role, number in value.items()) if isinstance(value, dict) else str(value)
