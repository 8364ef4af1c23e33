// Turns as elements. `actions` are what a person can do with them; conversation.js has them.

import { button, copy, el } from "./dom.js";
import { isAboutMedia } from "./limits.js";
import { Markdown } from "./markdown.js";
import { age, number, seconds } from "./words.js";

const previews = new WeakMap();  // URLs of files that are shown, by blob

function preview(blob) {
  if (!previews.has(blob)) previews.set(blob, URL.createObjectURL(blob));
  return previews.get(blob);
}

export function showMedium({ kind, name, blob, out }) {
  if (!blob) return el("span", { className: "hint", textContent: `${name} (not kept)` });
  const src = preview(blob), title = out ? `${name}, left out` : name;
  const node = kind === "image" ? el("img", { src, alt: title, title }) : el("video", { src, controls: true, muted: true, title, aria: { label: title } });
  node.classList.toggle("out", Boolean(out));
  return node;
}

/** The view of a turn: its node, and how to bring it up to date. */
export function viewOf(turn, actions) {
  if (turn.role === "assistant") return new AnswerView(turn, actions);
  return turn.role === "user" ? new UserView(turn, actions) : new ToolView(turn);
}

const name = (text) => el("h2", { className: "hidden", textContent: text });

class ToolView {
  constructor(turn) {
    this.node = el("li", { className: "turn user" }, name("Result"), el("div", { className: "text", textContent: `${turn.name} returned: ${turn.text}` }));
  }

  update() { /* it never changes */ }
}

class UserView {
  constructor(turn, actions) {
    Object.assign(this, { turn, actions, body: el("div", { className: "said" }), row: el("div", { className: "actions-row" }) });
    this.node = el("li", { className: "turn user" }, name("You"), this.body, this.row);
    this.update();
  }

  update() {
    const { turn, actions } = this;
    this.body.replaceChildren(...this.media(), ...(turn.text ? [el("div", { className: "text", textContent: turn.text })] : []));
    this.row.replaceChildren(branches(turn, actions), button("Edit", () => this.edit()), turn.text ? button("Copy", () => copy(turn.text)) : "");
  }

  media() {
    return this.turn.media.length ? [el("div", { className: "media" }, ...this.turn.media.map(showMedium))] : [];
  }

  /** A place to change the message, which becomes another branch: what followed the first one stays. */
  edit() {
    const { turn, actions } = this;
    const text = el("textarea", { value: turn.text, rows: 3, aria: { label: "Edited message" } });
    const send = () => {
      if (actions.edit(turn, text.value.trim())) this.update();
    };
    text.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.leave(event);
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      send();
    });
    this.body.replaceChildren(...this.media(), el("div", { className: "editor" }, text));
    this.row.replaceChildren(button("Cancel", (event) => this.leave(event)), button("Send", send, "primary small-primary"));
    text.focus();
  }

  leave(event) {
    event.stopPropagation();
    this.update();
    [...this.row.children].find((one) => one.textContent === "Edit").focus();
  }
}

class AnswerView {
  constructor(turn, actions) {
    Object.assign(this, { turn, actions, drawn: 0, frame: 0, folded: null });
    const reasoning = el("div", { className: "text prose", tabIndex: 0, aria: { role: "group", label: "Reasoning" } }), content = el("div", { className: "text prose answer" });
    this.reasoning = new Markdown(reasoning);
    this.content = new Markdown(content);
    this.thoughts = el("details", { className: "reasoning", hidden: true }, el("summary", { textContent: "Reasoning", on: { click: () => { this.folded = this.thoughts.open; } } }), reasoning);
    this.calls = el("div", { className: "calls" });
    this.waiting = el("p", { className: "waiting", hidden: true, aria: { role: "status" } });
    this.stats = el("div", { className: "stats" });
    this.failure = el("div");
    this.row = el("div", { className: "actions-row" });
    this.node = el("li", { className: "turn assistant" }, name("Answer"), this.thoughts, content, this.calls, this.waiting, this.failure, this.stats, this.row);
    this.draw(false);
  }

  /** Brings it up to date with the next frame, or at once when the answer has ended. */
  update(isWaiting = false) {
    if (this.turn.ended) {
      cancelAnimationFrame(this.frame);
      this.frame = 0;
      this.draw(isWaiting);
    } else {
      this.frame ||= requestAnimationFrame(() => {
        this.frame = 0;
        this.draw(isWaiting);
        this.actions.grown();
      });
    }
  }

  draw(isWaiting) {
    const { turn, node } = this, isLive = !turn.ended;
    node.classList.toggle("live", isLive);
    node.classList.toggle("answering", isLive && turn.content !== "");
    node.setAttribute("aria-busy", String(isLive));
    this.waiting.hidden = !isWaiting;
    this.waiting.textContent = isWaiting ? "The server does not answer. The answer goes on as soon as it does." : "";
    this.drawTexts(isLive);
    if (isLive) this.drawLive();
    else this.drawEnd();
  }

  drawTexts(isLive) {
    const { turn } = this, box = this.reasoning.box;
    this.thoughts.hidden = !turn.reasoning;
    this.thoughts.open = this.folded === null ? isLive && !turn.content : !this.folded;
    this.reasoning.show(turn.reasoning);
    if (isLive && !turn.content) box.scrollTop = box.scrollHeight;
    this.content.show(turn.content);
    this.drawCalls();
  }

  drawCalls() {
    const { calls, ended } = this.turn, key = JSON.stringify([calls, ended, this.actions.awaited(this.turn)]);
    if (key === this.called) return;
    this.called = key;
    this.calls.replaceChildren(...calls.map((call) => showCall(this.turn, call, this.actions)));
  }

  drawLive() {
    for (const part of [this.stats, this.failure, this.row]) part.replaceChildren();
  }

  drawEnd() {
    const { turn, actions } = this, { failure } = turn;
    const words = [turn.stopped ? "stopped" : null, ...statWords(turn.stats)].filter(Boolean);
    this.stats.replaceChildren(...words.map((word) => el("span", { textContent: word })));
    this.failure.replaceChildren(...(failure ? [showFailure(turn, actions)] : []));
    const text = turn.content || turn.reasoning;
    this.row.replaceChildren(branches(turn, actions), text ? button("Copy", () => copy(text)) : "",
      actions.canContinue(turn) ? button("Continue", () => actions.continue(turn)) : "",
      button("Again", () => actions.again(turn)), button("Copy as curl", () => actions.copyCurl(turn)),
      turn.asked.id ? button("Timeline", () => actions.timeline(turn.asked.id)) : "");
  }
}

function branches(turn, actions) {
  const all = actions.siblings(turn), at = all.indexOf(turn);
  if (all.length < 2) return "";
  const step = (to, sign, label) => {
    const made = button(sign, () => actions.show(all[to]), "small", { label });
    made.disabled = !all[to];
    return made;
  };
  return el("span", { className: "branches" }, step(at - 1, "‹", "Version before"), el("span", { textContent: `${at + 1}/${all.length}` }), step(at + 1, "›", "Version after"));
}

function statWords(s) {
  const rate = s.tokens > 1 && s.last > s.first ? `${number((s.tokens - 1) / (s.last - s.first))} tokens/s` : null;
  return [
    s.reason && s.reason !== "stop" ? `ended by ${s.reason}` : null,
    s.prompt === null ? null : `${s.prompt} prompt tokens${s.cached ? ` (${s.cached} cached)` : ""}`,
    s.tokens === null ? null : `${s.tokens} tokens${s.thought ? ` (${s.thought} reasoning)` : ""}`,
    s.first === null ? null : `first token ${seconds(s.first)}`, rate, s.total === null ? null : s.total < 100 ? seconds(s.total) : age(s.total)];
}

function showFailure(turn, actions) {
  const { message, status, details, code, param } = turn.failure;
  const facts = [status || null, code, param].filter((part) => part !== null && part !== undefined && part !== "").join(" · ");
  const older = isAboutMedia({ status, message: details, code }) ? actions.olderMedia(turn) : [];
  return el("div", { className: "failure", aria: { role: "alert" } }, el("strong", { textContent: message }),
    details ? el("p", { textContent: details }) : null, facts ? el("small", { textContent: facts }) : null,
    older.length ? el("div", {}, button("Leave older pictures out and send again", () => actions.leaveOutAgain(turn, older), "")) : null);
}

function showCall(turn, call, actions) {
  let text = call.args;
  try {
    text = JSON.stringify(JSON.parse(call.args), null, 2);
  } catch { /* not whole yet, or never */ }
  const card = el("div", { className: "call" }, el("h3", { textContent: call.name }), el("pre", { textContent: text }));
  if (!turn.ended || !actions.awaited(turn).includes(call.id)) return card;
  const result = el("textarea", { rows: 2, className: "code", placeholder: "What it returned", aria: { label: `Result of ${call.name}` } });
  card.append(result, button("Give this result", () => actions.giveResult(turn, call, result.value), ""));
  return card;
}
