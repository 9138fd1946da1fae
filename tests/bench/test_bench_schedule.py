"""Schedules are what their text says."""

import math

import pytest

from bench.schedule import factor


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("cosine", (1, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4, 0)),
        ("constant", (1, 1, 1, 1, 1)),
        ("wsd", (1, 1, 1, 1, 0)),
        ("step", (1, 1, 0.1, 0.01, 0.01)),
        ("step 0.75", (1, 1, 1, 0.1, 0.1)),
        ("linear 0:0.2 0.5:1 1:0.07", (0.2, 0.6, 1, 0.535, 0.07)),
        ("linear 0:1 1:0", (1, 0.75, 0.5, 0.25, 0)),
    ],
)
def test_factors(schedule: str, factors: tuple[float, ...]) -> None:
    assert [factor(schedule, place / 4) for place in range(5)] == pytest.approx(factors)


@pytest.mark.parametrize(
    "text",
    ["cosin", "cosine 1", "constant 0.5", "step 1.5", "step 0.5:2", "step 0.8 0.5", "linear", "linear 0:1",
     "linear 0 1", "linear 0:1 0.5:x 1:0", "linear 0:1 1:-1", "linear 0.1:1 1:0", "step 0.5 0.5", "wsd 0.1"],
)  # fmt: skip
def test_what_is_no_schedule_is_refused_with_those_that_are(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a schedule; these are: cosine, constant"):
        factor(text, 0.5)
