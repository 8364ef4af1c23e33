// The timeline of one request.

import { $, el } from "./dom.js";
import { end, LABELS, observed, queued, start } from "./observed.js";
import { number, seconds } from "./words.js";

export function drawTimeline() {
  const { chosen, requests, found } = observed;
  if (chosen === null) return;
  const one = requests.get(chosen) ?? (found?.id === chosen ? found : null);
  $("timeline-title").textContent = `Timeline of ${chosen}`;
  $("timeline-body").replaceChildren(...(one ? [strip(one), steps(one), facts(one)] : [unknown()]));
}

const unknown = () => el("p", { className: "hint", textContent: "It is not among those seen in the last minute. Search for it above." });

/** What the request was doing, as parts of its whole time. */
function strip(one) {
  const last = end(one), from = start(one), taken = one.taken ?? one.begun ?? last;
  const bounds = one.media ? [[from, one.encode_taken, "waiting"], [one.encode_taken ?? from, one.encoded ?? last, "encoding"], [one.encoded, taken, "waiting"]] : [[from, taken, "waiting"]];
  bounds.push([one.taken, one.begun ?? last, "queued"], [one.begun, one.first ?? last, "reading"], [one.first, last, "writing"]);
  const parts = bounds.filter(([a, b]) => a && b && b > a).map(([a, b, kind]) => {
    const part = el("div", { className: "seg", title: `${LABELS[kind]} ${seconds(b - a)}`, data: { phase: kind } });
    part.style.flexGrow = String(1e6 * (b - a));  // what adds up to less than 1 does not fill the strip
    return part;
  });
  return el("div", { className: "strip", aria: { role: "img", label: parts.map((part) => part.title).join(", ") || "no time" } }, ...parts);
}

function steps(one) {
  const isOver = one.where === "ended";
  const all = [["Accepted", one.accepted], ...(one.media ? [["Taken up by an encoder", one.encode_taken], ["Media encoded", one.encoded]] : []),
    ["Taken up by an engine", one.taken], ["Begun by the engine", one.begun], ["First token", one.first],
    [isOver ? `Finished (${one.reason ?? "not seen how"})` : "Finished", isOver ? end(one) : null]];
  let last = start(one);
  return el("ol", { className: "events" }, ...all.map(([title, at]) => {
    if (!at) return step(el("span", { className: "missing", textContent: title }), isOver || all.at(-1)[1] ? "not seen" : "not yet", "");
    const added = Math.max(0, at - last);
    last = Math.max(last, at);
    return step(el("span", { textContent: title }), new Date(1000 * at).toLocaleTimeString([], { hour12: false }), `+${seconds(added)}`);
  }));
}

const step = (title, clock, added) => el("li", {}, title, el("span", { className: "clock", textContent: clock }), el("span", { textContent: added }));

function facts(one) {
  const rate = one.first && one.last > one.first ? number((one.tokens - 1) / (one.last - one.first)) : null, waited = queued(one);
  const hops = [["encode", one.encode_taken - one.accepted], ["generate", one.taken - (one.media ? one.encoded : one.accepted)]];
  const all = [["queue time", waited === null ? "–" : seconds(waited)], ...hops.filter(([, s]) => s >= 0).map(([stream, s]) => [`hop of ${stream}`, seconds(s)]),
    ["prompt", one.prompt_tokens || "–"], ["cached", one.cached_tokens], ["tokens", one.tokens], ["tokens/s", rate ?? "–"],
    ["media", Number(one.media)], ["on", one.replica || "–"], ["deliveries", one.attempts || "–"]];
  return el("p", { className: "facts" }, ...all.map(([title, value]) => el("span", {}, `${title} `, el("b", { textContent: String(value) }))));
}
