"""Which way of computing a configuration asks for, and a device allows."""

from collections.abc import Callable

from configs.schema import RuntimeConfig
from workers.models.graphs import CudaGraphs, run_directly
from workers.models.passes import Passes, PlainPasses
from workers.models.static_passes import StaticPasses
from workers.models.transformer import CausalWanTransformer


def choose_passes(
    config: RuntimeConfig, model: CausalWanTransformer, on_pass: Callable[[], None] = lambda: None
) -> Passes:
    """The denoiser's passes as `execution` says; graphs only where the model lies on a GPU."""
    if config.execution.denoiser == "plain":
        return PlainPasses(model, config.stream, config.video, on_pass)
    graphs = config.execution.graphs and model.device.type == "cuda"
    record = CudaGraphs(model.device) if graphs else run_directly
    return StaticPasses(model, config.stream, config.video, on_pass, record, config.execution.kv)
