// The three boxes of live.js: a shape under noise, two garments in one picture, ten digits.
"use strict";
(() => {
const {Loop, json, boxes} = window.feedbackLive;

const random = seed => () => {  // uniform numbers, the same in every browser (xorshift)
  seed ^= seed << 13, seed ^= seed >>> 17, seed ^= seed << 5;
  return ((seed >>> 0) + 0.5) / 2 ** 32;
};

function paint(canvas, values) {
  const side = canvas.width, picture = new ImageData(side, side);
  values.forEach((v, i) => picture.data.set([255 * v, 255 * v, 255 * v, 255], 4 * i));
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

function softmax(values) {
  const top = Math.max(...values), e = Array.from(values, v => Math.exp(v - top));
  return e.map(v => v / e.reduce((a, b) => a + b));
}

const pause = ms => new Promise(done => setTimeout(done, ms));
const best = row => row.indexOf(Math.max(...row));
const distance = (a, b) => Math.hypot(...Array.from(a, (v, i) => v - b[i]));
const tidy = v => v === 0 || v >= 0.01 && v < 1000 ? v.toPrecision(3) : v.toExponential(1);
const slider = (name, label, min, max, value) => `<label>${label} <input type="range" name="${name}"
  min="${min}" max="${max}" step="0.05" value="${value}"> <output>${value}</output></label>`;
const select = (name, label, words) => `<label>${label} <select name="${name}">${
  words.map((word, i) => `<option value="${i}">${word}</option>`).join("")}</select></label>`;
const canvas = (name, label, side, more = "") => `<figure><canvas data-name="${name}" role="img"
  width="${side}" height="${side}" aria-label="${label}" ${more}></canvas>
  <figcaption>${label}</figcaption></figure>`;
const buttons = (...names) =>
  `<p>${names.map(name => `<button type="button">${name}</button>`).join("")}</p>`;
const finder = box => name => box.querySelector(`[name="${name}"], [data-name="${name}"]`);

// ---------------------------------------------------------------- a shape under noise
boxes.unet = async (box, say) => {
  const loop = box.loop = await Loop.load("unet"), side = 40, n = side * side, at = [20, 20];
  box.inner.innerHTML = `<div class="row">${canvas("in", "your picture: draw here (arrow keys too)",
    side, 'tabindex="0"')}${canvas("out", "what the network takes for the shape", side)}</div>
    ${slider("noise", "noise σ", 0, 2, 0.8)}
    ${buttons("Step", "Run ten steps", "New shape", "Clear")}`;
  const pick = finder(box), input = pick("in"), clean = new Float32Array(n);
  const uniform = random(12345), shapes = random(54321);
  const gauss = () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform());
  const noise = clean.map(gauss);

  const show = () => {
    const y = loop.state.y, p = clean.map((_, i) => 1 / (1 + Math.exp(y[i] - y[n + i])));
    paint(pick("out"), p);
    const share = Math.round(100 * p.filter(v => v > 0.5).length / n);
    say(loop.t ? `t = ${loop.t}, residual ${tidy(loop.state.residual[0])}; it takes ${share} % of
      the pixels for the shape` : "t = 0: nothing has been looked at yet. Press Step.");
  };
  const begin = async () => {
    const x = clean.map((v, i) => v + pick("noise").value * noise[i]);
    const low = Math.min(...x), range = Math.max(...x) - low || 1;
    await loop.begin({x: x.map(v => (v - low) / range)});
    paint(input, loop.given.x);
    show();
  };
  const step = async () => { await loop.next(); show(); };
  const run = async () => { for (let i = 0; i < 10; i++) await step(), await pause(100); };
  const shape = () => {  // an irregular polygon: corners around a middle, inside by the edges
    const k = 3 + Math.floor(4 * shapes()), middle = [13 + 14 * shapes(), 13 + 14 * shapes()];
    const corners = Array.from({length: k}, (_, j) => {
      const angle = 2 * Math.PI * (j + 0.6 * shapes()) / k, reach = 7 + 6 * shapes();
      return [middle[0] + reach * Math.cos(angle), middle[1] + reach * Math.sin(angle)];
    });
    clean.forEach((_, i) => {
      const px = i % side + 0.5, py = Math.floor(i / side) + 0.5;
      clean[i] = corners.filter(([ax, ay], j) => {
        const [bx, by] = corners[(j + 1) % k];
        return ay > py !== by > py && px < ax + (py - ay) * (bx - ax) / (by - ay);
      }).length % 2;
    });
  };
  const dot = (cx, cy) => {
    const far = i => Math.hypot(i % side - cx, Math.floor(i / side) - cy);
    clean.forEach((v, i) => { clean[i] = far(i) < 3 ? 1 : v; });
    box.act(begin, true);
  };
  const drawn = event => {
    const edge = input.getBoundingClientRect(), scale = side / edge.width;
    dot((event.clientX - edge.left) * scale, (event.clientY - edge.top) * scale);
  };
  input.onpointerdown = e => { input.setPointerCapture(e.pointerId); drawn(e); };
  input.onpointermove = event => event.buttons && drawn(event);
  input.onkeydown = event => {
    const way = ["ArrowLeft", "ArrowUp", "ArrowRight", "ArrowDown"].indexOf(event.key);
    if (way < 0) return;
    event.preventDefault();
    at[way % 2] = Math.max(0, Math.min(side - 1, at[way % 2] + (way < 2 ? -2 : 2)));
    dot(...at);
  };
  box.on = {noise: begin, Step: step, "Run ten steps": run,
    "New shape": () => { shape(); return begin(); },
    Clear: () => { clean.fill(0); return begin(); }};
  shape();
  await begin();
};

// ---------------------------------------------------------------- two garments in one picture
boxes.lrm = async (box, say) => {
  const loop = box.loop = await Loop.load("lrm");
  const {words, pictures, vectors} = await json("lrm/box.json");
  box.inner.innerHTML = `<div class="row">${canvas("in", "both, half and half", 28)}
    <table><caption>probability in percent, pass by pass</caption><thead><tr>
    <th scope="col">pass</th>${[0, 1, 2, 3].map(t => `<th scope="col">${t}</th>`).join("")}</tr>
    </thead><tbody></tbody></table></div>
    ${select("a", "first", words)}${select("b", "second", words)}
    ${select("look", "look for", ["nothing", ...words])}${slider("gain", "gain", 1, 4, 2)}`;
  const pick = finder(box), value = name => Number(pick(name).value);
  Object.entries({a: 1, b: 8, look: 9}).forEach(([name, i]) => { pick(name).value = i; });

  const begin = async () => {
    const [a, b, look] = ["a", "b", "look"].map(value), rows = [];
    const x = pictures[a].map((v, i) => (v + pictures[b][i]) / 510);
    const vector = vectors[Math.max(0, look - 1)], gain = look ? value("gain") : 1;
    paint(pick("in"), x);
    await loop.begin({x, vector, gain, blend: look ? 1 : 0});
    for (rows.push(softmax(loop.state.y)); rows.length < 4; rows.push(softmax(loop.state.y)))
      await loop.next();
    const cell = p => `<td style="--p:${p.toFixed(3)}">${Math.round(100 * p)}</td>`;
    box.querySelector("tbody").innerHTML = words.map((word, c) => `<tr${c === a || c === b
      ? ' class="shown"' : ""}><th scope="row">${word}</th>${
      rows.map(row => cell(row[c])).join("")}</tr>`).join("");
    say(`Plain, it says ${words[best(rows[0])]}; after three passes ${words[best(rows[3])]}.`);
  };
  box.on = {a: begin, b: begin, look: begin, gain: begin};
  await begin();
};

// ---------------------------------------------------------------- ten digits, two flows
boxes.cbl = async (box, say) => {
  const flows = ["through", "literal"], twins = box.twins = {}, changes = {};
  for (const flow of flows) twins[flow] = await Loop.load(`cbl-${flow}`);
  const {pictures, steepness} = await json("cbl-through/box.json");
  const x = pictures.flat().map(v => v / 255), blue = "#2b7bba", orange = "#d9730d";
  box.inner.innerHTML = `<table class="digits"><caption>what each flow says</caption>
    <tbody><tr><th scope="row">digit</th>${pictures.map((_, i) => `<td><canvas width="8" height="8"
    data-name="d${i}" role="img" aria-label="${i}"></canvas></td>`).join("")}</tr>
    ${flows.map(flow => `<tr data-name="${flow}"></tr>`).join("")}</tbody></table>
    <figure><canvas data-name="chart" width="600" height="240" role="img" aria-label="change of
    the states per step"></canvas><figcaption>Change of the states per step, 10⁻⁸ to 10⁸:
    <b style="color:${blue}">through</b>, <b style="color:${orange}">literal</b>, and dashed what
    the certificate promises of the literal flow.</figcaption></figure>
    ${slider("gain", "gain", 0.25, 6, 1)}${buttons("Step", "Run ten steps", "Start over")}`;
  const pick = finder(box);
  pictures.forEach((picture, i) => paint(pick(`d${i}`), picture.map(v => v / 255)));

  const draw = q => {
    const area = pick("chart").getContext("2d");
    const line = (values, color, dash) => {
      area.beginPath(), area.setLineDash(dash);
      Object.assign(area, {strokeStyle: color, lineWidth: 2});
      values.forEach((v, t) => area.lineTo(12 * t,
        120 - 14 * Math.max(-8, Math.min(8, Math.log10(v)))));
      area.stroke();
    };
    area.clearRect(0, 0, 600, 240);
    line(Array(51).fill(1), "#888", [2, 6]);
    line(changes.literal.map((_, t) => changes.literal[0] * q ** t), orange, [6, 6]);
    line(changes.through, blue, []);
    line(changes.literal, orange, []);
  };
  const show = () => {
    const q = steepness * pick("gain").value, apart = {};
    for (const flow of flows) {
      const {state} = twins[flow];
      const rows = (v, n) => pictures.map((_, i) => v.slice(i * n, i * n + n));
      const h = rows(state["h.stage2"], 32), answers = rows(state.y, 10).map(best);
      apart[flow] = tidy(Math.max(...h.map(row => distance(row, h[0]))));
      pick(flow).innerHTML = `<th scope="row">${flow}</th>${answers.map((answer, i) =>
        `<td${answer === i ? "" : ' class="wrong"'}>${answer}</td>`).join("")}`;
    }
    draw(q);
    const last = flows.map(flow => `${flow} ${tidy(twins[flow].state.residual?.[0] ?? 1)}`);
    say(`t = ${twins.through.t}. Certificate ${tidy(q)}: ${q < 1 ? "the literal flow must settle"
      : "no promise"}. Residual of the 0: ${last.join(", ")}. Largest distance between two digits'
      states: through ${apart.through}, literal ${apart.literal}.`);
  };
  const begin = async () => {
    const gain = Number(pick("gain").value);
    for (const flow of flows) await twins[flow].begin({x, gain}), changes[flow] = [];
    show();
  };
  const step = async () => {
    for (const flow of flows) {
      const old = twins[flow].state["h.stage2"];
      await twins[flow].next();
      changes[flow].push(distance(old, twins[flow].state["h.stage2"]));
    }
    show();
  };
  const run = async () => { for (let i = 0; i < 10; i++) await step(), await pause(60); };
  box.on = {gain: begin, Step: step, "Run ten steps": run, "Start over": begin};
  await begin();
};
})();
