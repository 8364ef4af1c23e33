// The console: pages, drawers and keys; all else is in the modules beside.

import { showLimits, showRunning, startComposer } from "./composer.js";
import { startConversation, stopShown } from "./conversation.js";
import { $ } from "./dom.js";
import { showChats, startHistory } from "./history.js";
import { glance, showRequest, startPipeline, watch } from "./pipeline.js";
import { startServer } from "./server.js";
import { startSettings } from "./settings.js";
import { openStore } from "./store.js";

const DRAWERS = ["history", "settings"];

function closeDrawers() {
  for (const name of DRAWERS) {
    $(name).classList.remove("open");
    $(`${name}-button`).setAttribute("aria-expanded", "false");
  }
}

function startDrawers() {
  for (const name of DRAWERS) {
    $(`${name}-button`).addEventListener("click", (event) => {
      event.stopPropagation();
      closeDrawers();
      $(name).classList.add("open");
      $(`${name}-button`).setAttribute("aria-expanded", "true");
      $(name).querySelector(".close").focus();
    });
    $(name).querySelector(".close").addEventListener("click", () => {
      closeDrawers();
      $(`${name}-button`).focus();
    });
  }
  $("talk").addEventListener("click", closeDrawers);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
    const open = document.querySelector(".drawer.open");
    closeDrawers();
    if (open) $(`${open.id}-button`).focus();
    else stopShown();
  });
}

function turnPage() {
  const page = location.hash === "#pipeline" ? "pipeline" : "chat";
  for (const name of ["chat", "pipeline"]) {
    $(name).hidden = name !== page;
    if (name === page) $(`to-${name}`).setAttribute("aria-current", "page");
    else $(`to-${name}`).removeAttribute("aria-current");
  }
  document.title = page === "chat" ? "Millrace" : "Pipeline · Millrace";
  watch();
}

/** From an answer to its timeline. */
async function showTimeline(name) {
  location.hash = "#pipeline";
  turnPage();
  await showRequest(name);
  $("timeline").focus();
}

function startPages() {
  addEventListener("hashchange", turnPage);
  document.addEventListener("visibilitychange", watch);
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault();
    $("main").focus();
  });
  turnPage();
}

startServer();
startSettings();
startPipeline();
startDrawers();
startComposer();
startPages();
await openStore();
startConversation({
  chats(changed) {
    showChats(changed);
    if (!changed) closeDrawers();
  },
  answered() {
    showRunning();
    showLimits();
    glance();  // while a request is under way, so that its timeline is known later
  },
  timeline: showTimeline,
});
await startHistory();
if (!$("chat").hidden) $("prompt").focus();
