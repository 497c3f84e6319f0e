"""Ending an image that is being drawn: on the button, on Ctrl-C, and when its tab was closed."""

import threading


class Stopped(Exception):
    """Raised between two steps of an image that nobody waits for any more."""


class Stops:
    """One event for every browser session that draws."""

    def __init__(self) -> None:
        self._events: dict[str | None, threading.Event] = {}

    def begin(self, session: str | None) -> threading.Event:
        """What `stop` will set for this session from now on."""
        self._events[session] = event = threading.Event()
        return event

    def end(self, session: str | None, event: threading.Event) -> None:
        """This session draws no more."""
        if self._events.get(session) is event:
            del self._events[session]

    def stop(self, session: str | None) -> None:
        """End what this session draws, if it does."""
        if event := self._events.get(session):
            event.set()

    def stop_all(self) -> None:
        """End what anyone draws."""
        for event in list(self._events.values()):
            event.set()
