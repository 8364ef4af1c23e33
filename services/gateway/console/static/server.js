// The server: requests with the key, the key's dialog, the model, the limits and the health.

import { $, setText, toast } from "./dom.js";
import { headline } from "./words.js";

const KEY = "millrace.key";

export const server = { model: "", limits: null, needsKey: sessionStorage.getItem(KEY) !== null, declined: false };

/** An answer that is an error, or none at all: status 0. `message` says it in words, `details` is the server's text. */
export class Refused extends Error {
  constructor(status, error = {}, retryAfter = null) {
    super(headline(status));
    Object.assign(this, { status, details: error.message ?? "", code: error.code ?? null, param: error.param ?? null, retryAfter });
  }

  /** As it is kept in a turn. */
  get plain() {
    const { message, status, details, code, param } = this;
    return { message, status, details, code, param };
  }
}

/** Raises Refused, or an AbortError if `options.signal` aborts. */
export async function api(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let reply;
  try {
    reply = await fetch(path, { ...options, headers });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Refused(0);
  }
  if (reply.ok) return reply;
  if (reply.status === 401) noteKey();
  let error = {};
  try {
    error = (await reply.json()).error ?? {};
  } catch { /* not ours: a proxy's page, say */ }
  throw new Refused(reply.status, error, Number(reply.headers.get("retry-after")) || null);
}

function noteKey() {
  server.needsKey = true;
  $("key-button").hidden = false;
  if (!server.declined) askForKey();
}

function askForKey() {
  const dialog = $("key-dialog");
  if (dialog.open) return;
  setText($("key-problem"), sessionStorage.getItem(KEY) ? "The server does not know this key." : "");
  $("key").value = "";
  dialog.showModal();
}

async function findModel() {
  try {
    const { data } = await (await api("/v1/models")).json();
    server.model = data[0].id;
    $("model").textContent = server.model;
    server.limits = await (await api("/console/limits")).json();
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
    if (!server.limits && !server.needsKey) await findModel();
  } catch { /* said by the defaults */ }
  $("health").dataset.state = state;
  setText($("health"), text);
}

function declineKey() {
  server.declined = true;  // asked again only when somebody sends something, or wants to
  $("key-dialog").close();
}

export function startServer() {
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
  if (server.needsKey) findModel();
  checkHealth();
  setInterval(() => { if (!document.hidden) checkHealth(); }, 5000);
}
