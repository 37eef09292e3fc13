// The little of Markdown that models write, as DOM nodes. Text only ever becomes text nodes: nothing in it can be
// markup, a link, an image or a script. Time is linear in the text, whatever is in it.

import { copyButton } from "./copying.js";
import { element } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})(.*)$/;
const HEADING = /^ {0,3}(#{1,6}) +(.*)$/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)(.*)$/;
const MAX_DEPTH = 6; // of lists in lists; deeper ones are shown as they were written

/** A container that follows a growing text: blocks that did not change keep their nodes. */
export class Markdown {
  #container;
  #text = "";
  #sources = [];

  constructor(container) {
    this.#container = container;
  }

  /** Shows `text` in place of what was there. */
  draw(text) {
    if (text === this.#text) return;
    this.#text = text;
    const blocks = parse(text.split("\n"), 0);
    blocks.forEach((block, index) => {
      const old = this.#container.children[index];
      if (old && this.#sources[index] === block.source) return;
      const node = block.build();
      node.dir = "auto";
      if (old) old.replaceWith(node);
      else this.#container.append(node);
    });
    while (this.#container.children.length > blocks.length) this.#container.lastElementChild.remove();
    this.#sources = blocks.map((block) => block.source);
  }
}

/** Blocks of these lines: their source, and what builds their node. */
function parse(lines, depth) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (lines[at].trim() === "") {
      at += 1;
      continue;
    }
    const [build, next] = block(lines, at, depth);
    blocks.push({ source: lines.slice(at, next).join("\n"), build });
    at = next;
  }
  return blocks;
}

/** The block that begins at a line: [what builds its node, the line after it]. */
function block(lines, at, depth) {
  const fence = openFence(lines[at]);
  if (fence) return code(lines, at, fence);
  const heading = HEADING.exec(lines[at]);
  if (heading) {
    // The page has its own h1 to h3.
    const name = `h${Math.min(6, heading[1].length + 3)}`;
    return [() => inline(element(name, ""), heading[2]), at + 1];
  }
  if (RULE.test(lines[at])) return [() => element("hr", ""), at + 1];
  if (depth < MAX_DEPTH && ITEM.test(lines[at])) return list(lines, at, depth);
  let end = at + 1;
  while (end < lines.length && lines[end].trim() !== "" && !interrupts(lines[end], depth)) end += 1;
  const text = lines.slice(at, end).join("\n");
  return [() => inline(element("p", ""), text), end];
}

function beginsBlock(line, depth) {
  return openFence(line) || HEADING.test(line) || RULE.test(line) || (depth < MAX_DEPTH && ITEM.test(line));
}

/** Whether a line ends the paragraph above. A number does only if it is 1: a line may well begin with a year. */
function interrupts(line, depth) {
  const marker = ITEM.exec(line);
  return beginsBlock(line, depth) && !(marker && /^\d/.test(marker[2]) && Number.parseInt(marker[2], 10) !== 1);
}

function openFence(line) {
  const match = FENCE.exec(line);
  return match && !match[2].includes("`") ? { mark: match[1], language: match[2].trim() } : null;
}

function code(lines, at, { mark, language }) {
  let end = at + 1;
  while (end < lines.length && !closes(lines[end], mark)) end += 1;
  const text = lines.slice(at + 1, end).join("\n");
  const build = () => {
    const pre = element("pre", "", element("code", "", text));
    pre.tabIndex = 0; // long lines scroll sideways, with the arrow keys too
    pre.setAttribute("role", "region");
    pre.setAttribute("aria-label", language ? `Code, ${language}` : "Code");
    const bar = element("div", "code-bar", element("span", "", language), copyButton("Copy code", () => text));
    return element("div", "code", bar, pre);
  };
  return [build, Math.min(end + 1, lines.length)];
}

function closes(line, mark) {
  const text = line.trim();
  return text.length >= mark.length && text === mark[0].repeat(text.length);
}

function list(lines, start, depth) {
  const first = ITEM.exec(lines[start]);
  const ordered = first[2].length > 1;
  const indent = first[1].length;
  const items = [];
  let at = start;
  while (at < lines.length) {
    const marker = ITEM.exec(lines[at]);
    const sibling = marker && marker[1].length <= indent + 1 && marker[2].length > 1 === ordered;
    if (!sibling) break;
    const width = lines[at].length - marker[4].length;
    const content = [marker[4]];
    at += 1;
    while (at < lines.length && continuesItem(lines, at, indent, depth)) {
      const spaces = lines[at].length - lines[at].trimStart().length;
      content.push(lines[at].slice(Math.min(spaces, width)));
      at += 1;
    }
    items.push(content);
  }
  const build = () => {
    const node = element(ordered ? "ol" : "ul", "");
    if (ordered) node.start = Number.parseInt(first[2], 10);
    for (const content of items) node.append(item(content, depth + 1));
    return node;
  };
  return [build, at];
}

/** Whether a line belongs to the item above: deeper than its marker, or the rest of its paragraph. */
function continuesItem(lines, at, indent, depth) {
  const line = lines[at];
  if (line.trim() === "") {
    const next = lines[at + 1];
    return next !== undefined && (next.trim() === "" || isDeeper(next, indent) || ITEM.test(next));
  }
  return isDeeper(line, indent) || (lines[at - 1].trim() !== "" && !beginsBlock(line, depth));
}

const isDeeper = (line, indent) => line.length - line.trimStart().length >= indent + 2;

function item(lines, depth) {
  const node = element("li", "");
  const blocks = parse(lines, depth);
  // An item of one paragraph is that text, without the space around a paragraph.
  const built = blocks.map((part) => part.build());
  if (built[0]?.localName === "p") node.append(...built.shift().childNodes);
  node.append(...built);
  return node;
}

const EMPHASIS = { "**": "strong", __: "strong", "*": "em", _: "em" };
const isWord = (character) => character !== undefined && /[\p{L}\p{N}_]/u.test(character);
const isSpace = (character) => character === undefined || /\s/.test(character);

/** Appends text with `code`, **bold** and *italic* to `parent`; `outer` are the marks that it already stands in. */
function inline(parent, text, outer = []) {
  const missing = new Set(); // marks that nothing further on closes: looked for once, not once for each
  let plain = "";
  let at = 0;
  const flush = () => {
    if (plain) parent.append(plain);
    plain = "";
  };
  const add = (node) => {
    flush();
    parent.append(node);
  };
  while (at < text.length) {
    const character = text[at];
    if (character === "\\" && "\\`*_".includes(text[at + 1] ?? "none")) {
      plain += text[at + 1];
      at += 2;
      continue;
    }
    const mark = markAt(text, at);
    const end = mark && !missing.has(mark) && !outer.includes(mark) ? closing(text, at, mark) : null;
    if (end === null) {
      // A longer run of backticks is not the end of a shorter one: it is passed over whole.
      const width = mark && mark[0] === "`" ? mark.length : 1;
      plain += text.slice(at, at + width);
      at += width;
      continue;
    }
    if (end === -1) {
      missing.add(mark);
      continue;
    }
    const inner = text.slice(at + mark.length, end);
    if (mark[0] === "`") add(element("code", "", /^ .*[^ ].* $/s.test(inner) ? inner.slice(1, -1) : inner));
    else add(inline(element(EMPHASIS[mark], ""), inner, [...outer, mark]));
    at = end + mark.length;
  }
  flush();
  return parent;
}

/** The mark at a place: a whole run of backticks, or two or one of * and _. */
function markAt(text, at) {
  const character = text[at];
  if (character === "`") {
    let end = at + 1;
    while (text[end] === "`") end += 1;
    return text.slice(at, end);
  }
  if (character !== "*" && character !== "_") return null;
  return text[at + 1] === character ? character + character : character;
}

/** Where the mark at a place is closed: an index, -1 where nothing further on closes it, null where it opens nothing. */
function closing(text, at, mark) {
  const start = at + mark.length;
  const isCode = mark[0] === "`";
  if (!isCode && (isSpace(text[start]) || (mark[0] === "_" && isWord(text[at - 1])))) return null;
  let found = text.indexOf(mark, start + (isCode ? 0 : 1));
  while (found !== -1) {
    let runEnd = found;
    while (text[runEnd] === mark[0]) runEnd += 1;
    const run = runEnd - found;
    if (isCode) {
      if (run === mark.length) return found;
    } else {
      // Of a run of three, the last two close a pair and the first closes what is inside.
      const end = mark.length === 2 ? runEnd - 2 : found;
      const fits = mark.length === 2 || run !== 2;
      if (fits && !isSpace(text[end - 1]) && !(mark[0] === "_" && isWord(text[runEnd]))) return end;
    }
    found = text.indexOf(mark, runEnd);
  }
  return -1;
}
