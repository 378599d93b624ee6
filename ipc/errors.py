"""The error tree. Its first level answers one question: does the process that raised it survive?

LongLiveError
├── UserError                 the person at the terminal must change something: one line, exit code, no traceback
│   ├── ConfigError           a key, a value or a combination in the configuration          exit 2
│   ├── CheckpointError       a weights file: names file, tensor, found, expected           exit 2
│   ├── InputError            an argument or an input file                                  exit 2
│   ├── AlreadyRunning        another daemon holds the run directory                        exit 3
│   └── NotRunning            no daemon answers                                             exit 4
├── Refused                   one command of a client is answered `rejected`; nothing else changes
├── Fatal                     this worker ends; the supervisor restarts it or stops the run
│   ├── ProtocolError         a peer of our own sent what the wire does not allow: a bug
│   ├── RingError             a slot, an epoch, a size or a device does not fit
│   ├── NonFiniteLatents      the transformer produced NaN or infinity
│   └── AuditFailed           with `execution.audit`: a pass read a value back or kept memory: a bug
└── WorkerDied                told to the daemon and its clients: which worker, and how it ended
"""


class LongLiveError(Exception):
    """Root of all errors of this project. Its text is one line that a person can act on."""


class UserError(LongLiveError):
    """The person must change something: what, where, found, expected, how to fix. Ends the command."""

    exit_code = 2


class ConfigError(UserError):
    """A key, a value or a combination in the configuration."""


class CheckpointError(UserError):
    """A weights file that is missing, damaged or of another model."""


class InputError(UserError):
    """An argument or an input file of a command."""


class AlreadyRunning(UserError):
    """Another daemon holds the run directory."""

    exit_code = 3


class NotRunning(UserError):
    """No daemon answers in the run directory."""

    exit_code = 4


class Refused(LongLiveError):
    """A client's command cannot be carried out; it is answered `rejected` with this code and text.

    Args:
        code: a word programs can compare, such as `too_long`, `empty`, `bad_message`, `unavailable`.
        text: one line for the person.
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class Fatal(LongLiveError):
    """This worker must not go on."""


class ProtocolError(Fatal):
    """Bytes that are no message of the table, or a message its receiver does not take."""


class RingError(Fatal):
    """A slot in another state, of another epoch, size, type or device than agreed."""


class NonFiniteLatents(Fatal):
    """NaN or infinity in the latents of a block; decoded, it would be black, silently."""


class AuditFailed(Fatal):
    """A pass of the fast path read a value back or kept memory, which it never may; looked for by `execution.audit`."""


class WorkerDied(LongLiveError):
    """A worker ended without being asked to.

    Args:
        stage: name of its stage.
        reason: how it ended, in words, such as `killed by SIGKILL` or the last error it reported.
    """

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(f"{stage} died: {reason}")
        self.stage = stage
        self.reason = reason
