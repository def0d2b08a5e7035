"""The conformance suite: what any kernel, built in or someone else's, is held to.

    @pytest.mark.parametrize("case", conformance_cases(), ids=str)
    @pytest.mark.parametrize("m", (1, 3, 17))
    def test_right(case, m):
        check_case(KERNEL, detect("cpu"), case, m)

A case is a format on a small ragged matrix; a kernel may refuse it through `supports`, and must
be right on the rest. `check_case` raises AssertionError with what went wrong.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from vqkernels import oracle
from vqkernels.device import Device
from vqkernels.kernel import Kernel, Packed, Run
from vqkernels.presets import PRESETS
from vqkernels.problem import Dtype, Problem
from vqkernels.space import Config
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor, random_tensor

__all__ = ["Case", "check_case", "conformance_cases", "field_cases", "prepare", "preset_cases"]

_RESIDUAL = CodebookSpec(vector_length=8, stages=(256, 256))


@dataclasses.dataclass(frozen=True)
class Case:
    """A format on an `[n, k]` matrix, with or without a bias."""

    name: str
    spec: CodebookSpec
    n: int
    k: int
    bias: bool = False

    def __str__(self) -> str:
        return self.name

    @functools.cached_property
    def tensor(self) -> QuantizedTensor:
        """The case's weight, the same on every call."""
        return random_tensor(self.spec, self.n, self.k, seed=1, bias=self.bias, fit=False)

    def small(self) -> Case:
        """The same format on a matrix that an interpreter gets through in a second.

        Groups shrink with it, so that it still has several.
        """
        spec, rotation = self.spec, self.spec.rotation_size
        k = spec.side_columns + rotation * -(-64 // rotation) if rotation else min(self.k, 101)
        block = spec.vector_size * spec.stride
        if spec.group_size > 16:
            spec = dataclasses.replace(spec, group_size=-(-16 // block) * block)
        return dataclasses.replace(self, spec=spec, n=min(self.n, 37), k=k)


def conformance_cases() -> list[Case]:
    """Every preset, and every field of CodebookSpec that changes what a product means."""
    return [*preset_cases(), *field_cases()]


def preset_cases() -> list[Case]:
    """n is prime and k no multiple of 64; large codebooks get a matrix that can hold them."""
    cases = []
    for name, spec in PRESETS.items():
        n, k = (1031, 4104) if spec.max_entries > 256 else (269, 896)
        if spec.group_axis == "row":
            n, k = 19, 2088
        cases.append(Case(name, spec, n, k))
    return cases


def field_cases() -> list[Case]:
    """One field at a time on the same two-stage format, then several at once."""

    def vary(name: str, k: int = 416, *, bias: bool = False, **fields: Any) -> Case:
        spec = CodebookSpec.from_dict({**_RESIDUAL.to_dict(), "code_bits": [], **fields})
        return Case(name, spec, 269, k, bias)

    out: dict[str, Any] = {"vector_axis": "out"}
    side: dict[str, Any] = {"outlier_columns": 5, "uniform_columns": 3}
    outlier_book: dict[str, Any] = {"outlier_columns": 4, "outlier_entries": 40}
    outlier_book["outlier_vector_length"] = 12
    return [
        vary("bias", bias=True),
        vary("row-scale-and-zero", scale_axis="row", zero_axis="row"),
        vary("column-scale-and-zero", scale_axis="column", zero_axis="column"),
        vary("tensor-scale-and-zero", scale_axis="tensor", zero_axis="tensor"),
        vary("permuted", permuted=True),
        vary("rotated", rotation_size=32),
        vary("side-columns", **side),
        vary("outlier-codebook", **outlier_book),
        vary("int8-codebook", codebook_dtype="int8"),
        vary("coefficients", coefficients=[1.0, -0.25]),
        vary("stride", stride=4),
        vary("ragged-k", k=421),
        vary("column-groups", group_axis="column", group_size=208, stages=[256, 64]),
        vary("row-groups", group_axis="row", group_size=67, stages=[256, 64]),
        vary("subspaces", subspaces=4, stages=[256, 64]),
        vary("length-4", vector_length=4),
        vary("length-3", vector_length=3, stages=[50, 9]),
        vary("out-length-5", vector_length=5, **out),
        vary("length-32", vector_length=32, stages=[100, 7]),
        vary("mixed-stages", stages=[300, 16, 2], k=512),
        vary("wide", vector_width=2),
        vary(
            "wide-everything",
            k=421,
            bias=True,
            vector_width=3,
            vector_length=4,
            stride=2,
            subspaces=2,
            group_axis="row",
            group_size=66,
            stages=[200, 9],
            scale_axis="row",
            permuted=True,
            **side,
        ),
        vary("out", **out),
        vary("out-length-4", vector_length=4, **out),
        vary("out-stride", stride=3, **out),
        vary("out-subspaces", subspaces=2, **out),
        vary("out-column-groups", group_axis="column", group_size=104, **out),
        vary("out-row-groups", group_axis="row", group_size=136, **out),
        vary(
            "everything-in",
            k=424,
            bias=True,
            scale_axis="column",
            zero_axis="row",
            permuted=True,
            rotation_size=52,
            **side,
        ),
        vary("everything-out", k=424, bias=True, scale_axis="row", permuted=True, **side, **out),
    ]


def prepare(
    kernel: Kernel,
    problem: Problem,
    device: Device,
    tensor: QuantizedTensor,
    config: Config | None = None,
) -> tuple[Run, Packed]:
    """A config (the default where None) compiled, and the weight packed for it, on the CPU."""
    config = kernel.default(problem, device) if config is None else config
    kernel.space.check(config)
    packed = kernel.pack(tensor, config, problem)
    declared = kernel.footprint(config, problem, device).weight_bytes
    assert packed.nbytes <= declared, f"packs {packed.nbytes} bytes, declares {declared}"
    return kernel.compile(config, problem, device), packed


def check_case(
    kernel: Kernel,
    device: Device,
    case: Case,
    m: int,
    *,
    dtype: Dtype = "float32",
    config: Config | None = None,
    place: str | None = None,
) -> bool:
    """Hold a kernel to the oracle on one case; False where it refuses.

    config: the kernel's default where None. place: where tensors go, if not on the device (an
    interpreter's are on the CPU). Raises AssertionError where the output is wrong, or a refusal is
    no sentence.
    """
    problem = Problem(m=m, n=case.n, k=case.k, spec=case.spec, dtype=dtype, bias=case.bias)
    if (reason := kernel.supports(problem, device)) is not None:
        assert len(reason) > 20, f"{kernel.id} refuses {case} without naming the limit: {reason!r}"
        return False
    place = place or device.torch_name
    x = torch.randn(m, case.k, generator=torch.Generator().manual_seed(m)).to(problem.torch_dtype)
    run, packed = prepare(kernel, problem, device, case.tensor, config)
    out = torch.full((m, case.n), float("nan"), dtype=x.dtype).to(place)
    run(packed.to(place), x.to(place), out)
    verdict = oracle.check(
        out.cpu(),
        oracle.reference(case.tensor, x),
        weights=kernel.rounds_to(problem),
        chain=kernel.half_chain,
    )
    assert verdict.passed, f"{kernel.id} on {case}, m={m}, {dtype}: {verdict}"
    return True
