"""A stateful MCP server: mcp_server.py. Streamable HTTP on /mcp (the session era and the stateless 2026-07-28, told apart
by the client's headers), HTTP+SSE on /sse, and on /seen what it has done, for the tests."""

import asyncio
import uuid
from collections import Counter

import mcp_types
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.streamable_http import EventMessage, EventStore
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from pydantic import BaseModel
from starlette.responses import JSONResponse

import serving

seen = {"calls": Counter(), "running": 0, "cancelled": 0}
counters: Counter = Counter()  # by session
server = MCPServer("counter")


def session_of(context: Context) -> str | None:
    """The id of the session in either of its places; none in the stateless version."""
    request = context.request_context.request
    return request.headers.get("mcp-session-id") or request.query_params.get("session_id")


@server.tool()
async def count(context: Context) -> int:
    """Counts the calls of this session; -1 where there is none."""
    seen["calls"]["count"] += 1
    session = session_of(context)
    if session is None:
        return -1
    counters[session] += 1
    return counters[session]


@server.tool()
async def add(first: int, second: int) -> int:
    seen["calls"]["add"] += 1
    return first + second


@server.tool()
async def fail() -> str:
    raise ValueError("boom")


@server.tool()
async def slow(seconds: float, context: Context) -> str:
    """Reports progress ten times."""
    seen["calls"]["slow"] += 1
    seen["running"] += 1
    try:
        for step in range(10):
            await asyncio.sleep(seconds / 10)
            await context.report_progress(step + 1, 10)
    except asyncio.CancelledError:
        seen["cancelled"] += 1
        raise
    finally:
        seen["running"] -= 1
    return "slow done"


@server.tool()
async def polled(context: Context) -> str:
    """Closes the stream of its own answer: the client comes back for it with Last-Event-ID."""
    await context.close_sse_stream()
    await asyncio.sleep(0.3)
    return "polled done"


class Name(BaseModel):
    name: str


@server.tool()
async def greet(context: Context) -> str:
    """Asks the client for its user's name in the middle of the call."""
    answer = await context.elicit("who are you?", Name)
    return f"hello {answer.data.name}" if answer.action == "accept" else answer.action


class Memory(EventStore):
    """Events of all streams of one session in the order in which they came."""

    def __init__(self) -> None:
        self.name = uuid.uuid4().hex[:8]
        self.events: list[tuple[str, mcp_types.JSONRPCMessage | None]] = []

    async def store_event(self, stream_id, message):
        self.events.append((stream_id, message))
        return f"{self.name}-{len(self.events)}"

    async def replay_events_after(self, last_event_id, send_callback):
        name, _, last = last_event_id.partition("-")
        if name != self.name or not 0 < int(last) <= len(self.events):
            return None
        stream = self.events[int(last) - 1][0]
        for number, (of, message) in enumerate(self.events[int(last) :], start=int(last) + 1):
            if of == stream and message is not None:
                await send_callback(EventMessage(message, f"{name}-{number}"))
        return stream


class SessionManager(StreamableHTTPSessionManager):
    """Gives each session a memory of its own. The package gives all sessions the same, in which streams are told apart by
    the ids of requests, and those repeat from session to session."""

    event_store = property(lambda _self: Memory(), lambda _self, _value: None)


async def show(_request) -> JSONResponse:
    return JSONResponse({**seen, "sessions": len(counters), "counters": sum(counters.values())})


application = server.streamable_http_app(event_store=Memory(), retry_interval=100)
server.session_manager.__class__ = SessionManager
application.router.routes.extend(server.sse_app().routes)
application.add_route("/seen", show)

if __name__ == "__main__":
    listening, _ = serving.reserve_port()
    serving.serve(application, listening)
