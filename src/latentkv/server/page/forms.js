// What a person fills in: the message with its files, the settings, which this browser keeps, and the API key, which
// this tab keeps.

import { browserStore, tabStore } from "./conversations.js";
import { byId, element, fitHeight, isSend, setText, signButton, sizeOf } from "./dom.js";

const MOST_BYTES = 8_000_000; // of a file: more is no message

/** The message that is being written, and the files that go with it. */
export class Composer {
  #message = byId("message");
  #files = [];
  #onProblem;

  /**
   * @param {() => void} send
   * @param {(sentence: string) => void} onProblem told why a file cannot be taken
   */
  constructor(send, onProblem) {
    this.#onProblem = onProblem;
    this.#setText(tabStore.get("draft") ?? "");
    this.#message.addEventListener("input", () => this.#keep());
    this.#message.addEventListener("keydown", (event) => {
      if (!isSend(event)) return;
      event.preventDefault();
      send();
    });
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      send();
    });
    this.#takeFiles();
  }

  get isEmpty() {
    return this.#message.value.trim() === "" && this.#files.length === 0;
  }

  /** @returns {[string, {name: string, text: string}[]]} the message and its files, which are gone from here then */
  take() {
    const taken = [this.#message.value, this.#files];
    this.#setText("");
    this.#files = [];
    this.#drawFiles();
    return taken;
  }

  /** Gives the message box the focus that a button took with itself; not where that opens a keyboard on the screen. */
  focus() {
    if (!matchMedia("(pointer: coarse)").matches) this.#message.focus({ preventScroll: true });
  }

  #setText(text) {
    this.#message.value = text;
    this.#keep();
  }

  #keep() {
    tabStore.set("draft", this.#message.value);
    fitHeight(this.#message);
  }

  #takeFiles() {
    const picker = byId("files");
    byId("attach").addEventListener("click", () => picker.click());
    picker.addEventListener("change", () => {
      this.#add([...picker.files]);
      picker.value = "";
    });
    this.#message.addEventListener("paste", (event) => {
      if (event.clipboardData.files.length === 0) return;
      event.preventDefault();
      this.#add([...event.clipboardData.files]);
    });
    const root = document.documentElement;
    const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
    addEventListener("dragover", (event) => {
      if (!holdsFiles(event)) return;
      event.preventDefault();
      root.classList.add("dropping");
    });
    addEventListener("dragleave", (event) => {
      if (!event.relatedTarget) root.classList.remove("dropping");
    });
    addEventListener("drop", (event) => {
      root.classList.remove("dropping");
      if (!holdsFiles(event)) return;
      event.preventDefault();
      this.#add([...event.dataTransfer.files]);
    });
  }

  async #add(files) {
    for (const file of files) {
      const text = await textOf(file);
      if (text === null) {
        this.#onProblem(`${file.name} is not taken: a file must be text in UTF-8 and have at most 8 MB.`);
      } else {
        this.#files.push({ name: file.name, text });
      }
    }
    this.#drawFiles();
    this.focus();
  }

  #drawFiles() {
    byId("attached").replaceChildren(...this.#files.map((file) => element(
      "li", "", element("span", "", file.name), " ", element("span", "small", sizeOf(file.text)),
      signButton("sign-delete", `Leave out ${file.name}`, () => {
        this.#files = this.#files.filter((other) => other !== file);
        this.#drawFiles();
        this.focus();
      }),
    )));
  }
}

/** A file's text, or null where it is none: too large, in another encoding, a picture, a folder. */
async function textOf(file) {
  if (file.size > MOST_BYTES) return null;
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    return text.includes("\0") ? null : text;
  } catch {
    return null;
  }
}

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
