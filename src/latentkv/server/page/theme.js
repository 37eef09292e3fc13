// Light or dark. Not a module: it runs before the first paint, so that a page never flashes in the other theme.
"use strict";
{
  const KEY = "latentkv.theme";
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");

  // A browser that keeps nothing throws at the mere touch of its storage; the system's theme is right then.
  const read = () => { try { return localStorage.getItem(KEY); } catch { return null; } };
  const keep = (theme) => {
    try {
      if (theme) localStorage.setItem(KEY, theme);
      else localStorage.removeItem(KEY);
    } catch { /* for this visit only */ }
  };

  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);

  const stored = read();
  if (stored === "dark" || stored === "light") root.dataset.theme = stored;

  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const show = () => {
      button.textContent = isDark() ? "Light" : "Dark";
      button.setAttribute("aria-label", `${button.textContent} theme`);
    };
    button.addEventListener("click", () => {
      const dark = !isDark();
      // The system's own theme is followed, not stored: the page goes on changing with it at dusk.
      if (dark === system.matches) {
        delete root.dataset.theme;
        keep(null);
      } else {
        root.dataset.theme = dark ? "dark" : "light";
        keep(root.dataset.theme);
      }
      show();
    });
    system.addEventListener("change", show);
    show();
  });
}
