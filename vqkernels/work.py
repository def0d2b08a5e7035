"""Work: what a config makes a GPU do, counted from its geometry before anything is compiled.

A kernel's `work` names the launches of a call in order, each with what it moves and issues. Nothing
here is a time: `autotune.predict` holds counts against a device's rates.
"""

from __future__ import annotations

import dataclasses

__all__ = ["Work"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """One launch; totals of all its blocks, expected values where codes decide.

    hbm_bytes: from and to main memory: what is stored, once each, and what outgrows the L2.
    l2_bytes: between the L2 and the multiprocessors, in whole sectors of 32 bytes.
    wavefronts: accesses of 128 bytes to the memory that L1 and shared memory are, bank conflicts
        counted; a warp's 16-byte access is 4 at least.
    instructions: that warps issue.
    tensor_flops: of the tensor cores, padding included; operands in `tensor_dtype`, a key of
        `Device.flops`.
    blocks, warps: of the grid; of a block.
    registers, shared_bytes: of a thread, about; of a block. They bound the blocks that a
        multiprocessor holds at once.
    hbm_trips, l2_trips, shared_trips: accesses of one warp to each level (shared: L1 too) that wait
        for one another, from its first instruction to its last.
    """

    hbm_bytes: float
    l2_bytes: float
    wavefronts: float
    instructions: float
    blocks: int
    warps: int
    tensor_flops: float = 0.0
    tensor_dtype: str = "float16"
    registers: int = 32
    shared_bytes: int = 0
    hbm_trips: float = 1.0
    l2_trips: float = 0.0
    shared_trips: float = 0.0

    def __post_init__(self) -> None:
        assert self.blocks >= 1 and 1 <= self.warps <= 32, (self.blocks, self.warps)
        counts = (self.hbm_bytes, self.l2_bytes, self.wavefronts, self.instructions)
        assert min(*counts, self.tensor_flops) >= 0, self

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.warps
