"""Numbered checkpoints, pointers, checksums: what is kept, what is found again, what is called damaged."""

import os

import pytest

from training_arb.checkpoints.checkpoint_files import verify_checksums, write_checksums
from training_arb.checkpoints.run_checkpoints import (
    newest_sound_checkpoint,
    numbered_checkpoints,
    point,
    pointed,
    remove_old,
    unfinished_checkpoints,
)


@pytest.fixture
def run_dir(tmp_path):
    for step in (2, 4, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        write_checksums(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "run.json").write_text("{}")
    (tmp_path / "checkpoint-8").mkdir()
    (tmp_path / "checkpoint-8" / "config.json").write_text("another trainer's")
    (tmp_path / "checkpoint-6").write_text("a file")
    (tmp_path / "checkpoint-x").mkdir()
    return tmp_path


def sound(folder):
    """Raises ValueError on folders with a file `bad` in them."""
    if (folder / "bad").exists():
        raise ValueError(f"{folder / 'bad'}: damaged")


def names(paths):
    return [path.name for path in paths]


def test_numbered_checkpoints_are_in_order(run_dir):
    assert names(numbered_checkpoints(run_dir)) == ["checkpoint-2", "checkpoint-4", "checkpoint-10"]
    assert names(unfinished_checkpoints(run_dir)) == ["checkpoint-7"]
    assert numbered_checkpoints(run_dir / "nowhere") == unfinished_checkpoints(run_dir / "nowhere") == []


@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_a_pointer_is_moved_and_read(run_dir, monkeypatch, links):
    if not links:
        monkeypatch.setattr("pathlib.Path.symlink_to", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    assert pointed(run_dir, "latest") is None
    for name in ("checkpoint-2", "checkpoint-10"):
        point(run_dir, "latest", name)
        assert pointed(run_dir, "latest") == run_dir / name
    assert (run_dir / "latest").is_symlink() == links
    assert not list(run_dir.glob(".*"))


def test_a_pointer_to_nothing_points_nowhere(run_dir):
    (run_dir / "loop").symlink_to("loop")
    (run_dir / "out").symlink_to("/etc")
    (run_dir / "gone").symlink_to("checkpoint-3")
    (run_dir / "garbage").write_bytes(b"\xff\xfe")
    (run_dir / "up").write_text("../checkpoint-2")
    (run_dir / "early").symlink_to("checkpoint-7")
    for name in ("loop", "out", "gone", "garbage", "up", "early", "checkpoint-x"):
        assert pointed(run_dir, name) is None


@pytest.mark.parametrize(
    ("limit", "best", "written", "left"),
    [
        (None, 2, 10, [2, 4, 10]),
        (0, 2, 10, [2, 4, 10]),
        (3, 2, 10, [2, 4, 10]),
        (2, None, 10, [4, 10]),
        (2, 2, 10, [2, 10]),
        (1, 2, 10, [2, 10]),
        (1, None, 10, [10]),
        (2, None, 4, [2, 4]),  # taken up again further back: 10 belongs to another course
        (1, 4, 4, [4]),
    ],
)
def test_remove_old(run_dir, limit, best, written, left):
    kept = [run_dir / f"checkpoint-{step}" for step in (best, written) if step]
    remove_old(run_dir, limit, kept)
    assert names(numbered_checkpoints(run_dir)) == [f"checkpoint-{step}" for step in left]


def test_where_a_run_stands(run_dir):
    newest = run_dir / "checkpoint-10"
    assert newest_sound_checkpoint(run_dir, sound) == (newest, [])
    (newest / "bad").touch()
    assert newest_sound_checkpoint(run_dir, sound) == (run_dir / "checkpoint-4", [f"{newest / 'bad'}: damaged"])
    point(run_dir, "latest", "checkpoint-2")
    assert newest_sound_checkpoint(run_dir, sound) == (run_dir / "checkpoint-2", [])
    (run_dir / "checkpoint-2" / "bad").touch()
    with pytest.raises(ValueError, match=r"checkpoint-2/bad: damaged$"):
        newest_sound_checkpoint(run_dir, sound)
    os.remove(run_dir / "latest")
    (run_dir / "checkpoint-4" / "bad").touch()
    with pytest.raises(ValueError, match="checkpoint-10/bad: damaged; all other checkpoints are damaged"):
        newest_sound_checkpoint(run_dir, sound)
    assert newest_sound_checkpoint(run_dir / "nowhere", sound) == (None, [])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.bin").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "deep" / "b.txt").write_text("text")
    (tmp_path / "empty").touch()
    write_checksums(tmp_path)
    return tmp_path


def test_checksums_hold(folder):
    verify_checksums(folder)
    (folder / "added later.txt").write_text("a note")
    verify_checksums(folder)
    write_checksums(folder)
    verify_checksums(folder)


def test_without_checksums_a_model_is_not_checked_and_a_checkpoint_is_refused(folder):
    (folder / "checksums.json").unlink()
    (folder / "a.bin").write_bytes(b"")
    verify_checksums(folder)
    (folder / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^[^\n]*: unfinished checkpoint, checksums\.json is missing[^\n]*$"):
        verify_checksums(folder)


@pytest.mark.parametrize("bit", [0, 7, 8 * 1000 + 3, 8 * 256 * 9 - 1])
def test_every_flipped_bit_is_found(folder, bit):
    data = bytearray((folder / "a.bin").read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    (folder / "a.bin").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.bin: damaged, its sha256"):
        verify_checksums(folder)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.bin", None, "a.bin is missing"),
        ("deep/b.txt", b"text ", "b.txt: damaged"),
        ("empty", b"x", "empty: damaged"),
        ("checksums.json", b"{", "checksums.json: not JSON"),
        ("checksums.json", b"[]", "checksums.json: must hold a JSON object"),
        ("checksums.json", b'{"/dev/zero": "0"}', "/dev/zero is missing"),
        ("checksums.json", b"[" * 100_000, "checksums.json: not JSON"),
    ],
)
def test_a_file_lost_or_changed_is_named(folder, name, content, said):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        verify_checksums(folder)
    assert said in str(caught.value) and "\n" not in str(caught.value)
