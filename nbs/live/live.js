// Networks that run in the page: <div class="live" data-loop="unet | lrm | cbl"> becomes a box that
// loads onnxruntime and a network when its button is pressed, from this folder and nowhere else.
"use strict";
(() => {
const here = document.currentScript.src.replace(/[^/]*$/, "");
const handed = {};  // a page that was opened as a file cannot fetch: scripts hand the files over

function script(name) {
  return new Promise((done, fail) => {
    const tag = Object.assign(document.createElement("script"), {src: here + name});
    Object.assign(tag, {onload: done, onerror: () => fail(Error(`${name} is missing`))});
    document.head.append(tag);
  });
}

async function bytes(name) {
  if (location.protocol === "file:") {
    await script(`${name}.js`);
    return Uint8Array.from(atob(handed[name]), c => c.charCodeAt(0));
  }
  const answer = await fetch(here + name);
  if (!answer.ok) throw Error(`${name}: ${answer.status}`);
  return new Uint8Array(await answer.arrayBuffer());
}

const json = async name => JSON.parse(new TextDecoder().decode(await bytes(name)));

async function unzipped(data) {
  if (data[0] !== 0x1f || data[1] !== 0x8b) return data;  // some servers have unpacked it
  const stream = new Blob([data]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

let runtime;  // one for all boxes of a page

async function load() {
  const names = ["ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm.gz"];
  const [code, wasm] = await Promise.all(names.map(bytes));
  const url = URL.createObjectURL(new Blob([code], {type: "text/javascript"}));
  const ort = await import(url);
  Object.assign(ort.env.wasm, {numThreads: 1, wasmBinary: await unzipped(wasm)});
  return ort;
}

class Loop {  // start and step, as `OnnxLoop` in feedback_nb.live
  static async load(name) {
    const ort = await (runtime ??= load());
    const loop = Object.assign(new Loop(), {ort, about: await json(`${name}/loop.json`)});
    for (const part of ["start", "step"])
      loop[part] = await ort.InferenceSession.create(await bytes(`${name}/${part}.onnx`));
    return loop;
  }

  async run(part, given) {
    const feed = {};
    for (const [name, size] of Object.entries(this.about[part].inputs)) {
      const data = typeof given[name] === "number" ? [given[name]] : given[name];
      feed[name] = new this.ort.Tensor("float32", Float32Array.from(data), size);
    }
    const made = await this[part].run(feed);
    return Object.fromEntries(Object.entries(made).map(([name, tensor]) => [name, tensor.data]));
  }

  async begin(given) {
    Object.assign(this, {given, state: await this.run("start", given), t: 0});
  }

  async next() {
    const made = await this.run("step", {...this.given, ...this.state, clock: this.t});
    for (const name in made) this.state[name.replace(/^next\./, "")] = made[name];
    this.t += 1;
  }
}

function make(box) {
  const start = Object.assign(document.createElement("button"), {type: "button"});
  const say = Object.assign(document.createElement("p"), {className: "say"});
  say.setAttribute("aria-live", "polite");
  start.textContent = "Run the network here (loads 4 MB)";
  box.inner = document.createElement("div");
  box.querySelector("p")?.remove();  // what is said where no script runs
  box.append(start, box.inner, say);
  if (typeof WebAssembly !== "object" || typeof DecompressionStream !== "function") {
    start.disabled = true;
    say.textContent = "This browser cannot run it; the recorded picture shows the same.";
    return;
  }
  let busy = Promise.resolve(), newest = 0;
  const stopped = error => { say.textContent = `It stopped: ${error.message}`; };
  box.act = (job, skip) => {  // one after the other; of many strokes the last
    const mine = ++newest;
    busy = busy.then(() => (skip && mine !== newest ? null : job())).catch(stopped);
  };
  start.onclick = () => box.act(async () => {
    start.disabled = true;
    say.textContent = "Loading …";
    try {
      if (!window.feedbackLive.boxes[box.dataset.loop]) await script("boxes.js");
      await window.feedbackLive.boxes[box.dataset.loop](box, text => { say.textContent = text; });
      start.remove();
      box.inner.querySelector("canvas[tabindex], select, input").focus({preventScroll: true});
      box.dataset.ready = "yes";
    } finally { start.disabled = false; }
  });
  box.inner.addEventListener("input", ({target}) => {
    const shown = target.parentNode.querySelector("output");
    if (shown) shown.value = target.value;
    box.act(box.on[target.name], true);
  });
  box.inner.addEventListener("click", ({target}) => {
    if (target.tagName === "BUTTON") box.act(box.on[target.textContent]);
  });
}

window.feedbackLive = {Loop, json, boxes: {}, hand: (name, text) => { handed[name] = text; }};
const sheet = document.createElement("link");
document.head.append(Object.assign(sheet, {rel: "stylesheet", href: `${here}live.css`}));
const ready = () => document.querySelectorAll("div.live[data-loop]").forEach(make);
if (document.readyState === "loading") addEventListener("DOMContentLoaded", ready);
else ready();
})();
