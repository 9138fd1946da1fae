"""Three optimizers on a small network of digits: the plane of their paths, and the curvature along them.

``python docs/examples/digits_landscape.py docs/_static``
"""

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits

import optimzoo
from optimzoo import trajectories, viz

OPTIMIZERS = {
    "SGD": (torch.optim.SGD, dict(lr=0.5)),
    "AdamW": (torch.optim.AdamW, dict(lr=3e-3)),
    "diffGrad": (optimzoo.DiffGrad, dict(lr=6e-3)),
}


def main(folder: Path, epochs: int = 12) -> None:
    """Train, and draw into a folder."""
    data = load_digits()
    inputs = torch.tensor(data.data / 16, dtype=torch.float32)[:1000]
    labels = torch.tensor(data.target)[:1000]

    def loss(model: torch.nn.Module) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(inputs), labels)

    records, curves, models = {}, {}, {}
    for name, (make, options) in OPTIMIZERS.items():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 24), torch.nn.Tanh(), torch.nn.Linear(24, 10))
        optimizer, record = make(model.parameters(), **options), viz.Recorder(model, every=10)
        order = torch.Generator().manual_seed(0)
        record()
        for _ in range(epochs):
            for batch in torch.randperm(1000, generator=order).split(50):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
                optimizer.step()
                record()
        records[name], models[name] = record, model
        if name == "SGD":
            curves[name] = (trajectories.hessian(record, loss, at_most=12), options["lr"])
    plane = trajectories.pca_plane(records, model, loss, n=41)
    viz.save(viz.plane(plane, title="Digits, the plane of three paths"), folder / "plane.png", dpi=100)
    viz.save(viz.eigenvalues(curves), folder / "eigenvalues.png", dpi=100)
    viz.save(viz.density({name: curve for name, (curve, _) in curves.items()}), folder / "density.png", dpi=100)
    around = trajectories.plane(models["SGD"], loss, n=31)
    viz.save(viz.plane(around, title="Digits, around SGD's solution"), folder / "filters.png", dpi=100)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
