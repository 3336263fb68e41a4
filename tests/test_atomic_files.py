"""Files and folders appear whole or not at all."""

import json

import pytest

from training_arb.atomic_files import move_into_place, new_folder, write_json


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
