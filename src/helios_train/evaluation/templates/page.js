"use strict";
(() => {
  const tip = document.getElementById("tip");
  const number = (value) => {
    const size = Math.abs(value);
    if (size >= 1000 && size < 1e15) return value.toLocaleString("en-US", { maximumSignificantDigits: 6 });
    return size && (size < 1e-3 || size >= 1e15) ? value.toExponential(2) : String(value);
  };
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle; else high = middle;
    }
    return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
  };
  const piece = (tag, text, name) => {
    const made = document.createElement(tag);
    made.textContent = text;
    if (name) made.className = name;
    return made;
  };

  document.querySelectorAll("figure.chart").forEach((figure) => {
    const data = JSON.parse(figure.dataset.chart);
    const svg = figure.querySelector("svg"), cursor = figure.querySelector(".cursor");
    const [left, right, width] = data.box, hidden = new Set();
    const leave = () => { tip.hidden = true; cursor.setAttribute("x1", -9); cursor.setAttribute("x2", -9); };

    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const share = ((event.clientX - box.left) * width / box.width - left) / (right - left);
      if (share < -0.02 || share > 1.02) return leave();
      const x = data.from + share * (data.to - data.from);
      let found = null;
      data.lines.forEach((line, i) => {
        if (hidden.has(i)) return;
        const at = data.names.length ? Math.max(0, Math.min(line.x.length - 1, Math.floor(x))) : nearest(line.x, x);
        if (found === null || Math.abs(line.x[at] - x) < Math.abs(found - x)) found = line.x[at];
      });
      if (found === null) return leave();
      const reach = (data.to - data.from) / 40;
      tip.replaceChildren(piece("b", data.names.length ? data.names[found] : `${data.along} ${number(Math.round(found * 10) / 10)}`));
      data.lines.forEach((line, i) => {
        const at = nearest(line.x, found);
        if (hidden.has(i) || Math.abs(line.x[at] - found) > reach) return;
        const row = piece("span", "", line.colour);
        row.append(piece("i", ""), line.label, piece("b", `${number(line.y[at])}${data.names.length ? " " + data.unit : ""}`));
        tip.append(row);
      });
      const place = left + (found + (data.names.length ? 0.5 : 0) - data.from) / (data.to - data.from) * (right - left);
      cursor.setAttribute("x1", place); cursor.setAttribute("x2", place);
      tip.hidden = false;
      const wide = tip.offsetWidth;
      const side = event.clientX + 18 + wide > innerWidth ? event.clientX - wide - 18 : event.clientX + 18;
      tip.style.transform = `translate(${Math.max(4, side)}px, ${Math.max(4, Math.min(innerHeight - tip.offsetHeight - 4, event.clientY - 20))}px)`;
    });
    svg.addEventListener("pointerleave", leave);
    figure.querySelectorAll("button[data-line]").forEach((button) => button.addEventListener("click", () => {
      const line = Number(button.dataset.line), off = !hidden.has(line);
      if (off) hidden.add(line); else hidden.delete(line);
      button.setAttribute("aria-pressed", String(!off));
      figure.querySelector(`g[data-line="${line}"]`).toggleAttribute("hidden", off);
    }));
  });

  document.querySelectorAll(".video img").forEach((img) => img.addEventListener("click", () => img.classList.toggle("large")));
  document.querySelectorAll("button.play").forEach((button) => button.addEventListener("click", () => {
    const videos = [...document.querySelectorAll(`${button.dataset.play} video`)];
    const start = videos.some((video) => video.paused);
    videos.forEach((video) => { if (start) { video.currentTime = 0; video.play().catch(() => {}); } else video.pause(); });
    button.textContent = start ? "pause all" : "play all";
  }));
})();
