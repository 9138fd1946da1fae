"""Random numbers by counter: the known answers of Philox4x32-10, the two texts against each other, and their law."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimzoo import ops, random

ROOT = Path(__file__).parents[1]

# From Random123 (Salmon et al., 2011), kat_vectors, philox4x32 10: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def numbers(text):
    return tuple(int(word, 16) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_known_answers(counter, key, expected):
    assert random.philox(numbers(counter), numbers(key)) == numbers(expected)
    as_tensors = tuple(torch.tensor([word]) for word in numbers(counter))
    assert tuple(word.item() for word in random.philox(as_tensors, numbers(key))) == numbers(expected)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_philox_in_cpp_gives_the_known_answers(tmp_path):
    rows = [[f"0x{word}u" for word in f"{counter} {key}".split()] for counter, key, _ in KNOWN]
    calls = "".join(f"  show(optimzoo::philox({{{', '.join(row[:4])}}}, {row[4]}, {row[5]}));\n" for row in rows)
    source = tmp_path / "known.cpp"
    source.write_text(
        '#include <cstdio>\n#include "random.h"\n'
        'void show(optimzoo::Words w) { std::printf("%08x %08x %08x %08x\\n", w.a, w.b, w.c, w.d); }\n'
        f"int main() {{\n{calls}}}\n"
    )
    command = ["g++", "-std=c++17", "-O1", "-I", str(ROOT / "csrc"), str(source), "-o", str(tmp_path / "known")]
    subprocess.run(command, check=True)
    done = subprocess.run([tmp_path / "known"], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == [expected for _, _, expected in KNOWN]


# Large normal numbers have few bits behind the point.
TOLERANCE = {torch.float64: 4e-15, torch.float32: 2e-6}


def by(op, shape, dtype, **how):
    out = torch.full(shape, torch.nan, dtype=dtype)
    op(out, how["seed"], how["draw"], how["first"])
    return out


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 700)),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 2**63 - 1),
    draw=st.integers(0, 2**32 - 1),
    first=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_the_native_numbers_are_those_of_the_twin(shape, dtype, seed, draw, first):
    native = ops.native("normal_", torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "native", lambda name, device: None)
        expected = random.normal(torch.empty(shape, dtype=dtype), seed=seed, draw=draw, first=first)
    actual = by(native, shape, dtype, seed=seed, draw=draw, first=first)
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 2, 300), (3, 1, 1)])
def test_the_cuda_kernel_in_emulation_gives_the_same_numbers(emulated_ops, dtype, shape):
    how = dict(seed=2**62 + 12345, draw=77, first=9)
    native = ops.native("normal_", torch.device("cpu"))
    expected, actual = by(native, shape, dtype, **how), by(emulated_ops.normal_.default, shape, dtype, **how)
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_coordinates_particles_and_threads_may_be_split(dtype):
    whole = random.normal(torch.empty(2, 7, 1200, dtype=dtype), seed=5, draw=3)
    part = random.normal(torch.empty(2, 3, 700, dtype=dtype), seed=5, draw=3, first=4)
    assert torch.equal(part, whole[:, 4:, :700])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(random.normal(torch.empty_like(whole), seed=5, draw=3), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_numbers_are_normal_and_independent(dtype):
    z = random.normal(torch.empty(4, 500, 1000, dtype=dtype), seed=11, draw=0).double()
    n = z.numel()
    # Moments, within five standard errors.
    for power, mean, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((z**power).mean() - mean) < 5 * (variance / n) ** 0.5
    # Kolmogorov and Smirnov: beyond 2 / sqrt(n) is one chance in a thousand; the sample is always the same.
    ordered = torch.special.ndtr(z.flatten().sort().values)
    distance = (ordered - (torch.arange(n) + 0.5) / n).abs().max()
    assert distance < 2 / n**0.5
    neighbours = [z[..., 1:] * z[..., :-1], z[..., 2:] * z[..., :-2], z[..., 4:] * z[..., :-4], z[:, 1:] * z[:, :-1]]
    for product in (*neighbours, z[1:] * z[:-1], z.square()[..., 1::2] * z.square()[..., ::2] - 1):
        assert abs(product.mean()) < 5 * product.std() / product.numel() ** 0.5
    other = random.normal(torch.empty(4, 500, 1000, dtype=dtype), seed=11, draw=1).double()
    assert abs((z * other).mean()) < 5 / n**0.5


def test_a_permutation_has_every_number_once_and_another_order_each_time():
    one, two = (random.permutation(100, seed=3, draw=draw) for draw in (0, 1))
    assert one.sort().values.tolist() == two.sort().values.tolist() == list(range(100))
    assert not torch.equal(one, two)
    # The first place is everybody's equally often, within five standard errors.
    first = torch.tensor([random.permutation(5, seed=1, draw=draw)[0] for draw in range(2000)]).bincount()
    assert (first - 400).abs().max() < 5 * (2000 * 0.2 * 0.8) ** 0.5


def test_integers_depend_on_seed_and_draw_and_have_63_bits():
    drawn = {random.integer(seed, draw) for seed in range(20) for draw in range(20)}
    assert len(drawn) == 400
    assert 2**62 < max(drawn) < 2**63


def test_wrong_arguments_are_errors():
    op = torch.ops.optimzoo.normal_.default
    with pytest.raises(RuntimeError, match=r"out must be float32 or float64, of shape"):
        op(torch.empty(3), 0, 0, 0)
    with pytest.raises(RuntimeError, match="out must be contiguous"):
        op(torch.empty(2, 3, 4).transpose(1, 2), 0, 0, 0)
    torch.library.opcheck(op, (torch.empty(2, 3, 5), 1, 2, 3))
