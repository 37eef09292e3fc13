// The server's API, and what to tell people when it says no.

import { eventData } from "./sse.js";

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
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
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
