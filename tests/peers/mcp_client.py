"""Scenarios of the official Python client of MCP: mcp_client.py URL SCENARIO.. (transcript.py says what is printed)."""

import asyncio
import ssl
from contextlib import asynccontextmanager

import httpx2
from mcp import Client, MCPError
from mcp.client.sse import sse_client
from mcp.client.streamable_http import streamable_http_client
from mcp_types import ElicitResult

import transcript
from transcript import alone, until

STATELESS = "2026-07-28"


class Context:
    def __init__(self, url: str) -> None:
        self.url = url
        self.certificates = ssl.create_default_context()

    def session(self, **more) -> Client:
        """A client of the session era."""
        return Client(f"{self.url}/mcp", mode="legacy", **more)

    @asynccontextmanager
    async def one_of_many(self):
        """As `session`, without reading the certificates of the system once more, which costs more than all else."""
        async with httpx2.AsyncClient(trust_env=False, timeout=60, verify=self.certificates) as http:
            async with Client(streamable_http_client(f"{self.url}/mcp", http_client=http), mode="legacy") as client:
                yield client

    def stateless(self) -> Client:
        return Client(f"{self.url}/mcp", mode=STATELESS)

    def sse(self) -> Client:
        return Client(sse_client(f"{self.url}/sse"), mode="legacy")

    async def post(self, json: dict, **headers) -> httpx2.Response:
        accept = {"accept": "application/json, text/event-stream"}
        async with httpx2.AsyncClient(trust_env=False, timeout=60) as http:
            return await http.post(f"{self.url}/mcp", json=json, headers={**accept, **headers})


def value(result):
    return "".join(part.text for part in result.content), result.is_error


async def counts(client: Client, times: int) -> list:
    return [value(await client.call_tool("count"))[0] for _ in range(times)]


async def tools(client: Client) -> list:
    return sorted(tool.name for tool in (await client.list_tools()).tools)


async def session(context: Context):
    async with context.session() as client:
        return {
            "version": client.protocol_version,
            "tools": await tools(client),
            "counts": await counts(client, 5),
            "add": value(await client.call_tool("add", {"first": 2, "second": 3})),
            "fail": value(await client.call_tool("fail")),
            "unknown": value(await client.call_tool("nothing")),
        }


async def sessions(context: Context):
    """Twenty sessions, opened at once, each with its own counter."""

    async def one():
        async with context.session() as client:
            return await counts(client, 5)

    return await asyncio.gather(*(one() for _ in range(20)))


async def progress(context: Context):
    steps = []

    async def note(progress, total, _message):
        steps.append([progress, total])

    async with context.session() as client:
        result = await client.call_tool("slow", {"seconds": 1}, progress_callback=note)
        return {"steps": steps, "result": value(result), "counts": await counts(client, 1)}


async def at_once(context: Context):
    """Several calls of one session at the same time."""
    async with context.session() as client:
        calls = [client.call_tool("slow", {"seconds": 0.5}) for _ in range(5)]
        results = await asyncio.gather(*calls, *(client.call_tool("count") for _ in range(3)))
        return sorted(value(result)[0] for result in results)


async def polled(context: Context):
    """The server closes the stream; the answer comes on a GET with Last-Event-ID."""
    async with context.session() as client:
        return value(await client.call_tool("polled"))


async def elicitation(context: Context):
    """The server asks in the middle of a call; the answer is a POST of its own and must reach the same server."""

    async def answer(_context, _params):
        return ElicitResult(action="accept", content={"name": "ada"})

    async with context.session(elicitation_callback=answer) as client:
        return value(await client.call_tool("greet"))


async def stateless(context: Context):
    async with context.stateless() as client:
        return {
            "version": client.protocol_version,
            "tools": await tools(client),
            "counts": await counts(client, 3),
            "add": value(await client.call_tool("add", {"first": 2, "second": 3})),
            "slow": value(await client.call_tool("slow", {"seconds": 0.5})),
        }


async def discovered(context: Context):
    """A client that asks the server for its versions first."""
    async with Client(f"{context.url}/mcp") as client:
        return {"version": client.protocol_version, "counts": await counts(client, 2)}


async def stateless_errors(context: Context):
    """Errors of the stateless version; an unknown method is a 404 that says nothing about a session."""
    prefix = "io.modelcontextprotocol"
    client = {"name": "test", "version": "1"}
    meta = {
        "_meta": {
            f"{prefix}/protocolVersion": STATELESS,
            f"{prefix}/clientInfo": client,
            f"{prefix}/clientCapabilities": {},
        }
    }
    headers = {"mcp-protocol-version": STATELESS}
    unknown = await context.post(
        {"jsonrpc": "2.0", "id": 1, "method": "no/such", "params": meta}, **headers, **{"mcp-method": "no/such"}
    )
    mismatch = await context.post(
        {"jsonrpc": "2.0", "id": "1", "method": "tools/list", "params": meta}, **headers, **{"mcp-method": "tools/call"}
    )
    return [[answer.status_code, answer.json()["id"], answer.json()["error"]["code"]] for answer in (unknown, mismatch)]


async def session_errors(context: Context):
    """No id is learned from a refusal; ids that never were, and that were, are 404."""
    ping = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
    missing = await context.post(ping)
    unknown = await context.post(ping, **{"mcp-session-id": "0123456789abcdef0123456789abcdef"})
    bogus = missing.headers.get("mcp-session-id")
    after = await context.post(ping, **{"mcp-session-id": bogus}) if bogus else unknown
    return [answer.status_code for answer in (missing, unknown, after)]


async def deleted(context: Context):
    start = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "initialize",
        "params": {
            "protocolVersion": "2025-11-25",
            "capabilities": {},
            "clientInfo": {"name": "test", "version": "1"},
        },
    }
    answer = await context.post(start)
    headers = {"mcp-session-id": answer.headers["mcp-session-id"], "mcp-protocol-version": "2025-11-25"}
    ready = await context.post({"jsonrpc": "2.0", "method": "notifications/initialized"}, **headers)
    ping = {"jsonrpc": "2.0", "id": 2, "method": "ping"}
    alive = await context.post(ping, **headers)
    async with httpx2.AsyncClient(trust_env=False, timeout=60) as http:
        ended = await http.delete(f"{context.url}/mcp", headers=headers)
    gone = await context.post(ping, **headers)
    return [answer.status_code for answer in (answer, ready, alive, ended, gone)]


async def sse(context: Context):
    """HTTP+SSE: requests go in by POST, answers come out on the stream of the session."""

    async def one():
        async with context.sse() as client:
            return await counts(client, 4) + [value(await client.call_tool("slow", {"seconds": 0.3}))[0]]

    return await asyncio.gather(*(one() for _ in range(5)))


def session_is_lost(error: MCPError) -> bool:
    """What MCP says of a 404 with a session id: start a new session. The client shows it so, or the error in its body."""
    return any(word in str(error).lower() for word in ("session terminated", "session not found", "session_lost"))


@alone
async def many(context: Context, count: str, calls: str):
    """Many sessions that are open at the same time; the number of those whose counter was ever wrong."""
    wrong, opened, everyone = 0, 0, asyncio.Event()

    async def one():
        nonlocal wrong, opened
        async with context.one_of_many() as client:
            opened += 1
            if opened == int(count):
                everyone.set()
            await everyone.wait()
            wrong += await counts(client, int(calls)) != [str(number + 1) for number in range(int(calls))]

    await asyncio.gather(*(one() for _ in range(int(count))))
    return {"sessions": opened, "wrong": wrong}


@alone
async def survive(context: Context, count: str):
    """Sessions that go on while a server is killed: the line `ready` asks for it, the next line of input says that it is
    done. A session whose server is gone is told so and starts again; the others notice nothing."""
    lost, untouched, broken = 0, 0, []

    async def one():
        nonlocal lost, untouched
        async with context.one_of_many() as client:
            before = await counts(client, 2)
            ready.append(before)
            await killed.wait()
            try:
                after = await counts(client, 2)
                untouched += after == ["3", "4"]
                if after != ["3", "4"]:
                    broken.append(after)
                return
            except MCPError as error:
                if not session_is_lost(error):
                    broken.append(str(error))
                    return
        async with context.one_of_many() as client:
            again = await counts(client, 2)
            lost += again == ["1", "2"]
            if again != ["1", "2"]:
                broken.append(again)

    async def kill():
        async def everyone():
            return len(ready) == int(count)

        await until("every session is open", everyone, 150)
        print("ready", flush=True)
        await asyncio.to_thread(input)
        killed.set()

    ready, killed = [], asyncio.Event()
    await asyncio.gather(kill(), *(one() for _ in range(int(count))))
    return {"restarted": lost, "untouched": untouched, "broken": broken}


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in [
        session, sessions, progress, at_once, polled, elicitation, stateless, discovered, stateless_errors,
        session_errors, deleted, sse, many, survive,
    ]
}  # fmt: skip

if __name__ == "__main__":
    asyncio.run(transcript.run(SCENARIOS, Context))
