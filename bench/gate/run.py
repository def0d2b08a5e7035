"""A gate from its options to its report: inputs, sides, the session, the conclusion."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from autotune.bandwidth import Bandwidth
from autotune.timers import Budget
from autotune.workers import Pool, Task
from bench.environment import describe_host
from bench.gate.decide import Conclusion, Rules
from bench.gate.inputs import Facts, bandwidth, prepare
from bench.gate.job import Job, Target, inputs_hash, targets
from bench.gate.journal import Journal
from bench.gate.outcome import Outcome, Report
from bench.gate.process import SideError
from bench.gate.session import Progress, Session
from bench.gate.sides import Side, Who, opposite, parse_configs, resolve, running, write_harness
from bench.gate.stored import conclude_stored, read_stored
from bench.records import RecordFile
from bench.selection import Selection, matching_kernels
from vqkernels.device import Device, detect, detect_cpu
from vqkernels.errors import BackendError, SpecError

__all__ = ["Inputs", "Options", "open_session", "run_gate"]

# The oracle takes a minute for the largest layers of a 70B model.
_PREPARE_S = 1800.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What a gate is asked for, as plain values: its records carry them, to go on with.

    baseline, candidate: see `sides.resolve`; None: what runs, or `sides.opposite`. configs: see
    `sides.parse_configs`. slow: the candidate's calls are delayed by this share. seconds, samples:
    of a case in a process.
    """

    workloads: tuple[str, ...] = ("llama2-7b",)
    layers: tuple[str, ...] = ("*",)
    formats: tuple[str, ...] = ("rq-2x256x8",)
    kernels: tuple[str, ...] = ()
    ms: tuple[int, ...] = (1,)
    fuse: bool = False
    device: str = "cpu"
    threads: int = 1
    dtype: str = "float32"
    seed: int = 0
    seconds: float = 0.3
    samples: int = 300
    cold: bool = True
    baseline: str | None = None
    candidate: str | None = None
    baseline_configs: tuple[str, ...] = ()
    configs: tuple[str, ...] = ()
    slow: float = 0.0
    pairs: int = 7

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Options:
        """From a record's JSON."""
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := set(fields) - names:
            raise SpecError(f"gate's option {min(unknown)!r} is another version's; start it anew")
        lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        return cls(**{**fields, **lists})

    @property
    def stored(self) -> bool:
        """Whether the baseline is a file of results."""
        return self.baseline is not None and self.baseline.endswith(".jsonl")

    @property
    def where(self) -> Device:
        """The device, as this process sees it."""
        return detect_cpu(self.threads) if self.device == "cpu" else detect(self.device)

    def cases(self) -> tuple[Target, ...]:
        """What is measured. Raises SpecError where nothing is."""
        device = self.where
        found = [
            kernel
            for kernel in matching_kernels(self.kernels, device)
            # unasked: kernels of this project that read codes
            if self.kernels or (kernel.reads == "codes" and kernel.backend != "torch")
        ]
        selections = [
            Selection(
                workload=name,
                layers=self.layers,
                formats=self.formats,
                ms=self.ms,
                fuse=self.fuse,
            )
            for name in self.workloads
        ]
        cases = targets(selections, found, self.dtype)
        if not cases:
            raise SpecError("the selection holds no case; see vqbench list")
        return cases


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What is prepared once. hashes: by case. refused: the cases without inputs, and why."""

    facts: dict[str, Facts]
    hashes: dict[str, str]
    bandwidth: Bandwidth
    refused: dict[str, str]


def make_inputs(
    options: Options, cases: Sequence[Target], folder: Path, progress: Progress
) -> Inputs:
    """Write weights and answers into `folder`, in a process that ends before anything is timed."""
    weights: dict[str, list[Target]] = {}
    for one in cases:
        weights.setdefault(one.weight, []).append(one)
    where = (options.device, options.threads)
    with Pool(1, _PREPARE_S) as pool:
        tasks = [Task(prepare, (folder, group, *where, options.seed)) for group in weights.values()]
        facts, refused = dict[str, Facts](), dict[str, str]()
        for number, (outcome, group) in enumerate(
            zip(pool.run(tasks), weights.values(), strict=True)
        ):
            progress(f"inputs: {group[0].layer} {group[0].format}", number, len(weights))
            if outcome.status == "done":
                facts[group[0].weight] = outcome.value
            else:
                refused |= {one.name: outcome.reason for one in group}
        (rate,) = pool.run([Task(bandwidth, where)])
    if rate.status != "done":
        raise BackendError(f"memory's rate can't be measured: {rate.reason}")
    made = [one for one in cases if one.name not in refused]
    hashes = {one.name: inputs_hash(folder, one, options.seed) for one in made}
    return Inputs(facts, hashes, rate.value, refused)


@contextlib.contextmanager
def open_session(
    options: Options,
    results: Path,
    *,
    kind: str = "gate",
    resume: Path | None = None,
    progress: Progress = lambda *_: None,
) -> Iterator[tuple[Session, Inputs]]:
    """A session for `options`, ready to measure; its temporary files go when it ends.

    results: the folder of records. resume: the file of an earlier session, which is gone on with.
    """
    cases = options.cases()
    with tempfile.TemporaryDirectory(prefix="vqbench-gate-") as name:
        folder = Path(name)
        sides = make_sides(options, folder)
        inputs = make_inputs(options, cases, folder, progress)
        job = Job(
            targets=tuple(one for one in cases if one.name not in inputs.refused),
            folder=name,
            device=options.device,
            threads=options.threads,
            seed=options.seed,
            budget=Budget(seconds=options.seconds, max_samples=options.samples),
            cold=options.cold,
            bandwidth=inputs.bandwidth,
            configs={},
        )
        head = _header(options, inputs.bandwidth, job.budget)
        harness = write_harness(folder / "harness")
        opened = RecordFile.reopen(resume, head) if resume else RecordFile(results, head, kind)
        with opened as file:
            journal = Journal(file, inputs.facts, options.seed, len(sides))
            yield (
                Session(
                    job=job,
                    sides=sides,
                    journal=journal,
                    harness=harness,
                    inputs=inputs.hashes,
                    pairs=options.pairs,
                    progress=progress,
                ),
                inputs,
            )


def make_sides(options: Options, folder: Path) -> dict[Who, Side]:
    """Both sides, or the candidate alone where the baseline is stored."""
    found: dict[Who, Side] = {}
    if not options.stored:
        name = options.baseline
        side = running() if name is None else resolve(name, folder / "baseline")
        found["baseline"] = _configured(side, options.baseline_configs)
    name = options.candidate
    side = resolve(name, folder / "candidate") if name else opposite(found.get("baseline"))
    found["candidate"] = _configured(side, options.configs, options.slow)
    return found


def _configured(side: Side, texts: Sequence[str], slow: float = 0.0) -> Side:
    """A side with its configs and delay, and both in its name."""
    words = [side.what, *texts, *([f"slowed by {slow:.0%}"] if slow else [])]
    configs = parse_configs(texts)
    return dataclasses.replace(side, what=", ".join(words), configs=configs, slow=slow)


def _header(options: Options, rate: Bandwidth, budget: Budget) -> dict[str, Any]:
    return {
        **describe_host(options.where),
        "bandwidth": dataclasses.asdict(rate),
        "budget": dataclasses.asdict(budget),
        "options": dataclasses.asdict(options),
    }


def run_gate(
    options: Options,
    rules: Rules,
    results: Path,
    *,
    strict: bool = False,
    resume: Path | None = None,
    progress: Progress = lambda *_: None,
) -> Report:
    """Measure both sides, or the candidate against what is stored, and conclude.

    Raises VqError where nothing can be measured, or compared.
    """
    begun, started = time.monotonic(), datetime.datetime.now(datetime.UTC)
    stored = read_stored(Path(str(options.baseline))) if options.stored else None
    with open_session(options, results, resume=resume, progress=progress) as (session, inputs):
        try:
            conclusion = conclude_stored(session, stored, rules) if stored else session.run(rules)
        except SideError as error:
            conclusion = _hopeless(session, error)
        baseline = f"{options.baseline} (stored)" if stored else session.sides["baseline"].what
        return Report(
            baseline=baseline,
            candidate=session.sides["candidate"].what,
            device=options.where.name,
            outcomes=conclusion.outcomes,
            skipped={**inputs.refused, **conclusion.skipped},
            notes=(*conclusion.notes, *_unknown(rules, conclusion)),
            records=str(session.journal.path),
            seconds=time.monotonic() - begun,
            advisory=options.stored,
            strict=strict,
            host=platform.node(),
            started=started.isoformat(timespec="seconds"),
        )


def _unknown(rules: Rules, conclusion: Conclusion) -> tuple[str, ...]:
    """What a reader of the verdicts should know of their noise floors."""
    cases = [one.name for one in conclusion.outcomes]
    known = sum(rules.noise is not None and rules.noise.spread(name) is not None for name in cases)
    if known == len(cases):
        return ()
    return (
        f"{len(cases) - known} of {len(cases)} cases have no noise floor on this machine: "
        "`vqbench selfcheck` with the same options measures it",
    )


def _hopeless(session: Session, error: SideError) -> Conclusion:
    """No case can be judged: one side doesn't run."""
    names = ("workload", "layer", "format", "n", "k", "m", "dtype", "kernel")
    outcomes = (
        Outcome(
            **{name: getattr(one, name) for name in names},
            verdict="INVALID",
            reason=f"{error.who}: {error}",
            wrong=error.who == "candidate",
        )
        for one in session.job.targets
    )
    return Conclusion(outcomes=tuple(outcomes), skipped={}, notes=(str(error),))
