"""A comparison from its job to its report: A's streams once, then each option taught by them and alone.

One option's networks are in memory at a time; of A's streams latents and frames are kept. Knows no command line.
"""

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from configs.schema import RuntimeConfig
from ipc.errors import LongLiveError
from workers.ffmpeg import find_ffmpeg
from workers.quality.instruments import Instruments
from workers.quality.job import Job, Option
from workers.quality.pictures import SideBySide, WorstBlocks, write_png
from workers.quality.report import SCHEMA, Against, Block, JudgeScores, Pair, Report, Score, Versions, compared, passes
from workers.quality.streams import Made, Streams, encoded

Say = Callable[[str], None]
"""Takes a line of progress."""
Videos = list[list[Made]]
"""By story, its blocks."""


@dataclass(frozen=True)
class Reference:
    """What the options are compared with."""

    videos: Videos
    notes: tuple[str, ...]
    clip: float | None
    judge: dict[str, Score] | None


class Comparison:
    """Runs a job. Pictures go to its folder, which is there."""

    def __init__(self, job: Job, say: Say) -> None:
        self._job, self._say = job, say
        self._ffmpeg = find_ffmpeg(job.a.config.output.ffmpeg)
        self._instruments = Instruments([option.config for option in (job.a, *job.against)])
        self._texts = list(dict.fromkeys(scene.text for story in job.stories for scene in story.prompts))
        self._encoded: dict[str, dict[str, Tensor]] = {}

    def report(self) -> Report:
        """Compares everything. Raises LongLiveError that names the option it comes from."""
        job = self._job
        with _named(job.a):
            reference = self._reference()
        against = []
        for number, option in enumerate(job.against, start=1):
            with _named(option):
                against.append(self._against(option, reference, f"{number:02}_" if len(job.against) > 1 else ""))
        return Report(
            schema=SCHEMA,
            versions=versions([job.a.config, *(option.config for option in job.against)]),
            blocks=job.blocks,
            stories=job.stories,
            gate=job.gate,
            a=job.a,
            a_notes=reference.notes,
            against=tuple(against),
            not_measured=self._instruments.not_measured,
            passed=all(one.passed for one in against),
        )

    def _reference(self) -> Reference:
        job, streams = self._job, self._streams(self._job.a.config)
        videos = []
        for number, story in enumerate(job.stories):
            self._say(f"{job.a.name}: story {number}")
            videos.append(list(streams.alone(story, job.blocks)))
        measure = self._instruments
        return Reference(
            videos,
            tuple(streams.notes),
            measure.clip_score(job.stories, videos),
            measure.judged(job.stories, videos),
        )

    def _against(self, option: Option, reference: Reference, prefix: str) -> Against:
        job, measure = self._job, self._instruments
        streams = self._streams(option.config)
        files = (f"{prefix}side_by_side.mp4", f"{prefix}difference.png")
        worst = {"teacher_forced": WorstBlocks(), "free_running": WorstBlocks()}
        taught = self._taught(option, streams, reference.videos, worst["teacher_forced"])
        alone, videos = self._alone(option, streams, reference.videos, worst["free_running"], job.out / files[0])
        write_png(self._ffmpeg, job.out / files[1], worst[job.gate.judges].sheet())
        forced, free = (compared(blocks, job.stories, job.gate) for blocks in (taught, alone))
        clip, judge = measure.clip_score(job.stories, videos), measure.judged(job.stories, videos)
        return Against(
            option=option,
            notes=tuple(streams.notes),
            teacher_forced=forced,
            free_running=free,
            clip=None if clip is None or reference.clip is None else Pair(a=reference.clip, b=clip),
            judge=None if judge is None or reference.judge is None else JudgeScores(a=reference.judge, b=judge),
            passed=passes(job.gate, forced, free),
            files=files,
        )

    def _taught(self, option: Option, streams: Streams, videos: Videos, worst: WorstBlocks) -> list[Block]:
        blocks: list[Block] = []
        for number, (story, video) in enumerate(zip(self._job.stories, videos, strict=True)):
            self._say(f"{option.name}: story {number}, teacher-forced")
            taught = streams.taught(story, [made.latents for made in video])
            blocks += self._measured(number, video, taught, worst)
        return blocks

    def _alone(
        self, option: Option, streams: Streams, videos: Videos, worst: WorstBlocks, path: Path
    ) -> tuple[list[Block], Videos]:
        blocks: list[Block] = []
        own: Videos = []
        with SideBySide(self._ffmpeg, path, self._job.a.config.video) as film:
            for number, (story, video) in enumerate(zip(self._job.stories, videos, strict=True)):
                self._say(f"{option.name}: story {number}, free-running")
                own.append(list(streams.alone(story, self._job.blocks)))
                blocks += self._measured(number, video, own[-1], worst)
                for reference, made in zip(video, own[-1], strict=True):
                    film.put(reference.frames, made.frames)
        return blocks, own

    def _measured(
        self, story: int, video: Sequence[Made], made: Iterator[Made] | Sequence[Made], worst: WorstBlocks
    ) -> Iterator[Block]:
        for reference, own in zip(video, made, strict=True):
            figures = self._instruments.block(story, reference, own)
            worst.see(figures.decibels, reference.frames, own.frames)
            yield figures

    def _streams(self, config: RuntimeConfig) -> Streams:
        """A configuration's networks; its prompts are encoded once for all that encode alike."""
        model = config.model
        alike = model.model_dump_json(include={"path", "files", "text_encoder", "text_dtype", "random_weights_seed"})
        key = f"{alike} {config.stage('text_encoder').device} {model.random_weights} {model.transformer.text_len}"
        if key not in self._encoded:
            self._encoded[key] = encoded(config, self._texts)
        return Streams(config, self._encoded[key])


def versions(configs: Sequence[RuntimeConfig]) -> Versions:
    """What computes, here."""
    try:
        own = version("longlive-runtime")
    except PackageNotFoundError:
        own = "not installed"
    devices = {config.stage(stage).device or "cpu" for config in configs for stage in ("denoiser", "vae_decoder")}
    return Versions(
        longlive_runtime=own,
        python=platform.python_version(),
        torch=torch.__version__,
        platform=platform.platform(),
        devices=tuple(sorted(map(_device, devices))),
    )


def _device(name: str) -> str:
    return name if name == "cpu" else f"{name}: {torch.cuda.get_device_name(name)}"


@contextmanager
def _named(option: Option) -> Iterator[None]:
    """An error says which option it comes from."""
    try:
        yield
    except LongLiveError as error:
        error.args = (f"{option.name}: {error}",)
        raise
