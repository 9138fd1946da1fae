"""timm: the class is registered under a name, which ``create_optimizer_v2`` and ``--opt`` then know."""

import timm
import torch
from sklearn.datasets import load_digits
from timm.optim import OptimInfo, create_optimizer_v2
from timm.optim._optim_factory import default_registry
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import optimzoo

default_registry.register(OptimInfo(name="optimzoo-adabelief", opt_class=optimzoo.AdaBelief, has_betas=True))

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
data = TensorDataset(images, torch.tensor(digits.target))
train, test = random_split(data, [1500, 297])
loader = DataLoader(train, batch_size=32, shuffle=True)

model = timm.create_model(
    "vit_tiny_patch16_224",
    img_size=8,
    patch_size=2,
    in_chans=1,
    embed_dim=32,
    depth=2,
    num_heads=4,
    num_classes=10,
)
epochs = 20
optimizer = create_optimizer_v2(model, opt="optimzoo-adabelief", lr=1e-2, weight_decay=0.05, layer_decay=0.9)
schedule, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=epochs, warmup_epochs=1, warmup_lr=1e-5)

for epoch in range(epochs):
    model.train()
    for inputs, labels in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
    schedule.step(epoch + 1)

model.eval()
with torch.no_grad():
    inputs, labels = test[:]
    accuracy = (model(inputs).argmax(1) == labels).double().mean().item()
print(f"test accuracy {accuracy:.1%}")
