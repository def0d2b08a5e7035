"""What a process of a gate does: measure the cases of a job with the `vqkernels` that it finds.

`python -m bench.gate.measure JOB OUT ASK ANSWER`: a line of JSON for each case in OUT, written as
the case ends, so that a crash costs its own case only; the first line says what measured. Before
each case, and before each turn of taking samples, a byte on the descriptor ASK says what is wanted,
and one on ANSWER that it may be (`process`).

This module and all it imports but `vqkernels` are the same on both sides, so that a difference is
the kernels' and not the clock's.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import vqkernels
from autotune.evaluate import evaluate
from autotune.measurement import Measurement
from autotune.timers import taking_turns
from bench.environment import device_state
from bench.gate.identity import code_hash
from bench.gate.inputs import load_subject, place
from bench.gate.job import ABSENT, BEGIN, DONE, TURN, Job, Target
from bench.gate.slowed import slowed
from bench.peers import peers
from vqkernels.device import Device
from vqkernels.errors import VqError
from vqkernels.kernel import Kernel, library_versions, registry
from vqkernels.problem import Problem
from vqkernels.space import Config

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class _Asking:
    """The gate's word, over a pair of pipes."""

    def __init__(self, ask: int, answer: int) -> None:
        self._ask, self._answer = ask, answer

    def begin(self) -> None:
        """Until the next case may begin."""
        self._say(BEGIN)

    def wait(self) -> None:
        """Until it is this process's turn to take samples."""
        self._say(TURN)

    def done(self) -> None:
        """Until the other side has taken all of its samples."""
        self._say(DONE)

    def _say(self, word: bytes) -> None:
        os.write(self._ask, word)
        os.read(self._answer, 1)


def main(job_file: str, out_file: str, ask: str, answer: str) -> None:
    """Measure each case of the job."""
    _end_with_parent()
    asking = _Asking(int(ask), int(answer))
    job = Job.from_json(Path(job_file).read_text(encoding="utf-8"))
    device = place(job.device, job.threads)
    with Path(out_file).open("x", encoding="utf-8") as out:

        def tell(fields: Mapping[str, Any]) -> None:
            out.write(json.dumps(fields, default=dict) + "\n")
            out.flush()

        tell(
            {
                "vqkernels": str(Path(vqkernels.__file__).parent),
                "device": device.to_dict(),
                "versions": library_versions(),
            }
        )
        for case in job.targets:
            asking.begin()
            tell({"begin": case.name})
            before = device_state(device)
            with taking_turns(asking):
                measured, facts = _measure(job, case, device)
            state = {"before": before, "after": device_state(device)}
            tell({"case": case.name, "state": state, "measurement": measured.to_dict(), **facts})


def _end_with_parent() -> None:
    """A gate that is killed leaves no process that would measure on, beside the next gate's."""
    with contextlib.suppress(OSError, AttributeError):  # another system than Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _measure(job: Job, case: Target, device: Device) -> tuple[Measurement, dict[str, Any]]:
    """The measurement, and what code and config it is of."""
    kernel = {**registry().kernels, **peers()}.get(case.kernel)
    if kernel is None:
        return Measurement(status="constraint", reason=ABSENT), {}
    try:
        subject = load_subject(Path(job.folder), case, device, job.seed)
        config = _config(kernel, subject.problem, device, job.configs.get(case.kernel, {}))
    except VqError as error:
        return Measurement(status="constraint", reason=str(error)), {}
    except Exception as error:  # supports and default may fail in any way: a status, as elsewhere
        return Measurement(status="runtime", reason=f"{type(error).__name__}: {error}"), {}
    facts = {
        "code": _code(kernel),
        "source": kernel.source_hash,
        "config": dict(config or {}),
        "spec": subject.problem.spec.to_dict(),
    }
    measured = evaluate(
        slowed(kernel, job.slow) if job.slow else kernel,
        subject,
        config=config,
        budget=job.budget,
        bandwidth=job.bandwidth,
        cold=job.cold,
    )
    return measured, facts


def _config(
    kernel: Kernel, problem: Problem, device: Device, values: Mapping[str, Any]
) -> Config | None:
    """The kernel's default with some values exchanged; None where it refuses the problem."""
    if kernel.supports(problem, device) is not None:
        return None
    config = kernel.default(problem, device).replace(**values)
    kernel.space.check(config)
    return config


@functools.cache
def _code(kernel: Kernel) -> str:
    return code_hash(kernel)


if __name__ == "__main__":
    main(*sys.argv[1:])
