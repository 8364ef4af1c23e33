// The list of conversations: opened, deleted, exported and imported.

import { fromFile, toBlob, toFile } from "./archive.js";
import { newChat, openChat, openedChat, lastOpened, stopAnswers } from "./conversation.js";
import { $, button, confirm, el, say, toast } from "./dom.js";
import { dataUrl } from "./request.js";
import { isLasting, readChats, readTurns, remove, removeAll, write } from "./store.js";
import { count } from "./words.js";

let chats = [];
const others = "BroadcastChannel" in globalThis ? new BroadcastChannel("millrace") : null;  // tabs of the same page

export async function startHistory() {
  chats = await readChats();
  await openChat(chats.find((one) => one.id === lastOpened()) ?? newChat());
  $("new-chat").addEventListener("click", () => choose(newChat()));
  $("export").addEventListener("click", exportAll);
  $("import").addEventListener("click", () => $("import-file").click());
  $("import-file").addEventListener("change", importFile);
  $("delete-all").addEventListener("click", deleteAll);
  others?.addEventListener("message", hear);
  $("kept").textContent = isLasting ? "Kept in this browser, and nowhere else." : "This browser keeps nothing: conversations last as long as this page.";
}

/** Shows the list again; `changed` is a conversation that is new or has changed, null for none. */
export function showChats(changed) {
  if (changed) {
    chats = [changed, ...chats.filter((one) => one.id !== changed.id)].sort((a, b) => b.updated - a.updated);
    others?.postMessage({ changed: true });
  }
  $("conversations").replaceChildren(...chats.map((one) => {
    const open = button(one.title || "Untitled", () => choose(one), "");
    if (one.id === openedChat().id) open.setAttribute("aria-current", "true");
    return el("li", {}, open, button("×", () => deleteChat(one), "remove", { label: `Delete ${one.title || "Untitled"}` }));
  }));
  for (const name of ["export", "delete-all"]) $(name).disabled = chats.length === 0;
}

async function choose(one) {
  await openChat(one);
  $("prompt").focus();
}

async function deleteChat(one) {
  stopAnswers(one.id);
  await remove(one.id);
  others?.postMessage({ removed: [one.id] });
  await forget([one.id]);
}

async function deleteAll() {
  if (!(await confirm(`Delete ${count(chats.length, "conversation")} from this browser? This cannot be undone.`, "Delete all"))) return;
  stopAnswers();
  const ids = chats.map((one) => one.id);
  await removeAll();
  others?.postMessage({ removed: ids });
  await forget(ids);
}

/** Takes conversations off the page that are not kept any more. */
async function forget(ids) {
  chats = chats.filter((one) => !ids.includes(one.id));
  if (ids.includes(openedChat().id)) await choose(newChat());
  else showChats(null);
}

/** What another tab has done. The conversation that is shown here stays as it is here. */
async function hear({ data }) {
  if (data.removed) await forget(data.removed);
  if (data.changed) await reread();
}

async function reread() {
  const found = await readChats();
  chats = found.map((one) => (one.id === openedChat().id ? openedChat() : one));
  showChats(null);
}

// ------------------------------------------------------------------------------------------------ files

async function exportAll() {
  const conversations = await Promise.all(chats.map(async (chat) => ({ chat, turns: await readTurns(chat.id) })));
  const file = new Blob([await toFile(conversations, dataUrl)], { type: "application/json" });
  const href = URL.createObjectURL(file);
  el("a", { href, download: `millrace-${new Date().toISOString().slice(0, 10)}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(href), 60_000);
}

async function importFile() {
  const [file] = $("import-file").files;
  $("import-file").value = "";
  if (!file) return;
  try {
    const found = fromFile(await file.text(), toBlob), known = new Set(chats.map((one) => one.id));
    const added = found.filter(({ chat }) => !known.has(chat.id));
    for (const { chat, turns } of added) await write(chat, turns);
    others?.postMessage({ changed: true });
    await reread();
    const left = found.length - added.length;
    toast(`${count(added.length, "conversation")} imported${left ? `, ${left} here already` : ""}`);
  } catch (error) {
    say(`${file.name} was not imported: ${error.message}.`);
  }
}
