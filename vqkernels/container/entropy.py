"""The codes of one stage by range ANS (asymmetric numeral systems, Duda 2013).

Of a stage with `n` entries (2 at least), `u[i]` is how often entry `i` occurs among its `N` codes,
and `U[i] = u[0] + ... + u[i-1]`. Entry `i` owns the interval from `F[i]` to `F[i+1]` of 2^24 slots,

    F[i] = i + floor(U[i] * (2^24 - n) / N)

so that an entry that never occurs has one slot, and `F[n] = 2^24`. The stream is unsigned 32-bit
words, the last of which is not 0. Decoding starts at its end:

    state = 0; take up to two words from the end: state = state * 2^32 + word
    for each code, in order:
        q = state mod 2^24;  the code is the i with F[i] <= q < F[i+1]
        state = (F[i+1] - F[i]) * floor(state / 2^24) + q - F[i]
        if state < 2^32 and words are left: state = state * 2^32 + the last of them, taken off

After the last code no word is left and the state is 0, and each entry has come up `u[i]` times: a
stream of which that isn't true is damaged. Encoding is the inverse. Both are done by the
`constriction` library, whose AnsCoder and Categorical model these are.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqkernels.errors import BackendError, ContainerError

__all__ = ["decode", "encode", "require"]

_SLOTS = 1 << 24
_PIECE = 1 << 18  # symbols decoded at once


def encode(symbols: NDArray[np.int32], counts: NDArray[np.int64]) -> NDArray[np.uint32]:
    """The words of a stream of `symbols`, of which `counts: [entries]` says how often each occurs.

    Raises BackendError where constriction isn't installed.
    """
    library = require()
    coder = library.stream.stack.AnsCoder()
    coder.encode_reverse(symbols, _model(library, counts))
    words: NDArray[np.uint32] = coder.get_compressed()
    return words


def decode(
    words: NDArray[np.uint32], counts: NDArray[np.int64], number: int, where: str
) -> NDArray[np.uint16]:
    """The first `number` symbols of a stream, which must be all of it.

    They are below `len(counts)`, 65,536 at most, whatever is in `words`. Raises ContainerError,
    which starts with `where`, for a stream that isn't used up exactly, BackendError where
    constriction isn't installed.
    """
    library = require()
    if len(words) and not words[-1]:
        raise ContainerError(f"{where} ends in a zero")
    coder = library.stream.stack.AnsCoder(words)
    model, symbols = _model(library, counts), np.empty(number, np.uint16)
    # a piece at a time: the library gives 32 bits a symbol
    for start in range(0, number, _PIECE):
        stop = min(start + _PIECE, number)
        symbols[start:stop] = coder.decode(model, stop - start)
    if not coder.is_empty():
        raise ContainerError(f"{where} is not of {number:,} codes with this usage")
    return symbols


def require() -> ModuleType:
    """The constriction package; BackendError where it isn't installed."""
    try:
        import constriction
    except ImportError as error:
        raise BackendError(
            "entropy-coded codes need the package constriction: pip install 'vqbench[entropy]'"
        ) from error
    module: ModuleType = constriction
    return module


def _model(library: Any, counts: NDArray[np.int64]) -> Any:
    """constriction's model with the slots above.

    Of probabilities that are whole numbers and sum to 2^24 - n, `perfect=False` gives each entry
    as many slots, and one more.
    """
    before = np.concatenate([[0], np.cumsum(counts)])
    edges = before * (_SLOTS - len(counts)) // before[-1]
    return library.stream.model.Categorical(np.diff(edges).astype(np.float64), perfect=False)
