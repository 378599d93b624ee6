"""Builds the stages of a worker: which ring ends, channels and devices each gets.

The one place that knows all stages; torch and the models are imported only where a stage needs them, so that the
output process stays without.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import zmq

from configs.rings import RingName, history_shape, ring_specs
from configs.schema import RuntimeConfig, StageName
from ipc.channel import Outbox, endpoint
from ipc.errors import ConfigError
from ipc.messages import EmbedsReady, FramesReady, LatentsReady
from ipc.shared_memory import SharedMemory
from ipc.slot_ring import Consumer, Producer, SlotRing, Taken, header_nbytes
from workers.ports import LocalRings, RingReader, RingWriter, Send
from workers.spec import WorkerSpec
from workers.stage import Stage

if TYPE_CHECKING:
    import torch

    from ipc.tensor_ring import Completion, Slots, TensorSpec
    from workers.latents_source import LatentsSource

FIRST = -1
"""CUDA's priority of a stream that goes before others. A new prompt's many small kernels, each of which would wait for
a large one of a block's, are the text encoder's."""


class Assembly:
    """Builds stages and keeps what must be closed after them.

    Args:
        context: of this process.
    """

    def __init__(self, config: RuntimeConfig, spec: WorkerSpec, context: "zmq.Context[zmq.Socket[bytes]]") -> None:
        self._config = config
        self._spec = spec
        self._context = context
        self._rings = ring_specs(config)
        self._headers: dict[RingName, SlotRing] = {}
        self._memories: dict[RingName, SharedMemory] = {}
        self._local = LocalRings()
        self._stack = ExitStack()
        self._attach()

    def _attach(self) -> None:
        for name, ring in self._rings.items():
            passed = self._spec.rings[name]
            header = SharedMemory.attach(passed.header.fd, header_nbytes(ring.slots))
            self._stack.callback(header.close)
            self._headers[name] = SlotRing(header, ring.slots)
            if passed.memory is not None:
                self._memories[name] = SharedMemory.attach(passed.memory.fd, ring.slots * ring.slot_nbytes)
                self._stack.callback(self._memories[name].close)

    def close(self) -> None:
        """Closes every channel and mapping."""
        self._stack.close()

    def build(self, name: StageName, on_progress: Callable[[], None]) -> Stage:
        """The stage of a name; called in the thread that will run it."""
        match name:
            case "text_encoder":
                return self._text_encoder()
            case "denoiser":
                return self._denoiser(on_progress)
            case "vae_decoder":
                return self._vae_decoder()
            case "output":
                return self._output()

    @contextmanager
    def thread_settings(self, name: StageName) -> Iterator[None]:
        """A model stage's number of CPU threads, and on a GPU its device and a stream of its own."""
        if name == "output":
            yield
            return
        import torch

        settings = self._config.stage(name)
        torch.set_num_threads(settings.threads)
        device = torch.device(settings.device or "cpu")
        if device.type != "cuda":
            yield
            return
        _check_gpu(name, device)
        torch.cuda.set_device(device)
        with torch.cuda.stream(torch.cuda.Stream(device, priority=FIRST if name == "text_encoder" else 0)):
            yield

    def _send(self, to: str) -> Send:
        outbox = Outbox(self._context, endpoint(self._spec.directory, to))
        self._stack.callback(outbox.close, 1.0)
        return outbox.send

    def _host_slots(self, name: RingName, pin: bool = False) -> "Slots":
        from ipc.tensor_ring import HostSlots

        slots = HostSlots(self._memories[name], self._rings[name].slots, self._tensor_spec(name), pin=pin)
        self._stack.callback(slots.close)
        return slots

    def _completion(self, name: StageName) -> Callable[[Callable[[], None]], object]:
        from ipc.tensor_ring import completion_for

        completion: Completion = completion_for(self._device(name))
        self._stack.callback(completion.close)
        return completion.after

    def _writer(self, ring: RingName, by: StageName) -> RingWriter:
        consumer = self._send(self._rings[ring].consumer)
        return RingWriter(Producer(self._headers[ring]), self._completion(by), consumer)

    def _reader(self, ring: RingName, kind: Any) -> RingReader[Any]:
        return RingReader(ring, Consumer(self._headers[ring]), kind, self._send(self._rings[ring].producer))

    def _text_encoder(self) -> Stage:
        from workers.text_encoder import TextEncoderStage

        return TextEncoderStage(
            self._config,
            embeds=self._writer("embeds", "text_encoder"),
            slots=self._host_slots("embeds"),
            to_daemon=self._send("daemon"),
            to_denoiser=self._send("denoiser"),
            inputs=self._spec.limits.inputs,
        )

    def _denoiser(self, on_progress: Callable[[], None]) -> Stage:
        from workers.denoiser import DenoiserStage

        limits = self._spec.limits
        to_daemon = self._send("daemon")
        return DenoiserStage(
            self._config,
            embeds=self._reader("embeds", EmbedsReady),
            embeds_slots=self._host_slots("embeds"),
            latents=self._writer("latents", "denoiser"),
            latents_slots=self._latents_to_fill(to_daemon),
            history=self._history(),
            to_daemon=to_daemon,
            blocks=limits.blocks,
            inputs=limits.inputs,
            dump=limits.dump_latents,
            on_pass=on_progress,
        )

    def _vae_decoder(self) -> Stage:
        from workers.vae_decoder import VaeDecoderStage

        on_gpu = (self._config.stage("vae_decoder").device or "cpu").startswith("cuda")
        return VaeDecoderStage(
            self._config,
            latents=self._reader("latents", LatentsReady),
            latents_source=self._latents_to_read(),
            frames=self._writer("frames", "vae_decoder"),
            frames_slots=self._host_slots("frames", pin=on_gpu),
            to_daemon=self._send("daemon"),
        )

    def _output(self) -> Stage:
        from workers.output import OutputStage

        frames = FrameSlots(self._reader("frames", FramesReady), self._memories["frames"], self._config)
        return OutputStage(
            self._config,
            frames,
            to_daemon=self._send("daemon"),
            to_denoiser=self._send("denoiser"),
            frame_limit=self._spec.limits.frames,
        )

    def _history(self) -> "torch.Tensor":
        import torch

        from ipc.tensor_ring import HostSlots, TensorSpec

        spec = TensorSpec(history_shape(self._config), torch.float32)
        memory = SharedMemory.attach(self._spec.history.fd, spec.nbytes)
        self._stack.callback(memory.close)
        slots = HostSlots(memory, 1, spec)
        self._stack.callback(slots.close)
        return slots.tensor(0)

    def _latents_to_fill(self, to_daemon: Send) -> "Slots":
        """The denoiser's own slots: shared host memory, or GPU memory that it exports or shares with its siblings."""
        ring = self._rings["latents"]
        if not ring.on_device:
            return self._host_slots("latents", pin=self._device("denoiser").type == "cuda")
        from ipc.cuda_ipc import CudaRingExporter, RealDriver
        from ipc.tensor_ring import DeviceSlots

        spec, device = self._tensor_spec("latents"), self._device("denoiser")
        if self._decodes_here():
            slots = DeviceSlots(ring.slots, spec, device)
            self._local.put("latents", slots)
            return slots
        exporter = CudaRingExporter(
            RealDriver(),
            device,
            ring="latents",
            epoch=self._headers["latents"].epoch,
            slots=ring.slots,
            spec=spec,
            pid=os.getpid(),
        )
        # Not freed: what that does under the decoder's mapping is undefined. It goes with this process and the mapping.
        to_daemon(exporter.message())
        return exporter.slots

    def _latents_to_read(self) -> "LatentsSource":
        from workers.latents_source import HostSource, ImportedSource, LocalSource

        if not self._rings["latents"].on_device:
            return HostSource(self._host_slots("latents"))
        if "denoiser" in self._spec.stages:
            return LocalSource(self._local, "latents")
        from ipc.cuda_ipc import RealDriver

        source = ImportedSource(
            RealDriver(), self._headers["latents"], "latents", self._tensor_spec("latents"), self._device("vae_decoder")
        )
        self._stack.callback(source.close)
        return source

    def _decodes_here(self) -> bool:
        return "vae_decoder" in self._spec.stages

    def _tensor_spec(self, name: RingName) -> "TensorSpec":
        import torch

        from ipc.tensor_ring import TensorSpec

        return TensorSpec(self._rings[name].shape, getattr(torch, self._rings[name].dtype))

    def _device(self, name: StageName) -> "torch.device":
        import torch

        return torch.device(self._config.stage(name).device or "cpu")


def _check_gpu(name: StageName, device: "torch.device") -> None:
    """Raises ConfigError where this process does not see the GPU it shall use."""
    import torch

    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= seen:
        found = f"{seen} CUDA GPUs" if seen else "no CUDA GPU"
        raise ConfigError(f"device of {name}: found {found}, expected one for {device}; set device=cpu or another")


class FrameSlots:
    """The output's view of the frames ring: bytes, no tensors."""

    def __init__(self, reader: RingReader[FramesReady], memory: SharedMemory, config: RuntimeConfig) -> None:
        self._reader = reader
        self._memory = memory
        self._slot_nbytes = ring_specs(config)["frames"].slot_nbytes

    def take(self) -> tuple[Taken, FramesReady] | None:
        """The oldest slot that is ready, and its message."""
        return self._reader.take()

    def view(self, taken: Taken) -> memoryview:
        """All bytes of a slot, [4, H, W, 3] uint8; as many frames as its message says are filled."""
        return self._memory.buffer[taken.slot * self._slot_nbytes : (taken.slot + 1) * self._slot_nbytes]

    def release(self, taken: Taken) -> None:
        """Gives a slot back."""
        self._reader.release(taken)
