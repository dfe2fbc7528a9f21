// A chat server of the AI SDK, without a model: POST /api/chat streams UI messages, GET /api/chat/{id}/stream joins the
// stream that is running, POST /api/chat/{id}/stop stops it; on /seen what it has done, for the tests. A chat's history
// and its running stream are in memory. It ends with its standard input (see serving.py).
import http from "node:http";
import { load, sleep } from "./packages.mjs";

const { createUIMessageStream, pipeUIMessageStreamToResponse, JsonToSseTransformStream, UI_MESSAGE_STREAM_HEADERS } =
  load("ai");

const seen = { posts: 0, joins: 0, running: 0, stopped: 0 };
/** By chat id: how many messages it has had, and the stream that runs: its chunks so far and who waits for more. */
const chats = new Map();

function chat(id) {
  if (!chats.has(id)) chats.set(id, { turns: 0, stream: null });
  return chats.get(id);
}

/** What the text of the last message asks for: `long SECONDS`, `fail`, or an echo with the number of the turn. */
function answer(text, turn, stop) {
  return createUIMessageStream({
    execute: async ({ writer }) => {
      const stopped = new Promise((resolve) => stop.addEventListener("abort", resolve));
      writer.write({ type: "start", messageId: crypto.randomUUID() });
      writer.write({ type: "start-step" });
      writer.write({ type: "text-start", id: "text" });
      const long = text.startsWith("long ");
      const parts = long ? Array.from({ length: 10 }, (_, step) => `${step} `) : [`turn ${turn}: `, text];
      for (const delta of parts) {
        if (long) await Promise.race([sleep((Number(text.slice(5)) * 1000) / 10), stopped]);
        if (stop.aborted) {
          writer.write({ type: "abort" });
          return;
        }
        writer.write({ type: "text-delta", id: "text", delta });
        if (text === "fail") throw new Error("boom");
      }
      writer.write({ type: "text-end", id: "text" });
      writer.write({ type: "finish-step" });
      writer.write({ type: "finish" });
    },
    onError: (error) => error.message,
  });
}

/** Reads the answer to its end, whether or not somebody listens. */
async function keep(state, source) {
  seen.running++;
  const stream = state.stream;
  const reader = source.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    stream.chunks.push(value);
    stream.waiting.splice(0).forEach((wake) => wake());
  }
  stream.ended = true;
  stream.waiting.splice(0).forEach((wake) => wake());
  if (state.stream === stream) state.stream = null;
  seen.running--;
}

function follow(stream) {
  let position = 0;
  return new ReadableStream({
    async pull(controller) {
      while (position === stream.chunks.length && !stream.ended) {
        await new Promise((wake) => stream.waiting.push(wake));
      }
      if (position < stream.chunks.length) controller.enqueue(stream.chunks[position++]);
      else controller.close();
    },
  });
}

async function body(request) {
  let text = "";
  for await (const part of request) text += part;
  return JSON.parse(text);
}

const server = http.createServer(async (request, response) => {
  const path = new URL(request.url, "http://server").pathname;
  const [, api, kind, id, verb] = path.split("/");
  if (path === "/seen") {
    response.setHeader("content-type", "application/json").end(JSON.stringify({ ...seen, chats: chats.size }));
  } else if (request.method === "POST" && path === "/api/chat") {
    const { id, messages } = await body(request);
    seen.posts++;
    const state = chat(id);
    state.turns++;
    const stop = new AbortController();
    state.stream = { chunks: [], waiting: [], ended: false, stop };
    const joined = follow(state.stream);
    const text = messages.at(-1).parts.map((part) => part.text).join("");
    keep(state, answer(text, state.turns, stop.signal));
    pipeUIMessageStreamToResponse({ response, stream: joined });
  } else if (api === "api" && kind === "chat" && verb === "stream") {
    const running = chats.get(decodeURIComponent(id))?.stream;
    if (running == null) {
      response.writeHead(204).end();
      return;
    }
    seen.joins++;
    response.writeHead(200, UI_MESSAGE_STREAM_HEADERS);
    for await (const part of follow(running).pipeThrough(new JsonToSseTransformStream())) response.write(part);
    response.end();
  } else if (api === "api" && kind === "chat" && verb === "stop") {
    const running = chats.get(decodeURIComponent(id))?.stream;
    if (running) {
      seen.stopped++;
      running.stop.abort();
    }
    response.writeHead(running ? 202 : 404).end();
  } else {
    response.writeHead(404).end();
  }
});

server.listen(0, "127.0.0.1", () => console.log(`port ${server.address().port}`));
process.stdin.resume().on("end", () => process.exit(0));
