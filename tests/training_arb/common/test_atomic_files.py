"""Files and folders appear whole or not at all."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from configuration_arb import preset_config
from modeling_arb import ArbForCausalLM
from training_arb.common.atomic_files import move_into_place, new_folder, write_bytes, write_json


def tree(folder):
    """Relative path -> content of everything below, hidden names included."""
    return {str(path.relative_to(folder)): path.read_text() if path.is_file() else None for path in folder.rglob("*")}


def fill(folder, text):
    (folder / "deep").mkdir()
    (folder / "deep" / "a.txt").write_text(text)


def test_new_folder(tmp_path):
    """Invisible under its name until the block ends; parents are made."""
    target = tmp_path / "runs" / "first"
    with new_folder(target) as staging:
        assert staging != target and staging.parent == target.parent
        fill(staging, "new")
        assert not target.exists()
    assert tree(tmp_path) == {"runs": None, "runs/first": None, "runs/first/deep": None, "runs/first/deep/a.txt": "new"}


def test_new_folder_replaces_the_old_one(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "stale.txt").write_text("old")
    with new_folder(str(target)) as staging:
        fill(staging, "new")
        assert (target / "stale.txt").read_text() == "old"
    assert tree(tmp_path) == {"model": None, "model/deep": None, "model/deep/a.txt": "new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_raising_block_leaves_the_old_folder(tmp_path, error):
    target = tmp_path / "model"
    target.mkdir()
    (target / "kept.txt").write_text("old")
    with pytest.raises(error), new_folder(target) as staging:
        fill(staging, "half")
        raise error()
    assert tree(tmp_path) == {"model": None, "model/kept.txt": "old"}


def test_a_raising_block_leaves_nothing_new(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "model") as staging:
        fill(staging, "half")
        raise RuntimeError
    assert tree(tmp_path) == {}


def test_new_folder_starts_empty_after_a_killed_run(tmp_path):
    """What a killed process left under the temporary name is not part of the next folder."""
    with new_folder(tmp_path / "model") as staging:
        temporary = staging
    temporary.mkdir()
    fill(temporary, "left behind")
    with new_folder(tmp_path / "model") as staging:
        assert tree(staging) == {}
        (staging / "b.txt").write_text("new")
    assert tree(tmp_path) == {"model": None, "model/b.txt": "new"}


def test_new_folder_does_not_replace_a_file(tmp_path):
    (tmp_path / "model").write_text("a file")
    with pytest.raises(OSError), new_folder(tmp_path / "model") as staging:
        fill(staging, "new")
    assert tree(tmp_path) == {"model": "a file"}


def test_move_into_place(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        fill(tmp_path / name, name)
    move_into_place(tmp_path / "new", tmp_path / "old")
    assert tree(tmp_path) == {"old": None, "old/deep": None, "old/deep/a.txt": "new"}


def test_write_json(tmp_path):
    path = tmp_path / "deep" / "report.json"
    for value in ({"a": [1, 2.5, None], "\u00e9": "x"}, [3]):
        write_json(path, value)
        assert json.loads(path.read_text()) == value
        assert path.read_text().endswith("\n")
        assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_write_json_of_no_json_keeps_the_old_file(tmp_path):
    path = tmp_path / "report.json"
    write_json(path, {"kept": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": 1, "b": object()})
    assert tree(tmp_path) == {"report.json": '{\n  "kept": 1\n}\n'}


@pytest.fixture(params=[(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)], ids=lambda pair: f"{pair[0]:03o}")
def mode(request):
    """What files are to have, under a umask that is set while the test runs."""
    umask, mode = request.param
    before = os.umask(umask)
    yield mode
    os.umask(before)


def modes(folder):
    return {path.name: path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}


def test_files_follow_the_umask(tmp_path, mode):
    """Also those that safetensors writes, which makes its own 0600."""
    with new_folder(tmp_path / "run") as staging:
        (staging / "adapter").mkdir()
        save_file({"a": torch.zeros(2)}, staging / "adapter" / "adapter_model.safetensors")
        (staging / "config.json").write_text("{}")
    write_json(tmp_path / "run" / "report.json", {})
    write_bytes(tmp_path / "run" / "loss.png", b"")
    assert modes(tmp_path) == dict.fromkeys(
        ["adapter_model.safetensors", "config.json", "report.json", "loss.png"], mode
    )


@pytest.mark.parametrize("size", ["50KB", "5GB"])
def test_a_model_saved_from_python_follows_the_umask(tmp_path, mode, size):
    """Shards too, and what stood there before; another's file in the same folder keeps its mode."""
    (tmp_path / "other.safetensors").write_bytes(b"")
    (tmp_path / "other.safetensors").chmod(0o600)
    model = ArbForCausalLM(preset_config("arb-tiny"))
    for _ in range(2):
        model.save_pretrained(tmp_path, max_shard_size=size)
    found = modes(tmp_path)
    assert found.pop("other.safetensors") == 0o600
    assert {*found.values()} == {mode} and any(name.endswith(".safetensors") for name in found)
