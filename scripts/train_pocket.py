"""Trains the embedded model from nothing: world, VAE, transformer, few steps, adapter.

    .venv/bin/python scripts/train_pocket.py --out out/pocket

Stages that are done are skipped, one that was interrupted goes on. Nothing is downloaded. Curves and sheets of frames
lie in the folder as PNG; what `ship` writes to its folder `shipped` can be run at once:

    .venv/bin/orchestrator start --config out/pocket/shipped/config.yaml

With `--on` the shipped VAE and transformer stand for the stages up to the teacher's, and few steps are learned further.
"""

import argparse
from pathlib import Path

import torch

from configs.load import load_config
from pocket.charts import save_curves
from pocket.decoder_stage import train_decoder
from pocket.recipe import RECIPES, timed
from pocket.shipping import ship, unship
from pocket.training import Training
from pocket.transformer_stages import train_adapter, train_self_forcing, train_teacher
from pocket.vae_stage import train_vae

STAGES = {
    "vae": (train_vae, "vae.safetensors"),
    "decoder": (train_decoder, "decoder.safetensors"),
    "teacher": (train_teacher, "teacher.safetensors"),
    "self_forcing": (train_self_forcing, "self_forcing.safetensors"),
    "adapter": (train_adapter, "adapter.safetensors"),
    "ship": (lambda run, begin: ship(run, run.file("shipped")), "shipped/config.yaml"),
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--recipe", choices=RECIPES, help="default: gpu on a GPU, else cpu")
    parser.add_argument("--stages", help="some of them, comma-separated; else all, with --on those after the teacher's")
    parser.add_argument("--begin", type=Path, help="weights of an earlier run that the first stage begins with")
    parser.add_argument(
        "--on", action="store_true", help="goes on from the shipped weights: VAE and teacher are theirs"
    )
    parser.add_argument("--minutes", type=float, help="for every stage, in place of the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes that draw stories")
    parser.add_argument("--compile", action="store_true", help="torch.compile the layers")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(given.device)
    torch.backends.cudnn.benchmark = True
    run = Training(
        folder=given.out,
        config=load_config("pocket"),
        recipe=timed(RECIPES[given.recipe or ("gpu" if device.type == "cuda" else "cpu")], given.minutes),
        device=device,
        seed=given.seed,
        workers=given.workers,
        compile=given.compile,
    )
    shipped = ("vae", "decoder", "teacher") if given.on else ()
    stages = given.stages.split(",") if given.stages else [stage for stage in STAGES if stage not in shipped]
    unship(run.config.model, run, [stage for stage in shipped if stage not in stages])
    begin = given.begin
    for stage in stages:
        train, made = STAGES[stage]
        if run.file(made).exists():
            run.say(f"{stage}: done before ({made})")
            continue
        train(run, begin)
        save_curves(run.folder)
        begin = None


if __name__ == "__main__":
    main()
