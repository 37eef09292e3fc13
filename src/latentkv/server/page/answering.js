// One answer, from the request to its last chunk: its text, its speed, and its words for screen readers.

import { emptyAnswer, hasBegun } from "./conversations.js";
import { duration, rate, setText, tokens } from "./dom.js";
import { Problem, readStats, streamChat } from "./server.js";

const DRAW_MS = 50;
const YIELD_MS = 8; // of work on what has come, before keys and clicks have their turn

/** Asks for answers, one at a time. */
export class Asking {
  #key;
  #stats;
  #settings;
  #hangUp = null;

  /**
   * @param {import("./forms.js").ApiKey} key
   * @param {import("./server.js").Stats} stats
   * @param {import("./forms.js").Settings} settings
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
   * @param {import("./conversations.js").Conversation} conversation
   * @param {(news: {content: string, reasoning: string}) => void} grow called with what each chunk adds
   * @param {() => void} draw called some times a second
   * @returns {Promise<Problem|null>} why the answer is not complete; null where it is, or was stopped
   */
  async answer(conversation, grow, draw) {
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
      await this.#stream({ messages, ...this.#settings.sampling }, turn, speed, grow);
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
  async #stream(body, turn, speed, grow) {
    let worked = performance.now();
    for (;;) {
      const key = this.#key.value;
      try {
        const model = await this.#model(key);
        for await (const chunk of streamChat({ model, ...body }, key, this.#hangUp.signal)) {
          const news = takeChunk(turn, chunk);
          if (chunk.usage) speed.usage(chunk.usage);
          if (news) {
            speed.came(performance.now());
            grow(news);
          }
          if (performance.now() - worked > YIELD_MS) {
            await new Promise((resume) => { setTimeout(resume); });
            worked = performance.now();
          }
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

/** Takes a chunk of a stream into an answer. @returns what it adds to the texts, or null where it adds nothing */
function takeChunk(turn, chunk) {
  const choice = chunk.choices?.[0];
  if (choice?.finish_reason) turn.end = choice.finish_reason;
  const delta = choice?.delta ?? {};
  const news = { content: delta.content ?? "", reasoning: delta.reasoning_content ?? "" };
  turn.reasoning += news.reasoning;
  turn.content += news.content;
  for (const call of delta.tool_calls ?? []) {
    const known = (turn.toolCalls[call.index ?? 0] ??= { name: "", arguments: "" });
    known.name += call.function?.name ?? "";
    known.arguments += call.function?.arguments ?? "";
  }
  return news.content || news.reasoning || delta.tool_calls?.length ? news : null;
}

const SHORTEST_MS = 50; // what came all at once says nothing about speed

/** How fast an answer comes: the server's counts over the times at which they came, in milliseconds. */
export class Speed {
  #asked;
  #first = null;
  #last = null;
  #tokensBefore = 1; // in what came first: their time is the prompt's
  #usage = null;

  constructor(now) {
    this.#asked = now;
  }

  /** The server counted the tokens so far. */
  usage(usage) {
    this.#usage = usage;
  }

  /** Text came; its count, if the server gives one with it, is known already. */
  came(now) {
    if (this.#first === null) {
      this.#first = now;
      this.#tokensBefore = this.#usage?.completion_tokens ?? 1;
    }
    this.#last = now;
  }

  /** Tokens per second after what came first; null where that cannot be told. */
  get tokensPerSecond() {
    const count = (this.#usage?.completion_tokens ?? 0) - this.#tokensBefore;
    const span = this.#last - this.#first;
    return count > 0 && span >= SHORTEST_MS ? (count * 1000) / span : null;
  }

  /** What is known now, in words. */
  describe(now) {
    if (this.#first === null) return `waiting for the first token, ${Math.floor((now - this.#asked) / 1000)} s`;
    const known = this.#usage;
    const speed = this.tokensPerSecond;
    const parts = [
      speed && `${rate(speed)} tokens/s`,
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

const PAUSE_MS = 4000;
const MOST_UNSAID = 2000; // characters: what comes faster than it can be said is left to the eyes

/** Reads a growing text aloud through a live region: whole sentences, a few seconds apart, instead of every token. */
export class Announcer {
  #region;
  #unsaid = "";
  #next = 0;

  /** @param {HTMLElement} region with aria-live="polite" */
  constructor(region) {
    this.#region = region;
  }

  /** A new text begins; `words` are said first. */
  begin(words) {
    this.#unsaid = "";
    this.#next = performance.now() + PAUSE_MS;
    setText(this.#region, words);
  }

  /** More of the text has come. */
  hear(text) {
    if (this.#unsaid.length < MOST_UNSAID) this.#unsaid += text;
    const now = performance.now();
    if (now < this.#next) return;
    const sentences = /^[\s\S]*[.!?:;](?=\s)/.exec(this.#unsaid)?.[0];
    if (!sentences) return;
    setText(this.#region, sentences.trim());
    this.#unsaid = this.#unsaid.slice(sentences.length);
    this.#next = now + PAUSE_MS;
  }

  /** The text is complete: its rest, and `words` after it. */
  finish(words) {
    setText(this.#region, `${this.#unsaid.trim()} ${words}`.trim());
    this.#unsaid = "";
  }
}
