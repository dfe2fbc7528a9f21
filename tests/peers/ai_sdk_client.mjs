// Scenarios of the AI SDK's chat transport: ai_sdk_client.mjs URL SCENARIO.. (transcript.py says what is printed).
import { load, run, until } from "./packages.mjs";

const { DefaultChatTransport, readUIMessageStream } = load("ai");

const transport = (url) => new DefaultChatTransport({ api: `${url}/api/chat` });

function send(url, chatId, text, abortSignal = undefined) {
  const messages = [{ id: crypto.randomUUID(), role: "user", parts: [{ type: "text", text }] }];
  return transport(url).sendMessages({ chatId, messages, trigger: "submit-message", messageId: undefined, abortSignal });
}

/** The chunks of a stream, without the ids. */
async function chunks(stream) {
  const seen = [];
  for await (const { messageId, ...chunk } of stream) seen.push(chunk);
  return seen;
}

/** The text of the message that a stream builds. */
async function message(stream) {
  let last;
  for await (const each of readUIMessageStream({ stream })) last = each;
  return last.parts.filter((part) => part.type === "text").map((part) => part.text).join("");
}

async function text(url) {
  const id = crypto.randomUUID();
  return [await chunks(await send(url, id, "hi")), await message(await send(url, id, "long 0.5"))];
}

/** Twenty chats at once, each counted by itself. */
async function chats(url) {
  const one = async () => {
    const id = crypto.randomUUID();
    const seen = [];
    for (let turn = 0; turn < 4; turn++) seen.push(await message(await send(url, id, "x")));
    return seen;
  };
  return Promise.all(Array.from({ length: 20 }, one));
}

async function fail(url) {
  return chunks(await send(url, crypto.randomUUID(), "fail"));
}

/** A stream is left; who comes back finds it running, from its start; afterwards there is none. */
async function resume(url) {
  const one = async () => {
    const chatId = crypto.randomUUID();
    const reader = (await send(url, chatId, "long 4")).getReader();
    for (let count = 0; count < 5; count++) await reader.read();
    await reader.cancel();
    const joined = await transport(url).reconnectToStream({ chatId });
    const whole = await message(joined);
    const after = await until("the stream is over", async () => (await transport(url).reconnectToStream({ chatId })) === null);
    return { whole, after, next: await message(await send(url, chatId, "next")) };
  };
  return Promise.all(Array.from({ length: 6 }, one));
}

/** Nothing runs in a chat that never was. */
async function nothing(url) {
  return transport(url).reconnectToStream({ chatId: crypto.randomUUID() });
}

/** Stopped by the application's own call, the stream says so and ends. */
async function stop(url) {
  const chatId = crypto.randomUUID();
  const stream = await send(url, chatId, "long 60");
  const reader = stream.getReader();
  for (let count = 0; count < 2; count++) await reader.read();
  const answer = await fetch(`${url}/api/chat/${chatId}/stop`, { method: "POST" });
  let last;
  for (let part = await reader.read(); !part.done; part = await reader.read()) last = part.value;
  return { status: answer.status, last };
}

await run({ text, chats, fail, resume, nothing, stop });
