"""What stands in the place of a transport that is closed: whoever calls it is told so, with the line of the call.

A communicator asks nowhere whether it is closed, so this costs nothing while it is open.
"""

from typing import TYPE_CHECKING, Any

from dtrain.collectives import callers

if TYPE_CHECKING:
    from dtrain.collectives.transport import Transport


class CommunicatorClosed(RuntimeError):
    """A call of a communicator after its `close`."""


class Closed:
    """Knows what the transport was, but does nothing more; it may be closed again, and end the job."""

    def __init__(self, transport: "Transport", name: str) -> None:
        self._known = transport
        self._name = name
        self.abort = transport.abort

    def close(self) -> None:
        """Nothing is left to do."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._known, name)
        if callable(found):
            raise CommunicatorClosed(f"the communicator {self._name!r} is closed, but was used: {callers.here()}")
        return found
