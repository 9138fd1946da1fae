"""Accelerate: the optimizer goes through ``prepare`` like any other."""

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import optimzoo

torch.manual_seed(0)
digits = load_digits()
data = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
train, test = random_split(data, [1500, 297])

accelerator = Accelerator(gradient_accumulation_steps=2)
loader = DataLoader(train, batch_size=32, shuffle=True)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = optimzoo.AdaBelief(model.parameters(), lr=1e-2)  # was torch.optim.AdamW
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

for _ in range(20):
    for inputs, labels in loader:
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(inputs), labels)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

with torch.no_grad():
    inputs, labels = (part.to(accelerator.device) for part in test[:])
    accuracy = (model(inputs).argmax(1) == labels).double().mean().item()
print(f"test accuracy {accuracy:.1%}")
