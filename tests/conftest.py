"""Settings that every test shares."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# No deadline: a slow machine is no bug. The same examples on every run: a red test is a change.
# No database: runs leave nothing behind in the tree.
settings.register_profile(
    "vqbench",
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("vqbench")

# Before anything imports Triton: see tests/interpreter.py.
os.environ["TRITON_INTERPRET"] = "1"

# Kernels are what the code chooses, not what a developer's own tuned tables do.
os.environ["VQBENCH_TUNED"] = "off"
