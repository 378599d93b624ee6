"""Videos to be judged: of the whole runtime by its command, or of its model alone in this process.

Both make the same frames; the second needs no start and no file. Knows no caption and no judge.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import ClassVar

import imageio_ffmpeg
import numpy as np
import torch
from torch import Tensor

from configs.load import load_config
from workers.models.checkpoint import load_text_encoder, load_tokenizer, load_transformer
from workers.models.denoise import Rollout
from workers.models.execution import choose_frame_stream, choose_passes
from workers.models.noise import DrawnNoise
from workers.models.prompt_text import clean

QUALITY = 6
"""H.264's constant rate factor: low enough that what the judge sees is the model and not the codec."""


@dataclass(frozen=True)
class Runtime:
    """Makes videos by `orchestrator generate`: all processes, rings, ffmpeg.

    Attributes:
        config: a shipped name or a YAML file.
        settings: KEY=VALUE, as for `orchestrator --set`.
    """

    at_once: ClassVar[int] = 2
    """Videos worth making at a time on two cores: one begins while the other is decoded."""
    config: str = "pocket"
    settings: tuple[str, ...] = ()

    def make(self, prompts: Sequence[str], blocks: int, seed: int, at: Sequence[int] = ()) -> np.ndarray:
        """One video, [F, H, W, 3] uint8, F as the blocks have.

        Args:
            at: the block at which each further prompt takes effect.

        Raises:
            RuntimeError: the command failed; what it said.
        """
        with tempfile.TemporaryDirectory() as folder:
            story, video = Path(folder, "story.jsonl"), Path(folder, "video.mp4")
            story.write_text(json.dumps({"prompts": list(prompts)}), encoding="utf-8")
            command = [sys.executable, "-m", "orchestrator.cli", "generate", "--prompts", str(story)]
            command += ["--blocks", str(blocks), "--seed", str(seed), "--config", self.config, "--out", str(video)]
            if at:
                command += ["--switch-frames", ",".join(str(3 * block) for block in at)]
            for setting in (*self.settings, f"output.crf={QUALITY}"):
                command += ["--set", setting]
            ran = subprocess.run(command, capture_output=True, text=True, check=False)
            if ran.returncode:
                raise RuntimeError(f"orchestrator generate: exit code {ran.returncode}: {ran.stderr.strip()}")
            return read(video)


class Bare:
    """Makes videos by the runtime's model alone, one stage after the other. Arguments as of `Runtime`."""

    at_once: ClassVar[int] = 1
    """Each is made in the same memory."""

    def __init__(self, config: str = "pocket", settings: Sequence[str] = ()) -> None:
        self.config = load_config(config, settings)
        model, device = self.config.model, torch.device("cpu")
        self._tokenizer = load_tokenizer(model)
        self._text_encoder = load_text_encoder(model, device)
        self._transformer = load_transformer(model, device)
        self._frames = choose_frame_stream(self.config, device)
        self.block_ms: list[float] = []
        """What blocks with a full window took the transformer."""

    def make(self, prompts: Sequence[str], blocks: int, seed: int, at: Sequence[int] = ()) -> np.ndarray:
        """As `Runtime.make`, before H.264."""
        passes = choose_passes(self.config, self._transformer)
        rollout = Rollout(self._transformer, self.config.stream, self.config.video, passes=passes)
        noise = DrawnNoise(seed, rollout.shape)
        self._frames.begin()
        prompt_at = dict(zip((0, *at), prompts, strict=True))
        frames: list[Tensor] = []
        for block in range(blocks):
            if block in prompt_at:
                rollout.switch(self._embeds(prompt_at[block]))
            began = time.monotonic()
            latents = rollout.denoise_block(noise)
            if block >= self.config.stream.window_blocks:
                self.block_ms.append(1000 * (time.monotonic() - began))
            frames += [self._frames.decode(latent).clone() for latent in latents[0]]
        return torch.cat(frames).numpy()

    @property
    def median_block_ms(self) -> float:
        """Of all blocks with a full window so far."""
        return median(self.block_ms)

    @torch.inference_mode()
    def _embeds(self, prompt: str) -> Tensor:
        return self._text_encoder.encode(torch.tensor(self._tokenizer.ids(clean(prompt))))[None]


def read(path: Path) -> np.ndarray:
    """All frames of a video file, [F, H, W, 3] uint8."""
    frames = imageio_ffmpeg.read_frames(str(path), pix_fmt="rgb24")
    width, height = next(frames)["size"]
    return np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in frames])
