"""The benches and the smoke run as a user runs them: rows, JSON keys, refusals. Nothing asserts a time."""

import json
import os
from types import SimpleNamespace

import pytest
import torch

from arb_scripts.developer.bench_neighbours import SETTINGS, step_ms
from support.scripting import run_script
from support.tensors import NOT_BUILT
from training_arb.bench.ggml_peer import ENVIRONMENT, FORMATS, GgmlMatmul, find_ggml
from training_arb.bench.kernel_contest import batches_of

BUILT_GGML = os.environ.get(ENVIRONMENT)
PERCENTILES = ("p20", "p50", "p80")


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """The scripts set torch's threads and look for ggml in the environment."""
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def result_of(capsys, path):
    """The JSON file's content, which is also the last line that was printed."""
    written = json.loads(path.read_text())
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == written
    return written, lines


def test_kernel_rows(tmp_path, capsys):
    out = tmp_path / "made" / "kernels.json"
    sizes = ["--shapes", "33x20", "--batch", "1,16", "--threads", 1, "--repeats", 2, "--cold-mb", 1]
    assert run_script("bench_kernels", *sizes, "--json", out) == 0
    result, lines = result_of(capsys, out)
    assert sum("its rows are left out" in line for line in lines) == 1
    assert result["env"]["threads"] == 1
    keys = {"op", "shape", "batch", "threads", "gops_p50", "limit_gops", "fraction_of_limit", "gb_per_s", "peer"}
    for row in result["rows"]:
        assert keys | {f"us_{key}" for key in PERCENTILES} <= row.keys()
        assert row["threads"] == 1
        assert row["gops_p50"] > 0
        if row["limit_gops"] is not None:
            assert row["fraction_of_limit"] == pytest.approx(row["gops_p50"] / row["limit_gops"])
    own = {(row["op"], row["shape"], row["batch"]) for row in result["rows"] if row["peer"] == "arb"}
    runs = [("cpu_matvec", 1), ("cpu_matmul", 16), ("cpu_update", None), ("cpu_quantise", 1), ("cpu_quantise", 16)]
    assert own == {(op, "33x20", batch) for op, batch in runs}
    peers = {row["op"] for row in result["rows"] if row["peer"] != "arb"}
    assert {"cpu_matvec:torch_fp32", "cpu_matmul:torch_bf16", "cpu_matmul:torch_int_mm"} <= peers
    assert {"cpu_update:torch_adamw_fused", "cpu_update:arb_two_trits"} <= peers
    assert {"cpu_matvec:arb_two_trits", "cpu_matmul:arb_two_trits"} <= peers
    row = next(row for row in result["rows"] if row["op"] == "cpu_matvec")
    assert row["gops_p50"] == pytest.approx(2 * 33 * 20 / row["us_p50"] / 1000)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_kernel_takes_the_batches_that_it_is_made_for():
    assert batches_of("cpu_matvec", [1, 8, 9]) == [1, 8]
    assert batches_of("cpu_matmul", [1, 8, 9]) == [9]
    assert batches_of("cpu_update", [1, 9]) == [None]
    assert batches_of("cpu_quantise", [1, 9]) == [1, 9]


@pytest.mark.skipif(not BUILT_GGML, reason=f"{ENVIRONMENT}=FOLDER tests against a built ggml")
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("quantisation", FORMATS)
def test_ggml_multiplies(quantisation, tokens):
    trits, x = torch.randint(-1, 2, (96, 512), dtype=torch.int8), torch.randn(tokens, 512)
    product = GgmlMatmul(find_ggml(BUILT_GGML), quantisation, trits, x, copies=3, threads=1)
    exact = x @ trits.float().T
    for copy in range(3):
        assert (product(copy) - exact).norm() / exact.norm() < 0.03
    product.close()


def test_training_rows(tmp_path, capsys):
    out = tmp_path / "train.json"
    shape = ["--preset", "arb-tiny", "--batch", 2, "--ctx", 16, "--steps", 2, "--threads", 1]
    runs = ["--configs", "TrueTernary,TwoTrit,Adam_BF16", "--compute", "int8", "--json", out]
    assert run_script("bench_train", *shape, *runs) == 0
    result, _ = result_of(capsys, out)
    assert result["weights"] == 171_008
    runs = [(row["config"], row["compute"]) for row in result["rows"]]
    assert runs == [("TrueTernary", "int8"), ("TwoTrit", "int8"), ("Adam_BF16", "float")]
    for row in result["rows"]:
        assert {f"step_ms_{key}" for key in PERCENTILES} <= row.keys()
        assert 0 < row["update_ms_p50"] < row["step_ms_p80"]
        assert row["update_share"] > 0
        assert row["peak_mem_mb"] >= row["start_mem_mb"] > 0


def test_generation_rows_and_profile(tmp_path, capsys):
    out = tmp_path / "generate.json"
    sizes = ["--prompt-bytes", 4, "--new-bytes", 4, "--repeats", 2, "--limit-mb", 1, "--threads", 1, "--batch", "1,3"]
    trits = ["--trits_per_weight", 1, "embedding:2,head:2", 2]
    assert run_script("bench_generate", "--preset", "arb-tiny", *sizes, *trits, "--profile", "--json", out) == 0
    result, lines = result_of(capsys, out)
    assert [row["model"] for row in result["rows"]] == 2 * ["ternary", "ternary", "ternary", "fp32", "bf16"]
    assert [row["trits_per_weight"] for row in result["rows"]] == 2 * ["1", "embedding:2,head:2", "2", None, None]
    assert [row["batch"] for row in result["rows"]] == 5 * [1] + 5 * [3]
    keys = {"tokens_per_s", "limit_tokens_per_s", "fraction_of_limit"} | {f"token_ms_{key}" for key in PERCENTILES}
    for row in result["rows"]:
        assert keys <= row.keys()
        assert row["preset"] == "arb-tiny" and row["weights"] == 171_008
    one, edges, two, fp32, bf16 = (row["weight_mb"] for row in result["rows"][:5])
    assert fp32 == 2 * bf16
    assert one <= edges <= two < bf16  # equal where torch decodes from int8 levels
    assert sum("[TernaryLinear]" in line for line in lines) == 3


@pytest.mark.parametrize("rule", ["momentum", "flip", "correlation"])
def test_smoke_trains(rule, tmp_path, capsys):
    out = tmp_path / "smoke.json"
    shape = ["--preset", "arb-tiny", "--ctx", 16, "--batch", 2, "--steps", 3, "--update-rule", rule]
    trits = 2 if rule == "momentum" else 1
    shape += ["--trits-per-weight", trits]
    assert run_script("smoke", *shape, "--backward", "--json", out) == 0
    result, _ = result_of(capsys, out)
    keys = ["state_bytes", "live_mb_by_step", "peak_rss_mb", "peak_device_mb", "loss", "first_call_ms", "warm_ms"]
    assert {*keys, "backend"} <= result.keys()
    assert len(result["loss"]) == len(result["live_mb_by_step"]) == 3
    assert max(result["live_mb_by_step"]) - min(result["live_mb_by_step"]) < 1
    assert result["trits_per_weight"] == trits
    assert result["state_bytes"] > 0 and result["peak_rss_mb"] > 0 and result["peak_device_mb"] == 0
    if rule == "momentum":
        assert result["loss"][-1] < result["loss"][0]


def test_smoke_without_backward_changes_nothing(capsys):
    assert run_script("smoke", "--preset", "arb-tiny", "--ctx", 16, "--steps", 2) == 0
    first, second = json.loads(capsys.readouterr().out.splitlines()[-1])["loss"]
    assert first == second


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("bench_kernels", ["--ops", "cpu_matvec,gpu_magic"], "ops='gpu_magic'"),
        ("bench_kernels", ["--ops", ""], "ops=''"),
        ("bench_kernels", ["--shapes", "4096"], "shapes='4096'"),
        ("bench_kernels", ["--shapes", "64x64,64xwide"], "shapes='64xwide'"),
        ("bench_kernels", ["--shapes", "0x64"], "shapes='0x64'"),
        ("bench_kernels", ["--batch", "1,many"], "batch='many'"),
        ("bench_kernels", ["--batch", "128", "--ops", "cpu_matvec"], "batch=128"),
        ("bench_kernels", ["--repeats", 0], "repeats=0"),
        ("bench_kernels", ["--cold-mb", 0], "cold_mb=0"),
        ("bench_kernels", ["--threads", 0], "threads=0"),
        ("bench_kernels", ["--ggml", "nowhere"], "ggml='nowhere'"),
        ("bench_train", ["--preset", "arb-9z"], "preset='arb-9z'"),
        ("bench_train", ["--configs", "Lion"], "configs='Lion'"),
        ("bench_train", ["--compute", "int7"], "compute='int7'"),
        ("bench_train", ["--steps", 0], "steps=0"),
        ("bench_train", ["--ctx", 5000], "ctx=5000"),
        ("bench_train", ["--threads", -1], "threads=-1"),
        ("bench_generate", ["--preset", "arb-tiny,arb-9z"], "preset='arb-9z' is not one of arb-tiny"),
        ("bench_train", ["--device", "cuda:99"], "device='cuda:99'"),
        ("bench_generate", ["--models", "fp8"], "models='fp8'"),
        ("bench_generate", ["--trits_per_weight", 1, 3], "trits_per_weight='3' must be 1, 2, or a dict"),
        (
            "bench_generate",
            ["--preset", "arb-tiny-full", "--trits_per_weight", 2],
            "trits_per_weight=2 must be 1 for tables",
        ),
        ("bench_generate", ["--device", "cuda:99"], "device='cuda:99'"),
        ("bench_generate", ["--batch", "1,0"], "batch='0'"),
        ("bench_generate", ["--new-bytes", 1], "new_bytes=1"),
        ("bench_generate", ["--new-bytes", 5000], "new_bytes=5000"),
        ("smoke", ["--preset", "arb-9z"], "preset='arb-9z'"),
        ("smoke", ["--update-rule", "adam"], "update_rule='adam'"),
        ("smoke", ["--trits-per-weight", "9"], "trits_per_weight='9' must be 1, 2, or a dict"),
        ("smoke", ["--max-moe-iters", 2], "max_moe_iters=2"),
        ("smoke", ["--device", "abacus"], "device='abacus'"),
        ("smoke", ["--device", "mps"], "device='mps'"),
        ("smoke", ["--device", "cuda:99"], "device='cuda:99'"),
        ("smoke", ["--ctx", 3], "ctx=3"),
        ("smoke", ["--ctx", 5000], "ctx=5000"),
        ("smoke", ["--steps", 0], "steps=0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(script, arguments, said, capsys, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", None)  # whatever is wrong must be found before anything runs
    assert run_script(script, *arguments) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if "error: " in line]
    assert len(errors) == 1
    assert said in errors[0]


def test_a_wrong_ggml_is_refused(tmp_path, capsys):
    (tmp_path / "libggml-cpu.so").write_text("not a library")
    assert run_script("bench_kernels", "--ggml", tmp_path) == 2
    assert "ggml=" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["bench_kernels", "bench_train", "bench_generate", "smoke"])
def test_help_shows_examples(script, capsys):
    assert run_script(script, "--help") == 0
    assert f"python scripts/{script}.py" in capsys.readouterr().out


def test_rank_rows(tmp_path, capsys):
    out = tmp_path / "ranks.json"
    sizes = ["--preset", "arb-tiny", "--batch", 2, "--ctx", 16, "--rounds", 1, "--steps", 1]
    assert run_script("bench_ranks", *sizes, "--json", out) == 0
    result, _ = result_of(capsys, out)
    assert [row["config"] for row in result["rows"]] == ["one process", "overlapped", "waiting"]
    for row in result["rows"]:
        assert row["ranks"] * row["threads"] == 2
        assert row["bytes_per_s"] == pytest.approx(32_000 / row["step_ms_p50"])


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--ranks", 1], "ranks=1"), (["--batch", 3], "batch=3 must be a multiple"), (["--preset", "arb-9z"], "arb-9z")],
)
def test_rank_bench_refuses(options, said, capsys):
    assert run_script("bench_ranks", *options) == 2
    assert said in capsys.readouterr().err


def test_a_step_beside_no_neighbour():
    """One process at its smallest: the setting reaches it, and its figure comes back."""
    args = SimpleNamespace(preset="arb-tiny", batch=1, ctx=16, steps=1)
    assert step_ms(args, next(iter(SETTINGS.values())), runs=1) > 0


@pytest.mark.parametrize("options", [["--runs", 1], ["--steps", 0], ["--preset", "arb-9z"]], ids=str)
def test_neighbours_that_cannot_be_timed(options, capsys):
    assert run_script("bench_neighbours", *options) == 2
    assert str(options[1]) in capsys.readouterr().err


@NOT_BUILT
def test_a_model_from_the_hub_decodes_with_installed_kernels_and_without(tmp_path):
    path = tmp_path / "rows.json"
    assert (
        run_script("bench_hub_load", *["--preset", "arb-tiny", "--new-bytes", 2, "--repeats", 1, "--json", path]) == 0
    )
    rows = json.loads(path.read_text())["rows"]
    assert [row["kernels"] for row in rows] == ["native", "torch"]
    assert all(row["tokens_per_s"] > 0 for row in rows) and rows[1]["of_torch"] == 1


def test_a_hub_load_that_cannot_be_timed(capsys):
    assert run_script("bench_hub_load", "--repeats", 0) == 2
    assert "repeats=0" in capsys.readouterr().err
