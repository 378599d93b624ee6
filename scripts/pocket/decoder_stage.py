"""The second stage: the VAE's decoder alone learns fine corners, and to change from frame to frame as the picture does.

Each latent frame becomes four frames in four ways, so that still pictures flicker in a rhythm, most where one latent
frame follows another. A small star is three latents wide; what stands in few pixels counts more here. Latents stay as
they are.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.schema import TEMPORAL_STRIDE
from pocket.autoencoder import Autoencoder, error_of
from pocket.captions import Scene, draw_scene
from pocket.clips import Story, as_pixels, draw_frames, draw_story
from pocket.masters import Masters
from pocket.training import Training, steps
from pocket.world import HEIGHT, MARGIN, WIDTH, Start

FRAMES = 17
SETTLED = 8
"""Changes at a clip's beginning that do not count: the decoder has no past there."""
CHANGE_WEIGHT = 60.0
OBJECT_WEIGHT = 12.0
"""As in `pocket.autoencoder`, where it is 3."""
SMALL_SHARE = 0.5
"""Clips whose objects are made small, those apart whose size is their motion."""
STEERING = 0.03
"""How fast the weight of changes at edges of latent frames follows their surplus over MEMORY of the past steps."""
MEMORY = 0.97


def train_decoder(run: Training, begin: Path | None = None) -> None:
    """The decoder on latents of the trained encoder, half of them of still scenes; writes decoder.safetensors."""
    phase = run.recipe.decoder
    torch.manual_seed(run.seed + 20)
    model = Autoencoder(run.config.model.vae)
    model.load_file_tensors(load_file(begin or run.file("vae.safetensors")))
    model.to(run.device, torch.bfloat16)
    model.encoder.requires_grad_(False)
    masters = Masters({"decoder": model.decoder}, phase.rate, warm_up=20, decay=0.995)
    clips, latents = _clips(run, model, run.recipe.decoder_clips)
    edge_weight = 1.0
    seen = torch.zeros(2)
    for step, progress in steps(run, "decoder", phase, masters):
        chosen = torch.randint(len(clips) // 2, (phase.batch,), device=clips.device) * 2
        chosen[::2] += 1
        pixels = as_pixels(clips[chosen])
        noise = 0.05 * torch.randn_like(latents[chosen])
        noise[::2] = 0  # it would be one more change where latent frames meet
        made = model.decode(latents[chosen] + noise).float()
        error, edges = error_of(made, pixels, OBJECT_WEIGHT)
        at_edges, elsewhere = changes(made[::2], pixels[::2])
        loss = error + 0.5 * edges + CHANGE_WEIGHT * (edge_weight * at_edges + 3 * elsewhere)
        loss.backward()
        masters.step(progress)
        seen = MEMORY * seen + torch.stack([at_edges, elsewhere]).detach().cpu()
        ratio = float(seen[0] / seen[1])
        edge_weight = min(max(edge_weight * (1 + STEERING * (ratio - 1)), 0.1), 30.0)
        if step % run.recipe.look == 0:
            numbers = {"error": float(error.detach()), "change": float(elsewhere.detach())}
            run.log("decoder", step=step, **numbers, ratio=ratio, weight=edge_weight)
    masters.show_average()
    tensors = {name: tensor.contiguous().cpu() for name, tensor in model.file_tensors().items()}
    save_file(tensors, run.file("decoder.safetensors"))


def changes(made: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared error of the change from frame to frame, where a latent frame begins and elsewhere.

    Args:
        made, pixels: [B, 1 + 4k, 3, H, W].
    """
    off = (made - pixels).diff(dim=1).square().mean(dim=(0, 2, 3, 4))[SETTLED:]
    edge = torch.arange(SETTLED, SETTLED + len(off), device=off.device) % TEMPORAL_STRIDE == 0
    return off[edge].mean(), off[~edge].mean()


@torch.no_grad()
def _clips(run: Training, model: Autoencoder, count: int) -> tuple[Tensor, Tensor]:
    """Clips [N, F, H, W, 3] uint8 and their latents [N, f, 16, h, w]; every second one of a scene that stands still."""
    rng = np.random.default_rng((run.seed, 20))
    frames, latents = [], []
    for number in range(count):
        story = _still(rng) if number % 2 else draw_story(rng, 3, 0.5)
        if rng.random() < SMALL_SHARE:
            story = replace(story, first=_small(story.first), second=_small(story.second))
        frames.append(draw_frames(story, FRAMES, run.device))
        pixels = as_pixels(frames[-1])[None].to(torch.bfloat16)
        latents.append(model.moments(pixels)[0][0].to(torch.bfloat16))
    return torch.stack(frames), torch.stack(latents)


def _small(scene: Scene) -> Scene:
    return scene if scene.motion in ("grow", "shrink") else replace(scene, size="small")


def _still(rng: np.random.Generator) -> Story:
    while True:
        scene = draw_scene(rng, held_out=False)
        if scene.motion == "still":
            start = Start(rng.uniform(MARGIN, WIDTH - MARGIN), rng.uniform(MARGIN, HEIGHT - MARGIN))
            return Story(start, scene, "", scene, "", 0)
