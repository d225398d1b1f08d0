"""Streams: items that come one after another, each when somebody is ready for it.

`stream` has `Stream` and what is done item by item; `beside` the stages with tasks of their own, `pace` those that keep time.
`files`, `database` and `web` are sources.
"""

from supervisor.streams.database import rows
from supervisor.streams.files import lines, watch_files
from supervisor.streams.stream import Stream
from supervisor.streams.web import websocket

__all__ = ["Stream", "lines", "rows", "watch_files", "websocket"]
