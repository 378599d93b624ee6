"""Which figures can be measured here, and measuring them. What cannot is named, with the reason, and never silently.

Knows frames and latents, no stream.
"""

from collections.abc import Sequence

import numpy as np

from configs.schema import RuntimeConfig
from workers.quality.job import Story
from workers.quality.judged import Judgement, judge_lack
from workers.quality.metrics import latent_error, psnr_db, ssim, ssim_lack
from workers.quality.perceptual import Clip, Lpips, clip_lack, lpips_lack
from workers.quality.report import Block, Score
from workers.quality.streams import Made


class Instruments:
    """For videos of some configurations."""

    def __init__(self, configs: Sequence[RuntimeConfig]) -> None:
        lacks = {
            "SSIM": ssim_lack(),
            "LPIPS": lpips_lack(),
            "CLIP score": clip_lack(),
            "judge": next(filter(None, map(judge_lack, configs)), ""),
        }
        self.not_measured = tuple(f"{name}: not measured: {lack}" for name, lack in lacks.items() if lack)
        self._ssim = None if lacks["SSIM"] else ssim
        self._lpips = None if lacks["LPIPS"] else Lpips()
        self._clip = None if lacks["CLIP score"] else Clip()
        self._judges = not lacks["judge"]

    def block(self, story: int, reference: Made, made: Made) -> Block:
        """Figures of a block."""
        one, other = reference.frames, made.frames
        return Block(
            story=story,
            block=made.block,
            psnr_db=psnr_db(one, other),
            ssim=None if self._ssim is None else self._ssim(one, other),
            lpips=None if self._lpips is None else self._lpips(one, other),
            latent_error=latent_error(made.latents, reference.latents),
        )

    def judged(self, stories: Sequence[Story], videos: Sequence[Sequence[Made]]) -> dict[str, Score] | None:
        """Of one side's whole videos; None where they cannot be judged."""
        if not self._judges:
            return None
        judgement = Judgement()
        for story, video in zip(stories, videos, strict=True):
            judgement.see(story, np.concatenate([made.frames for made in video]))
        return judgement.scores()

    def clip_score(self, stories: Sequence[Story], videos: Sequence[Sequence[Made]]) -> float | None:
        """The mean over one side's frames, each against the prompt in force; None where not measured."""
        if self._clip is None:
            return None
        scores: list[float] = []
        for story, video in zip(stories, videos, strict=True):
            for made in video:
                scores += self._clip(made.frames, [story.text_at(made.block)] * len(made.frames))
        return float(np.mean(scores))
