// The console. Text from people and models reaches the page through text nodes only.

const $ = (id) => document.getElementById(id);
const KEY = "millrace.key", CHATS = "millrace.chats", SETTINGS = "millrace.settings";
const CHAT_PATH = "/v1/chat/completions";

/** An element: properties by name, `data`, `aria` and `on` as objects of their own, then children. */
function el(tag, { data = {}, aria = {}, on = {}, ...properties } = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  Object.assign(made.dataset, data);
  for (const [name, value] of Object.entries(aria)) made.setAttribute(name === "role" ? name : `aria-${name}`, value);
  for (const [name, listener] of Object.entries(on)) made.addEventListener(name, listener);
  made.append(...children.filter((child) => child !== null));
  return made;
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function toast(text) {
  $("toast").textContent = text;
  $("toast").classList.add("shown");
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => $("toast").classList.remove("shown"), 2000);
}

function button(text, listener, className = "small") {
  return el("button", { type: "button", className, textContent: text, on: { click: listener } });
}

async function copy(text, said = "Copied") {
  try {
    await navigator.clipboard.writeText(text);
    toast(said);
  } catch {  // not a secure context, or not allowed
    $("copy-text").value = text;
    $("copy-dialog").showModal();
    $("copy-text").select();
  }
}

const seconds = (s) => (s < 9.95 ? `${s.toFixed(2)} s` : s < 100 ? `${s.toFixed(1)} s` : age(s));
const age = (s) => (s < 60 ? `${Math.floor(s)} s` : s < 3600 ? `${Math.floor(s / 60)} min` : s < 86400 ? `${Math.floor(s / 3600)} h` : `${Math.floor(s / 86400)} d`);
const number = (n) => (n >= 100 ? Math.round(n).toLocaleString("en") : String(Math.round(n * 10) / 10));

// ---------------------------------------------------------------------------------------------------- the server

class Refused extends Error {
  constructor(status, error) {
    super(error.message ?? "The server refused the request.");
    Object.assign(this, { status, code: error.code ?? null, param: error.param ?? null });
  }
}

const server = { model: "", needsKey: sessionStorage.getItem(KEY) !== null, declined: false };

async function api(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const reply = await fetch(path, { ...options, headers });
  if (reply.ok) return reply;
  if (reply.status === 401) {
    server.needsKey = true;
    $("key-button").hidden = false;
    if (!server.declined) askForKey();
  }
  let error = {};
  try {
    error = (await reply.json()).error ?? {};
  } catch { /* not ours: a proxy's page, say */ }
  throw new Refused(reply.status, error);
}

function askForKey() {
  const dialog = $("key-dialog");
  if (dialog.open) return;
  $("key-problem").textContent = sessionStorage.getItem(KEY) ? "The server does not know this key." : "";
  $("key").value = "";
  dialog.showModal();
}

async function findModel() {
  try {
    const { data } = await (await api("/v1/models")).json();
    server.model = data[0].id;
    $("model").textContent = server.model;
    return true;
  } catch {
    return false;
  }
}

async function checkHealth() {
  let state = "down", text = "unreachable";
  try {
    const report = await (await fetch("/health/ready")).json();
    state = report.status;
    text = report.missing.length ? `waiting for ${report.missing.join(", ")}` : "ready";
    if (!server.model && !server.needsKey) await findModel();
  } catch { /* said by the defaults */ }
  $("health").dataset.state = state;
  setText($("health"), text);
}

function declineKey() {
  server.declined = true;  // asked again only when somebody sends something, or wants to
  $("key-dialog").close();
}

$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  server.declined = false;
  sessionStorage.setItem(KEY, $("key").value.trim());
  $("key-dialog").close();
  if (await findModel()) toast("Key accepted");
});
$("key-dialog").addEventListener("cancel", declineKey);  // Escape
$("key-cancel").addEventListener("click", declineKey);
$("key-button").hidden = !server.needsKey;
$("key-button").addEventListener("click", askForKey);
$("copy-close").addEventListener("click", () => $("copy-dialog").close());

/** The `data` of each server-sent event. */
async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
      if (data.length) yield data.join("\n");
    }
  }
}

// -------------------------------------------------------------------------------------------------- the settings

const parameters = $("parameters");
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed", "top_k", "min_p", "reasoning_max_tokens",
  "repetition_penalty", "presence_penalty", "frequency_penalty"];
const EXAMPLE = [{ type: "function", function: { name: "get_weather", description: "The weather of a city, now.",
  parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] } } }];

/** The fields of a request that the settings ask for. Throws where the tools are not JSON. */
function settingFields() {
  const fields = {};
  for (const name of NUMBERS) {
    const text = parameters.elements[name].value;
    if (text !== "") fields[name] = Number(text);
  }
  if (parameters.elements.thinking.value) fields.enable_thinking = parameters.elements.thinking.value === "on";
  const stop = parameters.elements.stop.value.split("\n").filter((line) => line !== "");
  if (stop.length) fields.stop = stop;
  const tools = readTools();
  if (tools) fields.tools = tools;
  return fields;
}

function readTools() {
  const text = $("tools").value.trim();
  if (!text) return null;
  let tools;
  try {
    tools = JSON.parse(text);
  } catch (error) {
    throw new Error(`The tools are not JSON: ${error.message}`);
  }
  if (!Array.isArray(tools)) throw new Error("The tools must be a JSON list.");
  return tools.length ? tools : null;
}

function checkTools() {
  try {
    readTools();
    $("tools-problem").textContent = "";
  } catch (error) {
    $("tools-problem").textContent = error.message;
  }
}

parameters.addEventListener("submit", (event) => event.preventDefault());
parameters.addEventListener("input", () => {
  checkTools();
  sessionStorage.setItem(SETTINGS, JSON.stringify(Object.fromEntries(new FormData(parameters))));
});
parameters.addEventListener("reset", () => {
  sessionStorage.removeItem(SETTINGS);
  $("tools-problem").textContent = "";
});
$("tools-example").addEventListener("click", () => {
  $("tools").value = JSON.stringify(EXAMPLE, null, 2);
  $("tools").dispatchEvent(new Event("input", { bubbles: true }));
});
for (const [name, value] of Object.entries(JSON.parse(sessionStorage.getItem(SETTINGS) ?? "{}"))) {
  if (parameters.elements[name]) parameters.elements[name].value = value;
}

// ---------------------------------------------------------------------------------------------------- the chats
// A chat is {id, title, turns}; a turn is a user's {role, text, media}, an assistant's {role, reasoning, content,
// calls, failure, stats, request, stopped} or a tool's {role, name, call, text}.

let chats = JSON.parse(sessionStorage.getItem(CHATS) ?? "[]");
let chat = chats[0] ?? newChat();
let attached = [];  // media of the next message
let attaching = Promise.resolve();  // until all of them have been read
let running = null;  // the AbortController of the answer that is coming

function newChat() {
  return { id: crypto.getRandomValues(new Uint32Array(2)).join(""), title: "", turns: [] };
}

function save() {
  const slim = (keep) => JSON.stringify(chats, (name, value) => (name === "preview" || (name === "url" && !keep) ? undefined : value));
  try {
    sessionStorage.setItem(CHATS, slim(true));
  } catch {  // too large for the browser: the pictures are left out
    try {
      sessionStorage.setItem(CHATS, slim(false));
    } catch { /* then this tab's memory has to do */ }
  }
}

function showChats() {
  $("conversations").replaceChildren(...chats.map((one) => {
    const open = button(one.title || "Untitled", () => openChat(one), "");
    if (one === chat) open.setAttribute("aria-current", "true");
    const remove = button("×", () => removeChat(one), "remove");
    remove.setAttribute("aria-label", `Delete ${one.title || "Untitled"}`);
    return el("li", {}, open, remove);
  }));
}

function openChat(one) {
  running?.abort();
  chat = one;
  $("messages").replaceChildren(...chat.turns.map((turn) => showTurn(turn).node));
  $("welcome").hidden = chat.turns.length > 0;
  showChats();
  closeDrawers();
  toEnd(true);
  $("prompt").focus();
}

function removeChat(one) {
  chats = chats.filter((other) => other !== one);
  save();
  if (one === chat) openChat(chats[0] ?? newChat());
  else showChats();
}

$("new-chat").addEventListener("click", () => openChat(newChat()));

/** The conversation in the API's terms; answers that failed before their first word are left out. */
function messagesOf(turns) {
  const messages = turns.flatMap((turn) => {
    if (turn.role === "tool") return [{ role: "tool", tool_call_id: turn.call, name: turn.name, content: turn.text }];
    if (turn.role === "assistant") {
      if (!turn.content && !turn.calls.length) return [];
      const calls = turn.calls.map(({ id, name, args }) => ({ id, type: "function", function: { name, arguments: args } }));
      return [{ role: "assistant", content: turn.content, ...(calls.length ? { tool_calls: calls } : {}) }];
    }
    const media = turn.media.filter((one) => one.url);
    if (!media.length) return [{ role: "user", content: turn.text }];
    const parts = media.map(({ kind, url }) => ({ type: `${kind}_url`, [`${kind}_url`]: { url } }));
    return [{ role: "user", content: [...parts, ...(turn.text ? [{ type: "text", text: turn.text }] : [])] }];
  });
  const system = parameters.elements.system.value.trim();
  return system ? [{ role: "system", content: system }, ...messages] : messages;
}

function requestOf(turns) {
  return { model: server.model || "default", messages: messagesOf(turns), stream: true,
    stream_options: { include_usage: true }, ...settingFields() };
}

function curl(body) {
  const key = server.needsKey ? ` \\\n  -H "Authorization: Bearer $MILLRACE_API_KEY"` : "";
  return `curl -N ${location.origin}${CHAT_PATH} \\\n  -H 'Content-Type: application/json'${key} \\\n  --data-binary @- <<'JSON'\n${JSON.stringify(body, null, 2)}\nJSON\n`;
}

// ------------------------------------------------------------------------------------------------ turns on the page

function showTurn(turn) {
  if (turn.role === "assistant") return showAnswer(turn);
  if (turn.role === "tool") {
    return { node: el("li", { className: "turn user" }, el("div", { className: "text", textContent: `${turn.name} returned: ${turn.text}` })) };
  }
  const media = turn.media.map(showMedium);
  return { node: el("li", { className: "turn user", aria: { label: "You" } },
    media.length ? el("div", { className: "media" }, ...media) : null,
    turn.text ? el("div", { className: "text", textContent: turn.text }) : null) };
}

function showMedium({ kind, name, url, preview }) {
  const src = preview ?? url;
  if (!src) return el("span", { className: "hint", textContent: `${name} (not kept)` });
  return kind === "image" ? el("img", { src, alt: name }) : el("video", { src, controls: true, muted: true, aria: { label: name } });
}

/** The node of an answer and how it grows. */
function showAnswer(turn) {
  const reasoning = document.createTextNode(turn.reasoning), content = document.createTextNode(turn.content);
  const summary = el("summary", { textContent: "Reasoning" });
  const thoughts = el("details", { className: "reasoning", hidden: !turn.reasoning }, summary, el("div", { className: "text" }, reasoning));
  const calls = el("div", {}), stats = el("div", { className: "stats" }), failure = el("div", {}), actions = el("div", { className: "actions-row" });
  const node = el("li", { className: "turn assistant", aria: { label: "Answer" } },
    thoughts, el("div", { className: "text answer" }, content), calls, failure, stats, actions);
  const view = {
    node,
    start() {
      node.classList.add("live");
      node.setAttribute("aria-busy", "true");
      thoughts.open = true;
    },
    think(text) {
      thoughts.hidden = false;
      reasoning.appendData(text);
      const box = reasoning.parentNode;
      box.scrollTop = box.scrollHeight;
    },
    say(text) {
      if (!content.data) {
        node.classList.add("answering");
        thoughts.open = false;
      }
      content.appendData(text);
    },
    call: () => calls.replaceChildren(...turn.calls.map((call) => showCall(turn, call))),
    end() {
      node.classList.remove("live", "answering");
      node.setAttribute("aria-busy", "false");
      thoughts.open = thoughts.open && !turn.content;
      view.call();
      const { stats: s } = turn;
      const words = [turn.stopped ? "stopped" : null, ...(s ? statWords(s) : [])].filter(Boolean);
      stats.replaceChildren(...words.map((word) => el("span", { textContent: word })));
      failure.replaceChildren(...(turn.failure ? [showFailure(turn.failure)] : []));
      actions.replaceChildren(
        turn.content || turn.reasoning ? button("Copy", () => copy(turn.content || turn.reasoning)) : "",
        button("Copy as curl", () => copyCurl(turn)), button("Again", () => again(turn)),
        turn.request ? button("Timeline", () => showRequest(turn.request)) : "");
    },
  };
  if (turn.ended) view.end();
  return view;
}

function statWords(s) {
  const rate = s.tokens > 1 && s.last > s.first ? `${number((s.tokens - 1) / (s.last - s.first))} tokens/s` : null;
  return [
    s.reason && s.reason !== "stop" ? `ended by ${s.reason}` : null,
    s.prompt === null ? null : `${s.prompt} prompt tokens${s.cached ? ` (${s.cached} cached)` : ""}`,
    s.tokens === null ? null : `${s.tokens} tokens${s.thought ? ` (${s.thought} reasoning)` : ""}`,
    s.first === null ? null : `first token ${seconds(s.first)}`, rate, s.total === null ? null : seconds(s.total)];
}

function showFailure({ message, status, code, param }) {
  const details = [status, code, param].filter((part) => part !== null && part !== undefined && part !== "").join(" · ");
  return el("div", { className: "failure", aria: { role: "alert" } }, el("strong", { textContent: message }),
    details ? el("small", { textContent: details }) : null);
}

function showCall(turn, call) {
  let text = call.args;
  try {
    text = JSON.stringify(JSON.parse(call.args), null, 2);
  } catch { /* not whole yet, or never */ }
  const card = el("div", { className: "call" }, el("h3", { textContent: call.name }), el("pre", { textContent: text }));
  const isLast = chat.turns.at(-1) === turn || chat.turns.slice(chat.turns.indexOf(turn) + 1).every((later) => later.role === "tool");
  if (!turn.ended || !isLast || chat.turns.some((later) => later.role === "tool" && later.call === call.id)) return card;
  const result = el("textarea", { rows: 2, className: "code", placeholder: "What it returned", aria: { label: `Result of ${call.name}` } });
  card.append(result, button("Give this result", () => giveResult(turn, call, result.value), ""));
  return card;
}

function giveResult(turn, call, text) {
  addTurn({ role: "tool", name: call.name, call: call.id, text });
  const given = new Set(chat.turns.filter((other) => other.role === "tool").map((other) => other.call));
  if (turn.calls.every((other) => given.has(other.id))) answer();
}

function addTurn(turn) {
  chat.turns.push(turn);
  const view = showTurn(turn);
  $("messages").append(view.node);
  $("welcome").hidden = true;
  toEnd(true);
  return view;
}

function copyCurl(turn) {
  try {
    const said = server.needsKey ? "Copied; it reads the key from $MILLRACE_API_KEY" : "Copied";
    copy(curl(requestOf(chat.turns.slice(0, chat.turns.indexOf(turn)))), said);
  } catch (error) {
    $("problem").textContent = error.message;
  }
}

function again(turn) {
  if (running) return;
  const at = chat.turns.indexOf(turn);
  chat.turns.splice(at);
  while ($("messages").children.length > at) $("messages").lastElementChild.remove();
  answer();
}

function toEnd(always) {
  const box = $("scroll");
  if (always || box.scrollHeight - box.scrollTop - box.clientHeight < 120) box.scrollTop = box.scrollHeight;
}

// ------------------------------------------------------------------------------------------------------ an answer

async function answer() {
  let body;
  try {
    body = requestOf(chat.turns);
  } catch (error) {
    $("problem").textContent = error.message;
    return;
  }
  server.declined = false;
  const mine = chat, controller = new AbortController();
  running = controller;
  const turn = { role: "assistant", reasoning: "", content: "", calls: [], failure: null, request: null, stopped: false, ended: false,
    stats: { prompt: null, cached: 0, tokens: null, thought: 0, first: null, last: null, total: null, reason: null } };
  const view = addTurn(turn);
  view.start();
  showRunning();
  const started = performance.now();
  const since = () => (performance.now() - started) / 1000;
  try {
    const headers = { "Content-Type": "application/json" };
    const reply = await api(CHAT_PATH, { method: "POST", headers, body: JSON.stringify(body), signal: controller.signal });
    glance();  // while the request is under way, so that its timeline is known later
    for await (const data of events(reply)) {
      if (data.startsWith("[DONE]")) break;
      take(turn, view, JSON.parse(data), since);
      toEnd(false);
    }
    if (!turn.stats.reason) throw new Error("The connection ended before the answer did.");
  } catch (error) {
    if (controller.signal.aborted) turn.stopped = true;
    else turn.failure = { message: error.message, status: error.status, code: error.code, param: error.param };
  }
  turn.stats.total = since();
  turn.ended = true;
  view.end();
  if (running === controller) running = null;
  showRunning();
  glance();
  if (mine === chat) toEnd(false);
  save();
}

function take(turn, view, chunk, since) {
  if (chunk.error) throw new Refused(chunk.error.code, { ...chunk.error, code: chunk.error.type });
  turn.request = chunk.id;
  if (chunk.usage) {
    const { prompt_tokens: prompt, completion_tokens: tokens } = chunk.usage;
    const cached = chunk.usage.prompt_tokens_details?.cached_tokens ?? 0;
    Object.assign(turn.stats, { prompt, tokens, cached, thought: chunk.usage.completion_tokens_details?.reasoning_tokens ?? 0 });
  }
  for (const { delta, finish_reason: reason } of chunk.choices) {
    if (delta.reasoning_content) {
      turn.reasoning += delta.reasoning_content;
      view.think(delta.reasoning_content);
    }
    if (delta.content) {
      view.say(delta.content);
      turn.content += delta.content;
    }
    for (const piece of delta.tool_calls ?? []) {
      const call = (turn.calls[piece.index] ??= { id: piece.id, name: piece.function.name, args: "" });
      call.args += piece.function.arguments ?? "";
      view.call();
    }
    if (delta.reasoning_content || delta.content || delta.tool_calls) {
      turn.stats.first ??= since();
      turn.stats.last = since();
    }
    if (reason) turn.stats.reason = reason;
  }
}

function showRunning() {
  $("send").hidden = running !== null;
  $("stop").hidden = running === null;
}

// ---------------------------------------------------------------------------------------------------- the composer

async function submit() {
  await attaching;
  const text = $("prompt").value.trim();
  if (running || (!text && !attached.length)) return;
  $("problem").textContent = "";
  try {
    readTools();
  } catch (error) {
    $("problem").textContent = error.message;
    return;
  }
  if (!chats.includes(chat)) chats.unshift(chat);
  chat.title ||= text.slice(0, 60) || attached[0].name;
  addTurn({ role: "user", text, media: attached });
  attached = [];
  $("prompt").value = "";
  showAttached();
  showChats();
  save();
  answer();
}

/** Files are read one after another, and nothing is sent before all are. */
function attach(files) {
  $("problem").textContent = "";
  const list = [...files];
  attaching = attaching.then(() => read(list)).catch((error) => { $("problem").textContent = `A file cannot be read: ${error.message}`; });
}

async function read(files) {
  for (const file of files) {
    const kind = file.type.split("/")[0];
    if (kind !== "image" && kind !== "video") {
      $("problem").textContent = `${file.name || "This file"} is neither an image nor a video.`;
      continue;
    }
    const url = await dataUrl(file);
    attached.push({ kind, name: file.name || `pasted ${kind}`, url, preview: URL.createObjectURL(file) });
  }
  showAttached();
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

function showAttached() {
  $("attachments").replaceChildren(...attached.map((one) => {
    const remove = button("×", () => {
      attached = attached.filter((other) => other !== one);
      URL.revokeObjectURL(one.preview);
      showAttached();
      $("prompt").focus();
    }, "");
    remove.setAttribute("aria-label", `Remove ${one.name}`);
    const medium = showMedium(one);
    medium.controls = false;
    return el("li", {}, medium, remove);
  }));
}

const talk = $("talk");
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit();
  }
});
document.addEventListener("paste", (event) => {
  if (!$("chat").hidden && event.clipboardData.files.length) {
    event.preventDefault();
    attach(event.clipboardData.files);
  }
});
$("stop").addEventListener("click", () => {
  running?.abort();
  $("prompt").focus();
});
$("attach").addEventListener("click", () => $("picker").click());
$("picker").addEventListener("change", () => {
  attach($("picker").files);
  $("picker").value = "";
});
// Anywhere on the page: where a page does not take a file, the browser leaves the page for it.
for (const name of ["dragenter", "dragover"]) {
  document.addEventListener(name, (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    talk.classList.add("dropping");
  });
}
document.addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) talk.classList.remove("dropping");
});
document.addEventListener("drop", (event) => {
  if (!event.dataTransfer?.types.includes("Files")) return;
  event.preventDefault();
  talk.classList.remove("dropping");
  if (!$("chat").hidden) attach(event.dataTransfer.files);
});

function closeDrawers() {
  for (const name of ["history", "settings"]) {
    $(name).classList.remove("open");
    $(`${name}-button`).setAttribute("aria-expanded", "false");
  }
}

for (const name of ["history", "settings"]) {
  $(`${name}-button`).addEventListener("click", (event) => {
    event.stopPropagation();
    closeDrawers();
    $(name).classList.add("open");
    $(`${name}-button`).setAttribute("aria-expanded", "true");
    $(name).querySelector(".close").focus();
  });
}
talk.addEventListener("click", closeDrawers);
for (const close of document.querySelectorAll(".close")) {
  close.addEventListener("click", () => {
    closeDrawers();
    $(`${close.parentElement.id}-button`).focus();
  });
}
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  const open = document.querySelector(".drawer.open");
  closeDrawers();
  if (open) $(`${open.id}-button`).focus();
  else running?.abort();
});

// ---------------------------------------------------------------------------------------------------- the pipeline

const STAGES = {
  gateway: { title: "Gateway", what: "HTTP, templates, admission", gauges: [] },
  mm_encoder: { title: "Encoder", what: "images and videos to embeddings", gauges: [["running", "limit", "in work"]] },
  engine: { title: "Engine", what: "prefill, decoding, sampling", gauges: [["held", "capacity", "held"], ["kv_usage", null, "cache"]] },
  postproc: { title: "Post-processing", what: "text, reasoning, tool calls", gauges: [] },
};
const PIPES = ["encode", "generate", "tokens"];  // behind the first, second and third stage
const LABELS = { encoding: "encoding", reading: "reading the prompt", writing: "writing", waiting: "waiting", ended: "ended", lost: "ended early" };
const REFRESH_MS = 1000, MOST_DOTS = 40, SHOWN_AFTER_END_S = 6;

let picture = null;
let requests = new Map();
let chosen = null;
let polling = 0;
const stageViews = new Map(), pipeViews = new Map(), dots = new Map(), rows = new Map();

function buildFlow() {
  Object.entries(STAGES).forEach(([name, about], place) => {
    const count = el("span", { className: "count" }), replicas = el("div", { className: "replicas" }), lane = el("div", { className: "lane" });
    const box = el("li", { className: "stage", data: { stage: name } },
      el("header", {}, el("h2", { textContent: about.title }), count), el("p", { className: "what", textContent: about.what }), lane, replicas);
    stageViews.set(name, { box, count, replicas, lane, known: new Map() });
    $("flow").append(box);
    if (place === PIPES.length) return;
    const value = el("b", {}), label = el("span", {}), pipeLane = el("div", { className: "lane" }), old = el("div", { className: "old" });
    const pipe = el("li", { className: "pipe", data: { pipe: PIPES[place] } }, el("div", { className: "label" }, value, label), pipeLane, old);
    pipeViews.set(PIPES[place], { pipe, value, label, lane: pipeLane, old });
    $("flow").append(pipe);
  });
}

function phase(one) {
  if (one.where === "ended") return one.reason === "stop" || one.reason === "length" ? "ended" : "lost";
  if (one.waiting) return "waiting";
  if (one.where === "encode") return "encoding";
  return one.tokens > 0 ? "writing" : "reading";
}

function place(one) {
  if (one.where === "ended") return now() - one.seen < SHOWN_AFTER_END_S ? stageViews.get("postproc").lane : null;
  if (one.waiting) return pipeViews.get(one.where).lane;
  return stageViews.get(one.where === "encode" ? "mm_encoder" : "engine").lane;
}

async function poll() {
  try {
    const found = await (await api("/console/state")).json();
    const kept = (one) => Object.fromEntries(Object.entries(one).filter(([, value]) => value !== null));
    requests = new Map(found.requests.map((one) => [one.id, { ...requests.get(one.id), ...kept(one) }]));
    picture = found;
    $("trouble").hidden = found.problems.length === 0;
    setText($("trouble"), found.problems.join("\n"));
    draw();
  } catch (error) {
    $("trouble").hidden = false;
    setText($("trouble"), `The pipeline cannot be seen now: ${error.message}`);
  }
}

function glance() {
  if (!polling) poll();
}

function watch() {
  clearInterval(polling);
  polling = 0;
  if (!$("pipeline").hidden && !document.hidden) {
    poll();
    polling = setInterval(() => { if (!$("key-dialog").open) poll(); }, REFRESH_MS);
  }
}

function draw() {
  drawTiles();
  picture.pipeline.stages.forEach(drawStage);
  queues().forEach(drawQueue);
  drawTokens();
  drawDots();
  drawRows();
  drawTimeline();
}

const now = () => picture.pipeline.at;
const queues = () => picture.pipeline.stages.map((stage) => stage.queue).filter((queue) => queue !== null);
const loads = (name) => picture.pipeline.stages.find((stage) => stage.service === name).replicas.map((replica) => replica.load);
const sum = (name, figure) => loads(name).reduce((total, load) => total + (load[figure] ?? 0), 0);

function tokenRate() {
  return sum("engine", "tokens_per_s");
}

function drawTiles() {
  const open = [...requests.values()].filter((one) => one.where !== "ended").length;
  const waits = loads("gateway").map((load) => load.first_token_s).filter((value) => value !== undefined);
  const lost = queues().reduce((total, queue) => total + queue.quarantined, 0);
  const backlog = queues().reduce((total, queue) => total + queue.length, 0);
  const tiles = [["Open requests", String(Math.max(open, backlog)), ""], ["Tokens per second", number(tokenRate()), ""],
    ["To the first token", waits.length ? seconds(waits.reduce((a, b) => a + b) / waits.length) : "–", ""],
    ["Quarantined", String(lost), lost ? "bad" : ""]];
  if ($("tiles").children.length !== tiles.length) {
    $("tiles").replaceChildren(...tiles.map(([title]) => el("div", {}, el("dt", { textContent: title }), el("dd"))));
  }
  tiles.forEach(([, value, className], i) => {
    setText($("tiles").children[i].lastChild, value);
    $("tiles").children[i].className = className;
  });
}

function drawStage(stage) {
  const view = stageViews.get(stage.service);
  const ready = stage.replicas.filter((replica) => replica.state === "ready").length;
  setText(view.count, ready ? `${ready} ready` : "none ready");
  view.box.classList.toggle("lacking", ready === 0);
  const names = new Set(stage.replicas.map((replica) => replica.name));
  for (const [name, known] of view.known) {
    if (!names.has(name)) {
      known.node.remove();
      view.known.delete(name);
    }
  }
  for (const replica of stage.replicas) {
    if (!view.known.has(replica.name)) {
      const known = replicaView(stage.service, replica.name);
      view.known.set(replica.name, known);
      view.replicas.append(known.node);
    }
    drawReplica(stage.service, view.known.get(replica.name), replica);
  }
}

function replicaView(stage, name) {
  const state = el("span", { className: "state" }, el("b", { textContent: name, title: name }));
  const up = el("span", { className: "age" }), figures = el("dl", { className: "figures" });
  const gauges = STAGES[stage].gauges.map(([, , label]) => {
    const fill = el("b"), bar = el("i", { aria: { role: "meter", label, valuemin: 0, valuemax: 1, valuenow: 0 } }, fill), text = el("span");
    return { node: el("span", { className: "gauge" }, bar, text), bar, fill, text, label };
  });
  const node = el("details", { className: "replica" },
    el("summary", {}, el("span", { className: "top" }, state, up), ...gauges.map((gauge) => gauge.node)), figures);
  return { node, state, up, figures, gauges };
}

function drawReplica(stage, view, replica) {
  const { load } = replica;
  view.state.dataset.state = replica.state;
  view.state.title = replica.state;
  setText(view.up, replica.state !== "ready" ? replica.state : replica.up_s === null ? "" : age(replica.up_s));
  STAGES[stage].gauges.forEach(([used, limit], i) => {
    const gauge = view.gauges[i];
    gauge.node.hidden = load[used] === undefined;
    const part = limit ? load[used] / (load[limit] || 1) : load[used] ?? 0;
    gauge.fill.style.width = `${Math.min(100, 100 * part)}%`;
    gauge.bar.setAttribute("aria-valuenow", part.toFixed(3));
    setText(gauge.text, `${gauge.label} ${limit ? `${load[used]}/${load[limit]}` : `${Math.round(100 * part)}%`}`);
  });
  const figures = [...Object.entries(load).map(figure), ...(replica.version ? [["version", replica.version]] : [])];
  if (view.figures.children.length !== 2 * figures.length) {
    view.figures.replaceChildren(...figures.flatMap(() => [el("dt"), el("dd")]));
  }
  figures.forEach(([title, value], i) => {
    setText(view.figures.children[2 * i], title);
    setText(view.figures.children[2 * i + 1], value);
  });
}

function figure([name, value]) {
  if (name.endsWith("_per_s")) return [name.slice(0, -6).replaceAll("_", " "), `${number(value)}/s`];
  if (name.endsWith("_s")) return [name.slice(0, -2).replaceAll("_", " "), value < 1 ? `${number(1000 * value)} ms` : seconds(value)];
  if (name.endsWith("_usage") || name.endsWith("_hits")) return [name.replaceAll("_", " "), `${Math.round(100 * value)}%`];
  return [name.replaceAll("_", " "), number(value)];
}

function drawQueue(queue) {
  const view = pipeViews.get(queue.stream);
  setText(view.value, String(Math.max(0, queue.length - queue.pending)));
  setText(view.label, `waiting in ${queue.stream}`);
  setText(view.old, queue.quarantined ? `${queue.quarantined} quarantined` : queue.length ? `oldest ${age(queue.oldest_s)}` : "");
  view.old.classList.toggle("bad", queue.quarantined > 0);
  view.pipe.classList.toggle("moving", queue.length > 0);
}

function drawTokens() {
  const view = pipeViews.get("tokens"), writing = [...requests.values()].filter((one) => phase(one) === "writing").length;
  setText(view.value, number(tokenRate()));
  setText(view.label, "tokens/s");
  setText(view.old, writing ? `${writing} writing` : "");
  view.pipe.classList.toggle("moving", writing > 0);
}

/** One dot a request, which goes where its request is. */
function drawDots() {
  const before = new Map([...dots].map(([id, dot]) => [id, dot.getBoundingClientRect()]));
  const used = new Map();
  for (const [id, dot] of dots) {
    if (!requests.has(id) || place(requests.get(id)) === null) {
      dot.remove();
      dots.delete(id);
    }
  }
  for (const one of [...requests.values()].reverse()) {
    const lane = place(one);
    if (lane === null) continue;
    used.set(lane, (used.get(lane) ?? 0) + 1);
    if (!dots.has(one.id)) {
      dots.set(one.id, el("button", { type: "button", className: "dot", data: { id: one.id }, on: { click: () => choose(one.id) } }));
    }
    const dot = dots.get(one.id);
    dot.dataset.phase = phase(one);
    dot.title = `${one.id}: ${LABELS[phase(one)]}`;
    dot.setAttribute("aria-label", dot.title);
    dot.setAttribute("aria-pressed", String(one.id === chosen));
    dot.hidden = used.get(lane) > MOST_DOTS;
    if (dot.parentNode !== lane) move(dot, lane, before.get(one.id));
  }
  for (const { lane } of [...stageViews.values(), ...pipeViews.values()]) drawMore(lane, (used.get(lane) ?? 0) - MOST_DOTS);
}

function drawMore(lane, more) {
  let note = lane.querySelector(".more");
  if (more > 0) {
    note ??= el("span", { className: "more" });
    setText(note, `+${more}`);
    lane.append(note);
  } else {
    note?.remove();
  }
}

function move(dot, lane, from) {
  const focused = document.activeElement === dot;
  lane.append(dot);
  if (focused) dot.focus();
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
  const to = dot.getBoundingClientRect();
  const start = from ?? stageViews.get("gateway").box.getBoundingClientRect();
  dot.animate([{ transform: `translate(${start.left - to.left}px, ${start.top - to.top}px)` }, { transform: "none" }], { duration: 650, easing: "ease-in-out" });
}

const begun = (one) => one.accepted ?? one.begun ?? one.first ?? one.seen;
const until = (one) => (one.where === "ended" ? one.finished ?? one.seen : now());

function drawRows() {
  const body = $("requests").tBodies[0];
  const shown = [...requests.values()].slice(0, 100);
  $("requests").hidden = shown.length === 0;
  $("no-requests").hidden = shown.length > 0;
  for (const [id, row] of rows) {
    if (!shown.some((one) => one.id === id)) {
      row.node.remove();
      rows.delete(id);
    }
  }
  shown.forEach((one, i) => {
    if (!rows.has(one.id)) rows.set(one.id, rowView(one.id));
    const row = rows.get(one.id);
    row.where.dataset.phase = phase(one);
    setText(row.where, one.where === "ended" && one.reason ? `ended (${one.reason})` : LABELS[phase(one)]);
    setText(row.prompt, one.prompt_tokens ? number(one.prompt_tokens) : "–");
    setText(row.tokens, String(one.tokens));
    setText(row.time, seconds(Math.max(0, until(one) - begun(one))));
    row.node.classList.toggle("chosen", one.id === chosen);
    row.open.setAttribute("aria-pressed", String(one.id === chosen));
    if (body.children[i] !== row.node) body.insertBefore(row.node, body.children[i] ?? null);
  });
}

function rowView(id) {
  const open = el("button", { type: "button", textContent: id });
  const where = el("span", { className: "mark" });
  const [prompt, tokens, time] = ["num wide-only", "num", "num"].map((className) => el("td", { className }));
  const node = el("tr", { on: { click: () => choose(id) } }, el("td", {}, open), el("td", {}, where), prompt, tokens, time);
  return { node, open, where, prompt, tokens, time };
}

function choose(id) {
  chosen = id;
  draw();
  $("timeline").scrollIntoView({ block: "nearest", behavior: "smooth" });
}

/** From a chat's answer to its timeline. */
async function showRequest(name) {
  chosen = name.replace(/^chatcmpl-/, "");
  location.hash = "#pipeline";
  turnPage();
  await poll();
  $("timeline").focus();
}

function drawTimeline() {
  if (chosen === null) return;
  const one = requests.get(chosen);
  $("timeline-title").textContent = `Timeline of ${chosen}`;
  if (!one) {
    $("timeline-body").replaceChildren(el("p", { className: "hint", textContent: "It is not among those seen in the last minute." }));
    return;
  }
  const start = begun(one), end = until(one);
  const steps = [["Accepted", one.accepted], ...(one.media ? [["Media encoded", one.encoded]] : []),
    ["Taken up by the engine", one.begun], ["First token", one.first], [one.where === "ended" ? `Finished (${one.reason ?? "not seen how"})` : "Finished", one.where === "ended" ? until(one) : null]];
  const bounds = [[start, one.media ? one.encoded ?? end : one.begun ?? end, one.media ? "encoding" : "waiting"],
    ...(one.media && one.encoded ? [[one.encoded, one.begun ?? end, "waiting"]] : []),
    ...(one.begun ? [[one.begun, one.first ?? end, "reading"]] : []), ...(one.first ? [[one.first, end, "writing"]] : [])];
  const parts = bounds.filter(([from, to]) => to > from).map(([from, to, kind]) => {
    const part = el("div", { className: "seg", title: `${LABELS[kind]} ${seconds(to - from)}`, data: { phase: kind } });
    part.style.flexGrow = String(1e6 * (to - from));  // what adds up to less than 1 does not fill the strip
    return part;
  });
  const strip = el("div", { className: "strip", aria: { role: "img", label: parts.map((part) => part.title).join(", ") || "no time" } }, ...parts);
  let last = start;
  const list = steps.map(([title, at]) => {
    if (at === null || at === undefined) return el("li", {}, el("span", { className: "missing", textContent: title }), el("span", { className: "clock", textContent: one.where === "ended" ? "not seen" : "not yet" }), el("span"));
    const added = Math.max(0, at - last);
    last = at;
    return el("li", {}, el("span", { textContent: title }), el("span", { className: "clock", textContent: new Date(1000 * at).toLocaleTimeString([], { hour12: false }) }), el("span", { textContent: `+${seconds(added)}` }));
  });
  const rate = one.first && one.last > one.first ? number((one.tokens - 1) / (one.last - one.first)) : null;
  const facts = [["prompt", one.prompt_tokens || "–"], ["cached", one.cached_tokens], ["tokens", one.tokens], ["tokens/s", rate ?? "–"],
    ["media", Number(one.media)], ["on", one.replica || "–"], ["deliveries", one.attempts || "–"]];
  $("timeline-body").replaceChildren(strip, el("ol", { className: "events" }, ...list),
    el("p", { className: "facts" }, ...facts.map(([title, value]) => el("span", {}, `${title} `, el("b", { textContent: String(value) })))));
}

// ---------------------------------------------------------------------------------------------------------- pages

function turnPage() {
  const page = location.hash === "#pipeline" ? "pipeline" : "chat";
  for (const name of ["chat", "pipeline"]) {
    $(name).hidden = name !== page;
    if (name === page) $(`to-${name}`).setAttribute("aria-current", "page");
    else $(`to-${name}`).removeAttribute("aria-current");
  }
  document.title = page === "chat" ? "Millrace" : "Pipeline · Millrace";
  watch();
}

addEventListener("hashchange", turnPage);
document.addEventListener("visibilitychange", watch);
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  $("main").focus();
});

buildFlow();
openChat(chat);
turnPage();
checkHealth();
setInterval(() => { if (!document.hidden) checkHealth(); }, 5000);
