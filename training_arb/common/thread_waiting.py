"""Sets how the threads of a matmul wait for the next one. Import it before torch, whose OpenMP runtime reads it once.

By default libgomp's threads spin without end between two parallel regions. That is fast alone. Where more threads than
cores want to run, as with two trainings on one machine, each spins through the time that the other needs, and a step
takes fifty times as long (benchmarks/README.md). A thousand rounds of spinning bridge the gap between two
regions of a step, then the thread sleeps.
"""

from __future__ import annotations

import os

ROUNDS = "1000"
ASKED_FOR = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")

if not any(name in os.environ for name in ASKED_FOR):
    os.environ["GOMP_SPINCOUNT"] = ROUNDS
