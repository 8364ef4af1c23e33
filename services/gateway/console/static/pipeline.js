// The page of the pipeline: polls the state, and shows figures, requests, what was searched for, and the quarantine.

import { $, copy, el, setText } from "./dom.js";
import { buildFlow, drawFlow } from "./flow.js";
import { bare, end, LABELS, loads, mean, observed, phase, queued, queues, start, tokenRate } from "./observed.js";
import { api } from "./server.js";
import { drawTimeline } from "./timeline.js";
import { count, number, seconds } from "./words.js";

const REFRESH_MS = 1000, MOST_ROWS = 100;

let polling = 0;
const rows = new Map();

export function startPipeline() {
  buildFlow();
  $("search").addEventListener("submit", (event) => {
    event.preventDefault();
    search($("search-id").value);
  });
}

const known = (one) => Object.fromEntries(Object.entries(one).filter(([, value]) => value !== null));

async function poll() {
  try {
    const picture = await (await api("/console/state")).json();
    observed.requests = new Map(picture.requests.map((one) => [one.id, { ...observed.requests.get(one.id), ...known(one) }]));
    observed.picture = picture;
    await followFound();
    $("trouble").hidden = picture.problems.length === 0;
    setText($("trouble"), picture.problems.join("\n"));
    draw();
  } catch (error) {
    $("trouble").hidden = false;
    setText($("trouble"), `The pipeline cannot be seen now: ${error.message} ${error.details ?? ""}`.trim());
  }
}

export function glance() {
  if (!polling) poll();
}

export function watch() {
  clearInterval(polling);
  polling = 0;
  if (!$("pipeline").hidden && !document.hidden) {
    poll();
    polling = setInterval(() => { if (!$("key-dialog").open) poll(); }, REFRESH_MS);
  }
}

function draw() {
  drawTiles();
  drawFlow(choose);
  drawRows();
  drawQuarantine();
  drawTimeline();
}

function drawTiles() {
  const all = [...observed.requests.values()], open = all.filter((one) => one.where !== "ended").length;
  const backlog = queues().reduce((total, queue) => total + queue.length, 0), lost = queues().reduce((total, queue) => total + queue.quarantined, 0);
  const first = mean(loads("gateway").map((load) => load.first_token_s)), waited = mean(all.map(queued));
  const tiles = [["Open requests", String(Math.max(open, backlog)), ""], ["Tokens per second", number(tokenRate()), ""],
    ["Queue time", waited === null ? "–" : seconds(waited), ""], ["To the first token", first === null ? "–" : seconds(first), ""],
    ["Quarantined", String(lost), lost ? "bad" : ""]];
  if ($("tiles").children.length !== tiles.length) {
    $("tiles").replaceChildren(...tiles.map(([title]) => el("div", {}, el("dt", { textContent: title }), el("dd"))));
  }
  tiles.forEach(([, value, className], i) => {
    setText($("tiles").children[i].lastChild, value);
    $("tiles").children[i].className = className;
  });
}

function drawRows() {
  const body = $("requests").tBodies[0], shown = [...observed.requests.values()].slice(0, MOST_ROWS);
  $("requests").hidden = shown.length === 0;
  $("no-requests").hidden = shown.length > 0;
  for (const [id, row] of rows) {
    if (shown.some((one) => one.id === id)) continue;
    row.node.remove();
    rows.delete(id);
  }
  shown.forEach((one, i) => {
    if (!rows.has(one.id)) rows.set(one.id, rowView(one.id));
    const row = rows.get(one.id);
    drawRow(row, one);
    if (body.children[i] !== row.node) body.insertBefore(row.node, body.children[i] ?? null);
  });
}

function rowView(id) {
  const open = el("button", { type: "button", textContent: id }), where = el("span", { className: "mark" });
  const [prompt, tokens, wait, time] = ["num wide-only", "num", "num wide-only", "num"].map((className) => el("td", { className }));
  const node = el("tr", { on: { click: () => choose(id) } }, el("td", {}, open), el("td", {}, where), prompt, tokens, wait, time);
  return { node, open, where, prompt, tokens, wait, time };
}

function drawRow(row, one) {
  const wait = queued(one);
  row.where.dataset.phase = phase(one);
  setText(row.where, one.where === "ended" && one.reason ? `ended (${one.reason})` : LABELS[phase(one)]);
  setText(row.prompt, one.prompt_tokens ? number(one.prompt_tokens) : "–");
  setText(row.tokens, String(one.tokens));
  setText(row.wait, wait === null ? "–" : seconds(wait));
  setText(row.time, seconds(Math.max(0, end(one) - start(one))));
  row.node.classList.toggle("chosen", one.id === observed.chosen);
  row.open.setAttribute("aria-pressed", String(one.id === observed.chosen));
}

function choose(id) {
  observed.chosen = id;
  draw();
  $("timeline").scrollIntoView({ block: "nearest", behavior: "smooth" });
}

/** Shows the timeline of an answer, by its name in the API. */
export async function showRequest(name) {
  observed.chosen = bare(name);
  await poll();
  if (!observed.requests.has(observed.chosen)) await search(observed.chosen);
}

// ------------------------------------------------------------------------------------------------ search

async function search(text) {
  const id = bare(text);
  try {
    const { request, quarantined } = await ask(id);
    observed.found = request && known(request);
    if (request) observed.chosen = id;
    setText($("found"), wordsFor(id, request, quarantined));
    draw();
    if (request) $("timeline").scrollIntoView({ block: "nearest", behavior: "smooth" });
  } catch (error) {
    setText($("found"), error.details || error.message);
  }
}

const ask = async (id) => (await api(`/console/request?id=${encodeURIComponent(id)}`)).json();

function wordsFor(id, request, quarantined) {
  const lost = quarantined.map((one) => `It is in quarantine:${one.stream} after ${count(one.attempts, "delivery", "deliveries")}: ${one.reason}.`);
  if (request) return [`${id}: its timeline is shown.`, ...lost].join(" ");
  return lost.join(" ") || `Redis has nothing of ${id}: it has ended and is not kept any more, or there never was such a request.`;
}

/** Keeps what was found up to date, as long as it is not among those that are observed anyway. */
async function followFound() {
  const { found, requests } = observed;
  if (!found || found.where === "ended" || requests.has(found.id)) return;
  const { request } = await ask(found.id);
  if (request) observed.found = known(request);
}

// ------------------------------------------------------------------------------------------------ quarantine

function drawQuarantine() {
  const { quarantine } = observed.picture, key = JSON.stringify(quarantine.map((one) => one.entry));
  $("quarantine").hidden = quarantine.length === 0;
  if ($("quarantine").dataset.key === key) return;
  $("quarantine").dataset.key = key;
  $("quarantined").replaceChildren(...quarantine.map(quarantineView));
}

function quarantineView({ stream, entry, request_id: id, reason, attempts, at }) {
  const name = `${stream}/${entry}`, since = new Date(1000 * at);
  return el("li", {}, el("p", { className: "reason", textContent: reason }),
    el("p", { className: "facts" }, ...[["request", id || "unreadable"], ["deliveries", attempts], ["since", since.toLocaleString([], { hour12: false })], ["entry", name]]
      .map(([title, value]) => el("span", {}, `${title} `, el("b", { textContent: String(value) })))),
    el("button", { type: "button", className: "small", textContent: "Copy its command", aria: { label: `Copy the command that shows ${name}` }, on: { click: () => copy(`millrace quarantine show ${name}`) } }));
}
