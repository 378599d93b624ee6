"""Which prompt is in force from which block: the latest that is due, and never a surprise."""

from workers.prompt_queue import Apply, Keep, PromptQueue, Wait


def started() -> PromptQueue:
    """A queue whose version 0 is in force from block 0."""
    queue = PromptQueue()
    queue.arrive(0, 0, "zero")
    queue.applied(0, 0)
    return queue


def test_the_first_block_waits_for_a_prompt() -> None:
    queue = PromptQueue()
    assert queue.decide(0) == Wait(0)
    queue.expect(0, 0)
    assert queue.decide(0) == Wait(0)
    queue.arrive(0, 0, "zero")
    assert queue.decide(0) == Apply(0, "zero")
    queue.applied(0, 0)
    assert queue.decide(0) == Keep()
    assert queue.version == 0


def test_an_immediate_prompt_never_holds_a_block_up() -> None:
    queue = started()
    assert queue.decide(5) == Keep()
    queue.arrive(1, None, "one")
    assert queue.decide(5) == Apply(1, "one")


def test_the_later_of_two_supersedes() -> None:
    queue = started()
    queue.arrive(1, None, "one")
    queue.arrive(2, None, "two")
    assert queue.decide(3) == Apply(2, "two")
    queue.applied(2, 3)
    assert queue.decide(4) == Keep()


def test_a_superseded_prompt_that_arrives_late_is_forgotten() -> None:
    queue = started()
    queue.arrive(2, None, "two")
    queue.applied(2, 3)
    queue.arrive(1, None, "one")
    assert queue.decide(4) == Keep()


def test_a_scheduled_prompt_is_waited_for_at_its_block() -> None:
    queue = started()
    queue.expect(1, 6)
    assert queue.decide(5) == Keep()
    assert queue.decide(6) == Wait(1)
    queue.arrive(1, 6, "one")
    assert queue.decide(5) == Keep()
    assert queue.decide(6) == Apply(1, "one")


def test_a_scheduled_prompt_survives_a_later_immediate_one() -> None:
    """Version 1 is for block 6; version 2 came for now: both take effect, each at its time."""
    queue = started()
    queue.expect(1, 6)
    queue.arrive(2, None, "two")
    assert queue.decide(3) == Apply(2, "two")
    queue.applied(2, 3)
    queue.arrive(1, 6, "one")
    assert queue.decide(4) == Keep()
    assert queue.decide(6) == Apply(1, "one")


def test_a_scheduled_prompt_whose_block_is_past_gives_way() -> None:
    queue = started()
    queue.arrive(2, None, "two")
    queue.applied(2, 8)
    queue.expect(1, 6)
    queue.arrive(1, 6, "one")
    assert queue.decide(9) == Keep()


def test_a_dropped_prompt_is_not_waited_for() -> None:
    queue = started()
    queue.expect(1, 3)
    queue.drop(1)
    assert queue.decide(3) == Keep()


def test_arrival_and_expectation_may_come_in_any_order() -> None:
    queue = started()
    queue.arrive(1, 4, "one")
    queue.expect(1, 4)
    assert queue.decide(4) == Apply(1, "one")
    queue.applied(1, 4)
    queue.expect(1, 4)
    assert queue.decide(5) == Keep()


def test_a_repeated_arrival_has_no_second_effect() -> None:
    """After a text encoder's restart its prompts are sent again."""
    queue = started()
    queue.arrive(1, None, "one")
    queue.applied(1, 3)
    queue.arrive(1, None, "one")
    assert queue.decide(4) == Keep()


def test_memory_of_what_was_applied_stays_small() -> None:
    queue = PromptQueue()
    for version in range(1000):
        queue.arrive(version, None, "x")
        queue.applied(version, version)
    assert len(queue._applied) == 1
