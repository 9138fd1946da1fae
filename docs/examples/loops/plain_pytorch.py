"""A loop of one's own: handwritten digits, a small network, and a learning rate that falls to zero."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import optimzoo

torch.manual_seed(0)
digits = load_digits()
data = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
train, test = random_split(data, [1500, 297])
loader = DataLoader(train, batch_size=64, shuffle=True)

model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = optimzoo.AdaBelief(model.parameters(), lr=1e-2)  # was torch.optim.AdamW(model.parameters(), lr=3e-3)
epochs = 20
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * len(loader))

for _ in range(epochs):
    for inputs, labels in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        schedule.step()

with torch.no_grad():
    inputs, labels = test[:]
    accuracy = (model(inputs).argmax(1) == labels).double().mean().item()
print(f"test accuracy {accuracy:.1%}")
