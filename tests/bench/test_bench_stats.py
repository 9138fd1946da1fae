"""The statistics, against formulas written another way."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import stats

numbers = st.floats(-1e3, 1e3, allow_nan=False)
samples = st.lists(numbers, min_size=1, max_size=12)
rates = st.floats(0, 1)


@given(samples)
def test_iqm_is_the_mean_of_the_middle_half_of_four_copies(values: list[float]) -> None:
    middle = np.sort(np.repeat(values, 4))[len(values) : 3 * len(values)]
    assert stats.iqm(values) == pytest.approx(middle.mean(), abs=1e-9)


def test_the_median_of_five_has_the_range_as_its_interval() -> None:
    # Three or more of five draws hit the extreme value with probability 0.058, more than either tail.
    assert stats.bootstrap([3.0, 1.0, 4.0, 1.5, 9.0]) == (1.0, 9.0)


@pytest.mark.parametrize("n", [7, 11, 21])
def test_the_bootstrap_agrees_with_the_exact_distribution_of_the_resampled_median(n: int) -> None:
    def at_most(rank: int) -> float:
        """P(the median of n draws is at most the value of this rank): n // 2 + 1 draws must be."""
        p = rank / n
        return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n // 2 + 1, n + 1))

    low, high = stats.bootstrap(list(range(1, n + 1)))
    assert at_most(int(low)) >= 0.02
    assert at_most(int(low) - 1) <= 0.03
    assert at_most(int(high)) >= 0.97
    assert at_most(int(high) - 1) <= 0.98


@given(samples, st.floats(0.1, 10), numbers)
def test_the_interval_follows_a_change_of_units(values: list[float], scale: float, shift: float) -> None:
    moved = stats.bootstrap([scale * value + shift for value in values])
    expected = [scale * end + shift for end in stats.bootstrap(values)]
    assert moved == pytest.approx(expected, abs=1e-6)


@given(samples)
def test_p_improvement_counts_wins_and_half_of_the_ties(values: list[float]) -> None:
    wins = sum(value > 0 for value in values) + sum(value == 0 for value in values) / 2
    assert stats.p_improvement(values) == pytest.approx(wins / len(values))


@given(st.integers(1, 500), st.data())
def test_binomial_se_is_the_deviation_of_the_mean_of_the_cases(count: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, count))
    cases = np.repeat([1.0, 0.0], [right, count - right])
    assert stats.binomial_se(right / count, count) == pytest.approx(cases.std() / math.sqrt(count), abs=1e-12)


@given(st.dictionaries(st.floats(1e-5, 1), rates, min_size=1, max_size=9), st.integers(10, 10_000))
def test_one_se_takes_the_smallest_key_that_is_good_enough(scores: dict[float, float], count: int) -> None:
    best = max(scores.values())
    bar = best - math.sqrt(best * (1 - best) / count)
    chosen = stats.one_se(scores, count)
    assert scores[chosen] >= bar
    assert all(score < bar for key, score in scores.items() if key < chosen)
