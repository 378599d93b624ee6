"""The denoiser's presets where it has a target: all of them ready, and after each block the next one's chosen.

Knows blocks and their times; when to change is `adaptation.py`'s matter, what a change does `models/preset_set.py`'s.
"""

from collections.abc import Callable
from dataclasses import asdict

from configs.load import configs_at_presets
from configs.schema import RuntimeConfig
from ipc.messages import PresetApplied
from workers.adaptation import Adaptation, Change
from workers.models.denoise import Rollout
from workers.models.execution import Say
from workers.models.passes import AfterPass, Passes
from workers.models.preset_set import PresetSet
from workers.models.transformer import CausalWanTransformer


class AdaptivePresets:
    """As `config.adaptive` says; begins at `config.preset`.

    Args:
        say, warn: as of `PresetSet`.

    Raises:
        ConfigError: what a preset asks for does not run here.
    """

    def __init__(
        self, config: RuntimeConfig, model: CausalWanTransformer, on_pass: AfterPass, say: Say, warn: Say
    ) -> None:
        preset = config.preset
        assert preset is not None, "load_config names one"
        self._presets = PresetSet(preset, configs_at_presets(config), model, on_pass, say, warn)
        self._adaptation = Adaptation(config.adaptive, config.stream.frames_in(1) / config.video.fps, preset)
        self._window_blocks = config.stream.window_blocks
        self._change: Change | None = None

    @property
    def passes(self) -> Passes:
        """Those of the preset in force."""
        return self._presets.passes

    def warm_up(self, rollout: Rollout, passes_ms: Callable[[], float], say: Say) -> float:
        """Warms the passes of every preset up; says what a block took at each, and returns that at the first in force.

        Args:
            passes_ms: warms the rollout's passes up.
        """
        begins_at, took = self._presets.name, {}
        for name in self._presets.names:
            self._presets.change(name, rollout)
            took[name] = passes_ms()
        self._presets.change(begins_at, rollout)
        say(f"a block at {', '.join(f'{name} {ms:.0f} ms' for name, ms in took.items())}")
        return took[begins_at]

    def begin_at(self, preset: str) -> None:
        """The next block is made at this preset, at which an earlier denoiser was."""
        self._adaptation.begin_at(preset)

    def before_block(self, block: int, rollout: Rollout) -> PresetApplied | None:
        """Puts the preset in force that a block shall be made at; what is to be said of it, if it was measured."""
        change, self._change = self._change, None
        if self._presets.name != self._adaptation.preset:
            self._presets.change(self._adaptation.preset, rollout)
        return None if change is None else PresetApplied(block=block, **asdict(change))

    def after_block(self, block: int, took_ms: float) -> None:
        """Takes in what a block took that did not begin with a prompt, nor was begun anew."""
        if block >= self._window_blocks:  # before, there is less to attend to
            self._change = self._adaptation.note(took_ms)
