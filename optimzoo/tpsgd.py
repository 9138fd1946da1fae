"""TPSGD: target projection SGD (Lomnitz et al., 2023, https://arxiv.org/abs/2208.08503)."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.nn.modules import conv, dropout, flatten, padding, pixelshuffle, pooling, upsampling
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.rnn import PackedSequence
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from optimzoo import random
from optimzoo.adagrad import AdaGradNorm
from optimzoo.optimizer import check_flags, check_form, check_int, check_number

_LAYERS = (nn.Linear, nn.Bilinear, conv._ConvNd, nn.RNNBase, nn.RNNCellBase)
# They have parameters and no target of their own: they are trained with the layer before them, or after them.
_WITH_A_LAYER = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU, nn.Embedding, nn.EmbeddingBag)
# The output of a layer is what comes before the first of these, or before the next layer.
_AFTER_A_LAYER = tuple(
    cls
    for module in (dropout, flatten, padding, pixelshuffle, pooling, upsampling)
    for cls in vars(module).values()
    if isinstance(cls, type) and issubclass(cls, nn.Module) and cls is not nn.Module
)

_DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": torch.sub,
    "l1": lambda y, t: (y - t).sign_(),
    "smooth_l1": lambda y, t: (y - t).clamp_(-1, 1),
    "drtp": lambda y, t: t.expand_as(y).clone(),
}
_LOSSES = (*_DERIVATIVES, "cosine", "cross_entropy")


def _orthogonal(normal: Tensor) -> Tensor:
    rows = normal.flatten(1)
    basis: Tensor = torch.linalg.qr(rows.T)[0].T if rows.shape[0] <= rows.shape[1] else torch.linalg.qr(rows)[0]
    return (basis * math.sqrt(rows.shape[1] / 3)).view_as(normal)  # as long as the uniform rows are


def _uniform(normal: Tensor) -> Tensor:
    return normal.mul(0.5**0.5).erf_()  # the distribution function of the normal numbers, from -1 to 1


PROJECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": _uniform,
    "normal": lambda normal: normal,
    "sign": torch.sign,
    "binary": lambda normal: (normal > 0).to(normal.dtype),
    "orthogonal": _orthogonal,
    "kaiming": lambda normal: _uniform(normal) * math.sqrt(6 / normal[0].numel()),
}


class _Hook:
    """Calls a method of an optimizer while there is one. A copy or pickle of the model has a hook that does nothing."""

    def __init__(self, method: Callable[..., Any] | None = None) -> None:
        self.method = None if method is None else weakref.WeakMethod(method)

    @property
    def owner(self) -> Any:
        method = self.method and self.method()
        return getattr(method, "__self__", None)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # untyped in torch 2.14
    def __call__(self, *args: Any) -> Any:
        method = self.method and self.method()
        return None if method is None else method(*args)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


@dataclass
class _Run:
    """What is known within ``targets``, and of the forward pass under way."""

    targets: Tensor
    loss: Callable[[Any, Tensor], Tensor]
    waiting: dict[nn.Module, None] = field(default_factory=dict)  # modules whose gradient is to come, in their order
    outputs: dict[nn.Module, Tensor] = field(default_factory=dict)  # of those that have one before the next layer asks
    trained: set[nn.Module] = field(default_factory=set)
    edges: dict[nn.Module, tuple[GradientEdge, Tensor]] = field(
        default_factory=dict
    )  # ends and inputs of linear layers

    def layers(self) -> list[nn.Module]:
        return [module for module in self.waiting if isinstance(module, _LAYERS)]


class TPSGD(Optimizer):
    r"""Trains each layer towards a random projection of the label, as the forward pass reaches it.

    .. math::
        y_i &= \sigma_i(W_i x_i + b_i), \qquad t_i = P_i^\top y^* \\
        \delta_i &= (y_i - t_i) \odot \sigma_i'(W_i x_i + b_i) \\
        W_i &\leftarrow W_i - \gamma\, \frac{1}{n} \sum_n \delta_i x_i^\top

    :math:`y^*` is the one-hot label, and :math:`P_i` is drawn once and never trained. The last layer has the gradient
    of the true loss. No gradient crosses a layer, and in a chain no layer's activations are kept for another::

        with optimizer.targets(labels):
            logits = model(inputs)
        optimizer.step()

    Args:
        model: the network; its parameters are the optimizer's, in a group for each module that has some. Of
            ``DistributedDataParallel`` it is what is wrapped, and gradients are averaged over the processes.
        lr: step size, :math:`\gamma \ge 0`. Default 0.01.
        num_classes: labels are whole numbers below this.
        target_dim: or labels are vectors of this length, as in regression.
        local_loss: of an output :math:`y` and its target: ``"l2"``, half the squared distance; ``"l1"``;
            ``"smooth_l1"``; ``"cosine"``; ``"cross_entropy"`` of :math:`\mathrm{softmax}(P_i y_i)`; ``"drtp"``, direct
            random target projection, whose gradient is the target itself; or a function of outputs and targets, units
            last, whose values are summed over units. The mean is over samples, and over positions of a sequence or map.
            Default ``"l2"``.
        projection: how :math:`P_i`, of shape (classes, units), is made of standard normal numbers: ``"uniform"`` in
            [-1, 1]; ``"normal"``; ``"sign"``, 1 or -1; ``"binary"``, 0 or 1; ``"orthogonal"`` rows, as long as the
            uniform ones are; ``"kaiming"``, uniform up to :math:`\sqrt{6 / \mathrm{units}}`; or a function of the
            normal numbers. Default ``"uniform"``.
        conv_target: ``"full"``, a target for each position of a convolution's output; or ``"channel"``, for the mean
            over positions, which also serves maps whose size varies. Default ``"full"``.
        bptt: gradients of a recurrent layer go back through its own time steps; if false, through the last alone, in
            constant memory. Default ``True``.
        base: the optimizer that applies the gradients. Default ``torch.optim.SGD``. One that needs those of all layers
            together cannot have ``update_in_forward``.
        per_layer_lr: step sizes of modules that are not to have ``lr``, by name.
        update_in_forward: update a layer as soon as its output has been made, and keep no gradient; ``step`` then does
            nothing. Later layers see the output from before the update. Default ``False``.
        store_projections: keep :math:`P_i` between calls; if false it is made anew from the seed. Default ``True``.
        seed: of the projections, an integer; by default one is drawn from torch's generator. All processes of a
            ``DistributedDataParallel`` have that of the first.
        **options: further arguments of ``base``: ``momentum``, ``weight_decay``.

    Raises:
        TypeError, ValueError: a setting is not one that the method can work with, or a module of the model has
            parameters and is none that can be trained; the message names it. Nothing has changed then.

    ``loss`` is the true loss of the last forward pass. The paper's text was not available: the rule follows its
    abstract and a public summary; projections, the targets of maps and sequences and what a layer's output is are
    choices of this library.
    """

    loss: Tensor | None = None

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.01,
        *,
        num_classes: int | None = None,
        target_dim: int | None = None,
        local_loss: str | Callable[[Tensor, Tensor], Tensor] = "l2",
        projection: str | Callable[[Tensor], Tensor] = "uniform",
        conv_target: str = "full",
        bptt: bool = True,
        base: Callable[..., Optimizer] = torch.optim.SGD,
        per_layer_lr: Mapping[str, float] | None = None,
        update_in_forward: bool = False,
        store_projections: bool = True,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        if isinstance(model, nn.DataParallel):
            raise TypeError("model must not be wrapped in DataParallel; DistributedDataParallel is supported")
        model, self.process_group = _unwrapped(model)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {model!r}")
        if (num_classes is None) == (target_dim is None):
            raise ValueError(f"give num_classes or target_dim, got {num_classes!r} and {target_dim!r}")
        for name, count in dict(num_classes=num_classes, target_dim=target_dim).items():
            if count is not None:
                check_int(name, count, 1)
        choices = dict(local_loss=(local_loss, _LOSSES), projection=(projection, tuple(PROJECTIONS)))
        for name, (value, known) in choices.items():
            if not callable(value) and value not in known:
                raise ValueError(f"{name} must be a function or one of {', '.join(map(repr, known))}, got {value!r}")
        if conv_target not in ("full", "channel"):
            raise ValueError(f"conv_target must be 'full' or 'channel', got {conv_target!r}")
        check_flags(dict(bptt=bptt, update_in_forward=update_in_forward, store_projections=store_projections),
                    "bptt", "update_in_forward", "store_projections")  # fmt: skip
        if seed is None:
            seed = int(torch.randint(2**63 - 1, (), device="cpu"))
        check_int("seed", seed, 0, 2**63 - 1)
        takes = inspect.signature(base.step).parameters.get("closure") if hasattr(base, "step") else None
        if not isinstance(base, type) or not issubclass(base, Optimizer) or not takes or takes.default is takes.empty:
            raise TypeError(f"base must be a class of optimizers that step without a closure, got {base!r}")
        names = {module: name for name, module in model.named_modules()}
        groups = _groups(names, dict(per_layer_lr or {}), lr, update_in_forward)
        for name, rate in [("lr", lr), *((f"per_layer_lr[{n!r}]", r) for n, r in (per_layer_lr or {}).items())]:
            check_number(name, rate, 0.0, math.inf, "finite and >= 0")
        if self.process_group is not None:  # all processes have the targets of the first
            shared = torch.tensor(seed, device=next(model.parameters()).device)
            torch.distributed.broadcast(shared, group=self.process_group, group_src=0)
            seed = int(shared)
        for group in groups:
            group["projection_seed"] = seed

        self.model, self.num_classes, self.target_dim = model, num_classes, target_dim
        self.local_loss, self.projection, self.conv_target, self.bptt = local_loss, projection, conv_target, bptt
        self.update_in_forward, self.store_projections = update_in_forward, store_projections
        self._names, self._places = names, {module: place for place, module in enumerate(names)}
        with_group = [group["name"] for group in groups]
        self._numbers = {module: with_group.index(name) for module, name in names.items() if name in with_group}
        super().__init__(groups, dict(lr=lr))
        make: Callable[..., Optimizer] = base
        self.base = make(self.param_groups, lr=lr, **options)
        bound = self.base.defaults.get("max_grad_norm")
        if update_in_forward and (bound is not None or isinstance(self.base, AdaGradNorm)):
            what = f"max_grad_norm={bound!r}" if bound is not None else type(self.base).__name__
            raise ValueError(
                f"{what} needs the gradients of all layers together, and update_in_forward has those of one"
            )
        self._share()
        self._attach()

    def _share(self) -> None:
        """Groups and state are those of the base, so that whatever changes one changes the other."""
        self.defaults, self.param_groups, self.state = self.base.defaults, self.base.param_groups, self.base.state
        self._projections: dict[tuple[int, int], Tensor] = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Called by the constructor; the groups are the model's modules.

        Raises:
            RuntimeError: there are groups already.
        """
        if hasattr(self, "base"):
            raise RuntimeError("the groups of TPSGD are the modules of its model; make another for another model")
        super().add_param_group(param_group)

    # Hooks

    def _attach(self) -> None:
        self._run: _Run | None = None
        self._this = weakref.ref(self)
        hooks = [h for m in self._names for h in m._forward_pre_hooks.values() if isinstance(h, _Hook)]
        for owner in {hook.owner for hook in hooks} - {None, self}:
            owner.close()  # or both would train the model
        for module in self._names:  # those of a copy have no owner
            for table in (module._forward_pre_hooks, module._forward_hooks):
                for key in [key for key, hook in table.items() if isinstance(hook, _Hook) and hook.owner is None]:
                    del table[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
        before = dict(with_kwargs=True)
        self._handles = [self.model.register_forward_pre_hook(_Hook(self._begin), **before)]
        for module in self._names:
            if isinstance(module, _LAYERS + _WITH_A_LAYER):
                self._handles.append(module.register_forward_pre_hook(_Hook(self._enter), **before))
            elif isinstance(module, _AFTER_A_LAYER):
                self._handles.append(module.register_forward_pre_hook(_Hook(self._end_of_layer)))
            if self.update_in_forward and type(self.base) is torch.optim.SGD and type(module) is nn.Linear:
                self._handles.append(module.register_forward_hook(_Hook(self._keep_edge)))
            elif isinstance(module, nn.RNNCellBase):
                self._handles.append(module.register_forward_hook(_Hook(self._keep_state)))
        self._handles.append(self.model.register_forward_hook(_Hook(self._end)))

    def close(self) -> None:
        """Remove the hooks: the model is then trained by whatever its user chooses."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group is not None:
            raise TypeError("the optimizer of a DistributedDataParallel cannot be copied or pickled; use state_dict()")
        kept = ("model", "num_classes", "target_dim", "local_loss", "projection", "conv_target", "bptt", "base",
                "update_in_forward", "store_projections", "process_group", "loss", "_names", "_places",
                "_numbers")  # fmt: skip
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()
        self._attach()

    @contextlib.contextmanager
    def targets(self, targets: Tensor, loss: Callable[[Any, Tensor], Tensor] | None = None) -> Iterator[None]:
        """Within it, a forward pass of the model makes the gradients, or the updates, of all layers.

        Args:
            targets: class numbers, of shape (samples,), or (samples, steps) for one at each step of a sequence; with
                ``target_dim`` there is one more dimension of that size.
            loss: the true loss, a function of the model's output and the targets that returns a scalar. Default
                cross-entropy, or the mean squared error with ``target_dim``; classes and units last.

        Raises:
            TypeError, ValueError: the targets are missing, of a wrong dtype or shape, or out of range.
            RuntimeError: it is nested, the model has not been called at its end, the model has a trainable parameter
                that the optimizer does not know, or the optimizer has been closed.

        Gradients add up over forward passes, as those of ``backward`` do. What the model returns has no graph. If the
        pass raises, layers before that have their gradients, or with ``update_in_forward`` have moved.
        """
        self._check_targets(targets)
        if self._run is not None:
            raise RuntimeError("targets cannot be nested")
        if not self._handles:
            raise RuntimeError("the optimizer has been closed, or a later one trains its model")
        known = {param for group in self.param_groups for param in group["params"]}
        for name, param in self.model.named_parameters():
            if param.requires_grad and param not in known:
                raise RuntimeError(f"{name!r} is new or was frozen when the optimizer was made: make another")
        # Lightning wraps an optimizer in an object that hands on what is read and keeps what is written.
        this = cast(TPSGD, self._this())
        this._run = begun = _Run(targets, loss or self._true_loss)
        if self.update_in_forward:
            self.zero_grad()  # a layer's step is one of all groups, of which one has gradients
        stacks = [module for module in self._names if isinstance(module, nn.RNNBase)]
        for stack in stacks:
            vars(stack)["forward"] = functools.partial(self._recurrent, stack)
        try:
            with torch.no_grad():  # DistributedDataParallel would wait for a backward pass
                yield
            if self._run is begun:
                raise RuntimeError("the model was not called within targets; calls of its parts train nothing")
        finally:
            this._run = None
            for stack in stacks:
                del vars(stack)["forward"]

    def _check_targets(self, targets: Any) -> None:
        if not isinstance(targets, Tensor):
            raise TypeError(f"targets must be a tensor, got {targets!r}")
        if targets.numel() == 0:
            raise ValueError(f"targets must not be empty, got shape {tuple(targets.shape)}")
        if self.num_classes is not None and targets.dim() == 0:
            raise ValueError("targets must have a dimension of samples, got a scalar")
        if self.num_classes is None:
            if not targets.is_floating_point() or targets.dim() < 2 or targets.shape[-1] != self.target_dim:
                raise ValueError(
                    f"targets must be floating-point of shape (samples, {self.target_dim}), "
                    f"got {targets.dtype} of shape {tuple(targets.shape)}"
                )
            if not targets.isfinite().all():
                raise ValueError("targets must be finite")
            return
        if targets.dtype is not torch.int64:
            raise TypeError(f"targets must be class numbers of dtype torch.int64, got {targets.dtype}")
        low, high = (int(bound) for bound in targets.aminmax())
        if low < 0 or high >= self.num_classes:
            raise ValueError(f"targets must be from 0 to {self.num_classes - 1}, got {low if low < 0 else high}")

    def _true_loss(self, output: Tensor, targets: Tensor) -> Tensor:
        samples = targets.shape if self.num_classes is not None else targets.shape[:-1]
        expected = (*samples, self.num_classes or self.target_dim)
        if not isinstance(output, Tensor) or output.shape != expected:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"the output of the model must be a tensor of shape {expected} for targets of shape "
                f"{tuple(targets.shape)}, or give a loss; got {got}"
            )
        if self.num_classes is None:
            return F.mse_loss(output, targets)
        return F.cross_entropy(output.flatten(0, -2), targets.flatten())

    def _begin(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        if self._run is None:
            if model.training and torch.is_grad_enabled():
                raise RuntimeError(
                    "the model is in training mode and has no targets: call it within optimizer.targets(...), after "
                    "model.eval(), under torch.no_grad(), or after optimizer.close()"
                )
            return None
        if not model.training:
            raise RuntimeError("the model is in evaluation mode within optimizer.targets(...): call model.train()")
        self._run = _Run(self._run.targets, self._run.loss)
        torch.set_grad_enabled(True)
        return tree_map(_detached, (args, kwargs))

    def _end(self, model: nn.Module, args: Any, output: Any) -> Any:
        run = self._run
        if run is None or not torch.is_grad_enabled():
            return None
        loss = run.loss(output, run.targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(f"the loss must be one number, got {loss!r}")
        if loss.requires_grad:
            self._gradients(loss, None)
        elif run.waiting and not run.outputs:
            raise RuntimeError("the loss has no graph: the last layer does not lead to it, or inference_mode is on")
        for layer, made in list(run.outputs.items()):  # a cell below another: its last state is known by now
            self._local(layer, made)
        torch.set_grad_enabled(False)
        self.loss = loss.detach()
        return tree_map(_detached, output)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Before a module with parameters: the layers before it are done with."""
        run = self._run
        if run is None or not torch.is_grad_enabled():
            return None
        if isinstance(module, nn.RNNCellBase):
            if module in run.trained:
                raise RuntimeError(f"{self._title(module)} is called after a layer has used its state: use its module")
            states = args[1:], {name: value for name, value in kwargs.items() if name != "input"}
            if _trainable(module) and module not in run.waiting and _requires_grad(states):
                raise RuntimeError(f"{self._title(module)}: no gradient reaches what made its first state; detach it")
            cut: Callable[[Any], Any] = functools.partial(self._cut_cell, module)
            if self.bptt:  # the state carries the gradient through time
                args = (*map(cut, args[:1]), *args[1:])
                kwargs = {name: cut(value) if name == "input" else value for name, value in kwargs.items()}
            else:
                args = (*map(cut, args[:1]), *tree_map(_detached, args[1:]))
                kwargs = {name: cut(v) if name == "input" else tree_map(_detached, v) for name, v in kwargs.items()}
        elif isinstance(module, _LAYERS):
            if isinstance(module, nn.RNNBase) and _requires_grad((args[1:], kwargs.get("hx"))):
                raise RuntimeError(f"{self._title(module)}: no gradient reaches what made its first state; detach it")
            args, kwargs = tuple(map(self._cut, args)), {name: self._cut(value) for name, value in kwargs.items()}
        if _trainable(module):
            if module in run.waiting and not isinstance(module, nn.RNNCellBase | nn.Embedding | nn.EmbeddingBag):
                raise RuntimeError(f"{self._title(module)} is called again before a layer has used its first output")
            run.waiting[module] = None
        return args, kwargs

    def _end_of_layer(self, module: nn.Module, args: Any) -> None:
        """Before pooling and the like: what comes in is the output of the layer before."""
        run = self._run
        if run is not None and args and isinstance(args[0], Tensor) and args[0].requires_grad:
            layer = self._maker(args[0])
            if isinstance(layer, _LAYERS):
                run.outputs.setdefault(layer, args[0].clone() if getattr(module, "inplace", False) else args[0])

    def _keep_state(self, cell: nn.Module, args: Any, output: Any) -> None:
        if self._run is not None and cell in self._run.waiting:
            self._run.outputs[cell] = output[0] if isinstance(output, tuple) else output

    # Gradients

    def _cut(self, tensor: Any) -> Any:
        """The input of a layer, without its graph, after the layers that made it have got their gradients."""
        run = self._run
        assert run is not None  # hooks look
        if isinstance(tensor, PackedSequence):
            return PackedSequence(self._cut(tensor.data), *tensor[1:])
        if not isinstance(tensor, Tensor) or not tensor.requires_grad:
            return tensor
        made = maker = self._maker(tensor)
        if run.outputs:
            for layer in list(run.outputs):
                if layer in run.outputs:
                    self._local(layer, run.outputs[layer])
            maker = self._maker(tensor)
        if isinstance(maker, _LAYERS):
            self._local(maker, tensor)
        elif maker is not None:  # an embedding, or a normalisation, that goes with the layer to come
            return tensor
        # A parameter stays one, and what no module that waits has made may be part of a graph that is still needed.
        if made is None or tensor.is_leaf or tensor._is_view():
            return tensor.detach()
        return tensor.detach_()  # in place: skip connections hold it as well

    def _maker(self, tensor: Tensor) -> nn.Module | None:
        """The last of the layers that wait and that the graph of a tensor leads to, or else a module that waits."""
        run = self._run
        assert run is not None  # hooks look
        order = sorted(run.waiting, key=lambda module: isinstance(module, _LAYERS))  # stable: layers come last
        owners: dict[Any, int] = {param: place for place, module in enumerate(order) for param in _trainable(module)}
        found, nodes = -1, [tensor.grad_fn]
        seen = set(nodes)
        for node in nodes:  # the nearest first, while more are appended
            variable = getattr(node, "variable", None)
            if isinstance(variable, Tensor):
                found = max(found, owners.get(variable, -1))
                if found == len(order) - 1:
                    break
            for following, _ in node.next_functions if node is not None else ():
                if following is not None and following not in seen:
                    seen.add(following)
                    nodes.append(following)
        return order[found] if found >= 0 else None

    def _cut_cell(self, cell: nn.Module, tensor: Any) -> Any:
        """The same for the input of a cell; those below it are done when their last state is known."""
        run = self._run
        assert run is not None  # hooks look
        if not isinstance(tensor, Tensor) or not tensor.requires_grad:
            return tensor
        layers = [layer for layer in run.layers() if not isinstance(layer, nn.RNNCellBase)]
        for layer in layers:
            if layer in run.outputs:
                self._local(layer, run.outputs[layer])
        maker = self._maker(tensor)
        if maker in layers:
            self._local(maker, tensor)
        if not layers and any(not isinstance(module, _LAYERS) for module in run.waiting):
            if any(layer is not cell for layer in run.layers()):
                raise RuntimeError(f"{self._title(cell)}: embeddings below several cells need their modules")
            return tensor
        return tensor.detach()

    def _recurrent(self, module: nn.RNNBase, input: Any, hx: Any = None) -> Any:
        """The forward pass of a recurrent module, layer by layer, each but the last followed by its gradient."""
        forward = type(module).forward  # not the instance's, which is this
        run = self._run
        if run is None or not torch.is_grad_enabled() or module not in run.waiting:
            return forward(module, input, hx)
        directions, each_step = 2 if module.bidirectional else 1, run.targets.dim() - (self.num_classes is None) > 1
        count, states = module.num_layers, []
        for k in range(count):
            run.waiting[module] = None
            rows = slice(k * directions, (k + 1) * directions)
            state = None if hx is None else tree_map(lambda t, rows=rows: t[rows], hx)
            with _only_layer(module, k):
                if self.bptt:
                    output, state = forward(module, input, state)
                else:
                    output, state = self._last_step(module, input, state, each_step)
            states.append(state)
            last = state[0] if isinstance(state, tuple) else state
            last = last.transpose(0, 1).flatten(1) if last.dim() == 3 else last.flatten()
            if k == count - 1:
                run.outputs[module] = output if each_step else last
                break
            self._local(module, output if each_step else last, k)
            input = tree_map(lambda t: F.dropout(t.detach(), module.dropout, module.training), _data(output))
            if isinstance(output, PackedSequence):
                input = PackedSequence(input, *output[1:])
        return output, tree_map(lambda *parts: torch.cat(parts), *states)

    def _last_step(self, module: nn.RNNBase, input: Any, state: Any, each_step: bool) -> Any:
        if not isinstance(input, Tensor) or module.bidirectional or each_step:
            raise ValueError(
                f"bptt=False is for tensors, one direction and one label a sequence; {self._title(module)} has others"
            )
        time, forward = int(module.batch_first and input.dim() == 3), type(module).forward
        head, tail = input.tensor_split([input.shape[time] - 1], time)
        with torch.no_grad():
            before, state = forward(module, head, state) if head.shape[time] else (head.new_empty(0), state)
        after, state = forward(module, tail, state)
        return torch.cat([before, after], time) if head.shape[time] else after, state

    def _local(self, layer: nn.Module, y: Tensor, k: int | None = None) -> None:
        """The gradient of the local loss at an output; ``layer`` says which projection it is compared with."""
        assert self._run is not None  # hooks look
        if k is None:
            k = layer.num_layers - 1 if isinstance(layer, nn.RNNBase) else 0
        targets = self._run.targets
        lead = targets.dim() - (self.num_classes is None)
        if not isinstance(y, Tensor) or y.dim() <= lead or y.shape[:lead] != targets.shape[:lead]:
            raise ValueError(
                f"targets of shape {tuple(targets.shape)} do not fit the output of {self._title(layer)}, of shape "
                f"{tuple(_data(y).shape)}: the first {lead} dimensions must agree, and those of units follow"
            )
        is_map = isinstance(layer, conv._ConvNd)
        if is_map:
            y = _map(cast(conv._ConvNd, layer), y, lead)
        if is_map and self.conv_target == "channel":
            y = y.flatten(lead + 1).mean(-1) if y.dim() > lead + 1 else y
        projection = self._projection(layer, k, y.shape[lead:] if is_map else y.shape[-1:], y)
        if self.local_loss == "cross_entropy":
            if is_map:  # a read-out at each position
                y, projection = y.movedim(lead, -1), projection.movedim(1, -1)
            rows = y.reshape(*y.shape[:lead], -1, y.shape[-1]).to(projection.dtype)
            readout = projection.reshape(projection.shape[0], -1, y.shape[-1])
            logits = torch.einsum("...pu,kpu->...pk", rows, readout)
            if self.num_classes is None:
                repeated = targets.unsqueeze(-2).expand_as(logits).flatten(0, -2)
            else:
                repeated = targets.unsqueeze(-1).expand(logits.shape[:-1]).flatten()
            self._gradients(F.cross_entropy(logits.flatten(0, -2), repeated), None)
            return
        if not is_map:  # one target for all positions between samples and units
            targets = targets.reshape(*targets.shape[:lead], *[1] * (y.dim() - lead - 1), *targets.shape[lead:])
        if self.num_classes is not None:
            target = projection[targets]
        else:
            target = torch.tensordot(targets.to(projection.dtype), projection, 1)
        count = y.numel() // y.shape[lead if is_map else -1]  # a mean over samples, and over positions
        if is_map and self.local_loss == "drtp":  # whose authors have no mean over positions
            count = y.shape[:lead].numel()
        if isinstance(self.local_loss, str) and self.local_loss in _DERIVATIVES:
            grad = _DERIVATIVES[self.local_loss](y.detach().to(target.dtype), target).div_(count).to(y.dtype)
            del target  # as large as a map
            self._gradients(y, grad)
            return
        y, target = ((t.movedim(lead, -1) if is_map else t) for t in (y, target))
        y, target = y.to(target.dtype), target.expand_as(y)
        if callable(self.local_loss):
            value = self.local_loss(y, target).sum()
        else:
            value = (1 - F.cosine_similarity(y, target, dim=-1)).sum()
        self._gradients(value / count, None)

    def _projection(self, layer: nn.Module, k: int, units: torch.Size, like: Tensor) -> Tensor:
        """The projection of a layer, of shape (classes, units)."""
        number = self._places[layer]
        shape = (self.num_classes or self.target_dim or 0, *units)
        stored = self._projections.get((number, k))
        dtype = torch.promote_types(like.dtype, torch.float32)
        if stored is not None and (stored.shape, stored.device, stored.dtype) == (shape, like.device, dtype):
            return stored
        if stored is not None and stored.shape != shape:
            raise ValueError(
                f"the output of {self._title(layer)} has units {tuple(units)} and had {tuple(stored.shape[1:])}; "
                "conv_target='channel' is for maps whose size varies"
            )
        with torch.no_grad():
            normal = torch.empty(1, shape[0], math.prod(units), dtype=dtype, device=like.device)
            seed = self.param_groups[0]["projection_seed"]
            normal = random.normal(normal, seed=seed, draw=number << 8 | k).view(shape)
            made = (PROJECTIONS[self.projection] if isinstance(self.projection, str) else self.projection)(normal)
        if not isinstance(made, Tensor) or made.shape != shape:
            raise ValueError(f"projection must return a tensor of shape {shape}, got {made!r}")
        if self.store_projections:
            self._projections[number, k] = made
        return made

    def _gradients(self, output: Tensor, grad: Tensor | None) -> None:
        """Differentiate back to the parameters of the modules that wait, and to no others."""
        run = self._run
        assert run is not None  # hooks look
        waiting: dict[nn.Module, Any] = {m: _trainable(m) for m in run.waiting}
        for module, (edge, _) in run.edges.items():
            # With the bias, autograd runs the layer's node and frees its input, which a skip connection may lead to.
            # That of a second use would be added to the first's.
            waiting[module] = [edge] if module in run.trained else [edge, module.bias]
        sources = list(dict.fromkeys(source for row in waiting.values() for source in row))
        if not sources:
            return
        try:
            grads = torch.autograd.grad(output, sources, grad, allow_unused=True)
        except RuntimeError as error:
            for module in run.waiting:
                if module in run.trained:
                    raise RuntimeError(
                        f"{self._title(module)} is used again, and a skip connection that starts before an activation "
                        "or a norm leads back to its first use: start it after them, or use another module"
                    ) from error
            raise
        found = {source: new for source, new in zip(sources, grads, strict=True) if new is not None}
        groups = []
        for module, row in waiting.items():
            if found.keys().isdisjoint(row):
                continue
            del run.waiting[module]
            run.outputs.pop(module, None)
            run.trained.add(module)
            if module in run.edges and run.edges[module][0] in found:
                edge, inputs = run.edges.pop(module)
                bias = found.pop(module.bias, None)
                self._update_linear(cast(nn.Linear, module), found.pop(edge), bias, inputs)
            elif self.update_in_forward:
                groups.append(self.param_groups[self._numbers[module]])
        if not found:
            return
        for new in found.values() if self.process_group is not None else ():
            torch.distributed.all_reduce(new, group=self.process_group)
            new /= torch.distributed.get_world_size(self.process_group)
        if not self.update_in_forward:
            for param, new in found.items():
                param.grad = new if param.grad is None else param.grad + new
            return
        for param, new in found.items():
            param.grad = new
        if type(self.base).__module__.startswith("torch.optim."):  # others may number their groups, as seeds do
            self.base.param_groups = groups
        try:
            self.base.step()
        finally:
            self.base.param_groups = self.param_groups
            for param in found:
                param.grad = None
        torch.clear_autocast_cache()  # it may hold the old weights in another dtype

    def _keep_edge(self, layer: nn.Linear, args: Any, output: Tensor) -> None:
        """After a linear layer that plain SGD updates in the forward pass: no gradient of its weights need be made."""
        run = self._run
        if run is None or layer not in run.waiting or self.process_group is not None or len(args) != 1:
            return
        group = self.param_groups[self._numbers[layer]]
        others = any(group[name] for name in ("momentum", "weight_decay", "nesterov", "maximize", "differentiable"))
        same = output.dtype == args[0].dtype == layer.weight.dtype  # no autocast
        whole = len(_trainable(layer)) == 2  # with a bias, for which the layer's node is run, and lets its input go
        if same and whole and not others and not isinstance(group["lr"], Tensor):
            run.edges[layer] = get_gradient_edge(output), args[0]

    @torch.no_grad()
    def _update_linear(self, layer: nn.Linear, delta: Tensor, bias: Tensor | None, inputs: Tensor) -> None:
        rows, lr = delta.flatten(0, -2), self.param_groups[self._numbers[layer]]["lr"]
        layer.weight.addmm_(rows.T, inputs.flatten(0, -2), alpha=-lr)
        layer.bias.sub_(rows.sum(0) if bias is None else bias, alpha=lr)

    def _title(self, module: nn.Module) -> str:
        return f"{self._names[module] or 'the model'!r} ({type(module).__name__})"

    # The step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Apply the gradients; with ``update_in_forward`` that has been done, and nothing happens.

        Args:
            closure: runs the model within :meth:`targets`; called once.

        Returns:
            What the closure returned, or ``None``.
        """
        loss = closure() if closure is not None else None
        if not self.update_in_forward:
            self.base.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take groups, state and the seed of the projections from a checkpoint.

        Raises:
            TypeError, ValueError: it does not fit; nothing has changed then.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(f"state_dict must be a dictionary, got {state_dict!r}")
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        if not {"state", "param_groups"} <= state_dict.keys():
            raise ValueError("the state dict is not one of TPSGD: it lacks state or groups")
        check_form(state_dict)
        for group in state_dict["param_groups"]:
            if "projection_seed" not in group:
                raise ValueError("the state dict is not one of TPSGD: its groups have no projection_seed")
            check_number("lr", group.get("lr"), 0.0, math.inf, "finite and >= 0")
            check_int("seed", group["projection_seed"], 0, 2**63 - 1)
        self.base.load_state_dict(state_dict)
        self._share()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)


def _unwrapped(model: Any) -> tuple[Any, Any]:
    """What DistributedDataParallel and torch.compile have wrapped, and the processes of the former."""
    group = None
    while True:
        if torch.distributed.is_available() and isinstance(model, nn.parallel.DistributedDataParallel):
            model, group = model.module, model.process_group
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model, group


def _groups(names: dict[nn.Module, str], rates: dict[str, Any], lr: Any, one_owner: bool) -> list[dict[str, Any]]:
    """A group for each module with trainable parameters, after a look at whether all of them can be trained."""
    groups: list[dict[str, Any]] = []
    owners: dict[Tensor, str] = {}
    for module, name in names.items():
        own = [(n, p) for n, p in module.named_parameters(prefix=name, recurse=False) if p.requires_grad]
        if own and not isinstance(module, _LAYERS + _WITH_A_LAYER):
            raise ValueError(
                f"model has parameters that no local loss reaches: {', '.join(n for n, _ in own)} of "
                f"{name or 'the model'!r}, a {type(module).__name__}; freeze them or use another module"
            )
        for n, p in own:
            if isinstance(p, nn.UninitializedParameter) or not p.is_floating_point() or type(p) is not nn.Parameter:
                raise ValueError(f"parameter {n!r} must be a plain, initialized real one, got {type(p).__name__}")
            if p in owners and one_owner:
                raise ValueError(f"{n!r} is also {owners[p]!r}: update_in_forward would change it between its uses")
        rows = [(n, p) for n, p in own if p not in owners]
        owners.update({p: n for n, p in own})
        if rows:
            groups.append(dict(params=rows, name=name, lr=rates.get(name, lr)))
    if not groups:
        raise ValueError("model has no parameters that require gradients")
    unknown = rates.keys() - {group["name"] for group in groups}
    if unknown:
        raise ValueError(f"per_layer_lr names {sorted(unknown)[0]!r}, which is no module with parameters")
    return groups


@contextlib.contextmanager
def _only_layer(module: nn.RNNBase, k: int) -> Iterator[None]:
    """A recurrent module that consists of its layer ``k`` alone."""
    kept = {name: vars(module)[name] for name in ("num_layers", "input_size", "_flat_weights", "dropout")}
    count = len(module._flat_weights) // module.num_layers
    weights = module._flat_weights[k * count : (k + 1) * count]
    size = cast(Tensor, weights[0]).shape[1]
    vars(module).update(num_layers=1, input_size=size, _flat_weights=weights, dropout=0.0)
    try:
        yield
    finally:
        vars(module).update(kept)


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [param for param in module._parameters.values() if param is not None and param.requires_grad]


def _map(layer: conv._ConvNd, y: Tensor, lead: int) -> Tensor:
    """The output of a convolution with its channels after the samples, where a flatten or transpose came last."""
    channels = layer.out_channels
    if y.shape[lead] == channels:
        return y
    viewed = y._is_view() or "View" in type(y.grad_fn).__name__
    if y.dim() == lead + 1:
        return y.reshape(*y.shape[:lead], channels, -1) if viewed and y.shape[lead] % channels == 0 else y
    moved = viewed or y.dim() != 1 + lead + len(layer.kernel_size)
    return y.movedim(-1, lead) if moved and y.shape[-1] == channels else y


def _data(value: Any) -> Any:
    return value.data if isinstance(value, PackedSequence) else value


def _requires_grad(tree: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(tree))


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
