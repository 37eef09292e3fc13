// The API key: asked for when the server wants one, kept in this tab.

import { byId, setText } from "./dom.js";
import { tabStore } from "./storage.js";

/** The key and the dialog that asks for it. */
export class ApiKey {
  #dialog = byId("key");
  #form = this.#dialog.querySelector("form");
  #value = tabStore.get("key");
  #asking = null;

  constructor() {
    this.#form.addEventListener("submit", () => this.#take());
    byId("cancel-key").addEventListener("click", () => this.#dialog.close());
  }

  /** @returns {string|null} */
  get value() {
    return this.#value;
  }

  /**
   * Asks for another key than the one that the server did not take; whoever asks meanwhile gets the same answer.
   *
   * @param {string|null} refused the key of the refused request
   * @returns {Promise<boolean>} whether there is another one now
   */
  async renew(refused) {
    if (this.#value !== refused) return true;
    return this.ask(refused ? "The server did not accept this API key." : "This server asks for an API key.");
  }

  /** Asks for a key, for a reason in one sentence. @returns {Promise<boolean>} whether one was given */
  ask(reason) {
    this.#asking ??= new Promise((resolve) => {
      setText(byId("key-reason"), reason);
      this.#form.reset();
      this.#dialog.returnValue = "";
      this.#dialog.showModal();
      this.#dialog.addEventListener("close", () => {
        this.#asking = null;
        resolve(this.#dialog.returnValue === "given");
      }, { once: true });
    });
    return this.#asking;
  }

  #take() {
    this.#value = this.#form.elements.key.value.trim();
    tabStore.set("key", this.#value);
  }
}
