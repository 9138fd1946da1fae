"""The programs of the page "In a training loop" train with our class, and learn."""

from __future__ import annotations

import runpy
from pathlib import Path

import accelerate
import pytest
from timm.optim._optim_factory import default_registry
from torch.optim.optimizer import register_optimizer_step_post_hook

import optimzoo

LOOPS = sorted((Path(__file__).parents[2] / "docs" / "examples" / "loops").glob("*.py"))


@pytest.fixture(autouse=True)
def apart(monkeypatch):
    """What these libraries keep for a process is as it was before."""
    monkeypatch.setattr(default_registry, "_optimizers", dict(default_registry._optimizers))
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # lightning sets it, and here that is undone
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


@pytest.mark.parametrize("path", LOOPS, ids=lambda path: path.stem)
def test_the_loop_learns_with_our_class(path):
    stepped = set()
    hook = register_optimizer_step_post_hook(lambda optimizer, *_: stepped.add(type(optimizer)))
    try:
        accuracy = runpy.run_path(str(path), run_name="__main__")["accuracy"]
    finally:
        hook.remove()
    assert optimzoo.AdaBelief in stepped
    assert not any(cls.__module__.startswith(("torch.optim", "timm")) for cls in stepped)
    assert accuracy > 0.85  # of ten classes


def test_there_is_a_loop_for_each_library():
    assert {path.stem.split("_")[0] for path in LOOPS} == {"plain", "huggingface", "lightning", "accelerate", "timm"}
