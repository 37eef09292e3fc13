// The panel of live numbers, drawn from what `GET /stats` answers.

import { byId, element, setText } from "./dom.js";
import { bytes, count, duration, percent, rate, tokens } from "./format.js";

const TRACE_MS = 60_000;
const MAX_LINES = 8;
const SMALLEST = 1 / 32; // of a line: a shorter bar is hard to see, and both are drawn larger

/** Shows numbers; it asks for none. */
export class Panel {
  #trace = [];

  /** @param {object} numbers the answer of `GET /stats` */
  show(numbers) {
    setText(byId("panel-state"), "Live.");
    byId("numbers").classList.remove("old");
    byId("enter-key").hidden = true;
    this.#showSpeed(numbers);
    showFill(numbers.cache);
    showComparison(numbers.cache);
    for (const name of ["running", "waiting", "finished"]) setText(byId(name), count(numbers.requests[name]));
    setText(byId("about"), `LatentKV ${numbers.version}, up ${duration(numbers.uptime_s)}, context ${tokens(numbers.context)}`);
  }

  /**
   * Shows that the numbers are old.
   *
   * @param {{message: string, status: number}} problem
   * @param {number|null} next milliseconds to the next try
   */
  fail(problem, next) {
    byId("numbers").classList.add("old");
    byId("enter-key").hidden = problem.status !== 401;
    const words = problem.status === 401
      ? "The numbers need the API key."
      : `No numbers from the server; asking again in ${Math.round(next / 1000)} s.`;
    setText(byId("panel-state"), words);
    setHead("Numbers", "");
  }

  #showSpeed({ throughput, cache }) {
    const speed = throughput.generated_tokens_per_s;
    setText(byId("generated-rate"), rate(speed));
    setText(byId("prompt-rate"), rate(throughput.prompt_tokens_per_s));
    setHead(`${rate(speed)} tok/s`, ` · ${percent(fillShare(cache))}`);
    const now = performance.now();
    this.#trace = [...this.#trace.filter((point) => now - point.at <= TRACE_MS), { at: now, speed }];
    const peak = Math.max(...this.#trace.map((point) => point.speed));
    const points = this.#trace.map((point) => {
      const x = 60 - (now - point.at) / 1000;
      const y = 19 - (peak > 0 ? (point.speed / peak) * 18 : 0);
      return `${x.toFixed(2)},${y.toFixed(2)}`;
    });
    byId("trace").querySelector("polyline").setAttribute("points", points.join(" "));
    setText(byId("trace-text"), peak > 0 ? `written, last minute; most ${rate(peak)}` : "written, last minute; nothing yet");
  }
}

/** What the button says that unfolds the panel on a narrow screen. */
function setHead(rateText, fillText) {
  setText(byId("head-rate"), rateText);
  setText(byId("head-fill"), fillText);
}

const fillShare = (cache) => (cache.used_bytes + cache.kept_bytes) / cache.capacity_bytes;

function showFill(cache) {
  setText(byId("cache-format"), cache.format);
  const bar = byId("fill");
  setShare(bar.querySelector(".used"), cache.used_bytes / cache.capacity_bytes);
  setShare(bar.querySelector(".kept"), cache.kept_bytes / cache.capacity_bytes);
  const text = `${percent(fillShare(cache))} of ${bytes(cache.capacity_bytes)}, room for ${tokens(cache.capacity_tokens)}`;
  bar.setAttribute("aria-valuenow", String(Math.round(fillShare(cache) * 100)));
  bar.setAttribute("aria-valuetext", text);
  setText(byId("fill-text"), text);
  setText(byId("used-bytes"), bytes(cache.used_bytes));
  setText(byId("kept-bytes"), bytes(cache.kept_bytes));
}

/** Both bars in one scale; what is longer than a line goes on in the next one. */
function showComparison(cache) {
  const inUse = cache.used_bytes > 0;
  const perToken = cache.capacity_bytes / cache.capacity_tokens;
  const latent = inUse ? cache.used_bytes : perToken;
  const mha = inUse ? cache.mha_bytes : perToken * cache.mha_ratio;
  let parts = 1; // of the cache that a line stands for one of
  while (latent * parts < cache.capacity_bytes * SMALLEST) parts *= 2;
  const line = cache.capacity_bytes / parts;
  setText(byId("compare-subject"), inUse ? `${tokens(cache.used_tokens)} in use` : "nothing in use; drawn for one token");
  setText(byId("compare-ratio"), `1/${Number((mha / latent).toFixed(1))}`);
  setText(byId("latent-bytes"), bytes(latent));
  setText(byId("mha-bytes"), bytes(mha));
  drawLines(byId("latent-lines"), latent / line);
  drawLines(byId("mha-lines"), mha / line);
  const rest = mha / line - MAX_LINES;
  setText(byId("compare-rest"), rest > 0 ? `and ${Number(rest.toFixed(1))} more lines that do not fit here` : "");
  const whole = `the whole cache, ${bytes(line)}`;
  setText(byId("compare-scale"), `One line is ${parts === 1 ? whole : `1/${count(parts)} of the cache, ${bytes(line)}`}.`);
}

/** A bar of this many lines, the last one as long as what is left. */
function drawLines(container, length) {
  const lines = Math.min(MAX_LINES, Math.ceil(length));
  while (container.children.length > lines) container.lastElementChild.remove();
  while (container.children.length < lines) container.append(element("div", "line", element("span", "used")));
  [...container.children].forEach((line, index) => setShare(line.firstElementChild, length - index));
}

function setShare(bar, share) {
  bar.style.width = `${Math.min(1, Math.max(0, share)) * 100}%`;
}
