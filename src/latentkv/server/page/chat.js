// The page: what each button and key does.

import { Announcer } from "./announcer.js";
import { Asking } from "./asking.js";
import { Conversation, question } from "./conversation.js";
import { button, byId, fitHeight, isSend, setText } from "./dom.js";
import { bytes, tokens } from "./format.js";
import { ApiKey } from "./key.js";
import { Panel } from "./panel.js";
import { Settings } from "./settings.js";
import { Stats } from "./stats.js";
import { tabStore } from "./storage.js";
import { Thread } from "./thread.js";

const message = byId("message");
const conversation = new Conversation();
const key = new ApiKey();
const settings = new Settings(byId("settings"));
const panel = new Panel();
const stats = new Stats(key, showNumbers, (problem, next) => panel.fail(problem, next));
const asking = new Asking(key, stats, settings);
const announcer = new Announcer(byId("announcer"));
const thread = new Thread(conversation, { change, regenerate });
let answering = Promise.resolve();

/** Asks for an answer to the last question. `replaced` is the one so far, which comes back where no new one begins. */
async function ask(replaced = null) {
  notify("");
  announcer.begin("The model answers.");
  const answer = asking.answer(conversation, () => {
    thread.drawLast();
    announcer.follow(conversation.last.content);
  });
  drawAll();
  thread.toEnd();
  focusMessage();
  stats.poke();
  const problem = await answer;
  const isAnswered = conversation.last.role === "assistant";
  if (!isAnswered && replaced) conversation.turns.push(replaced);
  conversation.save();
  drawAll();
  announcer.finish(isAnswered ? conversation.last.content : "", problem ? "" : "End of the answer.");
  if (problem) notify(problem.message, button("Try again", retry));
  else notify("");
  stats.poke();
}

function send() {
  if (message.value.trim() === "") return;
  if (asking.isBusy) {
    notify("The answer is still under way: Esc stops it, and your message waits here.");
    return;
  }
  conversation.turns.push(question(message.value));
  conversation.save();
  setDraft("");
  answering = ask();
}

function regenerate() {
  if (!asking.isBusy) answering = ask(conversation.turns.pop());
}

function retry() {
  if (conversation.last?.role === "assistant") regenerate();
  else if (conversation.last && !asking.isBusy) answering = ask();
}

/** Takes an edited text: an answer's is what the model wrote from now on, a question's is asked in place of the old one. */
function change(turn, content) {
  if (asking.isBusy) return false;
  if (turn.role === "assistant") {
    turn.content = content;
    turn.figures = "edited";
    conversation.save();
    drawAll();
    focusMessage();
  } else {
    conversation.turns.splice(conversation.turns.indexOf(turn));
    conversation.turns.push(question(content));
    answering = ask();
  }
  return true;
}

async function clear() {
  asking.stop();
  await answering;
  const { turns } = conversation;
  if (turns.length === 0) return;
  const show = (shown) => {
    conversation.turns = shown;
    conversation.save();
    drawAll();
    focusMessage();
  };
  show([]);
  notify("The conversation is cleared.", button("Undo", () => {
    notify("");
    show(turns);
  }));
}

function stop() {
  asking.stop();
  focusMessage();
}

function drawAll() {
  thread.draw(asking.isBusy);
  byId("stop").hidden = !asking.isBusy;
  byId("send").hidden = asking.isBusy;
}

/** One sentence below the conversation, with what can be done about it; "" takes it away. */
function notify(sentence, ...actions) {
  const notice = byId("notice");
  notice.replaceChildren(...(sentence ? [sentence, ...actions] : []));
  if (sentence) thread.follow();
}

function setDraft(text) {
  message.value = text;
  keepDraft();
}

function keepDraft() {
  tabStore.set("draft", message.value);
  fitHeight(message);
}

/** Gives the message box the focus that a button took away with itself; not where that opens a keyboard on the screen. */
function focusMessage() {
  if (!matchMedia("(pointer: coarse)").matches) message.focus({ preventScroll: true });
}

function showNumbers(numbers) {
  panel.show(numbers);
  const { cache, model, context } = numbers;
  const perToken = cache.capacity_bytes / cache.capacity_tokens;
  setText(byId("model"), model);
  setText(byId("welcome-lead"), `A conversation with ${model}.`);
  setText(byId("welcome-facts"), `It keeps up to ${tokens(context)} in mind, ${bytes(perToken)} each, `
    + `where multi-head attention would need ${bytes(perToken * cache.mha_ratio)}.`);
}

function togglePanel() {
  const toggle = byId("show-panel");
  const isOpen = toggle.getAttribute("aria-expanded") !== "true";
  toggle.setAttribute("aria-expanded", String(isOpen));
  byId("panel").classList.toggle("open", isOpen);
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
message.addEventListener("input", keepDraft);
message.addEventListener("keydown", (event) => {
  if (!isSend(event)) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && asking.isBusy && !document.querySelector("dialog[open]")) stop();
});
// A page that is left may live on in the browser's cache, and its answer with it.
addEventListener("pagehide", () => {
  conversation.save();
  asking.stop();
});
byId("stop").addEventListener("click", stop);
byId("clear").addEventListener("click", clear);
byId("show-panel").addEventListener("click", togglePanel);
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

setDraft(tabStore.get("draft") ?? "");
drawAll();
stats.poke();
