"""What is asked for by name and is not to be had here is said in one line; what only may be is not."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command import Command
from stage_case import tiny_config
from stream_case import tiny_transformer

from configs.load import load_config, preset_names
from configs.schema import RuntimeConfig
from workers.models import execution
from workers.models.execution import choose_frame_stream, choose_native, choose_passes
from workers.models.native import NotCompiled

CPU = torch.device("cpu")
ASKED = {
    "graphs=true": "execution.graphs: true needs a CUDA device, found cpu; used instead: ",
    "kernels=triton": "execution.kernels: triton needs a CUDA device, found cpu; used instead: torch",
    "linears=fp8": "execution.linears: fp8 needs a GPU of compute capability 8.9 or more, found cpu; used instead: ",
    "attend=fp8": "execution.attend: fp8 needs FlashAttention-3 (flash_attn_interface or fa3-fwd) on a GPU of compute ",
    "compile=true": "execution.compile: true needs a compiler for cpu, found ",
    "native=true": "execution.native: true needs a compiler (g++ or c++), found none; used instead: PyTorch",
}
"""Settings under `execution`, and how their warnings begin."""


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither for torch.compile nor for our own source."""

    def not_compiled() -> None:
        raise NotCompiled("a compiler (g++ or c++)", "none")

    monkeypatch.setattr(execution, "compiled", not_compiled)
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        yield


def warned(config: RuntimeConfig) -> list[str]:
    """All that the denoiser and the VAE decoder warn of, as the daemon tells it: every line once."""
    lines: list[str] = []
    choose_passes(config, tiny_transformer(), warn=lines.append)
    choose_frame_stream(config, CPU, warn=lines.append)
    return list(dict.fromkeys(lines))


def settings_of(*asked: str) -> list[str]:
    return [f"execution.{setting}" for setting in asked]


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("asked", [(setting,) for setting in ASKED] + [tuple(ASKED)], ids="-".join)
def test_every_fallback_is_one_warning(asked: tuple[str, ...]) -> None:
    lines = warned(tiny_config(*settings_of(*asked)))
    assert len(lines) == len(asked)
    for setting in asked:
        assert sum(line.startswith(ASKED[setting]) and "; used instead: " in line for line in lines) == 1
    assert not any("\n" in line for line in lines)


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("preset", [None, *preset_names()])
def test_defaults_and_presets_warn_of_what_they_ask_for_alone(preset: str | None) -> None:
    """Graphs, kernels and compiled operations are for where they can be; 8 bits are what a preset is about."""
    lines = warned(tiny_config(*([f"preset={preset}"] if preset else [])))
    asks = {"speed": ["execution.attend:", "execution.linears:"], "low_memory": ["execution.linears:"]}
    assert [line.split()[0] for line in lines] == asks.get(preset or "", [])


@pytest.mark.usefixtures("no_compiler")
def test_what_is_switched_off_is_not_missed() -> None:
    assert warned(tiny_config(*settings_of("graphs=false", "native=false", "kernels=torch"))) == []


@pytest.mark.parametrize(
    ("settings", "device", "threads", "found"),
    [
        ([], "cuda:0", 1, "needs a CPU, found cuda:0"),
        ([], "cpu", 2, "needs stages.vae_decoder.threads: 1, found 2"),
        (["model.decoder=tiny"], "cpu", 1, "needs model.decoder: full, found tiny"),
    ],
)
def test_native_operations_say_what_they_are_not_for(
    settings: list[str], device: str, threads: int, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    lines: list[str] = []
    config = load_config("pocket", ["execution.native=true", *settings])
    assert choose_native(config, torch.device(device), lines.append) is None
    assert [found in line for line in lines] == [True]


@pytest.mark.timeout(300)
def test_a_run_tells_each_fallback_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through all processes, on a machine without compilers; and it makes its frames."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    (tmp_path / "story.jsonl").write_text(json.dumps({"prompts": ["a red circle"]}) + "\n", encoding="utf-8")
    options = [option for setting in settings_of(*ASKED) for option in ("--set", setting)]
    done = Command(tmp_path / "run").run(
        *("generate", "--prompts", tmp_path / "story.jsonl", "--blocks", 1, "--out", "null:", *options)
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert sorted(line.split()[1] for line in lines) == sorted(start.split()[0] for start in ASKED.values())
    assert "frames" in done.stdout
