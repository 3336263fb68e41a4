"""The kernels of a model loaded with its own code: native ones where arb_kernels is installed, Triton's, torch's."""

import importlib.util
import shutil
import sys

import pytest
import torch

from arb_kernels.native_library import ABI_VERSION
from configuration_arb import preset_config
from modeling_arb import ArbForCausalLM
from modeling_arb.checkpoints.remote_code import export_code
from support.fresh_process import NO_REPO, fresh_process
from support.scripting import ROOT
from support.tensors import NOT_BUILT, assert_same, random_trits

ASKED = "torch was asked for: not the native kernels"
LOAD = f"""{NO_REPO}
import os, torch
site, folder, logits = sys.argv[1:]
sys.path.insert(0, site)
sys.modules["triton"] = None  # not installed
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
ids = torch.tensor([list(b"def f(x):")])
os.environ["ARB_BACKEND"] = "torch"
assert torch.equal(model(ids).logits, torch.load(logits))
print("{ASKED}", file=sys.stderr, flush=True)
del os.environ["ARB_BACKEND"]
assert torch.equal(model(ids).logits, torch.load(logits))
assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 12)
kernels = sys.modules[type(model).__module__.replace("modeling_arb", "kernels_arb")]
assert kernels.triton is None
print(kernels.describe_backend(torch.device("cpu")))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a saved model with weights of one trit and of two, and beside it the file of its logits."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    torch.manual_seed(0)
    model = ArbForCausalLM(preset_config("arb-tiny", trits_per_weight={"embedding": 2, "mlp": 2, "head": 2})).eval()
    model.save_pretrained(folder)
    torch.save(model(torch.tensor([list(b"def f(x):")])).logits.detach(), folder.parent / "logits.pt")
    return folder


def backend_of(saved, tmp_path):
    """What a fresh process says of its backend, and its lines about native kernels: none while torch is asked for."""
    arguments = (tmp_path / "site", saved, saved.parent / "logits.pt")
    done = fresh_process(tmp_path, LOAD, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line for line in done.stderr.splitlines() if "native" in line]
    assert said[0] == ASKED
    return done.stdout.strip(), said[1:]


def install(tmp_path):
    """The package arb_kernels as pip puts it into a site folder."""
    shutil.copytree(ROOT / "kernels", tmp_path / "site" / "arb_kernels", ignore=shutil.ignore_patterns("__pycache__"))


@NOT_BUILT
def test_an_installed_library_is_used(saved, tmp_path):
    install(tmp_path)
    backend, lines = backend_of(saved, tmp_path)
    assert backend.startswith("native kernels on cpu") and lines == []


def test_one_line_says_how_to_install_it_unless_torch_was_asked_for(saved, tmp_path):
    backend, lines = backend_of(saved, tmp_path)
    assert backend == "torch kernels on cpu"
    (line,) = lines
    for word in ("no library of the package arb_kernels was found", "run `pip install PATH`", "ARB_BACKEND=torch"):
        assert word in line


@NOT_BUILT
def test_a_library_of_another_version_is_named(saved, tmp_path):
    install(tmp_path)
    other = shutil.copytree(saved, tmp_path / "other")
    shutil.copyfile(saved.parent / "logits.pt", tmp_path / "logits.pt")
    code = (other / "kernels_arb.py").read_text()
    assert code.count(f"\nABI_VERSION = {ABI_VERSION}\n") == 1
    (other / "kernels_arb.py").write_text(code.replace(f"ABI_VERSION = {ABI_VERSION}", "ABI_VERSION = 1000"))
    backend, lines = backend_of(other, tmp_path)
    assert backend == "torch kernels on cpu"
    (line,) = lines
    assert f"has ABI version {ABI_VERSION}, not 1000" in line and "run `pip install PATH`" in line


def test_triton_kernels_of_the_file_agree_with_torch(tmp_path, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    export_code(tmp_path)
    spec = importlib.util.spec_from_file_location("exported_kernels", tmp_path / "kernels_arb.py")
    kernels = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, kernels)
    spec.loader.exec_module(kernels)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    levels = (3 * random_trits(7, 33) + random_trits(7, 33)).to(device)
    x = torch.randn(3, 33, device=device)
    found = {}
    for name in ("torch", "triton"):
        with kernels.use_backend(name):
            assert kernels.uses_triton(levels) == (name == "triton")
            packed = kernels.pack_levels(levels, 2)
            codes, scale = kernels.quantise_tokens(x)
            product = kernels.int8_matmul(codes, kernels.unpack_levels(packed, 33), scale, largest=4)
            found[name] = (packed, codes, scale, product)
    for ref, out in zip(found["torch"], found["triton"], strict=True):
        assert_same("kernel", ref, out)
