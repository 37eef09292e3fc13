// The conversation on the page: how its turns look, and what can be done with each. The page follows a growing answer
// until its reader scrolls up.

import { hasBegun } from "./conversations.js";
import { button, byId, copyButton, element, fitHeight, isSend, setText, sizeOf } from "./dom.js";
import { Markdown } from "./markdown.js";

const NEAR_PX = 80;
const WORK_MS = 8; // of drawing at a time: between two of them, keys are heard
const PAUSE_MS = 4;
const TYPING_MS = 300; // after a key, whoever types comes first
const TYPING_PAUSE_MS = 100;

/** The views of a conversation. */
export class Thread {
  #conversation = null;
  #actions;
  #node = byId("thread");
  #toEnd = byId("to-end");
  #views = [];
  #height = 0; // of the page, when it was last drawn
  #isBusy = false;
  #timer = null;
  #typed = -Infinity; // when the last key was pressed
  #worked = -Infinity; // when the last drawing ended

  /** @param {TurnActions} actions */
  constructor(actions) {
    this.#actions = actions;
    addEventListener("scroll", () => this.#look(), { passive: true });
    this.#toEnd.addEventListener("click", () => this.toEnd());
    document.addEventListener("keydown", () => { this.#typed = performance.now(); });
  }

  /** Draws every turn of a conversation; views of turns that stayed are kept. */
  draw(conversation, isBusy) {
    this.#conversation = conversation;
    this.#isBusy = isBusy;
    const { turns } = conversation;
    const same = turns.findIndex((turn, index) => this.#views[index]?.turn !== turn);
    const kept = same === -1 ? turns.length : same;
    for (const view of this.#views.splice(kept)) view.node.remove();
    for (const turn of turns.slice(kept)) {
      const view = turn.role === "user" ? new QuestionView(turn, this.#actions) : new AnswerView(turn, this.#actions);
      this.#views.push(view);
      this.#node.append(view.node);
    }
    this.#views.forEach((view) => this.#drawView(view));
    this.follow();
    this.#catchUp();
  }

  /** The last turn, an answer, has grown. */
  grow(news) {
    this.#views.at(-1).grow(news);
  }

  /** Draws what the last turn has grown by. */
  drawLast() {
    const view = this.#views.at(-1);
    if (!view.isBehind || performance.now() - this.#worked >= this.#pause) this.#work(view);
    this.#catchUp();
  }

  /** Goes to the end, and stays there. */
  toEnd() {
    scrollTo({ top: document.documentElement.scrollHeight, behavior: "instant" });
    this.#height = document.documentElement.scrollHeight;
    this.#look();
  }

  /** Shows the new end where the old one could be seen. */
  follow() {
    const height = document.documentElement.scrollHeight;
    // Where the page stands is asked of the page itself: a scroll event may come after the next draw.
    if (height !== this.#height && isNear(this.#height)) this.toEnd();
    this.#height = height;
    this.#look();
  }

  /** Draws some of a view, a piece at a time, and lays each out: that takes longer than to draw it. */
  #work(view) {
    const until = this.#isTyping ? 0 : performance.now() + WORK_MS;
    do {
      this.#drawView(view, 0);
      this.follow();
    } while (view.isBehind && performance.now() < until);
    this.#worked = performance.now();
  }

  get #isTyping() {
    return performance.now() - this.#typed < TYPING_MS;
  }

  get #pause() {
    return this.#isTyping ? TYPING_PAUSE_MS : PAUSE_MS;
  }

  #drawView(view, until = performance.now() + WORK_MS) {
    const { turn } = view;
    view.draw({
      isLast: turn === this.#conversation.last,
      isLive: turn === this.#conversation.last && turn.role === "assistant" && this.#isBusy,
      isBusy: this.#isBusy,
      isUnanswered: this.#conversation.isUnanswered(turn),
    }, until);
  }

  /** Draws on, a little at a time, until everything is drawn. */
  #catchUp() {
    clearTimeout(this.#timer);
    const behind = this.#views.find((view) => view.isBehind);
    if (!behind) return;
    this.#timer = setTimeout(() => {
      this.#work(behind);
      this.#catchUp();
    }, this.#pause);
  }

  #look() {
    this.#toEnd.hidden = !this.#isBusy || isNear(document.documentElement.scrollHeight);
  }
}

/** Whether the page stands near this end of it. */
const isNear = (end) => end - scrollY - innerHeight < NEAR_PX;

const ENDINGS = {
  length: "Cut off at the token limit. A higher “Max tokens” in the settings allows more.",
  stopped: "Stopped.",
  broken: "Incomplete.",
};

/**
 * @typedef {object} TurnActions what the buttons do
 * @property {(turn: object, content: string) => boolean} change takes an edited text; false: not now
 * @property {() => void} regenerate the last answer is asked for again
 */

/** A question, shown letter by letter, and its files, folded. */
class QuestionView {
  node;
  isBehind = false;
  #note = element("p", "note");
  #edit;

  constructor(turn, actions) {
    this.turn = turn;
    const body = element("div", "body", turn.content);
    body.dir = "auto";
    this.#edit = button("Edit", () => editInPlace(this.node, body, "Ask again", turn, actions));
    const files = (turn.files ?? []).map(({ name, text }) => element(
      "details", "file",
      element("summary", "", name, " ", element("span", "small", sizeOf(text))), element("pre", "", text),
    ));
    this.node = article("question", "You", body, ...files, this.#note, element("div", "actions", this.#edit));
  }

  draw({ isLast, isBusy, isUnanswered }) {
    this.node.classList.toggle("last", isLast);
    this.#edit.hidden = isBusy;
    setText(this.#note, isUnanswered && !isBusy ? (isLast ? "Not answered." : "Not answered, and left out since.") : "");
  }
}

/** An answer: what the model thought, wrote and called, and how fast. */
class AnswerView {
  node;
  #reasoning = element("details", "reasoning");
  #reasoningTitle = element("summary", "");
  #reasoningBody = element("div", "prose");
  #touched = false; // the reader folded or unfolded the reasoning, and has the last word on it
  #body = element("div", "body prose");
  #texts; // Markdown, by what it shows
  #isOver = false;
  #calls = element("div", "calls");
  #note = element("p", "note");
  #figures = element("p", "figures small");
  #buttons;

  constructor(turn, actions) {
    this.turn = turn;
    this.#texts = { content: new Markdown(this.#body), reasoning: new Markdown(this.#reasoningBody) };
    this.grow(turn);
    this.#reasoning.append(this.#reasoningTitle, this.#reasoningBody);
    this.#reasoningTitle.addEventListener("click", () => { this.#touched = true; });
    this.#buttons = element(
      "div", "actions",
      copyButton("Copy", () => turn.content),
      button("Edit", () => editInPlace(this.node, this.#body, "Save", turn, actions)),
      button("Regenerate", () => actions.regenerate()),
    );
    this.node = article(
      "answer", "Model", this.#reasoning, this.#body, this.#calls, this.#note, this.#figures, this.#buttons,
    );
  }

  get isBehind() {
    return Object.values(this.#texts).some((text) => text.isBehind);
  }

  /** These texts have come. */
  grow(news) {
    for (const [name, text] of Object.entries(this.#texts)) if (news[name]) text.push(news[name]);
  }

  draw({ isLast, isLive, isBusy }, until) {
    const { turn } = this;
    this.node.classList.toggle("last", isLast);
    this.node.classList.toggle("live", isLive);
    this.node.setAttribute("aria-busy", String(isLive));
    this.#drawTexts(isLive, until);
    this.#drawReasoning(isLive && !turn.content);
    this.#drawCalls();
    setText(this.#note, turn.end === "stop" && !hasBegun(turn) ? "The answer is empty." : (ENDINGS[turn.end] ?? ""));
    setText(this.#figures, turn.figures);
    const [, edit, regenerate] = this.#buttons.children;
    this.#buttons.hidden = isLive;
    edit.hidden = isBusy;
    regenerate.hidden = !isLast || isBusy;
  }

  /** Draws what is not drawn yet, until a time of `performance.now()`; a piece at least. */
  #drawTexts(isLive, until) {
    if (!isLive && !this.#isOver) {
      this.#isOver = true;
      for (const [name, text] of Object.entries(this.#texts)) text.finish(this.turn[name]);
    }
    for (const text of Object.values(this.#texts)) text.draw(until);
  }

  #drawReasoning(isThinking) {
    this.#reasoning.hidden = !this.turn.reasoning;
    if (!this.#touched) this.#reasoning.open = isThinking;
    setText(this.#reasoningTitle, isThinking ? "Thinking" : "Thoughts");
  }

  #drawCalls() {
    const calls = this.turn.toolCalls.filter(Boolean).map((call) => `${call.name}(${call.arguments})`);
    if (calls.length === 0) return;
    this.#calls.replaceChildren(...calls.map((call) => element("p", "", "Tool call ", element("code", "", call))));
  }
}

function article(kind, who, ...children) {
  const node = element("article", `turn ${kind}`, element("h2", "who", who), ...children);
  node.setAttribute("aria-label", who);
  return node;
}

/** Puts a text box in the place of a turn's text, until it is saved or given up. */
function editInPlace(node, body, label, turn, actions) {
  const box = element("textarea", "");
  box.value = turn.content;
  box.dir = "auto";
  box.setAttribute("aria-label", "Edit the text");
  const isEmpty = () => box.value.trim() === "" && !turn.files?.length;
  const save = () => {
    if (!isEmpty() && actions.change(turn, box.value)) close();
  };
  const close = () => {
    editor.remove();
    node.classList.remove("editing");
  };
  const cancel = () => {
    close();
    node.querySelector(".actions button:not([hidden], .copy)")?.focus();
  };
  const saveButton = button(label, save);
  saveButton.classList.add("main");
  const editor = element("div", "editor", box, element("div", "buttons", button("Cancel", cancel), saveButton));
  editor.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      cancel();
    } else if (event.target === box && isSend(event)) {
      event.preventDefault();
      save();
    }
  });
  box.addEventListener("input", () => fitHeight(box));
  node.classList.add("editing");
  body.before(editor);
  fitHeight(box);
  box.focus();
}
