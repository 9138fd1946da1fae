"""The test methods that torch 2.14 has for its own optimizers: where each is covered here, or why it does not apply.

``python tests/torch_methods.py`` prints the two tables as the page ``docs/torch-tests.rst``. A test in
``test_torch_suite.py`` sees to it that every test named here exists and that the page is up to date.
"""

from __future__ import annotations

_SUITE = "test_torch_suite.py"
_COMPILE = "test_compile.py"

# By file of torch's test folder. The tests that cover a method are names, in test_torch_suite.py where no file is said.
COVERED: dict[str, dict[str, str]] = {
    "test_optim.py": {
        "test_optim_infos_do_not_specify_global_cliquey_kwargs": "test_records_leave_flags_to_the_tests",
        "test_errors": "test_errors",
        "test_forloop_goes_right_direction": "test_steps_go_in_the_right_direction test_schedulers_keep_the_direction",
        "test_param_group_with_lrscheduler_goes_right_direction": (
            "test_groups_with_a_scheduler_go_in_the_right_direction"
        ),
        "test_tensor_lr": "test_a_tensor_learning_rate test_what_takes_no_tensor_as_learning_rate_says_so",
        "test_rosenbrock_sparse": (
            "test_sparse_gradients_are_refused_with_a_reason "
            "test_subclasses.py::test_rows_that_a_sparse_gradient_names_move_as_if_it_were_dense"
        ),
        "test_complex": "test_complex test_complex_parameters_are_refused_with_a_reason",
        "test_complex_2d": "test_complex_2d",
        "test_foreach_matches_forloop": "test_foreach_matches_forloop",
        "test_mixed_device_dtype": "test_mixed_dtypes",
        "test_set_default_dtype_works_with_foreach": "test_default_dtypes_change_nothing",
        "test_peak_memory_foreach": "test_peak_memory_foreach",
        "test_fused_matches_forloop": ("test_fused_matches_forloop test_capturable_and_differentiable_match_forloop"),
        "test_fused_error_on_params_on_meta": "test_fused_error_on_params_on_meta",
        "test_fused_does_not_step_if_foundinf": "test_fused_does_not_step_if_foundinf",
        "test_fused_cpu_matches_cuda": "test_cuda.py::test_kernels_agree_with_the_cpu_step",
        "test_param_groups_weight_decay": "test_groups_weight_decay",
        "test_param_groups_lr": "test_groups_lr",
        "test_step_is_noop_when_params_have_no_grad": "test_step_is_noop_when_params_have_no_grad",
        "test_step_is_noop_for_zero_grads": "test_step_is_noop_for_zero_grads",
        "test_grads_are_never_inplaced_into": (
            "test_grads_are_never_inplaced_into test_gradients_of_others_are_left_alone test_zero_grad"
        ),
        "test_optimizer_can_be_printed": "test_optimizer_can_be_printed",
        "test_state_dict_deterministic": "test_state_dict_deterministic",
        "test_can_load_older_state_dict": "test_can_load_older_state_dict",
        "test_can_load_from_to_named_state_dict": "test_state_dict_deterministic",
        "test_save_load_equality_with_weights_only": "test_save_load_equality_with_weights_only",
        "test_load_nontensor_step": "test_load_nontensor_step",
        "test_state_dict_pre_hook": "test_state_dict_hooks",
        "test_state_dict_post_hook": "test_state_dict_hooks",
        "test_state_dict_pre_post_hook": "test_state_dict_hooks",
        "test_load_state_dict_pre_hook_and_prepend": "test_load_state_dict_hooks",
        "test_load_state_dict_post_hook": "test_load_state_dict_hooks",
        "test_load_state_dict_pre_post_hook": "test_load_state_dict_hooks",
        "test_step_pre_hook": "test_step_hooks",
        "test_step_post_hook": "test_step_hooks",
        "test_step_all_hooks": "test_step_hooks",
        "test_deepcopy_copies_all_public_attrs": "test_deepcopy_and_pickle_copy_all_public_attrs",
        "test_second_order_optims_return_consistent_types": "test_returned_types_are_consistent",
        "test_defaults_changed_to_foreach": "test_nothing_but_fused_is_the_default_on_the_cpu",
        "test_non_empty_state": "test_non_empty_state",
    },
    "optim/test_optim.py": {
        "TestDifferentiableOptimizer": "test_a_differentiable_step_has_the_right_derivatives",
        "test_adam_differentiable_lr and its kind": "test_steps_in_a_row_are_differentiable_in_the_learning_rate",
        "test_complex_foreach_matches_single_and_compiles": f"{_COMPILE}::test_complex_parameters_compile",
    },
    "optim/test_stateless.py": {
        "TestSwapInOptimizerParamsAndState": "test_parameters_and_state_can_be_swapped_in",
    },
    "optim/test_optimizer_memory.py": {
        "TestOptimizerMemoryBudgetCUDA": (
            "test_peak_memory_foreach test_contract.py::test_the_fused_step_makes_no_temporaries"
        ),
        "TestDiffGradcheck": "test_a_differentiable_step_has_the_right_derivatives",
        "TestStateDictRoundTrip": "test_state_dict_deterministic",
        "TestCompileCompatibility": f"{_COMPILE}::test_a_compiled_step_is_the_eager_one",
        "TestOrthogonality": "test_foreach_matches_forloop test_steps_go_in_the_right_direction",
    },
    "inductor/test_compiled_optimizers.py": {
        "test_correctness": (
            f"{_COMPILE}::test_a_compiled_step_is_the_eager_one "
            f"{_COMPILE}::test_a_compiled_training_loop_has_the_eager_numbers"
        ),
        "test_adam and its kind, with schedulers": f"{_COMPILE}::test_schedulers_compile_nothing_anew",
        "test_adam_recompile and its kind": f"{_COMPILE}::test_state_that_was_replaced_is_seen",
        "test_static_address_finalizer": f"{_COMPILE}::test_a_compiled_step_keeps_no_parameter_alive",
        "test_guard_on_none_grads": f"{_COMPILE}::test_a_compiled_training_loop_has_the_eager_numbers",
        "test_closure_graph_break": f"{_COMPILE}::test_a_compiled_training_loop_has_the_eager_numbers",
    },
    "test_cuda.py": {
        "test_grad_scaling_autocast_fused_optimizers": (
            "test_fused_does_not_step_if_foundinf "
            "test_contract.py::test_a_scaled_loss_gives_the_bits_of_an_unscaled_one"
        ),
    },
}

NOT_APPLICABLE: dict[str, dict[str, str]] = {
    "test_optim.py": {
        "test_forloop_goes_right_direction_multigpu": "Needs two GPUs.",
        "test_mixed_device_dtype, its devices": "Needs two GPUs; its dtypes are covered.",
        "test_foreach_large_tensor": "Needs a GPU with 72 GB.",
        "test_fused_large_tensor": "Needs 64 GB of memory. The native step counts elements in 64 bits.",
        "test_cpu_load_state_dict": "Needs a GPU.",
        "test_state_dict_with_cuda_params": "Needs a GPU.",
        "test_adamw_serialization": "Of ``Adam`` and ``AdamW``, of which one is a case of the other.",
        "test_step_iteration": "Counts the evaluations of ``LBFGS``.",
    },
    "optim/test_optim.py": {
        "test_adam_differentiable_weight_decay, test_adam_differentiable_betas and their kind": (
            "Hyper-parameters other than ``lr`` are numbers here; a tensor is an error that names it."
        ),
    },
    "optim/test_stateless.py": {
        "test_make_fx_reparametrize_module_and_optimizer_records_aten_ops": (
            "A native step is one operation, not a list of torch's; ``torch.compile`` sees it as such."
        ),
    },
    "optim/test_optimizer_memory.py": {
        "TestNAdamNumerical, TestRAdamNumerical, TestAdamDenomChain, TestRpropSignChain": (
            "Of lines within torch's methods. Ours are compared with independent references in float64."
        ),
        "TestCUDAGraphCapture": "Needs a GPU.",
    },
    "inductor/test_compiled_optimizers.py": {
        "the number of kernels": "Counted for a GPU.",
        "test_basic_shampoo, test_foreach_map_adam, test_compile_time_smoketest, test_S429861, "
        "test_get_value_on_static_address": "Of functions of torch, not of an optimizer.",
    },
    "optim/test_muon.py, optim/test_adafactor_mixed_dtype.py": {"all": "Of one class of torch."},
    "optim/test_lrscheduler.py, optim/test_swa_utils.py": {
        "all": "Of schedulers and averages, not of optimizers; that they drive ours has tests of its own."
    },
    "test_cuda.py": {"test_graph_optims and its kind": "Needs a GPU: no CUDA graph has been captured."},
}


def page() -> str:
    """The page of the documentation that these tables are."""
    lines = [
        "torch's tests of its own optimizers",
        "===================================",
        "",
        "That a class can take the place of one of ``torch.optim`` is a claim about other people's code. This is the",
        "list of the tests that torch 2.14 has for its own optimizers, with those of this library that ask the same of",
        "every public class. Files are those of torch's ``test`` folder; tests are in ``tests/test_torch_suite.py``",
        "where no file is said. They are written anew, with ``torch.testing``'s records of optimizers.",
        "",
        "Covered",
        "-------",
        "",
    ]
    lines += _table("Test", {f: {m: _names(t) for m, t in rows.items()} for f, rows in COVERED.items()})
    lines += ["", "Not applicable", "--------------", ""]
    lines += _table("Reason", NOT_APPLICABLE)
    return "\n".join(lines) + "\n"


def tests() -> set[tuple[str, str]]:
    """The file and the name of every test that the table names."""
    named = [name for rows in COVERED.values() for names in rows.values() for name in names.split()]
    return {(file or _SUITE, name) for file, _, name in (name.rpartition("::") for name in named)}


def _names(names: str) -> str:
    return ", ".join(f"``{name}``" for name in names.split())


def _table(title: str, files: dict[str, dict[str, str]]) -> list[str]:
    lines = [".. list-table::", "   :header-rows: 1", "   :widths: 42 58", "", "   * - torch's test", f"     - {title}"]
    for file, rows in files.items():
        for method, text in rows.items():
            lines += [f"   * - {file}: {method}", f"     - {text}"]
    return lines


if __name__ == "__main__":
    print(page(), end="")
