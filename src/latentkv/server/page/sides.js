// What stands beside the conversation: the list of those that this browser keeps, and the server's numbers.

import { bytes, byId, count, duration, element, percent, setText, signButton, tokens } from "./dom.js";

/** The list of conversations. */
export class ConversationList {
  #node = byId("list");
  #actions;
  #renaming = null;

  /**
   * @param {object} actions
   * @param {(id: string) => void} actions.open
   * @param {(id: string, name: string) => void} actions.rename "" for the conversation's first words
   * @param {(id: string) => void} actions.remove
   */
  constructor(actions) {
    this.#actions = actions;
  }

  /**
   * @param {{id: string, title: string}[]} heads the latest first
   * @param {string} openId which of them is open
   */
  draw(heads, openId) {
    if (this.#renaming !== null) return; // drawn when that is over
    const focused = document.activeElement?.closest("#list li")?.dataset.id;
    this.#node.replaceChildren(...heads.map((head) => this.#row(head, head.id === openId)));
    byId("no-chats").hidden = heads.length > 0;
    const again = focused && this.#node.querySelector(`[data-id="${CSS.escape(focused)}"] .open`);
    if (again) again.focus();
  }

  #row(head, isOpen) {
    const open = element("button", "open", head.title);
    open.type = "button";
    open.title = head.title;
    open.addEventListener("click", () => this.#actions.open(head.id));
    if (isOpen) open.setAttribute("aria-current", "true");
    const rename = signButton("sign-rename", `Rename “${head.title}”`, () => this.#rename(row, head));
    const remove = signButton("sign-delete", `Delete “${head.title}”`, () => this.#actions.remove(head.id));
    const row = element("li", isOpen ? "current" : "", open, rename, remove);
    row.dataset.id = head.id;
    return row;
  }

  #rename(row, head) {
    const box = element("input", "");
    box.value = head.title;
    box.setAttribute("aria-label", "Name of the conversation; empty for its first words");
    this.#renaming = head.id;
    const end = (name) => {
      if (this.#renaming === null) return;
      this.#renaming = null;
      this.#actions.rename(head.id, name);
    };
    box.addEventListener("keydown", (event) => {
      if (event.isComposing || !["Enter", "Escape"].includes(event.key)) return;
      event.stopPropagation();
      end(event.key === "Enter" ? box.value.trim() : null);
    });
    box.addEventListener("blur", () => end(box.value.trim()));
    row.replaceChildren(box);
    box.select();
    box.focus();
  }
}

const MAX_LINES = 8;
const SMALLEST = 1 / 32; // of a line: a shorter bar is hard to see, and both are drawn larger

/** Shows numbers; it asks for none. */
export class Panel {
  /** @param {object} numbers the answer of `GET /stats` */
  show(numbers) {
    setText(byId("panel-state"), "Live.");
    byId("numbers").classList.remove("old");
    byId("enter-key").hidden = true;
    showFill(numbers.cache);
    showComparison(numbers.cache);
    for (const name of ["running", "waiting", "finished"]) setText(byId(name), count(numbers.requests[name]));
    setText(byId("about"), `LatentKV ${numbers.version}, up ${duration(numbers.uptime_s)}, context ${tokens(numbers.context)}`);
  }

  /**
   * Shows that the numbers are old.
   *
   * @param {{message: string, status: number}} problem
   * @param {number|null} next milliseconds to the next try
   */
  fail(problem, next) {
    byId("numbers").classList.add("old");
    byId("enter-key").hidden = problem.status !== 401;
    const words = problem.status === 401
      ? "The numbers need the API key."
      : `No numbers from the server; asking again in ${Math.round(next / 1000)} s.`;
    setText(byId("panel-state"), words);
    setHead("Numbers");
  }
}

/** What the button says that unfolds the panel on a narrow screen. */
const setHead = (text) => setText(byId("show-panel"), text);

const fillShare = (cache) => (cache.used_bytes + cache.kept_bytes) / cache.capacity_bytes;

function showFill(cache) {
  setHead(`Cache ${percent(fillShare(cache))}`);
  setText(byId("cache-format"), cache.format);
  const bar = byId("fill");
  setShare(bar.querySelector(".used"), cache.used_bytes / cache.capacity_bytes);
  setShare(bar.querySelector(".kept"), cache.kept_bytes / cache.capacity_bytes);
  const text = `${percent(fillShare(cache))} of ${bytes(cache.capacity_bytes)}, room for ${tokens(cache.capacity_tokens)}`;
  bar.setAttribute("aria-valuenow", String(Math.round(fillShare(cache) * 100)));
  bar.setAttribute("aria-valuetext", text);
  setText(byId("fill-text"), text);
  setText(byId("used-bytes"), bytes(cache.used_bytes));
  setText(byId("kept-bytes"), bytes(cache.kept_bytes));
}

/** Both bars in one scale; what is longer than a line goes on in the next one. */
function showComparison(cache) {
  const inUse = cache.used_bytes > 0;
  const perToken = cache.capacity_bytes / cache.capacity_tokens;
  const latent = inUse ? cache.used_bytes : perToken;
  const mha = inUse ? cache.mha_bytes : perToken * cache.mha_ratio;
  let parts = 1; // of the cache that a line stands for one of
  while (latent * parts < cache.capacity_bytes * SMALLEST) parts *= 2;
  const line = cache.capacity_bytes / parts;
  setText(byId("compare-subject"), inUse ? `${tokens(cache.used_tokens)} in use` : "nothing in use; drawn for one token");
  setText(byId("compare-ratio"), `1/${Number((mha / latent).toFixed(1))}`);
  setText(byId("latent-bytes"), bytes(latent));
  setText(byId("mha-bytes"), bytes(mha));
  drawLines(byId("latent-lines"), latent / line);
  drawLines(byId("mha-lines"), mha / line);
  const rest = mha / line - MAX_LINES;
  setText(byId("compare-rest"), rest > 0 ? `and ${Number(rest.toFixed(1))} more lines that do not fit here` : "");
  const whole = `the whole cache, ${bytes(line)}`;
  setText(byId("compare-scale"), `One line is ${parts === 1 ? whole : `1/${count(parts)} of the cache, ${bytes(line)}`}.`);
}

/** A bar of this many lines, the last one as long as what is left. */
function drawLines(container, length) {
  const lines = Math.min(MAX_LINES, Math.ceil(length));
  while (container.children.length > lines) container.lastElementChild.remove();
  while (container.children.length < lines) container.append(element("div", "line", element("span", "used")));
  [...container.children].forEach((line, index) => setShare(line.firstElementChild, length - index));
}

function setShare(bar, share) {
  bar.style.width = `${Math.min(1, Math.max(0, share)) * 100}%`;
}
