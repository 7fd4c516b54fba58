// A display wider than its column first moves its number to a line of its own, then is set smaller
// until it fits. MathJax breaks no lines, and what has to be scrolled for is not seen.
function fit(display) {
  const formula = display.querySelector("mjx-container");
  if (!formula || !display.clientWidth) return; // not typeset, or folded away
  const isWide = () => formula.scrollWidth > formula.clientWidth;
  formula.dataset.size ??= parseFloat(formula.style.fontSize); // MathJax's, in percent
  formula.style.fontSize = `${formula.dataset.size}%`;
  display.classList.remove("number-below");
  if (isWide()) display.classList.add("number-below");
  // scrollWidth is rounded, hence the pixel
  const share = formula.clientWidth / (formula.scrollWidth + 1);
  if (isWide()) formula.style.fontSize = `${formula.dataset.size * share}%`;
}

addEventListener("load", async () => {
  await window.MathJax?.startup?.promise;
  const watcher = new ResizeObserver((entries) => entries.forEach((entry) => fit(entry.target)));
  document.querySelectorAll("div.math").forEach((display) => watcher.observe(display));
});
