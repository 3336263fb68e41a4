"""The audit: compares every persistent tensor of a model and its optimizer with the closed list of integer state."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from arb_kernels.formats.packing import unpack_levels
from configuration_arb import ArbConfig
from configuration_arb.optional_blocks import EMBEDDING_AREA, OPTIONAL_BLOCKS, OTHER_HEADS_AREA
from modeling_arb import ArbForCausalLM
from modeling_arb.checkpoints.integrity import describe_illegal, load_pickle, open_tensor_file, read_config
from modeling_arb.layers.ternary_matrix import TernaryMatrix

AREAS = {  # by the last name of a module
    "byte_embedding": EMBEDDING_AREA,
    "blocks": "MLA attention",  # with the MLPs
    "byte_head": "ByteHead",
    **{block.part.rpartition(".")[2]: block.area for block in OPTIONAL_BLOCKS.values() if block.part},
}


OPTIMIZER_FILE = "optimizer.pt"
COUNTED_WEIGHTS = 1 << 22  # at a time


@dataclass(frozen=True)
class TensorRow:
    """One persistent tensor."""

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    area: str
    inference: bool = False  # whether inference needs it


@dataclass(frozen=True)
class CacheRow:
    """A tensor that a module keeps in memory besides its state and never saves."""

    name: str
    kind: str
    bytes: int
    area: str


@dataclass
class StateAudit:
    """The result of an audit. `areas` counts logical weights, `trits` their trits, both by area; `trits_by_role` is the
    number of trits that a weight has in the matrices of each role.

    caches: data that a live model holds beside its state; for a shape or a checkpoint (caches_are_held False), the most
    that generation on the CPU will create. They are not part of state_bytes.
    """

    areas: dict[str, int] = field(default_factory=dict)
    trits: dict[str, int] = field(default_factory=dict)
    trits_by_role: dict[str, int] = field(default_factory=dict)
    tensors: list[TensorRow] = field(default_factory=list)
    float_tensors: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    caches: list[CacheRow] = field(default_factory=list)
    caches_are_held: bool = False

    @property
    def cache_bytes(self) -> int:
        return sum(row.bytes for row in self.caches)

    @property
    def logical_weights(self) -> int:
        return sum(self.areas.values())

    @property
    def state_bytes(self) -> int:
        return sum(row.bytes for row in self.tensors)

    @property
    def trits_per_weight(self) -> float:
        """The mean over all weights."""
        return sum(self.trits.values()) / self.logical_weights

    @property
    def inference_bytes(self) -> int:
        """Bytes of the tensors that inference needs: what an inference checkpoint holds."""
        return sum(row.bytes for row in self.tensors if row.inference)

    @property
    def clean(self) -> bool:
        return not self.float_tensors and not self.faults

    def to_dict(self) -> dict:
        return {
            "areas": self.areas,
            "logical_weights": self.logical_weights,
            "state_bytes": self.state_bytes,
            "state_bytes_per_weight": self.state_bytes / self.logical_weights,
            "inference_bytes": self.inference_bytes,
            "inference_bytes_per_weight": self.inference_bytes / self.logical_weights,
            "trits_per_weight": self.trits_per_weight,
            "trits_by_area": {area: trits / self.areas[area] for area, trits in self.trits.items()},
            "trits_by_role": self.trits_by_role,
            "float_tensors": self.float_tensors,
            "faults": self.faults,
            "caches": [asdict(row) for row in self.caches],
            "cache_bytes": self.cache_bytes,
            "caches_are_held": self.caches_are_held,
            "tensors": [asdict(row) for row in self.tensors],
        }

    def table(self) -> str:
        """The audit as text: areas, roles, verdict."""
        areas = [f"{'area':<24}{'weights':>14}{'trits/weight':>14}{'bytes':>14}{'bytes/weight':>14}"]
        for area, weights in self.areas.items():
            size = sum(row.bytes for row in self.tensors if row.area == area)
            areas.append(_area_line(area, weights, self.trits[area], size))
        areas.append(_area_line("total", self.logical_weights, sum(self.trits.values()), self.state_bytes))
        roles = [f"{'role':<24}{'dtype':>14}{'bytes':>14}{'bytes/weight':>14}"]
        for role, dtype in sorted({(row.role, row.dtype) for row in self.tensors}):
            size = sum(row.bytes for row in self.tensors if (row.role, row.dtype) == (role, dtype))
            roles.append(f"{role:<24}{dtype:>14}{size:>14,}{size / self.logical_weights:>14.3f}")
        size = self.inference_bytes
        roles.append(f"{'of it for inference':<38}{size:>14,}{size / self.logical_weights:>14.3f}")
        held = "held beside the state" if self.caches_are_held else "generation will hold"
        caches = [f"{'cache, ' + held:<38}{'bytes':>14}{'bytes/weight':>14}"]
        for kind in [*sorted({row.kind for row in self.caches}), None]:
            size = sum(row.bytes for row in self.caches if kind in (row.kind, None))
            caches.append(f"{kind or 'total':<38}{size:>14,}{size / self.logical_weights:>14.3f}")
        verdict = [f"float tensors: {len(self.float_tensors)}"]
        verdict += [f"  float: {name}" for name in self.float_tensors] + [f"  fault: {fault}" for fault in self.faults]
        return "\n".join([*areas, "", *roles, "", *caches, "", *verdict])


def _area_line(area: str, weights: int, trits: int, size: int) -> str:
    return f"{area:<24}{weights:>14,}{trits / weights:>14.3g}{size:>14,}{size / weights:>14.3f}"


def area_of(name: str) -> str:
    """The area that a module or tensor of this name belongs to; `other` when it belongs to none."""
    return next((area for part, area in AREAS.items() if part in name.split(".")), "other")


def _audit_tensors(model: ArbForCausalLM, tensors: dict[str, torch.Tensor]) -> StateAudit:
    """Compare tensors, by name, with the list of the model's config. Tensors may be on the meta device."""
    audit = StateAudit()
    listed = {}
    for name, module in model.integer_states().items():
        if isinstance(module, TernaryMatrix):
            area, weights = area_of(name), module.logical_weights
            audit.areas[area] = audit.areas.get(area, 0) + weights
            audit.trits[area] = audit.trits.get(area, 0) + weights * module.trits
            audit.trits_by_role[module.role] = module.trits
        for key, spec in module.layout().items():
            if spec.inference or model.config.training_state:
                listed[f"{name}.{key}"] = spec
    for name, tensor in tensors.items():
        spec = listed.get(name)
        role = spec.role if spec else "unlisted"
        size = tensor.numel() * tensor.element_size()
        dtype = str(tensor.dtype).removeprefix("torch.")
        needed = spec is not None and spec.inference
        audit.tensors.append(TensorRow(name, role, dtype, tuple(tensor.shape), size, area_of(name), needed))
        if tensor.is_floating_point() or tensor.is_complex():
            audit.float_tensors.append(name)
        if spec is None:
            audit.faults.append(f"{name} is not on the list of persistent state")
        elif (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, spec.shape):
            audit.faults.append(f"{name} is {dtype} {tuple(tensor.shape)}, listed as {spec.dtype} {spec.shape}")
        elif not tensor.is_meta and (illegal := spec.count_illegal(tensor)):
            audit.faults.append(f"{name} {describe_illegal(spec, illegal)}")
    audit.faults += [f"{name} is missing" for name in listed if name not in tensors]
    return audit


def _tensors_in(value: object, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors_in(item, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _tensors_in(item, f"{name}.{i}")


def audit_model(model: ArbForCausalLM, optimizer: torch.optim.Optimizer | None = None) -> StateAudit:
    """Audit a live model: parameters, every buffer (persistent or not), the optimizer's state, and the caches held."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if optimizer is not None:
        tensors |= dict(_tensors_in(optimizer.state_dict(), "optimizer"))
    audit = _audit_tensors(model, tensors)
    audit.caches, audit.caches_are_held = held_caches(model), True
    return audit


def held_caches(model: ArbForCausalLM) -> list[CacheRow]:
    """The caches that a model's modules hold now."""
    return [
        CacheRow(name, kind, tensor.nbytes, area_of(name))
        for name, module in model.integer_states().items()
        for kind, tensor in module.caches().items()
    ]


def generation_caches(model: ArbForCausalLM, device: str = "cpu") -> list[CacheRow]:
    """The largest caches that the model holds after generation on a device, with every expert used. Video and talker
    heads are left out."""
    return [
        CacheRow(name, kind, size, area_of(name))
        for name, matrix in model.ternary_matrices().items()
        if area_of(name) != OTHER_HEADS_AREA
        for kind, size in matrix.generation_caches(torch.device(device)).items()
    ]


def unallocated_model(config: ArbConfig) -> ArbForCausalLM:
    """A model on the meta device: tensors have shapes and dtypes but no data."""
    with torch.device("meta"):
        return ArbForCausalLM(config)


def audit_config(config: ArbConfig) -> StateAudit:
    """Audit a shape without allocating it."""
    return forecast_caches(audit_model(model := unallocated_model(config)), model)


def forecast_caches(audit: StateAudit, model: ArbForCausalLM) -> StateAudit:
    """The same audit with the expected caches of generation instead of the held ones."""
    audit.caches, audit.caches_are_held = generation_caches(model), False
    return audit


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a local checkpoint. Raises ValueError when there are none."""
    files = sorted(Path(folder).glob("model*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: model.safetensors not found")
    return files


def audit_folder(folder: str | Path) -> StateAudit:
    """Audit the files of a checkpoint: weights and, in a training checkpoint, the optimizer's state.

    Raises ValueError or OSError, naming the file, when the config, a weight file or the optimizer's cannot be read.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: config.json not found")
    config = read_config(folder / "config.json")
    tensors: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        with open_tensor_file(path) as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if os.path.lexists(folder / OPTIMIZER_FILE):
        tensors |= _optimizer_tensors(folder / OPTIMIZER_FILE)
    model = unallocated_model(config)
    return forecast_caches(_audit_tensors(model, tensors), model)


def _optimizer_tensors(path: Path) -> dict[str, torch.Tensor]:
    state = load_pickle(path)
    try:
        return dict(_tensors_in(state, "optimizer"))
    except RecursionError as error:
        raise ValueError(f"{path}: damaged, it contains recursive lists") from error


def state_hash(model: nn.Module) -> str:
    """sha256 over every tensor of the state dict, names included: equal hashes mean equal state bit for bit."""
    return hash_tensors(sorted(model.state_dict().items()))


def inference_hash(model: ArbForCausalLM) -> str:
    """As `state_hash`, over what inference needs alone: the same with and without training state."""
    kept = {
        f"{name}.{key}"
        for name, module in model.integer_states().items()
        for key, spec in module.layout().items()
        if spec.inference
    }
    return hash_tensors((name, tensor) for name, tensor in sorted(model.state_dict().items()) if name in kept)


def hash_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """sha256 over tensors in the order given: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def zero_share(model: ArbForCausalLM) -> float:
    """Share of the weights that are zero."""
    matrices = model.ternary_matrices().values()
    zeros = sum(_count_zeros(matrix) for matrix in matrices)
    return zeros / sum(matrix.logical_weights for matrix in matrices)


def _count_zeros(matrix: TernaryMatrix) -> int:
    """Counted piece by piece, so that a large table is not unpacked whole."""
    pieces = matrix.T_packed.split(max(1, COUNTED_WEIGHTS // matrix.columns))
    return sum(int((unpack_levels(rows, matrix.columns) == 0).sum()) for rows in pieces)
