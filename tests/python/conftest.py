import collections
import os
import sys

import helpers
import hypothesis
import lomem
import pytest
import torch

# A library that runs the CUDA kernels on the CPU, replacing the CPU kernels (tests/cpp/cuda/on_host.cpp).
if helpers.CUDA_ON_HOST:
    torch.ops.load_library(helpers.CUDA_ON_HOST)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() and lomem._C.cuda_archs() else [])]

# Tests that need a GPU.
collect_ignore = [] if "cuda" in DEVICES else ["test_cuda.py"]

# OpenMP's threads start with the mode for subnormal numbers of the thread that starts them, and keep it. So they start
# here, not in a test that sets another mode.
torch.ones(1 << 21).exp()

# CI runs use the same examples every time; other runs draw new ones.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")

# Enumerations that take long, by the names of their functions: of the cases of each, `make test` runs one in so many,
# spread over all; the others are marked slow, and `make test-all` runs them too.
SLOW = {
    "test_a_callable_is_the_named_function": 5,
    "test_a_closed_pipe_ends_silently": 3,
    "test_a_compiled_model_keeps_in_groups_what_an_eager_one_does": 13,
    "test_a_compiled_model_saves_no_more_than_eagerly_or_plain": 9,
    "test_a_compiler_passes_on_what_is_in_groups": 7,
    "test_a_compiler_saves_what_is_saved_eagerly": 7,
    "test_a_norm_is_recognized_part_by_part": 7,
    "test_a_norm_of_every_width_is_recognized": 7,
    "test_a_patched_model_is_converted": 5,
    "test_a_second_backward_pass": 7,
    "test_activations_change_no_bit": 7,
    "test_adapters_of_every_dtype": 5,
    "test_all_is_left_as_it_was": 5,
    "test_an_estimate_for_the_cpu_is_exact": 5,
    "test_an_estimate_of_an_odd_model_is_exact": 7,
    "test_an_exported_program_has_the_original_ops": 7,
    "test_another_shape": 5,
    "test_as_few_bytes_as_with_pefts_layers": 13,
    "test_ascii_terminals_print": 4,
    "test_batches_of_any_size_and_evaluation": 5,
    "test_bytes_saved": 2,
    "test_certificate": 5,
    "test_changes_in_place": 11,
    "test_checkpointed_regions_inside": 3,
    "test_codes_are_those_of_the_derivative": 7,
    "test_compile": 3,
    "test_compiled": 3,
    "test_compiled_by_inductor": 4,
    "test_compiled_checkpoints_use_the_same_numbers": 5,
    "test_compiled_in_one_graph": 23,
    "test_compiled_passes_use_the_same_numbers": 2,
    "test_compiled_round_trips": 4,
    "test_conversions_are_those_of_the_table": 5,
    "test_copies_and_pickles": 5,
    "test_ctrl_c_is_one_line": 3,
    "test_each_run_draws_and_the_mean_is_exact": 4,
    "test_estimate_step_and_profile_agree_to_the_byte": 7,
    "test_evaluation_is_the_original_bit_for_bit": 7,
    "test_every_norm_and_activation_has_a_verdict": 5,
    "test_forward_hooks_change_results": 9,
    "test_forward_hooks_read": 3,
    "test_frozen_parts": 5,
    "test_function_transforms": 11,
    "test_gradients_and_living_bytes": 11,
    "test_gradients_of_intermediate_results": 5,
    "test_gradients_of_pairs_of_whole_models_are_exact": 5,
    "test_gradients_of_whole_models_are_as_accurate": 53,
    "test_gradients_of_whole_models_are_close": 5,
    "test_hugging_face_checkpointing": 7,
    "test_in_place_behind_a_linear_layer": 11,
    "test_low_rank_adapters": 3,
    "test_mean_and_variance": 23,
    "test_no_conversion_could_be_left_out": 7,
    "test_no_model_goes_wrong": 7,
    "test_no_other_choice_keeps_fewer_bytes": 7,
    "test_norms_change_nothing_but_rounding": 7,
    "test_nothing_is_alive_afterwards": 7,
    "test_nothing_is_kept_in_groups_in_a_checkpointed_region": 3,
    "test_pairs_are_found_in_whole_models": 5,
    "test_random_arguments": 5,
    "test_replays_draw_anew": 7,
    "test_results_are_unchanged_and_gradients_close": 5,
    "test_results_are_unchanged_and_gradients_exact": 7,
    "test_rows_of_a_sample_may_overflow_one_by_one": 4,
    "test_rows_sum_to_what_the_converted_model_keeps_less": 11,
    "test_saved_for_backward_of_odd_models": 5,
    "test_second_derivatives": 3,
    "test_tensor_parallel_models": 4,
    "test_the_advised_setting_gives_no_warning": 4,
    "test_the_default_passes": 5,
    "test_the_estimate_is_the_real_count_to_the_byte": 11,
    "test_the_estimate_is_what_is_alive": 11,
    "test_the_mean_converges_and_the_variance_is_that_of_theory": 3,
    "test_the_mean_of_gradients_is_exact": 5,
    "test_threads": 7,
    "test_trained_as_the_plain_model": 5,
    "test_what_odd_models_keep": 5,
    "test_whatever_is_around": 31,
    "test_whatever_is_around_a_pair": 31,
    "test_why_a_norm_is_not_shared": 3,
    "test_with_a_memory_budget": 31,
    "test_without_gradients": 7,
}


# Files whose slow cases take longer than everything else: `make test-all` leaves them to `make test-pairs`.
LONG = (
    "test_groups_compiled.py",
    "test_pairs.py",
    "test_pairs_compiled.py",
    "test_pairs_models.py",
    "test_pairs_transforms.py",
)


def mark_slow(items):
    cases = collections.Counter()
    for item in items:
        name = getattr(item, "originalname", None)
        if name in SLOW:
            if cases[item.path, name] % SLOW[name]:
                item.add_marker("slow")
                if item.path.name in LONG:
                    item.add_marker("long")
            cases[item.path, name] += 1


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config, items):
    mark_slow(items)
    if helpers.CUDA_ON_HOST:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("cpu_kernels")])
        items[:] = [item for item in items if not item.get_closest_marker("cpu_kernels")]


@pytest.fixture(params=DEVICES)
def device(request):
    """Every device that lomem has kernels for."""
    return torch.device(request.param)


@pytest.fixture(autouse=bool(helpers.CUDA_ON_HOST))
def _no_faults_of_kernels():
    """On the emulator, a test in which a kernel has a fault fails."""
    before = helpers.emulator_faults()
    yield
    assert helpers.emulator_faults() == before, "the emulator found faults of CUDA kernels: see above"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _compilers_are_on():
    """A test that leaves another stance behind would let later ones run eagerly, and pass or fail for it."""
    yield
    if "torch._dynamo" in sys.modules:
        assert torch._dynamo.eval_frame._stance.stance == "default"


@pytest.fixture
def one_thread():
    """Limits torch to one thread, for models of small layers: workers whose threads compete would take minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """A directory with the config of a small model."""
    import transformers

    folder = tmp_path_factory.mktemp("config")
    transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        use_cache=False,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    return str(folder)
