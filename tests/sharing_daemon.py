"""`orchestrator` on a CPU that passes for one GPU, for tests of what the daemon does where workers share one.

NVIDIA's program is the one in the folder PLACE. Workers are spawned, and each runs this file again before its own main:
the denoiser's first life meets a CUDA error at its second block, and tells in PLACE which service it had.
"""

import os
import sys
from functools import partial
from pathlib import Path

from configs.schema import MODEL_STAGES
from orchestrator import daemon, mps
from workers import denoiser

PLACE = Path(os.environ["PLACE"])
denoise = denoiser.DenoiserStage._denoise


def meets_a_fault(self: denoiser.DenoiserStage, block: int, may_abort: bool) -> object:
    told = PLACE / "service"
    if block == 1 and not told.exists():
        told.write_text(os.environ[mps.PIPES])
        raise RuntimeError("CUDA error: made up")
    return denoise(self, block, may_abort)


denoiser.DenoiserStage._denoise = meets_a_fault

if __name__ == "__main__":
    from orchestrator.cli import main

    mps.gpus_of = daemon.gpus_of = lambda config, stages: {"cuda:0"} & {"cuda:0" for s in stages if s in MODEL_STAGES}
    begun = partial(mps.Mps, trial=("true",))
    mps.Mps = lambda program, directory, warn, trial, interrupted: begun(
        program, directory, warn, interrupted=interrupted
    )
    os.environ["PATH"] = f"{PLACE}:{os.environ['PATH']}"
    sys.exit(main())
