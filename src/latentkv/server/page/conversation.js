// The conversation as data.

import { tabStore } from "./storage.js";

/**
 * @typedef {object} Turn
 * @property {"user"|"assistant"} role
 * @property {string} content
 * @property {string} [reasoning] what the model thought before its answer
 * @property {{name: string, arguments: string}[]} [toolCalls]
 * @property {""|"stop"|"length"|"tool_calls"|"stopped"|"broken"} [end] how an answer ended; "" while it goes on
 * @property {string} [figures] its speed, in words
 */

/** Turns in order: every answer follows its question. A reload of the tab keeps them. */
export class Conversation {
  /** @type {Turn[]} */
  turns = restored();

  get last() {
    return this.turns.at(-1);
  }

  /** The last question, answered or not; undefined in an empty conversation. */
  get lastQuestion() {
    return this.turns.findLast((turn) => turn.role === "user");
  }

  /** Whether a question was left without an answer: it stays on the page, and is not sent again. */
  isUnanswered(turn) {
    const next = this.turns[this.turns.indexOf(turn) + 1];
    return turn.role === "user" && next?.role !== "assistant";
  }

  /** The messages that ask for an answer to the last question. */
  messages(system) {
    const asked = this.turns.filter((turn) => turn === this.last || !this.isUnanswered(turn));
    const messages = asked.map(({ role, content }) => ({ role, content }));
    return system ? [{ role: "system", content: system }, ...messages] : messages;
  }

  save() {
    tabStore.set("conversation", this.turns);
  }
}

/** @returns {Turn} */
export const question = (content) => ({ role: "user", content });

/** @returns {Turn} an answer of which nothing has come yet */
export const emptyAnswer = () => ({
  role: "assistant", content: "", reasoning: "", toolCalls: [], end: "", figures: "",
});

/** Whether anything of an answer has come. */
export const hasBegun = (turn) => Boolean(turn.content || turn.reasoning || turn.toolCalls.length);

/** Takes a chunk of a stream into an answer. @returns {boolean} whether it brought new text */
export function takeChunk(turn, chunk) {
  const choice = chunk.choices?.[0];
  if (choice?.finish_reason) turn.end = choice.finish_reason;
  const delta = choice?.delta ?? {};
  turn.reasoning += delta.reasoning_content ?? "";
  turn.content += delta.content ?? "";
  for (const call of delta.tool_calls ?? []) {
    const known = (turn.toolCalls[call.index ?? 0] ??= { name: "", arguments: "" });
    known.name += call.function?.name ?? "";
    known.arguments += call.function?.arguments ?? "";
  }
  return Boolean(delta.reasoning_content || delta.content || delta.tool_calls?.length);
}

/** The turns that this tab kept. An answer that the tab was closed on did not go on without it. */
function restored() {
  const turns = tabStore.get("conversation") ?? [];
  const last = turns.at(-1);
  if (last?.end !== "") return turns;
  if (hasBegun(last)) last.end = "broken";
  else turns.pop();
  return turns;
}
