"""Each benchmark command at its smallest, on a daemon whose times are made up: what goes in comes out, and where."""

import json
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import bench_operations
import bench_reference
import bench_roofline
import psutil
import pytest
from command import REPOSITORY, alive, until
from tiny_files import TINY

from configs.load import load_config
from ipc.errors import InputError, LongLiveError
from orchestrator.bench import environment, models_alone, runs, sustained, switching
from orchestrator.bench.compare import OFF, ON, ablations, geometry_ablations, named_subject
from orchestrator.bench.html import as_html
from orchestrator.bench.report import (
    SCHEMA_VERSION,
    Environment,
    Load,
    Machine,
    Report,
    Software,
    Throughput,
    read_report,
)
from orchestrator.bench.runs import Subject, record
from orchestrator.bench.steady import steady_of
from orchestrator.bench.tables import as_markdown
from orchestrator.bench.trace import trace_events
from orchestrator.cli import main

SCRIPTED = (sys.executable, str(Path(__file__).parent / "scripted_daemon.py"))
SMALL = (*TINY, "video.height=32", "video.width=32", "model.vae.base_dim=8", "stream.window=6", "video.fps=800")
OPTIONS = [word for setting in SMALL for word in ("--set", setting)]
Measure = Callable[..., Report]


def in_this_process(name: str, subject: Subject, *arguments: str) -> dict:
    """What a script measures, without a process of its own."""
    config, size = load_config(subject.config, subject.overrides), int(arguments[1])
    if name == "bench_roofline.py":
        return bench_roofline.roofline(config, size)
    if name == "bench_reference.py":
        return {"ms": bench_reference.measure(config, size, int(arguments[3]))}
    assert name == "bench_operations.py"
    return {"operations": bench_operations.table("denoiser", bench_roofline.denoiser(config), size, False)}


@pytest.fixture
def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Measure:
    """Runs a command; the report that it wrote, the same that the page and the block to paste were made of."""
    monkeypatch.setattr(runs, "RUNTIME", SCRIPTED)
    monkeypatch.setattr(models_alone, "run_script", in_this_process)
    monkeypatch.setitem(bench_roofline.MATMUL, "cpu", 64)
    monkeypatch.setitem(bench_roofline.COPY_BYTES, "cpu", 2**16)

    def run(*words: str) -> Report:
        out = tmp_path / "out"
        assert main(["bench", *words, *OPTIONS, "--out", str(out)]) == 0
        said = capsys.readouterr().out
        assert json.loads(said.splitlines()[-1])["report"] == str(out / "report.json")
        assert (out / "report.md").read_text().count("| --- |") >= 1
        assert charts(out / "report.html") >= 1 or words[0] == "startup"
        return read_report(out / "report.json")

    return run


def charts(page: Path) -> int:
    """Plots of a page; each is well formed, and nothing on it is loaded from anywhere."""
    text = page.read_text(encoding="utf-8")
    assert not any(word in text for word in ("<script", "<link", "src=", "url(", "@import"))
    pictures = [piece.partition("</svg>")[0] for piece in text.split("<svg ")[1:]]
    for picture in pictures:
        ElementTree.fromstring(f"<svg {picture}</svg>")
    return len(pictures)


def test_steady_says_what_the_stages_told(measure: Measure, tmp_path: Path) -> None:
    report = measure("steady", "--blocks", "10", "--warmup", "4", "--profile")
    steady = report.steady
    assert steady is not None
    assert (steady.blocks, steady.warmup_blocks) == (10, 4)
    assert {stage: times.p50 for stage, times in steady.stage_ms.items()} == {
        "denoiser": 40.0,
        "vae_decoder": 30.0,
        "output": 11.0,
    }
    assert steady.end_to_end_ms.p999 == 81.0
    assert steady.block_interval_ms.max == 40.0
    assert steady.block_fps == pytest.approx(25.0)
    assert steady.pixel_fps == pytest.approx(300.0)
    assert steady.frame_interval_ms.max == 29.0
    assert [miss.missed for miss in steady.misses] == [0, 0]
    assert {memory.worker for memory in steady.memory} >= {"orchestrator"}
    assert all(memory.host_peak_bytes > 2**20 for memory in steady.memory)
    assert report.operations
    assert report.notes == tuple(note for note in report.notes if "Leak" not in note)
    trace = json.loads((tmp_path / "out" / "trace.json").read_text())["traceEvents"]
    assert {event["cat"] for event in trace if event["ph"] == "X"} == {"denoiser", "vae_decoder", "output"}
    assert charts(tmp_path / "out" / "report.html") == 4


def test_switch_breaks_every_switch_down(measure: Measure) -> None:
    cases = measure("switch", "--quick", "--switches", "10").switching
    pairs = {(case.recache, case.switch) for case in cases}
    assert pairs == {("full", "boundary"), ("recent(6)", "boundary"), ("full", "abort")}
    for case in cases:
        assert (case.hot.count, case.cold.count, len(case.samples)) == (4, 6, 10)
        for sample in case.samples:
            assert sample.ms == 100.0
            assert sum(sample.parts.values()) == pytest.approx(100.0, abs=1e-3)
            assert sample.parts["switch"] == 1.0


def test_throughput_counts_frames_and_samples_the_load(
    measure: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sustained, "gpu_load", lambda: ({"utilization.gpu": 97.0, "clocks.sm": 1980.0},))
    throughput = measure("throughput", "--seconds", "1.2").throughput
    assert throughput.pixel_fps > 50
    assert throughput.seconds >= 1.2
    assert len(throughput.load) == 1
    assert "| GPU 0, clocks.sm, mean | 1980 |" in (tmp_path / "out" / "report.md").read_text()
    assert 'aria-label="GPU load"' in (tmp_path / "out" / "report.html").read_text()


def test_startup_tells_cold_and_warm(measure: Measure) -> None:
    starts = measure("startup", "--rounds", "1").startup
    assert [start.kind for start in starts] == ["cold", "warm"]
    assert all(0 < start.answers_s <= start.generating_s for start in starts)


def test_scaling_measures_a_shared_point_once(measure: Measure) -> None:
    cases = measure("scaling", "streams", "steps", "--quick", "--blocks", "4").scaling
    rates = {(case.axis, case.name): case.pixel_fps for case in cases}
    assert rates.keys() == {("streams", "1"), ("streams", "2"), ("steps", "1"), ("steps", "4")}
    assert rates["streams", "2"] == pytest.approx(2 * rates["streams", "1"])
    assert rates["steps", "4"] == rates["streams", "1"]


def test_compare_interleaves_and_equal_sides_are_equal(measure: Measure, capsys: pytest.CaptureFixture[str]) -> None:
    (comparison,) = measure(
        "compare", "balanced", "quality stream.sink=0", "--rounds", "2", "--blocks", "5"
    ).comparisons
    assert [side.name for side in comparison.sides] == ["balanced", "quality stream.sink=0"]
    assert (comparison.rounds, comparison.blocks) == (2, 4)
    for ratio in comparison.ratios.values():
        interval = ratio["quality stream.sink=0"]
        assert (interval.low, interval.value, interval.high) == pytest.approx((1.0, 1.0, 1.0))


def test_ablate_measures_one_change_at_a_time(measure: Measure) -> None:
    (off,) = measure("ablate", "off", "--rounds", "1", "--blocks", "4").comparisons
    assert [side.name for side in off.sides] == [
        "balanced",
        "no static blocks",
        "no native VAE operations",
        "no overlap",
    ]


def test_ablations_leave_out_what_changes_nothing_here() -> None:
    """On a CPU there are no graphs; what is off already cannot be taken away; windows are multiples of a block."""
    base = Subject("pocket", ("preset=balanced",))
    assert [name for name, _ in ablations(base.with_settings("execution.native=false"), OFF)] == [
        "no static blocks",
        "no overlap",
    ]
    assert {"no CUDA graphs", "no fused kernels"} <= {n for n, _ in ablations(base.with_settings("device=cuda"), OFF)}
    on = [name for name, _ in ablations(base.with_settings("preset=reference"), ON)]
    assert on == ["static blocks", "native VAE operations", "fastest attention"]
    geometry = dict(geometry_ablations(base))
    assert list(geometry) == [
        "window 6",
        "window 9",
        "model.dtype bfloat16",
        "model.vae_dtype float32",
        "model.vae_dtype bfloat16",
    ]
    assert geometry["window 9"].load().stream.window == 9


def test_reference_sets_the_straightforward_pipeline_beside_the_runtime(measure: Measure) -> None:
    (comparison,) = measure("reference", "--rounds", "1", "--blocks", "3").comparisons
    assert [side.name for side in comparison.sides] == ["straightforward", "runtime"]
    assert comparison.sides[1].block_interval_ms.p50 == 40.0
    assert comparison.ratios.keys() == {"block", "denoiser", "vae_decoder"}


def test_reference_takes_several_presets(measure: Measure) -> None:
    (comparison,) = measure("reference", "quality", "balanced", "--rounds", "1", "--blocks", "3").comparisons
    assert [side.name for side in comparison.sides] == ["straightforward", "quality", "balanced"]


def test_roofline_counts_what_is_dispatched(measure: Measure) -> None:
    found = measure("roofline", "--repeats", "1").roofline
    assert {part.stage for part in found.parts} == {"denoiser", "vae_decoder"}
    for part in found.parts:
        assert part.flops > 1e6
        assert part.bytes > 1e5
        assert part.share == pytest.approx(part.limit_ms / part.measured_ms)
        assert part.share < 1


def test_all_has_every_part_and_every_plot(measure: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.bench import suite

    monkeypatch.setattr(suite, "QUICK", suite.Sizes(6, 4, 3, 1.2, 1, 3, 1, 3, 1, 1, 1))
    report = measure("all", "--quick")
    filled = {name for name in Report.model_fields if getattr(report, name)}
    assert filled >= {"steady", "switching", "throughput", "startup", "scaling", "comparisons", "roofline"}
    page = (tmp_path / "out" / "report.html").read_text()
    for title in (
        "Time from block to block",
        "Latency by block with switches",
        "Stages, last",
        "Roofline",
        "Host memory",
    ):
        assert f'aria-label="{title}' in page
    assert 'class="mark"' in page
    assert [len(comparison.sides) for comparison in report.comparisons] == [2, 2, 4]
    assert not report.notes or "Not finished" not in report.notes[0]


def test_a_delay_in_one_stage_shows_in_that_stage_only() -> None:
    """5 ms in the denoiser: 5 ms in its times, none in the others'."""
    plain, late = (steady({"denoiser": ms}) for ms in (40, 45))
    assert late["denoiser"] - plain["denoiser"] == pytest.approx(5.0, rel=0.1)
    assert (late["vae_decoder"], late["output"]) == (plain["vae_decoder"], plain["output"])


def steady(times: dict[str, int]) -> dict[str, float]:
    """Median of each stage of a scripted run."""
    subject = Subject("pocket", SMALL, (("SCRIPTED_MS", json.dumps(times)),), SCRIPTED)
    found = steady_of(record(subject, 12), subject.load(), 4)
    return {stage: times.p50 for stage, times in found.stage_ms.items()}


def test_a_trace_has_all_processes_on_one_clock() -> None:
    """Spans keep the distances of their stamps; a span by CUDA events ends where the host's does."""
    subject = Subject("pocket", SMALL, (), SCRIPTED)
    recording = record(subject, 5)
    recording.blocks[0] = recording.blocks[0].model_copy(update={"device_ms": 30.0})
    spans = [event for event in trace_events(recording) if event["ph"] == "X"]
    first = {
        event["tid"]: event for event in reversed(spans) if event["name"] == "block 0" and event["cat"] == "denoiser"
    }
    host, device = first[11], first[12]
    assert (host["ts"], host["dur"], device["ts"], device["dur"]) == (0.0, 40_000.0, 10_000.0, 30_000.0)
    decoded = [event["ts"] for event in spans if event["cat"] == "vae_decoder"]
    assert decoded == [40_000.0 * (block + 1) for block in range(5)]


def test_a_warm_up_that_does_not_fill_the_window_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "steady", "--warmup", "4"]) == 2
    assert "more than the window's 4 blocks" in capsys.readouterr().err
    assert main(["bench", "compare", "balanced"]) == 2
    assert main(["bench", "scaling", "sideways"]) == 2
    assert "expected one of streams" in capsys.readouterr().err


def test_what_was_measured_before_a_failure_is_kept(
    measure: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hours of a report are not lost with its last part, and it says that it is not whole."""

    def fails(name: str, *arguments: object) -> dict:
        raise LongLiveError(f"{name}: ended with code 1")

    monkeypatch.setattr(models_alone, "run_script", fails)
    command = ["bench", "steady", "--blocks", "5", "--warmup", "4", "--profile", *OPTIONS, "--out", str(tmp_path)]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "error: bench_operations.py: ended with code 1" in said
    assert f"what was measured before is kept in {tmp_path}: steady" in said
    report = read_report(tmp_path / "report.json")
    assert report.steady.blocks == 5
    assert "Not finished" in report.notes[0]
    for name in ("report.html", "report.md"):
        assert "Not finished" in (tmp_path / name).read_text()


@pytest.mark.parametrize("command", ["steady", "all"])
def test_a_folder_that_cannot_be_written_is_said_before_anything_is_measured(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "RUNTIME", ("/nothing/that/runs",))
    (tmp_path / "file").touch()
    assert main(["bench", command, *OPTIONS, "--out", str(tmp_path / "file" / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"error: --out {tmp_path}/file/out: no folder can be made there")


def test_a_wrong_side_is_said_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where it would be the last that is looked at."""
    monkeypatch.setattr(runs, "RUNTIME", ("/nothing/that/runs",))
    assert main(["bench", "all", "reference", "nosuch", *OPTIONS, "--out", str(tmp_path)]) == 2
    assert "error: config nosuch: known are" in capsys.readouterr().err


def test_a_script_that_fails_says_why_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error, and nothing of its traceback."""
    (tmp_path / "fails.py").write_text("raise SystemError('no such device')")
    monkeypatch.setattr(models_alone, "SCRIPTS", tmp_path)
    with pytest.raises(LongLiveError, match=r"^fails\.py: ended with code 1: SystemError: no such device$"):
        models_alone.run_script("fails.py", Subject("pocket"))


def test_a_run_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(runs, "RUNTIME", (sys.executable, "-c", "import sys; sys.exit('no such weights')"))
    assert main(["bench", "steady", "--blocks", "2", *OPTIONS]) == 1
    assert "no such weights" in capsys.readouterr().err


def test_the_schema_of_a_report_is_the_documented_one() -> None:
    """Programs read these fields. Who adds one writes the file anew; who takes one away or changes what it means raises
    `SCHEMA_VERSION` too."""
    documented = Path(__file__).parent.parent / "docs" / "report.schema.json"
    assert json.loads(documented.read_text(encoding="utf-8")) == Report.model_json_schema()
    assert Report.model_json_schema()["properties"]["schema_version"]["const"] == SCHEMA_VERSION == 2


def test_a_report_of_another_version_is_refused(measure: Measure, tmp_path: Path) -> None:
    measure("startup", "--rounds", "1")
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {"python", "torch"} <= written["environment"]["software"]["versions"].keys()
    path = tmp_path / "other.json"
    path.write_text(json.dumps(written | {"schema_version": 1}))
    with pytest.raises(InputError, match="no report of schema version 2: schema_version"):
        read_report(path)


def test_a_commit_says_whether_files_were_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    answers = {"rev-parse": "0123abcd", "status": " M README.md"}
    monkeypatch.setattr(environment, "_answer", lambda command: answers[command[3]])
    assert environment.commit(tmp_path) == "0123abcd+"
    answers["status"] = ""
    assert environment.commit(tmp_path) == "0123abcd"
    answers["rev-parse"] = ""
    assert environment.commit(tmp_path) is None


def test_a_package_inside_another_checkout_has_no_commit(tmp_path: Path) -> None:
    """As in a virtual environment that lies in somebody's project."""
    for arguments in (["init"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "--allow-empty", "-m", "a"]):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)
    package = tmp_path / "site-packages"
    package.mkdir()
    assert environment.commit(tmp_path) is not None
    assert environment.commit(package) is None


def test_a_look_that_nvidia_smi_did_not_answer_is_left_out() -> None:
    """Neither an error nor a zero in the mean."""
    idle, busy = ({"utilization.gpu": 10.0},), ({"utilization.gpu": 90.0, "clocks.sm": 1980.0},)
    looks = enumerate(((), idle, (), busy), start=1)
    load = tuple(Load(at_s=at, cpu_cores=1, worker_cores={}, cpu_mhz=None, gpus=gpus) for at, gpus in looks)
    throughput = Throughput(seconds=4, pixel_fps=16, rtf=1, fps_by_second=(16,) * 4, underruns=0, load=load)
    assert throughput.gpu_samples() == [{"utilization.gpu": [(2.0, 10.0), (4.0, 90.0)], "clocks.sm": [(4.0, 1980.0)]}]
    empty = Environment(
        machine=Machine(cpu="", cores=1, cpu_mhz=None, memory_bytes=1, kernel=""),
        software=Software(commit=None, versions={}),
    )
    config = load_config("pocket").model_dump(mode="json")
    report = Report(command="", made_at="", wall_s=1, environment=empty, config=config, seeds={}, throughput=throughput)
    assert "| GPU 0, utilization.gpu, mean | 50 |" in as_markdown(report)
    assert 'aria-label="GPU load"' in as_html(report)


def test_what_nvidia_smi_says_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        environment, "_answer", lambda command: "97, 1980, 2619, 40210, 512.31, 54\n[N/A], 345, , 1, 2, 3"
    )
    first, second = environment.gpu_load()
    assert (first["utilization.gpu"], first["clocks.sm"], first["power.draw"]) == (97.0, 1980.0, 512.31)
    assert "utilization.gpu" not in second


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize(
    ("words", "runs"),
    [
        (["throughput"], 1),
        (["scaling", "streams", "--quick"], 1),
        (["scaling", "streams", "--quick"], 2),
        (["overlap", "--blocks", "100000"], 1),
    ],
    ids=["throughput", "scaling", "side by side", "overlap"],
)
def test_a_measurement_that_is_ended_leaves_no_run_behind(
    words: list[str], runs: int, number: signal.Signals, tmp_path: Path
) -> None:
    """With one run or several; the fixture for every test sees that no process is left."""
    out = [] if words[0] == "overlap" else ["--out", str(tmp_path)]
    script = (
        "import sys; from orchestrator.bench import runs; from orchestrator.cli import main;"
        f"runs.RUNTIME = {SCRIPTED!r}; sys.exit(main({['bench', *words, *OPTIONS, *out]!r}))"
    )
    measuring = subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    root = psutil.Process(measuring.pid)
    until(lambda: len(root.children()) == runs, 60)
    begun = root.children()
    measuring.send_signal(number)
    said = measuring.communicate(timeout=60)[1]
    assert measuring.returncode == 128 + number
    assert "Traceback" not in said
    until(lambda: not alive(begun), 10)


@pytest.mark.parametrize(
    ("fault", "words", "says"),
    [
        ("silent", ["steady", "--blocks", "5", "--warmup", "4"], "waited for its end of a run that played no block"),
        ("silent", ["scaling", "streams", "--blocks", "5"], "waited for block 6 of a run that played no block"),
        ("endless", ["startup", "--rounds", "1"], "did not end within 1 s of being asked to"),
        ("deaf", ["switch", "--switches", "1"], "not applied or not on air within 1 s"),
    ],
)
def test_no_wait_is_without_an_end(
    fault: str,
    words: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A daemon that hangs is one line after a while, and not a bench that waits for ever."""
    monkeypatch.setattr(runs, "RUNTIME", SCRIPTED)
    monkeypatch.setenv("SCRIPTED_FAULT", fault)
    for module, name in ((runs, "QUIET_S"), (runs, "END_S"), (switching, "TIMEOUT_S")):
        monkeypatch.setattr(module, name, 1.0)
    assert main(["bench", *words, *OPTIONS, "--out", str(tmp_path)]) == 1
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    assert says in error


@pytest.mark.parametrize(
    ("words", "preset", "window"),
    [
        ("speed", "speed", 6),
        ("speed stream.window=9", "speed", 9),
        ("stream.window=9", "balanced", 9),
        ("pocket", "balanced", 6),
    ],
)
def test_a_side_is_a_preset_or_a_configuration_with_changes(words: str, preset: str, window: int) -> None:
    """What is said of all sides counts for each, and gives way to what a side says itself."""
    base = Subject("pocket", ("preset=balanced", "stream.window=6"))
    config = named_subject(words, base).load()
    assert (config.preset, config.stream.window) == (preset, window)


@pytest.mark.parametrize("words", ["", "speed fast"])
def test_a_side_that_is_none_is_refused(words: str) -> None:
    with pytest.raises(InputError, match="expected a preset or configuration"):
        named_subject(words, Subject())
