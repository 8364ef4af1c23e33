// Conversations as a file: what is written, and what is read again from a file that may be anything.

const FORMAT = "millrace-conversations", VERSION = 1;
const KINDS = ["image", "video"], ROLES = ["user", "assistant", "tool"];

/** `conversations` is a list of {chat, turns}; `encode` makes a data URL of a blob. */
export async function toFile(conversations, encode) {
  const written = await Promise.all(conversations.map(async ({ chat, turns }) => ({ ...chat, turns: await Promise.all(turns.map((turn) => toPlain(turn, encode))) })));
  return JSON.stringify({ format: FORMAT, version: VERSION, conversations: written }, null, 1);
}

async function toPlain({ chat: _chat, ...turn }, encode) {
  if (!turn.media) return turn;
  const media = await Promise.all(turn.media.map(async ({ blob, ...one }) => ({ ...one, url: blob ? await encode(blob) : null })));
  return { ...turn, media };
}

/** The conversations of a file, as {chat, turns}. `decode` makes a blob of a data URL.
 *
 * Throws an Error that says what is wrong with the file.
 */
export function fromFile(text, decode) {
  let file;
  try {
    file = JSON.parse(text);
  } catch {
    throw new Error("it is not JSON");
  }
  if (file?.format !== FORMAT) throw new Error("it is not an export of conversations");
  if (file.version !== VERSION) throw new Error(`it is of version ${String(file.version)}, and this page reads ${VERSION}`);
  return list(file.conversations, "conversations").map((one, i) => readConversation(one, `conversations[${i}]`, decode));
}

function readConversation(one, where, decode) {
  const chat = { id: string(one?.id, `${where}.id`), title: string(one.title, `${where}.title`), created: number(one.created), updated: number(one.updated), head: one.head };
  const turns = list(one.turns, `${where}.turns`).map((turn, i) => readTurn(turn, chat.id, `${where}.turns[${i}]`, decode));
  const before = new Set([null]);
  for (const turn of turns) {
    if (!before.has(turn.parent)) throw new Error(`${where} has a turn before the one that it follows`);
    before.add(turn.id);
  }
  if (!before.has(chat.head)) throw new Error(`${where}.head is none of its turns`);
  return { chat, turns };
}

function readTurn(turn, chat, where, decode) {
  if (!ROLES.includes(turn?.role)) throw new Error(`${where}.role is none of ${ROLES.join(", ")}`);
  const common = { id: string(turn.id, `${where}.id`), chat, parent: turn.parent ?? null, at: number(turn.at), role: turn.role };
  if (turn.role === "user") return { ...common, text: string(turn.text, `${where}.text`), media: list(turn.media, `${where}.media`).map((one) => readMedium(one, where, decode)) };
  if (turn.role === "tool") return { ...common, ...strings(turn, ["name", "call", "text"], where) };
  return { ...common, ...readAnswer(turn, where) };
}

/** An answer that was still being written when it was exported ends where it was. */
function readAnswer(turn, where) {
  const calls = list(turn.calls, `${where}.calls`).map((call) => strings(call, ["id", "name", "args"], `${where}.calls`));
  const asked = { model: "default", system: "", fields: {}, at: 0, ...turn.asked, key: "", last: null, base: { reasoning: 0, content: 0 } };
  asked.id = /^chatcmpl-[0-9a-f]{16}$/.test(asked.id) ? asked.id : null;
  const stats = { prompt: null, cached: 0, tokens: null, thought: 0, first: null, last: null, total: null, reason: null, ...turn.stats };
  return { ...strings(turn, ["reasoning", "content"], where), calls, failure: turn.failure ?? null, stopped: turn.stopped === true || turn.ended === false, ended: true, asked, stats };
}

function readMedium(one, where, decode) {
  if (!KINDS.includes(one?.kind)) throw new Error(`${where}.media has a kind that is neither an image nor a video`);
  const blob = one.url ? decode(string(one.url, `${where}.media`)) : null;
  return { kind: one.kind, name: string(one.name, `${where}.media`), blob, ...(one.out ? { out: true } : {}) };
}

function strings(value, names, where) {
  return Object.fromEntries(names.map((each) => [each, string(value?.[each], `${where}.${each}`)]));
}

function string(value, where) {
  if (typeof value !== "string") throw new Error(`${where} is no text`);
  return value;
}

function list(value, where) {
  if (!Array.isArray(value)) throw new Error(`${where} is no list`);
  return value;
}

const number = (value) => (Number.isFinite(value) ? value : 0);

/** A blob of a base64 data URL of an image or a video; without fetch(), which the page's policy keeps to its own server. */
export function toBlob(url) {
  const [, type, data] = /^data:((?:image|video)\/[\w.+-]+);base64,([\w+/=\s]*)$/.exec(url) ?? [];
  if (!type) throw new Error("a file in it is neither an image nor a video");
  return new Blob([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], { type });
}
