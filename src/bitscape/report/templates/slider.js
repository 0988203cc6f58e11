"use strict";
// Shows the policy that the slider points at; without it, the page shows all of them as maps.
for (const figure of document.querySelectorAll("[data-front]")) {
  const front = JSON.parse(figure.dataset.front);
  const slider = figure.querySelector("input");
  const told = figure.querySelector("output");
  const here = figure.querySelector(".here");
  const show = () => {
    const at = Number(slider.value);
    told.textContent = front.told[at];
    slider.setAttribute("aria-valuetext", front.told[at]);
    here.setAttribute("cx", front.x[at]);
    here.setAttribute("cy", front.y[at]);
    for (const panel of figure.querySelectorAll("g[data-panel]")) {
      const { base, unit, top } = panel.dataset;
      const words = panel.querySelectorAll("text");
      panel.querySelectorAll("rect").forEach((bar, layer) => {
        const bits = front[panel.dataset.panel][at][layer];
        const height = Math.min(bits, top) * unit;
        bar.setAttribute("y", base - height);
        bar.setAttribute("height", height);
        words[layer].setAttribute("y", base - height - 3);
        words[layer].textContent = bits;
      });
    }
    for (const row of figure.querySelectorAll("g[data-first]")) {
      const y = Number(row.dataset.first) + at * row.dataset.step;
      row.querySelectorAll("rect").forEach((frame) => frame.setAttribute("y", y));
    }
  };
  slider.addEventListener("input", show);
  figure.classList.add("live");
  show();
}
