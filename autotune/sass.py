"""SASS, as nvdisasm lists it: instructions, the loops among them, and what the hot one moves."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

__all__ = ["Instruction", "Traffic", "functions", "hot_loop", "target", "traffic"]

_LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"(\.L\w+):\s*$")
_JUMP = re.compile(r"`\((\.L\w+)\)")
_SECTION = re.compile(r"\s*\.section\s+\.text\.([^\s,]+)")
# Older formats write it among the header's flags.
_TARGET = re.compile(r"\s*\.(?:target\s+sm_|headerflags\s.*?\bEF_CUDA_SM)(\d+)")

# Shared memory to registers counts as shared, global to shared (LDGSTS) as global.
_GLOBAL = ("LDG", "LDGSTS")
_SHARED = ("LDS", "LDSM")
# Tensor cores by data type, per warp (HMMA), warpgroup (HGMMA) or block (UTCHMMA). HFMA2.MMA is an
# ordinary half-precision FMA.
_TENSOR = re.compile(r"(UTC)?[A-Z]{1,2}MMA(\.|$)")
_NEVER = ("!PT", "!UPT")  # such an instruction is padding


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: `opcode` with its suffixes, guard (`P0`, `!UP1` or None), operands.

    goes_to: the index of the instruction that it may jump to.
    """

    opcode: str
    guard: str | None
    operands: str
    goes_to: int | None = None

    @property
    def name(self) -> str:
        """The opcode without suffixes."""
        return self.opcode.partition(".")[0]

    @property
    def access_bytes(self) -> int:
        """Bytes that a load or store moves for one thread; 4 where no suffix says otherwise."""
        suffixes = self.opcode.split(".")[1:]
        if self.name == "LDSM":  # matrices of 8x8 halves: a register a thread each
            return 4 * next((int(s) for s in suffixes if s in ("2", "4")), 1)
        bits = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
        return next((bits[s] // 8 for s in reversed(suffixes) if s in bits), 4)

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow."""
        if self.guard is not None:
            return True
        conditional = self.name == "BRA" and re.match(r"!?U?P\d", self.operands) is not None
        return conditional or self.name not in ("BRA", "JMP", "BRX", "JMX", "EXIT", "RET")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What some instructions move. Loads: how many of each width, in bytes a thread.

    tensor: tensor-core instructions by opcode. local_*_bytes: a thread's stores to and loads from
    local memory, each instruction once: what was spilled.
    """

    instructions: int
    global_loads: Mapping[int, int]
    shared_loads: Mapping[int, int]
    tensor: Mapping[str, int]
    local_store_bytes: int
    local_load_bytes: int


def target(listing: str) -> str | None:
    """The architecture of a listing, `sm_90`."""
    found = (_TARGET.match(line) for line in listing.splitlines())
    return next((f"sm_{match.group(1)}" for match in found if match), None)


def functions(listing: str) -> dict[str, list[Instruction]]:
    """The instructions of each function of `nvdisasm -c`."""
    texts: dict[str, list[str]] = {}
    current: list[str] = []
    for line in listing.splitlines():
        if match := _SECTION.match(line):
            current = texts.setdefault(match.group(1), [])
        elif re.match(r"\s*\.section\s", line):
            current = []
        current.append(line)
    return {name: _instructions(lines) for name, lines in texts.items()}


def _instructions(lines: Sequence[str]) -> list[Instruction]:
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in lines:
        if match := _LABEL.match(line):
            labels[match.group(1)] = len(found)
        elif match := _LINE.match(line):
            found.append(Instruction(match.group(2), match.group(1), match.group(3)))
    return [_linked(instruction, labels) for instruction in found]


def _linked(instruction: Instruction, labels: Mapping[str, int]) -> Instruction:
    """With the jump resolved. On sm_80 a guarded call to a plain label is how loops are left."""
    if instruction.name not in ("BRA", "JMP") and not (
        instruction.name == "CALL" and instruction.guard
    ):
        return instruction
    match = _JUMP.search(instruction.operands)
    return dataclasses.replace(instruction, goes_to=labels.get(match.group(1)) if match else None)


def traffic(instructions: Iterable[Instruction]) -> Traffic:
    """Count what `instructions` move."""
    run = [i for i in instructions if i.guard not in _NEVER]
    return Traffic(
        instructions=len(run),
        global_loads=Counter(i.access_bytes for i in run if i.name in _GLOBAL),
        shared_loads=Counter(i.access_bytes for i in run if i.name in _SHARED),
        tensor=Counter(i.opcode for i in run if _TENSOR.match(i.opcode)),
        local_store_bytes=sum(i.access_bytes for i in run if i.name == "STL"),
        local_load_bytes=sum(i.access_bytes for i in run if i.name == "LDL"),
    )


def hot_loop(instructions: Sequence[Instruction]) -> list[Instruction]:
    """The innermost loop with the most memory and tensor instructions; all where none loops.

    A loop without any, which waits for a barrier, is no loop here.
    """
    loops = [loop for loop in _loops(instructions) if _busy(instructions, loop)]
    inner = [loop for loop in loops if not any(other < loop for other in loops)]
    if not inner:
        return list(instructions)
    hot = max(inner, key=lambda loop: _busy(instructions, loop))
    return [instructions[index] for index in sorted(hot)]


def _busy(instructions: Sequence[Instruction], indices: Iterable[int]) -> int:
    found = traffic(instructions[index] for index in indices)
    counts = (found.global_loads, found.shared_loads, found.tensor)
    return sum(sum(count.values()) for count in counts)


def _loops(instructions: Sequence[Instruction]) -> list[frozenset[int]]:
    """Natural loops: of a jump to an instruction that lies on every way to the jump.

    A jump back alone is none: compilers move rare blocks to the end, and these jump back too.
    """
    before: list[list[int]] = [[] for _ in instructions]
    for index, instruction in enumerate(instructions):
        if instruction.falls_through and index + 1 < len(instructions):
            before[index + 1].append(index)
        if instruction.goes_to is not None and instruction.goes_to < len(instructions):
            before[instruction.goes_to].append(index)
    bodies: dict[int, set[int]] = {}
    for index, instruction in enumerate(instructions):
        head = instruction.goes_to
        if head is None or head > index:
            continue
        body = _reaching(index, head, before)
        # the start of the program reaches the jump without the head: not on every way
        if head == 0 or 0 not in body:
            bodies.setdefault(head, set()).update(body)
    return [frozenset(body) for body in bodies.values()]


def _reaching(tail: int, head: int, before: Sequence[Sequence[int]]) -> set[int]:
    """What reaches `tail` without passing `head`, and both."""
    body, waiting = {head, tail}, [tail] if tail != head else []
    while waiting:
        for index in before[waiting.pop()]:
            if index not in body:
                body.add(index)
                waiting.append(index)
    return body
