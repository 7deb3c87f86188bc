"""The permutation: a bijection for every n, random to the eye of a statistician, the same for ever."""

from __future__ import annotations

import timeit

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.permutation import permute
from tests.data.helpers import at_any_speed

SEED = st.integers(0, 2**63)
EPOCH = st.integers(0, 10**6)


def order(n: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return permute(np.arange(n), n, seed, epoch)


@pytest.mark.parametrize("n", [*range(1, 130), 255, 256, 257, 1009, 4096, 10007, 65536, 99991])
def test_is_a_bijection(n: int) -> None:
    assert np.array_equal(np.sort(order(n, seed=7, epoch=3)), np.arange(n))


@at_any_speed
@given(n=st.integers(1, 3000), seed=SEED, epoch=EPOCH)
def test_is_a_bijection_for_any_key(n: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(order(n, seed, epoch)), np.arange(n))


@at_any_speed
@given(n=st.integers(2**33, 2**62), seed=SEED)
def test_huge_n_stays_in_range_without_collisions(n: int, seed: int) -> None:
    indices = np.concatenate([np.arange(500), np.arange(n - 500, n)])
    values = permute(indices, n, seed, 0)
    assert values.min() >= 0 and values.max() < n
    assert len(np.unique(values)) == 1000


def test_the_order_never_changes() -> None:
    """Golden values. A change here changes what every existing run reads: it needs a new schema version."""
    assert order(10).tolist() == [5, 1, 6, 7, 3, 0, 8, 2, 4, 9]
    assert order(16, seed=1, epoch=2).tolist() == [6, 12, 11, 14, 5, 9, 7, 4, 15, 13, 0, 3, 1, 10, 2, 8]
    assert permute(np.arange(5), 1_000_003, 42, 0).tolist() == [948509, 220372, 110494, 869319, 96313]
    assert permute(np.array([0, 10**12]), 2**40, 2**63, 9).tolist() == [423061132147, 246829975231]


def reference(index: int, n: int, seed: int, epoch: int) -> int:
    """The construction in plain integers, one index at a time."""
    word, golden = 2**64, 0x9E3779B97F4A7C15
    m1, m2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

    def splitmix(x: int) -> int:
        x = (x ^ x >> 30) * m1 % word
        x = (x ^ x >> 27) * m2 % word
        return x ^ x >> 31

    a = next(a for a in range(int(n**0.5) - 1, n + 1) if a > 0 and a * a >= n)
    b = (n + a - 1) // a
    key = splitmix((epoch + splitmix((seed + golden) % word)) % word)
    while True:
        left, right = index % a, index // a
        for number in range(1, 7):
            other = right if number % 2 else left
            x = (other ^ (key + number * golden) % word) * m1 % word
            x = (x ^ x >> 32) * m2 % word >> 11
            if number % 2:
                left = (left + x) % a
            else:
                right = (right + x) % b
        index = right * a + left
        if index < n:
            return index


@at_any_speed
@given(n=st.one_of(st.integers(1, 30), st.integers(1, 2**40)), seed=SEED, epoch=EPOCH, data=st.data())
def test_is_the_documented_construction(n: int, seed: int, epoch: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, n - 1), max_size=5))
    expected = [reference(index, n, seed, epoch) for index in indices]
    assert permute(np.array(indices, dtype=np.int64), n, seed, epoch).tolist() == expected


@at_any_speed
@given(n=st.integers(1, 10**9), seed=SEED, data=st.data())
def test_each_index_stands_for_itself(n: int, seed: int, data: st.DataObject) -> None:
    """A batch of indices of several epochs gives what each gives alone."""
    indices = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=6)), dtype=np.int64)
    epochs = np.array([data.draw(EPOCH) for _ in indices], dtype=np.int64)
    together = permute(indices, n, seed, epochs)
    alone = [permute(np.array([i]), n, seed, int(e))[0] for i, e in zip(indices, epochs, strict=True)]
    assert together.tolist() == alone


def test_seeds_and_epochs_give_unrelated_orders() -> None:
    n = 2000
    orders = [order(n, seed, epoch) for seed in range(6) for epoch in range(6)]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            # two random permutations agree in 1 place on average (Poisson); P(more than 10) is 1e-8
            assert np.sum(first == second) <= 10
            assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(n)


@pytest.mark.parametrize("n", [1000, 38126, 65536])
def test_no_visible_order(n: int) -> None:
    """Serial correlations are those of a random order (standard deviation 1/√n), and no stretch is kept."""
    p = order(n, seed=3)
    for lag in (1, 2, 3, 7, 8, 16, 64, 256):
        assert abs(np.corrcoef(p[lag:], p[:-lag])[0, 1]) < 5 / np.sqrt(n)
    assert abs(np.corrcoef(p, np.arange(n))[0, 1]) < 5 / np.sqrt(n)
    steps = np.diff(p)
    assert np.unique(steps, return_counts=True)[1].max() < 20  # a linear order repeats one step


@pytest.mark.parametrize("n", [53, 100])
def test_every_index_goes_everywhere_equally_often(n: int) -> None:
    """χ² of where each index goes over many seeds; its mean is (n−1)² with standard deviation √2·(n−1)."""
    seeds = 60 * n
    counts = np.zeros((n, n))
    for seed in range(seeds):
        counts[np.arange(n), order(n, seed)] += 1
    chi_square = np.sum((counts - seeds / n) ** 2) / (seeds / n)
    assert abs(chi_square - (n - 1) ** 2) < 6 * np.sqrt(2) * (n - 1)


def test_neighbours_land_in_all_pairs_of_regions() -> None:
    """χ² of the pair (region of p[k], region of p[k+1]) over 16 × 16 regions of the corpus."""
    n = 38126
    region = order(n, seed=11) * 16 // n
    counts = np.zeros((16, 16))
    np.add.at(counts, (region[:-1], region[1:]), 1)
    expected = (n - 1) / 256
    chi_square = np.sum((counts - expected) ** 2) / expected
    assert abs(chi_square - 255) < 6 * np.sqrt(2 * 255)


@at_any_speed
@given(seed=SEED)
def test_no_fixed_stretch_of_the_source(seed: int) -> None:
    """The first 32 sequences of an order come from all over the corpus."""
    first = permute(np.arange(32), 38126, seed, 0)
    assert first.max() - first.min() > 38126 // 2


def test_costs_far_less_than_100_microseconds() -> None:
    indices = np.arange(8)
    seconds = min(timeit.repeat(lambda: permute(indices, 38126, 0, 0), number=200, repeat=5)) / 200
    assert seconds < 200e-6  # about 50 µs on a quiet machine; the bound leaves room for a loaded one
