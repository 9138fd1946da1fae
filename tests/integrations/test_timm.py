"""timm's training factory: a registered class, its groups, layer decay, its schedulers and its checkpoints."""

from __future__ import annotations

import pytest
import timm
import torch
from steps import bits
from timm.optim import OptimInfo, create_optimizer_v2
from timm.optim._optim_factory import default_registry
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver
from torch.nn import functional as F

import optimzoo

CLASSES = {
    "DiffGrad": dict(has_betas=True),
    "AdaBelief": dict(has_betas=True),
    "AdaGradNorm": dict(has_eps=False),
    "DaleSGD": dict(has_eps=False, has_momentum=True, defaults=dict(zeros="floor", min_abs=1e-6)),
}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(default_registry, "_optimizers", dict(default_registry._optimizers))
    for name, traits in CLASSES.items():
        # By its dotted path, as in a configuration file.
        default_registry.register(OptimInfo(name=f"oz{name}", opt_class=f"optimzoo.{name}", **traits))


def build(name, **options):
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=2, num_classes=3
    )
    optimizer = create_optimizer_v2(model, opt=f"oz{name}", lr=0.01, weight_decay=0.05, **options)
    schedule, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=8, warmup_epochs=2, warmup_lr=0.0)
    return model, optimizer, schedule


def train(epochs, model, optimizer, schedule):
    model.train()
    for epoch in epochs:
        draw = torch.Generator().manual_seed(epoch)
        for update in range(2):
            x, y = torch.randn(4, 3, 8, 8, generator=draw), torch.randint(3, (4,), generator=draw)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step_update(2 * epoch + update)
        schedule.step(epoch + 1)


@pytest.mark.parametrize("decay", [None, 0.7], ids=["one-rate", "layer-decay"])
@pytest.mark.parametrize("name", CLASSES)
def test_the_factory_makes_it_and_its_checkpoint_resumes(name, decay, tmp_path):
    whole = build(name, layer_decay=decay)
    model, optimizer, _ = whole
    assert type(optimizer) is getattr(optimzoo, name)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}
    assert len(optimizer.param_groups) == (2 if decay is None else 8)
    train(range(3), *whole)
    rates = {group["lr"] for group in optimizer.param_groups}
    assert len(rates) == (1 if decay is None else 4)
    CheckpointSaver(model, optimizer, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)).save_checkpoint(2)
    resumed = build(name, layer_decay=decay)
    start = timm.models.resume_checkpoint(resumed[0], str(tmp_path / "last.pth.tar"), resumed[1], log_info=False)
    resumed[2].step(start)
    train(range(3, 6), *whole)
    train(range(start, 6), *resumed)
    assert bits(whole[0].state_dict()) == bits(resumed[0].state_dict())
    assert bits(whole[1].state_dict()) == bits(resumed[1].state_dict())


def test_its_switches_arrive():
    model, _, _ = build("AdaBelief")
    kept = create_optimizer_v2(model, "ozadabelief", lr=0.1, betas=(0.8, 0.9), eps=1e-10, rectify=False, foreach=True)
    group = kept.param_groups[0]
    assert (group["betas"], group["eps"], group["rectify"], group["foreach"]) == ((0.8, 0.9), 1e-10, False, True)
