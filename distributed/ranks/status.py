"""The status of one rank in the controller, and its update by the rank's messages."""

import time
from dataclasses import dataclass, field

from .protocol import Beat, Channel, Done, Failed, Hello, Message, Ready, Released
from .states import RankState, follow


@dataclass
class RankStatus:
    """The status of one rank in the controller.

    job: number of the current job. answer: the rank's answer to it. done, total: its progress. moved: the counter in
    the rank's last `Beat`. moved_at, heard_at: times of the last progress and the last message (`time.monotonic`).
    """

    rank: int
    device: str
    pid: int | None = None
    state: RankState = RankState.STARTING
    job: int = 0
    done: int = 0
    total: int = 0
    moved: int = -1
    moved_at: float = field(default_factory=time.monotonic)
    heard_at: float = field(default_factory=time.monotonic)
    channel: Channel | None = None
    answer: Done | Failed | None = None

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.device})"

    def move(self, state: RankState) -> None:
        """Change the state. Raises ValueError if there is no such transition."""
        self.state = follow(self.state, state)

    def begin(self, job: int, state: RankState) -> None:
        """Start a new job: answer and progress now refer to it."""
        self.move(state)
        self.job, self.answer, self.moved_at = job, None, time.monotonic()
        self.done = self.total = 0

    def hear(self, message: Message) -> None:
        """Update the status from a message. Raises ValueError if the message is invalid in this state."""
        self.heard_at = time.monotonic()
        match message:
            case Ready():
                self._expect(message, self.state is RankState.STARTING)
                self.move(RankState.READY)
            case Released():
                self._expect(message, self.state is RankState.RELEASING)
                self.move(RankState.READY)
            case Beat():
                self._expect(message, message.id <= self.job and message.done <= message.total)
                if message.id == self.job:  # otherwise it is a late heartbeat of an earlier job
                    self.done, self.total = message.done, message.total
                if message.moved != self.moved:
                    self.moved, self.moved_at = message.moved, self.heard_at
            case Done() | Failed():
                self._expect(message, self.state.has_job and message.id == self.job)
                if isinstance(message, Done):
                    self._expect(message, message.done == message.total)
                    self.done, self.total = message.done, message.total
                self.answer = message
                self.move(RankState.READY)
            case Hello():
                self._expect(message, False)

    def _expect(self, message: Message, true: bool) -> None:
        if not true:
            raise ValueError(
                f"unexpected from a rank in state {self.state.value} with job {self.job}: {str(message)[:200]}"
            )
