"""Prompt switches: how long from acceptance to the first frame at the sinks, and where that time goes.

Sends prompts as a client does. Whether a prompt was cached is what the text encoder said, not what was meant.
"""

import itertools
import random
import time
from collections.abc import Iterator, Sequence

from configs.schema import StreamConfig
from ipc.errors import LongLiveError
from ipc.messages import Applied, BlockTimes, FramesPlayed, OnAir
from orchestrator.bench.recording import Recording
from orchestrator.bench.report import BlockRow, SwitchCase, SwitchSample
from orchestrator.bench.runs import LiveRun, Subject, running
from orchestrator.bench.statistics import distribution
from orchestrator.bench.steady import block_rows, known

PROMPTS = (
    "a white ring moving down on a dark blue background",
    "a large blue square in the upper left corner, standing still",
    "three green stars falling slowly on a black ground",
    "a realistic video of a red fox trotting through a snowy forest at dawn, soft light, cinematic",
    "an aerial view of a coast at noon, waves breaking on dark rocks, white foam",
    "night in a city, neon signs mirrored on a wet street, people with umbrellas, slow camera",
    "a close-up of an old clockwork, brass wheels turning, shallow depth of field",
    "watercolour of a mountain lake in autumn",
)
PARTS = ("encode", "wait", "switch", "denoise", "decode")
"""In the order of time: until the embeddings are ready; until the block's boundary; while the denoiser switches and
recomputes its cache; until the VAE decoder takes the block, its wait for the block before included; until the first
frame is at the sinks, playout's wait included."""
TIMEOUT_S = 120.0


def switch_cases(stream: StreamConfig, quick: bool) -> list[tuple[str, str]]:
    """Pairs of `stream.recache` and `stream.switch` that are measured; quick are both cuts, and a short recache."""
    recent = f"recent({2 * stream.frames_per_block})"
    if quick:
        return [("full", "boundary"), (recent, "boundary"), ("full", "abort")]
    return [(recache, cut) for cut in ("boundary", "abort") for recache in ("full", recent, "none", "blend(1.5)")]


def measure_switches(subject: Subject, recache: str, cut: str, switches: int, pace: str, seed: int) -> SwitchCase:
    """One run with that many switches, each sent at a random moment after the one before is on air."""
    config = subject.load()
    block_s = config.stream.frames_in(1) / config.video.fps
    settings = (f"stream.recache={recache}", f"stream.switch={cut}", f"output.pace={pace}")
    draw = random.Random(seed)
    sent: dict[int, int] = {}
    shown_block = 0
    with running(subject, settings=settings) as run:
        run.wait_for_block(config.stream.window_blocks)
        for prompt, text in texts(switches):
            on_air = switch(run, text)
            sent[on_air.version], shown_block = prompt, on_air.block
            time.sleep(draw.uniform(0, block_s))
        run.wait_for_block(shown_block)
    samples = tuple(switch_samples(run.recording, sent))
    if len(samples) < len(sent):
        raise LongLiveError(f"{len(sent) - len(samples)} of {len(sent)} switches were not told in full")
    return switch_case(recache, cut, samples, block_rows(run.recording))


def switch(run: LiveRun, text: str) -> OnAir:
    """Sends a prompt and waits until it is on air. Raises LongLiveError."""
    handle = run.client.prompt(text)
    try:
        answer = handle.result(TIMEOUT_S)
        if not isinstance(answer, Applied):
            raise LongLiveError(f"prompt {text!r}: expected applied, found {answer.type}")
        return handle.on_air(TIMEOUT_S)
    except TimeoutError as error:
        raise LongLiveError(f"prompt {text!r}: not applied or not on air within {TIMEOUT_S:g} s") from error


def texts(switches: int) -> Iterator[tuple[int, str]]:
    """Numbers in `PROMPTS` and texts: two that were never seen, then in turn one that was, and one that was not.

    One that was seen is the new one before the last, so that it is not in force now, and a small cache still has it.
    """
    new: list[tuple[int, str]] = []
    for number in range(switches):
        if number >= 2 and number % 2 == 0:
            yield new[-2]
        else:
            prompt = len(new) % len(PROMPTS)
            text = PROMPTS[prompt] if len(new) < len(PROMPTS) else f"{PROMPTS[prompt]}, take {number}"
            new.append((prompt, text))
            yield new[-1]


def switch_case(recache: str, cut: str, samples: Sequence[SwitchSample], rows: Sequence[BlockRow]) -> SwitchCase:
    """Summary of one way to switch."""
    return SwitchCase(
        recache=recache,
        switch=cut,
        hot=distribution([sample.ms for sample in samples if sample.cached]),
        cold=distribution([sample.ms for sample in samples if not sample.cached]),
        parts={part: known(distribution([sample.parts[part] for sample in samples])) for part in PARTS},
        samples=tuple(samples),
        rows=tuple(rows),
    )


def switch_samples(recording: Recording, sent: dict[int, int]) -> Iterator[SwitchSample]:
    """A sample of every version whose events are all there; `sent` says which prompt each was."""
    decoded = {times.block: times for times in recording.blocks if times.stage == "vae_decoder"}
    played = {frames.block: frames for frames in recording.frames}
    for version, prompt in sent.items():
        on_air = recording.on_air.get(version)
        told = version in recording.in_force and version in recording.encoded
        if on_air is not None and told and on_air.block in decoded and on_air.block in played:
            yield _sample(recording, prompt, version, decoded[on_air.block], played[on_air.block])


def _sample(recording: Recording, prompt: int, version: int, decoded: BlockTimes, played: FramesPlayed) -> SwitchSample:
    on_air, encoded, in_force = recording.on_air[version], recording.encoded[version], recording.in_force[version]
    shown_ns = played.played_ns[on_air.frame - played.first_frame]
    accepted_ns = shown_ns - int(on_air.ms * 1e6)
    moments = (accepted_ns, encoded.sent_ns, in_force.began_ns, in_force.ended_ns, decoded.began_ns, shown_ns)
    parts = [(b - a) / 1e6 for a, b in itertools.pairwise(moments)]
    return SwitchSample(
        prompt=prompt,
        version=version,
        block=on_air.block,
        cached=encoded.cached,
        ms=on_air.ms,
        parts=dict(zip(PARTS, parts, strict=True)),
    )
