// How fast an answer comes.

import { duration, rate, tokens } from "./format.js";

const SHORTEST_MS = 50; // what came all at once says nothing about speed

/** Times of one answer, in milliseconds of `performance.now()`. */
export class Speed {
  #asked;
  #first = null;
  #last = null;
  #chunks = 0;
  #usage = null;

  constructor(now) {
    this.#asked = now;
  }

  /** A chunk with text came. */
  chunk(now) {
    this.#first ??= now;
    this.#last = now;
    this.#chunks += 1;
  }

  /** The server's count, once it is known. */
  usage(usage) {
    this.#usage = usage;
  }

  /** Tokens a second after the first one, or null where that cannot be told. A chunk counts as a token until usage comes. */
  tokensPerSecond(now) {
    const count = this.#usage?.completion_tokens ?? this.#chunks;
    const end = this.#usage ? this.#last : now;
    const span = end - this.#first;
    return count > 1 && span >= SHORTEST_MS ? ((count - 1) * 1000) / span : null;
  }

  /** What is known now, in words. */
  describe(now) {
    if (this.#first === null) return `waiting for the first token, ${Math.floor((now - this.#asked) / 1000)} s`;
    const known = this.#usage;
    const speed = this.tokensPerSecond(now);
    const parts = [
      speed && `${known ? "" : "about "}${rate(speed)} tokens/s`,
      `first token after ${duration((this.#first - this.#asked) / 1000)}`,
      known && tokens(known.completion_tokens),
      known && `prompt of ${tokens(known.prompt_tokens)}${cached(known)}`,
    ];
    return parts.filter(Boolean).join(" · ");
  }
}

/** How much of the prompt was in the cache already. */
function cached(usage) {
  const count = usage.prompt_tokens_details?.cached_tokens;
  return count ? `, ${count} of them cached` : "";
}
