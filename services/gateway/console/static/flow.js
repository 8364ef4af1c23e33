// The picture of the pipeline: stages with their replicas, the streams between them, and a dot a request.

import { $, el, setText } from "./dom.js";
import { hop, LABELS, now, observed, phase, queues, tokenRate } from "./observed.js";
import { age, number, seconds } from "./words.js";

const STAGES = {
  gateway: { title: "Gateway", what: "HTTP, templates, admission", gauges: [] },
  mm_encoder: { title: "Encoder", what: "images and videos to embeddings", gauges: [["running", "limit", "in work"]] },
  engine: { title: "Engine", what: "prefill, decoding, sampling", gauges: [["held", "capacity", "held"], ["kv_usage", null, "cache"]] },
  postproc: { title: "Post-processing", what: "text, reasoning, tool calls", gauges: [] },
};
const PIPES = ["encode", "generate", "tokens"];  // behind the first, second and third stage
const MOST_DOTS = 40, SHOWN_AFTER_END_S = 6;
const stageViews = new Map(), pipeViews = new Map(), dots = new Map();

export function buildFlow() {
  Object.entries(STAGES).forEach(([name, about], place) => {
    const count = el("span", { className: "count" }), replicas = el("div", { className: "replicas" }), lane = el("div", { className: "lane" });
    const box = el("li", { className: "stage", data: { stage: name } },
      el("header", {}, el("h2", { textContent: about.title }), count), el("p", { className: "what", textContent: about.what }), lane, replicas);
    stageViews.set(name, { box, count, replicas, lane, known: new Map() });
    $("flow").append(box);
    if (place === PIPES.length) {
      box.append(el("p", { id: "last-hop", className: "what" }));
      return;
    }
    const value = el("b", {}), label = el("span", {}), pipeLane = el("div", { className: "lane" }), old = el("div", { className: "old" }), time = el("div", { className: "old" });
    const pipe = el("li", { className: "pipe", data: { pipe: PIPES[place] } }, el("div", { className: "label" }, value, label), pipeLane, old, time);
    pipeViews.set(PIPES[place], { pipe, value, label, lane: pipeLane, old, hop: time });
    $("flow").append(pipe);
  });
}

/** `choose(id)` is called for a dot that is pressed. */
export function drawFlow(choose) {
  observed.picture.pipeline.stages.forEach(drawStage);
  queues().forEach(drawQueue);
  drawTokens();
  drawLastHop();
  drawDots(choose);
}

function place(one) {
  if (one.where === "ended") return now() - one.seen < SHOWN_AFTER_END_S ? stageViews.get("postproc").lane : null;
  if (one.waiting) return pipeViews.get(one.where).lane;
  return stageViews.get(one.where === "encode" ? "mm_encoder" : "engine").lane;
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
  drawHop(view, queue.stream === "encode" ? "mm_encoder" : "engine");
  setText(view.value, String(Math.max(0, queue.length - queue.pending)));
  setText(view.label, `waiting in ${queue.stream}`);
  setText(view.old, queue.quarantined ? `${queue.quarantined} quarantined` : queue.length ? `oldest ${age(queue.oldest_s)}` : "");
  view.old.classList.toggle("bad", queue.quarantined > 0);
  view.pipe.classList.toggle("moving", queue.length > 0);
}

/** The time from the write of an entry to its reading, as those who read it publish it. */
function drawHop(view, reader) {
  const time = hop(reader);
  setText(view.hop, time === null ? "" : `hop ${seconds(time)}`);
}

function drawLastHop() {
  const time = hop("gateway");
  setText($("last-hop"), time === null ? "" : `hop to the gateway ${seconds(time)}`);
}

function drawTokens() {
  const view = pipeViews.get("tokens"), writing = [...observed.requests.values()].filter((one) => phase(one) === "writing").length;
  setText(view.value, number(tokenRate()));
  setText(view.label, "tokens/s");
  drawHop(view, "postproc");
  setText(view.old, writing ? `${writing} writing` : "");
  view.pipe.classList.toggle("moving", writing > 0);
}

/** One dot a request, which goes where its request is. */
function drawDots(choose) {
  const before = new Map([...dots].map(([id, dot]) => [id, dot.getBoundingClientRect()]));
  const used = new Map();
  for (const [id, dot] of dots) {
    if (!observed.requests.has(id) || place(observed.requests.get(id)) === null) {
      dot.remove();
      dots.delete(id);
    }
  }
  for (const one of [...observed.requests.values()].reverse()) {
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
    dot.setAttribute("aria-pressed", String(one.id === observed.chosen));
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

