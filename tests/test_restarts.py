"""Restarts come with a growing pause and end when they do not help."""

from orchestrator.restarts import LONGEST_PAUSE_S, MOST_FAILURES, WITHIN_S, RestartBudget

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


def test_a_restart_is_due_once_after_its_pause() -> None:
    budget = RestartBudget()
    pause = budget.ask("vae", 1000)
    assert pause is not None
    assert budget.due(1000 + pause - 1) == []
    assert budget.due(1000 + pause) == ["vae"]
    assert budget.due(1000 + pause) == []
