"""The host version of device.cuh does what CUDA says of each function."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cuda.harness import ORDERS, Kind, Report, run_orders
from tests.cuda.samples import Sample, Samples, build_samples, numbers
from tests.cuda.units import HERE, KERNELS

# A ring of two slots of 256 bytes: thread 0 fills, both warps read, and say when they are done.
RING = """
const auto ring = shared_memory().as<float>();
const auto full = (shared_memory() + 512).as<u64>();
const auto empty = (shared_memory() + 528).as<u64>();
const int steps = a.n / 64;
if (t == 0) {
    for (int slot = 0; slot < 2; slot++) {
        barrier_init(full + slot, 1);
        barrier_init(empty + slot, 64);
    }
    barrier_publish();
}
sync_block();
float sum = 0.0f;
for (int step = 0; step < steps + 1; step++) {
    if (t == 0 && step < steps) {
        const int slot = step % 2;
        if (step >= 2) barrier_wait(empty + slot, u32(step / 2 - 1) & 1);
        barrier_expect(full + slot, 256);
        copy_bulk(ring, slot * 64, in, step * 64, 256, full + slot);
    }
    if (step == 0) continue;
    const int slot = (step - 1) %% 2;
    barrier_wait(full + slot, u32((step - 1) / 2) & 1);
    sum += ring.load(slot * 64 + t);
    barrier_arrive(empty + slot);
}
out.store(t, sum);
""".replace("%%", "%")
PIPELINE = """
const auto s = shared_memory().as<float>();
const int steps = a.n / 64;
copy_async<4>(s, t, in, t);
copy_commit();
float sum = 0.0f;
for (int step = 0; step < steps; step++) {
    if (step + 1 < steps) copy_async<4>(s, (step + 1) % 2 * 64 + t, in, (step + 1) * 64 + t);
    copy_commit();
    copy_wait<1>();
    sync_block();
    sum += s.load(step % 2 * 64 + (t ^ 33));
    sync_block();
}
out.store(t, sum);
"""
CLUSTER_SUM = """
const auto s = shared_memory().as<float>();
s.store(t, in.load(blockIdx.x * 32 + t));
cluster_sync();
float sum = 0.0f;
for (int rank = 0; rank < cluster_size(); rank++) sum += cluster_load(s, t, rank);
cluster_sync();
if (cluster_rank() == 0) out.store(blockIdx.x / cluster_size() * 32 + t, sum);
"""
SHARED_ACCESS = """
const auto s = shared_memory().as<float>();
for (int i = t; i < a.n; i += 32) s.store(i, float(i));
sync_block();
for (int step = 0; step < 4; step++) s.load<%s>(%s); // here
"""

SAMPLES = {
    "ring": Sample(RING),
    "ring_that_overtakes": Sample(
        RING.replace("if (step >= 2) barrier_wait", "if (step < 0) barrier_wait").replace(
            "full + slot);\n    }", "full + slot); // here\n    }"
        )
    ),
    "pipeline": Sample(PIPELINE),
    "cluster_sum": Sample(CLUSTER_SUM),
    "shuffles": Sample(
        "out.store(t, shuffle(in.load(t), 31 - t % 32));\n"
        "out.store(64 + t, shuffle_xor(in.load(t), 5));\n"
        "out.store(128 + t, int(ballot(in.load(t) % 3 == 0)));\n",
        "int",
        "int",
    ),
    "bits": Sample(
        "const u32 low = in.load(3 * t), high = in.load(3 * t + 1), s = in.load(3 * t + 2);\n"
        "out.store(2 * t, permute_bytes(low, high, s));\n"
        "out.store(2 * t + 1, funnel(low, high, s));\n",
        "u32",
        "u32",
    ),
    "half_sums": Sample(
        "out.store(t, add_halves(in.load(2 * t), in.load(2 * t + 1)));\n", "u32", "u32"
    ),
    "histogram": Sample(
        "const auto s = shared_memory().as<int>();\n"
        "if (t < 16) s.store(t, 0);\n"
        "sync_block();\n"
        "atomic_add(s, in.load(t) % 16, 1);\n"
        "sync_block();\n"
        "if (t < 16) atomic_add(out, t, s.load(t));\n",
        "int",
        "int",
    ),
    "float_atomics": Sample("atomic_add(out, 0, in.load(t));\n"),
    "halves": Sample(
        "for (int i = t; i < a.n; i += 32) out.store(i, to_float(in.load(i)));\n", "__half"
    ),
    "to_halves": Sample(
        "for (int i = t; i < a.n; i += 32) out.store(i, from_float<__half>(in.load(i)));\n",
        out="__half",
    ),
    "bfloats": Sample(
        "for (int i = t; i < a.n; i += 32)\n"
        "    out.store(i, from_float<__nv_bfloat16>(2.0f * to_float(in.load(i)) / 3.0f));\n",
        "__nv_bfloat16",
        "__nv_bfloat16",
    ),
    "bank_copies": Sample(SHARED_ACCESS % ("float", "t")),
    "bank_stride_2": Sample(SHARED_ACCESS % ("float", "2 * t")),
    "bank_stride_32": Sample(SHARED_ACCESS % ("float", "32 * t")),
    "bank_broadcast": Sample(SHARED_ACCESS % ("float", "7")),
    "bank_pairs": Sample(SHARED_ACCESS % ("Pack<float COMMA 2>", "2 * t")),
    "bank_quads": Sample(SHARED_ACCESS % ("Pack<float COMMA 4>", "4 * t")),
    "bank_quads_stride_2": Sample(SHARED_ACCESS % ("Pack<float COMMA 4>", "8 * t")),
    "bank_gather": Sample(
        "const auto s = shared_memory().as<float>();\n"
        "for (int i = t; i < 1024; i += 32) s.store(i, 0.0f);\n"
        "sync_block();\n"
        "s.load<Pack<float COMMA 4>>(int(in.load(t)) * 4); // here\n"
    ),
    "bank_halves": Sample(SHARED_ACCESS % ("u16", "t / 2")),
    "sectors": Sample("out.store(t, in.load(t)); // here\n"),
    "sectors_strided": Sample("out.store(t, in.load(t * 8)); // here\n"),
    "sectors_quads": Sample("in.load<Pack<float COMMA 4>>(t * 4); // here\n"),
}


@pytest.fixture(scope="module")
def kernels() -> Samples:
    return build_samples(
        {n: Sample(s.body.replace(" COMMA", ","), s.given, s.out) for n, s in SAMPLES.items()}
    )


# ------------------------------------------------------------------------------ other threads


def test_shuffles_and_votes(kernels: Samples) -> None:
    given = torch.arange(64, dtype=torch.int32) * 7
    out = torch.empty(192, dtype=torch.int32)
    kernels.run("shuffles", given, out, threads=64).check()
    lanes = given.view(2, 32)
    assert out[:64].equal(lanes.flip(1).flatten())
    assert out[64:128].equal(lanes[:, torch.arange(32) ^ 5].flatten())
    votes = [sum(1 << lane for lane in range(32) if row[lane] % 3 == 0) for row in lanes.tolist()]
    signed = np.array(votes, dtype=np.uint32).view(np.int32)
    assert out[128:].view(2, 32).equal(torch.from_numpy(signed)[:, None].expand(2, 32))


@pytest.mark.parametrize("seed", ORDERS)
@pytest.mark.parametrize("name", ["ring", "pipeline"])
def test_copies_in_a_ring(kernels: Samples, name: str, seed: int) -> None:
    given, out = numbers(64 * 9), torch.empty(64)
    options = {"threads": 64, "shared_bytes": 1024}
    kernels.run(name, given, out, seed=seed, **options).check()
    order = torch.arange(64) ^ (33 if name == "pipeline" else 0)
    sums = torch.zeros(64)
    for step in given.view(9, 64):
        sums += step[order]
    assert out.equal(sums)


@pytest.mark.parametrize("seed", ORDERS)
def test_a_ring_that_overtakes_its_readers_is_found(kernels: Samples, seed: int) -> None:
    options = {"threads": 64, "shared_bytes": 1024, "seed": seed, "max_faults": 1}
    (fault,) = kernels.run(
        "ring_that_overtakes", numbers(64 * 9), torch.empty(64), **options
    ).faults
    # the copy overtakes a read, or the read finds the copy
    assert fault.kind in (Kind.RACE, Kind.IN_FLIGHT)
    assert SAMPLES["ring_that_overtakes"].line("here") in (fault.line, fault.other_line)


@pytest.mark.parametrize("seed", ORDERS)
def test_clusters(kernels: Samples, seed: int) -> None:
    given, out = torch.arange(256.0), torch.empty(64)
    options = {"grid": (8, 1, 1), "cluster": 4, "shared_bytes": 128}
    kernels.run("cluster_sum", given, out, seed=seed, **options).check()
    assert out.equal(given.view(2, 4, 32).sum(1).flatten())


def test_atomics(kernels: Samples) -> None:
    given = torch.arange(128, dtype=torch.int32) ** 2
    out = torch.zeros(16, dtype=torch.int32)
    options = {"threads": 128, "shared_bytes": 64, "initialised": {"out"}}
    kernels.run("histogram", given, out, **options).check()
    assert out.equal(torch.bincount(given % 16, minlength=16).int())


def test_sums_that_depend_on_the_order_are_found(kernels: Samples) -> None:
    given, out = numbers(64), torch.empty(1)

    def run(seed: int) -> Report:
        out.zero_()
        return kernels.run("float_atomics", given, out, threads=64, initialised={"out"}, seed=seed)

    faults = run_orders(run, {"out": out}).faults
    assert [fault.kind for fault in faults] == [Kind.ORDER_DEPENDENT]


# --------------------------------------------------------------------------------------- bits


def test_bytes_and_shifts(kernels: Samples) -> None:
    random = np.random.default_rng(2)
    given = random.integers(0, 1 << 32, (32, 3), dtype=np.uint32)
    out = torch.empty(64, dtype=torch.int32)
    kernels.run("bits", torch.from_numpy(given.view(np.int32).copy()), out).check()
    result = out.numpy().view(np.uint32).reshape(32, 2)
    for (low, high, selector), (permuted, shifted) in zip(
        given.tolist(), result.tolist(), strict=True
    ):
        source = low.to_bytes(4, "little") + high.to_bytes(4, "little")
        nibbles = [selector >> (4 * i) & 15 for i in range(4)]
        # the fourth bit asks for the byte's sign, eight times
        chosen = [(source[n & 7], source[n & 7] >> 7 and 255)[n >> 3] for n in nibbles]
        expected = bytes(chosen)
        assert permuted.to_bytes(4, "little") == expected
        assert shifted == ((high << 32 | low) >> (selector & 31)) & 0xFFFFFFFF


def test_halves(kernels: Samples) -> None:
    given = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    out = torch.empty(1 << 16)
    kernels.run("halves", given, out, counting=False).check()
    torch.testing.assert_close(out, given.float(), rtol=0, atol=0, equal_nan=True)
    # between two halves, and halfway
    values = given.float()
    above = torch.nextafter(values, torch.tensor(torch.inf))
    middle = (values + values.roll(-1)) / 2
    for floats in (values, above, middle, values * 3, values * 1e-3):
        back = torch.empty(1 << 16, dtype=torch.float16)
        kernels.run("to_halves", floats, back, counting=False).check()
        torch.testing.assert_close(back, floats.half(), rtol=0, atol=0, equal_nan=True)


def test_sums_of_halves(kernels: Samples) -> None:
    generator = torch.Generator().manual_seed(8)
    words = torch.randint(-(1 << 15), 1 << 15, (32, 2, 2), generator=generator).to(torch.int16)
    out = torch.empty(32, dtype=torch.int32)
    kernels.run("half_sums", words.flatten().view(torch.int32), out).check()
    left, right = words.view(torch.float16).unbind(dim=1)
    sums = out.view(torch.float16).view(32, 2)
    torch.testing.assert_close(sums, left + right, rtol=0, atol=0, equal_nan=True)


def test_bfloat16s(kernels: Samples) -> None:
    given = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    out = torch.empty(1 << 16, dtype=torch.bfloat16)
    kernels.run("bfloats", given, out, counting=False).check()
    expected = (2.0 * given.float() / 3.0).bfloat16()
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


# ------------------------------------------------------------------------------------- counters

# Wavefronts of a warp access, and without conflicts.
BANKS = {
    "bank_copies": (1, 1),
    "bank_stride_2": (2, 1),
    "bank_stride_32": (32, 1),
    "bank_broadcast": (1, 1),
    "bank_pairs": (2, 2),
    "bank_quads": (4, 4),
    "bank_quads_stride_2": (8, 4),
    "bank_halves": (1, 1),
}


@pytest.mark.parametrize("name", BANKS)
def test_bank_conflicts(kernels: Samples, name: str) -> None:
    report = kernels.run(name, torch.empty(1), torch.empty(1), n=1024, shared_bytes=4096)
    report.check()
    line = SAMPLES[name].line("here")
    (site,) = [site for site in report.sites if site.line == line]
    assert (site.requests, site.lanes) == (4, 128)
    assert (site.wavefronts / 4, site.ideal / 4) == BANKS[name]


def test_bank_conflicts_of_a_gather(kernels: Samples) -> None:
    # entries of 16 bytes: four banks each, eight lanes together
    entries = torch.randint(0, 256, (32,), generator=torch.Generator().manual_seed(4))
    waves = 0
    for eight in entries.view(4, 8).tolist():
        banks = [entry % 8 for entry in set(eight)]
        waves += max(banks.count(bank) for bank in banks)
    report = kernels.run("bank_gather", entries.float(), torch.empty(1), shared_bytes=4096)
    (site,) = [site for site in report.sites if site.kind == "shared_load"]
    assert (site.wavefronts, site.ideal) == (waves, 4)
    assert waves > 4


@pytest.mark.parametrize(
    ("name", "sectors", "loaded"),
    [("sectors", 4, 128), ("sectors_strided", 32, 128), ("sectors_quads", 16, 512)],
)
def test_sectors(kernels: Samples, name: str, sectors: int, loaded: int) -> None:
    report = kernels.run(name, numbers(256), torch.empty(32))
    (site,) = [site for site in report.sites if site.kind == "global_load"]
    assert (site.requests, site.sectors, site.bytes) == (1, sectors, loaded)
    assert report.total("global_load") == loaded


# --------------------------------------------------------------------------------- the two files


def outside_detail(path: Path) -> str:
    return re.sub(
        r"namespace detail \{.*?\}  // namespace detail", "", path.read_text(), flags=re.S
    )


def functions(path: Path) -> set[str]:
    """Heads of the functions that kernels may call, without the place of the call."""
    text = re.sub(r"//[^\n]*|^#[^\n]*", "", outside_detail(path), flags=re.M)
    text = re.sub(r"\b(VQ_INLINE|inline) |,? ?\bVQ_AT\b", "", " ".join(text.split()))
    heads = re.findall(r"[^;{}]*\([^;{}]*\)(?: const)?(?= \{)", text)
    return {head.strip() for head in heads if not re.match(r" *(else|for|if|while)\b", head)}


def names(path: Path) -> set[str]:
    """Types, aliases, constants and macros outside of functions, and the fields of structs."""
    found = re.findall(
        r"^(?:using (\w+) =|constexpr \w+ (\w+)|struct (?:alignas\(.*\) )?(\w+)"
        r"|    using (\w+) =|    T\*? (\w+\b)[^(\n]*;|#define (\w+))",
        outside_detail(path),
        flags=re.M,
    )
    return {name for names in found for name in names if name}


def test_both_versions_have_the_same_functions() -> None:
    ours, theirs = (folder / "include" / "device.cuh" for folder in (HERE, KERNELS))
    assert functions(ours) == functions(theirs)
    assert len(functions(ours)) > 40
    assert names(ours) == names(theirs)
