"""Lightning: automatic optimization by ``configure_optimizers``, manual optimization for what takes a closure."""

from __future__ import annotations

import lightning
import pytest
from steps import bits
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from training import GRADIENT, RECIPES, batch, network

import optimzoo

DATA = [(x, y) for i in range(5) for x, y in zip(*batch(i, 4), strict=True)]


class Automatic(lightning.LightningModule):
    """Backward, clipping and step are Lightning's."""

    def __init__(self, name):
        super().__init__()
        self.name, self.model = name, network()

    def training_step(self, rows, index):
        x, y = rows
        return F.cross_entropy(self.model(x), y)

    def configure_optimizers(self):
        optimizer = RECIPES[self.name](self.model)
        cycles = bool({"betas", "momentum"} & optimizer.defaults.keys())
        schedule = OneCycleLR(optimizer, 0.1, total_steps=12, cycle_momentum=cycles)
        return dict(optimizer=optimizer, lr_scheduler=dict(scheduler=schedule, interval="step"))


class Manual(Automatic):
    """The step is the module's, through what Lightning wraps the optimizer in."""

    automatic_optimization = False

    def training_step(self, rows, index):
        x, y = rows
        optimizer, schedule = self.optimizers(), self.lr_schedulers()

        def loss(outputs):
            return F.cross_entropy(outputs, y)

        if self.name == "CBO":
            optimizer.step(lambda: loss(self.model(x)))
        elif self.name == "SSO":
            optimizer.step(lambda: (self.model(x), loss))
        elif self.name == "TPSGD":
            with optimizer.targets(y):
                self.model(x)
            optimizer.step()
            optimizer.zero_grad()
        else:  # a scheduler of the curvature
            schedule.step(lambda: loss(self.model(x)))
            optimizer.zero_grad()
            self.manual_backward(loss(self.model(x)))
            optimizer.step()
        if self.name != "LanczosLR":
            schedule.step()

    def configure_optimizers(self):
        if self.name != "LanczosLR":
            return super().configure_optimizers()
        optimizer = optimzoo.DiffGrad(self.model.parameters(), lr=1.0)
        return [optimizer], [optimzoo.LanczosLR(optimizer, every=2, iterations=4)]


def fit(module, folder, steps, path=None, accumulate=1):
    # Five steps are an epoch: Lightning begins a loader anew that it left in the middle.
    keep = lightning.pytorch.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[keep],
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.5 if module.automatic_optimization else None,
    )
    trainer.fit(module, DataLoader(DATA, batch_size=4 // accumulate), ckpt_path=path)
    return module, trainer


def assert_resumes(make, folder, **options):
    first, whole = fit(make(), folder, 10, **options)
    second, resumed = fit(make(), folder / "again", 10, path=str(folder / "step=5.ckpt"), **options)
    assert whole.global_step == resumed.global_step == 10
    assert bits(first.model.state_dict()) != bits(network().state_dict())
    assert bits(first.model.state_dict()) == bits(second.model.state_dict())
    assert bits(whole.optimizers[0].state_dict()) == bits(resumed.optimizers[0].state_dict())
    left, right = (trainer.lr_scheduler_configs[0].scheduler.state_dict() for trainer in (whole, resumed))
    assert bits(left) == bits(right)


@pytest.mark.parametrize("name", GRADIENT)
def test_automatic_optimization_resumes_from_its_checkpoint(name, tmp_path):
    assert_resumes(lambda: Automatic(name), tmp_path)


@pytest.mark.parametrize("name", ["CBO", "SSO", "TPSGD", "LanczosLR"])
def test_manual_optimization_resumes_from_its_checkpoint(name, tmp_path):
    assert_resumes(lambda: Manual(name), tmp_path)


def test_accumulated_gradients_resume(tmp_path):
    assert_resumes(lambda: Automatic("AdaBelief"), tmp_path, accumulate=2)


@pytest.mark.parametrize("name", GRADIENT)
def test_gradients_are_clipped_in_mixed_precision(name, tmp_path):
    trainer = lightning.Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        gradient_clip_val=0.5,
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    module = Automatic(name)
    trainer.fit(module, DataLoader(DATA, batch_size=4))
    assert trainer.global_step == 3
    assert bits(module.model.state_dict()) != bits(network().state_dict())
