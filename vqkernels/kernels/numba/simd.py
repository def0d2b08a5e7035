"""SIMD vectors as values in numba code: load, store, fused multiply-add, shuffles.

numba leaves vectors to LLVM's loop vectoriser, which turns table lookups into gather
instructions (slower than scalar loads on Zen 4) and keeps no vector accumulator across an outer
loop. These intrinsics state the vectors instead; LLVM splits a width that the CPU lacks.

Widths are Python ints that numba sees as constants: closure variables of the kernel's factory.
All loads and stores are 4-byte aligned, unchecked, on contiguous fp32 arrays, by flat index:
the packing that made the arrays vouches for the bounds.
"""

# mypy: ignore-errors
# numba calls these with compile-time types and IR builders; annotations would say Any throughout.

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

__all__ = [
    "add",
    "broadcast",
    "fma",
    "load",
    "part",
    "prefetch",
    "repeat",
    "spread",
    "store",
    "sum_lanes",
    "zero",
]

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)


class VectorType(types.Type):
    """`width` fp32 lanes in one SSA value."""

    def __init__(self, width):
        self.width = width
        super().__init__(name=f"Vector({width})")


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, ir.VectorType(_FLOAT, vector.width))


def _constant(value):
    # numba tries literal types first, then plain ones; None declines the second try
    return value.literal_value if isinstance(value, types.IntegerLiteral) else None


def _pointer(context, builder, array_type, array, index, pointee):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), pointee.as_pointer())


def _shuffle(builder, value, lanes):
    mask = ir.Constant(ir.VectorType(_INT, len(lanes)), list(lanes))
    return builder.shuffle_vector(value, value, mask)


@intrinsic
def zero(typing, width):
    """A vector of zeros."""
    if (count := _constant(width)) is None:
        return None
    vector = VectorType(count)

    def codegen(context, builder, signature, args):
        return ir.Constant(ir.VectorType(_FLOAT, count), None)

    return vector(width), codegen


@intrinsic
def load(typing, array, index, width):
    """`array[index : index + width]` as a vector."""
    if (count := _constant(width)) is None:
        return None
    vector = VectorType(count)

    def codegen(context, builder, signature, args):
        kind = ir.VectorType(_FLOAT, count)
        loaded = builder.load(_pointer(context, builder, array, args[0], args[1], kind))
        loaded.align = 4
        return loaded

    return vector(array, types.intp, width), codegen


@intrinsic
def store(typing, array, index, vector):
    """Write a vector at `array[index]` and on."""

    def codegen(context, builder, signature, args):
        pointer = _pointer(context, builder, array, args[0], args[1], args[2].type)
        builder.store(args[2], pointer).align = 4
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), codegen


@intrinsic
def prefetch(typing, array, index):
    """Ask for the cache line of `array[index]`; an index past the end is harmless."""

    def codegen(context, builder, signature, args):
        byte = ir.IntType(8).as_pointer()
        signature_type = ir.FunctionType(ir.VoidType(), [byte, _INT, _INT, _INT])
        function = cgutils.get_or_insert_function(
            builder.module, signature_type, "llvm.prefetch.p0"
        )
        pointer = _pointer(context, builder, array, args[0], args[1], byte.pointee)
        # for reading, into all levels, data
        builder.call(function, [pointer, _INT(0), _INT(3), _INT(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), codegen


@intrinsic
def fma(typing, a, b, c):
    """`a * b + c`, rounded once."""

    def codegen(context, builder, signature, args):
        kind = args[0].type
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(kind, [kind] * 3), f"llvm.fma.v{a.width}f32"
        )
        return builder.call(function, args)

    return a(a, b, c), codegen


@intrinsic
def add(typing, a, b):
    """`a + b`, lane by lane."""

    def codegen(context, builder, signature, args):
        return builder.fadd(*args)

    return a(a, b), codegen


@intrinsic
def broadcast(typing, value, width):
    """A vector with `value` in every lane."""
    if (count := _constant(width)) is None:
        return None

    def codegen(context, builder, signature, args):
        empty = ir.Constant(ir.VectorType(_FLOAT, count), ir.Undefined)
        return _shuffle(builder, builder.insert_element(empty, args[0], _INT(0)), [0] * count)

    return VectorType(count)(types.float32, width), codegen


@intrinsic
def repeat(typing, vector, times):
    """The whole vector, `times` over: a b a b."""
    if (count := _constant(times)) is None:
        return None

    def codegen(context, builder, signature, args):
        return _shuffle(builder, args[0], list(range(vector.width)) * count)

    return VectorType(vector.width * count)(vector, times), codegen


@intrinsic
def spread(typing, vector, times):
    """Each lane `times` over: a a b b."""
    if (count := _constant(times)) is None:
        return None

    def codegen(context, builder, signature, args):
        lanes = [lane for lane in range(vector.width) for _ in range(count)]
        return _shuffle(builder, args[0], lanes)

    return VectorType(vector.width * count)(vector, times), codegen


@intrinsic
def part(typing, vector, number, width):
    """Lanes `number * width` to `number * width + width - 1`; `number` may be a variable."""
    if (count := _constant(width)) is None:
        return None

    def codegen(context, builder, signature, args):
        kind = ir.VectorType(_FLOAT, count)
        slot = cgutils.alloca_once(builder, args[0].type)
        builder.store(args[0], slot)
        # by lanes, not by vectors: LLVM pads a vector of 3 to 16 bytes in an array
        lanes = builder.bitcast(slot, _FLOAT.as_pointer())
        first = builder.gep(lanes, [builder.mul(args[1], args[1].type(count))])
        loaded = builder.load(builder.bitcast(first, kind.as_pointer()))
        loaded.align = 4
        return loaded

    return VectorType(count)(vector, types.intp, width), codegen


@intrinsic
def sum_lanes(typing, vector):
    """The sum of all lanes, by halves, in a fixed order."""

    def codegen(context, builder, signature, args):
        value, width = args[0], vector.width
        while width > 1:
            half = width // 2
            low = _shuffle(builder, value, range(half))
            high = _shuffle(builder, value, range(half, 2 * half))
            rest = _shuffle(builder, value, [width - 1]) if width % 2 else None
            value = builder.fadd(low, high)
            if rest is not None:
                first = builder.extract_element(value, _INT(0))
                first = builder.fadd(first, builder.extract_element(rest, _INT(0)))
                value = builder.insert_element(value, first, _INT(0))
            width = half
        return builder.extract_element(value, _INT(0))

    return types.float32(vector), codegen
