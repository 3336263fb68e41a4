"""Builds the native CPU kernels where there is a C++ compiler; without one the install goes on and torch does the work.

Everything else about the package is in setup.cfg.
"""

from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("kernels/native")
# No contraction: every float operation rounds as the torch reference does. OpenMP is compiled in and not linked: its
# symbols come from the runtime that torch has loaded, and so do the threads.
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]

setup(
    ext_modules=[
        Extension(
            "arb_kernels.arb_native",
            sources=sorted(map(str, NATIVE.glob("*.cpp"))),
            depends=sorted(map(str, NATIVE.glob("*.h"))),
            language="c++",
            extra_compile_args=[*FLAGS, "-fvisibility=hidden"],
            optional=True,
        )
    ]
)
