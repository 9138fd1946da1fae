"""What is written on the page "Coming from elsewhere" is so: same defaults, same steps, checkpoints that go on."""

from __future__ import annotations

import contextlib
import inspect
import io
from importlib import metadata
from pathlib import Path

import pytest
import torch
from integrations.peers import NAMES, PEERS, defaults, table
from steps import advance, copies, gradients, normal, saved

import optimzoo

PAGE = Path(__file__).parents[2] / "docs"
# Settings to be tried beside the defaults, by the name of our class and in our words.
SETTINGS = {
    "AdaBelief": [
        {},
        dict(lr=0.02, weight_decay=0.1),
        dict(lr=0.02, weight_decay=0.1, decoupled_weight_decay=False, rectify=False, eps=1e-8),
        dict(lr=0.02, weight_decay=0.01, decoupled_weight_decay=True, fixed_decay=True, betas=(0.8, 0.9)),
        dict(amsgrad=True, rectify=False, betas=(0.9, 0.5), eps=1e-16),
    ],
    "DiffGrad": [{}, dict(lr=0.02, weight_decay=0.1), dict(lr=0.02, weight_decay=0.1, decoupled_weight_decay=False)],
    "DaleAdamW": [{}, dict(lr=0.02, weight_decay=0.1, betas=(0.8, 0.9))],
    "DaleSGD": [{}, dict(lr=0.02, weight_decay=0.1)],
}
ROWS = [pytest.param(peer, row, id=f"{peer.path}-{i}") for peer in PEERS for i, row in enumerate(SETTINGS[peer.ours])]
# Where eps stands differs, so that the two are the same method where it is too small to matter.
SMALL = {"DiffGrad": dict(eps=1e-30)}


def params():
    return [normal(1, 5, 3).requires_grad_(), normal(2, 4).requires_grad_()]


def make_theirs(peer, params, settings):
    known = inspect.signature(peer.cls).parameters
    back = {ours: theirs for theirs, ours in NAMES.items() if theirs in known}
    settings = {back.get(name, name): value for name, value in settings.items()}
    if settings.keys() - known.keys():
        pytest.skip("it has no such setting")
    with contextlib.redirect_stdout(io.StringIO()):
        return peer.cls(params, **settings)


def assert_close(left, right):
    for a, b in zip(left.param_groups[0]["params"], right.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("peer", "settings"), ROWS)
def test_what_the_table_says_to_write_takes_the_same_steps(peer, settings):
    settings = settings | SMALL.get(peer.ours, {})
    theirs = make_theirs(peer, params(), settings)
    ours = getattr(optimzoo, peer.ours)(params(), **peer.options | settings)
    grads = gradients(params(), 20)
    assert_close(advance(ours, grads), advance(theirs, grads))


@pytest.mark.parametrize(("peer", "settings"), ROWS)
def test_a_checkpoint_goes_on(peer, settings):
    settings = settings | SMALL.get(peer.ours, {})
    theirs = make_theirs(peer, params(), settings)
    grads = gradients(params(), 20)
    advance(theirs, grads[:7])
    checkpoint = saved(theirs)
    held = checkpoint["param_groups"][0].keys()
    held = held | {NAMES[name] for name in held & NAMES.keys()}
    # What it holds must come from there: the optimizer is made with other values of that.
    options = {name: value for name, value in (peer.options | settings).items() if name not in held}
    options |= peer.says | dict(lr=0.7, weight_decay=0.3)
    ours = getattr(optimzoo, peer.ours)(copies(theirs.param_groups[0]["params"]), **options)
    ours.load_state_dict(checkpoint)
    if peer.note.endswith("holds"):
        assert options.keys() & {"rectify", "decoupled_weight_decay", "fixed_decay"} or peer.options == {} == settings
    assert not {*NAMES, "step"} & ours.param_groups[0].keys()
    assert_close(advance(ours, grads[7:]), advance(theirs, grads[7:]))


@pytest.mark.parametrize("name", ["AdaBelief", "DiffGrad", "AdaGradNorm"])
@pytest.mark.parametrize("peer", ["Adam", "AdamW", "SGD"])
def test_a_checkpoint_of_which_the_state_is_a_part_is_refused_and_says_what_to_do(peer, name):
    options = dict(momentum=0.9) if peer == "SGD" else {}
    theirs = advance(getattr(torch.optim, peer)(params(), **options), gradients(params(), 2))
    ours = getattr(optimzoo, name)(params())
    with pytest.raises(ValueError, match=r"needs step, .*begin with fresh state|decoupled_weight_decay must be False"):
        ours.load_state_dict(saved(theirs))
    assert not ours.state


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_a_running_maximum_is_not_dropped_in_silence(name):
    theirs = advance(getattr(torch.optim, name)(params(), amsgrad=True), gradients(params(), 2))
    ours = optimzoo.DaleAdamW(params(), dale=False)
    with pytest.raises(ValueError, match="amsgrad=True, and DaleAdamW has none"):
        ours.load_state_dict(saved(theirs))
    assert not ours.state


def test_the_page_is_what_the_signatures_say():
    assert (PAGE / "results" / "coming-from.md").read_text() == f"{table()}\n{defaults()}"


def test_the_page_names_the_versions_that_were_read():
    text = (PAGE / "coming-from.rst").read_text()
    for package in ("adabelief-pytorch", "pytorch-optimizer", "timm", "torch-optimizer"):
        assert f"{package} {metadata.version(package)}" in text
