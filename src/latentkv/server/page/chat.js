// The page: what each button and key does.

import { Announcer, Asking } from "./answering.js";
import { Conversation, hasBegun, question, Shelf, tabStore } from "./conversations.js";
import { button, byId, bytes, setText, tokens } from "./dom.js";
import { ApiKey, Composer, Settings } from "./forms.js";
import { Stats } from "./server.js";
import { ConversationList, Panel } from "./sides.js";
import { Thread } from "./thread.js";

const SAVE_MS = 1000; // between two times that a growing answer is kept
const MOST_SAVED = 500_000; // characters: a longer one is kept when it is complete, or the page is left
const UNDER_WAY = "The answer is still under way: Esc stops it, and your message waits here.";

let conversation = new Conversation();
let answering = Promise.resolve();
let saved = 0;
let heads = [];
const shelf = new Shelf();
const key = new ApiKey();
const settings = new Settings(byId("settings"));
const panel = new Panel();
const stats = new Stats(key, showNumbers, (problem, next) => panel.fail(problem, next));
const asking = new Asking(key, stats, settings);
const announcer = new Announcer(byId("announcer"));
const thread = new Thread({ change, regenerate });
const composer = new Composer(send, notify);
const list = new ConversationList({ open, rename, remove });

/** Asks for an answer to the last question. `replaced` is the one so far, which comes back where no new one begins. */
async function ask(replaced = null) {
  notify("");
  announcer.begin("The model answers.");
  const answer = asking.answer(conversation, (news) => {
    thread.grow(news);
    announcer.hear(news.content);
  }, () => {
    thread.drawLast();
    saveGrowing();
  });
  drawAll();
  thread.toEnd();
  composer.focus();
  stats.poke();
  const problem = await answer;
  const isAnswered = conversation.last.role === "assistant";
  if (!isAnswered && replaced) conversation.turns.push(replaced);
  save();
  drawAll();
  announcer.finish(problem ? "" : "End of the answer.");
  if (problem) notify(problem.message, button("Try again", retry));
  else if (byId("notice").textContent === UNDER_WAY) notify("");
  stats.poke();
}

function send() {
  if (composer.isEmpty) return;
  if (asking.isBusy) {
    notify(UNDER_WAY);
    return;
  }
  conversation.turns.push(question(...composer.take()));
  save();
  answering = ask();
}

function regenerate() {
  if (!asking.isBusy) answering = ask(conversation.turns.pop());
}

function retry() {
  if (conversation.last?.role === "assistant") regenerate();
  else if (conversation.last && !asking.isBusy) answering = ask();
}

/** Takes an edited text: an answer's is what the model wrote from now on, a question's is asked in the old one's place. */
function change(turn, content) {
  if (asking.isBusy) return false;
  const { turns } = conversation;
  const index = turns.indexOf(turn);
  if (turn.role === "assistant") {
    turns[index] = { ...turn, content, figures: "edited" };
    save();
    drawAll();
    composer.focus();
    return true;
  }
  const before = [...turns];
  turns.splice(index, turns.length, question(content, turn.files));
  answering = ask();
  if (before.length > index + 2) {
    notify("What came after the edited message is gone.", button("Undo", () => settle(() => {
      conversation.turns = before;
      save();
      drawAll();
    })));
  }
  return true;
}

/** Ends the answer under way, then acts. */
async function settle(act) {
  asking.stop();
  await answering;
  notify("");
  await act();
  composer.focus();
}

function startNew() {
  fold();
  return settle(() => show(new Conversation()));
}

function open(id) {
  fold();
  if (id === conversation.id) return composer.focus();
  return settle(async () => show((await shelf.read(id)) ?? new Conversation()));
}

function show(other) {
  conversation = other;
  tabStore.set("open", other.id);
  drawAll();
  thread.toEnd();
}

/** Gives a conversation a name; "" is its first words, null leaves it as it is. */
async function rename(id, name) {
  const renamed = id === conversation.id ? conversation : await shelf.read(id);
  if (renamed && name !== null && name !== renamed.title) {
    renamed.name = name;
    await keep(renamed, heads.find((head) => head.id === id)?.updated);
  }
  await drawList();
  byId("list").querySelector(`[data-id="${CSS.escape(id)}"] .open`)?.focus();
}

function remove(id) {
  return settle(async () => {
    const isOpen = id === conversation.id;
    const removed = isOpen ? conversation : await shelf.read(id);
    const updated = heads.find((head) => head.id === id)?.updated;
    await shelf.remove(id).catch(() => {});
    await drawList();
    if (isOpen) show(new Conversation());
    if (!removed) return;
    notify(`“${removed.title}” is deleted.`, button("Undo", () => settle(async () => {
      await keep(removed, updated);
      show(removed);
    })));
  });
}

/** Keeps the open conversation as it is now; an empty one is none. */
function save() {
  if (conversation.turns.length > 0) keep(conversation);
}

async function keep(kept, updated) {
  try {
    await shelf.write(kept, updated);
  } catch {
    notify("This browser has no room for the conversation: it is lost when the page is closed.");
  }
  await drawList();
}

/** Keeps an answer as it grows, now and then. */
function saveGrowing() {
  const { last } = conversation;
  const length = last.content.length + last.reasoning.length;
  if (performance.now() - saved < SAVE_MS || !hasBegun(last) || length > MOST_SAVED) return;
  saved = performance.now();
  shelf.write(conversation).catch(() => {});
}

async function drawList() {
  heads = await shelf.heads();
  list.draw(heads, conversation.id);
}

function stop() {
  asking.stop();
  composer.focus();
}

function drawAll() {
  thread.draw(conversation, asking.isBusy);
  list.draw(heads, conversation.id);
  byId("welcome").hidden = conversation.turns.length > 0;
  byId("stop").hidden = !asking.isBusy;
  byId("send").hidden = asking.isBusy;
}

/** One sentence below the conversation, with what can be done about it; "" takes it away. */
function notify(sentence, ...actions) {
  byId("notice").replaceChildren(...(sentence ? [sentence, ...actions] : []));
  if (sentence) thread.follow();
}

function showNumbers(numbers) {
  panel.show(numbers);
  const { cache, model, context } = numbers;
  const perToken = cache.capacity_bytes / cache.capacity_tokens;
  setText(byId("model"), model);
  setText(byId("welcome-lead"), `A conversation with ${model}.`);
  setText(byId("welcome-facts"), `It keeps up to ${tokens(context)} in mind, ${bytes(perToken)} each, `
    + `where multi-head attention would need ${bytes(perToken * cache.mha_ratio)}.`);
  byId("no-template").hidden = numbers.chat_template !== false;
}

// On a narrow screen the sides are folded away; a button unfolds one of them.
const sides = [["show-chats", "chats"], ["show-panel", "panel"]].map(([toggle, side]) => [byId(toggle), byId(side)]);

function fold(except = null) {
  for (const [toggle, side] of sides) {
    const isOpen = toggle === except && toggle.getAttribute("aria-expanded") !== "true";
    toggle.setAttribute("aria-expanded", String(isOpen));
    side.classList.toggle("open", isOpen);
  }
}

for (const [toggle] of sides) toggle.addEventListener("click", () => fold(toggle));
document.addEventListener("pointerdown", (event) => {
  if (!event.target.closest("#chats, #panel, header")) fold();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  const open = sides.find(([toggle]) => toggle.getAttribute("aria-expanded") === "true");
  if (open) {
    fold();
    open[0].focus();
  } else if (asking.isBusy) {
    stop();
  }
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) drawList(); // another tab may have changed it
  else if (asking.isBusy) save();
});
// A page that is left may live on in the browser's cache, and its answer with it.
addEventListener("pagehide", () => {
  if (asking.isBusy) save();
  asking.stop();
});
byId("stop").addEventListener("click", stop);
byId("new-chat").addEventListener("click", startNew);
byId("open-settings").addEventListener("click", () => settings.open());
byId("reset-settings").addEventListener("click", () => settings.reset());
byId("enter-key").addEventListener("click", () => enterKey("This server asks for an API key."));
byId("change-key").addEventListener("click", () => {
  settings.close();
  enterKey("The key is sent with every request to this server.");
});

async function enterKey(reason) {
  if (await key.ask(reason)) stats.poke();
}

stats.poke();
const left = tabStore.get("open");
const kept = left ? await shelf.read(left).catch(() => null) : null;
// Whoever was faster than the browser's storage has begun a conversation already.
if (kept && conversation.turns.length === 0) show(kept);
else show(conversation);
drawList();
