// Where a message is written: its text, its files, and what the server's limits say to them before it is sent.

import { isAnswering, leaveOut, sendMessage, shownTurns, stopShown } from "./conversation.js";
import { $, button, el, say } from "./dom.js";
import { excess, sent } from "./limits.js";
import { server } from "./server.js";
import { showMedium } from "./turns.js";
import { count } from "./words.js";

let attached = [];  // media of the next message
let attaching = Promise.resolve();  // until all of them have been read

async function submit() {
  await attaching;
  const text = $("prompt").value.trim();
  if (isAnswering() || (!text && !attached.length)) return;
  say("");
  if (showLimits()) return;
  try {
    sendMessage(text, attached);
  } catch (error) {
    say(error.message);
    return;
  }
  attached = [];
  $("prompt").value = "";
  showAttached();
}

/** Says what does not fit the server's limits, and offers what helps; returns whether there is something. */
export function showLimits() {
  const older = sent(shownTurns()), over = excess(older, attached, server.limits);
  $("limits").hidden = !over;
  $("limits-text").textContent = over?.why ?? "";
  $("limits-leave").hidden = !over || over.never;
  if (over) {
    $("limits-leave").textContent = `Leave out the oldest ${over.out.length > 1 ? over.out.length : "one"}`;
    $("limits-leave").onclick = () => {
      leaveOut(over.out);
      showLimits();
      $("prompt").focus();
    };
    $("limits").scrollIntoView({ block: "nearest" });
  }
  return Boolean(over);
}

/** Files are looked at one after another, and nothing is sent before all are. */
function attach(files) {
  say("");
  const list = [...files];
  attaching = attaching.then(() => read(list)).catch((error) => say(`A file cannot be read: ${error.message}`));
}

async function read(files) {
  const refused = [];
  for (const file of files) {
    const kind = file.type.split("/")[0], problem = whyNot(file, kind);
    if (problem) refused.push(problem);
    else attached.push({ kind, name: file.name || `pasted ${kind}`, blob: await copyOf(file) });
  }
  showAttached();
  if (refused.length) say(refused.join(" "));
}

function whyNot(file, kind) {
  const name = file.name || "This file", most = server.limits?.max_media_bytes ?? Infinity;
  if (kind !== "image" && kind !== "video") return `${name} is neither an image nor a video.`;
  return file.size > most ? `${name} has ${count(file.size, "byte")}, and this server takes ${most} (its setting max_media_bytes).` : null;
}

/** What a file has in it now: the one on the disk may change or go before it is sent. */
const copyOf = async (file) => new Blob([await file.arrayBuffer()], { type: file.type });

function showAttached() {
  $("attachments").replaceChildren(...attached.map((one) => {
    const remove = button("×", () => {
      attached = attached.filter((other) => other !== one);
      showAttached();
      $("prompt").focus();
    }, "", { label: `Remove ${one.name}` });
    const medium = showMedium(one);
    medium.controls = false;
    return el("li", {}, medium, remove);
  }));
  showLimits();
}

export function showRunning() {
  $("send").hidden = isAnswering();
  $("stop").hidden = !isAnswering();
}

const hasFiles = (event) => event.dataTransfer?.types.includes("Files");

export function startComposer() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  });
  $("stop").addEventListener("click", () => {
    stopShown();
    $("prompt").focus();
  });
  $("attach").addEventListener("click", () => $("picker").click());
  $("picker").addEventListener("change", () => {
    attach($("picker").files);
    $("picker").value = "";
  });
  takeFiles($("talk"));
}

/** Files are taken anywhere on the page: where a page does not take one, the browser leaves the page for it. */
function takeFiles(talk) {
  document.addEventListener("paste", (event) => {
    if ($("chat").hidden || !event.clipboardData.files.length) return;
    event.preventDefault();
    attach(event.clipboardData.files);
  });
  for (const name of ["dragenter", "dragover"]) {
    document.addEventListener(name, (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      talk.classList.add("dropping");
    });
  }
  document.addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) talk.classList.remove("dropping");
  });
  document.addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    talk.classList.remove("dropping");
    if (!$("chat").hidden) attach(event.dataTransfer.files);
  });
}
