"""Every command gets exactly one final answer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipc.errors import Refused
from ipc.messages import Accepted, Applied, Cancelled, Rejected, Superseded
from orchestrator.session import MAX_CHARACTERS, MAX_PENDING, CommandBook, PromptBook, check_text


def book_with(*ats: int | None) -> PromptBook:
    book = PromptBook()
    for number, at in enumerate(ats):
        book.accept(f"prompt {number}", at, now_ns=number, command=f"c{number}")
    return book


def test_applied_prompts_supersede_what_came_before() -> None:
    book = book_with(None, None, None)
    assert book.applied(1, 4, 45) == [
        ("c0", Superseded(version=0, by=1)),
        ("c1", Applied(version=1, block=4, frame=45)),
    ]
    assert [prompt.version for prompt in book.waiting] == [2]
    assert book.in_force is not None
    assert book.in_force.version == 1


def test_scheduled_prompts_keep_their_place() -> None:
    """A prompt for a later block is not superseded by one for now."""
    book = book_with(9, None)
    assert book.applied(1, 4, 45) == [("c1", Applied(version=1, block=4, frame=45))]
    assert book.applied(0, 9, 105) == [("c0", Applied(version=0, block=9, frame=105))]


def test_a_scheduled_prompt_at_or_before_the_block_is_superseded() -> None:
    assert [a for a, _ in book_with(4, None).applied(1, 4, 45)] == ["c0", "c1"]


def test_refused_and_ended_prompts_are_answered() -> None:
    book = book_with(None, None)
    assert book.refused(0, "too_long", "text") == [("c0", Rejected(code="too_long", text="text"))]
    assert book.end("over") == [("c1", Cancelled(reason="over"))]
    assert book.end("over") == []


def test_prompts_of_the_plan_have_nobody_to_answer() -> None:
    book = PromptBook()
    book.accept("x", 0, now_ns=0)
    assert book.applied(0, 0, 0) == []
    assert book.in_force is not None


def test_a_version_is_played_once() -> None:
    book = book_with(None)
    book.applied(0, 0, 0)
    assert book.played(0) is not None
    assert book.played(0) is None
    assert book.played(7) is None


def test_too_many_waiting_prompts_are_refused() -> None:
    book = PromptBook()
    for _ in range(MAX_PENDING):
        book.accept("x", 10**6, now_ns=0)
    with pytest.raises(Refused) as caught:
        book.accept("x", None, now_ns=0)
    assert caught.value.code == "busy"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        ("a\0b", "bad_text"),
        ("\ud800", "bad_text"),
        ("x" * (MAX_CHARACTERS + 1), "too_long"),
    ],
)
def test_unusable_texts_are_refused(text: str, code: str) -> None:
    with pytest.raises(Refused) as caught:
        PromptBook().accept(text, None, now_ns=0)
    assert caught.value.code == code


@pytest.mark.parametrize(
    "text", ["a fox", "雪の中の狐", "🦊", "e\u0301" * 100, "\u202eright to left", '{"level": "x"}']
)
def test_other_texts_are_taken(text: str) -> None:
    check_text(text)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("accept"), st.none() | st.integers(0, 30)),
        st.tuples(st.just("apply"), st.integers(0, 20)),
        st.tuples(st.just("refuse"), st.integers(0, 20)),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(steps=STEPS)
def test_exactly_one_final_answer(steps: list[tuple[str, int | None]]) -> None:
    """Whatever is applied, refused or cut off, in any order."""
    book, block, made, answered = PromptBook(), 0, 0, []
    for kind, number in steps:
        if kind == "accept":
            book.accept("x", number, now_ns=0, command=str(made))
            made += 1
        elif kind == "apply" and number is not None:
            block += 1
            answered += book.applied(number, block, block * 12)
        elif number is not None:
            answered += book.refused(number, "bad", "x")
    answered += book.end("over")
    assert sorted(command for command, _ in answered) == sorted(str(command) for command in range(made))


def test_a_repeated_id_is_answered_again_and_belongs_to_the_last_asker() -> None:
    commands = CommandBook()
    assert commands.open("a", b"peer") is None
    assert commands.answer("a", Accepted(version=0)) == b"peer"
    assert commands.open("a", b"other") == [Accepted(version=0)]
    assert commands.answer("a", Applied(version=0, block=1, frame=9)) == b"other"
    assert len(commands.open("a", b"other") or []) == 2
    assert commands.answer("unknown", Accepted()) is None
