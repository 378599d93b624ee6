"""A run as a timeline in Chrome's trace format: all processes on the machine-wide clock. Pure but for the file.

One row of the viewer is a process, one line in it a kind of work; times are microseconds from the first span shown.
Opens in chrome://tracing and Perfetto.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.bench.recording import Recording

HOST, DEVICE, PROMPTS = 1, 2, 3
LINES = {HOST: "host stamps", DEVICE: "CUDA events", PROMPTS: "prompts"}
Event = dict[str, Any]


def trace_events(recording: Recording) -> list[Event]:
    """Spans of every stage by the host's clock, of GPUs by CUDA events, and prompts.

    A device's span ends where the host saw its last event: both clocks are one by that moment.
    """
    spans = sorted(_spans(recording), key=lambda span: span["ts"])
    start = spans[0]["ts"] if spans else 0
    for span in spans:
        span["ts"] = (span["ts"] - start) / 1e3
        if "dur" in span:
            span["dur"] /= 1e3
    return [*_names(recording, spans), *spans]


def write_trace(recording: Recording, path: Path) -> None:
    """As JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"traceEvents": trace_events(recording), "displayTimeUnit": "ms"}
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def _spans(recording: Recording) -> Iterator[Event]:
    """In nanoseconds."""
    for times in recording.blocks:
        pid, about = _pid(recording, times.stage), {"version": times.version}
        yield _span(pid, HOST, f"block {times.block}", times.stage, times.began_ns, times.ended_ns, about)
        if times.device_ms is not None:
            began = times.ended_ns - round(times.device_ms * 1e6)
            yield _span(pid, DEVICE, f"block {times.block}", times.stage, began, times.ended_ns, about)
    for played in recording.frames:
        pid, about = _pid(recording, "output"), {"version": played.version}
        for number, (at, then) in enumerate(zip(played.played_ns, played.played_ns[1:], strict=False)):
            yield _span(pid, HOST, f"frame {played.first_frame + number}", "output", at, then, about)
    for version, encoded in recording.encoded.items():
        began = encoded.sent_ns - round(encoded.ms * 1e6)
        about = {"version": version, "cached": encoded.cached, "tokens": encoded.tokens}
        pid = _pid(recording, "text_encoder")
        yield _span(pid, HOST, f"prompt {version}", "text_encoder", began, encoded.sent_ns, about)
    for version, applied in recording.in_force.items():
        pid, about = _pid(recording, "denoiser"), {"version": version, "block": applied.block}
        yield _span(pid, PROMPTS, f"switch to {version}", "switch", applied.began_ns, applied.ended_ns, about)


def _span(pid: int, line: int, name: str, category: str, began: int, ended: int, about: dict[str, Any]) -> Event:
    span: Event = {"ph": "X", "name": name, "cat": category, "pid": pid, "tid": _line(category, line), "args": about}
    return {**span, "ts": began, "dur": ended - began}


def _line(category: str, line: int) -> int:
    """Stages that share a process have lines of their own."""
    order = ("text_encoder", "denoiser", "vae_decoder", "output", "switch")
    return 10 * order.index(category) + line


def _pid(recording: Recording, stage: str) -> int:
    return recording.pids.get(stage) or recording.pids.get("models", 0)


def _names(recording: Recording, spans: list[Event]) -> Iterator[Event]:
    for worker, pid in recording.pids.items():
        yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": worker}}
    for pid, tid, category in sorted({(span["pid"], span["tid"], span["cat"]) for span in spans}):
        name = f"{category}, {LINES[tid % 10]}"
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}
