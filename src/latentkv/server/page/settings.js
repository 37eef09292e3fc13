// What is asked of the sampler: a dialog, kept in this browser.

import { browserStore } from "./storage.js";

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

/** The settings dialog. Fields hold what was typed; only values that fit are kept and sent. */
export class Settings {
  #dialog;
  #form;
  #values = browserStore.get("settings") ?? {};

  /** @param {HTMLDialogElement} dialog */
  constructor(dialog) {
    this.#dialog = dialog;
    this.#form = dialog.querySelector("form");
    this.#fill();
    this.#form.addEventListener("input", () => this.#keep());
    // Esc leaves a value that does not fit behind: the field goes back to the last one that does.
    dialog.addEventListener("close", () => this.#fill());
  }

  open() {
    this.#dialog.showModal();
  }

  close() {
    this.#dialog.close();
  }

  reset() {
    this.#values = {};
    this.#fill();
    this.#keep();
  }

  get system() {
    return this.#values.system?.trim() ?? "";
  }

  /** The fields of a request that are set. */
  get sampling() {
    const set = NUMBERS.filter((name) => this.#values[name]);
    return Object.fromEntries(set.map((name) => [name, Number(this.#values[name])]));
  }

  #keep() {
    for (const field of this.#form.elements) {
      if (field.name && field.validity.valid) this.#values[field.name] = field.value;
    }
    browserStore.set("settings", this.#values);
  }

  #fill() {
    for (const field of this.#form.elements) {
      if (!field.name) continue;
      field.value = this.#values[field.name] ?? "";
      if (!field.validity.valid) field.value = this.#values[field.name] = ""; // kept when more was allowed
    }
  }
}
