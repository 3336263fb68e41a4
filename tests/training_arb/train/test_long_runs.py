"""What happens to long runs, through scripts/pretrain.py: kills, signals, full disks, damage, diverging losses.

More kills than the three of the test:
  ARB_KILLS=20 python -m pytest tests/training_arb/train/test_long_runs.py -k killed
"""

import errno
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest

from support.pretraining import STEPS, arguments, final_hash, is_saving, step_pointed_to, write_corpus
from support.scripting import ROOT, run_script
from training_arb.checkpoints.checkpoint_files import check_checkpoint, write_checksums
from training_arb.checkpoints.run_checkpoints import newest_sound_checkpoint, numbered_checkpoints, pointed, step_of
from training_arb.train import saving_trainer
from training_arb.train.interruption import Interruption
from training_arb.train.trainer_arb import ArbTrainer

KILLS = int(os.environ.get("ARB_KILLS", "3"))
LINE = [sys.executable, str(ROOT / "scripts" / "pretrain.py")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """One uninterrupted run, only read."""
    output_dir = tmp_path_factory.mktemp("runs") / "whole"
    assert run_script("pretrain", *arguments(corpus, output_dir)) == 0
    return output_dir


@pytest.fixture
def run_dir(finished, tmp_path):
    """The finished run's first checkpoints in a folder of their own."""
    for step in (2, 4, 6):
        shutil.copytree(finished / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
    return tmp_path / "run"


def steps_in(folder):
    return [step_of(path) for path in numbered_checkpoints(folder)]


def errors_in(text):
    return [line for line in text.splitlines() if line.startswith("error: ")]


def each_step(monkeypatch, act):
    """Call act(trainer, loss) after each training step; what it returns is the loss from then on."""
    training_step = ArbTrainer.training_step
    monkeypatch.setattr(ArbTrainer, "training_step", lambda self, *a, **k: act(self, training_step(self, *a, **k)))


def test_killed_at_any_moment_and_resumed(corpus, tmp_path):
    """kill -9 at moments drawn from fixed seeds, every other one during a save: the same bits in the end, and no
    checkpoint that stood is lost."""
    steps = max(STEPS, 8 * KILLS)
    assert run_script("pretrain", *arguments(corpus, tmp_path / "whole", max_steps=steps)) == 0
    output_dir = tmp_path / "run"
    resumable = arguments(corpus, output_dir, max_steps=steps, resume_from_checkpoint="auto", save_total_limit=3)
    stood = 0
    for seed in range(KILLS):
        draw = random.Random(seed)
        process = subprocess.Popen([*LINE, *map(str, resumable)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wanted = stood + 2 * draw.choice([1, 2])
        wait_for(process, lambda wanted=wanted: step_pointed_to(output_dir) >= wanted)
        if seed % 2:
            wait_for(process, lambda: is_saving(output_dir))
        time.sleep(draw.uniform(0, 0.02 if seed % 2 else 0.3))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        whole, _ = newest_sound_checkpoint(output_dir)
        assert step_of(whole) >= wanted
        stood = step_of(whole)
    assert run_script("pretrain", *resumable) == 0
    assert final_hash(output_dir) == final_hash(tmp_path / "whole")
    assert not list(output_dir.glob(".*"))


def wait_for(process, holds):
    deadline = time.monotonic() + 400
    while not holds():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"the run ended first, with {process.returncode}, or took too long")
        time.sleep(0.001)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(corpus, finished, tmp_path, monkeypatch, capsys, signum, code):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def interrupt(trainer, loss):
        if trainer.state.global_step == 4:
            os.kill(os.getpid(), signum)
        return loss

    with monkeypatch.context() as patch:
        each_step(patch, interrupt)
        assert run_script("pretrain", *arguments(corpus, tmp_path / "run")) == code
    said = f"stopped by {signum.name} after step 5; last checkpoint {tmp_path / 'run' / 'checkpoint-5'}; continue with"
    assert said in capsys.readouterr().out
    assert steps_in(tmp_path / "run") == [2, 4, 5] and not (tmp_path / "run" / "final").exists()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert run_script("pretrain", *arguments(corpus, tmp_path / "run", resume_from_checkpoint="latest")) == 0
    assert final_hash(tmp_path / "run") == final_hash(finished)


def end_of(act):
    """How a forked process that does `act` ends: its wait status."""
    child = os.fork()
    if child == 0:
        act()
        os._exit(0)
    return os.waitpid(child, 0)[1]


def kill_self(*signals):
    for signum in signals:
        os.kill(os.getpid(), signum)


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process(first, second):
    def listen(*signals):
        with Interruption().listening():
            kill_self(*signals)

    assert end_of(lambda: listen(first)) == 0
    status = end_of(lambda: listen(first, second))
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == second


def test_workers_outlive_ctrl_c_and_not_sigterm():
    with Interruption().listening():
        assert end_of(lambda: kill_self(signal.SIGINT, signal.SIGINT)) == 0
        assert os.WTERMSIG(end_of(lambda: kill_self(signal.SIGTERM))) == signal.SIGTERM


def test_a_signal_to_one_rank_stops_all(corpus, tmp_path):
    script = tmp_path / "two_ranks.py"
    script.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(ROOT / 'scripts')!r})\n"
        "import pretrain\n"
        "from training_arb.train.trainer_arb import ArbTrainer\n"
        "step = ArbTrainer.training_step\n"
        "def stepped(self, *a, **k):\n"
        "    if self.state.global_step == 2 and os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return step(self, *a, **k)\n"
        "ArbTrainer.training_step = stepped\n"
        "print(f'ENDED WITH {pretrain.main()}\\n', end='')\n"
    )
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    line += map(str, arguments(corpus, tmp_path / "run", save_steps=50))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ENDED WITH 143") == 2 and done.stdout.count("stopped by SIGTERM after step 3") == 1
    checkpoint, faults = newest_sound_checkpoint(tmp_path / "run")
    assert checkpoint.name == "checkpoint-3" and not faults
    assert {path.name for path in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}


def fill_disk_at(monkeypatch, *steps):
    """The disk is full once a checkpoint of these steps is nearly written."""
    write_checksums = saving_trainer.write_checksums

    def write(folder):
        if step_of(folder) in steps:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "checksums.json"))
        write_checksums(folder)

    monkeypatch.setattr(saving_trainer, "write_checksums", write)


def test_a_full_disk_costs_one_checkpoint(corpus, finished, tmp_path, monkeypatch, caplog):
    fill_disk_at(monkeypatch, 4, 6)
    assert run_script("pretrain", *arguments(corpus, tmp_path / "run")) == 0
    assert steps_in(tmp_path / "run") == [2, 8]
    assert not list((tmp_path / "run").glob(".*"))
    warnings = [record.getMessage() for record in caplog.records if "not saved" in record.getMessage()]
    assert len(warnings) == 2
    checkpoint = tmp_path / "run" / "checkpoint"
    assert re.match(rf"{checkpoint}-4 is not saved.*No space left.* bytes free; .* {checkpoint}-2$", warnings[0])
    assert final_hash(tmp_path / "run") == final_hash(finished)


def test_a_full_disk_at_the_last_moment_is_an_error(corpus, tmp_path, monkeypatch, capsys):
    fill_disk_at(monkeypatch, 5)
    each_step(monkeypatch, lambda self, loss: (self.state.global_step == 4 and kill_self(signal.SIGTERM), loss)[1])
    assert run_script("pretrain", *arguments(corpus, tmp_path / "run")) == 2
    assert f"step 5 is not saved; the last checkpoint is {tmp_path / 'run' / 'checkpoint-4'}" in capsys.readouterr().err
    assert steps_in(tmp_path / "run") == [2, 4]


def test_files_that_may_not_grow(corpus, tmp_path):
    """The system's own refusal, met by the writers of safetensors and torch: no file above 200 kB."""
    done = subprocess.run(
        [*LINE, *map(str, arguments(corpus, tmp_path / "run", save_steps=4))],
        capture_output=True,
        text=True,
        timeout=180,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("is not saved, no space for it") == 2
    assert steps_in(tmp_path / "run") == [] and not list((tmp_path / "run").glob(".*"))
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


def test_other_write_errors_end_the_run_in_one_line(corpus, tmp_path, monkeypatch, capsys):
    def refuse(folder):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))

    monkeypatch.setattr(saving_trainer, "write_checksums", refuse)
    assert run_script("pretrain", *arguments(corpus, tmp_path / "run")) == 2
    assert len([line for line in capsys.readouterr().err.splitlines() if "Permission denied" in line]) == 1
    assert not list((tmp_path / "run").glob("*"))


@pytest.mark.parametrize("how", ["nan", "exploding"])
def test_a_diverging_run_stops_and_names_the_good_checkpoint(corpus, tmp_path, monkeypatch, capsys, how):
    factor = {"nan": float("nan"), "exploding": 50.0}[how]
    each_step(monkeypatch, lambda trainer, loss: loss * factor if trainer.state.global_step >= 4 else loss)
    lines = arguments(corpus, tmp_path / "run", max_steps=20, save_total_limit=1, eval_strategy="no")
    assert run_script("pretrain", *lines) == 1
    (error,) = errors_in(capsys.readouterr().err)
    assert f"step {6 if how == 'nan' else 10}: the loss is " in error
    assert error.endswith(f"the last good checkpoint is {tmp_path / 'run' / 'checkpoint-4'}")
    assert steps_in(tmp_path / "run") == [4]
    assert not (tmp_path / "run" / "final").exists()


def test_a_gradient_that_is_not_finite_stops_the_run(corpus, tmp_path, monkeypatch, capsys):
    compute_loss = ArbTrainer.compute_loss

    def spoil(self, *args, **kwargs):
        loss = compute_loss(self, *args, **kwargs)
        return loss * float("nan") if self.model.training and self.state.global_step == 5 else loss

    monkeypatch.setattr(ArbTrainer, "compute_loss", spoil)
    assert run_script("pretrain", *arguments(corpus, tmp_path / "run")) == 1
    (error,) = errors_in(capsys.readouterr().err)
    assert "is not finite" in error and error.endswith(f"resume from {tmp_path / 'run' / 'checkpoint-4'}")
    assert steps_in(tmp_path / "run") == [2, 4]


def test_the_best_checkpoint_stays_and_can_be_resumed(corpus, finished, tmp_path, monkeypatch):
    """Held-out losses 3.0 2.0 2.5 2.4 at steps 2 4 6 8; one at step 5, lower still, has no checkpoint to be best."""
    losses = {2: 3.0, 4: 2.0, 5: 1.0, 6: 2.5, 8: 2.4}
    evaluate = ArbTrainer.evaluate

    def graded(self, *args, **kwargs):
        return {**evaluate(self, *args, **kwargs), "eval_loss": losses.get(self.state.global_step, 9.0)}

    monkeypatch.setattr(ArbTrainer, "evaluate", graded)
    lines = arguments(corpus, tmp_path / "run", save_total_limit=1, eval_steps=1)
    assert run_script("pretrain", *lines) == 0
    output_dir = tmp_path / "run"
    assert steps_in(output_dir) == [4, 8]
    assert pointed(output_dir, "best").name == "checkpoint-4" and pointed(output_dir, "latest").name == "checkpoint-8"
    assert run_script("audit_state", output_dir / "best") == 0
    assert run_script("pretrain", *lines, "--resume_from_checkpoint", "best") == 0
    assert final_hash(output_dir) == final_hash(finished)
    assert steps_in(output_dir) == [4, 8]


def spoil(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["flipped bit", "missing file"])
def test_a_damaged_newest_checkpoint_gives_way(corpus, finished, run_dir, capsys, how):
    damaged = run_dir / "checkpoint-6" / "model.safetensors"
    damaged.unlink() if how == "missing file" else spoil(damaged)
    explicit = arguments(corpus, run_dir, resume_from_checkpoint=damaged.parent)
    assert run_script("pretrain", *explicit) == 2
    (error,) = errors_in(capsys.readouterr().err)
    assert damaged.name in error and str(damaged.parent) in error
    lines = arguments(corpus, run_dir, resume_from_checkpoint="latest")
    assert run_script("pretrain", *lines) == 0
    (warning,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: "))
    assert damaged.name in warning and warning.endswith(f"continuing from {run_dir / 'checkpoint-4'} instead")
    assert final_hash(run_dir) == final_hash(finished)


FILES = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json", "run.json"]


@pytest.mark.parametrize("name", [*FILES, "model.safetensors", "checksums.json", "modeling_arb.py"])
def test_a_flipped_bit_is_found_in_every_file(run_dir, name):
    checkpoint = run_dir / "checkpoint-4"
    check_checkpoint(checkpoint)
    spoil(checkpoint / name)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        check_checkpoint(checkpoint)


@pytest.mark.parametrize("name", [*FILES, "model.safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"\x80\x02garbage", b"[1]", b"\xff" * 99], ids=["empty", "text", "list", "ones"]
)
def test_damage_that_checksums_do_not_show_is_one_line_too(run_dir, name, content):
    """Checksums of files that were damaged before: every file is read before anything is trained."""
    checkpoint = run_dir / "checkpoint-4"
    (checkpoint / name).write_bytes(content)
    write_checksums(checkpoint)
    with pytest.raises(ValueError) as caught:
        check_checkpoint(checkpoint)
    assert str(checkpoint / name) in str(caught.value) and "\n" not in str(caught.value)


def test_an_unfinished_checkpoint_is_not_used(corpus, finished, run_dir, capsys):
    """Without checksums.json, which is written last, the run goes on from the one before, and the folder is removed."""
    unfinished = run_dir / "checkpoint-7"
    os.rename(run_dir / "checkpoint-6", unfinished)
    (unfinished / "checksums.json").unlink()
    assert run_script("pretrain", *arguments(corpus, run_dir, resume_from_checkpoint=unfinished)) == 2
    for script in (["generate"], ["evaluate", "--data", corpus], ["audit_state"], ["export_hub", run_dir / "out"]):
        assert run_script(script[0], unfinished, *script[1:]) == 2
    errors = errors_in(capsys.readouterr().err)
    said = f"{unfinished}: unfinished checkpoint, checksums.json is missing"
    assert len(errors) == 5 and all(said in error for error in errors)
    assert run_script("pretrain", *arguments(corpus, run_dir, resume_from_checkpoint="auto")) == 0
    assert final_hash(run_dir) == final_hash(finished)
    assert pointed(run_dir, "latest").name == "checkpoint-8" and steps_in(run_dir) == [2, 4, 6, 8]
    assert not unfinished.exists()


def test_a_run_killed_in_its_first_checkpoint_begins_again(corpus, finished, run_dir, capsys):
    for step in (2, 4):
        shutil.rmtree(run_dir / f"checkpoint-{step}")
    (run_dir / "checkpoint-6" / "checksums.json").unlink()
    for resume, said in ((None, "already holds a run"), ("latest", "no whole checkpoint; checkpoint-6 is unfinished")):
        assert run_script("pretrain", *arguments(corpus, run_dir, resume_from_checkpoint=resume)) == 2
        (error,) = errors_in(capsys.readouterr().err)
        assert said in error
    assert run_script("pretrain", *arguments(corpus, run_dir, resume_from_checkpoint="auto")) == 0
    assert "checkpoint-6: unfinished, checksums.json is missing; the run begins" in capsys.readouterr().err
    assert final_hash(run_dir) == final_hash(finished)


def test_a_checkpoint_of_another_trainer_is_left_alone(corpus, run_dir):
    """It has neither run.json nor checksums.json."""
    other = run_dir / "checkpoint-3"
    shutil.copytree(run_dir / "checkpoint-2", other)
    for name in ("run.json", "checksums.json"):
        (other / name).unlink()
    assert run_script("pretrain", *arguments(corpus, run_dir, resume_from_checkpoint="auto", save_total_limit=1)) == 0
    assert run_script("generate", other, "--prompt", "a", "--max_new_tokens", 1) == 0
    assert steps_in(run_dir) == [8]


def test_no_best_checkpoint_to_resume(corpus, run_dir, capsys):
    assert run_script("pretrain", *arguments(corpus, run_dir, resume_from_checkpoint="best")) == 2
    assert "resume_from_checkpoint='best': no such checkpoint" in capsys.readouterr().err
