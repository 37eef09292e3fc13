// Streamed text for screen readers: whole sentences, a few seconds apart, instead of every token.

import { setText } from "./dom.js";

const PAUSE_MS = 4000;

/** Reads one growing text aloud through a live region. */
export class Announcer {
  #region;
  #spoken = 0;
  #next = 0;

  /** @param {HTMLElement} region with aria-live="polite" */
  constructor(region) {
    this.#region = region;
  }

  /** A new text begins; `words` are said first. */
  begin(words) {
    this.#spoken = 0;
    this.#next = performance.now() + PAUSE_MS;
    setText(this.#region, words);
  }

  /** The text is this long now. */
  follow(text) {
    const now = performance.now();
    if (now < this.#next) return;
    const sentences = /^[\s\S]*[.!?:;](?=\s)/.exec(text.slice(this.#spoken))?.[0];
    if (!sentences) return;
    setText(this.#region, sentences.trim());
    this.#spoken += sentences.length;
    this.#next = now + PAUSE_MS;
  }

  /** The text is complete: its rest, and `words` after it. */
  finish(text, words) {
    setText(this.#region, `${text.slice(this.#spoken).trim()} ${words}`.trim());
  }
}
