"""The error tree of the whole project; `offload` re-exports it.

::

    OffloadError                 anything a user may see; the message is one line and names the remedy
    ├── UsageError               a flag, argument or prompt that cannot be meant (exit code 2)
    ├── ModelError               the model cannot be run: not found, wrong kind, unsupported format
    │   └── CheckpointError      a file of the model is damaged, hostile or does not fit its config
    ├── BudgetError              the memory given is too small; names the smallest that works
    ├── ReadError                the disk failed, or a file changed while it was being read
    ├── StoreError               the folder of conversations, keys and values cannot be used as it is
    │   ├── StoreFull            no space left there, or the most that may be written is reached
    │   └── DamagedError         a file there is damaged, foreign or not private
    │       └── GoneError        it is not there (any more)
    └── Interrupted              the run was asked to stop (exit code 130)
"""

from __future__ import annotations

MAX_MESSAGE = 600


class OffloadError(Exception):
    """Root of all errors raised on purpose. `exit_code` is what the command line returns for it.

    The message is one line of bounded length whatever it quotes: names come from files that nobody vouches for.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        line = " ".join("".join(c if c.isprintable() else " " for c in message).split())
        if len(line) > MAX_MESSAGE:
            line = f"{line[: MAX_MESSAGE // 2]} … {line[-MAX_MESSAGE // 2 :]}"
        super().__init__(line)


class UsageError(OffloadError):
    """An argument that cannot be meant."""

    exit_code = 2


class ModelError(OffloadError):
    """The model cannot be run here, and why."""


class CheckpointError(ModelError):
    """A checkpoint file is damaged, hostile, or does not fit the model's config."""


class BudgetError(OffloadError):
    """A memory budget that cannot work. `smallest` is the least number of bytes that can, where known."""

    def __init__(self, message: str, smallest: int | None = None) -> None:
        super().__init__(message)
        self.smallest = smallest


class ReadError(OffloadError):
    """Reading a block failed; the message names the file."""


class StoreError(OffloadError):
    """The folder of conversations, keys and values cannot be used as it is; the message names it and the remedy."""


class StoreFull(StoreError):
    """No space is left there, or the most that may be written is reached."""


class DamagedError(StoreError):
    """A file that was read back is damaged, foreign or not private."""


class GoneError(DamagedError):
    """What was asked for is not there, or not any more: another process may have freed it."""


class Interrupted(OffloadError):
    """The run was asked to stop and stopped at the next layer."""

    exit_code = 130
