// A request and its answer, across broken connections, gateways that end, and reloads of the page.
//
// The request carries an Idempotency-Key, so that sending it again starts nothing, and a connection that ends does not
// cancel it. Each event has an id, which is kept in the turn together with what the event said. When the stream breaks,
// the page goes on behind that id, at whatever gateway answers (docs/api.md, "Going on with a stream").

import { api, Refused } from "./server.js";
import { addChunk, events, rewind } from "./sse.js";

export const CHAT_PATH = "/v1/chat/completions";

const PASSING = [0, 502, 503, 504];  // statuses of a server or proxy that may answer a moment later
const RETURNING = [...PASSING, 401, 429];  // and of one at which an answer waits that has begun
const FINAL = ["timeout", "timeout_error", "request_lost"];  // codes that no repetition changes
const FIRST_S = 20, NEXT_S = 600;  // how long the page tries again, before and after the first event
const PAUSES_MS = [250, 500, 1000, 2000, 3000];

class Broken extends Error {}

export class Run {
  /** `body` makes the request. `changed` is called whenever the turn has, and at the end. */
  constructor(turn, body, changed) {
    Object.assign(this, { turn, body, changed, waiting: false, stopping: false, abort: new AbortController() });
    Object.assign(this, { failures: 0, failing: null, cause: null });  // since the last event: how often, when first, by what
    this.wake = () => {};
  }

  /** Reads the answer to its end. Never throws: what goes wrong is in the turn. */
  async drive() {
    const { turn } = this;
    try {
      while (!(await this.attempt())) { /* the stream broke */ }
    } catch (error) {
      if (!turn.ended) turn.failure = asFailure(error);
    }
    this.end();
  }

  /** Ends the answer here at once, and in the engine as soon as it can be told. */
  stop() {
    if (this.turn.ended) return;
    this.stopping = this.turn.stopped = true;
    this.wake();
    if (this.turn.asked.id) {
      this.abort.abort();
      cancel(this.turn.asked.id);
    }
    this.end();
  }

  end() {
    const { turn } = this;
    if (turn.ended) return;
    turn.stats.total = this.since();
    turn.ended = true;
    this.waiting = false;
    this.changed();
  }

  since() {
    return (Date.now() - this.turn.asked.at) / 1000;
  }

  /** Reads one connection; true if the answer is complete. Waits before the next if the failure may pass. */
  async attempt() {
    try {
      const reply = await this.connect();
      for await (const event of events(reply.body)) {
        if (this.take(event)) return true;
      }
      throw new Broken();
    } catch (error) {
      if (this.stopping) return true;
      await this.pause(error);
      return false;
    }
  }

  async connect() {
    const { asked } = this.turn, { signal } = this.abort;
    if (asked.id) {
      const headers = asked.last === null ? {} : { "Last-Event-ID": asked.last };
      if (asked.last === null) rewind(this.turn);
      return api(`${CHAT_PATH}/${asked.id}/events`, { headers, signal });
    }
    this.text ??= JSON.stringify(await this.body());
    const headers = { "Content-Type": "application/json", "Idempotency-Key": asked.key, "X-Event-IDs": "true" };
    return api(CHAT_PATH, { method: "POST", headers, body: this.text, signal });
  }

  /** Adds an event to the turn; true if it is the last one. */
  take({ id, data }) {
    const { turn } = this;
    if (data.startsWith("[DONE]")) {
      if (!turn.stats.reason) throw new Broken();
      return true;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw (this.cause = new Refused(chunk.error.code, { ...chunk.error, code: chunk.error.type }));
    turn.asked.id = chunk.id;
    if (this.stopping) {
      this.abort.abort();
      cancel(chunk.id);
      return true;
    }
    addChunk(turn, chunk, this.since());
    if (id !== null) turn.asked.last = id;
    this.waiting = false;
    Object.assign(this, { failures: 0, failing: null, cause: null });
    this.changed();
    return false;
  }

  /** Waits until it is worth trying again.
   *
   * Throws the error if it is not.
   */
  async pause(error) {
    const { asked } = this.turn;
    if (error instanceof Refused && error.status === 400 && error.param === "Last-Event-ID" && asked.last !== null) {
      asked.last = null;  // Redis has lost the end of what we have: from the beginning
      return;
    }
    if (error.status === 404 && this.cause) throw this.cause;  // which says why there is nothing any more
    this.failing ??= Date.now();
    const isOver = Date.now() - this.failing > 1000 * (asked.id ? NEXT_S : FIRST_S);
    if (isOver || !mayPass(error, asked.id !== null)) throw error;
    const ms = Math.max(1000 * (error.retryAfter ?? 0), PAUSES_MS[Math.min(this.failures, PAUSES_MS.length - 1)]);
    this.failures += 1;
    this.waiting = true;
    this.changed();
    await new Promise((resolve) => {
      this.wake = resolve;
      setTimeout(resolve, ms * (0.75 + Math.random() / 2));  // not all pages at once
    });
  }
}

function mayPass(error, hasBegun) {
  if (!(error instanceof Refused)) return error instanceof Broken || error instanceof TypeError;  // the connection ended
  return !FINAL.includes(error.code) && (hasBegun ? RETURNING : PASSING).includes(error.status);
}

function asFailure(error) {
  if (error instanceof Refused) return error.plain;
  if (error instanceof Broken || error instanceof TypeError) return { ...new Refused(0).plain, message: "The connection ended before the answer did." };
  return { message: error.message };
}

/** Tells the engine that nobody waits for an answer. Tried for a while, since the server may be what has gone. */
async function cancel(id) {
  for (const ms of [0, ...PAUSES_MS]) {
    await new Promise((resolve) => { setTimeout(resolve, ms); });
    try {
      await api(`${CHAT_PATH}/${id}/cancel`, { method: "POST" });
      return;
    } catch (error) {
      if (!mayPass(error, true)) return;
    }
  }
}
