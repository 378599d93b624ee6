"""Presets that change while a stream runs: what may be listed, what is shared, what the blocks after a change are."""

from pathlib import Path

import pytest
import torch
from fake_graphs import FakeCuda
from golden_cases import relative_error
from stage_case import DenoiserCase, MadeBlock
from stream_case import CPU, SMALL, embeds, new_rollout, tiny_transformer

from configs.load import as_yaml, configs_at_presets, load_config
from configs.schema import StreamConfig
from ipc.errors import ConfigError
from ipc.messages import Begin, PresetApplied
from workers.models import execution, preset_set
from workers.models.checkpoint import load_transformer
from workers.models.denoise import Rollout
from workers.models.graphs import CudaGraphs
from workers.models.noise import DrawnNoise
from workers.models.passes import PlainPasses, hand_over
from workers.models.preset_set import PresetSet
from workers.models.static import fuse_qkv
from workers.models.static_passes import StaticPasses

TARGET = "adaptive.target_rtf=1.2"


def presets(*names: str) -> str:
    return f"adaptive.presets=[{', '.join(names)}]"


# What may be listed


def test_without_a_target_nothing_changes() -> None:
    config = load_config("pocket")
    assert not config.adaptive.is_on
    assert config.preset is None and configs_at_presets(config) == {}


@pytest.mark.parametrize("config", ["pocket", "longlive-1.3b"])
@pytest.mark.parametrize("target", ["target_rtf=1.2", "target_p99_ms=700"])
def test_a_run_with_a_target_begins_with_the_best_listed_preset(config: str, target: str) -> None:
    chosen = load_config(config, [f"adaptive.{target}"])
    assert chosen.preset == "quality"
    at = configs_at_presets(chosen)
    assert list(at) == ["quality", "balanced", "speed"]
    assert at["quality"] == chosen
    assert [each.execution.linears for each in at.values()] == ["model", "model", "fp8"]
    assert [each.execution.attend for each in at.values()] == ["model", "model", "fp8"]
    assert [each.model.attention for each in at.values()] == ["sdpa", "auto", "auto"]
    assert [each.stream.recache for each in at.values()] == ["full", "full", "recent(6)"]


@pytest.mark.parametrize("settings", [[], ["preset=speed"], ["preset=low_memory", presets("quality", "low_memory")]])
def test_it_can_begin_with_another_and_reads_back(settings: list[str], tmp_path: Path) -> None:
    config = load_config("pocket", [TARGET, *settings, "seed=4", "execution.audit=true"])
    (tmp_path / "copy.yaml").write_text(as_yaml(config), encoding="utf-8")
    assert load_config(str(tmp_path / "copy.yaml")) == config
    assert configs_at_presets(config)[config.preset or ""] == config
    assert all(each.execution.audit for each in configs_at_presets(config).values())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["adaptive.target_p99_ms=5"], "found both target_rtf and target_p99_ms, expected one"),
        (["adaptive.target_rtf=0"], r"adaptive\.target_rtf: found 0, expected greater than 0"),
        ([presets("speed")], "expected at least 2"),
        ([presets("speed", "speed")], "presets must differ, found speed, speed"),
        ([presets("quality", "spede")], r"preset spede: did you mean speed\?"),
        (["adaptive.wait=1000"], "wait must be at most longest_wait 512, found 1000"),
        (["preset=low_memory"], r"preset: found low_memory .* expected one of adaptive\.presets: quality, balanced"),
        (
            [presets("quality", "low_memory")],
            r"low_memory sets stages\.text_encoder\.device to cpu, which cannot",
        ),
        (["execution.kv=int8"], r"--set execution\.kv: .* quality, balanced, speed set it"),
        (["execution={kv: int8}"], r"--set execution: .* quality, balanced, speed set it"),
        ([presets("reference", "quality"), "execution.audit=true"], "audit: true needs denoiser: static"),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_line(settings: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        load_config("pocket", [TARGET, *settings])
    assert "\n" not in str(caught.value)


# What is handed over and what is shared

WAYS = {
    "plain": lambda *model: PlainPasses(*model),
    "static": lambda *model: StaticPasses(*model),
    "int8": lambda *model: StaticPasses(*model, kv="int8"),
    "fp8": lambda *model: StaticPasses(*model, kv="fp8"),
}


@pytest.mark.parametrize("stream", [{}, {"rope": "absolute"}, {"sink": 0}, {"recache": "blend(3)"}], ids=str)
@pytest.mark.parametrize("ways", [("plain", "static"), ("static", "plain"), ("static", "static")], ids="-".join)
def test_a_stream_goes_on_with_other_passes(ways: tuple[str, str], stream: dict[str, object]) -> None:
    """While the window fills, on a prompt's way and later; there and back it is the plain stream."""
    model, config = tiny_transformer(), StreamConfig(**stream)
    plain, rollout = (new_rollout(model, config, SMALL) for _ in range(2))
    first, second = (WAYS[way](model, config, SMALL) for way in ways)
    rollout.change(first, config)
    noise = DrawnNoise(0, plain.shape)
    for block in range(13):
        if block in (2, 3, 4, 7, 8, 11):
            rollout.change(second if rollout.passes is first else first, config)
        for each in (plain, rollout):
            if block in (0, 3, 6, 10):
                each.switch(embeds(block))
        assert relative_error(rollout.denoise_block(noise), plain.denoise_block(noise)) <= 1e-4


@pytest.mark.parametrize(("way", "far"), [("int8", 0.01), ("fp8", 0.05)])
def test_keys_and_values_in_eight_bits_are_as_far_off_as_their_rounding(way: str, far: float) -> None:
    model, stream = tiny_transformer(), StreamConfig()
    exact, coded, again = (WAYS[kind](model, stream, SMALL) for kind in ("static", way, "static"))
    rollout = Rollout(model, stream, SMALL, passes=exact)
    rollout.switch(embeds(0))
    noise = DrawnNoise(0, rollout.shape)
    for _ in range(6):
        rollout.denoise_block(noise)
    hand_over(exact, coded)
    hand_over(coded, again)
    assert again.sink_at == exact.sink_at is not None
    for mine, theirs in zip(again.layers, exact.layers, strict=True):
        for new, old in zip(mine.read(), theirs.read(), strict=True):
            assert 0 < relative_error(new, old) <= far


def test_presets_of_one_kind_share_weights_keys_values_and_buffers() -> None:
    """The model's linears are fused once; what they work in is the same memory, so that a change copies nothing."""
    model, stream = tiny_transformer(), StreamConfig()
    first = StaticPasses(model, stream, SMALL)
    second = StaticPasses(model, stream, SMALL, beside=first.static)
    addresses = [[tensor.data_ptr() for tensor in passes.static.buffers()] for passes in (first, second)]
    assert addresses[0] == addresses[1]
    layer = model.blocks[0]
    fused = [fuse_qkv(layer) for _ in range(2)]
    assert [part.data_ptr() for part in fused[0]] == [part.data_ptr() for part in fused[1]]
    assert fused[0][0].data_ptr() == layer.self_attn.q.weight.data_ptr()
    assert torch.equal(fused[0][0].chunk(3)[2], layer.self_attn.v.weight)


def test_every_preset_of_a_set_says_what_it_is_and_whose_memory_it_works_in() -> None:
    names = ("reference", "quality", "balanced", "speed", "low_memory")
    config = load_config("pocket", [TARGET, "preset=low_memory", presets(*names)])
    said: list[str] = []
    model = tiny_transformer()
    chosen = PresetSet("low_memory", configs_at_presets(config), model, say=said.append)
    assert (chosen.name, chosen.names, model.attention.name) == ("low_memory", names, "sdpa")
    assert [line for line in said if line.startswith("preset")] == [f"preset {name}" for name in names]
    memory = [line for line in said if line.startswith("keys and values")]
    assert memory[2] == "keys and values of quality"
    assert all(line.endswith("MiB") for line in (memory[0], memory[1], memory[3], memory[4]))
    rollout = Rollout(model, config.stream, config.video, passes=chosen.passes)
    chosen.change("reference", rollout)
    assert (chosen.name, rollout.passes, model.attention.name) == ("reference", chosen.passes, "math")
    chosen.change("speed", rollout)
    assert (rollout.layout.stream.recache, model.attention.name) == ("recent(6)", "sdpa")


# A denoiser that adapts

SLOW_MS, FAST_MS = 30, 10
"""Of a pass; a block has five."""
QUICK = ("adaptive.target_p99_ms=100", "adaptive.window=2", "adaptive.wait=2", "adaptive.longest_wait=2")
"""Three blocks at a preset, of which the first does not count, are enough to leave it."""


class Load:
    """A denoiser on a machine whose passes take what `pass_ms` says; prompts come at blocks 0, 8 and 12."""

    def __init__(self, *overrides: str, begin: int = 0) -> None:
        self.now_ns, self.pass_ms = 0, FAST_MS
        self.case = DenoiserCase(*overrides, on_pass=self._pass, clock=lambda: self.now_ns, begin=begin)

    def _pass(self) -> None:
        self.now_ns += self.pass_ms * 10**6

    def stream(self, blocks: range, slow: range = range(0)) -> list[MadeBlock]:
        made = []
        for block in blocks:
            self.pass_ms = SLOW_MS if block in slow else FAST_MS
            if block in (0, 8, 12):
                self.case.prompt(block)
            made.append(self.case.block())
        return made

    @property
    def changes(self) -> list[tuple[int, str]]:
        return [(said.block, said.new) for said in self.case.said if isinstance(said, PresetApplied)]


@pytest.mark.parametrize("pair", [("reference", "quality"), ("quality", "balanced")], ids="-".join)
def test_adaptive_steps_both_ways(pair: tuple[str, str]) -> None:
    """The first window that is full is slow: down after it; up when it is fast. Exact presets make the plain blocks.

    Blocks 4 and 7 are the first at a preset, 8 has a recache; of what is measured at the worse preset 9 and 10 count.
    """
    best, worse = pair
    load = Load(*QUICK, presets(best, worse))
    made = load.stream(range(16), slow=range(4, 7))
    assert load.changes == [(7, worse), (11, best)]
    said = next(said for said in load.case.said if isinstance(said, PresetApplied))
    assert (said.unit, said.measured, said.target) == ("p99_ms", 5 * SLOW_MS, 100)
    assert said.reason == "p99 150 ms over 2 blocks misses the target 100 ms"
    plain = Load("preset=reference").stream(range(16))
    for one, other in zip(made, plain, strict=True):
        assert (one.block, one.version, one.fresh) == (other.block, other.version, other.fresh)
        assert relative_error(one.latents, other.latents) <= 1e-4


def test_waits_recaches_and_filling_windows_are_not_measured() -> None:
    """Slow while the window fills, at every block that begins with a prompt, and between blocks."""
    load = Load(*QUICK, presets("quality", "balanced"))
    for block in range(20):
        load.now_ns += 10**12
        switches = block == 0 or (block > 6 and block % 2 == 0)
        load.pass_ms = SLOW_MS if block < 4 or switches else FAST_MS
        if switches:
            load.case.prompt(block)
        load.case.block()
    assert load.changes == []


@pytest.mark.parametrize(
    ("overrides", "slow", "changes", "inexact"),
    [
        ((presets("quality", "speed"),), range(4, 7), [(7, "speed"), (11, "quality")], range(7, 11)),
        (("preset=low_memory", presets("quality", "low_memory")), range(0), [(7, "quality")], range(7)),
    ],
    ids=["speed", "low_memory"],
)
def test_a_stream_goes_on_at_a_preset_that_is_not_exact_and_comes_back(
    overrides: tuple[str, ...], slow: range, changes: list[tuple[int, str]], inexact: range
) -> None:
    """At it blocks are off a little; back at the exact one they are what the definition makes of the same past."""
    load = Load(*QUICK, *overrides)
    made = load.stream(range(13), slow)
    assert load.changes == changes
    plain = Load("preset=reference").stream(range(13))
    off = [relative_error(one.latents, other.latents) for one, other in zip(made, plain, strict=True)]
    assert max(off[: inexact.start], default=0) <= 1e-4
    assert all(1e-4 < off[block] < 0.3 for block in inexact)
    defined = definition_of_the_same_past(load.case)
    for block in range(13, 16):
        by_definition = defined.denoise_block(DrawnNoise(load.case.config.seed, defined.shape))
        [fast] = load.stream(range(block, block + 1))
        assert relative_error(fast.latents, by_definition[0]) <= 1e-4


def definition_of_the_same_past(case: DenoiserCase) -> Rollout:
    """The plain stream, with weights of its own, that goes on from what a denoiser's cache holds under prompt 12."""
    config, stage = case.config, case.stage._rollout
    model = load_transformer(config.model, CPU)
    plain = PlainPasses(model, config.stream, config.video)
    plain.take_prompt(case.embeds(12)[None])
    hand_over(stage.passes, plain)
    rollout = Rollout(model, config.stream, config.video, passes=plain)
    rollout.block, rollout.anchor = stage.block, stage.anchor
    return rollout


def test_a_denoiser_that_was_started_again_goes_on_at_its_preset() -> None:
    """It says nothing: the preset is known. Its first block makes the cache anew and does not count."""
    load = Load(*QUICK, presets("quality", "balanced"), begin=9)
    load.case.stage.receive(Begin(block=9, preset="balanced"))
    load.case.prompt(4, at=9)
    load.pass_ms = SLOW_MS
    load.case.block()
    load.stream(range(10, 12))
    assert load.changes == []
    load.stream(range(13, 15))
    assert load.changes == [(13, "quality")]


def test_what_computes_attention_is_found_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each kind that presets ask for, however many do."""
    asked: list[str] = []
    choose = execution.choose_attention
    monkeypatch.setattr(execution, "choose_attention", lambda kind, *given: asked.append(kind) or choose(kind, *given))
    Load(*QUICK, presets("quality", "balanced", "speed"))
    assert asked == ["sdpa", "auto"]


def test_a_change_costs_no_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """All graphs of all presets are captured at warm-up, in one pool of memory."""
    cuda = FakeCuda()
    monkeypatch.setattr(preset_set, "choose_recorder", lambda config, device, warn: CudaGraphs(CPU, cuda))
    load = Load(*QUICK, presets("quality", "speed"))
    load.case.stage.warm_up()
    captures = [entry for entry in cuda.log if entry != "replay"]
    assert set(captures) == {("capture", 1)}
    load.stream(range(14), slow=range(4, 7))
    assert [name for _, name in load.changes] == ["speed", "quality"]
    assert [entry for entry in cuda.log if entry != "replay"] == captures
