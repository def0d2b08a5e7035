"""Each kind of bug, planted in a kernel that is right without it, is found where it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import pytest
import torch

from tests.cuda.harness import ORDERS, Kind
from tests.cuda.samples import Sample, Samples, build_samples, numbers

BLOCK = MappingProxyType({"threads": 64, "shared_bytes": 1024})
CLUSTER = MappingProxyType({"threads": 32, "shared_bytes": 1024, "grid": (2, 1, 1), "cluster": 2})


@dataclasses.dataclass(frozen=True)
class Bug:
    """A kernel, what is wrong in it, and the thread that runs into it when all run forward.

    The fault is on the line marked `here`; the access that it is with on the one marked `other`.
    right: what is wrong and what makes it right, or None. also: kinds that it is in other orders.
    """

    kind: Kind
    body: str
    thread: int
    block: int = 0
    right: tuple[str, str] | None = None
    also: tuple[Kind, ...] = ()
    options: Mapping[str, object] = dataclasses.field(default_factory=lambda: BLOCK)

    def fixed(self) -> str:
        assert self.right is not None
        wrong, right = self.right
        assert wrong in self.body
        return self.body.replace(wrong, right)


STAGED = """
const auto s = shared_memory().as<float>();
s.store(t, in.load(t)); // other
/*barrier*/
out.store(t, s.load(t ^ 32)); // here
"""
WARP_STAGED = """
const auto s = shared_memory().as<float>();
for (int step = 0; step < 4; step++) {
    s.store(t, in.load(t) + step); // other
    sync_warp();
    const float value = s.load(t ^ 1); // here
    if (step == 3) out.store(t, value);
    /* */
}
"""
COPIED = """
const auto s = shared_memory().as<float>();
copy_async<4>(s, t, in, t); // other
copy_commit();
/*wait*/
/*barrier*/
out.store(t, s.load(t ^ 32)); // here
if (false) copy_wait<0>();
"""
BULK = """
const auto s = shared_memory().as<float>();
const auto barrier = (shared_memory() + 512).as<u64>();
if (t == 0) {
    barrier_init(barrier, 1);
    barrier_publish();
}
sync_block();
if (t == 0) {
    barrier_expect(barrier, 256); // expect
    copy_bulk(s, 0, in, 0, 256, barrier); // copy
}
barrier_wait(barrier, 0); // wait
out.store(t, s.load(t)); // load
"""


def marked(body: str, line: str, mark: str) -> str:
    """The line that ends in `// line` is the one to mark."""
    assert f"// {line}\n" in body
    return body.replace(f"// {line}\n", f"// {mark}\n")


BUGS = {
    "missing_barrier": Bug(Kind.RACE, STAGED, 32, right=("/*barrier*/", "sync_block();")),
    "barrier_of_the_warp_only": Bug(
        Kind.RACE,
        STAGED.replace("/*barrier*/", "sync_warp();"),
        0,
        right=("sync_warp();", "sync_block();"),
    ),
    "shuffle_for_a_barrier": Bug(
        Kind.RACE,
        "const auto s = shared_memory().as<float>();\n"
        "s.store(t, in.load(t)); // other\n"
        "const u32 votes = ballot(true);\n"
        "out.store(t, s.load(t ^ 1) + float(votes & 1)); // here\n",
        0,
        right=("const u32 votes = ballot(true);", "sync_warp(); const u32 votes = 1;"),
    ),
    "refill_without_a_barrier": Bug(Kind.RACE, WARP_STAGED, 1, right=("/* */", "sync_warp();")),
    "two_writers": Bug(
        Kind.RACE,
        "const auto s = shared_memory().as<float>();\n"
        "s.store(t / 2, in.load(t)); // here\n"
        "out.store(t, 0.0f);\n",
        1,
        right=("t / 2", "t"),
    ),
    "two_writers_of_global_memory": Bug(
        Kind.RACE, "out.store(t / 2, 1.0f); // here\n", 1, right=("t / 2", "t")
    ),
    "two_blocks_write": Bug(
        Kind.RACE,
        "out.store(t % 32, 1.0f); // here\n",
        0,
        block=1,
        options=MappingProxyType({"threads": 32, "grid": (2, 1, 1)}),
    ),
    "read_what_the_launch_wrote": Bug(
        Kind.RACE,
        "out.store(t, in.load(t)); // other\n"
        "sync_block();\n"
        "if (t == 5) out.load(63 - t); // here\n",
        5,
    ),
    "off_by_one": Bug(
        Kind.OUT_OF_BOUNDS,
        "float sum = 0;\n"
        "for (int i = t; i <= a.n; i += 64) sum += in.load(i); // here\n"
        "out.store(t, sum);\n",
        0,
        right=("<=", "<"),
    ),
    "pack_past_the_end": Bug(
        Kind.OUT_OF_BOUNDS,
        "const int i = t * 4;\nif (i < a.n) in.load<Pack<float, 4>>(i); // here\n",
        15,
        right=("i < a.n", "i + 4 <= a.n"),
        options=MappingProxyType({"threads": 64, "n": 62}),
    ),
    "null": Bug(
        Kind.OUT_OF_BOUNDS,
        "out.store(t, global(static_cast<const float*>(nullptr)).load(t)); // here\n",
        0,
    ),
    "past_shared_memory": Bug(
        Kind.OUT_OF_BOUNDS,
        "shared_memory().as<float>().store(t + 193, 1.0f); // here\n",
        63,
        right=("193", "192"),
    ),
    "unwritten": Bug(
        Kind.UNWRITTEN,
        "const auto s = shared_memory().as<float>();\n"
        "if (t < 63) s.store(t, in.load(t));\n"
        "sync_block();\n"
        "out.store(t, s.load(t)); // here\n",
        63,
        right=("t < 63", "t < 64"),
    ),
    "unwritten_output": Bug(Kind.UNWRITTEN, "if (t == 3) out.load(t); // here\n", 3),
    "misaligned": Bug(
        Kind.MISALIGNED,
        "out.store(t, in.load<Pack<float, 2>>(t & 31).at[0]); // here\n",
        1,
        right=("t & 31", "t & 30"),
    ),
    "misaligned_in_shared_memory": Bug(
        Kind.MISALIGNED,
        "shared_memory().as<u16>().store(t * 2 + 1, u32(t)); // here\n",
        0,
        right=(" + 1", ""),
    ),
    "read_only": Bug(
        Kind.READ_ONLY, "global(const_cast<float*>(in.at)).store(t, 1.0f); // here\n", 0
    ),
    "barrier_in_a_branch": Bug(
        Kind.DIVERGENT_BARRIER,
        "if (t < 48) sync_block(); // here\nout.store(t, 1.0f);\n",
        0,
        right=("if (t < 48)", ""),
    ),
    "barriers_of_two_branches": Bug(
        Kind.DIVERGENT_BARRIER,
        "if (t < 32) {\n    sync_block(); // other\n} else {\n    sync_block(); // here\n}\n",
        32,
    ),
    "shuffle_in_a_branch": Bug(
        Kind.DIVERGENT_WARP,
        "if (t != 40) shuffle(t, 0); // here\nout.store(t, 1.0f);\n",
        32,
        right=("if (t != 40)", ""),
    ),
    "two_shuffles": Bug(
        Kind.DIVERGENT_WARP,
        "int value = t;\n"
        "if (t % 32 < 30) {\n"
        "    value = shuffle(value, 0); // other\n"
        "} else {\n"
        "    value = shuffle(value, 1); // here\n"
        "}\n",
        30,
    ),
    "a_warp_too_short": Bug(
        Kind.DIVERGENT_WARP,
        "shuffle(t, 0); // here\n",
        32,
        options=MappingProxyType({"threads": 48}),
    ),
    "copy_not_waited_for": Bug(
        Kind.IN_FLIGHT,
        COPIED.replace("/*barrier*/", "sync_block();").replace("if (false)", ""),
        0,
        right=("/*wait*/", "copy_wait<0>();"),
    ),
    "copy_of_another_thread": Bug(
        Kind.RACE,
        COPIED.replace("/*wait*/", "copy_wait<0>();"),
        32,
        right=("/*barrier*/", "sync_block();"),
    ),
    "copy_never_waited_for": Bug(
        Kind.UNFINISHED_COPY,
        "copy_async<4>(shared_memory().as<float>(), t, in, t); // here\ncopy_commit();\n/* */\n",
        0,
        right=("/* */", "copy_wait<0>();"),
    ),
    "bulk_copy_not_waited_for": Bug(
        Kind.IN_FLIGHT,
        marked(BULK.replace("barrier_wait(barrier, 0);", "/*  */"), "load", "here"),
        0,
        right=("/*  */", "barrier_wait(barrier, 0);"),
    ),
    "bulk_copy_that_one_thread_waits_for": Bug(
        Kind.RACE,
        BULK.replace("barrier_wait(", "if (t == 32) barrier_wait(").replace(
            "out.store(t, s.load(t)); // load",
            "ballot(true);\nif (t >= 32) out.store(t, s.load(t)); // here",
        ),
        33,
        right=("if (t == 32) ", ""),
    ),
    "too_few_bytes_expected": Bug(
        Kind.DEADLOCK,
        marked(BULK.replace("barrier, 256); // expect", "barrier, 272);"), "wait", "here"),
        0,
        right=("272", "256"),
    ),
    "a_missing_arrival": Bug(
        Kind.DEADLOCK,
        marked(BULK.replace("(barrier, 1)", "(barrier, 2)"), "wait", "here"),
        0,
        right=("(barrier, 2)", "(barrier, 1)"),
    ),
    "not_published": Bug(
        Kind.BARRIER_MISUSE,
        marked(BULK.replace("barrier_publish();", "/* */"), "copy", "here"),
        0,
        right=("/* */", "barrier_publish();"),
    ),
    "an_arrival_too_many": Bug(
        Kind.BARRIER_MISUSE,
        marked(BULK.replace("// expect", "\nbarrier_arrive(barrier); // here"), "wait", "wait"),
        0,
        right=("barrier_arrive(barrier);", ""),
    ),
    "not_initialised": Bug(
        Kind.BARRIER_MISUSE,
        "barrier_arrive((shared_memory() + 512).as<u64>()); // here\n",
        0,
    ),
    "a_bulk_copy_of_odd_size": Bug(
        Kind.MISALIGNED,
        marked(BULK.replace("256", "252"), "copy", "here"),
        0,
        right=("252", "256"),
    ),
    "initialised_without_a_barrier": Bug(
        Kind.RACE,
        "const auto barrier = (shared_memory() + 512).as<u64>();\n"
        "if (t == 0) barrier_init(barrier, 64); // other\n"
        "/* */\n"
        "barrier_arrive(barrier); // here\n",
        1,
        right=("/* */", "sync_block();"),
        also=(Kind.BARRIER_MISUSE,),
    ),
    "cluster_without_a_barrier": Bug(
        Kind.RACE,
        "const auto s = shared_memory().as<float>();\n"
        "s.store(t, in.load(t)); // other\n"
        "sync_block();\n"
        "const float value = cluster_load(s, t, 1 - cluster_rank()); // here\n"
        "cluster_sync();\n"
        "out.store(blockIdx.x * 32 + t, value);\n",
        0,
        right=("sync_block();", "cluster_sync();"),
        options=CLUSTER,
    ),
    "block_that_ends_early": Bug(
        Kind.BLOCK_EXITED,
        "const auto s = shared_memory().as<float>();\n"
        "s.store(t, in.load(t));\n"
        "cluster_sync();\n"
        "const float value = cluster_load(s, t, 1 - cluster_rank()); // here\n"
        "/* */\n"
        "out.store(blockIdx.x * 32 + t, value);\n",
        0,
        block=1,
        right=("/* */", "cluster_sync();"),
        options=CLUSTER,
    ),
}


@pytest.fixture(scope="module")
def kernels() -> Samples:
    samples = {name: Sample(bug.body) for name, bug in BUGS.items()}
    samples |= {f"{n}_fixed": Sample(b.fixed()) for n, b in BUGS.items() if b.right}
    return build_samples(samples)


@pytest.mark.parametrize("seed", ORDERS)
@pytest.mark.parametrize("name", BUGS)
def test_a_bug_is_found_in_every_order(kernels: Samples, name: str, seed: int) -> None:
    bug = BUGS[name]
    n = int(str(bug.options.get("n", 64)))
    report = kernels.run(name, numbers(n), torch.empty(64), seed=seed, **bug.options)
    sample = Sample(bug.body)
    # whichever of two accesses comes second is the one that is reported
    lines = {sample.line(mark) for mark in ("here", "other") if f"// {mark}\n" in bug.body}
    found = [f for f in report.faults if f.kind in (bug.kind, *bug.also) and f.line in lines]
    assert found, [str(fault) for fault in report.faults]


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_is_found_where_it_is(kernels: Samples, name: str) -> None:
    bug = BUGS[name]
    n = int(str(bug.options.get("n", 64)))
    report = kernels.run(name, numbers(n), torch.empty(64), **bug.options)
    fault = next(fault for fault in report.faults if fault.kind is bug.kind)
    sample = Sample(bug.body)
    assert fault.file == f"{name}.cu"
    assert fault.line == sample.line("here"), str(fault)
    assert (fault.thread, fault.block) == (bug.thread, (bug.block, 0, 0)), str(fault)
    if "// other\n" in bug.body:
        assert fault.other_line == sample.line("other")


@pytest.mark.parametrize("seed", ORDERS)
@pytest.mark.parametrize("name", [name for name, bug in BUGS.items() if bug.right])
def test_without_the_bug_nothing_is_reported(kernels: Samples, name: str, seed: int) -> None:
    options = BUGS[name].options
    n = int(str(options.get("n", 64)))
    kernels.run(f"{name}_fixed", numbers(n), torch.empty(64), seed=seed, **options).check()
