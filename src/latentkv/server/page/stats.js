// Polls the server's numbers: every second while there is something to see, seldom otherwise.

import { Problem, readStats } from "./api.js";

const BUSY_MS = 1000;
const IDLE_MS = 5000;
const HIDDEN_MS = 30_000;
const LONGEST_MS = 60_000;
const IDLE_AFTER_MS = 15_000; // without a request on the server or a touch of the page

/** Reads `GET /stats` again and again, and hands on what comes. */
export class Stats {
  #key;
  #onNumbers;
  #onProblem;
  #latest = null;
  #failures = 0;
  #touched = performance.now();
  #reading = false;
  #timer = null;
  #refused; // the key that the server did not take, or null for none; undefined where it took it

  /**
   * @param {import("./key.js").ApiKey} key
   * @param {(numbers: object) => void} onNumbers
   * @param {(problem: Problem, next: number|null) => void} onProblem `next`: milliseconds to the next try; null: none
   */
  constructor(key, onNumbers, onProblem) {
    this.#key = key;
    this.#onNumbers = onNumbers;
    this.#onProblem = onProblem;
    document.addEventListener("visibilitychange", () => this.#wake());
    document.addEventListener("pointerdown", () => this.#wake());
    document.addEventListener("keydown", () => this.#wake());
  }

  /** The last numbers that came, or null. */
  get latest() {
    return this.#latest;
  }

  /** Reads now, and goes on from here; not with a key that was refused already. */
  poke() {
    this.#touched = performance.now();
    if (this.#reading || this.#refused === this.#key.value) return;
    clearTimeout(this.#timer);
    this.#read();
  }

  /** Someone is looking again: not a reason to hurry a server that does not answer. */
  #wake() {
    const slept = this.#pause() > BUSY_MS;
    this.#touched = performance.now();
    if (slept && this.#failures === 0 && !document.hidden) this.poke();
  }

  async #read() {
    this.#reading = true;
    const key = this.#key.value;
    try {
      const numbers = await readStats(key);
      this.#onNumbers(numbers);
      this.#latest = numbers;
      this.#failures = 0;
      this.#refused = undefined;
      this.#plan(this.#pause());
    } catch (error) {
      await this.#explain(error, key);
    } finally {
      this.#reading = false;
    }
  }

  async #explain(error, key) {
    const problem = error instanceof Problem ? error : new Problem("The server's numbers cannot be read.");
    if (problem.status === 401) {
      this.#refused = key;
      this.#onProblem(problem, null);
      if (await this.#key.renew(key)) this.#plan(0);
      return;
    }
    this.#failures += 1;
    const next = Math.min(LONGEST_MS, BUSY_MS * 2 ** this.#failures);
    this.#onProblem(problem, next);
    this.#plan(next);
  }

  #plan(milliseconds) {
    this.#timer = setTimeout(() => this.#read(), milliseconds);
  }

  #pause() {
    if (document.hidden) return HIDDEN_MS;
    const requests = this.#latest?.requests;
    const busy = requests && requests.running + requests.waiting > 0;
    return busy || performance.now() - this.#touched < IDLE_AFTER_MS ? BUSY_MS : IDLE_MS;
  }
}
