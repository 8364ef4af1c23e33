// What a server takes of pictures and videos in one request, the whole conversation counted. Pure.

import { count, megabytes } from "./words.js";

const KINDS = { image: "picture", video: "video" };
const BASE64 = 4 / 3;  // bytes that a byte of a file becomes in a request
const TEXT_BYTES = 1 << 20;  // left for all that is not a file

/** All media of some turns that are not left out, the oldest first. */
export function sent(turns) {
  return turns.flatMap((turn) => turn.media ?? []).filter((one) => one.blob && !one.out);
}

/** Which of the older media must stay out for the newer to fit, and in words why. `older` may be left out, `newer` not.
 * `limits` is the body of GET /console/limits, or null as long as it is not known. */
export function excess(older, newer, limits) {
  if (!limits) return null;
  const out = new Set(), why = [], never = [];
  for (const [kind, noun] of Object.entries(KINDS)) {
    const most = limits.limit_mm_per_prompt[kind], old = older.filter((one) => one.kind === kind), added = newer.filter((one) => one.kind === kind);
    const many = old.length + added.length - most;
    if (many <= 0) continue;
    const rule = `This server takes ${most ? `at most ${count(most, noun)}` : `no ${noun}s`} in one conversation (its setting limit_mm_per_prompt)`;
    if (added.length > most) never.push(`${rule}. Remove ${count(added.length - most, noun)} from this message.`);
    else why.push(`${rule}, and with this message there would be ${old.length + added.length}.`);
    for (const one of old.slice(0, many)) out.add(one);
  }
  addBytes(older, newer, limits, { out, why, never });
  return why.length || never.length ? { out: [...out], why: [...never, ...why].join(" "), never: never.length > 0 } : null;
}

function addBytes(older, newer, limits, { out, why, never }) {
  const most = limits.max_body_bytes - TEXT_BYTES, size = (media) => BASE64 * media.reduce((sum, one) => sum + one.blob.size, 0);
  let bytes = size(newer) + size(older.filter((one) => !out.has(one)));
  if (bytes <= most) return;
  const rule = `A request to this server may have ${megabytes(limits.max_body_bytes)} (its setting max_body_bytes)`;
  if (size(newer) > most) never.push(`${rule}: the files of this message are too large.`);
  else why.push(`${rule}, and with all files of this conversation it would have ${megabytes(bytes)}.`);
  for (const one of older) {
    if (bytes <= most) break;
    if (out.has(one)) continue;
    out.add(one);
    bytes -= size([one]);
  }
}

/** Whether a server's refusal is one that leaving pictures out would mend. */
export function isAboutMedia({ status, message = "", code = "" }) {
  return status === 413 || code === "context_length_exceeded" || message.includes("limit_mm_per_prompt");
}
