"""Reading machine code: SASS listings by hand, and real programs from PTX."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from autotune import cubin, inspection, sass
from autotune.cubin import read_cubin, tool
from autotune.inspection import ARCHS, inspect_kernel, stand_in
from vqkernels.device import Device
from vqkernels.errors import BackendError
from vqkernels.kernel import Footprint, registry
from vqkernels.presets import parse_format
from vqkernels.problem import Problem
from vqkernels.space import Config

PROBLEM = Problem(m=1, n=64, k=64, spec=parse_format("aqlm-2x8"), dtype="float16")


def listing(*lines: str) -> str:
    """Lines as nvdisasm writes them; those with a colon are labels."""
    body = [
        line if line.endswith(":") else f"        /*{16 * i:04x}*/          {line} ;"
        for i, line in enumerate(lines)
    ]
    head = ["\t.target\tsm_90a", '\t.section\t.text.f,"ax",@progbits', '\t.sectionflags\t@"X"']
    return "\n".join([*head, "f:", ".text.f:", *body, "\t.section\t.debug,x"])


def hot(*lines: str) -> sass.Traffic:
    return sass.traffic(sass.hot_loop(sass.functions(listing(*lines))["f"]))


@pytest.mark.parametrize(
    ("opcode", "width"),
    [
        ("LDG.E", 4),
        ("LDG.E.U8", 1),
        ("LDG.E.U16.CONSTANT", 2),
        ("LDG.E.64", 8),
        ("LDG.E.128.CONSTANT", 16),
        ("LDG.E.ENL2.256", 32),
        ("LDGSTS.E.BYPASS.128", 16),
        ("LDS.U8", 1),
        ("LDS.128", 16),
        ("LDSM.16.M88.4", 16),
        ("LDSM.16.MT88.2", 8),
        ("LDSM.16.M88", 4),
        ("STL.64", 8),
    ],
)
def test_widths(opcode: str, width: int) -> None:
    assert sass.Instruction(opcode, None, "").access_bytes == width


@pytest.mark.parametrize(
    ("opcode", "tensor"),
    [
        ("HMMA.16816.F32", True),
        ("HGMMA.64x64x16.F32", True),
        ("UTCHMMA", True),
        ("IMMA.16832.S8", True),
        ("QMMA.16832.F32", True),
        ("HFMA2.MMA", False),
        ("FFMA", False),
        ("LDSM.16.M88.4", False),
    ],
)
def test_tensor_cores(opcode: str, tensor: bool) -> None:
    assert bool(hot(opcode).tensor) == tensor


def test_hot_loop_is_the_innermost_with_the_most_traffic() -> None:
    found = hot(
        "LDG.E.U8 R1, [R2]",
        ".L_x_0:",
        "LDG.E.64 R1, [R2]",
        ".L_x_1:",
        "@P1 LDG.E.128 R4, [R2]",
        "@!PT LDS RZ, [RZ]",
        "LDS.128 R4, [R2]",
        "HMMA.16816.F32 R1, R2, R3, R4",
        "@P0 BRA `(.L_x_1)",
        "BRA.U UP0, `(.L_x_0)",
        ".L_x_2:",
        "LDS R1, [R2]",
        "@P0 BRA `(.L_x_2)",
        "EXIT",
        ".L_x_3:",
        "BRA `(.L_x_3)",
    )
    assert found.global_loads == {16: 1}
    assert found.shared_loads == {16: 1}
    assert found.tensor == {"HMMA.16816.F32": 1}
    assert found.instructions == 4


def test_a_loop_may_wait_and_leave_in_its_middle() -> None:
    """A wait within a loop is no loop of its own, and a block at the end belongs to its loop."""
    found = hot(
        ".L_x_0:",
        "LDG.E.128 R4, [R2]",
        ".L_x_1:",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR12], R2",
        "@!P0 BRA `(.L_x_1)",
        "@P3 BRA `(.L_x_4)",
        ".L_x_2:",
        "LDS.64 R4, [R2]",
        "@P1 BRA `(.L_x_0)",
        "EXIT",
        ".L_x_4:",
        "LDS R4, [R2]",
        "BRA `(.L_x_2)",
    )
    assert found.global_loads == {16: 1}
    assert found.shared_loads == {8: 1, 4: 1}


def test_a_jump_back_from_a_rare_block_is_no_loop() -> None:
    found = hot(
        "LDG.E.64 R1, [R2]",
        "@P0 BRA `(.L_x_9)",
        ".L_x_1:",
        "LDG.E.128 R1, [R2]",
        "EXIT",
        ".L_x_9:",
        "LDG.E.U8 R1, [R2]",
        "BRA `(.L_x_1)",
    )
    assert found.global_loads == {8: 1, 16: 1, 1: 1}


def test_loops_of_sm_80_are_left_by_a_guarded_call() -> None:
    found = hot(
        "LDG.E R1, [R2]",
        ".L_x_2:",
        "LDG.E.128 R1, [R2]",
        "@P0 CALL.REL.NOINC `(.L_x_1)",
        "BRA `(.L_x_2)",
        ".L_x_1:",
        "EXIT",
    )
    assert found.global_loads == {16: 1}


def test_spills_are_counted_in_the_whole_program() -> None:
    (code,) = sass.functions(listing("STL.64 [R1], R2", "LDL R2, [R1]", "@!PT LDL R2, [R1]"))
    assert code == "f"
    whole = sass.traffic(
        sass.functions(listing("STL.64 [R1], R2", "LDL R2, [R1]", "@!PT LDL R2, [R1]"))["f"]
    )
    assert (whole.local_store_bytes, whole.local_load_bytes) == (8, 4)


def test_older_listings_name_their_target_elsewhere() -> None:
    assert sass.target('\t.headerflags\t@"EF_CUDA_64BIT EF_CUDA_SM80 EF(EF_CUDA_SM80)"') == "sm_80"
    assert sass.target("nothing") is None


# ------------------------------------------------------------------------------------------------
# real programs


PTX = """
.version 8.7
.target sm_80
.address_size 64
.visible .entry stream(.param .u64 p, .param .u32 n)
{
  .reg .b64 %a; .reg .b32 %r<8>; .reg .pred %q; .shared .align 16 .b8 buffer[1000];
  ld.param.u64 %a, [p]; ld.param.u32 %r4, [n]; mov.b32 %r5, 0; mov.b32 %r6, buffer;
LOOP:
  ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%a];
  st.shared.b32 [%r6], %r0; bar.sync 0; ld.shared.v2.b32 {%r0, %r1}, [buffer+8];
  add.u32 %r0, %r0, %r1; add.u32 %r0, %r0, %r2; add.u32 %r0, %r0, %r3;
  st.global.b32 [%a+64], %r0;
  add.u32 %r5, %r5, 1; setp.lt.u32 %q, %r5, %r4;
  @%q bra LOOP;
  ret;
}
"""


def assembled(arch: str, folder: Path) -> bytes:
    pytest.importorskip("triton", reason="ptxas comes with Triton")
    source, image = folder / "program.ptx", folder / "program.cubin"
    source.write_text(PTX.replace("sm_80", arch))
    subprocess.run([tool("ptxas"), "-arch", arch, str(source), "-o", str(image)], check=True)
    return image.read_bytes()


@pytest.mark.parametrize("arch", ARCHS)
def test_reads_a_real_program(arch: str, tmp_path: Path) -> None:
    found = read_cubin(assembled(arch, tmp_path))
    assert (found.function, found.arch) == ("stream", arch)
    assert 8 <= found.registers <= 64
    assert found.static_shared_bytes == 1000  # without what the system keeps from sm_90 on
    assert found.spill_bytes == found.stack_bytes == 0
    assert set(found.loop.global_loads) == {16}
    assert set(found.loop.shared_loads) == {8}
    assert found.loop.instructions < found.instructions


def test_a_function_that_is_not_there(tmp_path: Path) -> None:
    image = assembled("sm_90", tmp_path)
    assert read_cubin(image, "stream").function == "stream"
    with pytest.raises(BackendError, match="other was asked for, it holds stream"):
        read_cubin(image, "other")


def test_what_is_no_program() -> None:
    pytest.importorskip("triton", reason="cuobjdump comes with Triton")
    with pytest.raises(BackendError, match=r"cuobjdump: .*; is this a cubin") as caught:
        read_cubin(b"nonsense")
    assert "\n" not in str(caught.value)


def test_a_missing_tool_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cubin, "_folders", list)
    monkeypatch.setenv("PATH", str(tmp_path))
    tool.cache_clear()
    with pytest.raises(BackendError, match="cuobjdump is missing; install triton") as caught:
        read_cubin(b"")
    assert "\n" not in str(caught.value)


def test_tools_of_a_toolkit_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "nvother"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert tool("nvother") == str(program)


# ------------------------------------------------------------------------------------------------
# inspections


def inspected(
    monkeypatch: pytest.MonkeyPatch, compiled: object, arch: str = "sm_90", declared: int = 0
) -> object:
    """The inspection of a kernel whose one program compiles to `compiled`, or raises it.

    declared: shared memory of its footprint.
    """

    def compile(arch: int) -> object:
        print("the whole program")  # noqa: T201  # as Triton does where ptxas fails
        if isinstance(compiled, Exception):
            raise compiled
        return compiled

    code = cubin.Cubin("f", arch, 8, 0, 0, 0, 1000, 1, sass.traffic([]))
    monkeypatch.setattr(inspection, "read_cubin", lambda image: code)
    kernel = dataclasses.replace(
        registry()["torch/dense"],
        programs=lambda config, problem: (SimpleNamespace(compile=compile),),
        supports=lambda problem, device: None,
        default=lambda problem, device: Config(),
        footprint=lambda config, problem, device: Footprint(0, 0, 0, declared),
    )
    (found,) = inspect_kernel(kernel, PROBLEM, arch)
    return found


def test_any_language_can_be_inspected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = inspected(monkeypatch, SimpleNamespace(cubin=b"", shared_bytes=24, compiler="nvrtc 13"))
    assert isinstance(found, inspection.Inspection)
    assert (found.status, found.shared_bytes, found.compiler) == ("ok", 1024, "nvrtc 13")
    assert capsys.readouterr().out == ""


def test_more_shared_memory_than_a_block_has(monkeypatch: pytest.MonkeyPatch) -> None:
    big = SimpleNamespace(cubin=b"", shared_bytes=120_000, compiler="nvrtc 13")
    found = inspected(monkeypatch, big, "sm_86")
    assert isinstance(found, inspection.Inspection)
    assert found.status == "constraint"
    assert found.reason == "needs 121,000 bytes of shared memory a block; sm_86 has 101,376"
    assert found.code is not None


def test_a_footprint_refuses_before_anything_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    never = AssertionError("compiled")
    found = inspected(monkeypatch, never, "sm_86", declared=101_377)
    assert isinstance(found, inspection.Inspection)
    assert found.status == "constraint"
    assert found.reason == "needs 101,377 bytes of shared memory a block; sm_86 has 101,376"
    assert (found.shared_bytes, found.code) == (101_377, None)
    assert inspected(monkeypatch, never, "sm_86", declared=101_376).status == "compile"  # type: ignore[attr-defined]


def test_a_footprint_that_fails_is_a_status() -> None:
    def footprint(config: Config, problem: Problem, device: Device) -> Footprint:
        raise ValueError("tile of 0")

    kernel = dataclasses.replace(
        registry()["torch/dense"], programs=lambda config, problem: (), footprint=footprint,
        supports=lambda problem, device: None, default=lambda problem, device: Config(),
    )  # fmt: skip
    (found,) = inspect_kernel(kernel, PROBLEM, "sm_90")
    assert (found.status, found.reason) == ("compile", "ValueError: tile of 0")


def test_a_compiler_that_fails_is_a_status(monkeypatch: pytest.MonkeyPatch) -> None:
    cause = TypeError("bad types: [1]")
    outer = RuntimeError("at 31:19: long source")
    outer.__cause__ = cause
    found = inspected(monkeypatch, outer)
    assert isinstance(found, inspection.Inspection)
    assert (found.status, found.reason) == ("compile", "TypeError: bad types: [1]")
    text = RuntimeError("`ptxas` stderr:\nptxas fatal error: no\nRepro command: ptxas -v")
    assert inspected(monkeypatch, text).reason == "RuntimeError: ptxas fatal error: no"  # type: ignore[attr-defined]


def test_refusals_have_reasons() -> None:
    (found,) = inspect_kernel(registry()["torch/dense"], PROBLEM, "sm_90")
    assert (found.status, found.reason) == ("constraint", "launches no GPU program of its own")
    triton = registry().kernels.get("triton/mma")
    if triton is not None:
        (outside,) = inspect_kernel(triton, PROBLEM, "sm_90", Config(warps=4))
        assert outside.status == "constraint"
        assert "is missing" in outside.reason
    with pytest.raises(BackendError, match="architecture 'sm_7' is unknown"):
        stand_in("sm_7")
