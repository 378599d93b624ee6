"""Restarts come with a growing pause and end when they do not help."""

from configs.load import load_config
from ipc.messages import Heartbeat, Ready
from orchestrator.restarts import LONGEST_PAUSE_S, MOST_FAILURES, WITHIN_S, RestartBudget
from orchestrator.telemetry import Telemetry

S = 1_000_000_000


def test_pauses_grow_and_then_it_ends() -> None:
    budget = RestartBudget()
    pauses = [budget.ask("vae", now_ns=number * S) for number in range(MOST_FAILURES)]
    assert pauses == [S // 5, 2 * S // 5, 4 * S // 5, 8 * S // 5, None]


def test_old_deaths_are_forgotten() -> None:
    budget = RestartBudget()
    for number in range(50):
        pause = budget.ask("vae", now_ns=int(number * WITHIN_S * S / 3))
        assert pause is not None
        assert pause <= LONGEST_PAUSE_S * S


def test_workers_have_budgets_of_their_own() -> None:
    budget = RestartBudget()
    for _ in range(MOST_FAILURES - 1):
        budget.ask("vae", 0)
    assert budget.ask("denoiser", 0) == S // 5


def test_a_death_that_another_worker_caused_does_not_count() -> None:
    budget = RestartBudget()
    for _ in range(3 * MOST_FAILURES):
        assert budget.ask("vae", 0, counts=False) == S // 5
    assert budget.due(S) == ["vae"]
    assert budget.ask("vae", 0) == S // 5


def test_a_restart_is_due_once_after_its_pause() -> None:
    budget = RestartBudget()
    pause = budget.ask("vae", 1000)
    assert pause is not None
    assert budget.due(1000 + pause - 1) == []
    assert budget.due(1000 + pause) == ["vae"]
    assert budget.due(1000 + pause) == []


def test_a_stage_that_is_started_again_is_not_called_idle_before_it_is_ready() -> None:
    """Its process beats while it loads: who waits for it by its state would go on minutes too soon."""
    telemetry = Telemetry(load_config("pocket"), 0)
    stage = telemetry.stages["denoiser"]
    beat = Heartbeat(stage="denoiser", progress=0, busy=False, memory_bytes=1, device_memory_bytes=0)
    stage.state = "restarting"
    telemetry.note(beat)
    assert stage.state == "restarting"
    telemetry.note(Ready(stage="denoiser", device="cpu", block_ms=None))
    telemetry.note(beat)
    assert stage.state == "idle"
