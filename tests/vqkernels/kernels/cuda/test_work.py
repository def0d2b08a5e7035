"""What CUDA kernels say that they do, against the counters of the harness that runs their text."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.cuda import harness
from tests.cuda.harness import Site
from tests.vqkernels.kernels.cuda.test_kernels import HOPPER
from vqkernels.device import known_device
from vqkernels.kernel import registry
from vqkernels.kernels.access import LINE, gather_wavefronts, strided_wavefronts
from vqkernels.kernels.cuda import product
from vqkernels.kernels.cuda.program import Program
from vqkernels.presets import PRESETS
from vqkernels.problem import Problem
from vqkernels.space import Config, Value
from vqkernels.tensor import QuantizedTensor, random_tensor
from vqkernels.work import Work

pytest.importorskip("cuda.bindings", reason="CUDA's bindings are not installed")

SPEC = PRESETS["rq-2x256x8"]


@dataclasses.dataclass(frozen=True)
class Run:
    """A product whose warps are full: every lane of every step has a column."""

    kernel: str
    changes: tuple[tuple[str, Value], ...]
    m: int = 1
    n: int = 64
    k: int = 2048

    @property
    def problem(self) -> Problem:
        return Problem(m=self.m, n=self.n, k=self.k, spec=SPEC, dtype="float16")

    @property
    def config(self) -> Config:
        default = registry()[self.kernel].default(self.problem, HOPPER)
        return default.replace(**{"splits": 1, **dict(self.changes)})

    @property
    def program(self) -> Program:
        programs = registry()[self.kernel].programs
        assert programs is not None
        (program,) = programs(self.config, self.problem)
        assert isinstance(program, Program)
        return program

    @property
    def works(self) -> tuple[Work, ...]:
        work = registry()[self.kernel].work
        assert work is not None
        return work(self.config, self.problem, HOPPER)

    @property
    def tensor(self) -> QuantizedTensor:
        return random_tensor(SPEC, self.n, self.k, seed=1)

    def sites(self) -> tuple[Site, ...]:
        """What the lines of the kernel's text did."""
        packed = registry()[self.kernel].pack(self.tensor, self.config, self.problem)
        spans = self.program.grid[2]
        dtype = torch.float16 if spans == 1 else torch.float32
        x = torch.randn(self.m, self.k, generator=torch.Generator().manual_seed(0)).half()
        out = torch.empty(spans, self.m, self.n, dtype=dtype)
        given = {**product.arrays_of(packed), "x": x, "out": out}
        report = harness.run_program(self.program, given)
        report.check()
        return report.sites


def run(kernel: str, m: int = 1, **changes: Value) -> Run:
    return Run(kernel, tuple(changes.items()), m)


ONE_COPY = run("cuda/staged", blocks=64, warps=4, replicas=1)
COPIES = run("cuda/staged", 2, blocks=64, warps=4, replicas=4, gather_bytes=8, tokens=2, splits=2)
PLANES = run("cuda/fused_rq", layout="planes")
NAIVE = run("cuda/naive", layout="columns", threads=32)


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    harness.build([one.program for one in (ONE_COPY, COPIES, PLANES, NAIVE)])


def total(sites: tuple[Site, ...], kind: str, count: str) -> int:
    return sum(getattr(site, count) for site in sites if site.kind.startswith(kind))


def inputs(site: Site) -> bool:
    """Whether the line loads x."""
    return site.kind == "global_load" and site.file.endswith("sweep.cuh") and site.width == 16


def codes(site: Site, width: int) -> bool:
    return site.kind == "global_load" and site.width == width


@pytest.mark.parametrize(("one", "copies", "width"), [(ONE_COPY, 1, 16), (COPIES, 4, 8)])
def test_gathers_from_shared_memory(one: Run, copies: int, width: int) -> None:
    """Bank conflicts of random codes; the whole with codes, x and what fills shared memory."""
    sites = one.sites()
    (gathers,) = (site for site in sites if site.kind == "shared_load")
    expected = gather_wavefronts(width, 16 * copies, 256, copies)
    assert gathers.wavefronts == pytest.approx(gathers.requests * expected, rel=0.02)
    # x of a lane's four columns lies 64 bytes from the next lane's; a request of codes is 128 bytes
    x = sum(site.requests for site in sites if inputs(site)) * strided_wavefronts(64, 16)
    read = sum(site.requests for site in sites if codes(site, 4))
    blocks = one.program.grid[0] * one.program.grid[2]
    fill = 2 * blocks * copies * (2 * 256 * 16) / LINE
    assert one.works[0].wavefronts == pytest.approx(gathers.wavefronts + x + read + fill, rel=0.02)


def test_codes_come_from_the_l2_once() -> None:
    sites = PLANES.sites()
    sectors = total(tuple(site for site in sites if codes(site, 1)), "global_load", "sectors")
    assert 32 * sectors == PLANES.tensor.parts["codes"].nbytes
    stored = 32 * total(sites, "global_store", "sectors")
    x, books = 2 * PLANES.k, 2 * 256 * 16
    # x and codebooks once into the L1 of each of four multiprocessors
    held = HOPPER.units * (x + books)
    assert PLANES.works[0].l2_bytes == 32 * sectors + stored + held


@pytest.mark.parametrize("one", [ONE_COPY, PLANES, NAIVE])
def test_memory_moves_every_byte_once(one: Run) -> None:
    parts = one.tensor.parts
    stored = sum(parts[name].nbytes for name in ("codes", "codebook_0", "codebook_1"))
    assert one.works[0].hbm_bytes == stored + 2 * one.k + 2 * one.n
    assert len(one.works) == 1


def test_a_warp_of_naive_walks_all_columns() -> None:
    sites = NAIVE.sites()
    gathers = total(tuple(site for site in sites if site.width == 16), "global_load", "requests")
    columns = NAIVE.k // SPEC.vector_length
    assert gathers == 2 * 2 * columns  # warps, stages
    assert NAIVE.works[0].shared_trips == columns


def test_spans_are_added_up_by_launches_of_their_own() -> None:
    sweep, sums, copy = COPIES.works
    assert sweep.blocks == 8
    y = COPIES.m * COPIES.n
    assert sums.l2_bytes == (2 + 1) * 4 * y
    assert copy.l2_bytes == (4 + 2) * y
    # partial sums stay in the L2
    assert sweep.hbm_bytes == ONE_COPY.works[0].hbm_bytes + 2 * COPIES.k - 2 * COPIES.n


# ------------------------------------------------------------------------------------------------
# formulas without a run

LARGE = Problem(m=1, n=4096, k=4096, spec=PRESETS["vptq-65536-256"], dtype="float16")
H100 = known_device("h100")


def vectorized(**changes: Value) -> Work:
    kernel = registry()["cuda/vectorized"]
    assert kernel.work is not None
    return kernel.work(kernel.default(LARGE, H100).replace(**changes), LARGE, H100)[0]


def test_a_codebook_that_no_l1_holds_is_gathered_from_the_l2() -> None:
    """A sector of 32 bytes for 0.9 of 16-byte entries of 65,536; the 256 of the residual stay."""
    cells = LARGE.n * LARGE.k / 8
    gathers = vectorized().l2_bytes / (32 * cells)
    assert 0.9 < gathers < 1.1
    # beside codes and what fills each block: 19 % of the entries serve a third of their codes
    for count, left in ((1024, 0.95), (4096, 0.85), (12288, 0.72)):
        one = vectorized(hot_entries=count)
        gathered = one.l2_bytes - one.blocks * count * 16
        assert gathered / vectorized().l2_bytes == pytest.approx(left, abs=0.05)


def test_tiles_of_tokens_share_a_decode() -> None:
    """Gathers as often as there are tiles of tokens, however many tokens these have."""
    kernel = registry()["cuda/fused_rq"]
    problem = Problem(m=8, n=4096, k=4096, spec=SPEC, dtype="float16")
    assert kernel.work is not None
    waves = {}
    for tokens in (1, 2, 4):
        config = kernel.default(problem, H100).replace(tokens=tokens, rows=2, splits=1)
        waves[tokens] = kernel.work(config, problem, H100)[0].wavefronts
    # half the tiles, half the gathers; x is loaded by each token alike
    assert waves[1] - waves[2] == pytest.approx(2 * (waves[2] - waves[4]))
    assert waves[2] > waves[4] > 0


def test_what_surrounds_a_product_is_launched() -> None:
    """A row scale is a product and a copy more; spans a sum and a copy."""
    kernel = registry()["cuda/fused_rq"]
    assert kernel.work is not None

    def launches(form: str, **changes: Value) -> int:
        problem = Problem(m=1, n=4096, k=4096, spec=PRESETS[form], dtype="float16")
        config = kernel.default(problem, H100).replace(**changes)
        return len(kernel.work(config, problem, H100))  # type: ignore[misc]

    assert launches("rq-2x256x8", splits=1) == 1
    assert launches("rq-2x256x8", splits=2) == 3
    assert launches("aqlm-2x8", splits=1) == 3


def test_codes_that_outgrow_the_l2_come_from_memory_for_every_tile_of_tokens() -> None:
    kernel = registry()["cuda/fused_rq"]
    assert kernel.work is not None
    moved = {}
    for n in (4096, 65536):  # 4 and 64 MB of codes; an H100's L2 is 50 MB
        for m in (1, 2):
            problem = Problem(m=m, n=n, k=8192, spec=SPEC, dtype="float16")
            config = kernel.default(problem, H100).replace(tokens=1, splits=1)
            moved[n, m] = kernel.work(config, problem, H100)[0].hbm_bytes
    assert moved[4096, 2] == moved[4096, 1] + 2 * (4096 + 8192)
    assert moved[65536, 2] == moved[65536, 1] + 2 * (65536 + 8192) + 65536 * 8192 // 8 * 2


def test_hot_entries_are_of_the_first_codebook_set() -> None:
    """pq-m8 has eight: an eighth of the gathers goes to the copy in shared memory."""
    kernel = registry()["cuda/vectorized"]
    assert kernel.work is not None
    problem = Problem(m=1, n=4096, k=4096, spec=PRESETS["pq-m8"], dtype="float16")
    config = kernel.default(problem, H100)
    none = kernel.work(config, problem, H100)[0]
    all_hot = kernel.work(config.replace(hot_entries=1024), problem, H100)[0]
    # the branch, and mostly both of its sides
    assert 1.4 < all_hot.instructions / none.instructions < 2
