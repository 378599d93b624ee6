"""`orchestrator` with a fault in one stage, for tests of what the benchmark detects; the product has no such switch.

Workers are spawned, and each runs this file again before its own main, so that the fault is in them too. FAULT says
which: `leak` keeps 1 MiB for every block that is decoded, `delay` sleeps 5 ms before every second block is denoised.
"""

import os
import sys
import time

from workers import denoiser, vae_decoder

LEAK_BYTES = 2**20
DELAY_S = 0.005
kept: list[bytes] = []


def is_late(block: int) -> bool:
    """Whether `delay` strikes a block."""
    return block % 2 == 1


def leak() -> None:
    advance = vae_decoder.VaeDecoderStage._advance

    def leaking(self: vae_decoder.VaeDecoderStage, work: vae_decoder.BlockInWork) -> None:
        advance(self, work)
        if self._work is None:
            kept.append(os.urandom(LEAK_BYTES))

    vae_decoder.VaeDecoderStage._advance = leaking


def delay() -> None:
    denoise = denoiser.DenoiserStage._denoise

    def late(self: denoiser.DenoiserStage, block: int, may_abort: bool) -> object:
        if is_late(block):
            time.sleep(DELAY_S)
        return denoise(self, block, may_abort)

    denoiser.DenoiserStage._denoise = late


FAULTS = {"leak": leak, "delay": delay}
FAULTS.get(os.environ.get("FAULT", ""), lambda: None)()

if __name__ == "__main__":
    from orchestrator.cli import main

    sys.exit(main())
