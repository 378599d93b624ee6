"""The daemon: owns shared memory and processes, numbers prompts, answers clients, ends the run in order.

One thread, one poll: workers' messages, clients' commands, dying processes, signals. It never imports torch and never
touches a pixel.
"""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from enum import Enum

import zmq

from configs.schema import STAGES, RuntimeConfig, StageName
from ipc.channel import Gateway, Inbox, Outbox, Publisher
from ipc.errors import Refused, UserError
from ipc.messages import (
    TO_DAEMON,
    Begin,
    BlockDone,
    BlockTimes,
    Discontinuity,
    Drain,
    Drained,
    EndOfStream,
    FramesPlayed,
    Heartbeat,
    Loading,
    Message,
    PlayoutReport,
    PresetApplied,
    PresetChanged,
    PromptApplied,
    PromptEncoded,
    PromptRefused,
    Ready,
    RingExported,
    Shutdown,
    SinkChanged,
    SinkStatus,
    StageFailed,
    StateChanged,
    Status,
    VersionPlayed,
    WorkerRestarted,
)
from ipc.processes import own_resident_bytes
from orchestrator.gateway import ClientDesk
from orchestrator.mps import Mps, begin_where_shared, gpus_of, is_fault
from orchestrator.plan import Reporter, RunPlan, RunSummary
from orchestrator.prompting import Prompting
from orchestrator.restarts import RestartBudget
from orchestrator.rings import RingHouse
from orchestrator.run_directory import CONTROL, EVENTS_SOCKET, RunDirectory
from orchestrator.signals import SignalWatch
from orchestrator.supervisor import Supervisor, Worker, worker_groups
from orchestrator.telemetry import Telemetry
from workers.spec import RunLimits

POLL_MS = 100
FAREWELL_S = 5.0
"""How long workers may take to end after they were told to."""
LAST_WORDS_S = 0.5
"""How long the message of a worker that ended with an error may take to arrive."""
LINGER_S = 0.5
"""How long last answers may take to leave."""


class Phase(Enum):
    """Where a run is."""

    STARTING = "starting"
    RUNNING = "running"
    DRAINING = "draining"
    ENDED = "ended"


def run(config: RuntimeConfig, plan: RunPlan, directory: RunDirectory, reporter: Reporter) -> RunSummary:
    """Runs a plan to its end, in the main thread; workers and shared memory are gone when it returns.

    Raises:
        UserError: the run cannot even be set up, such as too little memory.
    """
    with ExitStack() as stack:
        return Daemon(config, plan, directory, reporter, stack).run()


class Daemon:
    """One run.

    Args:
        stack: receives everything that must be closed, in the order in which it was opened.
    """

    def __init__(
        self,
        config: RuntimeConfig,
        plan: RunPlan,
        directory: RunDirectory,
        reporter: Reporter,
        stack: ExitStack,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._config, self._plan, self._reporter, self._clock = config, plan, reporter, clock
        self._rings = RingHouse(config)
        stack.callback(self._rings.close)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        stack.callback(context.term)
        self._inbox = Inbox(context, directory.address("daemon"), TO_DAEMON)
        stack.callback(self._inbox.close)
        self._outboxes = {name: Outbox(context, directory.address(name)) for name in STAGES}
        for outbox in self._outboxes.values():
            stack.callback(outbox.close)
        self._gateway = Gateway(context, directory.address(CONTROL))
        stack.callback(self._gateway.close, LINGER_S)
        publisher = Publisher(context, directory.address(EVENTS_SOCKET))
        stack.callback(publisher.close, LINGER_S)
        self._desk = ClientDesk(self._gateway, publisher, self)
        self._signals = SignalWatch()
        stack.callback(self._signals.close)
        limits = _limits(config, plan)
        self._supervisor = Supervisor(config, directory.path, self._rings, limits, plan.log, self._worker_environment)
        self._mps: Mps | None = None
        self._spoilt_ns = 0
        self._stack, self._directory = stack, directory
        self._telemetry = Telemetry(config, clock())
        self._prompts = Prompting(config, limits.blocks, self._desk, self._send, clock)
        self._restarts = RestartBudget()
        self._phase = Phase.STARTING
        self._reasons: dict[str, tuple[str, bool]] = {}
        self._exported: RingExported | None = None
        self._drained: Drained | None = None
        self._sinks: list[SinkStatus] = []
        self._warned: set[str] = set()
        self._deadline_ns: int | None = None
        self._up_ns: int | None = None
        self._ended_ns = 0
        self._preset: str | None = None
        self._error: str | None = None
        self._exit_code = 0

    def run(self) -> RunSummary:
        """Until the plan is carried out, a client or a signal ends it, or it fails."""
        try:
            self._begin()
            while self._phase is not Phase.ENDED:
                self._turn()
        finally:
            self._end()
        return self._summary()

    def set_prompt(self, text: str, at: int | None, command: str) -> int:
        if self._phase not in (Phase.STARTING, Phase.RUNNING):
            raise Refused("unavailable", "prompt: the stream is ending")
        return self._prompts.accept(text, at, command)

    def snapshot(self) -> Status:
        in_force = self._prompts.in_force
        return self._telemetry.status(
            now_ns=self._clock(),
            pid=os.getpid(),
            own_memory=own_resident_bytes(),
            state=self._phase.value,
            prompt=in_force.text if in_force else self._plan.prompts[0].text,
            version=in_force.version if in_force else 0,
        )

    def stop(self) -> None:
        """Ends the run in order: the block in work is finished, what is decoded is played, outputs are closed."""
        if self._phase is Phase.STARTING:
            self._finish()
        elif self._phase is Phase.RUNNING:
            self._enter(Phase.DRAINING, "finishing the block in work")
            self._deadline_ns = self._clock() + int(self._config.supervision.drain_s * 1e9)
            self._send("denoiser", Drain())

    def _begin(self) -> None:
        groups = worker_groups(self._config).values()
        self._mps = begin_where_shared(
            self._config, groups, self._directory.path, os.environ, self._warn, self._signals.fd
        )
        if self._mps is not None:
            self._stack.callback(self._mps.end)
            self._telemetry.mps = True
            self._reporter.note("processes share the GPU through CUDA's multi-process service")
        self._supervisor.start()
        self._note_pids()
        self._prompts.plan(self._plan.prompts, given=self._plan.inputs is not None)

    def _worker_environment(self, stages: tuple[StageName, ...]) -> dict[str, str]:
        if self._mps is None or not gpus_of(self._config, stages):
            return {}
        variables = self._mps.for_worker()
        self._telemetry.mps = self._mps.is_there
        return variables

    def _turn(self) -> None:
        poller = zmq.Poller()
        sources = [self._inbox.socket, self._signals.fd, *([self._gateway.socket] if self._plan.live else [])]
        for source in sources:
            poller.register(source, zmq.POLLIN)
        pidfds = {worker.pidfd for worker in self._supervisor.workers.values()}
        for pidfd in pidfds:
            poller.register(pidfd, zmq.POLLIN)
        ready = dict(poller.poll(POLL_MS))
        for message in self._inbox.drain():
            self._take(message)
        if self._plan.live:
            self._desk.serve()
        for _ in range(self._signals.taken()):
            self._interrupted()
        for pidfd in pidfds & set(ready):
            worker, how = self._supervisor.reap(pidfd)
            self._died(worker, how)
        self._keep_time()

    def _keep_time(self) -> None:
        now = self._clock()
        for name, reason in self._supervisor.kill_overdue().items():
            self._reasons[name] = (reason, False)
        for name in self._restarts.due(now):
            self._forget_reasons(name)
            self._supervisor.start([name])
            self._note_pids()
        if self._deadline_ns is not None and now > self._deadline_ns and self._phase is Phase.DRAINING:
            self._fail(f"outputs were not closed within {self._config.supervision.drain_s:.0f} s")
            self._finish()

    def _forget_reasons(self, name: str) -> None:
        """What was said of a worker's last life is not of its next."""
        for key in (name, *worker_groups(self._config)[name]):
            self._reasons.pop(key, None)

    def _interrupted(self) -> None:
        """The first signal ends in order, the second at once."""
        if self._phase is Phase.RUNNING:
            self._reporter.note("stopping: closing outputs; once more to stop at once")
            self.stop()
        else:
            self._exit_code = self._exit_code or 130
            self._finish()

    def _take(self, message: Message) -> None:
        self._telemetry.note(message)
        match message:
            case Loading():
                self._reporter.loading(message.stage, message.text)
            case Ready():
                self._stage_is_ready(message)
            case Heartbeat():
                self._supervisor.heartbeat(message)
            case PromptRefused():
                self._prompts.refused(message)
                if self._prompts.is_planned(message.version):
                    self._fail(message.text, exit_code=UserError.exit_code)
                    self._finish()
            case PromptApplied():
                self._prompts.applied(message)
            case PresetApplied():
                self._preset = message.new
                self._desk.publish(PresetChanged(**message.model_dump()))
                self._reporter.note(f"preset {message.new} from block {message.block} on: {message.reason}")
            case BlockDone():
                self._desk.publish(BlockTimes(**message.model_dump()))
            case FramesPlayed() | PromptEncoded():
                self._desk.publish(message)
            case VersionPlayed():
                self._prompts.played(message)
            case PlayoutReport():
                self._played(message)
            case Drained():
                self._drained = message
                self._finish()
            case StageFailed():
                self._reasons[message.stage] = (message.text, message.user)
            case RingExported():
                self._exported = message
                self._send("vae_decoder", message)

    def _played(self, report: PlayoutReport) -> None:
        for sink in report.sinks:
            if sink.state not in {old.state for old in self._sinks if old.target == sink.target}:
                self._desk.publish(SinkChanged(sink=sink))
        self._sinks = report.sinks
        self._reporter.frames(report.frames, self._total_frames, report.fps)

    @property
    def _total_frames(self) -> int | None:
        if self._plan.frames is not None or self._plan.blocks is None:
            return self._plan.frames
        return self._config.stream.first_frame(self._plan.blocks)

    def _stage_is_ready(self, message: Ready) -> None:
        stage = next(name for name in STAGES if name == message.stage)
        self._supervisor.ready(stage)
        self._reporter.loading(stage, "ready" if message.note is None else f"ready ({message.note})")
        for warning in message.warnings:
            self._warn(warning)
        if self._phase is Phase.STARTING:
            if self._supervisor.all_ready:
                self._go()
        else:
            self._carry_on(stage)

    def _warn(self, text: str) -> None:
        """Once a run: two stages may lack the same, and one that is started again says it again."""
        if text not in self._warned:
            self._warned.add(text)
            self._reporter.note(f"warning: {text}")

    def _go(self) -> None:
        self._up_ns = self._clock()
        self._enter(Phase.RUNNING, "generating")
        self._reporter.up(self._telemetry.up_line(own_resident_bytes()))
        if self._telemetry.abstract_picture:
            self._reporter.note(
                "weights are random: the picture is abstract, a prompt changes it but does not describe it"
            )
        self._send("denoiser", Begin(block=0))

    def _carry_on(self, stage: StageName) -> None:
        """Brings a restarted stage to where its predecessor was."""
        if stage == "text_encoder":
            self._prompts.again()
        elif stage == "vae_decoder":
            if self._exported is not None:
                self._send(stage, self._exported)
            self._desk.publish(Discontinuity(block=self._telemetry.block, reason="the VAE decoder was restarted"))
        elif stage == "denoiser":
            self._resume_denoiser()

    def _resume_denoiser(self) -> None:
        block = self._telemetry.next_block
        self._prompts.resume_at(block)
        if self._phase is Phase.DRAINING:
            self._send("denoiser", Drain())
        self._send("denoiser", Begin(block=block, preset=self._preset))
        self._desk.publish(Discontinuity(block=block, reason="the denoiser was restarted"))

    def _died(self, worker: Worker, how: str) -> None:
        """A worker ended that was not told to: start another, or end the run if that cannot help."""
        reason, user = self._last_words(worker) or (how, False)
        if self._phase is Phase.ENDED:
            return
        text = reason if user else f"{worker.name} died: {reason}"
        self._telemetry.last_error = text
        by_another = worker.started_ns < self._spoilt_ns
        cannot_restart = user or "output" in worker.stages or self._phase is Phase.STARTING
        delay_ns = None if cannot_restart else self._restarts.ask(worker.name, self._clock(), not by_another)
        if delay_ns is None:
            self._fail(text, exit_code=UserError.exit_code if user else 1)
            self._close_outputs()
            return
        if is_fault(reason):
            self._end_others(worker)
        self._reporter.note(f"{text}; starting it again")
        for stage in worker.stages:
            self._rings.mend_after(stage)
            self._telemetry.stages[stage].restarts += 1
            self._telemetry.stages[stage].state = "restarting"
            self._desk.publish(WorkerRestarted(stage=stage, reason=reason))

    def _end_others(self, failed: Worker) -> None:
        """A fault on a GPU is one of all its clients, and the service takes no new ones before the last has gone."""
        if self._mps is None or not self._mps.is_there or failed.started_ns < self._spoilt_ns:
            return
        self._spoilt_ns = self._clock()
        self._mps.spoil()
        for other in self._supervisor.workers.values():
            if gpus_of(self._config, other.stages):
                self._reasons.setdefault(other.name, (f"{failed.name} met a fault of a GPU", False))
                self._supervisor.kill(other)

    def _last_words(self, worker: Worker) -> tuple[str, bool] | None:
        """What a dead worker said of its end, which may still be on its way; None if it was killed."""
        deadline_ns = self._clock() + int(LAST_WORDS_S * 1e9)
        keys = {*worker.stages, worker.name}
        while not keys & self._reasons.keys():
            message = self._inbox.recv(LAST_WORDS_S if worker.ended_by_itself else 0.0)
            if message is not None:
                self._take(message)
            elif not worker.ended_by_itself or self._clock() > deadline_ns:
                return None
        told = [self._reasons.pop(key) for key in keys & self._reasons.keys()]
        return max(told, key=lambda words: (words[1], is_fault(words[0])))

    def _close_outputs(self) -> None:
        """After a failure: what was decoded is played, outputs are closed, then the run ends."""
        if self._supervisor.of_stage("output") is None or self._phase not in (Phase.RUNNING, Phase.DRAINING):
            self._finish()
            return
        if self._phase is Phase.RUNNING:
            self._enter(Phase.DRAINING, self._error or "failed")
            self._deadline_ns = self._clock() + int(self._config.supervision.drain_s * 1e9)
        self._send("output", EndOfStream(blocks=0))

    def _note_pids(self) -> None:
        for worker in self._supervisor.workers.values():
            for stage in worker.stages:
                self._telemetry.stages[stage].pid = worker.pid

    def _fail(self, text: str, exit_code: int = 1) -> None:
        self._error = self._error or text
        self._telemetry.last_error = self._error
        self._exit_code = self._exit_code or exit_code

    def _enter(self, phase: Phase, text: str) -> None:
        self._phase = phase
        self._desk.publish(StateChanged(state=phase.value, text=text))

    def _finish(self) -> None:
        self._ended_ns = self._clock()
        self._enter(Phase.ENDED, self._error or "ended")

    def _end(self) -> None:
        """Whatever happened: no worker lives on, and every command has its final answer."""
        in_order = self._drained is not None
        for name in STAGES:
            self._send(name, Shutdown())
        self._supervisor.end(FAREWELL_S if in_order else 0.0)
        reason = self._error or "the stream ended"
        self._prompts.end(reason)
        self._desk.stopped(self._drained.frames if self._drained else self._telemetry.frames)
        self._reporter.close()

    def _send(self, stage: StageName, message: Message) -> None:
        self._outboxes[stage].send(message)

    def _summary(self) -> RunSummary:
        drained = self._drained
        broken = [sink for sink in drained.sinks if sink.error and sink.state == "failed"] if drained else []
        if broken and self._error is None:
            self._fail(f"{broken[0].target}: {broken[0].error}")
        return RunSummary(
            exit_code=self._exit_code,
            frames=drained.frames if drained else self._telemetry.frames,
            blocks=self._telemetry.next_block,
            frames_sha256=drained.sha256 if drained else "",
            files=tuple(sink.segment for sink in drained.sinks if sink.segment) if drained else (),
            error=self._error,
            wall_s=(self._ended_ns - self._up_ns) / 1e9 if self._up_ns is not None else 0.0,
        )


def _limits(config: RuntimeConfig, plan: RunPlan) -> RunLimits:
    blocks = plan.blocks
    if blocks is None and plan.frames is not None:
        blocks = config.stream.blocks_for_frames(plan.frames)
    return RunLimits(blocks=blocks, frames=plan.frames, inputs=plan.inputs, dump_latents=plan.dump_latents)
