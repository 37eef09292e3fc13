// The turns on the page, in step with the conversation; the page follows a growing answer until its reader scrolls up.

import { byId } from "./dom.js";
import { viewOf } from "./turn.js";

const NEAR_PX = 80;

/** The views of a conversation. */
export class Thread {
  #conversation;
  #actions;
  #node = byId("thread");
  #toEnd = byId("to-end");
  #views = [];
  #follows = true;
  #isBusy = false;

  /**
   * @param {import("./conversation.js").Conversation} conversation
   * @param {import("./turn.js").TurnActions} actions
   */
  constructor(conversation, actions) {
    this.#conversation = conversation;
    this.#actions = actions;
    addEventListener("scroll", () => this.#look(), { passive: true });
    this.#toEnd.addEventListener("click", () => this.toEnd());
  }

  /** Draws every turn; views of turns that stayed are kept. */
  draw(isBusy) {
    this.#isBusy = isBusy;
    const { turns } = this.#conversation;
    const same = turns.findIndex((turn, index) => this.#views[index]?.turn !== turn);
    const kept = same === -1 ? turns.length : same;
    for (const view of this.#views.splice(kept)) view.node.remove();
    for (const turn of turns.slice(kept)) {
      const view = viewOf(turn, this.#actions);
      this.#views.push(view);
      this.#node.append(view.node);
    }
    this.#views.forEach((view) => this.#drawView(view));
    byId("welcome").hidden = turns.length > 0;
    this.follow();
  }

  /** Draws the last turn, which has grown. */
  drawLast() {
    this.#drawView(this.#views.at(-1));
    this.follow();
  }

  /** Goes to the end, and stays there. */
  toEnd() {
    this.#follows = true;
    this.follow();
  }

  #drawView(view) {
    const { turn } = view;
    const isLast = turn === this.#conversation.last || turn === this.#conversation.lastQuestion;
    view.draw({ isLast, isBusy: this.#isBusy, isUnanswered: this.#conversation.isUnanswered(turn) });
  }

  /** Shows the end where the page stood there. */
  follow() {
    if (this.#follows) scrollTo({ top: document.documentElement.scrollHeight, behavior: "instant" });
    this.#look();
  }

  #look() {
    const root = document.documentElement;
    this.#follows = root.scrollHeight - scrollY - innerHeight < NEAR_PX;
    this.#toEnd.hidden = this.#follows || !this.#isBusy;
  }
}
