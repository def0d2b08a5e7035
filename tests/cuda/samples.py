"""Small kernels for the tests of the harness: their text, and how one is run."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.cuda.harness import Library, Report, Source, build

HEADER = """
using namespace vq;
struct Given {
    const void* in;
    void* out;
    int n;
};
"""


class Given(ctypes.Structure):
    _fields_ = (("given", ctypes.c_void_p), ("out", ctypes.c_void_p), ("n", ctypes.c_int32))


@dataclasses.dataclass(frozen=True)
class Sample:
    """The body of a kernel of `in` and `out`, whose elements are of these types.

    A comment at a line's end marks it: `// here`.
    """

    body: str
    given: str = "float"
    out: str = "float"

    def text(self, name: str) -> str:
        return "\n".join(
            (
                f'extern "C" __global__ void {name}(const Given a) {{',
                f"const auto in = global(static_cast<const {self.given}*>(a.in));",
                f"const auto out = global(static_cast<{self.out}*>(a.out));",
                "const int t = int(threadIdx.x);",
                self.body,
                "}",
            )
        )

    def line(self, mark: str) -> int:
        lines = self.text("").splitlines()
        return 1 + next(i for i, line in enumerate(lines) if line.endswith(f"// {mark}"))


@dataclasses.dataclass(frozen=True)
class Samples:
    """Kernels built as one unit."""

    library: Library
    names: tuple[str, ...]

    def run(
        self, name: str, given: Tensor, out: Tensor, *, n: int | None = None, **options: Any
    ) -> Report:
        def arguments(tensors: Mapping[str, Tensor]) -> Given:
            count = given.numel() if n is None else n
            return Given(tensors["in"].data_ptr(), tensors["out"].data_ptr(), count)

        buffers = {"in": given, "out": out}
        return self.library.run(self.names.index(name), arguments, buffers, **options)


def build_samples(samples: Mapping[str, Sample]) -> Samples:
    sources = [Source(s.text(name), name, f"{name}.cu") for name, s in samples.items()]
    first = Source(f"{HEADER}\n#line 1\n{sources[0].text}", sources[0].entry, sources[0].name)
    return Samples(build([first, *sources[1:]]), tuple(samples))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
