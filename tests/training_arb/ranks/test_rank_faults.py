"""Ranks that are killed, hang or never come: the others end in one line, and the run goes on to the same bits.

More kills than the three of the test:
  ARB_KILLS=20 python -m pytest tests/training_arb/ranks/test_rank_faults.py -k killed
"""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from support.pretraining import arguments, final_hash, is_saving, step_pointed_to, write_corpus
from support.scripting import ROOT, run_script
from training_arb.checkpoints.checkpoint_files import check_checkpoint
from training_arb.checkpoints.run_checkpoints import newest_sound_checkpoint, numbered_checkpoints, step_of

KILLS = int(os.environ.get("ARB_KILLS", "3"))
STEPS = max(8, 6 * KILLS)
LOST = re.compile(r"error: rank (\d): another rank was lost or hangs \((.+)\) after step (\d+); (.+)")
# forked from a process that has imported this already, ranks are there at once
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["training_arb.train.trainer_arb", "training_arb.report.run_report", "matplotlib.pyplot", __name__]
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """One run of two ranks that nothing happened to, only read."""
    output_dir = tmp_path_factory.mktemp("runs") / "whole"
    with Ranks(output_dir, settings(corpus, output_dir)) as ranks:
        assert ranks.codes() == [0, 0], ranks.said(0)
    return output_dir


def settings(corpus, output_dir, **changes):
    changes = {"max_steps": STEPS, "save_total_limit": 3, "disable_tqdm": "true", **changes}
    return [str(part) for part in arguments(corpus, output_dir, resume_from_checkpoint="auto", **changes)]


class Ranks:
    """scripts/pretrain.py as rank 0, 1, ... of `size`, as a launcher that only sets the environment starts them."""

    def __init__(self, output_dir, lines, started=2, size=2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        logs = output_dir.parent / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"{port}-{rank}" for rank in range(started)]
        self.processes = [
            SERVER.Process(target=be_rank, args=(rank, size, port, log, lines)) for rank, log in enumerate(self.logs)
        ]

    def __enter__(self):
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.join()

    def codes(self):
        """Exit codes, once all have ended by themselves."""
        for process in self.processes:
            process.join(120)
        return [process.exitcode for process in self.processes]

    def signal(self, rank, signum):
        os.kill(self.processes[rank].pid, signum)

    def wait_for(self, holds):
        deadline = time.monotonic() + 120
        while not holds():
            assert all(process.is_alive() for process in self.processes) and time.monotonic() < deadline, self.said(0)
            time.sleep(0.001)

    def said(self, rank):
        return self.logs[rank].read_text()


def be_rank(rank, size, port, log, lines):
    """In a process of its own: from here on a rank of a run."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    sys.exit(run_script("pretrain", *lines))


def the_line(ranks, rank):
    """What a survivor says, in its parts: (reason, step, how to go on). It is all it says of the loss."""
    said = ranks.said(rank)
    (line,) = (line for line in said.splitlines() if "error" in line.lower())
    own, reason, step, resume = LOST.fullmatch(line).groups()
    assert int(own) == rank and "Traceback" not in said
    return reason, int(step), resume


def newest_step(output_dir):
    checkpoint, faults = newest_sound_checkpoint(output_dir)
    assert not faults
    return step_of(checkpoint) if checkpoint else 0


VICTIMS = [(1,), (0,), (0, 1)]


def test_killed_ranks_and_resumed(corpus, finished, tmp_path):
    """kill -9 of either rank or of both, at moments drawn from fixed seeds, every other one during a save: who is left
    ends by itself, no checkpoint that stood is lost or damaged, and the end has the same bits."""
    output_dir = tmp_path / "run"
    lines = settings(corpus, output_dir)
    stood = 0
    for seed in range(KILLS):
        draw = random.Random(seed)
        victims, saving = VICTIMS[seed % 3], seed % 2
        with Ranks(output_dir, lines) as ranks:
            wanted = stood + 2 * draw.choice([1, 2])
            ranks.wait_for(lambda wanted=wanted: step_pointed_to(output_dir) >= wanted)
            if saving:
                ranks.wait_for(lambda: is_saving(output_dir))
            time.sleep(draw.uniform(0, 0.02 if saving else 0.3))
            for rank in victims:
                ranks.signal(rank, signal.SIGKILL)
            codes = ranks.codes()
            assert codes == [-signal.SIGKILL if rank in victims else 75 for rank in (0, 1)], ranks.said(0)
            for rank in {0, 1} - {*victims}:
                _, step, resume = the_line(ranks, rank)
                assert step >= wanted
                how = re.fullmatch(r"go on from (.+) by --resume_from_checkpoint auto", resume)
                check_checkpoint(how[1])
        for checkpoint in numbered_checkpoints(output_dir):
            check_checkpoint(checkpoint)
        assert newest_step(output_dir) >= wanted
        stood = newest_step(output_dir)
    with Ranks(output_dir, lines) as ranks:
        assert ranks.codes() == [0, 0], ranks.said(0)
    assert final_hash(output_dir) == final_hash(finished)
    assert not list(output_dir.glob(".*"))


def test_one_process_goes_on_where_two_were(corpus, finished, tmp_path):
    shutil.copytree(finished / f"checkpoint-{STEPS - 2}", tmp_path / "run" / f"checkpoint-{STEPS - 2}")
    assert run_script("pretrain", *settings(corpus, tmp_path / "run")) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["steps"] == STEPS and report["state_sha256"] != final_hash(finished)


def test_a_rank_that_hangs_is_waited_for_as_long_as_asked(corpus, tmp_path):
    with Ranks(tmp_path / "run", settings(corpus, tmp_path / "run", max_steps=10**6, ddp_timeout=3)) as ranks:
        ranks.wait_for(lambda: step_pointed_to(tmp_path / "run") >= 2)
        ranks.signal(1, signal.SIGSTOP)
        ranks.processes[0].join(60)
        assert ranks.processes[0].exitcode == 75
        reason, _, resume = the_line(ranks, 0)
    assert re.fullmatch("Timed out waiting 3000ms for (recv|send) operation to complete", reason)
    assert resume.startswith(f"go on from {tmp_path / 'run' / 'checkpoint-'}")


def test_a_rank_that_never_comes(corpus, tmp_path):
    with Ranks(tmp_path / "run", settings(corpus, tmp_path / "run", ddp_timeout=1), started=1) as ranks:
        assert ranks.codes() == [75]
        (line,) = ranks.said(0).splitlines()
    assert line.startswith("error: rank 0: the ranks could not connect: ") and "1/2 clients joined" in line


def test_no_time_to_wait(corpus, tmp_path, capsys):
    assert run_script("pretrain", *settings(corpus, tmp_path / "run", ddp_timeout=0)) == 2
    assert "error: ddp_timeout=0 must be positive" in capsys.readouterr().err


DYING = """
import os, signal, sys
sys.path.insert(0, {scripts!r})
import pretrain
from training_arb.cli.command_line import run
from training_arb.train.trainer_arb import ArbTrainer
step = ArbTrainer.training_step
def stepped(self, *a, **k):
    if self.state.global_step == 5 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *a, **k)
ArbTrainer.training_step = stepped
run(pretrain.main)
"""


def test_torchrun_restarts_what_a_lost_rank_ended(corpus, finished, tmp_path):
    (tmp_path / "dying.py").write_text(DYING.format(scripts=str(ROOT / "scripts")))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max_restarts", "1"]
    line = [sys.executable, *launch, str(tmp_path / "dying.py"), *settings(corpus, tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr
    (said,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    _, _, step, resume = LOST.fullmatch(said).groups()
    assert step == "5" and resume == f"go on from {tmp_path / 'run' / 'checkpoint-4'} by --resume_from_checkpoint auto"
    assert final_hash(tmp_path / "run") == final_hash(finished)
