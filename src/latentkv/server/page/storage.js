// What the browser keeps for the page. Where it keeps nothing (blocked, or full), the page goes on without.

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
