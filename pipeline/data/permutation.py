"""The order of an epoch: a keyed bijection on [0, n) that needs no memory.

A shuffled index list costs 8 bytes per sequence and a pass over all of it before the first step; this costs
some arithmetic per position asked for (about 50 µs for any few of them), at any n.

Construction: the generalised Feistel cipher with cycle walking of J. Black and P. Rogaway, "Ciphers with
Arbitrary Finite Domains", CT-RSA 2002 (methods 2 and 3). With a = ⌈√n⌉ and b = ⌈n/a⌉ an index is written
x = R·a + L with L in Z_a and R in Z_b. Rounds alternate

    L ← (L + F_k(R)) mod a        R ← (R + F_k(L)) mod b

and each is undone by subtraction whatever F is, so their composition is a bijection on [0, a·b). Since
a·b − n < a, at most about one result in √n lands outside [0, n); it goes through the cipher again until it
falls inside. The cycle of the bijection through an index of [0, n) returns to [0, n), so this ends, and
following it that far is a bijection on [0, n).

F is an integer mixer, not a cipher: the order must look random to a statistical test, not to an adversary.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6  # an even number leaves both halves in their places
_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # of splitmix64 (Steele, Lea, Flood 2014), as are the multipliers
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)


def permute(
    indices: NDArray[np.int64], n: int, seed: int, epoch: int | NDArray[np.int64]
) -> NDArray[np.int64]:
    """Where the indices [k], each in [0, n), go under `seed` and `epoch` (one, or one per index)."""
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    keys = _mix(np.atleast_1d(np.asarray(epoch)).astype(np.uint64) + _mix_scalar(seed))
    keys = np.broadcast_to(keys, indices.shape)
    values = _feistel(indices.astype(np.uint64), np.uint64(a), np.uint64(b), keys)
    outside = np.flatnonzero(values >= np.uint64(n))
    while outside.size:
        values[outside] = _feistel(values[outside], np.uint64(a), np.uint64(b), keys[outside])
        outside = outside[values[outside] >= np.uint64(n)]
    return values.astype(np.int64)


def _feistel(
    values: NDArray[np.uint64], a: np.uint64, b: np.uint64, keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """The bijection on [0, a·b), of values [k] under keys [k]."""
    here, there = values % a, values // a
    here_size, there_size = a, b
    for number in range(1, _ROUNDS + 1):
        x = there ^ (keys + np.uint64(number * _GOLDEN & _MASK))
        x *= _MULTIPLIER_1
        x ^= x >> np.uint64(32)
        x *= _MULTIPLIER_2
        x >>= np.uint64(11)  # the high bits are the mixed ones; 53 bits leave room for the sum
        x += here
        x %= here_size
        here, there, here_size, there_size = there, x, there_size, here_size
    return there * a + here


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64, element by element."""
    x = (x ^ (x >> np.uint64(30))) * _MULTIPLIER_1
    x = (x ^ (x >> np.uint64(27))) * _MULTIPLIER_2
    return x ^ (x >> np.uint64(31))


def _mix_scalar(seed: int) -> np.uint64:
    """The same of seed + golden ratio: consecutive seeds get keys far apart, and 0 is no fixed point."""
    start = np.array([(seed + _GOLDEN) & _MASK], dtype=np.uint64)
    return np.uint64(_mix(start)[0])
