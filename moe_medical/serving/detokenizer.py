"""The text of an answer while its tokens come: whole characters, no white space at its ends, stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moe_medical.data.chat import ChatFormat


class Wording:
    """Turns tokens into pieces of text that join to the answer; nothing that was told is taken back.

    Args:
        chat: Of the model.
        tell: Given each piece.
        stops: The answer ends before the first of these.
        strip: Whether white space at both ends is left out.
    """

    def __init__(
        self,
        chat: ChatFormat,
        tell: Callable[[str], None] = lambda _: None,
        stops: Sequence[str] = (),
        strip: bool = True,
    ) -> None:
        self._decode_next, self._tell = chat.decode_stream(), tell
        self._decode, self._ids = chat.decode, list[int]()
        self._stops, self._strip = [stop for stop in stops if stop], strip
        self._read, self._told = "", 0
        self.stopped = False
        """Whether a stop string was found."""

    @property
    def num_tokens(self) -> int:
        return len(self._ids)

    @property
    def text(self) -> str:
        """All that was told."""
        return self._read[: self._told]

    def take(self, token: int) -> bool:
        """The next token; True when a stop string has come."""
        self._ids.append(token)
        self._add(self._decode_next(token))
        return self.stopped

    def finish(self) -> str:
        """Tell what was held back, and return the whole answer."""
        whole = self._decode(self._ids)
        whole = whole.lstrip() if self._strip else whole
        if not self.stopped and whole.startswith(self._read):
            self._add(whole[len(self._read) :])  # half a character at the end
        if not self.stopped:
            self._tell_up_to(len(self._read.rstrip() if self._strip else self._read))
        return self.text

    def _add(self, piece: str) -> None:
        searched = max(0, len(self._read) - max(map(len, self._stops), default=0))
        self._read += piece.lstrip() if self._strip and not self._read else piece
        found = [at for stop in self._stops if (at := self._read.find(stop, searched)) >= 0]
        if found:
            self.stopped, self._read = True, self._read[: min(found)]
            self._read = self._read.rstrip() if self._strip else self._read
            self._tell_up_to(len(self._read))
        else:
            self._tell_up_to(len(self._read) - self._uncertain())

    def _uncertain(self) -> int:
        """Characters at the end that a stop string may begin with, or that may be the answer's end."""
        starts = (n for stop in self._stops for n in range(1, len(stop)) if self._read.endswith(stop[:n]))
        held = max(starts, default=0)
        if not self._strip:
            return held
        sure = self._read[: len(self._read) - held]
        return held + len(sure) - len(sure.rstrip())

    def _tell_up_to(self, end: int) -> None:
        if end > self._told:
            piece, self._told = self._read[self._told : end], end
            self._tell(piece)
