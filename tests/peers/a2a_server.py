"""An A2A agent without a model: JSON-RPC 1.0 and 0.3 on /, REST under /rest, and on /seen what it has done, for the tests.

What a message's text asks for: `hi` is answered by a plain message, `long SECONDS` streams ten parts, `fail` fails,
`ask` needs input, `count` tells how many messages of this context came here."""

import asyncio
from collections import Counter

from a2a.helpers.proto_helpers import new_task, new_text_message, new_text_part
from a2a.server.agent_execution import AgentExecutor
from a2a.server.request_handlers import DefaultRequestHandler
from a2a.server.routes import create_agent_card_routes, create_jsonrpc_routes, create_rest_routes
from a2a.server.tasks import InMemoryTaskStore, TaskUpdater
from a2a.types.a2a_pb2 import AgentCapabilities, AgentCard, AgentInterface, AgentSkill, TaskState
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

import serving

seen = {"messages": 0, "tasks": 0, "running": 0, "cancelled": 0}
contexts: Counter = Counter()


class Agent(AgentExecutor):
    async def execute(self, context, event_queue):
        seen["messages"] += 1
        contexts[context.context_id] += 1
        text = context.get_user_input().strip()
        asked = context.current_task is not None
        if text == "hi":
            await event_queue.enqueue_event(new_text_message("hello", context_id=context.context_id))
            return
        updater = TaskUpdater(event_queue, context.task_id, context.context_id)
        if not asked:
            seen["tasks"] += 1
            task = new_task(
                context.task_id, context.context_id, TaskState.TASK_STATE_SUBMITTED, history=[context.message]
            )
            await event_queue.enqueue_event(task)
        seen["running"] += 1
        try:
            await self.work(text, asked, context, updater)
        finally:
            seen["running"] -= 1

    async def work(self, text, asked, context, updater):
        await updater.start_work()
        if asked:
            await updater.add_artifact([new_text_part(f"answered {text}")], name="answer")
        elif text == "fail":
            await updater.failed(updater.new_agent_message([new_text_part("boom")]))
            return
        elif text == "ask":
            await updater.requires_input(updater.new_agent_message([new_text_part("which one?")]))
            return
        elif text == "count":
            await updater.add_artifact([new_text_part(str(contexts[context.context_id]))], name="count")
        else:
            seconds = float(text.removeprefix("long "))
            for step in range(10):
                await asyncio.sleep(seconds / 10)
                await updater.add_artifact(
                    [new_text_part(f"{step} ")], name="parts", artifact_id="parts", append=step > 0, last_chunk=step == 9
                )
        await updater.complete()

    async def cancel(self, context, event_queue):
        seen["cancelled"] += 1
        await TaskUpdater(event_queue, context.task_id, context.context_id).cancel()


def interface(url: str, binding: str, version: str) -> AgentInterface:
    return AgentInterface(url=url, protocol_binding=binding, protocol_version=version)


def application(url: str) -> Starlette:
    card = AgentCard(
        name="counter",
        description="An agent for tests",
        version="1.0.0",
        supported_interfaces=[
            interface(f"{url}/", "JSONRPC", "1.0"),
            interface(f"{url}/", "JSONRPC", "0.3"),
            interface(f"{url}/rest", "HTTP+JSON", "1.0"),
        ],
        capabilities=AgentCapabilities(streaming=True),
        default_input_modes=["text/plain"],
        default_output_modes=["text/plain"],
        skills=[AgentSkill(id="count", name="count", description="counts", tags=["test"])],
    )
    handler = DefaultRequestHandler(agent_executor=Agent(), task_store=InMemoryTaskStore(), agent_card=card)
    return Starlette(
        routes=[
            Route("/seen", lambda _request: JSONResponse({**seen, "contexts": len(contexts)})),
            *create_agent_card_routes(card),
            *create_rest_routes(handler, path_prefix="/rest", enable_v0_3_compat=True),
            *create_jsonrpc_routes(handler, "/", enable_v0_3_compat=True),
        ]
    )


if __name__ == "__main__":
    listening, port = serving.reserve_port()
    serving.serve(application(f"http://127.0.0.1:{port}"), listening)
