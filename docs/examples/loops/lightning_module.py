"""Lightning: the optimizer that ``configure_optimizers`` returns."""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import optimzoo


class Digits(lightning.LightningModule):
    """A small network for 8 x 8 pictures."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch, index):
        inputs, labels = batch
        return nn.functional.cross_entropy(self.model(inputs), labels)

    def test_step(self, batch, index):
        inputs, labels = batch
        self.log("accuracy", (self.model(inputs).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        optimizer = optimzoo.AdaBelief(self.parameters(), lr=1e-2)  # was torch.optim.AdamW
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=1e-2, total_steps=self.trainer.estimated_stepping_batches
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


lightning.seed_everything(0)
digits = load_digits()
data = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
train, test = random_split(data, [1500, 297])
trainer = lightning.Trainer(
    max_epochs=20,
    gradient_clip_val=1.0,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
)
model = Digits()
trainer.fit(model, DataLoader(train, batch_size=64, shuffle=True))
accuracy = trainer.test(model, DataLoader(test, batch_size=64), verbose=False)[0]["accuracy"]
print(f"test accuracy {accuracy:.1%}")
