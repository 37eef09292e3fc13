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
  #height = 0; // of the page, when it was last drawn
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

  #drawView(view) {
    const { turn } = view;
    const isLast = turn === this.#conversation.last || turn === this.#conversation.lastQuestion;
    view.draw({ isLast, isBusy: this.#isBusy, isUnanswered: this.#conversation.isUnanswered(turn) });
  }

  #look() {
    this.#toEnd.hidden = !this.#isBusy || isNear(document.documentElement.scrollHeight);
  }
}

/** Whether the page stands near this end of it. */
const isNear = (end) => end - scrollY - innerHeight < NEAR_PX;
