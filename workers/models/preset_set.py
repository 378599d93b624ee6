"""The presets a stream can change between: the passes of each, ready to run over one model, and which is in force.

Knows what they share and what is handed over from one to the next; not when to change, and no clock.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from configs.schema import AttentionKind, RuntimeConfig, StreamConfig, Switch
from workers.models.attention import Attention
from workers.models.denoise import Rollout
from workers.models.execution import Say, choose_passes, choose_recorder, unheard
from workers.models.graphs import Recorder
from workers.models.passes import AfterPass, Passes, go_on
from workers.models.transformer import CausalWanTransformer


@dataclass(frozen=True)
class Ready:
    """What a stream needs to go on at a preset; the plain passes ask the model for its attention."""

    stream: StreamConfig
    attention: Attention
    passes: Passes


class PresetSet:
    """Passes for each of some presets.

    Args:
        name: the preset in force at first.
        configs: what runs at each preset, by name; alike but for `model.attention`, `execution` and `stream.recache`.
        say: told what was chosen for each, and whose memory it works in.
        warn: as of `choose_passes`.

    Attributes:
        name: the preset in force.

    Raises:
        ConfigError: what one of them asks for does not run here.
    """

    def __init__(
        self,
        name: str,
        configs: Mapping[str, RuntimeConfig],
        model: CausalWanTransformer,
        on_pass: AfterPass = go_on,
        say: Say = unheard,
        warn: Say = unheard,
    ) -> None:
        self._model = model
        self._ready: dict[str, Ready] = {}
        recorders: dict[Switch, Recorder] = {}
        attentions: dict[AttentionKind, Attention] = {}
        for each, config in configs.items():
            say(f"preset {each}")
            graphs = config.execution.graphs
            if graphs not in recorders:
                recorders[graphs] = choose_recorder(config, model.device, warn)
            others = {other: ready.passes for other, ready in self._ready.items()}
            beside, record = tuple(others.values()), recorders[graphs]
            kind = config.model.attention
            passes = choose_passes(
                config, model, on_pass, say, warn=warn, beside=beside, record=record, attention=attentions.get(kind)
            )
            attentions[kind] = model.attention
            whose = [other for other, theirs in others.items() if _same_memory(theirs, passes)]
            say(f"keys and values {f'of {whose[0]}' if whose else f'{passes.nbytes / 2**20:.1f} MiB'}")
            self._ready[each] = Ready(config.stream, model.attention, passes)
        self.name = name
        model.attention = self._ready[name].attention

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._ready)

    @property
    def passes(self) -> Passes:
        """Those of the preset in force."""
        return self._ready[self.name].passes

    def change(self, name: str, rollout: Rollout) -> None:
        """A stream's next blocks are made at another preset, over what its cache holds."""
        ready = self._ready[name]
        self._model.attention = ready.attention
        rollout.change(ready.passes, ready.stream)
        self.name = name


def _same_memory(one: Passes, other: Passes) -> bool:
    return one.layers[0].k.data_ptr() == other.layers[0].k.data_ptr()
