// Scenarios of the official TypeScript client of MCP: mcp_client.mjs URL SCENARIO.. (transcript.py says what is printed).
import { load, run, sleep } from "./packages.mjs";

const { Client } = load("@modelcontextprotocol/sdk/client/index.js");
const { StreamableHTTPClientTransport } = load("@modelcontextprotocol/sdk/client/streamableHttp.js");
const { SSEClientTransport } = load("@modelcontextprotocol/sdk/client/sse.js");
const { ElicitRequestSchema } = load("@modelcontextprotocol/sdk/types.js");

async function connect(url, capabilities = {}) {
  const client = new Client({ name: "test", version: "1" }, { capabilities });
  const transport = new StreamableHTTPClientTransport(new URL(`${url}/mcp`));
  if (capabilities.elicitation) {
    client.setRequestHandler(ElicitRequestSchema, () => ({ action: "accept", content: { name: "ada" } }));
  }
  await client.connect(transport);
  return { client, transport };
}

async function call(client, name, args = {}, options = undefined) {
  const result = await client.callTool({ name, arguments: args }, undefined, options);
  return result.content.map((part) => part.text).join("");
}

async function counts(client, times) {
  const seen = [];
  for (let number = 0; number < times; number++) seen.push(await call(client, "count"));
  return seen;
}

async function session(url) {
  const { client, transport } = await connect(url);
  const tools = (await client.listTools()).tools.map((tool) => tool.name).sort();
  const seen = [tools, await counts(client, 5), await call(client, "add", { first: 2, second: 3 })];
  await transport.terminateSession();
  await client.close();
  return seen;
}

/** Twenty sessions at once, each with its own counter. */
async function sessions(url) {
  const one = async () => {
    const { client } = await connect(url);
    const seen = await counts(client, 5);
    await client.close();
    return seen;
  };
  return Promise.all(Array.from({ length: 20 }, one));
}

async function progress(url) {
  const { client } = await connect(url);
  const steps = [];
  const result = await call(client, "slow", { seconds: 1 }, { onprogress: (at) => steps.push(at.progress) });
  return { result, steps };
}

/** A call that its caller cancels: the session goes on. */
async function cancel(url) {
  const { client } = await connect(url);
  const abort = new AbortController();
  const call_ = call(client, "slow", { seconds: 60 }, { signal: abort.signal });
  await sleep(300);
  abort.abort("enough");
  const outcome = await call_.then(
    () => "done",
    () => "aborted",
  );
  return { outcome, counts: await counts(client, 2) };
}

/** The answer comes on a GET with Last-Event-ID. */
async function polled(url) {
  const { client } = await connect(url);
  return call(client, "polled");
}

/** The server asks in the middle of a call. */
async function elicitation(url) {
  const { client } = await connect(url, { elicitation: {} });
  return call(client, "greet");
}

/** A session that its client ended is gone. */
async function ended(url) {
  const { client, transport } = await connect(url);
  const id = transport.sessionId;
  await counts(client, 1);
  await transport.terminateSession();
  const answer = await fetch(`${url}/mcp`, {
    method: "POST",
    headers: {
      "content-type": "application/json",
      accept: "application/json, text/event-stream",
      "mcp-session-id": id,
    },
    body: JSON.stringify({ jsonrpc: "2.0", id: 9, method: "ping" }),
  });
  return answer.status;
}

async function sse(url) {
  const one = async () => {
    const client = new Client({ name: "test", version: "1" });
    await client.connect(new SSEClientTransport(new URL(`${url}/sse`)));
    const seen = await counts(client, 4);
    await client.close();
    return seen;
  };
  return Promise.all(Array.from({ length: 5 }, one));
}

await run({ session, sessions, progress, cancel, polled, elicitation, ended, sse });
