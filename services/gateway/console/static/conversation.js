// The conversation that is shown, and the answers that are coming, in it or behind it.

import { copy, $, fresh, say } from "./dom.js";
import { excess, sent } from "./limits.js";
import { bodyOf, curl } from "./request.js";
import { CHAT_PATH, Run } from "./run.js";
import { server } from "./server.js";
import { settingFields, systemPrompt } from "./settings.js";
import { emptyAnswer, emptyStats } from "./sse.js";
import { readTurns, update, write } from "./store.js";
import { path, siblings, tip } from "./tree.js";
import { viewOf } from "./turns.js";

const OPEN = "millrace.open", KEPT_EVERY_MS = 500;

let chat = newChat();
let opening = null;
let turns = new Map();
let views = new Map();  // by turn, of the path that is shown
const running = new Map();  // by turn id, in all conversations
const unkept = new Map();  // timers of turns that are to be written
const listeners = { chats: () => {}, answered: () => {}, timeline: () => {} };

export function newChat() {
  return { id: fresh(), title: "", created: Date.now(), updated: Date.now(), head: null };
}

/** `chats(chat)` is called when a conversation has changed, `answered()` as answers come and go, `timeline(id)` for one. */
export function startConversation(heard) {
  Object.assign(listeners, heard);
  addEventListener("pagehide", keepAll);
  document.addEventListener("visibilitychange", keepAll);
}

export const openedChat = () => chat;
export const lastOpened = () => sessionStorage.getItem(OPEN);
export const shownTurns = () => path(turns, chat.head);
export const isAnswering = () => running.has(chat.head);

export async function openChat(one) {
  opening = one;
  const found = await readTurns(one.id);
  if (opening !== one) return;  // another was opened meanwhile
  chat = one;
  turns = new Map(found.map((turn) => [turn.id, running.get(turn.id)?.turn ?? turn]));
  views = new Map();
  sessionStorage.setItem(OPEN, chat.id);
  for (const turn of turns.values()) if (turn.role === "assistant" && !turn.ended && !running.has(turn.id)) start(turn);
  draw();
  listeners.chats(null);
  listeners.answered();
  toEnd(true);
}

/** Ends the answers of a conversation that is to be deleted, or of all. */
export function stopAnswers(id = null) {
  for (const run of [...running.values()]) if (id === null || run.turn.chat === id) run.stop();
}

export function stopShown() {
  running.get(chat.head)?.stop();
}

// ------------------------------------------------------------------------------------------------ on the page

const actions = {
  siblings: (turn) => siblings(turns, turn),
  show(turn) {
    moveTo(tip(turns, turn.id));
    views.get(turn).node.querySelector(".branches button:enabled").focus();
  },
  edit(turn, text) {
    if (isAnswering() || !(text || turn.media.length)) return false;
    add({ role: "user", text, media: turn.media }, turn.parent);
    ask();
    return true;
  },
  again(turn) {
    if (!isAnswering()) ask(turn.parent);
  },
  canContinue: (turn) => turn.id === chat.head && !turn.calls.length && Boolean(turn.content || turn.reasoning)
    && (turn.stopped || turn.failure !== null || turn.stats.reason === "length"),
  continue: goOn,
  async copyCurl(turn) {
    const said = server.needsKey ? "Copied; it reads the key from $MILLRACE_API_KEY" : "Copied";
    copy(curl(location.origin + CHAT_PATH, await bodyOf(turn.asked, path(turns, turn.parent), turn), server.needsKey), said);
  },
  timeline: (id) => listeners.timeline(id),
  /** The ids of a turn's calls whose results are missing, if they can still be given. */
  awaited(turn) {
    const after = shownTurns().slice(shownTurns().indexOf(turn) + 1);
    if (after.some((later) => later.role !== "tool")) return [];
    return turn.calls.map((call) => call.id).filter((id) => !after.some((later) => later.call === id));
  },
  giveResult(turn, call, text) {
    add({ role: "tool", name: call.name, call: call.id, text });
    if (!actions.awaited(turn).length) ask();
  },
  olderMedia: (turn) => olderMedia(path(turns, turn.parent)),
  leaveOutAgain(turn, older) {
    leaveOut(older);
    actions.again(turn);
  },
  grown: () => toEnd(false),
};

/** The media before the newest message: those that the limits ask to leave out, or all of them. */
function olderMedia(before) {
  const last = before.findLastIndex((turn) => turn.role === "user"), older = sent(before.slice(0, last));
  const most = excess(older, sent(before.slice(last)), server.limits);
  return most ? most.out : older;
}

function draw() {
  const shown = shownTurns(), list = $("messages");
  const wanted = new Map(shown.map((turn) => [turn, views.get(turn) ?? viewOf(turn, actions)]));
  for (const [turn, view] of views) {
    if (!wanted.has(turn)) view.node.remove();
    else view.update(running.get(turn.id)?.waiting);
  }
  views = wanted;
  [...wanted.values()].forEach(({ node }, i) => {
    if (list.children[i] !== node) list.insertBefore(node, list.children[i] ?? null);
  });
  while (list.children.length > wanted.size) list.lastElementChild.remove();
  $("welcome").hidden = shown.length > 0;
}

function toEnd(always) {
  const box = $("scroll");
  if (always || box.scrollHeight - box.scrollTop - box.clientHeight < 160) box.scrollTop = box.scrollHeight;
}

// ------------------------------------------------------------------------------------------------ turns

/** Adds a turn at the end of what is shown, or behind `parent`, and shows it. */
function add(fields, parent = chat.head) {
  const turn = { id: fresh(), chat: chat.id, parent, at: Date.now(), ...fields };
  turns.set(turn.id, turn);
  chat.title ||= (turn.text ?? "").slice(0, 60) || turn.media?.[0]?.name || "";
  Object.assign(chat, { head: turn.id, updated: Date.now() });
  keep([turn]);
  draw();
  toEnd(true);
  return turn;
}

function moveTo(id) {
  chat.head = id;
  keep([]);
  draw();
  listeners.answered();
}

/** Sends a message of a person. */
export function sendMessage(text, media) {
  settingFields();  // throws if they are not right, before anything is sent
  add({ role: "user", text, media });
  ask();
}

/** Marks media as left out of all requests from now on. */
export function leaveOut(media) {
  for (const one of media) one.out = true;
  keep([...turns.values()].filter((turn) => turn.media?.some((one) => media.includes(one))));
  draw();
}

// ------------------------------------------------------------------------------------------------ answers

/** Has an answer made behind a turn. */
function ask(parent = chat.head) {
  let fields;
  try {
    fields = settingFields();
  } catch (error) {
    say(error.message);
    return;
  }
  server.declined = false;
  const base = { reasoning: 0, content: 0 };
  start(add(emptyAnswer({ model: server.model || "default", system: systemPrompt(), fields, base, ...anew() }), parent));
}

const anew = () => ({ key: fresh(), id: null, last: null, at: Date.now() });

/** Has the model go on with an answer that was stopped, cut off or broken. */
function goOn(turn) {
  if (isAnswering()) return;
  const base = { reasoning: turn.reasoning.length, content: turn.content.length };
  Object.assign(turn.asked, { fields: settingFields(), base, ...anew() });
  Object.assign(turn, { ended: false, stopped: false, failure: null, stats: emptyStats() });
  start(turn);
}

/** Reads an answer to its end: from the beginning, or, after the page was loaded again, from where it was. */
function start(turn) {
  const before = path(turns, turn.parent);
  const run = new Run(turn, () => bodyOf(turn.asked, before, turn), () => changed(run));
  running.set(turn.id, run);
  keepTurn(turn);
  draw();
  listeners.answered();
  if (document.activeElement === document.body) $("scroll").focus({ preventScroll: true });  // its button is gone
  run.drive();
}

function changed({ turn, waiting }) {
  if (turn.ended) running.delete(turn.id);
  views.get(turn)?.update(waiting);
  if (!turn.ended) {
    if (!unkept.has(turn)) unkept.set(turn, setTimeout(() => keepTurn(turn), KEPT_EVERY_MS));
    return;
  }
  keepTurn(turn);
  listeners.answered();
  if (!views.has(turn)) return;
  if (turn.failure) views.get(turn).node.querySelector(".failure")?.scrollIntoView({ block: "nearest" });
  else toEnd(false);
}

// ------------------------------------------------------------------------------------------------ what is kept

function keep(changedTurns) {
  write(chat, changedTurns).catch(notKept);
  listeners.chats(chat);
}

function keepTurn(turn) {
  clearTimeout(unkept.get(turn));
  unkept.delete(turn);
  return update(turn).catch(notKept);
}

function keepAll() {
  for (const turn of [...unkept.keys()]) keepTurn(turn);
}

function notKept(error) {
  say(error?.name === "QuotaExceededError"
    ? "The browser has no room for more of this conversation: it lasts as long as this page. Delete others, or export it."
    : `The browser does not keep this conversation: ${error?.message ?? "it is not allowed to"}`);
}
