"""Weights in float32 beside a network that computes in bfloat16, their optimizer, and their running average.

Knows no network and no loss.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


class Masters:
    """AdamW over float32 copies of a network's trained weights; the network holds their rounded values.

    Args:
        networks: whose parameters that require gradients are trained.
        rate: learning rate at its highest.
        decay: of the running average, per step.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        rate: float,
        *,
        warm_up: int = 100,
        decay: float = 0.998,
        weight_decay: float = 0.01,
        clip: float = 1.0,
    ) -> None:
        named = [(f"{prefix}/{n}", p) for prefix, net in networks.items() for n, p in net.named_parameters()]
        self.names = [name for name, p in named if p.requires_grad]
        self.parameters = [p for _, p in named if p.requires_grad]
        self.masters = [p.detach().float().clone() for p in self.parameters]
        self.average = [p.clone() for p in self.masters]
        self.rate, self.warm_up, self.decay, self.clip = rate, warm_up, decay, clip
        fused = self.masters[0].device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=rate, betas=(0.9, 0.95), weight_decay=weight_decay, fused=fused
        )
        self.steps = 0

    def step(self, progress: float) -> Tensor:
        """Takes the gradients one step on; `progress` in 0 to 1 is how far training is. Returns their norm."""
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            grad = parameter.grad
            master.grad = torch.zeros_like(master) if grad is None else grad.float()
            parameter.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self.masters, self.clip)
        rate = self.rate * min(1.0, (self.steps + 1) / self.warm_up) * (0.02 + 0.98 * _cosine(progress))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.steps += 1
        self._show(self.masters)
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.average, self.masters, 1 - decay)
        return norm

    def show_average(self) -> None:
        """Puts the average into the network until the next step, or `show_masters`."""
        self._show(self.average)

    def show_masters(self) -> None:
        """Puts the trained weights into the network."""
        self._show(self.masters)

    def state(self) -> dict[str, object]:
        """What a later run goes on from."""
        return {
            "names": self.names,
            "masters": self.masters,
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
        }

    def restore(self, state: Mapping[str, object]) -> None:
        """Goes on from a state of the same network."""
        for ours, theirs in ((self.masters, state["masters"]), (self.average, state["average"])):
            _copy(ours, theirs)  # type: ignore[arg-type]
        self.optimizer.load_state_dict(state["optimizer"])  # type: ignore[arg-type]
        self.steps = state["steps"]  # type: ignore[assignment]
        self.show_masters()

    @torch.no_grad()
    def _show(self, values: Iterable[Tensor]) -> None:
        _copy(self.parameters, values)


@torch.no_grad()
def _copy(to: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for ours, theirs in zip(to, values, strict=True):
        ours.copy_(theirs)


def _cosine(progress: float) -> float:
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, progress))
