// Markdown as DOM nodes, drawn as it comes. markdown-it reads it; what it gives are tokens, and text only ever becomes
// text nodes: nothing in it can be markup or a script, an image is a link, and links lead to the web or to mail.
//
// Of a growing text only what is still open is read and drawn again: the last block, since a block is over where the
// next one has begun. A block that does not end is drawn in parts, so that what a piece of text costs has a limit.

import { copyButton, element } from "./dom.js";
import MarkdownIt from "./markdown-it.js";

const PIECE = 2048; // characters that are read at a time
const LONGEST = 24_576; // characters of a block that is drawn as one
const PART = 50; // blocks
const CHAPTER = 30; // parts
const REREAD = 1_000_000; // characters of a text that is read again for addresses that its end gives

const reader = new MarkdownIt({ linkify: true });
reader.linkify.set({ fuzzyLink: false, fuzzyEmail: false });
reader.validateLink = (address) => !/^[a-z][a-z0-9+.-]*:/i.test(address) || /^(https?|mailto):/i.test(address);

/** Shows a text in a container, at once or as it comes. */
export class Markdown {
  #container;
  #waiting = []; // pieces of text that are not read yet
  #tail = ""; // the source of what is open
  #open = []; // its nodes
  #host = null; // the node that a block too long for one goes on in
  #part = null; // the node that blocks are added to
  #addresses = Object.create(null); // of reference links, by label, as the source before #tail gives them
  #found = this.#addresses; // and with those in #tail
  #isCut = false; // some of the text is before #tail
  #whole = null; // the complete text, where it may have to be read again

  constructor(container) {
    this.#container = container;
  }

  /** Whether there is text that is not drawn yet. */
  get isBehind() {
    return this.#waiting.length > 0;
  }

  /** Forgets the text. */
  clear() {
    this.#begin(Object.create(null));
    this.#waiting = [];
  }

  /** More of the text, for `draw` to draw. */
  push(text) {
    const last = this.#waiting.length - 1;
    if (last >= 0 && this.#waiting[last].length + text.length <= PIECE) {
      this.#waiting[last] += text;
      return;
    }
    for (let at = 0; at < text.length; at += PIECE) this.#waiting.push(text.slice(at, at + PIECE));
  }

  /** The text, `whole`, is complete: reference links find the addresses that come after them, too. */
  finish(whole) {
    this.#whole = whole.length <= REREAD ? whole : null;
  }

  /** Draws what has come; at a time of `performance.now()` it stops after the piece under way. */
  draw(until = Infinity) {
    while (this.isBehind) {
      this.#read(this.#waiting.shift());
      if (performance.now() > until) return;
    }
    const whole = this.#whole;
    this.#whole = null;
    if (whole === null || !this.#isCut || !hasAny(this.#found)) return;
    this.#begin(this.#found);
    this.push(whole);
    this.draw(until);
  }

  #begin(addresses) {
    this.#container.replaceChildren();
    this.#tail = "";
    this.#open = [];
    this.#host = this.#part = this.#whole = null;
    this.#addresses = this.#found = addresses;
    this.#isCut = false;
  }

  #read(piece) {
    this.#tail = (this.#tail + piece).replace(/\r\n|\r(?!$)/g, "\n"); // the \n may come with the next piece
    const blocks = this.#redraw();
    // The last block that began in a line which is complete will stay; a line that is not may yet turn out otherwise.
    const complete = this.#tail.split("\n").length - 1;
    const last = blocks.findLastIndex((block) => block.start < complete);
    if (last > 0) {
      this.#settle(offset(this.#tail, blocks[last - 1].end));
      this.#open.splice(0, last);
      this.#host = null;
    }
    if (this.#tail.length > LONGEST) this.#drawInParts();
  }

  /** Draws what is open. @returns its blocks */
  #redraw() {
    this.#found = Object.create(this.#addresses);
    const blocks = blocksOf(reader.parse(this.#tail, { references: this.#found }));
    blocks.forEach((block, index) => {
      const isGuest = index === 0 && this.#host !== null;
      const node = isGuest ? guestOf(nodeOf(block)) : nodeOf(block);
      if (index < this.#open.length) this.#open[index] = renewed(this.#open[index], node);
      else this.#open.push((isGuest ? this.#host : this.#partWithRoom()).appendChild(node));
    });
    for (const node of this.#open.splice(blocks.length)) node.remove();
    return blocks;
  }

  /** The source up to here is drawn for good. */
  #settle(end) {
    if (hasOwn(this.#found)) reader.parse(this.#tail.slice(0, end), { references: this.#addresses });
    this.#tail = this.#tail.slice(end);
    this.#isCut = true;
  }

  /** Draws for good what there is of a long block, which goes on where the text can be cut. */
  #drawInParts() {
    const { at, opening } = cut(this.#tail);
    const rest = this.#tail.slice(at);
    this.#tail = this.#tail.slice(0, at);
    this.#redraw();
    this.#host = opening ? (this.#host ?? this.#open[0].querySelector("pre, table")) : null;
    this.#settle(at);
    this.#open = [];
    this.#tail = opening + rest;
    this.#redraw();
  }

  /** Where a new block goes: blocks lie in parts and parts in chapters, so that no node has very many children. */
  #partWithRoom() {
    if (hasRoom(this.#part, PART)) return this.#part;
    let chapter = this.#part?.parentNode;
    if (!hasRoom(chapter, CHAPTER)) {
      chapter?.classList.add("full");
      chapter = this.#container.appendChild(element("div", "chapter"));
    }
    this.#part = chapter.appendChild(element("div", "part"));
    return this.#part;
  }
}

const hasRoom = (node, most) => Boolean(node) && node.childElementCount < most;
const hasOwn = (addresses) => Object.keys(addresses).length > 0;
const hasAny = (addresses) => { for (const _ in addresses) return true; return false; };

/** Where a line begins; the text's end for one that it does not have. */
function offset(text, line) {
  let at = 0;
  for (let left = line; left > 0; left -= 1) {
    at = text.indexOf("\n", at) + 1;
    if (at === 0) return text.length;
  }
  return at;
}

/** The blocks that do not stand in others: their tokens, the line that they begin at, and the one after them. */
function blocksOf(tokens) {
  const blocks = [];
  let first = 0;
  tokens.forEach((token, index) => {
    if (token.level > 0 || token.nesting === 1) return;
    const [start, end] = tokens[first].map;
    blocks.push({ tokens: tokens.slice(first, index + 1), start, end });
    first = index + 1;
  });
  return blocks;
}

/** Where to cut a text whose first block is too long, and the lines that open the block anew for the rest. */
function cut(text) {
  const [block] = blocksOf(reader.parse(text, {}));
  const line = text.lastIndexOf("\n") + 1;
  const kind = block?.tokens[0].type;
  const begin = block ? offset(text, block.start) : 0;
  if (kind === "table_open" || (kind === "fence" && isOpen(text.slice(begin, line)))) {
    const opening = text.slice(begin, offset(text, block.start + (kind === "fence" ? 1 : 2)));
    return { at: line - begin > opening.length ? line : text.length, opening };
  }
  const items = block?.tokens.filter((token) => token.type === "list_item_open" && token.level === 1) ?? [];
  const item = items.length > 1 ? offset(text, items.at(-1).map[0]) : 0;
  return { at: item || line || text.lastIndexOf(" ") + 1 || text.length, opening: "" };
}

/** Whether a fence, in whole lines, goes on after them. */
const isOpen = (lines) => lines !== "" && blocksOf(reader.parse(`${lines}x`, {})).length === 1;

/** What of a block's node goes on in the node that shows its beginning. */
const guestOf = (node) => node.querySelector("pre > code, tbody") ?? document.createElement("tbody");

/** The old node made like a new one, with what is equal of it left in peace; or the new one in its place. */
function renewed(old, fresh) {
  if (old.isEqualNode(fresh)) return old;
  if (old.nodeType === Node.TEXT_NODE && fresh.nodeType === Node.TEXT_NODE) {
    if (fresh.data.startsWith(old.data)) old.appendData(fresh.data.slice(old.length));
    else old.data = fresh.data;
    return old;
  }
  if (!old.cloneNode(false).isEqualNode(fresh.cloneNode(false))) {
    old.replaceWith(fresh);
    return fresh;
  }
  const children = [...fresh.childNodes];
  children.forEach((child, index) => {
    if (index < old.childNodes.length) renewed(old.childNodes[index], child);
    else old.append(child);
  });
  while (old.childNodes.length > children.length) old.lastChild.remove();
  return old;
}

function nodeOf(block) {
  const parent = document.createDocumentFragment();
  append(parent, block.tokens);
  parent.firstElementChild.dir = "auto";
  return parent.firstElementChild;
}

/** Appends the nodes of these tokens. */
function append(parent, tokens) {
  const outer = [];
  let at = parent;
  for (const token of tokens) {
    if (token.hidden) continue; // the paragraph of an item that is nothing else
    if (token.nesting === -1) {
      at = outer.pop();
    } else if (token.nesting === 1) {
      outer.push(at);
      at = opened(at, token);
    } else {
      (LEAVES[token.type] ?? LEAVES.text)(at, token);
    }
  }
}

/** Appends the node that a token opens. @returns the node that its content goes into */
function opened(parent, token) {
  if (token.type === "table_open") {
    const box = scrolling(element("div", "table"), "Table");
    parent.append(box);
    return box.appendChild(element("table", ""));
  }
  const isHeading = token.type === "heading_open";
  // The page has its own h1, and an h2 for each turn.
  const node = element(isHeading ? `h${Math.min(6, Number(token.tag[1]) + 2)}` : token.tag, "");
  if (token.type === "link_open") leadTo(node, token.attrGet("href"), token.attrGet("title"));
  if (token.attrGet("start") !== null) node.setAttribute("start", token.attrGet("start"));
  const align = /^text-align:(left|center|right)$/.exec(token.attrGet("style"));
  if (align) node.style.textAlign = align[1];
  return parent.appendChild(node);
}

const LEAVES = {
  text: (parent, token) => parent.append(token.content),
  inline: (parent, token) => append(parent, token.children),
  softbreak: (parent) => parent.append("\n"),
  hardbreak: (parent) => parent.append(element("br", "")),
  hr: (parent) => parent.append(element("hr", "")),
  code_inline: (parent, token) => parent.append(element("code", "", token.content)),
  code_block: (parent, token) => parent.append(code(token.content, "")),
  fence: (parent, token) => {
    const [language] = reader.utils.unescapeAll(token.info).trim().split(/\s/);
    parent.append(code(token.content, language));
  },
  image: (parent, token) => {
    const words = reader.renderer.renderInlineAsText(token.children, reader.options, {});
    if (parent.closest?.("a")) {
      parent.append(words);
      return;
    }
    const node = element("a", "image", words || "without a name");
    leadTo(node, token.attrGet("src"), token.attrGet("title"));
    parent.append(node);
  },
};

/** Makes a link of a node: in a tab of its own, which learns nothing of this one. */
function leadTo(node, address, title) {
  node.setAttribute("href", address);
  if (title) node.title = title;
  node.target = "_blank";
  node.rel = "noopener noreferrer nofollow";
}

function code(text, language) {
  const pre = scrolling(element("pre", "", element("code", "", text)), language ? `Code, ${language}` : "Code");
  const copied = (button) => button.closest(".code").querySelector("pre").textContent.replace(/\n$/, "");
  const bar = element("div", "code-bar", element("span", "", language), copyButton("Copy code", copied));
  return element("div", "code", bar, pre);
}

/** A box that scrolls sideways, with the arrow keys too. */
function scrolling(node, name) {
  node.tabIndex = 0;
  node.setAttribute("role", "group");
  node.setAttribute("aria-label", name);
  return node;
}
