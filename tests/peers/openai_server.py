"""A scripted server in the shape of the OpenAI API, with its state in memory: Responses (plain, stream, background,
WebSocket), conversations, Chat Completions; on /seen what it has done, for the tests.

The input says what happens: `long SECONDS` makes ten parts in that time, `fail` fails (in a stream after its beginning),
anything else is answered by `turn N: ` and the input, where N counts what came before in the conversation."""

import asyncio
import json
import time
import uuid

from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocketDisconnect

import serving

seen = {"responses": 0, "completions": 0, "running": 0, "left": 0, "cancelled": 0}
responses: dict[str, "Response"] = {}
conversations: dict[str, list[str]] = {}


class NotFound(Exception):
    pass


class Response:
    """One response: its object, and every event of it so far for those who join."""

    def __init__(self, body: dict) -> None:
        seen["responses"] += 1
        before = body.get("previous_response_id")
        if before is not None and before not in responses:
            raise NotFound(f"Previous response with id '{before}' not found.")
        conversation = body.get("conversation")
        if isinstance(conversation, dict):
            conversation = conversation["id"]
        if conversation is not None and conversation not in conversations:
            raise NotFound(f"Conversation with id '{conversation}' not found.")
        self.text = body["input"] if isinstance(body["input"], str) else body["input"][-1]["content"]
        if conversation is not None:
            conversations[conversation].append(self.text)
            self.turn = len(conversations[conversation])
        else:
            self.turn = responses[before].turn + 1 if before else 1
        self.object = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": time.time(),
            "status": "queued" if body.get("background") else "in_progress",
            "background": bool(body.get("background")),
            "model": body["model"],
            "output": [],
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "previous_response_id": before,
            "conversation": {"id": conversation} if conversation else None,
        }
        self.lane = body.get("stream_id")
        self.events: list[dict] = []
        self.changed = asyncio.Condition()
        responses[self.object["id"]] = self
        self.task = asyncio.create_task(self.run())

    @property
    def ended(self) -> bool:
        return self.object["status"] in ("completed", "failed", "cancelled", "incomplete")

    async def event(self, kind: str, **more) -> None:
        event = {"type": kind, "sequence_number": len(self.events), **more}
        if kind.startswith("response.") and not more:
            event["response"] = json.loads(json.dumps(self.object))
        if self.lane is not None:
            event["stream_id"] = self.lane
        async with self.changed:
            self.events.append(event)
            self.changed.notify_all()

    async def run(self) -> None:
        seen["running"] += 1
        try:
            await self.event("response.created")
            if self.object["background"]:
                await self.event("response.queued")
            self.object["status"] = "in_progress"
            await self.event("response.in_progress")
            await self.work()
        except asyncio.CancelledError:
            self.object["status"] = "cancelled"
            # Nobody waits for the last event of what is not in the background.
            async with self.changed:
                self.changed.notify_all()
        finally:
            seen["running"] -= 1

    async def work(self) -> None:
        message = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "status": "in_progress"}
        await self.event("response.output_item.added", output_index=0, item={**message, "content": []})
        if self.text == "fail":
            self.object["status"] = "failed"
            self.object["error"] = {"code": "server_error", "message": "boom"}
            await self.event("response.failed")
            return
        if self.text.startswith("long "):
            parts, pause = [f"{step} " for step in range(10)], float(self.text.removeprefix("long ")) / 10
        else:
            parts, pause = [f"turn {self.turn}: ", self.text], 0
        place = {"item_id": message["id"], "output_index": 0, "content_index": 0}
        for part in parts:
            await asyncio.sleep(pause)
            await self.event("response.output_text.delta", **place, delta=part, logprobs=[])
        content = [{"type": "output_text", "text": "".join(parts), "annotations": []}]
        self.object["output"] = [{**message, "status": "completed", "content": content}]
        self.object["status"] = "completed"
        await self.event("response.output_item.done", output_index=0, item=self.object["output"][0])
        await self.event("response.completed")

    async def follow(self, after: int = -1):
        """Every event behind this sequence number, until the end."""
        position = after + 1
        while True:
            async with self.changed:
                await self.changed.wait_for(lambda: position < len(self.events) or self.ended)
            while position < len(self.events):
                yield self.events[position]
                position += 1
            if self.ended and position >= len(self.events):
                return

    async def cancel(self) -> None:
        if not self.ended:
            seen["cancelled"] += 1
            self.task.cancel()
            await asyncio.wait([self.task])


def stream(response: Response, after: int = -1) -> StreamingResponse:
    async def lines():
        try:
            async for event in response.follow(after):
                yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
        finally:
            # Only a background response goes on without a reader.
            if not response.ended and not response.object["background"]:
                seen["left"] += 1
                response.task.cancel()

    return StreamingResponse(lines(), media_type="text/event-stream")


def error(status: int, message: str, code: str | None = None) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"error": {"message": message, "type": kind, "code": code}}
    return JSONResponse(body, status, headers={"x-should-retry": "false"})


async def create(request):
    body = await request.json()
    try:
        response = Response(body)
    except NotFound as problem:
        return error(400 if body.get("previous_response_id") else 404, str(problem), "previous_response_not_found")
    if body.get("stream"):
        return stream(response)
    if not body.get("background"):
        await asyncio.wait([response.task])
    return JSONResponse(response.object)


def known(request) -> Response | None:
    return responses.get(request.path_params["id"])


async def retrieve(request):
    if (response := known(request)) is None:
        return error(404, "Response not found.")
    if request.query_params.get("stream") == "true":
        return stream(response, int(request.query_params.get("starting_after", -1)))
    return JSONResponse(response.object)


async def cancel(request):
    if (response := known(request)) is None:
        return error(404, "Response not found.")
    if not response.object["background"]:
        return error(400, "Only background responses can be cancelled.")
    await response.cancel()
    return JSONResponse(response.object)


async def delete(request):
    if (response := known(request)) is None:
        return error(404, "Response not found.")
    await response.cancel()
    del responses[response.object["id"]]
    return JSONResponse({"id": response.object["id"], "object": "response", "deleted": True})


async def create_conversation(_request):
    name = f"conv_{uuid.uuid4().hex}"
    conversations[name] = []
    return JSONResponse({"id": name, "object": "conversation", "created_at": int(time.time()), "metadata": {}})


async def retrieve_conversation(request):
    name = request.path_params["id"]
    if name not in conversations:
        return error(404, "Conversation not found.")
    return JSONResponse({"id": name, "object": "conversation", "created_at": 0, "metadata": {}})


async def complete(request):
    seen["completions"] += 1
    body = await request.json()
    text = body["messages"][-1]["content"]
    base = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body["model"]}
    parts = [f"{step} " for step in range(10)] if text.startswith("long ") else ["heard: ", text]
    if not body.get("stream"):
        if text == "fail":
            return error(500, "boom")
        message = {"role": "assistant", "content": "".join(parts)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return JSONResponse({**base, "object": "chat.completion", "choices": [choice]})

    async def lines():
        seen["running"] += 1
        whole = False
        try:
            for part in parts:
                if text.startswith("long "):
                    await asyncio.sleep(float(text.removeprefix("long ")) / 10)
                delta = {"index": 0, "delta": {"content": part}, "finish_reason": None}
                yield chunk({**base, "object": "chat.completion.chunk", "choices": [delta]})
                if text == "fail":
                    yield chunk({"error": {"message": "boom", "type": "server_error", "code": None}})
                    whole = True
                    return
            last = {"index": 0, "delta": {}, "finish_reason": "stop"}
            yield chunk({**base, "object": "chat.completion.chunk", "choices": [last]})
            yield "data: [DONE]\n\n"
            whole = True
        finally:
            seen["running"] -= 1
            seen["left"] += not whole

    return StreamingResponse(lines(), media_type="text/event-stream")


def chunk(value: dict) -> str:
    return f"data: {json.dumps(value)}\n\n"


async def socket(websocket):
    """Frames of one lane are answered one after the other, lanes at the same time."""
    await websocket.accept()
    lanes: dict[str | None, asyncio.Queue] = {}
    workers = []

    async def work(queue: asyncio.Queue):
        while True:
            body = await queue.get()
            try:
                response = Response(body)
            except NotFound as problem:
                details = {"code": "previous_response_not_found", "message": str(problem), "type": "invalid_request_error"}
                await websocket.send_json({"type": "error", "status": 400, "error": details})
                continue
            mine.append(response)
            async for event in response.follow():
                await websocket.send_json(event)

    mine: list[Response] = []
    try:
        while True:
            frame = await websocket.receive_json()
            lane = frame.get("stream_id")
            if lane not in lanes:
                lanes[lane] = asyncio.Queue()
                workers.append(asyncio.create_task(work(lanes[lane])))
            lanes[lane].put_nowait(frame)
    except WebSocketDisconnect:
        pass
    finally:
        for worker in workers:
            worker.cancel()
        for response in mine:
            seen["left"] += not response.ended
            response.task.cancel()


application = Starlette(
    routes=[
        Route("/v1/responses", create, methods=["POST"]),
        Route("/v1/responses/{id}", retrieve, methods=["GET"]),
        Route("/v1/responses/{id}", delete, methods=["DELETE"]),
        Route("/v1/responses/{id}/cancel", cancel, methods=["POST"]),
        WebSocketRoute("/v1/responses", socket),
        Route("/v1/conversations", create_conversation, methods=["POST"]),
        Route("/v1/conversations/{id}", retrieve_conversation, methods=["GET"]),
        Route("/v1/chat/completions", complete, methods=["POST"]),
        Route("/seen", lambda _request: JSONResponse({**seen, "conversations": len(conversations)})),
    ]
)

if __name__ == "__main__":
    listening, _ = serving.reserve_port()
    serving.serve(application, listening)
