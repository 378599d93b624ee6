"""Asks a real NVIDIA driver what the rings in GPU memory (ipc/cuda_ipc.py) assume: what was assumed, seen, agrees.

    .venv/bin/python scripts/gpu/probe_cuda_ipc.py [--json FILE] [--only 1,3] [--limit 90]

Every question has processes of its own, which answer in time or are killed; one that fails says why, the others go on.
Sets nothing on the GPU. Exit code 0 when all was asked, whether or not it agrees; 1 without an NVIDIA GPU.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ipc_probe_lab import Answer, Child, Deadline, Lab, Unanswered

MIB = 1 << 20
RING = 512 * MIB
"""Bytes; large, so that it shows among what other processes take and give back."""
SMALL = 4096
"""Bytes that a child looks at, of an allocation that the driver cuts from a larger block."""
STEADY_S, LATEST_S = 0.5, 4.0
"""Memory that has not changed for so long is taken as given back; after so long it is taken as it is."""
ROUNDS = 1000
AHEAD = 3
"""Children that start while a question is asked."""


@dataclass(frozen=True)
class Finding:
    """One line of the report; `agrees` is None where there was nothing to compare."""

    number: int
    question: str
    assumed: str
    seen: str
    agrees: bool | None
    values: Answer


Seen = tuple[str, bool | None, Answer]
"""What was seen, whether it agrees, the figures."""


def refused(answer: Answer) -> str:
    """Its error, or that it was none."""
    return str(answer.get("error", "no error"))


def survives(child: Child) -> bool:
    return child.ask("alive").get("sum") == 1000


def mib(before: int, after: int) -> int:
    """How much memory came back, MiB."""
    return (before - after) // MIB


def is_ring(given_back: int) -> bool:
    """Whether what came back, MiB, is a ring: to a tenth, for other processes take and give too."""
    return abs(given_back * MIB - RING) < RING / 10


def steady(witness: Child) -> int:
    """Bytes in use on the GPU, once they stay."""
    latest = time.monotonic() + LATEST_S
    used, since = int(witness.must("used")["bytes"]), time.monotonic()
    while time.monotonic() < min(latest, since + STEADY_S):
        time.sleep(STEADY_S / 10)
        now = int(witness.must("used")["bytes"])
        if now != used:
            used, since = now, time.monotonic()
    return used


def pair(lab: Lab, nbytes: int = 2 * MIB, **given: Any) -> tuple[Child, Child, Answer]:
    """A producer, a consumer that has its ring of sevens open, and the export."""
    consumer, producer = lab.child(), lab.child()
    export = producer.must("export", nbytes=nbytes, value=7, **given)
    consumer.must("receive", message=export["message"])
    return producer, consumer, export


def opened_twice(lab: Lab) -> Seen:
    producer, consumer = lab.child(), lab.child()
    export = producer.must("export", nbytes=2 * MIB, value=7)
    handle = export["message"]["handle"]
    first, second = consumer.must("open_raw", handle=handle), consumer.ask("open_raw", handle=handle)
    if "error" in second:
        return f"second open refused: {refused(second)}", False, second
    closed = [consumer.ask("close_raw", at=first["at"])]
    read = consumer.ask("look_at", at=second["at"], nbytes=SMALL) if closed == [{}] else closed[0]
    closed += [consumer.ask("close_raw", at=second["at"]) for _ in range(2)]
    same, counted = first["at"] == second["at"], read.get("values") == [7, 7]
    third = refused(closed[2])
    values = {"same": same, "read_after_one_close": read, "closes": closed}
    text = f"{'the same' if same else 'another'} pointer; after one close {read.get('values', refused(read))}"
    return f"{text}; a third close: {third}", same and counted and closed[1] == {} and third != "no error", values


def opened_at_home(lab: Lab) -> Seen:
    producer = lab.child()
    export = producer.must("export", nbytes=2 * MIB, value=7)
    answer = producer.ask("open_raw", handle=export["message"]["handle"])
    lives = survives(producer)
    return f"{refused(answer)}; context {'lives' if lives else 'is lost'}", "error" in answer and lives, answer


def producer_killed(lab: Lab) -> Seen:
    witness = lab.child()
    producer, consumer, _ = pair(lab, RING)
    both = steady(witness)
    producer.kill()
    killed = steady(witness)
    read = consumer.ask("read")
    close, lives = consumer.ask("close"), survives(consumer)
    given_back = mib(killed, steady(witness))
    text = f"read {read.get('values', refused(read))}; close: {refused(close)}; it gave back {given_back} MiB"
    agrees = read.get("values") == [7, 7] and close == {} and lives and is_ring(given_back)
    return text, agrees, {"read": read, "given_back_by_kill_mib": mib(both, killed), "given_back_mib": given_back}


def producer_frees(lab: Lab) -> Seen:
    witness = lab.child()
    producer, consumer, _ = pair(lab, RING)
    both = steady(witness)
    free = producer.ask("free")
    by_free = mib(both, steady(witness))
    anew = producer.ask("refill", nbytes=RING, value=9)
    read, lives = consumer.ask("read"), survives(consumer)
    before = steady(witness)
    close = consumer.ask("close")
    by_close = mib(before, steady(witness))
    text = (
        f"free: {refused(free)}, gave back {by_free} MiB; read {read.get('values', refused(read))} after the producer"
        f" wrote 9 elsewhere; context {'lives' if lives else 'is lost'}; close: {refused(close)}, gave back"
        f" {by_close} MiB"
    )
    return text, None, {"by_free_mib": by_free, "anew": anew, "read": read, "by_close_mib": by_close}


def consumer_killed(lab: Lab) -> Seen:
    witness = lab.child()
    producer, consumer, _ = pair(lab, RING)
    consumer.kill()
    killed = steady(witness)
    free = producer.ask("free")
    given_back = mib(killed, steady(witness))
    return (
        f"free: {refused(free)}, gave back {given_back} MiB",
        free == {} and is_ring(given_back),
        {"given_back_mib": given_back},
    )


def stale_handles(lab: Lab) -> Seen:
    consumer = lab.child()
    values: Answer = {}
    for how in ("freed", "dead"):
        producer = lab.child()
        message = producer.must("export", nbytes=2 * MIB, value=7)["message"]
        if how == "freed":
            producer.must("free")
        else:
            producer.kill()
        values[how] = refused(consumer.ask("receive", message=message))
    lives = survives(consumer)
    text = f"freed: {values['freed']}; dead: {values['dead']}; context {'lives' if lives else 'is lost'}"
    return text, lives and "no error" not in values.values(), values


def peer_access(lab: Lab) -> Seen:
    if len(lab.machine()["gpus"]) < 2:
        return "one GPU", None, {}
    producer, consumer = lab.child(0), lab.child(1)
    export = producer.must("export", nbytes=RING, value=7)
    opened = consumer.ask("receive", message=export["message"])
    if "error" in opened:
        return refused(opened), False, opened
    copied = consumer.must("bandwidth", rounds=20)
    producer.must("publish", slot=0, value=8, cycles=1000)
    read = consumer.ask("read")
    text = f"read {copied['values']}, then {read.get('values', refused(read))}; {copied['gb_s']:.0f} GB/s"
    return text, copied["values"] == [7, 7] and read.get("values") == [8, 8], {**opened, **copied}


def cost(lab: Lab) -> Seen:
    producer, consumer = lab.child(), lab.child()
    values = {}
    for nbytes in (2 * MIB, RING):
        message = producer.must("export", nbytes=nbytes)["message"]
        values[f"{nbytes // MIB} MiB"] = consumer.must("times", message=message, rounds=20)
    each = [f"{size}: open {ms['open_ms']:.2f} ms, close {ms['close_ms']:.2f} ms" for size, ms in values.items()]
    return "; ".join(each), all(max(ms.values()) < 50 for ms in values.values()), values


def visibility(lab: Lab) -> Seen:
    producer, consumer, _ = pair(lab, 16 * MIB, slots=2)
    wrong = rounds_wrong(producer, consumer, ROUNDS, cycles=500_000, wait=True)
    control = rounds_wrong(producer, consumer, 10, cycles=200_000_000, wait=False)
    text = (
        f"{wrong} of {ROUNDS} rounds wrong; without the wait {control} of 10 (which shows that a wrong one would show)"
    )
    return text, wrong == 0 and control > 0, {"wrong": wrong, "wrong_without_wait": control}


def rounds_wrong(producer: Child, consumer: Child, rounds: int, cycles: int, wait: bool) -> int:
    """In how many rounds the consumer, told of a slot, reads other bytes than were written."""
    wrong = 0
    for turn in range(rounds):
        slot, value = turn % 2, turn % 251
        producer.must("publish", slot=slot, value=value, cycles=cycles, wait=wait)
        wrong += consumer.must("read", slot=slot)["values"] != [value, value]
    return wrong


MIXES = (("products", "copies"), ("spins", "spins"))
"""A GPU that either fills by itself, and one that neither does."""
SECONDS = 1.0


def time_slicing(lab: Lab) -> Seen:
    children = [lab.child(), lab.child()]
    alone = {kind: rates(children[:1], [[kind]])[0] for kind in ("products", "copies", "spins")}
    values: Answer = {"alone_per_s": alone}

    def note(way: str, used: list[Child]) -> None:
        for mix in MIXES:
            groups = [[kind] for kind in mix] if len(used) == 2 else [list(mix)]
            parts = [rate / alone[kind] for rate, kind in zip(rates(used, groups), mix, strict=True)]
            values[f"{way}, {' + '.join(mix)}"] = [round(part, 3) for part in parts]

    note("processes", children)
    note("streams", children[:1])
    lab.end_question()
    with mps() as (env, why_not):
        try:
            if env is not None:
                note("MPS", [lab.child(env=env), lab.child(env=env)])
        except Unanswered as error:
            why_not = str(error)
        finally:
            lab.end_question()  # the daemon waits for its clients
    sums = {way: sum(parts) for way, parts in values.items() if way != "alone_per_s"}
    text = "; ".join(f"{way}: {' + '.join(f'{part:.2f}' for part in values[way])}" for way in sums)
    small = {way.split(",")[0]: total for way, total in sums.items() if "spins" in way}
    agrees = small["processes"] < 1.5 and small["streams"] > 1.7 and small.get("MPS", 2.0) > 1.7
    return text + (f"; MPS: {why_not}" if why_not else ""), agrees, values


def rates(children: list[Child], groups: list[list[str]]) -> list[float]:
    """Kernels a second of each work, all at once; a child's works are threads on streams of their own."""
    for child, kinds in zip(children, groups, strict=True):
        child.must("prepare", kinds=kinds)
    for child in children:
        child.tell("rates", seconds=SECONDS)
    answers = [child.answer(name="rates") for child in children]
    if any("error" in answer for answer in answers):
        raise Unanswered(f"rates: {answers}")
    return [rate for answer in answers for rate in answer["rates"]]


@contextmanager
def mps() -> Iterator[tuple[dict[str, str] | None, str | None]]:
    """A private MPS daemon's variables while it runs, or why there is none; it is ended by `quit`."""
    control = shutil.which("nvidia-cuda-mps-control")
    if control is None:
        yield None, "no nvidia-cuda-mps-control here"
        return
    with tempfile.TemporaryDirectory(prefix="mps-", ignore_cleanup_errors=True) as folder:
        env = {f"CUDA_MPS_{name}_DIRECTORY": f"{folder}/{name.lower()}" for name in ("PIPE", "LOG")}
        for path in env.values():
            Path(path).mkdir()
        if said := run_control([control, "-d"], env):
            yield None, said
            return
        try:
            yield env, None
        finally:
            run_control([control], env, "quit -t 5\n")


def run_control(command: list[str], env: dict[str, str], text: str = "") -> str | None:
    """Why it failed, or None."""
    try:
        # Into a file: the daemon that stays keeps a pipe open, and its end would never come.
        with tempfile.TemporaryFile("w+") as said:
            done = subprocess.run(
                command,
                env={**os.environ, **env},
                input=text,
                text=True,
                stdout=said,
                stderr=said,
                timeout=15,
                check=False,
            )
            said.seek(0)
            words = " ".join(said.read().split())[:200]
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not started: {type(error).__name__}"
    return f"not started: exit code {done.returncode} {words}" if done.returncode else None


def torch_memory(lab: Lab) -> Seen:
    producer = lab.child()
    values: Answer = {}
    for name in SHARED:
        consumer = lab.child()  # its own: a look beyond a mapping costs the context
        shared = producer.must(name)
        opened = consumer.ask("open_raw", handle=shared["handle"])
        at = opened.get("at", 0)
        there = consumer.ask("look_at", at=at, nbytes=SMALL) if at else opened
        beside = consumer.ask("look_at", at=at + shared["apart"], nbytes=SMALL) if at else opened
        values[name] = {"apart": shared["apart"], "at_pointer": there, "beside": beside}
    ring = producer.must("export", nbytes=SMALL)
    values["ring_at_a_unit"] = ring["at"] % (2 * MIB) == 0
    expandable = lab.child(env={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}).ask("share_torch")
    values["expandable"] = refused(expandable)
    torchs, small = ([values[name][what].get("values") for what in ("at_pointer", "beside")] for name in SHARED)
    text = (
        f"torch's second tensor (2s) exported: {torchs[0]} at the pointer, {torchs[1]} as far on as it lies;"
        f" with expandable segments: {values['expandable']}; small cudaMalloc (1s) exported: {small[0]} at the pointer,"
        f" its neighbour (2s) {small[1]}; a ring begins at a unit of 2 MiB: {values['ring_at_a_unit']}"
    )
    return text, torchs == small == [[1, 1], [2, 2]] and values["ring_at_a_unit"], values


SHARED = ("share_torch", "share_small")

QUESTIONS: dict[int, tuple[str, str, Callable[[Lab], Seen]]] = {
    1: ("a handle opened twice in one process", "the same pointer, counted: close as often as open", opened_twice),
    2: ("opened by the process that exported it", "refused, context lives; we compare pids before", opened_at_home),
    3: (
        "producer killed while mapped",
        "consumer still reads; its close succeeds and gives the memory back",
        producer_killed,
    ),
    4: ("producer frees while mapped", "undefined by documentation: we never do it", producer_frees),
    5: ("consumer killed while mapped", "the producer's free gives the memory back", consumer_killed),
    6: ("a stale handle opened", "refused with an error, context lives", stale_handles),
    7: ("opened on another GPU", "right bytes by peer access, a view and no copy", peer_access),
    8: ("cost of open and close", "below 50 ms: once an epoch, it does not matter", cost),
    9: ("writes seen after event, wait, message", "right in every round", visibility),
    10: (
        "two works on one GPU, share of their speed alone",
        "processes take turns (sum below 1.5); streams and MPS run beside each other (small work: sum 2)",
        time_slicing,
    ),
    11: (
        "memory of torch's allocator, small allocations",
        "a handle leads to the begin of a shared block, so a ring is its own allocation in units of 2 MiB",
        torch_memory,
    ),
}


def ask(number: int, lab: Lab, deadline: Deadline) -> Finding:
    """One question's finding, whatever becomes of its children."""
    question, assumed, answer = QUESTIONS[number]
    if not deadline.left():
        return Finding(number, question, assumed, "not asked: the time is over", None, {})
    try:
        seen, agrees, values = answer(lab)
    except Unanswered as error:
        seen, agrees, values = f"failed: {error}", None, {}
    except (KeyError, ValueError) as error:
        seen, agrees, values = f"failed: an answer without {error}", None, {}
    finally:
        lab.end_question()
    return Finding(number, question, assumed, seen, agrees, values)


def line(finding: Finding) -> str:
    """A finding as text."""
    verdict = {True: "agrees", False: "DIFFERS", None: "-"}[finding.agrees]
    return (
        f"{finding.number:2} {finding.question}: {verdict}\n   assumed: {finding.assumed}\n   seen:    {finding.seen}"
    )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    parser.add_argument("--only", default="", metavar="N,N", help="numbers of questions")
    parser.add_argument("--limit", type=float, default=90.0, metavar="SECONDS", help="for all of it")
    given = parser.parse_args()
    asked = [word.strip() for word in given.only.split(",") if word.strip()]
    if unknown := [word for word in asked if word not in map(str, QUESTIONS)]:
        parser.error(f"--only: found {unknown[0]}, expected numbers from 1 to {len(QUESTIONS)}")
    numbers = [int(word) for word in asked] or list(QUESTIONS)
    if given.json and not given.json.parent.is_dir():
        parser.error(f"--json: found no folder {given.json.parent}, expected one")
    deadline = Deadline(given.limit)
    with ExitStack() as stack:
        lab = Lab(deadline)
        stack.callback(lab.end)
        lab.ahead(AHEAD)
        try:
            machine = lab.machine()
        except Unanswered as error:
            return fail(f"needs an NVIDIA GPU and this project's packages; {error}")
        if not machine["gpus"]:
            return fail(f"needs an NVIDIA GPU, found none that torch {machine['torch']} can use")
        say(f"{', '.join(machine['gpus'])}; torch {machine['torch']}, CUDA {machine['cuda']}")
        findings = []
        for number in numbers:
            lab.ahead(AHEAD)
            began = time.monotonic()
            findings.append(ask(number, lab, deadline))
            say(f"{line(findings[-1])}\n   {time.monotonic() - began:.1f} s")
    if given.json:
        given.json.write_text(json.dumps({"machine": machine, "findings": [asdict(one) for one in findings]}, indent=1))
    return 0


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def fail(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)  # noqa: T201
    return 1


if __name__ == "__main__":
    sys.exit(main())
