// Conversations as data, and what the browser keeps of them and for the page.

/**
 * @typedef {object} Turn
 * @property {"user"|"assistant"} role
 * @property {string} content
 * @property {{name: string, text: string}[]} [files] of a question
 * @property {string} [reasoning] what the model thought before its answer
 * @property {{name: string, arguments: string}[]} [toolCalls]
 * @property {""|"stop"|"length"|"tool_calls"|"stopped"|"broken"} [end] how an answer ended; "" while it goes on
 * @property {string} [figures] its speed, in words
 */

const TITLE_LENGTH = 60;

/** Turns in order: every answer follows its question. */
export class Conversation {
  id;
  /** @type {Turn[]} */
  turns = [];
  name = ""; // that a person gave it

  constructor(id = newId()) {
    this.id = id;
  }

  get last() {
    return this.turns.at(-1);
  }

  /** The name that it was given, or its first words. */
  get title() {
    return this.name || firstWords(this.turns[0]);
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
    const messages = asked.map((turn) => ({ role: turn.role, content: withFiles(turn) }));
    return system ? [{ role: "system", content: system }, ...messages] : messages;
  }
}

// Pages from plain http have no crypto.randomUUID.
const newId = () => Date.now().toString(36) + Math.random().toString(36).slice(2);

/** @returns {Turn} */
export const question = (content, files = []) => ({ role: "user", content, files });

/** @returns {Turn} an answer of which nothing has come yet */
export const emptyAnswer = () => ({
  role: "assistant", content: "", reasoning: "", toolCalls: [], end: "", figures: "",
});

/** Whether anything of an answer has come. */
export const hasBegun = (turn) => Boolean(turn.content || turn.reasoning || turn.toolCalls.length);

/** The words that a conversation goes by: the beginning of its first question, or a file's name. */
function firstWords(turn) {
  const words = turn?.content.trim().slice(0, 4 * TITLE_LENGTH).replace(/\s+/g, " ");
  const line = words || turn?.files?.[0]?.name || "New chat";
  if (line.length <= TITLE_LENGTH) return line;
  return `${line.slice(0, TITLE_LENGTH).replace(/\s+\S*$/, "")}…`;
}

/** A turn's text with its files before it, each in a fence that nothing in the file can close. */
function withFiles({ content, files = [] }) {
  const parts = files.map(({ name, text }) => {
    const runs = text.match(/`{3,}/g) ?? [];
    const fence = "`".repeat(Math.max(3, ...runs.map((run) => run.length + 1)));
    return `${name}\n${fence}\n${text}${text.endsWith("\n") ? "" : "\n"}${fence}`;
  });
  return [...parts, content].filter(Boolean).join("\n\n");
}

/** What a page of the browser's storage keeps under a name. Where it keeps nothing, the page goes on without. */
class Store {
  #area;

  /** @param area gives the browser's storage; to touch it may throw. */
  constructor(area) {
    this.#area = area;
  }

  /** The value kept under `name`, or null: nothing was kept, or what was kept is not ours to read. */
  get(name) {
    try {
      return JSON.parse(this.#area().getItem(`latentkv.${name}`));
    } catch {
      return null;
    }
  }

  /** Keeps a JSON value; null forgets it. */
  set(name, value) {
    try {
      if (value === null) this.#area().removeItem(`latentkv.${name}`);
      else this.#area().setItem(`latentkv.${name}`, JSON.stringify(value));
    } catch {
      // Lost with the page, which works all the same.
    }
  }
}

/** Kept in this browser. */
export const browserStore = new Store(() => localStorage);

/** Kept in this tab, until it is closed. */
export const tabStore = new Store(() => sessionStorage);

/**
 * The conversations that this browser keeps (IndexedDB); where it keeps none, those of this visit.
 *
 * A head is what the list shows: `{id, title, updated}`.
 */
export class Shelf {
  #database = opened();
  #ready = null;
  #visit = new Map();

  constructor() {
    this.#database.then((database) => { this.#ready = database; });
  }

  /** Heads, the latest first. */
  async heads() {
    const database = await this.#database;
    const heads = database
      ? await result(database.transaction("heads").objectStore("heads").getAll())
      : [...this.#visit.values()].map(({ head }) => head);
    return heads.sort((a, b) => b.updated - a.updated);
  }

  /** A conversation that was kept, or null. An answer that the page was closed on did not go on without it. */
  async read(id) {
    const database = await this.#database;
    const kept = database
      ? await result(database.transaction("bodies").objectStore("bodies").get(id))
      : this.#visit.get(id)?.body;
    if (!kept) return null;
    const conversation = new Conversation(id);
    conversation.name = kept.name;
    conversation.turns = kept.turns;
    const { last } = conversation;
    if (last?.end === "" && !hasBegun(last)) conversation.turns.pop();
    else if (last?.end === "") last.end = "broken";
    return conversation;
  }

  /** Keeps a conversation as it is now. Once the database is open, the write has left the page when this returns. */
  write(conversation, updated = Date.now()) {
    const { id, name, title, turns } = conversation;
    return this.#change(([heads, bodies]) => {
      heads.put({ id, title, updated });
      bodies.put({ id, name, turns });
    }, () => this.#visit.set(id, { head: { id, title, updated }, body: structuredClone({ name, turns }) }));
  }

  /** Forgets a conversation. */
  remove(id) {
    return this.#change((stores) => stores.forEach((store) => store.delete(id)), () => this.#visit.delete(id));
  }

  async #change(inDatabase, inVisit) {
    const database = this.#ready ?? (await this.#database);
    if (!database) {
      inVisit();
      return;
    }
    const transaction = database.transaction(["heads", "bodies"], "readwrite");
    inDatabase(["heads", "bodies"].map((name) => transaction.objectStore(name)));
    const done = new Promise((resolve, reject) => {
      transaction.oncomplete = resolve;
      transaction.onabort = () => reject(transaction.error);
    });
    transaction.commit(); // at once: the page may be about to go
    await done;
  }
}

/** The open database, or null where the browser has none for us. */
function opened() {
  return new Promise((resolve) => {
    try {
      const request = indexedDB.open("latentkv", 1);
      request.onupgradeneeded = () => {
        request.result.createObjectStore("heads", { keyPath: "id" });
        request.result.createObjectStore("bodies", { keyPath: "id" });
      };
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => resolve(null);
    } catch {
      resolve(null);
    }
  });
}

const result = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});
