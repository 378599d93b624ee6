"""The VAE's fast path: the frames of `vae.py`, as two sequences of operations over memory that stays."""

from pathlib import Path

import pytest
import torch
from golden_cases import case_id, cases, load, relative_error
from test_vae import config_of, decode_all, small_config, with_golden_weights, with_random_weights
from torch.fx.experimental.proxy_tensor import make_fx

from configs.schema import VaeConfig, VideoConfig
from workers.models.audit import Operations
from workers.models.frame_stream import FrameStream
from workers.models.graphs import Replay
from workers.models.static_conv import Work
from workers.models.static_vae import StaticVae
from workers.models.vae import VaeDecoder, to_rgb8

CPU = torch.device("cpu")
VIDEO = VideoConfig(height=32, width=48)
VARIANTS = [
    {},
    {"base_dim": 6},
    {"dim_mult": (1, 1, 2, 2)},
    {"num_res_blocks": 1},
    {"temporal_downsample": (True, True, False)},
    {"temporal_downsample": (True, False, True)},
]


def drawn(count: int, seed: int = 0) -> torch.Tensor:
    """Latents of a video of 32x48, [1, count, 16, 4, 6]."""
    return torch.randn(1, count, 16, 4, 6, generator=torch.Generator().manual_seed(seed))


def plain_decoder(config: VaeConfig, dtype: torch.dtype = torch.float32) -> VaeDecoder:
    return with_random_weights(VaeDecoder(config, "plain")).to(dtype)


@torch.inference_mode()
def frames_of(vae: StaticVae, latents: torch.Tensor) -> torch.Tensor:
    """[1, count, 16, h, w] -> [1, F, 3, 8h, 8w]."""
    return torch.cat([vae.frames(latent, first=i == 0).clone() for i, latent in enumerate(latents[0])])[None]


@pytest.mark.parametrize("path", cases("vae"), ids=lambda path: f"{case_id(path)}-static")
def test_equals_the_reference(path: Path) -> None:
    case = load(path)
    latents = case.tensors["latents"]
    vae = StaticVae(with_golden_weights(VaeDecoder(config_of(case), "plain"), case), *latents.shape[-2:])
    for video, pixels in zip(latents.split(1), case.tensors["pixels_unclamped"].split(1), strict=True):
        assert relative_error(frames_of(vae, video), pixels) <= 1e-4


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_any_shape_equals_plain(changes: dict) -> None:
    config = small_config(**changes)
    decoder = plain_decoder(config)
    assert relative_error(frames_of(StaticVae(decoder, 4, 6), drawn(4)), decode_all(decoder, drawn(4))) <= 1e-4


def test_the_way_on_a_gpu_equals_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations that a GPU without Triton would get, here on the CPU."""
    monkeypatch.setattr(Work, "on_cpu", False)
    decoder = plain_decoder(small_config())
    vae = StaticVae(decoder, 4, 6)
    places = [tensor.data_ptr() for tensor in vae.buffers()]
    assert len(set(places)) == len(places) > 20
    for seed in range(2):
        assert relative_error(frames_of(vae, drawn(4, seed)), decode_all(decoder, drawn(4, seed))) <= 1e-4
    assert [tensor.data_ptr() for tensor in vae.buffers()] == places


def test_bfloat16_is_as_near_as_plain() -> None:
    """The short filters round more, everything between the convolutions rounds less."""
    exact = decode_all(plain_decoder(small_config(base_dim=8)), drawn(4))
    decoder = plain_decoder(small_config(base_dim=8), torch.bfloat16)
    off = relative_error(frames_of(StaticVae(decoder, 4, 6), drawn(4)).float(), exact)
    assert off <= 1.2 * relative_error(decode_all(decoder, drawn(4)).float(), exact)


def test_a_first_frame_forgets_what_was() -> None:
    vae = StaticVae(plain_decoder(small_config()), 4, 6)
    alone = frames_of(vae, drawn(4))
    frames_of(vae, drawn(5, seed=1))
    assert torch.equal(frames_of(vae, drawn(4)), alone)


def test_addresses_never_change() -> None:
    vae = StaticVae(plain_decoder(small_config()), 4, 6)
    before = [tensor.data_ptr() for tensor in vae.buffers()]
    assert len(set(before)) == len(before) > 20
    for seed in range(2):
        frames_of(vae, drawn(4, seed))
    assert [tensor.data_ptr() for tensor in vae.buffers()] == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_later_frame_does_the_same_and_reads_nothing(dtype: torch.dtype) -> None:
    vae = StaticVae(plain_decoder(small_config(), dtype), 4, 6)
    done = []
    for index, latent in enumerate(drawn(5)[0]):
        with torch.no_grad(), Operations(torch.device("cpu")) as mode:
            vae.frames(latent, first=index == 0)
        done.append(mode.names)
    assert done[1] == done[2] == done[3] == done[4]


class Traces:
    """Records by tracing: a replay does the same operations to the same memory, and runs nothing of ours."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, function: Replay) -> Replay:
        self.count += 1
        with torch.inference_mode(False), torch.no_grad():
            return make_fx(function)()


@torch.inference_mode()
def bytes_of(stream: FrameStream, latents: torch.Tensor) -> torch.Tensor:
    return torch.cat([stream.decode(latent).clone() for latent in latents[0]])


def test_replays_make_a_stream_and_the_next() -> None:
    """Over several blocks, and after a new beginning in the middle of a block."""
    decoder, traces = plain_decoder(small_config()), Traces()
    stream = FrameStream(StaticVae(decoder, 4, 6), VIDEO, CPU, traces)
    stream.record_all()
    assert traces.count == 2
    for count, seed in ((7, 0), (6, 1)):
        stream.begin()
        made, expected = bytes_of(stream, drawn(count, seed)), to_rgb8(decode_all(decoder, drawn(count, seed)))[0]
        assert made.shape == (4 * count - 3, VIDEO.height, VIDEO.width, 3)
        assert (made.int() - expected.int()).abs().max() <= 1
        assert (made != expected).float().mean() < 1e-3
    assert traces.count == 2


def test_replays_read_the_static_buffer() -> None:
    stream = FrameStream(StaticVae(plain_decoder(small_config()), 4, 6), VIDEO, CPU, Traces())
    stream.record_all()
    before = stream.latent.data_ptr()
    first, other = (bytes_of(stream, drawn(1, seed)) for seed in (0, 1) if stream.begin() is None)
    assert stream.latent.data_ptr() == before
    assert not torch.equal(first, other)


def test_frames_lie_where_they_lay() -> None:
    """What a replay writes must be found by who copies it out."""
    stream = FrameStream(StaticVae(plain_decoder(small_config()), 4, 6), VIDEO, CPU)
    places = [stream.decode(latent).data_ptr() for latent in drawn(5)[0]]
    assert places[1] == places[2] == places[3] == places[4] != places[0]


@pytest.mark.parametrize("seen", [0, 1, 3])
def test_a_stream_can_go_back(seen: int) -> None:
    """What was decoded since leaves no trace."""
    vae = StaticVae(plain_decoder(small_config()), 4, 6)
    stream = FrameStream(vae, VIDEO, CPU)
    latents = drawn(6)[0]
    for latent in latents[:seen]:
        stream.decode(latent)
    past = stream.past()
    right = [stream.decode(latent).clone() for latent in latents[seen : seen + 2]]
    stream.go_back(past)
    for latent in latents[4:]:
        stream.decode(latent)
    stream.go_back(past)
    again = [stream.decode(latent).clone() for latent in latents[seen : seen + 2]]
    assert all(torch.equal(one, other) for one, other in zip(right, again, strict=True))
