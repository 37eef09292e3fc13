// The server's API, what to tell people when it says no, and the server's numbers, read again and again.

const BUSY_MS = 1000;
const IDLE_MS = 5000;
const HIDDEN_MS = 30_000;
const LONGEST_MS = 60_000;
const IDLE_AFTER_MS = 15_000; // without a request on the server or a touch of the page

/** A request that failed, in one sentence for people. */
export class Problem extends Error {
  /**
   * @param {string} sentence what happened and what to do
   * @param {number} status the HTTP status, or 0 where there was none
   */
  constructor(sentence, status = 0) {
    super(sentence);
    this.status = status;
  }
}

/** @returns {Promise<object>} the answer of `GET /stats` */
export async function readStats(key) {
  const response = await send("stats", { headers: authorization(key), signal: AbortSignal.timeout(10_000) });
  return response.json().catch(() => {
    throw new Problem("The server's numbers cannot be read.", response.status);
  });
}

/**
 * The chunks of a streamed chat completion.
 *
 * @param {object} body of `POST /v1/chat/completions`
 * @param {string|null} key the API key
 * @param {AbortSignal} signal hangs up
 * @throws {Problem} the server refused, failed or went away
 * @throws {DOMException} AbortError, after `signal`
 */
export async function* streamChat(body, key, signal) {
  const response = await send("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", Accept: "text/event-stream", ...authorization(key) },
    body: JSON.stringify({
      ...body, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true },
    }),
    signal,
  });
  if (!response.headers.get("Content-Type")?.startsWith("text/event-stream")) {
    throw new Problem("This address answered with something that is not a stream; check that LatentKV serves it.");
  }
  let finished = false;
  try {
    for await (const data of eventData(response.body)) {
      if (data === "[DONE]") return;
      const chunk = parse(data);
      if (chunk.error) throw new Problem(`The server stopped the answer (${clause(chunk.error.message)}); try again.`);
      finished ||= Boolean(chunk.choices?.[0]?.finish_reason);
      yield chunk;
    }
  } catch (error) {
    if (error instanceof Problem || error.name === "AbortError") throw error;
    if (!finished) throw broken();
  }
  if (!finished) throw broken();
}

async function send(path, options) {
  let response;
  try {
    // Relative, so that the page also works below a proxy's path.
    response = await fetch(path, { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server cannot be reached; check that it is running, then try again.");
  }
  if (response.ok) return response;
  throw new Problem(sentence(response, await reason(response)), response.status);
}

const authorization = (key) => (key ? { Authorization: `Bearer ${key}` } : {});

function parse(data) {
  try {
    const chunk = JSON.parse(data);
    if (chunk && typeof chunk === "object") return chunk;
  } catch {
    // told below
  }
  throw new Problem("The server sent something that is not part of an answer; try again.");
}

const broken = () => new Problem("The connection broke before the answer was complete; try again.");

/** What the server said about its refusal, or "". */
async function reason(response) {
  try {
    const body = await response.json();
    const message = body.error?.message ?? body.detail;
    return typeof message === "string" ? message : "";
  } catch {
    return "";
  }
}

/** One sentence for a response that is not a success. */
function sentence(response, message) {
  const { status } = response;
  const said = message ? ` (${clause(message)})` : "";
  const then = `try again ${wait(response.headers.get("Retry-After"))}`;
  if (status === 401) return "The server wants an API key; enter it, then try again.";
  if (status === 429) return `The server has as many requests as it can take; ${then}.`;
  if (status === 503) return `The server cannot answer now${said}; ${then}.`;
  if (status >= 500) return `The server failed on this request (${status})${said}; try again, and look at its log if it fails again.`;
  if (message) return `The server refused this: ${clause(message)}.`;
  return `The server refused this (${status}); change the message or the settings, then try again.`;
}

/** A server's words as a part of a sentence: not endless, without the stop at the end. */
function clause(words) {
  const text = String(words ?? "no reason given").trim().slice(0, 600);
  return text.replace(/\.$/, "");
}

/** "in 12 seconds", from a `Retry-After` in seconds or as a date; "in a moment" without one. */
function wait(header) {
  const seconds = Math.ceil(/^\d+$/.test(header ?? "") ? Number(header) : (Date.parse(header ?? "") - Date.now()) / 1000);
  if (!(seconds > 0)) return "in a moment";
  return seconds === 1 ? "in a second" : `in ${seconds} seconds`;
}

/**
 * The data of each event, as it arrives. Bytes may be cut anywhere, inside a character or a line end too.
 *
 * @param {ReadableStream<Uint8Array>} body
 * @yields {string} the event's `data` lines, joined; comments and events without data are passed over
 */
async function* eventData(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        } else if (line === "" && data.length > 0) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    // Whoever stops reading hangs up: the server frees the answer's pages then.
    reader.cancel().catch(() => {});
  }
}

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
   * @param {import("./dialogs.js").ApiKey} key
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
