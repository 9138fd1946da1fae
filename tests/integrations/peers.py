"""What people come from: the classes of other libraries beside ours, and their defaults, read from their signatures.

``PYTHONPATH=.:tests python -m integrations.peers > docs/results/coming-from.md`` writes the table of the page.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import optimzoo
from optimzoo.optimizer import Elementwise, Tensorwise

NAMES = {
    "weight_decouple": "decoupled_weight_decay",
    "decoupled_decay": "decoupled_weight_decay",
    "ams_bound": "amsgrad",
}
# Arguments that say how a step is computed, or print.
SILENT = {"params", "kwargs", "foreach", "fused", "capturable", "differentiable", "maximize", "print_change_log"}


@dataclass(frozen=True)
class Peer:
    """A class of another library.

    Args:
        path: its dotted path.
        ours: the name of our class.
        says: what ours is told that is no default of the peer's.
        implied: what the peer does and has no argument for.
        note: what becomes of its checkpoints.
    """

    path: str
    ours: str
    says: dict[str, Any]
    implied: dict[str, Any]
    note: str

    @property
    def package(self) -> str:
        return self.path.partition(".")[0]

    @property
    def cls(self) -> type:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module, _, name = self.path.rpartition(".")
            return getattr(importlib.import_module(module), name)

    @property
    def defaults(self) -> dict[str, Any]:
        """What it does by default, in our words."""
        rows = inspect.signature(self.cls).parameters.values()
        return self.implied | {NAMES.get(p.name, p.name): p.default for p in rows if p.name not in SILENT}

    @property
    def options(self) -> dict[str, Any]:
        """What our class has to be told to do the same."""
        own = signature(self.ours)
        return self.says | {k: v for k, v in self.defaults.items() if k in own and own[k] != v and k not in self.says}

    @property
    def alone(self) -> list[str]:
        """Its arguments that ours has not, whatever their default."""
        return [name for name in self.defaults if name not in signature(self.ours)]


def signature(name: str) -> dict[str, Any]:
    """The defaults of one of our classes, with those of its bases."""
    rows = {}
    for cls in (Tensorwise, Elementwise, getattr(optimzoo, name)):
        rows |= inspect.signature(cls).parameters
    return {p.name: p.default for p in rows.values() if p.default is not p.empty}


_LOADS = "loads"
PEERS = [
    Peer("adabelief_pytorch.AdaBelief", "AdaBelief", {}, {}, "loads; give it the options that it does not hold"),
    Peer("timm.optim.AdaBelief", "AdaBelief", {}, {}, _LOADS),
    Peer("pytorch_optimizer.AdaBelief", "AdaBelief", {}, {}, _LOADS),
    Peer("torch_optimizer.AdaBelief", "AdaBelief", {}, {}, "loads; give it the options that it does not hold"),
    Peer("pytorch_optimizer.DiffGrad", "DiffGrad", {}, {}, "loads; eps stands elsewhere"),
    Peer("torch_optimizer.DiffGrad", "DiffGrad", {}, dict(decoupled_weight_decay=False), "loads; eps stands elsewhere"),
    Peer(
        "torch.optim.Adam",
        "DaleAdamW",
        dict(dale=False),
        dict(decoupled_weight_decay=False),
        "loads, but for one with ``amsgrad=True``, which is an error",
    ),
    Peer(
        "torch.optim.AdamW",
        "DaleAdamW",
        dict(dale=False),
        dict(decoupled_weight_decay=True),
        "as that of ``Adam``",
    ),
    Peer(
        "torch.optim.SGD",
        "DaleSGD",
        dict(dale=False),
        dict(decoupled_weight_decay=False),
        "without momentum there is nothing to load; with it an error: ``SGD`` counts no steps",
    ),
]
HEAD = ["If you used", "write", "which has not", "its checkpoint"]


SHOWN = ["lr", "betas", "momentum", "eps", "weight_decay", "decoupled_weight_decay", "amsgrad", "rectify"]


def _markdown(lines: list[list[str]]) -> str:
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def defaults() -> str:
    """What each class does if it is told nothing, in Markdown."""
    lines = [["", *(f"`{name}`" for name in SHOWN)]]
    for ours in dict.fromkeys(peer.ours for peer in PEERS):
        rows = {f"optimzoo.{ours}": signature(ours)} | {p.path: p.defaults for p in PEERS if p.ours == ours}
        for path, values in rows.items():
            lines.append([f"`{path}`", *(str(values.get(name, "")) for name in SHOWN)])
    return _markdown(lines)


def table() -> str:
    """What to write, in Markdown."""
    lines = [HEAD]
    for peer in PEERS:
        options = "".join(f", {name}={value!r}" for name, value in peer.options.items())
        alone = ", ".join(f"`{name}`" for name in peer.alone)
        note = peer.note.replace("``", "`")
        lines.append([f"`{peer.path}(params)`", f"`optimzoo.{peer.ours}(params{options})`", alone, note])
    return _markdown(lines)


if __name__ == "__main__":
    print(table(), defaults(), sep="\n", end="")
