"use strict";

// Light and dark: the system's choice, until the button says otherwise.
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const remember = (theme) => {
    try { localStorage.setItem("cosmos_posttrain-theme", theme); } catch { /* not in every browser */ }
  };
  const remembered = () => {
    try { return localStorage.getItem("cosmos_posttrain-theme"); } catch { return null; }
  };
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const label = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  const theme = remembered();
  if (theme === "dark" || theme === "light") root.dataset.theme = theme;
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    remember(root.dataset.theme);
    label();
  });
  system.addEventListener("change", label);
  button.hidden = false;
  label();
})();

// Clips: the films of one play together, and stand at the slider's frame when they do not play.
const clips = [...document.querySelectorAll(".clip")].map((element) => {
  const films = [...element.querySelectorAll("video")];
  const slider = element.querySelector("input");
  const button = element.querySelector(".play");
  const output = element.querySelector("output");
  const name = element.querySelector("h3").textContent;
  const fps = Number(element.dataset.fps);
  const numFrames = Number(element.dataset.frames);
  const numGiven = Number(element.dataset.given);
  let isPlaying = false;

  // The middle of a frame, so that rounding cannot show its neighbour.
  const timeOf = (frame) => (frame + 0.5) / fps;
  const frameOf = (film) => Math.min(Math.floor(film.currentTime * fps + 1e-3), numFrames - 1);
  const words = (frame) => {
    const given = numGiven ? (frame < numGiven ? ", given" : ", generated") : "";
    return `frame ${frame + 1} of ${numFrames}${given}`;
  };
  const show = (frame) => {
    if (Number(slider.value) !== frame) slider.value = frame;
    output.textContent = `${frame + 1} / ${numFrames}`;
    if (!isPlaying) slider.setAttribute("aria-valuetext", words(frame));
  };
  const seek = (frame) => {
    for (const film of films) film.currentTime = timeOf(frame);
    show(frame);
  };
  const label = () => {
    button.classList.toggle("is-playing", isPlaying);
    button.setAttribute("aria-label", `${isPlaying ? "Pause" : "Play"} ${name}`);
  };
  const pause = () => {
    if (!isPlaying) return;
    isPlaying = false;
    for (const film of films) film.pause();
    seek(frameOf(films[0]));
    label();
  };
  const step = () => {
    if (!isPlaying) return;
    const [first, ...others] = films;
    if (first.ended) {
      if (!document.getElementById("loop").checked) {
        pause();
        seek(numFrames - 1);
        return;
      }
      for (const film of films) {
        film.currentTime = 0;
        film.play().catch(pause);
      }
    } else {
      for (const film of others) {
        const isBehind = Math.abs(film.currentTime - first.currentTime) > 0.75 / fps;
        if (isBehind && !film.seeking && !film.ended) film.currentTime = first.currentTime;
      }
    }
    show(frameOf(first));
    requestAnimationFrame(step);
  };
  const play = () => {
    if (isPlaying) return;
    const frame = Number(slider.value);
    isPlaying = true;
    const start = frame >= numFrames - 1 ? 0 : timeOf(frame);
    for (const film of films) {
      film.currentTime = start;
      film.playbackRate = Number(document.getElementById("speed").value);
    }
    Promise.all(films.map((film) => film.play())).then(() => requestAnimationFrame(step), pause);
    label();
  };
  const toggle = () => (isPlaying ? pause() : play());

  for (const film of films) {
    film.removeAttribute("controls");
    film.addEventListener("click", toggle);
  }
  button.addEventListener("click", toggle);
  slider.addEventListener("input", () => {
    const frame = Number(slider.value);
    pause();
    seek(frame);
  });
  slider.addEventListener("keydown", (event) => {
    if (event.key === " ") {
      event.preventDefault();
      toggle();
    }
  });
  element.querySelector(".controls").hidden = false;
  show(0);
  return { films, play, pause, isPlaying: () => isPlaying };
});

if (clips.length) {
  const all = document.getElementById("play-all");
  const speed = document.getElementById("speed");
  document.querySelector(".player").hidden = false;
  const label = () => {
    all.textContent = clips.some((clip) => clip.isPlaying()) ? "Pause all" : "Play all";
  };
  all.addEventListener("click", () => {
    const any = clips.some((clip) => clip.isPlaying());
    for (const clip of clips) (any ? clip.pause : clip.play)();
    label();
  });
  document.querySelector(".clips").addEventListener("click", label);
  speed.addEventListener("change", () => {
    for (const clip of clips) for (const film of clip.films) film.playbackRate = Number(speed.value);
  });
}

// Tables: a heading sorts by its column, again the other way round.
for (const table of document.querySelectorAll("table[data-sort]")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const value = (row, column) => row.cells[column].dataset.value;
  const compare = (first, second, isNumber) => {
    if (first === undefined || second === undefined) return null;
    return isNumber ? Number(first) - Number(second) : first.localeCompare(second, "en", { numeric: true });
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent.trim() || "name";
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const isNumber = head.classList.contains("number");
      const usual = isNumber ? "descending" : "ascending";
      const other = isNumber ? "ascending" : "descending";
      const order = head.getAttribute("aria-sort") === usual ? other : usual;
      for (const each of heads) each.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const rows = [...body.rows].sort((a, b) => {
        const [first, second] = [value(a, column), value(b, column)];
        const result = compare(first, second, isNumber);
        if (result !== null) return sign * result;
        return (first === undefined) - (second === undefined); // what is missing comes last
      });
      body.append(...rows);
    });
  });
}

// Paper shows what is folded away on the screen.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const each of folded) each.open = true;
});
addEventListener("afterprint", () => {
  for (const each of folded) each.open = false;
});
