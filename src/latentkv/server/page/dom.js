// Elements from strings that stay strings: text goes in as text nodes, never as markup. And numbers as people read
// them.

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

/** A new button that shows one of the page's signs (`<symbol>`s) and is called `name`. */
export function signButton(sign, name, action) {
  const node = button("", action);
  node.append(byId(sign).content.cloneNode(true));
  node.setAttribute("aria-label", name);
  node.title = name;
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

/** A button that copies the text that `read` gives of it, and says so on itself. */
export function copyButton(label, read) {
  const node = button(label, async () => {
    setText(node, (await copy(read(node))) ? "Copied" : "Not allowed here");
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

const UNITS = ["B", "kB", "MB", "GB", "TB", "PB"];

/** 3 significant digits in decimal units: 768 B, 1.23 kB, 41.9 MB. */
export function bytes(count) {
  let unit = 0;
  while (count >= 999.5 && unit < UNITS.length - 1) {
    count /= 1000;
    unit += 1;
  }
  return `${unit === 0 ? Math.round(count) : Number(count.toPrecision(3))} ${UNITS[unit]}`;
}

/** A text's size as a file, in words. */
export const sizeOf = (text) => bytes(new TextEncoder().encode(text).length);

/** 12,345 */
export const count = (number) => Math.round(number).toLocaleString("en");

/** "1 token", "12 tokens" */
export const tokens = (number) => `${count(number)} ${Math.round(number) === 1 ? "token" : "tokens"}`;

/** 8.91 below ten, 89.1 below a hundred, 891 above. */
export function rate(number) {
  return number >= 99.95 ? count(number) : number.toFixed(number >= 9.995 ? 1 : 2);
}

/** 0.18 s, 12.3 s, 3 min 20 s, 4 h 5 min, 2 d 3 h */
export function duration(seconds) {
  if (seconds < 9.995) return `${seconds.toFixed(2)} s`;
  if (seconds < 59.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  const minutes = Math.floor(whole / 60);
  if (minutes < 1440) return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  return `${Math.floor(minutes / 1440)} d ${Math.floor((minutes % 1440) / 60)} h`;
}

/** A share as a percentage that is never a rounded-away 0 or 100. */
export function percent(share) {
  if (share > 0 && share < 0.001) return "under 0.1 %";
  if (share < 0.0995) return `${Number((share * 100).toFixed(1))} %`;
  return `${share < 1 ? Math.min(99, Math.round(share * 100)) : 100} %`;
}
