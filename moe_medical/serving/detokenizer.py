"""The text of an answer while its tokens come: whole characters, no white space at its ends, stop strings.

Decision: what is handed on is never taken back. So text is held as long as a later token may still change
what becomes of it: the bytes of half a character, white space that may be the answer's end, and whatever a
stop string may begin with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moe_medical.data.chat import ChatFormat


class Detokenizer:
    """Turns tokens into pieces of text that join to the answer.

    Args:
        chat: Of the model.
        emit: Given each piece.
        stops: The answer ends before the first of these.
        strip: Whether white space at both ends is left out.
    """

    def __init__(
        self,
        chat: ChatFormat,
        emit: Callable[[str], None] = lambda _: None,
        stops: Sequence[str] = (),
        strip: bool = True,
    ) -> None:
        self.stopped = False
        """Whether a stop string was found."""
        self._chat = chat
        self._decode_next = chat.decode_stream()
        self._emit = emit
        self._stops = [stop for stop in stops if stop]
        self._strip = strip
        self._ids: list[int] = []
        self._decoded = ""
        self._num_emitted = 0  # characters of `_decoded`

    @property
    def num_tokens(self) -> int:
        return len(self._ids)

    @property
    def text(self) -> str:
        """All that was handed on."""
        return self._decoded[: self._num_emitted]

    def take(self, token: int) -> bool:
        """The next token; True when a stop string has come."""
        self._ids.append(token)
        self._append(self._decode_next(token))
        return self.stopped

    def finish(self) -> str:
        """Hand on what was held back, and return the whole answer."""
        whole = self._chat.decode(self._ids)
        if self._strip:
            whole = whole.lstrip()
        if not self.stopped and whole.startswith(self._decoded):
            # A stream of single tokens keeps half a character at the end to itself; the whole text shows it.
            self._append(whole[len(self._decoded) :])
        if not self.stopped:
            self._emit_up_to(len(self._decoded.rstrip() if self._strip else self._decoded))
        return self.text

    def _append(self, piece: str) -> None:
        # A stop string may have begun in an earlier piece, but not further back than its own length.
        start = max(0, len(self._decoded) - max(map(len, self._stops), default=0))
        self._decoded += piece.lstrip() if self._strip and not self._decoded else piece
        found = [at for stop in self._stops if (at := self._decoded.find(stop, start)) >= 0]
        if found:
            self.stopped = True
            self._decoded = self._decoded[: min(found)]
            if self._strip:
                self._decoded = self._decoded.rstrip()
            self._emit_up_to(len(self._decoded))
        else:
            self._emit_up_to(len(self._decoded) - self._num_held())

    def _num_held(self) -> int:
        """Characters at the end that a stop string may begin with, or that may be the answer's end."""
        starts = (n for stop in self._stops for n in range(1, len(stop)) if self._decoded.endswith(stop[:n]))
        held = max(starts, default=0)
        if self._strip:
            sure = self._decoded[: len(self._decoded) - held]
            held += len(sure) - len(sure.rstrip())
        return held

    def _emit_up_to(self, end: int) -> None:
        if end > self._num_emitted:
            piece = self._decoded[self._num_emitted : end]
            self._num_emitted = end
            self._emit(piece)
