// Elements from strings that stay strings: text goes in as text nodes, never as markup.

/** The element of the page with this id. */
export const byId = (id) => document.getElementById(id);

/** A new element with a class (or "") and children: nodes, or strings that are shown letter by letter. */
export function element(name, className, ...children) {
  const node = document.createElement(name);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

/** A new button that calls `action`. */
export function button(label, action) {
  const node = element("button", "", label);
  node.type = "button";
  node.addEventListener("click", action);
  return node;
}

/** Changes an element's text only where it differs, so that live regions and selections are left in peace. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Makes a text box as high as its text; style.css caps it. */
export function fitHeight(textarea) {
  textarea.style.height = "auto";
  textarea.style.height = `${textarea.scrollHeight + 2}px`;
}

/** Whether this key press sends: Enter alone, and not the Enter that ends a word in an input method. */
export function isSend(event) {
  const composing = event.isComposing || event.keyCode === 229;
  return event.key === "Enter" && !event.shiftKey && !event.ctrlKey && !event.altKey && !event.metaKey && !composing;
}
