// The console's modules that need no page, by Node's own test runner: test_console_modules.py runs them.

import assert from "node:assert/strict";
import { test } from "node:test";

globalThis.sessionStorage = { getItem: () => null };
globalThis.document = { getElementById: () => ({}) };

const STATIC = "../../../services/gateway/console/static";
const { fromFile, toBlob, toFile } = await import(`${STATIC}/archive.js`);
const { excess, isAboutMedia } = await import(`${STATIC}/limits.js`);
const { bodyOf } = await import(`${STATIC}/request.js`);
const { Run } = await import(`${STATIC}/run.js`);
const { addChunk, emptyAnswer, events } = await import(`${STATIC}/sse.js`);
const { path, siblings, tip } = await import(`${STATIC}/tree.js`);
const { queued } = await import(`${STATIC}/observed.js`);
const { count, seconds } = await import(`${STATIC}/words.js`);

const streamOf = (...texts) => new Blob(texts).stream();
const chunk = (delta, reason = null) => ({ id: "chatcmpl-0123456789abcdef", choices: [{ index: 0, delta, finish_reason: reason }] });
const event = (id, value) => `id: ${id}\ndata: ${JSON.stringify(value)}\n\n`;
const blob = (size) => ({ size });
const LIMITS = { limit_mm_per_prompt: { image: 2, video: 0 }, max_body_bytes: 10 << 20, max_media_bytes: 1000 };

// ------------------------------------------------------------------------------------------------------------- words

test("numbers have their units", () => {
  assert.deepEqual([0.0012, 0.5, 12, 125].map(seconds), ["1.2 ms", "0.50 s", "12.0 s", "2 min"]);
  assert.deepEqual([count(1, "picture"), count(2, "delivery", "deliveries")], ["1 picture", "2 deliveries"]);
});

// -------------------------------------------------------------------------------------------------------------- tree

const turn = (id, parent) => [id, { id, parent }];

test("an edited message and a repeated answer are branches", () => {
  const turns = new Map([turn("a", null), turn("b", "a"), turn("c", "b"), turn("b2", "a"), turn("d", "b2"), turn("a2", null)]);
  assert.deepEqual(path(turns, "c").map((one) => one.id), ["a", "b", "c"]);
  assert.deepEqual(path(turns, "d").map((one) => one.id), ["a", "b2", "d"]);
  assert.deepEqual(path(turns, null), []);
  assert.deepEqual(siblings(turns, turns.get("b2")).map((one) => one.id), ["b", "b2"]);
  assert.deepEqual(siblings(turns, turns.get("a")).map((one) => one.id), ["a", "a2"]);
  assert.equal(tip(turns, "a"), "d", "the newest branch");
  assert.equal(tip(turns, "b"), "c");
});

// ------------------------------------------------------------------------------------------------------------ events

test("events keep their ids, and signs of life are none", async () => {
  const texts = ["id: 0\nda", "ta: 1\n\n: keep-alive\nid: 3-5-1\n", "data: 2\n\n: keep-alive\n\n", "data: [DONE]\n\ndata: cut"];
  const found = [];
  for await (const one of events(streamOf(...texts))) found.push([one.id, one.data]);
  assert.deepEqual(found, [["0", "1"], ["3-5-1", "2"], [null, "[DONE]"]]);
});

test("letters that are cut in two arrive whole", async () => {
  const bytes = new TextEncoder().encode('data: "ü"\n\n'), cut = bytes.indexOf(0xc3) + 1;
  const found = [];
  for await (const one of events(streamOf(bytes.slice(0, cut), bytes.slice(cut)))) found.push(one.data);
  assert.deepEqual(found, ['"ü"']);
});

const asked = () => ({ model: "m", system: "", fields: {}, key: "k", id: null, last: null, base: { reasoning: 0, content: 0 }, at: Date.now() });
const answer = () => ({ id: "t", chat: "c", ...emptyAnswer(asked()) });

test("chunks become an answer", () => {
  const made = answer();
  addChunk(made, chunk({ reasoning_content: "hm" }), 1);
  addChunk(made, chunk({ tool_calls: [{ index: 0, id: "x", function: { name: "f", arguments: '{"a"' } }] }), 2);
  addChunk(made, chunk({ tool_calls: [{ index: 0, function: { arguments: ":1}" } }] }), 3);
  addChunk(made, { ...chunk({}, "tool_calls"), usage: { prompt_tokens: 3, completion_tokens: 5 } }, 4);
  assert.deepEqual(made.calls, [{ id: "x", name: "f", args: '{"a":1}' }]);
  assert.deepEqual(made.stats, { prompt: 3, cached: 0, tokens: 5, thought: 0, first: 1, last: 3, total: null, reason: "tool_calls" });
});

// ------------------------------------------------------------------------------------------------------------ limits

const image = (size = 10) => ({ kind: "image", name: "p", blob: blob(size) });

test("the oldest pictures are those to leave out", () => {
  const older = [image(), image()], newer = [image()];
  assert.equal(excess(older, newer, null), null, "the limits are not known");
  assert.equal(excess([older[0]], newer, LIMITS), null);
  const over = excess(older, newer, LIMITS);
  assert.deepEqual([over.out, over.never], [[older[0]], false]);
  assert.match(over.why, /at most 2 pictures .*limit_mm_per_prompt.* would be 3/);
});

test("what no leaving out would mend says so", () => {
  const over = excess([], [image(), image(), image()], LIMITS);
  assert.equal(over.never, true);
  assert.match(over.why, /Remove 1 picture from this message/);
  assert.match(excess([], [{ kind: "video", blob: blob(1) }], LIMITS).why, /takes no videos/);
  assert.match(excess([], [image(9 << 20)], LIMITS).why, /max_body_bytes.*too large/);
});

test("files that are too large together leave out as many of the oldest as it takes", () => {
  const older = [image(3 << 20), image(3 << 20)], over = excess(older, [image(3 << 20)], { ...LIMITS, limit_mm_per_prompt: { image: 9, video: 9 } });
  assert.deepEqual(over.out, [older[0]]);
  assert.match(over.why, /max_body_bytes/);
});

test("refusals that pictures cause are known", () => {
  assert.ok(isAboutMedia({ status: 400, message: "too many image items in prompt (the setting limit_mm_per_prompt)" }));
  assert.ok(isAboutMedia({ status: 413 }));
  assert.ok(!isAboutMedia({ status: 400, message: "Bad", code: "invalid_value" }));
});

// ----------------------------------------------------------------------------------------------------------- archive

const medium = { kind: "image", name: "p.png", blob: new Blob([Uint8Array.from([1, 2, 3])], { type: "image/png" }) };
const encode = async (one) => `data:${one.type};base64,${Buffer.from(await one.arrayBuffer()).toString("base64")}`;
const CHAT = { id: "c", title: "Hi", created: 1, updated: 2, head: "t" };
const TURNS = [{ id: "u", chat: "c", parent: null, at: 1, role: "user", text: "Hi", media: [medium] }, { ...answer(), parent: "u", at: 2, content: "Hello", ended: true }];

test("what is exported can be imported", async () => {
  const [{ chat, turns }] = fromFile(await toFile([{ chat: CHAT, turns: TURNS }], encode), toBlob);
  assert.deepEqual(chat, CHAT);
  assert.equal(turns[1].content, "Hello");
  assert.equal(turns[1].ended, true);
  assert.deepEqual([...new Uint8Array(await turns[0].media[0].blob.arrayBuffer())], [1, 2, 3]);
});

test("a file that is none is refused in words", async () => {
  const good = JSON.parse(await toFile([{ chat: CHAT, turns: TURNS }], encode));
  const bad = (change) => {
    const file = structuredClone(good);
    change(file);
    return JSON.stringify(file);
  };
  for (const [text, why] of [
    ["{", /not JSON/], ["[]", /not an export/], ["null", /not an export/],
    [bad((file) => { file.version = 2; }), /version 2/],
    [bad((file) => { file.conversations = {}; }), /no list/],
    [bad((file) => { file.conversations[0].turns[1].parent = "x"; }), /before the one/],
    [bad((file) => { file.conversations[0].turns.reverse(); }), /before the one/],
    [bad((file) => { file.conversations[0].head = "x"; }), /head/],
    [bad((file) => { file.conversations[0].turns[0].role = "admin"; }), /role/],
    [bad((file) => { file.conversations[0].turns[0].text = 1; }), /no text/],
    [bad((file) => { file.conversations[0].turns[0].media[0].url = "data:text/html;base64,eA=="; }), /neither an image/],
    [bad((file) => { file.conversations[0].turns[0].media[0].url = "javascript:1"; }), /neither an image/],
  ]) assert.throws(() => fromFile(text, toBlob), why);
});

// ---------------------------------------------------------------------------------------------------------- requests

test("an answer goes on behind what it has said", async () => {
  const user = { role: "user", text: "Hi", media: [] }, made = { ...answer(), reasoning: "hm", content: "Hel" };
  made.asked.base = { reasoning: 2, content: 3 };
  made.content += " and what is new";
  const body = await bodyOf({ ...made.asked, system: "Be brief", fields: { seed: 1 } }, [user], made);
  assert.deepEqual(body.messages, [{ role: "system", content: "Be brief" }, { role: "user", content: "Hi" }, { role: "assistant", content: "Hel", reasoning_content: "hm" }]);
  assert.deepEqual([body.continue_final_message, body.seed], [true, 1]);
});

test("a picture that is left out says so", async () => {
  const body = await bodyOf(asked(), [{ role: "user", text: "And now?", media: [{ ...medium, out: true }] }]);
  assert.deepEqual(body.messages[0].content, [{ type: "text", text: "[picture left out]" }, { type: "text", text: "And now?" }]);
});

// -------------------------------------------------------------------------------------------------------------- runs

/** Answers requests one after another; `last` answers all that follow. */
function serve(...replies) {
  const seen = [];
  globalThis.fetch = async (url, { method = "GET", headers = {}, signal } = {}) => {
    seen.push({ url, method, headers });
    const reply = replies.length > 1 ? replies.shift() : replies[0];
    if (reply instanceof Error) throw reply;
    return reply(signal);
  };
  return seen;
}

const broken = new TypeError("Failed to fetch");
const stream = (...parts) => () => new Response(streamOf(...parts));
const refusal = (status, error = {}) => () => new Response(JSON.stringify({ error }), { status });
const hello = [event("0", chunk({ role: "assistant" })), event("2", chunk({ content: "Hel" }))];
const rest = [event("4", chunk({ content: "lo" })), event("5", chunk({}, "stop")), "data: [DONE]\n\n"];

async function until(isTrue) {
  while (!isTrue()) await new Promise((resolve) => { setTimeout(resolve, 1); });
}

async function run(made = answer()) {
  let changes = 0;
  await new Run(made, async () => ({ messages: [] }), () => { changes += 1; }).drive();
  assert.ok(changes > 0);
  return made;
}

test("a stream that breaks goes on behind its last event, at whatever answers", async () => {
  const seen = serve(stream(...hello), broken, refusal(502), refusal(503, { code: "shutting_down" }), stream(...rest));
  const made = await run();
  assert.deepEqual([made.content, made.failure, made.ended, made.asked.last], ["Hello", null, true, "5"]);
  assert.equal(seen[0].headers["Idempotency-Key"], "k");
  assert.equal(seen[0].headers["X-Event-IDs"], "true");
  assert.deepEqual(seen.slice(1).map((one) => [one.method, one.headers["Last-Event-ID"]]), Array(4).fill(["GET", "2"]));
  assert.ok(seen[1].url.endsWith("/chatcmpl-0123456789abcdef/events"));
});

test("a request whose reply was lost is sent again under its key", async () => {
  const seen = serve(broken, stream(...hello, ...rest));
  const made = await run();
  assert.equal(made.content, "Hello");
  assert.deepEqual(seen.map((one) => [one.method, one.headers["Idempotency-Key"]]), [["POST", "k"], ["POST", "k"]]);
});

test("a page that was loaded again goes on", async () => {
  const made = answer();
  made.content = "Hel";
  Object.assign(made.asked, { id: "chatcmpl-0123456789abcdef", last: "2" });
  const seen = serve(stream(...rest));
  assert.equal((await run(made)).content, "Hello");
  assert.equal(seen[0].headers["Last-Event-ID"], "2");
});

test("an answer whose end Redis has lost is read from its beginning", async () => {
  const made = answer();
  made.content = "Before. Hel";
  Object.assign(made.asked, { id: "chatcmpl-0123456789abcdef", last: "2", base: { reasoning: 0, content: 8 } });
  const seen = serve(refusal(400, { param: "Last-Event-ID" }), stream(...hello, ...rest));
  assert.equal((await run(made)).content, "Before. Hello");
  assert.equal(seen[1].headers["Last-Event-ID"], undefined);
});

test("what cannot pass fails at once, in words", async () => {
  for (const [reply, words] of [[refusal(400, { message: "No.", param: "x" }), /does not accept/], [refusal(429), /busy/], [refusal(504, { code: "timeout" }), /too long/]]) {
    const seen = serve(reply);
    const made = await run();
    assert.match(made.failure.message, words);
    assert.equal(seen.length, 1);
  }
});

test("an answer that the server has lost says what the server said", async () => {
  const lost = `data: ${JSON.stringify({ error: { message: "The server lost this request.", type: "server_error", code: 503 } })}\n\ndata: [DONE]\n\n`;
  serve(stream(...hello, lost), refusal(404, { code: "request_not_found" }));
  const made = await run();
  assert.equal(made.failure.details, "The server lost this request.");
  assert.equal(made.content, "Hel", "what was read stays");
});

test("a stopped answer is cancelled by its name", async () => {
  const made = answer(), runs = new Run(made, async () => ({}), () => { if (made.content && !made.ended) runs.stop(); });
  const open = (signal) => new Response(new ReadableStream({ start(at) {
    at.enqueue(new TextEncoder().encode(hello.join("")));
    signal.addEventListener("abort", () => at.error(signal.reason));
  } }));
  const seen = serve(open, () => new Response("{}"));
  await runs.drive();
  await until(() => seen.length === 2);
  assert.deepEqual([made.ended, made.stopped, made.failure], [true, true, null]);
  assert.deepEqual([seen[1].method, seen[1].url.split("/").at(-1)], ["POST", "cancel"]);
});

test("an answer that is stopped before it has a name is cancelled when it gets one", async () => {
  const made = answer();
  const seen = serve(stream(...hello), () => new Response("{}"));
  const runs = new Run(made, async () => ({}), () => {});
  const driven = runs.drive();
  runs.stop();
  assert.equal(made.ended, true);
  await driven;
  await until(() => seen.length === 2);
  assert.equal(made.content, "");
  assert.equal(seen[1].url.split("/").at(-1), "cancel");
});

// --------------------------------------------------------------------------------------------------------- pipeline

test("the queue time is the time without work", () => {
  assert.equal(queued({ where: "ended", accepted: 10, begun: 12, finished: 20 }), 2);
  assert.equal(queued({ where: "ended", media: 1, accepted: 10, encode_taken: 11, encoded: 15, begun: 17, finished: 20 }), 3);
  assert.equal(queued({ where: "ended", media: 1, accepted: 10, encoded: 15, begun: 17, finished: 20 }), null);
  assert.equal(queued({ where: "ended", finished: 20 }), null);
});
