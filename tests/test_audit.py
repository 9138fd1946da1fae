"""The audit finds nothing in DPSGD and DiceSGD, and finds each of the bugs that are planted.

``pytest --thorough tests/test_audit.py`` takes minutes and looks closer.
"""

from __future__ import annotations

import audit
import pytest
import torch

from optimzoo import DPSGD, DiceSGD

ERROR = 0.5
MAKERS = {
    "DPSGD": lambda params, **options: DPSGD(params, **options),
    "DPSGD-automatic": lambda params, **options: DPSGD(params, clipping="automatic", **options),
    "DiceSGD": lambda params, **options: DiceSGD(params, error_norm_sum=ERROR, **options),
    "DiceSGD-capped": lambda params, **options: DiceSGD(params, error_norm_sum=ERROR, windup_cap=True, **options),
}
LEVEL = 1e-4


class Bug:
    """Put before DPSGD or DiceSGD among the bases of a class."""


class HalfNoise(Bug):
    def _release(self, param, clipped, fed_back):
        self.noise_std_sum /= 2
        try:
            return super()._release(param, clipped, fed_back)
        finally:
            self.noise_std_sum *= 2


class NoClip(Bug):
    def _weights(self, samples):
        return super()._weights(samples).sum(0, keepdim=True).repeat(2, 1) * torch.tensor([[1.0], [0.0]])


class NotFinite(Bug):
    def _weights(self, samples):
        weights = super()._weights(samples)
        return torch.where((weights == 0).all(0), torch.nan, weights)


class ReleasesError(Bug):
    def _shares(self, params):
        return 1.0, 0.0


class NormOfEach(Bug):
    def _add(self, samples):
        sums = {}
        for param, own in samples.items():
            sums |= super()._add({param: own})
        return sums


class ErrorOfEach(Bug):
    def _release(self, param, clipped, fed_back):
        return super()._release(param, clipped, self._shares([param])[0])


class MeanUnits(Bug):
    def _shares(self, params):
        self._error_norm *= self.expected_batch_size
        try:
            return super()._shares(params)
        finally:
            self._error_norm /= self.expected_batch_size


class QuietParameter(Bug):
    def _draws(self, param):
        return param is self.param_groups[0]["params"][0]


class SharedNoise(Bug):
    def _record(self):
        super()._record()
        self._noise._generator = None

    def _release(self, param, clipped, fed_back):
        if self._noise._generator is None:
            self.seed = int(torch.randint(2**31, ()))
        self._noise._generator = torch.Generator().manual_seed(self.seed)
        return super()._release(param, clipped, fed_back)


class ActualBatch(Bug):
    def _samples(self, empty, pending):
        found = super()._samples(empty, pending)
        self.expected_batch_size = max(1, next((chunks[0].shape[0] for chunks in found.values()), 1))
        return found


class QuietWhenEmpty(Bug):
    def step(self, closure=None, *, empty=False):
        samples = self.param_groups[0]["params"][0].grad_sample if not empty else []
        before, self.noise_std_sum = self.noise_std_sum, self.noise_std_sum if len(samples) else 0.0
        try:
            return super().step(closure, empty=empty)
        finally:
            self.noise_std_sum = before


class FixedSeed(Bug):
    def __init__(self, *args, **options):
        super().__init__(*args, **{"generator": torch.Generator().manual_seed(0), **options})


class SameEveryStep(Bug):
    def _release(self, param, clipped, fed_back):
        self._noise._generator = torch.Generator().manual_seed(id(self) % 2**31)
        return super()._release(param, clipped, fed_back)


def planted(bug, base=DiceSGD):
    cls = type(bug.__name__, (bug, base), {})
    error = {"error_norm_sum": ERROR} if base is DiceSGD else {}
    return lambda params, **options: cls(params, **error, **options)


makers = pytest.mark.parametrize("name", MAKERS)


def error_of(name):
    return ERROR if "Dice" in name else 0.0


@makers
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_record_changes_no_release_by_more_than_its_bound(name, dtype, thorough):
    assert audit.sensitivity(MAKERS[name], error_of(name), 60 if thorough else 6, dtype) <= 1 + 1e-12


@pytest.mark.parametrize("bug", [NoClip, NotFinite, ReleasesError, NormOfEach, ErrorOfEach, MeanUnits])
def test_the_audit_of_sensitivity_finds(bug):
    assert audit.sensitivity(planted(bug), ERROR, 6) > 1.1


@makers
def test_a_release_does_not_depend_on_the_number_of_samples(name):
    assert audit.batch_size_shows(MAKERS[name]) == 0


def test_the_audit_finds_a_divisor_from_the_batch():
    assert audit.batch_size_shows(planted(ActualBatch)) > 0.1


@makers
def test_the_noise_has_the_law_that_is_claimed(name, thorough):
    seeds, steps = (100, 40) if thorough else (4, 8)
    assert audit.noise_p_value(MAKERS[name], seeds=seeds, steps=steps) > LEVEL


def test_the_secure_noise_has_the_law_that_is_claimed(thorough):
    make = lambda params, **options: DPSGD(params, noise_source="secure", **options)  # noqa: E731
    assert audit.noise_p_value(make, seeds=100 if thorough else 3, steps=8) > LEVEL


@pytest.mark.parametrize(
    "bug", [HalfNoise, ActualBatch, QuietWhenEmpty, QuietParameter, SharedNoise, FixedSeed, SameEveryStep]
)
@pytest.mark.parametrize("base", [DPSGD, DiceSGD])
def test_the_audit_of_the_noise_finds(bug, base):
    assert audit.noise_p_value(planted(bug, base), seeds=2, steps=8) < LEVEL


@makers
def test_no_attack_beats_the_claim(name, thorough):
    make, noise = MAKERS[name], 4.0 if "Dice" in name else 1.0
    assert audit.attack(make, 20000 if thorough else 200, noise_std_sum=noise) <= 0
    if thorough:
        assert audit.attack(make, 20000, steps=8, rate=0.3, noise_std_sum=4.0) <= 0
        assert audit.attack(make, 20000, steps=2, rate=0.1, noise_std_sum=1.0) <= 0


@pytest.mark.parametrize(
    ("bug", "base", "noise"), [(HalfNoise, DPSGD, 1.0), (NoClip, DiceSGD, 4.0), (ReleasesError, DiceSGD, 4.0)]
)
def test_the_attack_finds(bug, base, noise):
    assert audit.attack(planted(bug, base), 600 if base is DPSGD else 300, noise_std_sum=noise) > 0.03


def test_the_attack_finds_noise_that_is_too_small_for_the_error():
    """The paper's calibration, claimed as if the ordinary accountant held for it."""

    class Paper(DiceSGD):
        def epsilon(self, delta, *, accountant="pld"):
            from optimzoo import privacy

            ordinary = [s._replace(error_norm_sum=0.0, noise_std_sum=self.ordinary) for s in self.history]
            return privacy.epsilon(ordinary, delta, accountant=accountant)

    def make(params, *, noise_std_sum, **options):
        optimizer = Paper(params, error_norm_sum=4.0, noise_std_sum=noise_std_sum * (1 + 2 * 16) ** 0.5, **options)
        optimizer.ordinary = noise_std_sum
        return optimizer

    assert audit.attack(make, 200, steps=40, rate=0.1, noise_std_sum=1.0) > 0.05
