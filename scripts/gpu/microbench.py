"""Microbenchmarks of LongLive-1.3B's geometry on one GPU, with random weights and the project's own kernels.

    python scripts/gpu/microbench.py [SECTION ...] --json micro.json --markdown docs/gpu/microbench.md
    python scripts/gpu/microbench.py --device cpu --tiny        # that it runs, on a machine without a GPU

It runs from a checkout where nothing is installed but torch, triton, pydantic, PyYAML, safetensors and numpy.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

SECTIONS = {
    "env": 5.0,
    "ceilings": 10.0,
    "attention": 35.0,
    "gemm": 25.0,
    "elementwise": 25.0,
    "noise": 15.0,
    "block": 140.0,
    "vae": 40.0,
}
"""What is measured, in order, and the seconds after which nothing more of it is begun."""
FULL = ("model.path=null", "model.random_weights=true")
TINY = (
    "model.transformer={dim: 48, ffn_dim: 80, freq_dim: 16, text_dim: 16, text_len: 40, num_heads: 2, num_layers: 2}",
    "model.text_encoder={vocab_size: 1000, dim: 16, dim_attn: 16, dim_ffn: 16, num_heads: 2, num_layers: 1}",
    "model.vae.base_dim=8",
    "video.height=16",
    "video.width=32",
)
ON_CPU = ("model.dtype=float32", "model.vae_dtype=float32")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit code is 1 where a section failed."""
    given = _parser().parse_args(arguments)
    if given.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read where Triton's kernels are defined

    import torch

    from configs.load import load_config
    from gpu.micro.bench import Bench
    from gpu.micro.machine import environment
    from gpu.micro.rows import write_json, write_markdown

    known = {"cpu", "cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))}
    if given.device not in known or (given.device != "cpu" and not torch.cuda.is_available()):
        wanted = "a CUDA device that is there; pass --device cpu --tiny to try it"
        print(f"--device: found {given.device}, expected {wanted}", file=sys.stderr)  # noqa: T201
        return 2
    changes = [*FULL, f"device={given.device}", *(TINY if given.tiny else ())]
    bench = Bench(load_config("longlive-1.3b", [*changes, *(ON_CPU if given.device == "cpu" else ())]), _say)
    if bench.on_gpu:
        torch.cuda.set_device(bench.device)
    else:
        torch.set_num_threads(1)  # what is tiny waits for its threads
    found = environment(bench.device, given.commit)
    if given.tiny:
        found["geometry"] = "tiny: no figure means anything"
    run = _runners(found)
    for name in [section for section in SECTIONS if section in (given.sections or SECTIONS)]:
        try:
            with bench.section(name, SECTIONS[name]):
                run[name](bench)
        finally:  # after each, so that a run that is cut off leaves what it found
            if given.json:
                write_json(given.json, found, bench.rows)
            if given.markdown:
                write_markdown(given.markdown, found, bench.rows)
    return int(any(row.name == "section" for row in bench.rows))


def _runners(found: dict[str, str]) -> dict[str, Callable[..., None]]:
    from gpu.micro import attention, decoder, denoiser, elementwise, machine, products

    return {
        "env": lambda bench: machine.env(bench, found),
        "ceilings": machine.ceilings,
        "attention": attention.run,
        "gemm": products.run,
        "elementwise": elementwise.run,
        "noise": denoiser.noise,
        "block": denoiser.block,
        "vae": decoder.run,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    help_ = f"of {', '.join(SECTIONS)}; all if none is named"
    parser.add_argument("sections", nargs="*", type=_section, metavar="SECTION", help=help_)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:NUMBER or cpu")
    parser.add_argument("--tiny", action="store_true", help="a tiny geometry, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where rows and environment go")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="where the page goes")
    parser.add_argument("--commit", help="what the page says where this is no git checkout")
    return parser


def _section(name: str) -> str:
    if name not in SECTIONS:
        raise argparse.ArgumentTypeError(f"found {name}, expected one of {', '.join(SECTIONS)}")
    return name


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
