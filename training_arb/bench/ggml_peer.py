"""ggml's ternary matmuls as a peer in benchmarks: its own quantiser and graph, on its CPU backend.

build_ggml_peer.sh builds the libraries. They share torch's OpenMP runtime, so the two do not compete for cores, and
torch's memory, so all implementations read the same kind of pages.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from arb_kernels.formats.decode_layout import in_huge_pages

FORMATS = {"TQ1_0": 34, "TQ2_0": 35}  # enum ggml_type in ggml.h
F32 = 0
BLOCK = 256  # weights: what both formats quantise together, along K
LIBRARY = "libggml-cpu.so"  # brings libggml-base.so with it
ENVIRONMENT = "ARB_GGML"

_POINTER, _SIZE, _LONG, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_int


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", _SIZE), ("mem_buffer", _POINTER), ("no_alloc", ctypes.c_bool)]


_SIGNATURES = {
    "ggml_init": (_POINTER, [_InitParams]),
    "ggml_free": (None, [_POINTER]),
    "ggml_row_size": (_SIZE, [_INT, _LONG]),
    "ggml_tensor_overhead": (_SIZE, []),
    "ggml_graph_overhead_custom": (_SIZE, [_SIZE, ctypes.c_bool]),
    "ggml_new_tensor_2d": (_POINTER, [_POINTER, _INT, _LONG, _LONG]),
    "ggml_mul_mat": (_POINTER, [_POINTER] * 3),
    "ggml_new_graph_custom": (_POINTER, [_POINTER, _SIZE, ctypes.c_bool]),
    "ggml_build_forward_expand": (None, [_POINTER] * 2),
    "ggml_quantize_chunk": (_SIZE, [_INT, _POINTER, _POINTER, _LONG, _LONG, _LONG, _POINTER]),
    "ggml_backend_cpu_init": (_POINTER, []),
    "ggml_backend_cpu_set_n_threads": (None, [_POINTER, _INT]),
    "ggml_backend_cpu_buffer_from_ptr": (_POINTER, [_POINTER, _SIZE]),
    "ggml_backend_tensor_alloc": (_INT, [_POINTER] * 3),
    "ggml_backend_graph_compute": (_INT, [_POINTER] * 2),
    "ggml_backend_buffer_free": (None, [_POINTER]),
    "ggml_backend_free": (None, [_POINTER]),
}


def find_ggml(path: str | None) -> ctypes.CDLL | None:
    """ggml's CPU library at `path`, or below it, or where ARB_GGML says; None when neither is given.

    Raises ValueError when it is not found or does not load.
    """
    field = "ggml" if path else ENVIRONMENT
    given = path or os.environ.get(ENVIRONMENT)
    if not given:
        return None
    place = Path(given)
    found = place if place.is_file() else next(iter(sorted(place.rglob(LIBRARY))), None)
    if found is None:
        raise ValueError(f"{field}={given!r}: {LIBRARY} not found; training_arb/bench/build_ggml_peer.sh builds it")
    try:
        library = ctypes.CDLL(str(found))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise ValueError(f"{field}={given!r}: {error}") from error
    return library


class GgmlMatmul:
    """x (M, K) times one of `copies` equal ternary matrices (N, K), each of them a graph of one ggml_mul_mat."""

    def __init__(
        self, library: ctypes.CDLL, quantisation: str, trits: torch.Tensor, x: torch.Tensor, copies: int, threads: int
    ):
        (N, K), M = trits.shape, x.shape[0]
        if K % BLOCK:
            raise ValueError(f"shape={N}x{K}: ggml's ternary formats need a multiple of {BLOCK} columns")
        self._library = library
        kind = FORMATS[quantisation]
        values, row_bytes = trits.float().contiguous(), library.ggml_row_size(kind, K)
        quantised = torch.empty(N, row_bytes, dtype=torch.uint8)
        written = library.ggml_quantize_chunk(kind, values.data_ptr(), quantised.data_ptr(), 0, N, K, None)
        assert written == quantised.numel()
        self.weights = in_huge_pages(quantised.expand(copies, N, row_bytes).contiguous())
        self.x, self.out = x.float().contiguous(), torch.empty(M, N)
        self._backend = library.ggml_backend_cpu_init()
        library.ggml_backend_cpu_set_n_threads(self._backend, threads)
        per_copy = 2 * library.ggml_tensor_overhead() + library.ggml_graph_overhead_custom(8, False)
        size = (copies + 1) * (per_copy + 1024)
        self._context = library.ggml_init(_InitParams(size, None, True))
        self._buffers = [
            library.ggml_backend_cpu_buffer_from_ptr(tensor.data_ptr(), tensor.numel() * tensor.element_size())
            for tensor in (self.weights, self.x, self.out)
        ]
        source = self._tensor(F32, self.x.shape, self._buffers[1], self.x)
        self._graphs = [self._graph(kind, weight, (N, K), source) for weight in self.weights]

    def _tensor(self, kind: int, shape: Sequence[int], buffer: int, memory: torch.Tensor) -> int:
        """A ggml tensor (rows, columns), whose innermost dimension comes first there, over memory of torch."""
        tensor = self._library.ggml_new_tensor_2d(self._context, kind, shape[1], shape[0])
        self._place(tensor, buffer, memory)
        return tensor

    def _place(self, tensor: int, buffer: int, memory: torch.Tensor) -> None:
        self._check(self._library.ggml_backend_tensor_alloc(buffer, tensor, memory.data_ptr()))

    def _graph(self, kind: int, weight: torch.Tensor, shape: Sequence[int], source: int) -> int:
        tensor = self._tensor(kind, shape, self._buffers[0], weight)
        product = self._library.ggml_mul_mat(self._context, tensor, source)
        self._place(product, self._buffers[2], self.out)
        graph = self._library.ggml_new_graph_custom(self._context, 8, False)
        self._library.ggml_build_forward_expand(graph, product)
        return graph

    def _check(self, status: int) -> None:
        if status != 0:
            raise RuntimeError(f"ggml returned status {status}")

    def __call__(self, copy: int) -> torch.Tensor:
        """float32 (M, N); the next call overwrites it."""
        self._check(self._library.ggml_backend_graph_compute(self._backend, self._graphs[copy]))
        return self.out

    def close(self) -> None:
        """Free ggml's memory."""
        for buffer in self._buffers:
            self._library.ggml_backend_buffer_free(buffer)
        self._library.ggml_free(self._context)
        self._library.ggml_backend_free(self._backend)
