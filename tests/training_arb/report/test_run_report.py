"""report.html shows a run, finished, going or damaged, from its folder alone."""

import base64
import json
import re
import shutil

import pytest
import torch

from arb_kernels.formats.packing import pack_levels
from configuration_arb import preset_config
from modeling_arb import ArbForCausalLM
from support.pretraining import TEXT, arguments
from support.scripting import run_script
from training_arb.checkpoints.checkpoint_files import write_checksums
from training_arb.report.run_record import read_levels, read_run
from training_arb.report.run_report import write_report


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.py").write_bytes(TEXT)
    assert run_script("pretrain", *arguments(folder / "text.py", folder / "run", prompt="<b>&")) == 0
    return folder / "run"


def test_the_page_of_a_finished_run(finished):
    page = (finished / "report.html").read_text()
    (image,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(image).startswith(b"\x89PNG")
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "<script" not in page
    assert "&lt;b&gt;&amp;" in page and "<b>" not in page  # the sample is text, not markup
    for shown in ("bits_per_byte", "learning_rate", "float tensors: 0", "MLA attention", "config.hidden_size"):
        assert shown in page, shown
    assert 'class="missing">' not in page


def test_the_record_of_a_finished_run(finished):
    record = read_run(finished)
    assert record.missing == []
    assert record.flips_between == ("checkpoint-6", "checkpoint-8")
    assert record.flips_by_layer.keys() == ArbForCausalLM(preset_config("arb-tiny")).ternary_matrices().keys()
    assert 0 < max(record.flips_by_layer.values()) < 0.1
    assert {name: count.sum().item() for name, count in record.levels_by_area.items()} == record.audit.areas


@pytest.fixture
def mixed(tmp_path):
    """The model of a checkpoint with two trits in embedding and head, and its folder."""
    model = ArbForCausalLM(preset_config("arb-tiny", trits_per_weight={"embedding": 2, "head": 2}))
    folder = tmp_path / "run" / "checkpoint-2"
    model.save_pretrained(folder)
    write_checksums(folder)
    return model, folder


def test_levels_are_read_as_they_are(mixed):
    model, folder = mixed
    read = dict(read_levels(folder))
    assert read.keys() == {f"{name}.T_packed" for name in model.ternary_matrices()}
    for name, matrix in model.ternary_matrices().items():
        levels = read[f"{name}.T_packed"]
        assert levels.shape == (matrix.rows, matrix.columns)
        assert torch.equal(pack_levels(levels, matrix.trits), matrix.T_packed)


def test_levels_flips_and_zeros_of_two_trits(mixed, tmp_path):
    model, folder = mixed
    head = model.byte_head.proj
    before = head.levels()
    head.T_packed[0] = 0
    changed = (head.levels() != before).float().mean().item()
    model.save_pretrained(folder.with_name("checkpoint-4"))
    write_checksums(folder.with_name("checkpoint-4"))
    record = read_run(folder.parent)
    assert record.flips_by_layer["byte_head.proj"] == pytest.approx(changed / 2)
    assert sum(record.flips_by_layer.values()) == record.flips_by_layer["byte_head.proj"]
    assert record.zeros_by_layer["byte_head.proj"] == pytest.approx((head.levels() == 0).float().mean().item())
    counts = record.levels_by_area["ByteHead"]
    assert counts.tolist() == [(head.levels() == level).sum() for level in range(-4, 5)]
    assert record.levels_by_area["MLA attention"].nonzero().flatten().tolist() == [3, 4, 5]
    assert {name: count.sum().item() for name, count in record.levels_by_area.items()} == record.audit.areas
    assert write_report(folder.parent, png=tmp_path / "levels.png") == record.missing


def test_a_run_that_goes_on(finished, tmp_path):
    for step in (4, 8):
        shutil.copytree(finished / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
    record = read_run(tmp_path / "run")
    assert record.missing == ["report.json: the run has not ended"]
    assert [entry["step"] for entry in record.history if "loss" in entry] == [2, 4, 6, 8]
    assert record.settings["ctx"] == 32 and record.settings["max_steps"] == 8
    assert record.flips_between == ("checkpoint-4", "checkpoint-8")


def test_a_folder_without_checkpoints(tmp_path, capsys):
    assert run_script("report", tmp_path) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missing")]
    assert len(said) == 5
    assert (tmp_path / "report.html").read_text().count('class="missing"') == 5


def test_only_what_was_asked_for_is_written(finished, tmp_path):
    assert run_script("report", finished, "--png", tmp_path / "now.png") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["now.png"]
    assert (tmp_path / "now.png").read_bytes().startswith(b"\x89PNG")


def test_damaged_files_are_named_and_the_rest_is_shown(finished, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir, symlinks=True)
    (run_dir / "report.json").write_text("{")
    (run_dir / "checkpoint-8" / "model.safetensors").write_bytes(b"\xff" * 100)
    (run_dir / "checkpoint-8" / "trainer_state.json").write_text("[]")
    shutil.rmtree(run_dir / "final")
    missing = " ".join(write_report(run_dir, run_dir / "report.html"))
    for name in (
        "report.json: not JSON",
        "trainer_state.json: must hold",
        "weights of checkpoint-8",
        "flips per layer",
    ):
        assert name in missing
    record = read_run(run_dir)
    assert [entry["step"] for entry in record.history if "loss" in entry] == [2, 4, 6]
    assert record.audit is not None


def test_a_report_of_nothing_is_refused(tmp_path, capsys):
    assert run_script("report", tmp_path / "nowhere") == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_history_with_what_is_not_finite(tmp_path):
    history = [{"step": 1, "loss": 5.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": float("inf")}]
    (tmp_path / "report.json").write_text(json.dumps({"history": history}))
    write_report(tmp_path, tmp_path / "out" / "page.html")
    assert (tmp_path / "out" / "page.html").stat().st_size > 10_000
