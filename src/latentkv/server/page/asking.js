// One answer, from the request to its last chunk.

import { Problem, readStats, streamChat } from "./api.js";
import { emptyAnswer, hasBegun, takeChunk } from "./conversation.js";
import { Speed } from "./speed.js";

const DRAW_MS = 50;

/** Asks for answers, one at a time. */
export class Asking {
  #key;
  #stats;
  #settings;
  #hangUp = null;

  /**
   * @param {import("./key.js").ApiKey} key
   * @param {import("./stats.js").Stats} stats
   * @param {import("./settings.js").Settings} settings
   */
  constructor(key, stats, settings) {
    this.#key = key;
    this.#stats = stats;
    this.#settings = settings;
  }

  get isBusy() {
    return this.#hangUp !== null;
  }

  /** Ends the answer under way; what has come is kept. */
  stop() {
    this.#hangUp?.abort();
  }

  /**
   * Adds the answer to the last question to a conversation, as it comes. Of an answer that never began nothing stays.
   *
   * The empty answer is there when this returns its promise.
   *
   * @param {import("./conversation.js").Conversation} conversation
   * @param {() => void} draw called as the answer grows, some times a second
   * @returns {Promise<Problem|null>} why the answer is not complete; null where it is, or was stopped
   */
  async answer(conversation, draw) {
    const messages = conversation.messages(this.#settings.system);
    const turn = emptyAnswer();
    const speed = new Speed(performance.now());
    const ticking = setInterval(() => {
      turn.figures = speed.describe(performance.now());
      draw();
    }, DRAW_MS);
    this.#hangUp = new AbortController();
    conversation.turns.push(turn);
    let problem = null;
    try {
      await this.#stream({ messages, ...this.#settings.sampling }, turn, speed);
    } catch (error) {
      problem = this.#hangUp.signal.aborted ? null : asProblem(error);
      turn.end = problem ? "broken" : "stopped";
    }
    clearInterval(ticking);
    this.#hangUp = null;
    turn.figures = speed.describe(performance.now());
    if (turn.end !== "stop" && turn.end !== "length" && !hasBegun(turn)) conversation.turns.pop();
    return problem;
  }

  /** Streams into `turn`; a key that the server asks for is asked for here, once for each refusal. */
  async #stream(body, turn, speed) {
    for (;;) {
      const key = this.#key.value;
      try {
        const model = await this.#model(key);
        for await (const chunk of streamChat({ model, ...body }, key, this.#hangUp.signal)) {
          if (takeChunk(turn, chunk)) speed.chunk(performance.now());
          if (chunk.usage) speed.usage(chunk.usage);
        }
        return;
      } catch (error) {
        if (error.status !== 401 || !(await this.#key.renew(key))) throw error;
        this.#stats.poke();
      }
    }
  }

  /** The model's name, or undefined: the server has only the one. */
  async #model(key) {
    if (this.#stats.latest) return this.#stats.latest.model;
    try {
      return (await readStats(key)).model;
    } catch (error) {
      if (error.status === 401) throw error;
      return undefined;
    }
  }
}

function asProblem(error) {
  return error instanceof Problem ? error : new Problem(`The page failed on this answer (${error.message}); try again.`);
}
