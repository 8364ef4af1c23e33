// Markdown, tables, code and formulas as elements. Nothing here makes markup: the parser's tokens become elements of a
// fixed set, texts become text nodes, HTML in an answer stays the text that it is, and only http, https and mailto are
// linked. So there is nothing to sanitise, and the page's policy can forbid markup from strings altogether.

import { button, copy, el } from "./dom.js";
import { MarkdownIt, tex } from "./vendor/markdown.js";

const parser = new MarkdownIt({ linkify: true }).use(tex, { delimiters: "all", render: () => "" });
const PLAIN = { p: "p", ul: "ul", ol: "ol", li: "li", blockquote: "blockquote", thead: "thead", tbody: "tbody", tr: "tr", em: "em", strong: "strong", s: "s" };
const LINKS = /^(?:https?|mailto):/i;

/** A view of a text that grows: only blocks that have changed are made again. */
export class Markdown {
  constructor(box) {
    this.box = box;
    this.blocks = [];
    this.text = "";
  }

  show(text) {
    if (text === this.text) return;
    this.text = text;
    const env = {}, tokens = parser.parse(text, env);
    const references = JSON.stringify(env.references ?? {});
    const blocks = split(tokens, text.split("\n"), references);
    let i = 0;
    while (i < blocks.length && blocks[i].key === this.blocks[i]?.key) i += 1;
    for (const old of this.blocks.splice(i)) old.node.remove();
    for (const { key, tokens: of } of blocks.slice(i)) {
      const node = make(of);
      this.blocks.push({ key, node });
      this.box.append(node);
    }
  }
}

/** The blocks of a document, each with a key that says all that its elements depend on. */
function split(tokens, lines, references) {
  const blocks = [], above = [];
  let depth = 0, start = 0;
  tokens.forEach((token, i) => {
    if (token.type === "heading_open") token.meta = { level: rank(above, Number(token.tag[1])) };
    depth += token.nesting;
    if (depth > 0) return;
    const of = tokens.slice(start, i + 1), [from, to] = of[0].map ?? [0, lines.length];
    blocks.push({ tokens: of, key: [of[0].type, of[0].meta?.level, lines.slice(from, to).join("\n"), references].join("\0") });
    start = i + 1;
  });
  return blocks;
}

/** The level of a heading under the page's own two, without a gap to the heading above it. */
function rank(above, level) {
  while (above.at(-1) >= level) above.pop();
  above.push(level);
  return Math.min(6, 2 + above.length);
}

function make(tokens) {
  const root = el("div", { className: "block" }), open = [root];
  for (const token of tokens) {
    if (token.nesting < 0) open.pop();
    else if (token.nesting > 0) open.push(token.hidden ? open.at(-1) : into(open.at(-1), element(token)));
    else open.at(-1).append(...leaf(token));
  }
  return root;
}

/** Appends a node, or the outermost of those around it; returns the one that takes the children. */
function into(parent, node) {
  parent.append(node.parentNode ?? node);
  return node;
}

function element(token) {
  const { type, tag } = token;
  if (type === "heading_open") return el(`h${token.meta.level}`, { className: `like-${tag}` });
  if (type === "link_open") return link(token.attrGet("href"));
  if (type === "table_open") return table();
  if (type === "th_open" || type === "td_open") return cell(token);
  const node = el(PLAIN[tag] ?? "span");
  if (type === "ordered_list_open" && token.attrGet("start")) node.start = Number(token.attrGet("start"));
  return node;
}

function link(href) {
  return LINKS.test(href) ? el("a", { href, title: href, rel: "noopener noreferrer", target: "_blank" }) : el("span");
}

function table() {
  const inner = el("table", { className: "content" });
  el("div", { className: "wide-box", tabIndex: 0, aria: { role: "group", label: "Table" } }, inner);
  return inner;
}

function cell(token) {
  const node = el(token.type === "th_open" ? "th" : "td");
  if (token.type === "th_open") node.scope = "col";
  node.style.textAlign = /text-align:(left|right|center)/.exec(token.attrGet("style") ?? "")?.[1] ?? "";
  return node;
}

function leaf(token) {
  switch (token.type) {
    case "inline": return [...make(token.children).childNodes];
    case "text": case "text_special": return [token.content];
    case "softbreak": return ["\n"];
    case "hardbreak": return [el("br")];
    case "code_inline": return [el("code", { textContent: token.content })];
    case "hr": return [el("hr")];
    case "fence": case "code_block": return [code(token.content, token.info.trim().split(/\s/)[0])];
    case "image": return [image(token)];
    case "math_inline": return [formula(token.content, false)];
    case "math_block": return [formula(token.content, true)];
    default: return [token.content];
  }
}

/** A picture that an answer names is a link to it: the page loads nothing from elsewhere. */
function image(token) {
  const node = link(token.attrGet("src"));
  node.textContent = token.content || token.attrGet("src");
  return node;
}

function code(text, language) {
  const name = language ? `Code, ${language}` : "Code";
  return el("div", { className: "code-block" },
    el("div", { className: "code-head" }, el("span", { textContent: language }), button("Copy", () => copy(text), "small", { label: `Copy ${name.toLowerCase()}` })),
    el("pre", { tabIndex: 0, aria: { role: "group", label: name } }, el("code", { textContent: text })));
}

// --------------------------------------------------------------------------------------------------------- formulas

let katex = null, loading = null;

/** A formula; its source, until the module that draws formulas has been loaded. */
function formula(source, isBlock) {
  const node = isBlock
    ? el("div", { className: "math wide-box", textContent: source, tabIndex: 0, aria: { role: "group", label: "Formula" } })
    : el("span", { className: "math", textContent: source });
  if (katex) draw(node, source, isBlock);
  else loadKatex().then(() => draw(node, source, isBlock), () => { /* the source stays */ });
  return node;
}

function loadKatex() {
  loading ??= import("./vendor/katex.js").then((module) => {
    document.head.append(el("link", { rel: "stylesheet", href: new URL("./vendor/katex.css", import.meta.url).href }));
    katex = module;
  });
  return loading;
}

function draw(node, source, displayMode) {
  try {
    katex.render(source, node, { displayMode, throwOnError: true, strict: "ignore", trust: false, maxExpand: 200, maxSize: 20 });
  } catch {  // no formula after all
    node.replaceChildren(el("code", { textContent: source }));
  }
}
