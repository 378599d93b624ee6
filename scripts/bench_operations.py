"""For `--profile`: time on the device by operation, of the shipped path in one process. Prints JSON.

PyTorch's profiler over some blocks of each stage alone; on a GPU the time of kernels, on a CPU an operation's own time.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from bench_roofline import decoder, denoiser
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from configs.load import load_config

LISTED = 25
"""Operations of each stage that are told."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="pocket")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for orchestrator")
    parser.add_argument("--blocks", type=int, default=5, help="blocks of each stage")
    given = parser.parse_args()
    config = load_config(given.config, given.set)
    torch.set_num_threads(config.stage("denoiser").threads)
    found = [
        row
        for stage, build in (("denoiser", denoiser), ("vae_decoder", decoder))
        for row in table(stage, build(config), given.blocks, (config.stage("denoiser").device or "cpu") != "cpu")
    ]
    print(json.dumps({"operations": found}))  # noqa: T201


def table(stage: str, block: Callable[[], object], blocks: int, on_gpu: bool) -> list[dict[str, Any]]:
    """Rows with `operation`, `ms_a_block`, `calls_a_block` and `share`, the largest first."""
    block()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiled:
        for _ in range(blocks):
            block()
        if on_gpu:
            torch.cuda.synchronize()
    times = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count)
        for event in profiled.key_averages()
        if not on_gpu or event.device_type == DeviceType.CUDA  # an operation of the host's has its kernels' time too
    }
    whole = sum(microseconds for microseconds, _ in times.values())
    first = sorted(times.items(), key=lambda item: -item[1][0])[:LISTED]
    return [
        {
            "stage": stage,
            "operation": name[:120],
            "ms_a_block": microseconds / 1000 / blocks,
            "calls_a_block": count / blocks,
            "share": microseconds / whole if whole else 0.0,
        }
        for name, (microseconds, count) in first
        if microseconds > 0
    ]


if __name__ == "__main__":
    main()
