// How a turn of the conversation looks.

import { hasBegun } from "./conversation.js";
import { copyButton } from "./copying.js";
import { button, element, fitHeight, isSend, setText } from "./dom.js";
import { Markdown } from "./markdown.js";

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

/** A question, shown letter by letter. */
export class QuestionView {
  node;
  #body = element("div", "body");
  #note = element("p", "note");
  #edit;

  constructor(turn, actions) {
    this.turn = turn;
    this.#body.dir = "auto";
    this.#edit = button("Edit", () => editInPlace(this.node, this.#body, "Ask again", turn, actions));
    this.node = article("question", "You", this.#body, this.#note, element("div", "actions", this.#edit));
    setText(this.#body, turn.content);
  }

  /** @param {{isLast: boolean, isBusy: boolean, isUnanswered: boolean}} state of this turn in the conversation */
  draw({ isLast, isBusy, isUnanswered }) {
    this.#edit.hidden = !isLast || isBusy;
    setText(this.#note, isUnanswered && !isBusy ? (isLast ? "Not answered." : "Not answered, and left out since.") : "");
  }
}

/** An answer: what the model thought, wrote and called, and how fast. */
export class AnswerView {
  node;
  #reasoning = element("details", "reasoning");
  #reasoningTitle = element("summary", "");
  #reasoningText = element("div", "");
  #touched = false; // the reader folded or unfolded the reasoning, and has the last word on it
  #body = element("div", "body prose");
  #markdown = new Markdown(this.#body);
  #calls = element("div", "calls");
  #note = element("p", "note");
  #figures = element("p", "figures small");
  #buttons;

  constructor(turn, actions) {
    this.turn = turn;
    this.#reasoning.append(this.#reasoningTitle, this.#reasoningText);
    this.#reasoningTitle.addEventListener("click", () => { this.#touched = true; });
    this.#reasoningText.dir = "auto";
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

  /** @param {{isLast: boolean, isBusy: boolean}} state of this turn in the conversation */
  draw({ isLast, isBusy }) {
    const { turn } = this;
    this.node.classList.toggle("live", isLast && isBusy);
    this.node.setAttribute("aria-busy", String(isLast && isBusy));
    this.#drawReasoning(isLast && isBusy && !turn.content);
    this.#markdown.draw(turn.content);
    this.#drawCalls();
    setText(this.#note, turn.end === "stop" && !hasBegun(turn) ? "The answer is empty." : (ENDINGS[turn.end] ?? ""));
    setText(this.#figures, turn.figures);
    const [, edit, regenerate] = this.#buttons.children;
    this.#buttons.hidden = isLast && isBusy;
    edit.hidden = !isLast || isBusy;
    regenerate.hidden = !isLast || isBusy;
  }

  #drawReasoning(isThinking) {
    this.#reasoning.hidden = !this.turn.reasoning;
    if (!this.#touched) this.#reasoning.open = isThinking;
    setText(this.#reasoningTitle, isThinking ? "Thinking" : "Thoughts");
    setText(this.#reasoningText, this.turn.reasoning);
  }

  #drawCalls() {
    const calls = this.turn.toolCalls.filter(Boolean).map((call) => `${call.name}(${call.arguments})`);
    this.#calls.replaceChildren(...calls.map((call) => element("p", "", "Tool call ", element("code", "", call))));
  }
}

/** The view that fits a turn. */
export function viewOf(turn, actions) {
  return turn.role === "user" ? new QuestionView(turn, actions) : new AnswerView(turn, actions);
}

function article(kind, who, ...children) {
  const node = element("article", `turn ${kind}`, element("h3", "who", who), ...children);
  node.setAttribute("aria-label", who);
  return node;
}

/** Puts a text box in the place of a turn's text, until it is saved or given up. */
function editInPlace(node, body, label, turn, actions) {
  const box = element("textarea", "");
  box.value = turn.content;
  box.dir = "auto";
  box.setAttribute("aria-label", "Edit the text");
  const save = () => {
    if (box.value.trim() !== "" && actions.change(turn, box.value)) close();
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
