"""What torch's tests of its own optimizers ask of an optimizer, asked of every public one of ours.

``optimizer_infos.py`` has the records, ``torch_methods.py`` the list of torch's test methods with where each of them is
covered, or why it does not apply.
"""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch_methods
from optimizer_infos import Info, batch, by_samples, infos, loss, model, of_closures, of_gradients, of_parameters
from steps import bits
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim._stateless import swap_in_optimizer_params_and_state
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import (
    TensorTracker,
    _get_optim_inputs_including_global_cliquey_kwargs,
    optims,
)
from torch.testing._internal.common_utils import TestCase, gradcheck, parametrize

import optimzoo

REAL = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def inputs(info: Info, *without: str) -> list[dict]:
    """The options of a record, with each implementation that the class has."""
    found = _get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, info, skip=without)
    return [copy.deepcopy(each.kwargs) for each in found]


def leaves(info: Info, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, **kwargs: bool) -> list[Tensor]:
    """Parameters with gradients; none of them is zero."""
    params = []
    for shape in shapes:
        param = torch.rand(shape, dtype=dtype).add_(0.5).requires_grad_(kwargs.get("requires_grad", True))
        param.grad = torch.randn_like(param)
        params.append(param)
    return params


def with_requires_grad(options: dict) -> bool:
    return not options.get("differentiable", False)


class TestTorchSuite(TestCase):
    def setUp(self):
        super().setUp()
        # DiceSGD says so whenever it is copied or loaded; test_dicesgd.py has tests of that.
        warnings.filterwarnings("ignore", message="the error state is secret")

    # The records

    @optims(infos)
    def test_records_leave_flags_to_the_tests(self, device, dtype, optim_info):
        flags = {"foreach", "fused", "differentiable"}
        for each in optim_info.optim_inputs_func(device):
            self.assertFalse(flags & each.kwargs.keys())
            self.assertIsNone(each.params)
        names = inspect.signature(optim_info.optim_cls).parameters
        for flag in ("foreach", "fused", "differentiable", "capturable", "maximize"):
            self.assertEqual(
                flag in names or bool({"impl", "options"} & names.keys()),
                optim_info.takes_gradients or optim_info.optim_cls in (optimzoo.TPSGD, optimzoo.DiceSGD),
                flag,
            )

    @optims(infos)
    def test_errors(self, device, dtype, optim_info):
        for error in optim_info.optim_error_inputs_func(device, dtype):
            given, options = error.optimizer_error_input.params, error.optimizer_error_input.kwargs
            if error.error_type is UserWarning:
                # Not assertWarns, which looks into every module and so imports those that wait to be imported.
                with pytest.warns(UserWarning, match=error.error_regex):
                    optim_info.optim_cls(given, **options)
            else:
                with self.assertRaisesRegex(error.error_type, error.error_regex):
                    if given is None:
                        optim_info.make(model(), **options)
                    else:
                        optim_info.optim_cls(given, **options)

    # Steps go where they should

    @parametrize("contiguous", [True, False])
    @optims(infos)
    def test_steps_go_in_the_right_direction(self, device, dtype, optim_info, contiguous):
        data = batch()
        for options in inputs(optim_info, "differentiable"):
            network = model()
            if not contiguous:
                for layer in (network[0], network[2]):
                    room = torch.zeros(*layer.weight.shape, 2)
                    layer.weight = nn.Parameter(room[..., 0].copy_(layer.weight.detach()))
                if options.get("fused"):
                    with self.assertRaisesRegex(RuntimeError, "gaps"):
                        optim_info.make(network, **options)
                    continue
            optimizer = optim_info.make(network, **options)
            before = loss(network, *data)
            for _ in range(10):
                returned = optim_info.train(optimizer, network, *data)
                self.assertIsInstance(returned, Tensor)
            assertion = self.assertGreater if options.get("maximize") else self.assertLess
            assertion(loss(network, *data), before)

    @optims(infos)
    def test_schedulers_keep_the_direction(self, device, dtype, optim_info):
        data = batch()
        for constructors, options in itertools.product(
            optim_info.scheduler_inputs, inputs(optim_info, "differentiable")
        ):
            network = model()
            optimizer = optim_info.make(network, **options)
            schedulers = [constructor(optimizer) for constructor in constructors]
            before = loss(network, *data)
            for _ in range(12):
                value = optim_info.train(optimizer, network, *data)
                for scheduler in schedulers:
                    scheduler.step(*[value.detach()] if isinstance(scheduler, ReduceLROnPlateau) else [])
            assertion = self.assertGreater if options.get("maximize") else self.assertLess
            assertion(loss(network, *data), before)

    @optims([info for info in infos if info.make.func is of_parameters and info.optim_cls is not optimzoo.SSO])
    def test_groups_with_a_scheduler_go_in_the_right_direction(self, device, dtype, optim_info):
        data = batch()
        for constructors in optim_info.scheduler_inputs:
            network = model()
            groups = [dict(params=[*network[0].parameters()]), dict(params=[*network[2].parameters()], lr=0.02)]
            optimizer = optim_info.optim_cls(groups, **optim_info.settings["default"])
            schedulers = [constructor(optimizer) for constructor in constructors]
            before = loss(network, *data)
            for _ in range(20):
                value = optim_info.train(optimizer, network, *data)
                for scheduler in schedulers:
                    scheduler.step(*[value.detach()] if isinstance(scheduler, ReduceLROnPlateau) else [])
            self.assertLess(loss(network, *data), before)

    @parametrize("num_dim", [0, 1, 2])
    @optims(of_gradients)
    def test_a_tensor_learning_rate(self, device, dtype, optim_info, num_dim):
        for options in inputs(optim_info, "differentiable"):
            networks, data = [model(), model()], batch()
            for network, lr in zip(networks, (1e-3, torch.tensor(1e-3).reshape([1] * num_dim)), strict=True):
                optimizer = optim_info.make(network, **{**options, "lr": lr})
                for _ in range(3):
                    optim_info.train(optimizer, network, *data)
            self.assertEqual(*(list(network.parameters()) for network in networks))

    @optims(of_closures)
    def test_what_takes_no_tensor_as_learning_rate_says_so(self, device, dtype, optim_info):
        options = {**optim_info.settings["default"], "lr": torch.tensor(0.1)}
        try:
            optimizer = optim_info.make(model(), **options)
        except (TypeError, ValueError) as error:
            self.assertRegex(str(error), "lr must be")
        else:
            self.assertEqual(optimizer.param_groups[0]["lr"], 0.1)

    # Complex parameters are pairs of real ones

    @optims([info for info in of_gradients if info.supports_complex], dtypes=[torch.complex64])
    def test_complex(self, device, dtype, optim_info):
        for options in inputs(optim_info, "differentiable"):
            complex_params = [
                torch.randn(5, 3, dtype=dtype, requires_grad=True),
                torch.randn(4, dtype=dtype, requires_grad=True),
                torch.randn(5, 3, requires_grad=True),
            ]
            real_params = [
                (torch.view_as_real(p) if p.is_complex() else p).detach().clone().requires_grad_()
                for p in complex_params
            ]
            optimizers = [optim_info.optim_cls(params, **options) for params in (complex_params, real_params)]
            for _ in range(3):
                for one, other in zip(complex_params, real_params, strict=True):
                    other.grad = torch.randn_like(other)
                    one.grad = torch.view_as_complex(other.grad) if one.is_complex() else other.grad.clone()
                for optimizer in optimizers:
                    optimizer.step()
                self.assertEqual([torch.view_as_real(p) if p.is_complex() else p for p in complex_params], real_params)

    @optims([info for info in of_gradients if info.supports_complex], dtypes=[torch.complex64])
    def test_complex_2d(self, device, dtype, optim_info):
        for options in inputs(optim_info, "differentiable"):
            whole = torch.randn(2, dtype=dtype, requires_grad=True)
            parts = [part.detach().clone().requires_grad_() for part in (whole.real, whole.imag)]
            optimizers = [optim_info.optim_cls(params, **options) for params in ([whole], parts)]
            for _ in range(3):
                for optimizer, z in zip(optimizers, (whole, torch.complex(*parts)), strict=True):
                    optimizer.zero_grad()
                    ((1 - z[0]) ** 2 + 100 * (z[1] - z[0] ** 2) ** 2).abs().backward()
                    optimizer.step()
                self.assertEqual(torch.complex(*parts), whole, atol=1e-5, rtol=1e-4)

    @optims([info for info in of_gradients if not info.supports_complex], dtypes=[torch.complex64])
    def test_complex_parameters_are_refused_with_a_reason(self, device, dtype, optim_info):
        with self.assertRaisesRegex(ValueError, "complex"):
            optim_info.optim_cls([torch.randn(3, dtype=dtype)])

    @optims([info for info in infos if "sparse" in info.refuses and info.takes_gradients])
    def test_sparse_gradients_are_refused_with_a_reason(self, device, dtype, optim_info):
        (param,) = leaves(optim_info, (3, 2))
        param.grad = param.grad.to_sparse()
        optimizer = optim_info.optim_cls([param])
        with self.assertRaisesRegex(RuntimeError, "sparse"):
            optimizer.step()
        self.assertEqual(len(optimizer.state), 0)

    # Implementations agree

    def compare(self, optim_info: Info, options: list[dict], dtype: torch.dtype) -> None:
        """Seven steps of two optimizers, with a step without gradients and a parameter that is frozen for a while."""
        tracker, generator = (
            TensorTracker(dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else {}),
            torch.Generator(),
        )
        start = [torch.rand(shape, generator=generator).add_(0.5).to(dtype) for shape in ((5, 4), (5,), (2, 5), ())]
        rows = [[p.clone().requires_grad_() for p in start] for _ in options]
        optimizers = [optim_info.optim_cls(row, **each) for row, each in zip(rows, options, strict=True)]
        for i in range(7):
            grads = [torch.randn(p.shape, generator=generator).to(dtype) for p in start]
            for row, optimizer in zip(rows, optimizers, strict=True):
                optimizer.zero_grad()
                for j, (param, grad) in enumerate(zip(row, grads, strict=True)):
                    if i != 2 and not (j == 2 and 3 <= i < 5):
                        param.grad = grad.clone()
                optimizer.step()
            for one, other in zip(*rows, strict=True):
                states = [optimizer.state[p] for p, optimizer in ((one, optimizers[0]), (other, optimizers[1]))]
                self.assertEqual(states[0].keys(), states[1].keys())
                for value, twin in zip([one, *states[0].values()], [other, *states[1].values()], strict=True):
                    tracker.add(value)
                    tracker.pop_check_set(twin, self)
            self.assertTrue(tracker.all_popped())

    @optims(of_gradients, dtypes=[torch.float64])
    def test_foreach_matches_forloop(self, device, dtype, optim_info):
        for each in optim_info.optim_inputs_func(device):
            self.compare(optim_info, [dict(each.kwargs, fused=False, foreach=flag) for flag in (False, True)], dtype)

    @optims(of_gradients, dtypes=REAL)
    def test_fused_matches_forloop(self, device, dtype, optim_info):
        for each in optim_info.optim_inputs_func(device):
            options = [dict(each.kwargs, foreach=False, fused=flag) for flag in (False, True)]
            self.compare(optim_info, options, dtype)

    @optims(of_gradients, dtypes=[torch.float64])
    def test_capturable_and_differentiable_match_forloop(self, device, dtype, optim_info):
        flags = [dict(capturable=True)] if optim_info.has_capturable_arg else []
        for flag in flags:
            self.compare(
                optim_info, [dict(foreach=False, fused=False), dict(foreach=False, fused=False, **flag)], dtype
            )
        grads = [torch.randn(3, dtype=dtype) for _ in range(4)]
        after = []
        for options in (dict(foreach=False, fused=False), dict(differentiable=True)):
            param = torch.linspace(0.5, 1.5, 3, dtype=dtype)
            optimizer = optim_info.optim_cls([param], **{**optim_info.settings["default"], **options})
            for grad in grads:
                param.grad = grad
                optimizer.step()
            after.append([param, *optimizer.state[param].values()])
        self.assertEqual(*after)

    @parametrize("impl", ["foreach", "fused"])
    @optims(of_gradients)
    def test_mixed_dtypes(self, device, dtype, optim_info, impl):
        # Dale groups have bounds that a dtype can hold, so that float16 is in a group of its own.
        for each in optim_info.optim_inputs_func(device):
            rows, states = [], []
            for flag in (False, True):
                torch.manual_seed(0)
                rows.append([leaves(optim_info, (2, 3), dtype=kind)[0] for kind in REAL for _ in range(2)])
                groups = [dict(params=rows[-1][:-2]), dict(params=rows[-1][-2:])]
                options = {**each.kwargs, "foreach": False, "fused": False, impl: flag}
                optimizer = optim_info.optim_cls(groups, **options)
                for _ in range(5):
                    optimizer.step()
                states.append([dict(optimizer.state[param]) for param in rows[-1]])
            for one, other, state, twin in zip(*rows, *states, strict=True):
                rtol, atol = (5 * t for t in torch.testing._comparison.default_tolerances(one.dtype))
                self.assertEqual(one, other, rtol=rtol, atol=atol)
                self.assertEqual(state, twin, rtol=rtol, atol=atol)

    @optims(of_gradients)
    def test_default_dtypes_change_nothing(self, device, dtype, optim_info):
        outcomes = []
        for default in (torch.float32, torch.float64, torch.float16):
            torch.manual_seed(0)
            params = leaves(optim_info, (3, 2), (4,))
            before = torch.get_default_dtype()
            torch.set_default_dtype(default)
            try:
                for impl in ("foreach", "fused"):
                    optimizer = optim_info.optim_cls(params, **{impl: True})
                    for _ in range(3):
                        optimizer.step()
            finally:
                torch.set_default_dtype(before)
            outcomes.append(bits([*params, *(dict(optimizer.state[p]) for p in params)]))
            self.assertEqual({optimizer.state[p]["step"].dtype for p in params}, {torch.float32})
        self.assertTrue(outcomes[0] == outcomes[1] == outcomes[2])

    @optims(of_gradients)
    def test_nothing_but_fused_is_the_default_on_the_cpu(self, device, dtype, optim_info):
        for each in optim_info.optim_inputs_func(device):
            optimizer = optim_info.optim_cls(leaves(optim_info, (3, 2), (4,)), **each.kwargs)
            with mock.patch.object(type(optimizer), "_call_fused", autospec=True) as fused:
                optimizer.step()
            self.assertTrue(fused.called)

    @optims(of_gradients)
    def test_peak_memory_foreach(self, device, dtype, optim_info):
        count, size = 10, 1 << 14
        for each in optim_info.optim_inputs_func(device):
            if each.desc not in ("default", "maximize, weight decay", "capturable"):
                continue
            peaks = []
            for flag in (False, True):
                params = leaves(optim_info, *[(size,)] * count)
                optimizer = optim_info.optim_cls(params, **{**each.kwargs, "fused": False, "foreach": flag})
                optimizer.step()
                peaks.append(peak(optimizer.step))
            self.assertGreater(peaks[0], 4 * size)  # else this would not see memory
            self.assertLessEqual(peaks[1], peaks[0] + optim_info.foreach_temporaries * count * size * 4, each.desc)

    # Fused

    @optims(of_gradients)
    def test_fused_error_on_params_on_meta(self, device, dtype, optim_info):
        with torch.device("meta"):
            network = nn.Linear(2, 3)
        with self.assertRaisesRegex(RuntimeError, r"fused=True cannot be met for params\[0\].*meta"):
            optim_info.optim_cls(network.parameters(), fused=True)
        optimizer = optim_info.optim_cls(network.parameters())
        network.to_empty(device=device)
        with torch.no_grad():
            for param in network.parameters():
                param.fill_(0.5).grad = torch.ones_like(param)
        optimizer = optim_info.optim_cls(network.parameters(), fused=True)
        optimizer.step()

    @optims(of_gradients)
    def test_fused_does_not_step_if_foundinf(self, device, dtype, optim_info):
        for each, scaled in itertools.product(optim_info.optim_inputs_func(device), (False, True)):
            params = leaves(optim_info, *[(2,)] * 5)
            before = [p.detach().clone() for p in params]
            optimizer = optim_info.optim_cls(params, **{**each.kwargs, "fused": True})
            optimizer.grad_scale = torch.ones((1,)) if scaled else None
            optimizer.found_inf = torch.ones(())
            optimizer.step()
            self.assertEqual([optimizer.state[p]["step"] for p in params], [torch.zeros(())] * 5)
            self.assertEqual(params, before)
            optimizer.found_inf = torch.zeros(())
            optimizer.step()
            self.assertEqual([optimizer.state[p]["step"] for p in params], [torch.ones(())] * 5)

    # Groups

    @optims(of_gradients)
    def test_groups_weight_decay(self, device, dtype, optim_info):
        data = batch()
        for options in inputs(optim_info, "differentiable"):
            networks = [model(seed=3), model(seed=4)]
            groups = [{"params": [*n.parameters()], **options} for n in networks]
            groups[1]["weight_decay"] = 0.0
            shared = {name: options[name] for name in ("max_grad_norm", "b0", "per_group") if name in options}
            optimizer = optim_info.optim_cls(groups, **shared)
            outputs = nn.Module()
            outputs.forward = lambda x, networks=networks: networks[0](x) + networks[1](x)
            before = loss(outputs, *data)
            for _ in range(5):
                optim_info.train(optimizer, outputs, *data)
            (self.assertGreater if options.get("maximize") else self.assertLess)(loss(outputs, *data), before)

    @optims(of_gradients)
    def test_groups_lr(self, device, dtype, optim_info):
        data = batch()
        for options in inputs(optim_info, "differentiable"):
            network, (still,) = model(), leaves(optim_info, (2, 2))
            before, value = still.detach().clone(), loss(network, *data)
            groups = [{"params": [*network.parameters()], "lr": options.get("lr", 1e-3)}, {"params": [still]}]
            optimizer = optim_info.optim_cls(groups, **{**options, "lr": 1e-28})
            for _ in range(10):
                still.grad = torch.rand_like(still)
                optim_info.train(optimizer, network, *data)
            (self.assertGreater if options.get("maximize") else self.assertLess)(loss(network, *data), value)
            self.assertEqual(still, before)

    # Nothing to do

    @optims(of_gradients)
    def test_step_is_noop_when_params_have_no_grad(self, device, dtype, optim_info):
        for options in inputs(optim_info):
            params = [torch.rand(2, 3) + 0.5 for _ in range(2)]
            before = copy.deepcopy(params)
            optimizer = optim_info.optim_cls(params, **options)
            self.assertEqual(optimizer.step(lambda: torch.tensor([1.0])), torch.tensor([1.0]))
            self.assertEqual(params, before)
            self.assertEqual(len(optimizer.state), 0)

    @optims(of_gradients)
    def test_step_is_noop_for_zero_grads(self, device, dtype, optim_info):
        for options in inputs(optim_info):
            (param,) = leaves(optim_info, (5, 1), requires_grad=with_requires_grad(options))
            before = param.detach().clone()
            param.grad = torch.zeros_like(param)
            optimizer = optim_info.optim_cls([param], **options)
            if optimizer.defaults["weight_decay"] or options.get("temperature"):
                continue
            optimizer.step(lambda: torch.tensor([1.0]))
            self.assertEqual(param, before, rtol=0, atol=0)

    @optims(of_gradients)
    def test_grads_are_never_inplaced_into(self, device, dtype, optim_info):
        for options in inputs(optim_info):
            (param,) = leaves(optim_info, (5, 1), requires_grad=with_requires_grad(options))
            version, before = param.grad._version, param.grad.clone()
            optimizer = optim_info.optim_cls([param], **options)
            for _ in range(5):
                optimizer.step(lambda: torch.tensor([1.0]))
            self.assertEqual(param.grad._version, version)
            self.assertEqual(param.grad, before, rtol=0, atol=0)

    @optims(of_closures)
    def test_gradients_of_others_are_left_alone(self, device, dtype, optim_info):
        if optim_info.make.func is not of_parameters or optim_info.train is by_samples:
            return  # TPSGD fills the gradients, and private classes with what is private
        for options in inputs(optim_info):
            network = model()
            for param in network.parameters():
                param.grad = torch.ones_like(param)
            optim_info.train(optim_info.make(network, **options), network, *batch())
            self.assertTrue(all((p.grad == 1).all() for p in network.parameters()))

    @optims(infos)
    def test_zero_grad(self, device, dtype, optim_info):
        network = model()
        optimizer = optim_info.make(network, **optim_info.settings["default"])
        for param in network.parameters():
            param.grad = torch.ones_like(param)
        grads = [p.grad for p in network.parameters()]
        optimizer.zero_grad(set_to_none=False)
        self.assertTrue(all(p.grad is g and not g.any() for p, g in zip(network.parameters(), grads, strict=True)))
        optimizer.zero_grad()
        self.assertTrue(all(p.grad is None for p in network.parameters()))

    # What is printed, copied and saved

    @optims(infos)
    def test_optimizer_can_be_printed(self, device, dtype, optim_info):
        for options in inputs(optim_info):
            self.assertIn("lr: ", repr(optim_info.make(model(), **options)))

    @optims(infos)
    def test_non_empty_state(self, device, dtype, optim_info):
        for options in inputs(optim_info, "differentiable"):
            network = model()
            optimizer = optim_info.make(network, **options)
            optim_info.train(optimizer, network, *batch())
            stateless = optim_info.optim_cls is optimzoo.SSO or (
                optim_info.optim_cls is optimzoo.TPSGD and not options.get("momentum") and "base" not in options
            )
            self.assertEqual(len(optimizer.state) > 0, not stateless)
            self.assertTrue(all(len(state) > 0 for state in optimizer.state.values()))

    @parametrize("named", [(False, False), (False, True), (True, False), (True, True)])
    @optims(infos)
    def test_state_dict_deterministic(self, device, dtype, optim_info, named):
        def without_names(tree: object) -> object:
            if isinstance(tree, dict):
                return {key: without_names(value) for key, value in tree.items() if key != "param_names"}
            return [without_names(value) for value in tree] if isinstance(tree, list) else tree

        data = batch()
        every = inputs(optim_info, "differentiable")
        for options in every[:1] if any(named) else every:
            network = model()
            optimizer = optim_info.make(network, named[0], **options)
            for _ in range(3):
                optim_info.train(optimizer, network, *data)
            twin = copy.deepcopy(network) if optim_info.make.func is of_parameters else model()
            twin.load_state_dict(network.state_dict())
            other = optim_info.make(twin, named[1], **options)
            by_name = {"export_private_state": True} if optim_info.optim_cls is optimzoo.DiceSGD else {}
            state_dict = copy.deepcopy(optimizer.state_dict(**by_name))
            before = copy.deepcopy(state_dict)
            other.load_state_dict(state_dict)
            self.assertEqual(state_dict, before)  # loading does not write to it
            for _ in range(3):
                optim_info.train(optimizer, network, *data)
                optim_info.train(other, twin, *data)
                self.assertEqual(list(network.parameters()), list(twin.parameters()), rtol=0, atol=0)
            self.assertEqual(without_names(optimizer.state_dict()), without_names(other.state_dict()), rtol=0, atol=0)
            if any(named) and optim_info.make.func is of_parameters:
                names = [name for name, _ in network.named_parameters()]
                self.assertEqual(other.state_dict()["param_groups"][0]["param_names"], names)
            other.param_groups.extend(other.param_groups)  # repeated parameters have the same numbers
            groups = without_names(other.state_dict())["param_groups"]
            self.assertEqual(groups[-1], groups[len(groups) // 2 - 1])

    @optims(infos)
    def test_can_load_older_state_dict(self, device, dtype, optim_info):
        for options in inputs(optim_info, "differentiable"):
            network = model()
            optimizer = optim_info.make(network, **options)
            for _ in range(3):
                optim_info.train(optimizer, network, *batch())
            older = copy.deepcopy(optimizer.state_dict())
            for group in older["param_groups"]:
                for flag in optim_info.not_og_supported_flags:
                    group.pop(flag, None)
            optimizer.load_state_dict(older)
            self.assertEqual([g.keys() for g in optimizer.param_groups], [g.keys() for g in optimizer.param_groups])
            optim_info.train(optimizer, network, *batch())

    @optims(infos)
    def test_save_load_equality_with_weights_only(self, device, dtype, optim_info):
        for options in inputs(optim_info, "differentiable"):
            network = model()
            optimizer = optim_info.make(network, named=True, **options)
            for _ in range(3):
                optim_info.train(optimizer, network, *batch())
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            for weights_only in (True, False):
                file.seek(0)
                self.assertEqual(torch.load(file, weights_only=weights_only), optimizer.state_dict(), rtol=0, atol=0)

    @optims(of_gradients)
    def test_load_nontensor_step(self, device, dtype, optim_info):
        for options in inputs(optim_info, "differentiable"):
            optimizer = optim_info.optim_cls(leaves(optim_info, (2, 3), (4,)), **options)
            for _ in range(3):
                optimizer.step()
            state_dict = copy.deepcopy(optimizer.state_dict())
            for state in state_dict["state"].values():
                state["step"] = state["step"].item()
            optimizer.load_state_dict(state_dict)
            optimizer.step()
            self.assertEqual({int(state["step"]) for state in optimizer.state.values()}, {4})

    @optims(infos)
    def test_deepcopy_and_pickle_copy_all_public_attrs(self, device, dtype, optim_info):
        def public(optimizer: Optimizer) -> set[str]:
            return {name for name in vars(optimizer) if not name.startswith("_")}

        for options in inputs(optim_info, "differentiable"):
            network = model()
            optimizer = optim_info.make(network, **options)
            for _ in range(3):
                optim_info.train(optimizer, network, *batch())
            self.assertEqual(public(copy.deepcopy(optimizer)), public(optimizer))
            self.assertEqual(public(pickle.loads(pickle.dumps(optimizer))), public(optimizer))

    @optims(infos)
    def test_the_profiler_names_the_step(self, device, dtype, optim_info):
        network = model()
        optimizer = optim_info.make(network, **optim_info.settings["default"])
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optim_info.train(optimizer, network, *batch())
        self.assertIn(f"Optimizer.step#{optim_info.name}.step", {event.key for event in profile.key_averages()})

    # Hooks

    @optims(infos)
    def test_state_dict_hooks(self, device, dtype, optim_info):
        def mark(optimizer: Optimizer) -> None:
            optimizer.state["test"] = 1

        def unmark(optimizer: Optimizer, state_dict: dict) -> dict:
            return {**state_dict, "marked": state_dict["state"].pop("test", None) == 1}

        for options in inputs(optim_info):
            network = model()
            optimizer = optim_info.make(network, **options)
            after = optimizer.register_state_dict_post_hook(unmark)
            self.assertFalse(optimizer.state_dict()["marked"])
            optimizer.register_state_dict_pre_hook(mark)
            self.assertTrue(optimizer.state_dict()["marked"])
            self.assertNotIn("test", optimizer.state_dict()["state"])
            after.remove()
            self.assertEqual(optimizer.state_dict()["state"]["test"], 1)

    @optims(infos)
    def test_load_state_dict_hooks(self, device, dtype, optim_info):
        def write(optimizer: Optimizer, state_dict: dict) -> None:
            state_dict["param_groups"][0]["lr"] = 0.002

        def replace(optimizer: Optimizer, state_dict: dict) -> dict:
            state_dict = copy.deepcopy(state_dict)
            state_dict["param_groups"][0]["lr"] = 0.003
            return state_dict

        seen = []
        for options in inputs(optim_info):
            optimizer = optim_info.make(model(), **options)
            first = optimizer.register_load_state_dict_pre_hook(write)
            optimizer.register_load_state_dict_post_hook(lambda opt: seen.append(float(opt.param_groups[0]["lr"])))
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.register_load_state_dict_pre_hook(replace, prepend=True)
            optimizer.load_state_dict(optimizer.state_dict())
            first.remove()
            optimizer.load_state_dict(optimizer.state_dict())
            self.assertEqual(seen[-3:], [0.002, 0.002, 0.003])

    @optims(infos)
    def test_step_hooks(self, device, dtype, optim_info):
        calls = []

        def noted(number: int) -> Callable[..., None]:
            return lambda optimizer, *_: calls.append((number, optimizer))

        for options in inputs(optim_info, "differentiable"):
            network = model()
            calls.clear()
            optimizer = optim_info.make(network, **options)
            others = [torch.optim.SGD([torch.ones(1)])]
            handles = [
                register_optimizer_step_pre_hook(noted(0)),
                register_optimizer_step_post_hook(noted(3)),
                optimizer.register_step_pre_hook(noted(1)),
                optimizer.register_step_post_hook(noted(2)),
                *(other.register_step_pre_hook(noted(1)) for other in others),
            ]
            optim_info.train(optimizer, network, *batch())
            self.assertEqual([number for number, opt in calls if opt is optimizer], [0, 1, 2, 3])
            others[0].step()
            self.assertEqual([number for number, opt in calls if opt is others[0]], [0, 1, 3])
            for handle in handles:
                handle.remove()
            count = len(calls)
            optim_info.train(optimizer, network, *batch())
            self.assertEqual(len(calls), count)

    # Closures

    @optims(infos)
    def test_returned_types_are_consistent(self, device, dtype, optim_info):
        types = set()
        for options in inputs(optim_info, "differentiable"):
            network = model()
            optimizer = optim_info.make(network, **options)
            types |= {type(optim_info.train(optimizer, network, *batch())) for _ in range(2)}
        self.assertEqual(types, {Tensor})

    # Derivatives

    @optims(of_gradients, dtypes=[torch.float64])
    def test_a_differentiable_step_has_the_right_derivatives(self, device, dtype, optim_info):
        for each in optim_info.optim_inputs_func(device):
            if isinstance(each.kwargs.get("lr"), Tensor) or each.kwargs.get("capturable"):
                continue
            options = {**each.kwargs, "differentiable": True}
            param, grad = torch.rand(4, dtype=dtype) + 0.5, torch.randn(4, dtype=dtype)
            probe = optim_info.optim_cls([param.clone()], **options)
            names = [name for name in probe.rule(probe.param_groups[0]).states if name not in probe.drawn]
            states = [torch.rand(4, dtype=dtype) + 0.1 for _ in names]
            lr = torch.tensor(0.1, dtype=dtype)

            def step(param, grad, lr, *states, options=options, names=names):
                param = param.clone()
                optimizer = optim_info.optim_cls([param], **{**options, "lr": lr})
                param.grad = torch.ones_like(param)
                optimizer._gather(optimizer.param_groups[0])  # makes the state that the class does not differentiate
                param.grad = grad
                optimizer.state[param]["step"].fill_(9.0)
                optimizer.state[param].update({n: s.clone() for n, s in zip(names, states, strict=True)})
                optimizer.step()
                return (param, *(optimizer.state[param][name] for name in names))

            variables = [tensor.requires_grad_() for tensor in (param, grad, lr, *states)]
            self.assertTrue(gradcheck(step, variables), each.desc)

    @optims(of_gradients, dtypes=[torch.float64])
    def test_steps_in_a_row_are_differentiable_in_the_learning_rate(self, device, dtype, optim_info):
        inputs, targets = batch(dtype)

        def trained(lr, start):
            weight = start.clone()
            optimizer = optim_info.optim_cls(
                [weight], **{**optim_info.settings["default"], "lr": lr, "differentiable": True}
            )
            for _ in range(3):
                (weight.grad,) = torch.autograd.grad(
                    (inputs @ weight - targets[:, 0]).square().mean(), weight, create_graph=True
                )
                optimizer.step()
            return (inputs @ weight - targets[:, 0]).square().mean()

        variables = [torch.tensor(0.1, dtype=dtype), torch.rand(4, dtype=dtype) + 0.5]
        self.assertTrue(gradcheck(trained, [tensor.requires_grad_() for tensor in variables]))

    @optims(of_gradients)
    def test_hyper_parameters_other_than_lr_are_numbers(self, device, dtype, optim_info):
        for name, value in optim_info.optim_cls(leaves(optim_info, (2,))).defaults.items():
            if name in ("weight_decay", "eps", "momentum", "betas") and isinstance(value, float | tuple):
                wrong = tuple(map(torch.tensor, value)) if name == "betas" else torch.tensor(value)
                with self.assertRaisesRegex(TypeError, f"{name} must be a number"):
                    optim_info.optim_cls(leaves(optim_info, (2,)), **{name: wrong})

    # Parameters and state that are somebody else's for a while

    @optims(of_gradients)
    def test_parameters_and_state_can_be_swapped_in(self, device, dtype, optim_info):
        for options in (dict(each.kwargs) for each in optim_info.optim_inputs_func(device)):
            network = model()
            optimizer = optim_info.make(network, **options)
            optim_info.train(optimizer, network, *batch())
            other = {name: p.detach() * 1.5 for name, p in network.named_parameters()}
            swapped = copy.deepcopy(optimizer.state_dict())
            twin = copy.deepcopy(optimizer)
            before = bits([*network.parameters(), *(dict(row) for row in optimizer.state.values())])
            state, groups = optimizer.state, optimizer.param_groups
            with swap_in_optimizer_params_and_state(optimizer, other, swapped):
                for param in other.values():
                    param.grad = torch.ones_like(param)
                optimizer.step()
            self.assertIs(optimizer.state, state)
            self.assertIs(optimizer.param_groups, groups)
            self.assertEqual(bits([*network.parameters(), *(dict(row) for row in optimizer.state.values())]), before)
            with torch.no_grad():
                for param in (p for group in twin.param_groups for p in group["params"]):
                    param.mul_(1.5).grad = torch.ones_like(param)
            twin.step()
            self.assertEqual(
                [p for group in twin.param_groups for p in group["params"]], list(other.values()), rtol=0, atol=0
            )
            network.zero_grad()
            optim_info.train(optimizer, network, *batch())  # and goes on


def peak(call) -> int:
    """The most memory that a call holds beyond what there was, as torch's allocator counts it."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    changes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes), default=0)


instantiate_device_type_tests(TestTorchSuite, globals(), only_for="cpu")


def test_every_public_optimizer_has_a_record():
    public = {name for name in optimzoo.__all__ if inspect.isclass(getattr(optimzoo, name))}
    optimizers = {name for name in public if issubclass(getattr(optimzoo, name), Optimizer)}
    assert {info.optim_cls for info in infos} == {getattr(optimzoo, name) for name in optimizers}
    assert all(reason for info in infos for reason in info.refuses.values())
    assert math.isfinite(loss(model(), *batch()))


def test_what_covers_torchs_tests_exists_and_the_page_says_so():
    folder = Path(__file__).parent
    for file, name in torch_methods.tests():
        assert f"def {name}(" in (folder / file).read_text(), f"{file} has no {name}"
    shown = folder.parent / "docs/torch-tests.rst"
    if shown.exists():  # not where an installed wheel is tested
        assert shown.read_text() == torch_methods.page(), "python tests/torch_methods.py > docs/torch-tests.rst"
