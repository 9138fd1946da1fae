"""The benchmark of the accountant: it runs, and its attack is one."""

import math
from pathlib import Path

import numpy as np
import pytest

from bench import privacy


def test_it_runs_and_the_attack_refutes_the_code_and_not_the_theorem(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("dp_accounting")
    monkeypatch.chdir(tmp_path)
    assert privacy.main(["--quick", "--plot", "noise.svg"]) == 0
    assert "claimed" in Path("noise.svg").read_text()
    out = capsys.readouterr().out
    rows = [
        [float(cell) for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith(("| 0", "| 1"))
    ]
    assert [row[0] for row in rows] == [0, 1]
    for _, quick, tight, ratio, ours, _, broken, theorem in rows:
        assert tight < quick
        assert 0 < ours < 2  # what was asked for
        assert 0 < broken < theorem
        assert ratio >= 1
    assert rows[1][6] > 10  # with the code's noise the claim of 2 is false
    assert "`python -m bench.privacy --quick --plot noise.svg`" in out


def test_the_attack_is_as_strong_as_a_simulation_says() -> None:
    noise, clip, error, rate, steps, delta = 4.0, 1.0, 1.0, 0.1, 21, 1e-3
    draw = np.random.default_rng(0)
    found = privacy.attack(noise, clip, error, rate, steps, delta)
    runs, steps = 200_000, steps - 1
    sampled = draw.random((runs, steps)) < rate
    # The first step is the others'. The error term moves from -C2 to C2 after the first step that has the record.
    before = np.cumsum(sampled, 1) - sampled > 0
    scores = (clip * sampled + 2 * error * before).sum(1) + draw.normal(size=runs) * noise * math.sqrt(steps)
    nothing = draw.normal(size=runs) * noise * math.sqrt(steps)
    best = 0.0
    for threshold in np.linspace(0, 50, 51):
        false, true = ((side > threshold).mean() for side in (nothing, scores))
        if false > 100 / runs:
            best = max(best, math.log(max(true - delta, 1e-12) / false))
    # The simulation also counts later samples of the record, and sees no thresholds that are hardly ever passed.
    assert 0.9 * best < found < 3 * best
