// Copying text.

import { button, setText } from "./dom.js";

/** A button that copies what `read` gives, and says so on itself. */
export function copyButton(label, read) {
  const node = button(label, async () => {
    setText(node, (await copy(read())) ? "Copied" : "Not allowed here");
    setTimeout(() => setText(node, label), 2000);
  });
  node.classList.add("copy");
  return node;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copySelection(text);
  }
}

/** The older way: pages from plain http, other than localhost, have no clipboard of the newer one. */
function copySelection(text) {
  const box = document.createElement("textarea");
  const focused = document.activeElement;
  box.value = text;
  box.className = "unseen";
  document.body.append(box);
  box.select();
  const done = document.execCommand("copy");
  box.remove();
  focused?.focus();
  return done;
}
