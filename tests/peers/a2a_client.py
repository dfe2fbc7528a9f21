"""Scenarios of the official A2A client and of A2A on the wire: a2a_client.py URL SCENARIO.. (transcript.py says what is
printed). Clients go where the agent card sends them, so the card must name the address of the proxy; with A2A_STAY=1
they stay at URL whatever the card says."""

import asyncio
import os
import uuid

import httpx
from a2a.client import A2ACardResolver, ClientConfig, create_client
from a2a.helpers.proto_helpers import new_text_message
from a2a.types.a2a_pb2 import (
    CancelTaskRequest,
    GetTaskRequest,
    Role,
    SendMessageConfiguration,
    SendMessageRequest,
    SubscribeToTaskRequest,
    TaskState,
)

import transcript
from transcript import until


class Context:
    def __init__(self, url: str) -> None:
        self.url = url

    def http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(trust_env=False, timeout=60)

    async def client(self, binding="JSONRPC", version="1.0", streaming=True):
        """A client of this binding, as the card of the agent advertises it."""
        http = self.http()
        card = await A2ACardResolver(http, self.url).get_agent_card()
        kept = [
            each
            for each in card.supported_interfaces
            if each.protocol_binding == binding and each.protocol_version == version
        ]
        for each in kept if os.environ.get("A2A_STAY") else []:
            each.url = self.url + httpx.URL(each.url).path
        del card.supported_interfaces[:]
        card.supported_interfaces.extend(kept)
        config = ClientConfig(
            streaming=streaming, httpx_client=http, supported_protocol_bindings=["JSONRPC", "HTTP+JSON"]
        )
        return await create_client(card, config)

    async def call(self, method: str, params: dict, id: object = 1, version: str | None = "1.0") -> dict:
        headers = {"a2a-version": version} if version else {}
        body = {"jsonrpc": "2.0", "id": id, "method": method, "params": params}
        async with self.http() as http:
            answer = await http.post(f"{self.url}/", json=body, headers=headers)
            return {"status": answer.status_code, **answer.json()}


def say(text: str, context: str | None = None, task: str | None = None, at_once=False) -> SendMessageRequest:
    message = new_text_message(text, context_id=context, task_id=task, role=Role.ROLE_USER)
    return SendMessageRequest(message=message, configuration=SendMessageConfiguration(return_immediately=at_once))


def shown(event) -> list:
    """What an event says, without the ids."""
    kind = event.WhichOneof("payload")
    value = getattr(event, kind)
    if kind == "message":
        return [kind, [part.text for part in value.parts]]
    if kind == "artifact_update":
        return [kind, [part.text for part in value.artifact.parts]]
    texts = [part.text for artifact in getattr(value, "artifacts", []) for part in artifact.parts]
    return [kind, TaskState.Name(value.status.state), *texts]


async def exchange(client, request) -> list:
    return [shown(event) async for event in client.send_message(request)]


async def first_task(client, request):
    """The ids of the task that a message starts; the stream is left at once."""
    stream = client.send_message(request)
    async for event in stream:
        task = event.task
        await stream.aclose()
        return task.id, task.context_id


async def state(client, task: str) -> str:
    return TaskState.Name((await client.get_task(GetTaskRequest(id=task))).status.state)


async def becomes(client, task: str, wanted: str) -> str:
    async def reached():
        return await state(client, task) == wanted

    await until(f"task {task} becomes {wanted}", reached)
    return wanted


async def refused(call):
    """The name of the error with which a call is refused."""
    try:
        await call
        return "accepted"
    except Exception as error:
        return type(error).__name__


async def conversation(client) -> dict:
    plain = await exchange(client, say("hi"))
    long = await exchange(client, say("long 0.5"))
    failed = await exchange(client, say("fail"))
    # A context that the server makes is kept by what follows in it.
    asked = [event async for event in client.send_message(say("ask"))]
    last = asked[-1]
    task = last.task if last.WhichOneof("payload") == "task" else last.status_update
    task_id = task.id if last.WhichOneof("payload") == "task" else task.task_id
    answered = await exchange(client, say("blue", task.context_id, task_id))
    counted = [await exchange(client, say("count", task.context_id)) for _ in range(3)]
    return {
        "plain": plain,
        "long": long,
        "failed": failed,
        "asked": [shown(event) for event in asked],
        "answered": answered,
        "counted": [counts[-2:] for counts in counted],
        "task": await state(client, task_id),
    }


async def rpc(context: Context):
    return await conversation(await context.client())


async def rpc_blocking(context: Context):
    return await conversation(await context.client(streaming=False))


async def rpc_0_3(context: Context):
    return await conversation(await context.client(version="0.3"))


async def rest(context: Context):
    return await conversation(await context.client("HTTP+JSON"))


async def contexts(context: Context):
    """Twenty contexts, made by the client, each counted by itself."""
    client = await context.client(streaming=False)

    async def one():
        name, counts = str(uuid.uuid4()), []
        for _ in range(4):
            counts.append((await exchange(client, say("count", name)))[-1][-1])
        return counts

    return await asyncio.gather(*(one() for _ in range(20)))


async def background(client) -> dict:
    """A task that is left at once goes on and is found again by its id."""
    left, _ = await first_task(client, say("long 3", at_once=True))
    cut, _ = await first_task(client, say("long 3"))
    early = [await state(client, left), await state(client, cut)]
    return {
        "early": [each in ("TASK_STATE_SUBMITTED", "TASK_STATE_WORKING") for each in early],
        "left": await becomes(client, left, "TASK_STATE_COMPLETED"),
        "cut": await becomes(client, cut, "TASK_STATE_COMPLETED"),
    }


async def rpc_background(context: Context):
    return await background(await context.client())


async def rest_background(context: Context):
    return await background(await context.client("HTTP+JSON"))


async def cancelled(client) -> dict:
    task, _ = await first_task(client, say("long 60", at_once=True))
    answer = await client.cancel_task(CancelTaskRequest(id=task))
    return {
        "answer": TaskState.Name(answer.status.state),
        "state": await becomes(client, task, "TASK_STATE_CANCELED"),
        "again": await refused(client.cancel_task(CancelTaskRequest(id=task))),
        "unknown": await refused(client.get_task(GetTaskRequest(id="nothing"))),
    }


async def rpc_cancel(context: Context):
    return await cancelled(await context.client())


async def rest_cancel(context: Context):
    return await cancelled(await context.client("HTTP+JSON"))


async def resubscribe(context: Context):
    """Two that join a running task see it end."""
    client = await context.client()
    task, _ = await first_task(client, say("long 3", at_once=True))

    async def join():
        events = [shown(event) async for event in client.subscribe(SubscribeToTaskRequest(id=task))]
        return [events[0][0], events[-1]]

    joined = await asyncio.gather(join(), join())

    async def late():
        async for _ in client.subscribe(SubscribeToTaskRequest(id=task)):
            pass

    return {"joined": joined, "late": await refused(late())}


async def wire(context: Context):
    """Errors come with status 200; ids of requests keep their kind."""
    unknown = await context.call("GetTask", {"id": "nothing"}, id="one")
    number = await context.call("GetTask", {"id": "nothing"}, id=1)
    unversioned = await context.call("GetTask", {"id": "nothing"}, version=None)
    old = await context.call("tasks/get", {"id": "nothing"}, version=None)
    return [[answer["status"], answer["id"], answer["error"]["code"]] for answer in (unknown, number, unversioned, old)]


async def card(context: Context):
    """The card names this address and no other."""
    async with context.http() as http:
        answer = await http.get(f"{context.url}/.well-known/agent-card.json")
    urls = [each["url"] for each in answer.json()["supportedInterfaces"]]
    return {"status": answer.status_code, "here": [url.startswith(context.url + "/") for url in urls]}


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in [
        rpc, rpc_blocking, rpc_0_3, rest, contexts, rpc_background, rest_background, rpc_cancel, rest_cancel,
        resubscribe, wire, card,
    ]
}  # fmt: skip

if __name__ == "__main__":
    asyncio.run(transcript.run(SCENARIOS, Context))
