"use strict";

// A run is one clip that was asked for: {key, name, file, settings, given, frames, latents, state,
// ahead, problem, record, video, thumb}. One of them is shown; all are listed under History.

const byId = (id) => document.getElementById(id);
const SETTINGS = ["prompt", "negative_prompt", "guidance_scale", "temperature", "top_p", "seed", "num_input_frames"];
const ENDED = ["done", "failed", "cancelled"];
const STORE = "cosmos-serve-history";
const MAX_STORED = 40;
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const runs = [];
let shown = null;
let info = null;
let chosen = null; // the file to be sent
let token = sessionStorage.getItem("cosmos-serve-token") || "";

// Asking the service.

async function ask(address, options = {}) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const answer = await fetch(address, { ...options, headers });
  if (answer.status === 401) {
    openDoor();
    throw new Error(token ? "That token is not the right one." : "The service wants a token.");
  }
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => ({}));
  throw new Error(said.problem || `The service answers ${answer.status}.`);
}

function openDoor() {
  if (!byId("door").open) byId("door").showModal();
}

byId("key").addEventListener("submit", async (event) => {
  event.preventDefault();
  token = byId("token").value.trim();
  try {
    await start();
    sessionStorage.setItem("cosmos-serve-token", token);
    byId("door").close();
  } catch (error) {
    byId("door-problem").textContent = error.message;
  }
});

async function start() {
  info = await (await ask("/api/info")).json();
  byId("facts").textContent =
    `${info.model} · clips of ${info.num_frames} frames, ${info.width}×${info.height} · ${info.latents} latent frames`;
  byId("limits").textContent = `At most ${info.max_upload_mb} MB; of a clip, the first frames are used.`;
  byId("text").hidden = !info.is_video2world;
  document.documentElement.style.setProperty("--aspect", info.width / info.height);
  const choices = info.frames_given.map((count) => new Option(String(count), count));
  byId("num_input_frames").replaceChildren(new Option("as usual", ""), ...choices);
}

// The form.

function take(file) {
  chosen = file || null;
  byId("problem").textContent = "";
  if (!chosen) return;
  preview(chosen);
}

function preview(file) {
  select(null);
  const isStill = file.type.startsWith("image/");
  byId("input-caption").textContent = `Input: ${file.name}`;
  if (isStill) showImage(byId("input"), URL.createObjectURL(file), `The input image ${file.name}`);
  else byId("input").hidden = true;
  byId("status").textContent = `${file.name} is ready: generate what comes next.`;
}

byId("file").addEventListener("change", (event) => take(event.target.files[0]));
for (const name of ["dragenter", "dragover"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    byId("drop").classList.add("over");
  });
}
for (const name of ["dragleave", "drop"]) {
  document.addEventListener(name, () => byId("drop").classList.remove("over"));
}
document.addEventListener("drop", (event) => {
  event.preventDefault();
  if (event.dataTransfer.files.length) {
    byId("file").files = event.dataTransfer.files;
    take(event.dataTransfer.files[0]);
  }
});
byId("dice").addEventListener("click", () => {
  byId("seed").value = Math.floor(Math.random() * 1e6);
});

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const say = (text) => { byId("problem").textContent = text; };
  say("");
  if (!info) return say("The service does not answer yet.");
  if (!chosen) return say("Choose an image or a clip first.");
  if (chosen.size > info.max_upload_mb * 1e6) {
    const size = (chosen.size / 1e6).toFixed(0);
    return say(`${chosen.name} has ${size} MB, and at most ${info.max_upload_mb} MB are let in; send a smaller file.`);
  }
  const settings = {};
  for (const name of SETTINGS) {
    const field = byId(name);
    if (field.closest("[hidden]") || !field.value.trim()) continue;
    settings[name] = field.value.trim();
  }
  generate(chosen, settings);
});

// One clip, from the upload to its last line.

async function generate(file, settings) {
  const run = { key: `${Date.now()}-${Math.random()}`, name: "", file: file.name, settings, given: [],
    frames: [], latents: 0, state: "sending", problem: "", record: null, video: "", thumb: "" };
  runs.unshift(run);
  select(run);
  const form = new FormData();
  for (const [name, value] of Object.entries(settings)) form.append(name, value);
  form.append("file", file, file.name);
  try {
    const answer = await ask("/api/clips", { method: "POST", body: form });
    await read(answer.body, (event) => hear(run, event));
    if (!ENDED.includes(run.state)) throw new Error("the connection ended.");
  } catch (error) {
    if (run.name && !ENDED.includes(run.state)) await wait(run);
    else fail(run, error.message);
  }
}

async function read(body, hear) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line) hear(JSON.parse(line));
  }
}

function hear(run, { event, ...values }) {
  if (event === "accepted") {
    run.name = values.name;
    run.numGiven = values.num_given;
    run.state = "waiting";
  } else if (event === "waiting") run.ahead = values.ahead;
  else if (event === "given") {
    run.state = "running";
    run.given = values.frames.map((frame) => `data:image/jpeg;base64,${frame}`);
  } else if (event === "frames") {
    run.latents = values.latents;
    values.frames.forEach((frame, i) => { run.frames[values.first + i] = `data:image/jpeg;base64,${frame}`; });
  } else if (ENDED.includes(event)) finish(run, { state: event, ...values });
  changed(run);
}

function finish(run, values) {
  Object.assign(run, { state: values.state, problem: values.problem || "", record: values.record || null,
    repeated: values.num_repeated || 0 });
  if (run.state === "done") {
    run.latents = info.latents;
    loadVideo(run, values.video);
  }
  changed(run);
}

function fail(run, problem) {
  Object.assign(run, { state: "failed", problem });
  changed(run);
}

// After a lost connection: what became of it?
async function wait(run) {
  try {
    for (;;) {
      const said = await (await ask(`/api/clips/${run.name}`)).json();
      if (ENDED.includes(said.state)) return finish(run, said);
      run.state = said.state;
      changed(run);
      await new Promise((done) => setTimeout(done, 1000));
    }
  } catch (error) {
    fail(run, error.message);
  }
}

async function loadVideo(run, address) {
  try {
    run.video = URL.createObjectURL(await (await ask(address)).blob());
    if (!run.thumb) run.thumb = await thumbnail(run);
    changed(run);
  } catch (error) {
    fail(run, error.message);
  }
}

async function thumbnail(run) {
  const last = run.frames[run.frames.length - 1];
  if (!last) return "";
  const image = new Image();
  image.src = last;
  await image.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [176, Math.round(176 * image.height / image.width)];
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.8);
}

byId("cancel").addEventListener("click", () => {
  if (shown && shown.name) ask(`/api/clips/${shown.name}`, { method: "DELETE" }).catch((error) => fail(shown, error.message));
});

// What is shown.

function select(run) {
  shown = run;
  byId("video").pause();
  byId("video").removeAttribute("src");
  render();
  renderHistory();
}

function changed(run) {
  if (run === shown) render();
  renderHistory();
  if (ENDED.includes(run.state)) store();
}

function sentence(run) {
  if (run.state === "sending") return `Sending ${run.file}…`;
  if (run.state === "waiting") return run.ahead ? `Waiting: ${run.ahead} ahead.` : "Waiting: next in line.";
  if (run.state === "running") {
    return run.latents ? `Latent frame ${run.latents} of ${info.latents} is there.` : "Reading what is given…";
  }
  if (run.state === "done" && !run.record) return "Fetching the clip…";
  if (run.state === "done") {
    const seconds = run.record.seconds.generate.toFixed(1);
    const count = run.record.num_generated_tokens.toLocaleString("en");
    const repeated = run.repeated ? ` The clip was short: its last frame was repeated ${run.repeated} times.` : "";
    return `Done: ${count} tokens in ${seconds} s.${repeated}`;
  }
  return run.state === "cancelled" ? `Cancelled: ${run.problem}` : `Not done: ${run.problem}`;
}

function showImage(image, source, text) {
  if (image.src !== source) image.src = source;
  image.alt = text;
  image.hidden = false;
}

function render() {
  const run = shown;
  byId("cancel").disabled = !run || !["waiting", "running"].includes(run.state);
  byId("progress").hidden = !run || ["failed", "cancelled"].includes(run.state);
  byId("repeat").hidden = !run || !run.record;
  byId("output").hidden = byId("video").hidden = true;
  byId("status").classList.toggle("bad", Boolean(run && run.state === "failed"));
  renderStrip(run);
  if (!run) {
    byId("output-caption").textContent = "Generated";
    return;
  }
  setText("status", sentence(run));
  byId("progress").value = run.latents / info.latents;
  setText("input-caption", `Input: ${run.file}${run.given.length ? `, ${run.given.length} given` : ""}`);
  byId("input").hidden = !run.given.length;
  setText("output-caption", run.state === "done" ? "Generated, as mp4" : "Generated so far");
  if (run.video) {
    const video = byId("video");
    video.hidden = false;
    if (video.src !== run.video) {
      video.src = run.video;
      if (!calm.matches) video.play().catch(() => {});
    }
  }
  if (run.record) renderRepeat(run);
  draw();
}

function setText(id, text) {
  if (byId(id).textContent !== text) byId(id).textContent = text;
}

function renderRepeat(run) {
  setText("command", run.record.command);
  const { temperature, top_p, seed } = run.record.settings;
  setText("made", `Temperature ${temperature}, top-p ${top_p}, seed ${seed}; tokens ${run.record.tokens_sha256.slice(0, 12)}.`);
  byId("save").href = run.video;
  byId("save").download = `${run.file.replace(/\.[^.]*$/, "")}_seed${seed}.mp4`;
}

// One cell a latent frame; its picture is the last of the frames that it stands for.
function renderStrip(run) {
  const strip = byId("strip");
  const count = run && info && run.state !== "failed" ? info.latents : 0;
  while (strip.children.length > count) strip.lastChild.remove();
  while (strip.children.length < count) {
    const item = document.createElement("li");
    item.innerHTML = '<div class="cell"></div><span></span>';
    strip.append(item);
  }
  if (!count) return;
  const each = (info.num_frames - 1) / (info.latents - 1);
  [...strip.children].forEach((item, i) => {
    const isGiven = run.numGiven !== undefined && i * each < run.numGiven;
    const source = run.frames[Math.round(i * each)];
    const words = source ? (isGiven ? "given" : "generated") : isGiven ? "given" : "to come";
    item.className = isGiven ? "given" : !source && i === run.latents ? "next" : "";
    const cell = item.firstChild;
    if (source && !cell.firstChild) cell.append(new Image());
    if (!source) cell.replaceChildren();
    else showImage(cell.firstChild, source, `Latent frame ${i + 1}, ${words}`);
    const label = `${i + 1} ${words}`;
    if (item.lastChild.textContent !== label) item.lastChild.textContent = label;
  });
}

// Frames that are known play in a loop, the given ones beside them; then the mp4 leads.
let clock = 0;
function draw() {
  const run = shown;
  if (!run || !run.given.length) return;
  const video = byId("video");
  const fps = run.record ? run.record.fps : 12;
  const known = run.frames.length;
  let frame = calm.matches ? known - 1 : clock % Math.max(known, 1);
  if (run.video) frame = Math.floor(video.currentTime * fps);
  const given = Math.max(0, Math.min(frame, run.given.length - 1));
  showImage(byId("input"), run.given[given], `Given frame ${given + 1} of ${run.given.length}`);
  if (!run.video && known) {
    showImage(byId("output"), run.frames[frame] || run.frames[known - 1], `Frame ${frame + 1} of ${known} so far`);
  }
}
setInterval(() => { clock += 1; draw(); }, 1000 / 12);

byId("copy").addEventListener("click", async () => {
  const text = byId("command").textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    getSelection().selectAllChildren(byId("command"));
    document.execCommand("copy");
  }
  byId("copy").textContent = "Copied";
  setTimeout(() => { byId("copy").textContent = "Copy"; }, 2000);
});

// History: kept by the browser, the clips by the service.

function words(run) {
  const { temperature = "1", top_p = "0.8", seed = "0", num_input_frames } = run.settings;
  const given = num_input_frames ? `, ${num_input_frames} given` : "";
  const prompt = run.settings.prompt ? `“${run.settings.prompt}” ` : "";
  return `${prompt}temperature ${temperature}, top-p ${top_p}, seed ${seed}${given}`;
}

function renderHistory() {
  byId("empty").hidden = runs.length > 0;
  const list = byId("history");
  const items = new Map([...list.children].map((item) => [item.dataset.key, item]));
  runs.forEach((run, i) => {
    let item = items.get(run.key);
    if (!item) {
      item = document.createElement("li");
      item.dataset.key = run.key;
      item.innerHTML = '<button type="button"><span class="cell"></span><span><strong></strong><small></small><small></small></span></button>';
      item.firstChild.addEventListener("click", () => recall(run));
    }
    if (list.children[i] !== item) list.insertBefore(item, list.children[i] || null);
    const [cell, text] = item.firstChild.children;
    item.firstChild.setAttribute("aria-current", String(run === shown));
    if (run.thumb && !cell.firstChild) {
      cell.append(new Image());
      showImage(cell.firstChild, run.thumb, "");
    }
    text.children[0].textContent = run.file;
    text.children[1].textContent = words(run);
    text.children[2].textContent = run.state === "failed" ? run.problem : run.state;
    text.children[2].className = run.state === "failed" ? "bad" : "";
  });
}

function recall(run) {
  for (const name of SETTINGS) if (run.settings[name] !== undefined) byId(name).value = run.settings[name];
  select(run);
  if (run.name && !run.video && (run.state === "done" || !ENDED.includes(run.state)) && !run.given.length) wait(run);
}

function store() {
  const kept = runs.slice(0, MAX_STORED).map(({ key, name, file, settings, state, problem, thumb, numGiven }) =>
    ({ key, name, file, settings, state, problem, thumb, numGiven }));
  try { localStorage.setItem(STORE, JSON.stringify(kept)); } catch { /* a browser that keeps nothing */ }
}

function restore() {
  try {
    for (const kept of JSON.parse(localStorage.getItem(STORE) || "[]")) {
      runs.push({ given: [], frames: [], latents: 0, record: null, video: "", ...kept });
    }
  } catch { /* likewise */ }
  renderHistory();
}

// Light and dark.

const dark = matchMedia("(prefers-color-scheme: dark)");
function isDark() {
  const asked = document.documentElement.dataset.theme;
  return asked ? asked === "dark" : dark.matches;
}
function renderTheme() {
  byId("theme").setAttribute("aria-pressed", String(isDark()));
}
byId("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  try { localStorage.setItem("cosmos-serve-theme", document.documentElement.dataset.theme); } catch { /* likewise */ }
  renderTheme();
});
try {
  const asked = localStorage.getItem("cosmos-serve-theme");
  if (asked) document.documentElement.dataset.theme = asked;
} catch { /* likewise */ }
dark.addEventListener("change", renderTheme);
renderTheme();

restore();
start().catch((error) => { byId("facts").textContent = error.message; });
