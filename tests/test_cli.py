"""The command line: what a person types wrong is one line and an exit code; what is typed right reaches the daemon."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_daemon import FakeDaemon, a_status

from configs.load import load_config
from configs.schema import RuntimeConfig
from ipc.errors import LongLiveError
from ipc.messages import (
    Accepted,
    Applied,
    Cancelled,
    Message,
    OnAir,
    PromptSet,
    Rejected,
    Status,
    Stop,
    Stopped,
    Superseded,
)
from orchestrator.cli import main
from orchestrator.plan import Reporter, RunPlan, RunSummary, ScheduledPrompt
from orchestrator.run_directory import RunDirectory

Result = tuple[int, str, str]
Run = Callable[..., Result]


@pytest.fixture
def run_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The run directory that commands find, which does not exist yet."""
    with RunDirectory.temporary() as scratch:
        monkeypatch.setenv("LONGLIVE_RUN_DIR", str(scratch.path / "run"))
        yield scratch.path / "run"


@pytest.fixture
def run(run_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in an empty folder: exit code, output, errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Result:
        code = main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


class RecordingDaemon:
    """Stands in for `orchestrator.daemon`: keeps what it is asked to run and says that it went well."""

    def __init__(self) -> None:
        self.summary = RunSummary(0, 160, 14, "ab12", ("out.mp4",), None, 10.0)

    def run(self, config: RuntimeConfig, plan: RunPlan, directory: RunDirectory, reporter: Reporter) -> RunSummary:
        self.config, self.plan, self.path = config, plan, directory.path
        assert (directory.path / "lock").exists()
        reporter.loading("denoiser", "reading weights")
        reporter.loading("denoiser", "ready")
        reporter.up("up: pocket 224x128")
        reporter.frames(160, plan.frames, 16.0)
        return self.summary


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> RecordingDaemon:
    recording = RecordingDaemon()
    monkeypatch.setitem(sys.modules, "orchestrator.daemon", SimpleNamespace(run=recording.run))  # type: ignore[misc]
    return recording


def two_prompts() -> Path:
    path = Path("two.jsonl")
    path.write_text(json.dumps({"prompts": ["a red fox", "a blue fox"]}))
    return path


# Wrong input

START: dict[str, tuple[list[str], list[str]]] = {
    "empty prompt": (["--prompt", ""], ["prompt: found no text"]),
    "blank prompt": (["--prompt", " \t\n"], ["prompt: found no text"]),
    "NUL": (["--prompt", "a\0b"], ["NUL"]),
    "surrogate": (["--prompt", "a\udcffb"], ["surrogate"]),
    "long prompt": (["--prompt", "x" * 20_001], ["20001 characters"]),
    "unknown config": (["--config", "pockt"], ["did you mean pocket?"]),
    "missing config": (["--config", "./gone.yaml"], ["no such file"]),
    "unknown key": (["--set", "stream.windw=9"], ["did you mean stream.window?"]),
    "wrong value": (["--set", "stream.window=10"], ["multiple of frames_per_block 3, found 10"]),
    "no value": (["--set", "stream.window"], ["expected KEY=VALUE"]),
    "size": (["--set", "video.height=100"], ["divisible by 16"]),
    "no weights": (["--config", "longlive-1.3b"], ["model.path", "--set model.path=FOLDER"]),
    "weights gone": (["-c", "longlive-1.3b", "--set", "model.path=gone"], ["model.path", "no such folder"]),
    "scheme": (["--out", "http://example.com/x"], ["output", "http"]),
    "ending": (["--out", "video.txt"], ["output", ".mp4"]),
    "second out": (["--out", "null:", "--out", "gopher://x"], ["output", "gopher"]),
    "control character": (["--out", "a\nb.mp4"], ["output"]),
    "ffmpeg": (["--ffmpeg", "gone/ffmpeg"], ["ffmpeg gone/ffmpeg: found no executable"]),
    "ffmpeg home": (["--ffmpeg", "~nobody-9/ffmpeg"], ["no such home folder"]),
    "no seconds": (["--seconds", "0"], ["--seconds: found 0", "above 0"]),
    "negative seconds": (["--seconds=-3"], ["--seconds: found -3"]),
    "nan seconds": (["--seconds", "nan"], ["--seconds: found nan"]),
    "endless seconds": (["--seconds", "inf"], ["--seconds: found inf"]),
    "huge seconds": (["--seconds", "1e300"], ["--seconds: found 1e+300"]),
    "text seconds": (["--seconds", "abc"], ["--seconds", "abc"]),
    "positions": (["--set", "stream.rope=absolute", "--seconds", "256"], ["342 blocks", "at most 341", "relative"]),
    "seed": (["--seed", "-1"], ["--seed", "-1"]),
    "huge seed": (["--seed", str(2**63)], ["--seed"]),
    "pace": (["--pace", "fast"], ["--pace", "fast", "live"]),
    "log folder": (["--log", "gone/log.txt"], ["--log", "folder does not exist"]),
    "log is a folder": (["--log", "."], ["--log", "found a folder"]),
    "unknown option": (["--secnds", "3"], ["--secnds", "--seconds"]),
    "extra": (["again"], ["again"]),
}


@pytest.mark.parametrize("case", START)
def test_start_refuses_wrong_input_before_anything_runs(
    case: str, run: Run, daemon: RecordingDaemon, run_path: Path
) -> None:
    arguments, words = START[case]
    _check_error(run("start", *arguments), 2, words)
    assert not hasattr(daemon, "plan") and not run_path.exists()


GENERATE: dict[str, tuple[list[str], list[str]]] = {
    "no prompts": (["--out", "x.mp4"], ["--prompts"]),
    "no out": (["--prompts", "two.jsonl"], ["--out", "such as video.mp4"]),
    "file gone": (["--prompts", "gone.jsonl", "--out", "x.mp4"], ["gone.jsonl", "No such file"]),
    "home gone": (["--prompts", "~nobody-9/x", "--out", "x.mp4"], ["--prompts", "no such home folder"]),
    "folder": (["--prompts", ".", "--out", "x.mp4"], ["Is a directory"]),
    "line": (["--prompts", "two.jsonl", "--out", "x.mp4", "--line", "4"], ["found 1 lines, asked for line 4"]),
    "line 0": (["--prompts", "two.jsonl", "--out", "x.mp4", "--line", "0"], ["--line"]),
    "switches": (["--prompts", "two.jsonl", "--out", "x.mp4", "--switch-frames", "3,6"], ["need 1 switch frames"]),
    "switch text": (["--prompts", "two.jsonl", "--out", "x.mp4", "--switch-frames", "a"], ["such as 40,80"]),
    "switch digits": (["--prompts", "two.jsonl", "--out", "x.mp4", "--switch-frames", "²"], ["such as 40,80"]),
    "switch late": (
        ["--prompts", "two.jsonl", "--out", "x.mp4", "--switch-frames", "40", "--blocks", "14"],
        ["switch frame 40 begins block 14, past the last block 13"],
    ),
    "two lengths": (["--prompts", "two.jsonl", "--out", "x.mp4", "--blocks", "4", "--seconds", "3"], ["one of them"]),
    "no blocks": (["--prompts", "two.jsonl", "--out", "x.mp4", "--blocks", "0"], ["--blocks"]),
    "one block": (["--prompts", "two.jsonl", "--out", "x.mp4", "--blocks", "1"], ["2 prompts need at least 2 blocks"]),
    "positions": (
        ["--prompts", "two.jsonl", "--out", "x.mp4", "--blocks", "342", "--set", "stream.rope=absolute"],
        ["342 blocks asked for", "at most 341 (255.562 s)"],
    ),
    "default length past positions": (
        ["--prompts", "two.jsonl", "--out", "x.mp4", "--switch-frames", "1020", "--set", "stream.rope=absolute"],
        ["at most 341"],
    ),
    "inputs": (["--prompts", "two.jsonl", "--out", "x.mp4", "--inputs", "gone.safetensors"], ["--inputs", "no such"]),
    "dump": (["--prompts", "two.jsonl", "--out", "x.mp4", "--dump-latents", "gone/x"], ["--dump-latents", "folder"]),
    "target": (["--prompts", "two.jsonl", "--out", "x.avi"], ["output", ".mp4"]),
}


@pytest.mark.parametrize("case", GENERATE)
def test_generate_refuses_wrong_input_before_anything_runs(case: str, run: Run, daemon: RecordingDaemon) -> None:
    arguments, words = GENERATE[case]
    two_prompts()
    _check_error(run("generate", *arguments), 2, words)
    assert not hasattr(daemon, "plan")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["statsu"], 2, ["statsu", "status"]),
        (["prompt"], 2, ["argument"]),
        (["prompt", "a fox", "--at", "-1"], 2, ["--at"]),
        (["prompt", "a fox", "--at", "x"], 2, ["--at"]),
        (["stop", "--timeout", "-1"], 2, ["--timeout"]),
        (["config", "show", "--set", "x=1"], 2, ["unknown key x"]),
        (["config", "print"], 2, ["print"]),
        (["--nope"], 2, ["--nope"]),
        (["status"], 4, ["no daemon runs", "orchestrator start"]),
        (["prompt", "a fox"], 4, ["no daemon runs"]),
        (["stop"], 4, ["no daemon runs"]),
    ],
)
def test_other_commands_refuse_wrong_input(arguments: list[str], code: int, words: list[str], run: Run) -> None:
    _check_error(run(*arguments), code, words)


def test_a_second_start_says_how_to_reach_the_first(run: Run, run_path: Path, daemon: RecordingDaemon) -> None:
    with RunDirectory.open(run_path):
        result = run("start")
        _check_error(result, 3, [f"pid {os.getpid()}", "orchestrator stop", "LONGLIVE_RUN_DIR"])


def test_a_run_directory_of_others_is_refused(run: Run, run_path: Path, daemon: RecordingDaemon) -> None:
    run_path.mkdir()
    run_path.chmod(0o755)
    _check_error(run("start"), 2, ["mode 0755", "chmod 700"])


def test_debug_keeps_the_traceback(run: Run) -> None:
    with pytest.raises(LongLiveError):
        run("--debug", "start", "--prompt", "")


# Right input


def test_start_passes_what_was_typed(run: Run, daemon: RecordingDaemon, run_path: Path, tmp_path: Path) -> None:
    code, out, err = run(
        *("start", "--prompt", "a fox: {red}", "--seed", "7", "--out", "a/b.mp4", "--out", "null:"),
        *("--seconds", "2.5", "--pace", "free", "--ffmpeg", sys.executable, "--set", "stream.window=9", "--log", "log"),
    )
    assert code == 0, err
    config, plan = daemon.config, daemon.plan
    assert (config.prompt, config.seed, config.stream.window) == ("a fox: {red}", 7, 9)
    assert (config.output.out, config.output.pace) == (("a/b.mp4", "null:"), "free")
    assert config.output.ffmpeg == Path(sys.executable)
    assert plan == RunPlan((ScheduledPrompt("a fox: {red}", 0),), 40, None, None, None, True, tmp_path / "log")
    assert daemon.path == run_path and not run_path.exists()
    assert out.splitlines()[0] == "up: pocket 224x128"
    assert "160 frames in 14 blocks, 10.0 s: 16.0 fps, 714 ms a block, RTF 1.00" in out
    assert "sha256 of the frames ab12" in out and "wrote out.mp4" in out
    assert "denoiser: reading weights\ndenoiser: ready\n" in err


def test_a_target_is_shorthand_for_its_setting(run: Run, daemon: RecordingDaemon) -> None:
    assert run("start", "--target-rtf", "1.2", "--preset", "balanced")[0] == 0
    assert daemon.config == load_config("pocket", ["adaptive.target_rtf=1.2", "preset=balanced"])
    code, out, _ = run("config", "show", "--target-p99-ms", "700")
    assert code == 0 and "target_p99_ms: 700.0" in out and "preset: quality" in out
    _check_error(run("start", "--target-rtf", "1", "--target-p99-ms", "700"), 2, ["both target_rtf and target_p99_ms"])


def test_start_alone_runs_the_shipped_default_until_it_is_stopped(run: Run, daemon: RecordingDaemon) -> None:
    assert run("start")[0] == 0
    assert daemon.config == load_config("pocket")
    assert (daemon.plan.frames, daemon.plan.blocks, daemon.plan.live) == (None, None, True)


def test_an_absolute_stream_ends_where_its_positions_do_and_says_so(run: Run, daemon: RecordingDaemon) -> None:
    _, _, err = run("start", "--set", "stream.rope=absolute")
    assert daemon.plan.blocks == 341
    assert "the stream ends after 341 blocks" in err
    run("start", "--set", "stream.rope=absolute", "--seconds", "255.5")
    assert daemon.plan.frames == 4088


def test_the_shortest_run_has_a_frame(run: Run, daemon: RecordingDaemon) -> None:
    run("start", "--seconds", "0.001")
    assert daemon.plan.frames == 1


def test_a_failed_run_ends_with_its_code_and_one_line(run: Run, daemon: RecordingDaemon, run_path: Path) -> None:
    daemon.summary = RunSummary(1, 0, 0, "", (), "denoiser died: killed by SIGKILL", 0.0)
    code, out, err = run("start")
    assert code == 1
    assert err.splitlines()[-1] == "error: denoiser died: killed by SIGKILL"
    assert "sha256" not in out and not run_path.exists()


def test_generate_passes_what_was_typed(run: Run, daemon: RecordingDaemon, run_path: Path, tmp_path: Path) -> None:
    two_prompts()
    Path("noise.safetensors").touch()
    code, _, err = run(
        *("generate", "--prompts", "two.jsonl", "--out", "x.mp4", "--switch-frames", "4", "--blocks", "5"),
        *("--seed", "3", "--inputs", "noise.safetensors", "--dump-latents", "latents.safetensors"),
    )
    assert code == 0, err
    prompts = (ScheduledPrompt("a red fox", 0), ScheduledPrompt("a blue fox", 2))
    inputs, dump = tmp_path / "noise.safetensors", tmp_path / "latents.safetensors"
    assert daemon.plan == RunPlan(prompts, None, 5, inputs, dump, False, None)
    assert (daemon.config.prompt, daemon.config.seed, daemon.config.output.pace) == ("a red fox", 3, "free")
    assert daemon.path != run_path and not daemon.path.exists(), "a daemon may run meanwhile"


@pytest.mark.parametrize(
    ("arguments", "frames", "second_at"),
    [
        ([], 320, 13),
        (["--seconds", "3"], 48, 2),
        (["--switch-frames", "40"], 12 * 14 - 3 + 160, 14),
    ],
)
def test_generate_is_ten_seconds_a_prompt_unless_told(
    arguments: list[str], frames: int, second_at: int, run: Run, daemon: RecordingDaemon
) -> None:
    two_prompts()
    assert run("generate", "--prompts", "two.jsonl", "--out", "x.mp4", *arguments)[0] == 0
    assert (daemon.plan.frames, daemon.plan.prompts[1].at) == (frames, second_at)


def test_generate_leaves_a_pace_that_was_set(run: Run, daemon: RecordingDaemon) -> None:
    two_prompts()
    run("generate", "--prompts", "two.jsonl", "--out", "x.mp4", "--set", "output.pace=serial")
    assert daemon.config.output.pace == "serial"


def test_config_show_prints_what_config_reads_back(run: Run) -> None:
    code, out, _ = run("config", "show", "--set", "stream.window=9")
    assert code == 0
    Path("mine.yaml").write_text(out)
    assert load_config("./mine.yaml") == load_config("pocket", ["stream.window=9"])


def test_version_and_help(run: Run) -> None:
    assert run("version") == run("--version")
    assert run("version")[1].startswith("longlive-runtime ")
    for arguments in ([], ["--help"], ["config"]):
        code, out, _ = run(*arguments)
        assert code == 0 and "Usage: orchestrator" in out
    out = run("start", "--help")[1]
    for word in ("--prompt", "--out", "--seconds", "--pace", "--set", "Examples", "orchestrator stop"):
        assert word in out


# Against a daemon


def answering(*answers: Message) -> Callable[[Message], Iterator[Message]]:
    def script(command: Message) -> Iterator[Message]:
        if isinstance(command, PromptSet):
            yield Accepted(version=3)
            yield from answers
        elif isinstance(command, Stop):
            yield Stopped(frames=480)
        else:
            yield a_status("a [red] fox\x1b[31m\nhere")

    return script


@pytest.mark.parametrize(
    ("answers", "code", "lines"),
    [
        (
            [OnAir(version=3, block=9, frame=105, ms=812.4), Applied(version=3, block=9, frame=105)],
            0,
            ["applied at block 9, frame 105", "on air after 812 ms"],
        ),
        ([Superseded(version=3, by=4)], 1, ["superseded: version 3 by version 4"]),
        ([Cancelled(reason="the stream ended")], 1, ["cancelled: the stream ended"]),
    ],
)
def test_prompt_wait_tells_what_becomes_of_it(
    answers: list[Message], code: int, lines: list[str], run: Run, run_path: Path
) -> None:
    with RunDirectory.open(run_path) as directory, FakeDaemon(directory, answering(*answers)) as daemon:
        told = "\n".join(["accepted: version 3", *lines, ""])
        assert run("prompt", "a fox", "--at", "9", "--wait") == (code, told, "")
        assert run("prompt", "a fox") == (0, "accepted: version 3\n", "")
        assert daemon.received == [PromptSet(text="a fox", at=9), PromptSet(text="a fox")]


def test_a_rejected_prompt_is_an_error(run: Run, run_path: Path) -> None:
    script = answering(Rejected(code="too_long", text="prompt: found\n\x1b[31m 513 tokens"))
    with RunDirectory.open(run_path) as directory, FakeDaemon(directory, script):
        code, out, err = run("prompt", "a fox", "--wait")
        assert (code, out) == (1, "accepted: version 3\n")
        assert err == "error: rejected (too_long): prompt: found [31m 513 tokens\n"
        _check_error(run("prompt", " "), 1, ["rejected (empty)"])


def test_status_for_people_and_for_programs(run: Run, run_path: Path) -> None:
    with RunDirectory.open(run_path) as directory, FakeDaemon(directory, answering()):
        code, out, _ = run("status", "--json")
        assert code == 0
        assert set(json.loads(out)) == set(Status.model_fields)
        code, out, _ = run("status")
        assert code == 0
        for word in (
            "16.0 fps",
            "130 ms a block",
            "RTF 1.00",
            "version 3: a [red] fox",
            "pocket, preset balanced",
            "denoiser",
            "null:",
        ):
            assert word in out
        assert "\x1b" not in out, "a prompt of somebody else must not steer the terminal"


def test_stop_waits_for_the_end(run: Run, run_path: Path) -> None:
    with RunDirectory.open(run_path) as directory:
        with FakeDaemon(directory, answering()):
            assert run("stop") == (0, "stopped after 480 frames\n", "")
        with FakeDaemon(directory, lambda _: [Accepted()]):
            _check_error(run("stop", "--timeout", "0.2"), 1, ["did not end within 0.2 s"])


# As a process


def test_importing_the_command_line_loads_no_heavy_library() -> None:
    """The daemon must start at once, and a parent without CUDA makes `spawn` clean."""
    code = "import sys, orchestrator.cli; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_process_ends_with_the_exit_code_and_one_line(run_path: Path) -> None:
    command = [sys.executable, "-m", "orchestrator.cli"]
    done = subprocess.run([*command, "status"], capture_output=True, text=True, check=False)
    _check_error((done.returncode, done.stdout, done.stderr), 4, ["no daemon runs"])
    raw = subprocess.run([*map(os.fsencode, command), b"start", b"--prompt", b"\xff"], capture_output=True, check=False)
    _check_error((raw.returncode, raw.stdout.decode(), raw.stderr.decode()), 2, ["surrogate"])


def test_ctrl_c_while_waiting_ends_quietly(run_path: Path) -> None:
    command = [sys.executable, "-m", "orchestrator.cli", "prompt", "a fox", "--wait"]
    with (
        RunDirectory.open(run_path) as directory,
        FakeDaemon(directory, answering()),
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as waiting,
    ):
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "accepted: version 3\n"
        waiting.send_signal(signal.SIGINT)
        _, errors = waiting.communicate(timeout=20)
    assert (waiting.returncode, errors) == (130, "")


def _check_error(result: Result, code: int, words: list[str]) -> None:
    assert result[0] == code, result
    assert result[1] == ""
    line = result[2].removesuffix("\n")
    assert line.startswith("error: ") and line.isprintable() and len(line) < 500, line
    for word in words:
        assert word in line
