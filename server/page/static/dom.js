// The only place that makes elements. Text is always a text node, never markup.

/**
 * Returns a new element. Functions under `on…` become listeners; null and false leave an attribute
 * out; `true` sets it without a value.
 */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false && value !== undefined) {
      node.setAttribute(name, value === true ? "" : value);
    }
  }
  node.append(...children.filter((child) => child !== null && child !== false));
  return node;
}

export const byId = (id) => document.getElementById(id);

/** Sets text only where it changed: a live region is not read out again, no layout is lost. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function setStyle(node, name, value) {
  if (node.style.getPropertyValue(name) !== value) node.style.setProperty(name, value);
}

/** Offers a text as a file. */
export function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = el("a", { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** Returns a function that runs `work` once the calls have paused for `pauseMs`. */
export function debounced(work, pauseMs) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(work, pauseMs);
  };
}
