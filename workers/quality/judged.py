"""The embedded model's judge, where it is there: it lies beside the sources and not in an installed package.

Knows when it may be asked; how it judges is scripts/pocket's matter.
"""

import importlib.util
from collections import defaultdict

import numpy as np

from configs.schema import RuntimeConfig
from workers.models.prompt_text import ASSETS
from workers.quality.job import Story
from workers.quality.report import Score


def judge_lack(config: RuntimeConfig) -> str:
    """Why a configuration's videos cannot be judged here; empty if they can."""
    shipped = ASSETS / "pocket"
    if config.model.path is None or config.model.path.resolve() != shipped.resolve():
        return f"model.path is {config.model.path or 'not set'}, and only the embedded model's world can be judged"
    for package, where in (("pocket", "scripts/pocket of the sources"), ("skimage", "the package scikit-image")):
        if importlib.util.find_spec(package) is None:
            return f"needs {where}, which is not here"
    from pocket.world import HEIGHT, WIDTH

    size = (config.video.height, config.video.width)
    return "" if size == (HEIGHT, WIDTH) else f"video is {size[0]}x{size[1]}, it was trained for {HEIGHT}x{WIDTH}"


class Judgement:
    """Outcomes of one side's videos."""

    def __init__(self) -> None:
        self._outcomes: defaultdict[str, list[float]] = defaultdict(list)

    def see(self, story: Story, frames: np.ndarray) -> None:
        """A whole video, [F, H, W, 3] uint8."""
        from pocket.asked import outcomes

        prompts = [(scene.block, scene.text) for scene in story.prompts]
        for name, values in outcomes(frames, prompts).items():
            self._outcomes[name] += values

    def scores(self) -> dict[str, Score]:
        return {name: Score(mean=float(np.mean(values)), of=len(values)) for name, values in self._outcomes.items()}
