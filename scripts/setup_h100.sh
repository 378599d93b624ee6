#!/usr/bin/env bash
# A machine with an NVIDIA GPU made ready: looks at driver and GPU, sets up .venv with a CUDA build of torch, tries it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

HELP="usage: scripts/setup_h100.sh [--flash] [--flash3] [--torch-index URL] [--skip-tests] [--help]

Checks driver, GPU and Python, makes .venv at the versions of constraints.txt (torch from PyPI, which is built for CUDA),
runs the tests that need a GPU, and says how to get the published weights. A second run skips what is there.

  --flash            also builds flash-attn 2, which needs nvcc and takes long
  --flash3           also installs fa3-fwd, FlashAttention-3 for Hopper GPUs and CUDA 13: the fastest attention there
  --torch-index URL  package index for torch alone, where the driver is too old for PyPI's CUDA
  --skip-tests       no tests
  --help             this"

# Those that run on a GPU alone; a test of ours holds that they exist.
GPU_TESTS=(
    tests/test_attention.py::test_backends_on_a_gpu_equal_sdpa
    tests/test_attention.py::test_auto_on_a_gpu_measures
    tests/test_attention.py::test_a_bias_on_a_gpu_is_read_as_it_is
    tests/test_cuda_ipc.py::test_real_memory_crosses_a_process
    tests/test_fp8.py::test_fused_codes_are_multiplied_on_a_gpu
    tests/test_fp8.py::test_scaled_mm_is_taken_on_a_gpu
    tests/test_fp8_attention.py::test_flash3_in_fp8_is_right_on_a_gpu
    tests/test_fp8_attention.py::test_passes_by_flash3_are_near_the_definition
    tests/test_gpu_golden.py::test_a_stream_in_float32_equals_the_reference
    tests/test_gpu_golden.py::test_a_stream_in_bfloat16_is_as_near_as_the_plain_way
    tests/test_gpu_golden.py::test_pixels_equal_the_reference
    tests/test_gpu_golden.py::test_embeds_equal_the_reference
    tests/test_gpu_golden.py::test_the_text_encoders_table_stays_in_host_memory
    tests/test_tensor_ring.py::test_on_a_gpu_completion_follows_the_work_in_order
    tests/test_triton_kernels.py::test_a_product_that_ends_with_gelu
)

main() {
    local flash='' flash3='' tests=yes
    while (($#)); do
        case $1 in
            --flash) flash=yes ;;
            --flash3) flash3=yes ;;
            --torch-index) export LONGLIVE_TORCH_INDEX=${2:?--torch-index: found nothing, expected a URL}; shift ;;
            --skip-tests) tests='' ;;
            --help | -h) printf '%s\n' "$HELP"; return ;;
            *) fail "found $1, expected one of --flash, --flash3, --torch-index, --skip-tests, --help" ;;
        esac
        shift
    done
    look_at_the_gpu
    scripts/setup
    look_at_torch
    [[ -z $flash ]] || build_flash
    [[ -z $flash3 ]] || .venv/bin/python -m pip install --disable-pip-version-check --no-deps 'fa3-fwd>=0.0.3'
    [[ -z $tests ]] || TRITON_INTERPRET=0 .venv/bin/python -m pytest -q "${GPU_TESTS[@]}"
    say_what_next
}

say() {
    printf 'setup_h100: %s\n' "$1" >&2
}

fail() {
    say "$1"
    exit 2
}

look_at_the_gpu() {
    local found
    command -v nvidia-smi > /dev/null || fail "nvidia-smi: not found, expected NVIDIA's driver; install it"
    found=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader) \
        || fail "nvidia-smi: found no GPU it can reach, expected at least one"
    while IFS= read -r line; do say "$line"; done <<< "$found"
}

# What torch sees is what counts: a build for the CPU, or a driver older than its CUDA, shows here.
look_at_torch() {
    .venv/bin/python - <<'PYTHON' || exit 2
import sys

import torch

if torch.version.cuda is None:
    sys.exit("setup_h100: torch: found a build for the CPU, expected one for CUDA; remove .venv and run this again")
if not torch.cuda.is_available():
    sys.exit(f"setup_h100: torch: found no GPU with CUDA {torch.version.cuda}; update the driver, or pass --torch-index")
major, minor = torch.cuda.get_device_capability()
name = torch.cuda.get_device_name()
print(f"setup_h100: torch {torch.__version__}, CUDA {torch.version.cuda}, {name}, {major}.{minor}", file=sys.stderr)
if (major, minor) < (8, 9):
    print("setup_h100: below 8.9 linears in fp8 are as inexact and not fast", file=sys.stderr)
PYTHON
}

build_flash() {
    command -v nvcc > /dev/null || fail "nvcc: not found, expected the CUDA toolkit of torch's version, to build flash-attn"
    say "building flash-attn; MAX_JOBS limits how much memory that takes"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check ninja
    .venv/bin/python -m pip install --disable-pip-version-check --no-build-isolation --constraint constraints.txt \
        'flash-attn>=2.7'
}

say_what_next() {
    cat <<'TEXT'
Ready. Without downloads: scripts/run_benchmarks.sh --quick --config longlive-1.3b   (random weights)

The published weights, tens of gigabytes, into one folder:
  .venv/bin/hf download Wan-AI/Wan2.1-T2V-1.3B --local-dir weights/Wan2.1-T2V-1.3B
  .venv/bin/hf download Efficient-Large-Model/LongLive-1.3B --local-dir weights/longlive_models
Then:
  .venv/bin/orchestrator start --config longlive-1.3b --set model.path=weights --out out/fox.mp4
  scripts/run_benchmarks.sh --quick --config longlive-1.3b --model-path weights
TEXT
}

main "$@"
