"""What works with what: for each feature and each public class the test that shows it, or the reason why it is not so.

The page docs/support.rst is made of this table by the directives in docs/conf.py, and test_support.py holds it against
the tests. Classes of the table in cases.py have the tests that are run for each of them; the others are named.
"""

from __future__ import annotations

from dataclasses import dataclass

from cases import CASES, REFUSES


@dataclass(frozen=True)
class Cell:
    """One feature of one class.

    Args:
        works: "yes", "partly", "no", or "n/a" where the question belongs to something else.
        why: the reason, or the limits; nothing where the answer is yes.
        test: the test that shows it, ``FILE.py::NAME``, if there is one.
    """

    works: str
    why: str = ""
    test: str = ""


def yes(test: str) -> Cell:
    return Cell("yes", test=test)


def no(why: str, test: str = "") -> Cell:
    return Cell("no", why, test)


def apart(why: str) -> Cell:
    return Cell("n/a", why)


def partly(why: str, test: str) -> Cell:
    return Cell("partly", why, test)


PRIVATE = ("DPSGD", "DiceSGD")
DALE = ("DaleSGD", "DaleAdamW", "DaleLangevin")
COLUMNS = [
    "DiffGrad",
    "AdaBelief",
    *DALE,
    "AdaGradNorm",
    "CBO",
    "SSO",
    "TPSGD",
    *PRIVATE,
    "LanczosLR",
    "AdaptiveBatchSize",
]
GRADIENT = COLUMNS[:6]
RECIPES = [*GRADIENT, "CBO", "SSO", "TPSGD"]


def row(test: str, refusal: str = "", names: list[str] | None = None, **others: Cell) -> dict[str, Cell]:
    """A row: one test for several classes, and cells of their own for others.

    Args:
        test: is run for each of ``names``.
        refusal: the key of ``REFUSES`` that says which of them decline, and why.
        names: the classes; those of the table in cases.py where it is not given.
        **others: cells by class; ``private`` is for both that are.
    """
    cells = {}
    for name in [case.name for case in CASES] if names is None else names:
        why = REFUSES.get(name, {}).get(refusal)
        cells[name] = yes(test) if why is None else no(why)
    both = others.pop("private", None)
    cells |= dict.fromkeys(PRIVATE, both) if both is not None else {}
    cells |= others
    return {name: cells[name] for name in COLUMNS}


_SCHEDULER = "a scheduler: it steps no parameters"
_SAMPLER = "it reads gradients and steps no parameters: what it goes with is that of the optimizer"
_BEHIND = dict(LanczosLR=apart(_SCHEDULER), AdaptiveBatchSize=apart(_SAMPLER))
_ANY = yes("test_batch_size.py::test_any_optimizer_is_stepped_as_without_a_schedule")
_INNER = "what moves the parameters is its inner optimizer, which may be one that has it"
_BASE = "its base makes the step, and may be a class that has it"
_PARTICLES = "a step moves particles, by a rule of its own"
_ZERO_NORM = "each process sees a part of the gradients, and the norm of that makes another method"
_CLOSURE = "its loop calls backward; a step here needs a closure of its own"
_LOOP = "it belongs into a loop, which the framework has for itself"
_LOSSES = "there is no backward pass whose gradients could vanish"


def _contract(test: str) -> str:
    return f"test_contract.py::{test}"


def _training(test: str) -> str:
    return f"test_training.py::{test}"


_TWO = "test_parallel.py::test_two_processes_train_as_one_and_exchange_checkpoints_with_it"
_WIDER = [*GRADIENT]

SECTIONS: dict[str, dict[str, dict[str, Cell]]] = {
    "Training": {
        "Parameter groups": row(
            _contract("test_groups_have_settings_of_their_own"),
            AdaGradNorm=partly(
                "``b0`` and ``per_group`` are the same in groups that share a sum",
                "test_adagrad.py::test_groups_with_and_without_an_accumulator_of_their_own_mix",
            ),
            CBO=partly(
                "``lr``, ``lamda`` and ``sigma`` can differ, the other settings are one for all",
                "test_cbo.py::test_groups_have_their_own_lr_lamda_and_sigma_and_runs_are_independent",
            ),
            SSO=partly(
                "``lr``, the target step size, is one for all; other settings go to the inner optimizer",
                "test_sso.py::test_groups_hand_their_settings_to_the_inner_optimizer",
            ),
            private=yes("test_dicesgd.py::test_groups_have_settings_of_their_own"),
            TPSGD=partly("a group for each module", "test_tpsgd.py::test_schedulers_and_groups"),
            LanczosLR=yes("test_lanczos.py::test_each_group_has_its_own_block_on_request"),
            AdaptiveBatchSize=yes("test_batch_size.py::test_a_rate_that_groups_share_is_multiplied_once"),
        ),
        "Groups added later": row(
            _contract("test_a_group_added_later_takes_part_from_then_on"),
            AdaGradNorm=yes("test_adagrad.py::test_a_parameter_that_joins_late_starts_from_the_common_accumulator"),
            CBO=yes("test_cbo.py::test_a_group_may_join_in_the_middle"),
            SSO=yes("test_sso.py::test_a_group_that_is_added_takes_the_target_step_size_of_the_time"),
            private=yes("test_dicesgd.py::test_groups_have_settings_of_their_own"),
            TPSGD=no("the groups are the modules of its model, whose hooks are made with the optimizer"),
            LanczosLR=no(
                "an error says how to make another",
                "test_lanczos.py::test_wrong_parameters_groups_and_states_are_named",
            ),
            AdaptiveBatchSize=yes("test_batch_size.py::test_parameters_that_join_later_count"),
        ),
        "Every scheduler of torch": row(
            _training("test_a_run_under_any_scheduler_resumes"),
            names=RECIPES,
            SSO=partly(
                "one that reaches a rate of zero ends in an error: there is no surrogate then",
                _training("test_a_run_under_any_scheduler_resumes"),
            ),
            private=partly(
                "``StepLR``; the others have not been tried", "test_dicesgd.py::test_schedulers_drive_the_step"
            ),
            LanczosLR=partly(
                "those that multiply the rate; others overwrite it, and ``schedule`` takes their place",
                "test_lanczos.py::test_torchs_schedulers_that_multiply_run_beside_it",
            ),
            AdaptiveBatchSize=_ANY,
        ),
        "Hooks of steps": row(
            _contract("test_step_hooks_run_around_the_step"),
            AdaGradNorm=yes("test_adagrad.py::test_hooks_run_around_the_step"),
            CBO=yes("test_cbo.py::test_hooks_run_and_may_replace_a_checkpoint"),
            SSO=yes("test_sso.py::test_hooks_run_and_gradients_of_parameters_are_left_alone"),
            private=yes("test_dicesgd.py::test_hooks_run_around_the_step_and_the_checkpoint"),
            TPSGD=yes("test_tpsgd.py::test_hooks_of_steps_run"),
            **_BEHIND,
        ),
        "``copy.deepcopy``, ``pickle``": row(
            _contract("test_a_pickled_optimizer_goes_on_as_if_nothing_had_happened"),
            AdaGradNorm=yes("test_adagrad.py::test_a_resumed_copied_or_pickled_run_is_bitwise_the_whole"),
            CBO=partly(
                "not with a process group: each rank saves its state dict",
                "test_cbo.py::test_a_copy_goes_on_by_itself",
            ),
            SSO=partly(
                "not with torch's LBFGS inside", "test_sso.py::test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit"
            ),
            private=partly(
                "a copy has noise of its own, and no error state",
                "test_dicesgd.py::test_no_copy_has_the_error_state_or_the_noise",
            ),
            TPSGD=partly(
                "together with its model, and not of a ``DistributedDataParallel``",
                "test_tpsgd.py::test_a_copy_trains_its_own_model",
            ),
            LanczosLR=partly(
                "together with its optimizer and model",
                _training("test_a_learnt_rate_is_copied_with_its_optimizer_and_model"),
            ),
            AdaptiveBatchSize=no(
                "it has hooks on parameters; use state dicts",
                "test_batch_size.py::test_hooks_go_with_the_schedule_and_with_the_parameters",
            ),
        ),
        "Resumed runs, bit for bit": row(
            _contract("test_a_resumed_run_is_bitwise_the_uninterrupted_one"),
            AdaGradNorm=yes("test_adagrad.py::test_a_resumed_copied_or_pickled_run_is_bitwise_the_whole"),
            CBO=yes("test_cbo.py::test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit"),
            SSO=yes("test_sso.py::test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit"),
            private=partly(
                "where a test gives the generator, and the error state is exported; noise is never drawn twice else",
                "integrations/test_opacus.py::test_a_private_run_on_its_samples_resumes_from_its_checkpoint",
            ),
            TPSGD=yes("test_tpsgd.py::test_a_resumed_run_is_bitwise_the_uninterrupted_one"),
            LanczosLR=yes("test_lanczos.py::test_a_run_that_is_resumed_is_the_run_bit_for_bit"),
            AdaptiveBatchSize=yes("test_batch_size.py::test_a_run_that_was_cut_off_goes_on_bit_for_bit"),
        ),
        "Averaged weights, ``swa_utils``": row(
            _training("test_averaged_weights_and_their_batch_statistics_resume"),
            names=RECIPES,
            private=no("not tried"),
            **_BEHIND,
        ),
        "``torch.amp.GradScaler``": row(
            _training("test_a_run_under_a_grad_scaler_resumes"),
            names=GRADIENT,
            CBO=no(_LOSSES),
            SSO=partly(
                "it goes to the constructor: ``GradScaler.step`` is an error that says so",
                "test_sso.py::test_a_scaler_of_the_inner_updates_changes_nothing_where_nothing_overflows",
            ),
            private=no(
                "which steps it skips would tell of the data: an error",
                "test_dicesgd.py::test_a_grad_scaler_is_refused",
            ),
            TPSGD=no("there is no one loss to scale"),
            LanczosLR=no("its closure returns the loss as it is; the optimizer's own steps may have a scaler"),
            AdaptiveBatchSize=partly(
                "a test does not see the scale; averages (``ema``) see it change",
                "test_batch_size.py::test_order_and_scale_change_nothing",
            ),
        ),
        "``torch.autocast``": row(
            _training("test_a_run_under_a_grad_scaler_resumes"),
            names=GRADIENT,
            CBO=yes(_training("test_autocast_around_a_closure")),
            SSO=yes("test_sso.py::test_autocast_around_the_step_is_as_good_as_within_the_closure"),
            private=no("not tried"),
            TPSGD=yes("test_tpsgd.py::test_autocast"),
            LanczosLR=yes(_training("test_autocast_around_a_closure")),
            AdaptiveBatchSize=apart(_SAMPLER),
        ),
        "16-bit parameters": row(
            _contract("test_sixteen_bit_parameters_have_float32_averages_that_do_not_stall"),
            AdaGradNorm=yes("test_adagrad.py::test_narrow_parameters_follow_it_to_rounding"),
            CBO=yes("test_cbo.py::test_parameters_of_16_bits_have_particles_of_32"),
            SSO=partly(
                "bfloat16; its outputs are compared in float32, and float16 is for ``autocast``",
                _training("test_parameters_of_bfloat16_train"),
            ),
            private=yes("test_dicesgd.py::test_sums_are_wide_and_rounded_once"),
            TPSGD=yes(_training("test_parameters_of_bfloat16_train")),
            LanczosLR=no(
                "products of 16 bits say nothing of an eigenvalue: an error",
                "test_lanczos.py::test_wrong_parameters_groups_and_states_are_named",
            ),
            AdaptiveBatchSize=yes("test_batch_size.py::test_other_dtypes"),
        ),
        "Complex parameters": row(
            _contract("test_a_complex_parameter_is_its_real_and_imaginary_parts"),
            "complex",
            AdaGradNorm=yes("test_adagrad.py::test_a_complex_parameter_is_its_real_and_imaginary_parts"),
            CBO=no("its noise is of real numbers", "test_cbo.py::test_parameters_that_it_cannot_move_are_named"),
            SSO=no("targets are real; not tried"),
            private=no(
                "norms are those of real numbers: an error", "test_dicesgd.py::test_parameters_are_real_and_dense"
            ),
            TPSGD=no("targets and projections are real: an error", "test_tpsgd.py::test_wrong_settings_are_named"),
            LanczosLR=no(
                "the Hessian is one of real numbers",
                "test_curvature.py::test_wrong_parameters_are_named",
            ),
            AdaptiveBatchSize=yes("test_batch_size.py::test_other_dtypes"),
        ),
        "Sparse gradients": row(
            "test_errors.py::test_sparse_gradients_are_refused_by_name",
            "sparse",
            AdaGradNorm=no(
                "its sum is that of all gradients",
                "test_adagrad.py::test_a_sparse_gradient_is_refused_before_anything_changes",
            ),
            CBO=no("it takes no gradients"),
            SSO=no("gradients are made within a step; not tried"),
            private=no("an error", "test_dicesgd.py::test_parameters_are_real_and_dense"),
            TPSGD=no("an embedding's gradient is made by its hooks, and dense"),
            LanczosLR=no("it has no second derivative", "test_curvature.py::test_a_sparse_gradient_is_named"),
            AdaptiveBatchSize=no("their variance is another", "test_batch_size.py::test_sparse_gradients_are_refused"),
        ),
        "``maximize``": row(
            "test_laws.py::test_maximizing_is_minimizing_with_the_opposite_gradient",
            AdaGradNorm=yes("test_adagrad.py::test_float64_follows_the_reference"),
            CBO=no("return the negative of the value"),
            SSO=no("return the negative of the loss"),
            private=apart(_BASE),
            TPSGD=no("local losses are distances"),
            LanczosLR=yes("test_lanczos.py::test_the_line_rule_goes_along_the_decayed_gradient"),
            AdaptiveBatchSize=apart(_SAMPLER),
        ),
        "State in bfloat16": row(
            "test_store.py::test_compressed_state_is_bfloat16_and_near_the_whole_one",
            AdaGradNorm=no("its state is one number, in float64"),
            CBO=no("particles are float32"),
            SSO=apart(_INNER),
            private=apart(_BASE),
            TPSGD=apart(_BASE),
            **_BEHIND,
        ),
        "Clipping within the step": row(
            "test_store.py::test_clipping_within_the_step_is_clipping_before_it",
            names=GRADIENT,
            CBO=no("there is no gradient; ``noise_clip`` bounds the noise"),
            SSO=apart(_INNER),
            private=yes("test_dicesgd.py::test_the_norm_is_that_of_all_parameters"),
            TPSGD=partly(
                "not with ``update_in_forward``, which has the gradients of one layer",
                "test_tpsgd.py::test_wrong_settings_are_named",
            ),
            LanczosLR=apart(_SCHEDULER),
            AdaptiveBatchSize=yes("test_batch_size.py::test_clipping_does_not_change_the_statistics"),
        ),
    },
    "Back-ends": {
        "Single, foreach and fused agree": row(
            "test_laws.py::test_all_back_ends_are_the_same_step",
            AdaGradNorm=yes("test_adagrad.py::test_float64_follows_the_reference"),
            CBO=partly(
                "a native step for the plain rule, and composed ones for the others",
                "test_cbo.py::test_every_variant_follows_the_reference_to_1e_12",
            ),
            SSO=apart(_INNER),
            private=apart(_BASE),
            TPSGD=apart(_BASE),
            **_BEHIND,
        ),
        "``capturable``": row(
            "test_laws.py::test_all_back_ends_are_the_same_step",
            "capturable",
            AdaGradNorm=yes("test_adagrad.py::test_float64_follows_the_reference"),
            CBO=no("it decides by the values of the loss"),
            SSO=no("it decides by the values of the loss"),
            private=no("the host draws the noise"),
            TPSGD=apart(_BASE),
            **_BEHIND,
        ),
        "``differentiable``": row(
            "test_reference.py::test_autograd_differentiates_differentiable_steps",
            AdaGradNorm=yes("test_adagrad.py::test_autograd_differentiates_differentiable_steps"),
            CBO=no(_PARTICLES),
            SSO=apart(_INNER),
            private=no("a private gradient is a constant"),
            TPSGD=no("no gradient crosses a layer"),
            **_BEHIND,
        ),
        "``torch.compile`` of ``step``": row(
            "test_compile.py::test_a_compiled_step_is_the_eager_one",
            "compile",
            AdaGradNorm=yes("test_adagrad.py::test_a_compiled_step_is_one_graph_with_the_eager_numbers"),
            CBO=no("it waits for the closure and for decisions"),
            SSO=no("it waits for the closure and for decisions; the model may be compiled"),
            private=no("the time is in the passes over samples' gradients; not tried"),
            TPSGD=partly(
                "of the model, with a break at each layer", "test_tpsgd.py::test_a_compiled_model_is_trained_as_it_is"
            ),
            LanczosLR=no(
                "what was compiled has no second derivative", "test_curvature.py::test_a_compiled_model_is_named"
            ),
            AdaptiveBatchSize=no("its hooks run in the backward pass of an eager model; not tried"),
        ),
        "Parameters of any memory layout": row(
            "test_laws.py::test_transposed_memory_commutes_with_a_step",
            private=no("not tried"),
            **{
                name: yes(_training("test_the_memory_layout_of_a_parameter_changes_nothing"))
                for name in ("AdaGradNorm", "CBO", "SSO", "TPSGD", "LanczosLR")
            },
            AdaptiveBatchSize=yes("test_batch_size.py::test_native_reductions_are_those_of_torch"),
        ),
    },
    "Distributed training": {
        "``DistributedDataParallel``": row(
            _TWO,
            names=GRADIENT,
            CBO=no("it takes no gradients; particles are divided with ``process_group`` instead"),
            SSO=yes("test_sso_distributed.py::test_two_processes_with_half_of_the_data_each_step_as_one"),
            private=no("there are no gradients to average; each rank has samples of its own, without it"),
            TPSGD=yes("test_tpsgd_distributed.py::test_two_processes_step_as_one"),
            LanczosLR=yes("test_lanczos.py::test_two_processes_learn_what_one_does"),
            AdaptiveBatchSize=yes("test_batch_size_distributed.py::test_two_ranks_find_what_one_process_would"),
        ),
        "``ZeroRedundancyOptimizer``": row(
            _TWO,
            names=GRADIENT,
            DaleLangevin=partly("give each process a seed of its own", _TWO),
            AdaGradNorm=no(_ZERO_NORM),
            CBO=no(_PARTICLES),
            SSO=no("its closure is not the one that ``ZeroRedundancyOptimizer`` calls; not tried"),
            private=no("the norm of a sample is that of all parameters"),
            TPSGD=no("it takes the model, not parameters"),
            LanczosLR=no("it needs the parameters and second moments that other processes have"),
            AdaptiveBatchSize=no("not tried"),
        ),
        "FSDP2, ``fully_shard``": row(
            "test_distributed.py::test_two_processes_with_sharded_models_train_and_resume_as_one",
            AdaGradNorm=yes(_TWO),
            CBO=no("parameters must be whole; particles are divided with ``process_group`` instead", _TWO),
            SSO=yes("test_sso_distributed.py::test_two_processes_with_half_of_the_data_each_step_as_one"),
            private=yes("test_dicesgd_distributed.py::test_two_ranks_release_what_one_process_does"),
            TPSGD=no("its gradients are made layer by layer, of whole parameters: an error", _TWO),
            LanczosLR=no(
                "products of a Hessian need whole parameters: an error",
                _TWO,
            ),
            AdaptiveBatchSize=yes("test_batch_size_distributed.py::test_two_ranks_find_what_one_process_would"),
        ),
        "FSDP2, ``CPUOffloadPolicy``": row(
            _TWO,
            names=GRADIENT,
            CBO=no("as without offloading"),
            SSO=no("not tried"),
            private=no("not tried"),
            TPSGD=no("as without offloading"),
            LanczosLR=no("as without offloading"),
            AdaptiveBatchSize=no("not tried"),
        ),
        "Tensor-parallel layers": row(
            _TWO,
            names=GRADIENT,
            CBO=no("parameters must be whole"),
            SSO=no("not tried"),
            private=no("a rank would see parts of samples"),
            TPSGD=no("its projections are those of whole layers: an error"),
            LanczosLR=no("parameters must be whole"),
            AdaptiveBatchSize=no("not tried"),
        ),
        "``torch.distributed.checkpoint``": row(
            "test_checkpoint.py::test_a_distributed_checkpoint_resumes_bitwise",
            AdaGradNorm=yes(_TWO),
            CBO=no("its state is that of all parameters together; each rank saves its state dict"),
            SSO=no("it does not know the inner optimizer; ``state_dict`` has both"),
            private=yes("test_dicesgd_distributed.py::test_two_ranks_release_what_one_process_does"),
            TPSGD=no("its state is its base's; not tried"),
            LanczosLR=no("its state is a dictionary of numbers, which any way of saving takes"),
            AdaptiveBatchSize=no("its state is a dictionary of numbers, which any way of saving takes"),
        ),
        "Saved by two processes, loaded by one, and back": row(
            _TWO,
            names=GRADIENT,
            CBO=no("each process saves its own particles, for as many processes"),
            SSO=no("as ``torch.distributed.checkpoint``"),
            private=no("not tried"),
            TPSGD=no("its state dict is the same on all ranks; not tried"),
            LanczosLR=no("its state dict is the same on all ranks; not tried"),
            AdaptiveBatchSize=no("the order of samples is that of as many ranks"),
        ),
    },
}
_HF = "integrations/test_transformers.py::test_trainer_resumes_from_its_checkpoint"
_AUTOMATIC = "integrations/test_lightning.py::test_automatic_optimization_resumes_from_its_checkpoint"
_MANUAL = "integrations/test_lightning.py::test_manual_optimization_resumes_from_its_checkpoint"
_ACCELERATE = "integrations/test_accelerate.py::test_a_run_with_accumulation_resumes_from_its_checkpoint"
_TIMM = "integrations/test_timm.py::test_the_factory_makes_it_and_its_checkpoint_resumes"
_OPTUNA = "integrations/test_optuna.py::test_every_method_can_be_drawn"
_MANUALLY = "by manual optimization"
_ROWS = 'new biases and padding rows are zero: by ``dale_groups`` and ``zeros="floor"``'
_POISSON = "its batches are not Poisson's, and its loop clips what is released; not tried"
_BATCHES = "they wrap batch samplers; not tried"

SECTIONS["Frameworks"] = {
    "Hugging Face ``Trainer``": row(
        _HF,
        names=["DiffGrad", "AdaBelief", "AdaGradNorm"],
        DaleSGD=no("not tried; as ``DaleAdamW``"),
        DaleAdamW=partly(_ROWS, _HF),
        DaleLangevin=no("not tried; as ``DaleAdamW``"),
        CBO=no(_CLOSURE),
        SSO=no(_CLOSURE),
        private=no(_POISSON),
        TPSGD=no(_CLOSURE),
        LanczosLR=no("its schedulers are stepped without a closure"),
        AdaptiveBatchSize=no(_BATCHES),
    ),
    "Lightning": row(
        _AUTOMATIC,
        names=GRADIENT,
        CBO=partly(_MANUALLY, _MANUAL),
        SSO=partly(_MANUALLY, _MANUAL),
        private=no(_POISSON),
        TPSGD=partly(_MANUALLY, _MANUAL),
        LanczosLR=partly(_MANUALLY, _MANUAL),
        AdaptiveBatchSize=no(_BATCHES),
    ),
    "Accelerate": row(
        _ACCELERATE,
        names=RECIPES,
        private=no(_POISSON),
        TPSGD=partly("``targets`` is called on ``optimizer.optimizer``", _ACCELERATE),
        LanczosLR=no("not tried"),
        AdaptiveBatchSize=no(_BATCHES),
    ),
    "timm's factory": row(
        _TIMM,
        names=["DiffGrad", "AdaBelief", "AdaGradNorm"],
        DaleSGD=partly(_ROWS, _TIMM),
        DaleAdamW=no("not tried; as ``DaleSGD``"),
        DaleLangevin=no("not tried; as ``DaleSGD``"),
        CBO=no("its training script calls backward"),
        SSO=no("its training script calls backward"),
        private=no(_POISSON),
        TPSGD=no("it takes the model, not parameters"),
        LanczosLR=no("its schedulers are called with an epoch"),
        AdaptiveBatchSize=no("its loaders have batch samplers of their own"),
    ),
    "Opacus, inside its engine": row(
        "integrations/test_opacus.py::test_its_engine_may_have_an_optimizer_of_the_zoo_inside",
        names=GRADIENT,
        private=partly(
            "its ``GradSampleModule``; in place of its engine",
            "integrations/test_opacus.py::test_a_private_run_on_its_samples_resumes_from_its_checkpoint",
        ),
        CBO=no("it steps along losses, which its noise does not cover"),
        SSO=no("it steps along many gradients, of which its noise covers one"),
        TPSGD=no("its gradients are made by hooks of its own"),
        LanczosLR=no("curvature of the data is no private quantity"),
        AdaptiveBatchSize=no("a batch's size would be read from the data"),
    ),
    "Optuna": row(
        _OPTUNA,
        names=RECIPES,
        private=no("what is tuned on the data has to be accounted for, and Optuna does not"),
        **_BEHIND,
    ),
}
SECTIONS["Checkpoints of other libraries"] = {
    "Of the same method": row(
        "integrations/test_coming_from.py::test_a_checkpoint_goes_on",
        names=["DiffGrad", "AdaBelief"],
        DaleSGD=no("other code of its authors keeps no state"),
        DaleAdamW=partly(
            "torch's AdamW, with ``dale=False``", "integrations/test_coming_from.py::test_a_checkpoint_goes_on"
        ),
        DaleLangevin=no("there is no other library that has it"),
        AdaGradNorm=no("there is no other library that has it"),
        CBO=no("CBXpy's dynamics have no state dict"),
        SSO=no("there is no other library that has it"),
        private=no("Opacus keeps the history of steps elsewhere"),
        TPSGD=no("there is no other library that has it"),
        LanczosLR=no("there is no other library that has it"),
        AdaptiveBatchSize=no("there is no other library that has it"),
    ),
}


def named_tests() -> list[str]:
    """The tests that are named, each once, in the order of the table."""
    cells = (cell for rows in SECTIONS.values() for line in rows.values() for cell in line.values())
    return list(dict.fromkeys(cell.test for cell in cells if cell.test))
