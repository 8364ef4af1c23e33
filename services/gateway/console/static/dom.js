// Elements. Text from people and models reaches the page through text nodes only.

export const $ = (id) => document.getElementById(id);

/** An element: properties by name, `data`, `aria` and `on` as objects of their own, then children. */
export function el(tag, { data = {}, aria = {}, on = {}, ...properties } = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  Object.assign(made.dataset, data);
  for (const [name, value] of Object.entries(aria)) made.setAttribute(name === "role" ? name : `aria-${name}`, value);
  for (const [name, listener] of Object.entries(on)) made.addEventListener(name, listener);
  made.append(...children.filter((child) => child !== null));
  return made;
}

export function button(text, listener, className = "small", aria = {}) {
  return el("button", { type: "button", className, textContent: text, aria, on: { click: listener } });
}

export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function toast(text) {
  $("toast").textContent = text;
  $("toast").classList.add("shown");
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => $("toast").classList.remove("shown"), 2000);
}

export async function copy(text, said = "Copied") {
  try {
    await navigator.clipboard.writeText(text);
    toast(said);
  } catch {  // not a secure context, or not allowed
    $("copy-text").value = text;
    $("copy-dialog").showModal();
    $("copy-text").select();
  }
}

/** What stands in the way of the next message, beside where it is written; nothing for "". */
export function say(problem) {
  $("problem").textContent = problem;
  if (problem) $("problem").scrollIntoView({ block: "nearest" });
}

/** Asks before what cannot be undone. */
export function confirm(question, verb) {
  const dialog = $("confirm-dialog");
  setText($("confirm-text"), question);
  setText($("confirm-yes"), verb);
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true }));
}

/** An id that no other has. Not crypto.randomUUID, which pages without TLS lack. */
export const fresh = () => [...crypto.getRandomValues(new Uint32Array(3))].map((part) => part.toString(36)).join("");
