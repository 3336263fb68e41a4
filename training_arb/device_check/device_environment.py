"""The GPU of a check and the versions of the libraries."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess

import torch

from arb_kernels.backend import describe_backend

PACKAGES = ("triton", "transformers", "numpy", "huggingface_hub", "safetensors")


def describe_device(name: str) -> dict:
    """{"passed", "summary", "card", "memory_gb", "driver", "capability", "torch", "python", "packages", ...}."""
    device = torch.device(name)
    found = {"card": "cpu", "memory_gb": None, "capability": None, "multiprocessors": None}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found = {
            "card": card.name,
            "memory_gb": round(card.total_memory / 1e9, 2),
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
        }
    packages = {package: _version(package) for package in PACKAGES}
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
    backend = describe_backend(device)
    return {
        "passed": True,
        "summary": f"{found['card']}, {found['memory_gb']} GB, torch {torch.__version__}, {backend}",
        **found,
        **versions,
        "driver": _driver() if device.type == "cuda" else None,
        "packages": packages,
        "backend": backend,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The GPU driver's version; None if nvidia-smi does not report it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.strip().splitlines()[0] if said.returncode == 0 and said.stdout.strip() else None
