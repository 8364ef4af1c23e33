// What the page knows of the pipeline: the newest answer of GET /console/state, and words for it.

export const LABELS = { encoding: "encoding", reading: "reading the prompt", writing: "writing", waiting: "waiting", queued: "in the engine's queue", ended: "ended", lost: "ended early" };

export const observed = {
  picture: null,
  requests: new Map(),  // by id, the newest first
  found: null,  // the request that was searched for
  chosen: null,  // the id of the one whose timeline is shown
};

export const now = () => observed.picture.pipeline.at;
export const queues = () => observed.picture.pipeline.stages.map((stage) => stage.queue).filter((queue) => queue !== null);
export const loads = (name) => observed.picture.pipeline.stages.find((stage) => stage.service === name).replicas.map((replica) => replica.load);
export const sum = (name, figure) => loads(name).reduce((total, load) => total + (load[figure] ?? 0), 0);
export const tokenRate = () => sum("engine", "tokens_per_s");

/** The mean of what some replicas publish; null if none does. */
export function mean(values) {
  const there = values.filter((value) => value !== undefined && value !== null);
  return there.length ? there.reduce((a, b) => a + b) / there.length : null;
}

export const hop = (name) => mean(loads(name).map((load) => load.hop_s));

export function phase(one) {
  if (one.where === "ended") return one.reason === "stop" || one.reason === "length" || one.reason === "tool_calls" ? "ended" : "lost";
  if (one.waiting) return "waiting";
  if (one.where === "encode") return "encoding";
  return one.tokens > 0 ? "writing" : one.begun ? "reading" : "queued";
}

/** Times of a request; `start` is the first that is known. */
export const start = (one) => one.accepted ?? one.begun ?? one.first ?? one.seen;
export const end = (one) => (one.where === "ended" ? one.finished ?? one.seen : now());

/** Seconds for which a request has waited for replicas: in streams, and in an engine until that began it. */
export function queued(one) {
  if (one.accepted === undefined) return null;
  const encoder = one.media ? (one.encode_taken ?? (one.encoded ? null : end(one))) : one.accepted;
  const from = one.media ? one.encoded : one.accepted;
  if (encoder === null) return null;  // an encoder had it between two looks
  return Math.max(0, encoder - one.accepted) + (from ? Math.max(0, (one.begun ?? end(one)) - from) : 0);
}

/** A request of the API as the stages name it: without the prefix of its answer. */
export const bare = (name) => name.trim().replace(/^chatcmpl-/, "");
