"use strict";
// Plays the chunks that the server publishes, shows what memory holds, and sends what is clicked.

const $ = id => document.getElementById(id);
const pen = $("video").getContext("2d");
const waiting = [];   // chunks that are not on screen yet, two at most
let shown = null;     // the chunk on screen ...
let drawn = -1;       // ... and its frame
let last = null;      // when the last chunk that came was published
let lag = Infinity;   // ms from the server's clock to ours, by the fastest message so far

function make(tag, parent, text = "") {
  const element = parent.appendChild(document.createElement(tag));
  element.textContent = text;  // never as HTML
  return element;
}

// ---- the video: every tab shows the same frame, because all follow the server's clock

const events = new EventSource("events");
events.onerror = () => { $("notice").textContent = "The server does not answer. Is live.py still running?"; };
events.onopen = () => { $("notice").textContent = ""; };
events.onmessage = async event => {
  const chunk = JSON.parse(event.data);
  showSettings(chunk);
  if (!chunk.strip || chunk.at === last) return;
  last = chunk.at;
  lag = Math.min(lag, Date.now() - 1000 * chunk.at);
  chunk.picture = new Image();
  chunk.picture.src = chunk.strip;
  await chunk.picture.decode();
  waiting.push(chunk);
  if (waiting.length > 2) waiting.shift();
};

// how long a chunk has been on screen, in ms; it waits 80, for those that come late
const elapsed = chunk => Date.now() - 1000 * chunk.at - lag - 80;

function play() {
  requestAnimationFrame(play);
  while (waiting.length && elapsed(waiting[0]) >= 0) {
    shown = waiting.shift();
    drawn = -1;
    showMemory(shown.held);
    showBars(shown);
    if (shown.score) showScore(shown);
    $("speed").textContent = Math.round(shown.speed);
  }
  if (!shown) return;
  const frame = Math.min(shown.frames - 1, Math.floor(elapsed(shown) * shown.rate / 1000));
  if (frame === drawn) return;
  drawn = frame;
  const [width, height] = shown.size;
  if (pen.canvas.width !== width) [pen.canvas.width, pen.canvas.height] = shown.size;
  pen.drawImage(shown.picture, 0, frame * height, width, height, 0, 0, width, height);
  $("made").textContent = ((shown.first + frame + 1) / shown.rate).toFixed(2);
}
play();

// ---- what memory holds: an element a latent, which moves where its latent moves

const latents = new Map();

function showMemory(held) {
  const before = new Map([...latents].map(([number, element]) => [element, element.getBoundingClientRect()]));
  const numbers = new Set(held.map(([number]) => number));
  for (const number of latents.keys()) if (!numbers.has(number)) drop(number);
  const now = held.at(-1)[2];
  for (const [number, segment, second, picture] of held) {
    const element = latents.get(number) ?? add(number, picture);
    element.lastChild.textContent = `${(now - second).toFixed(1)} s`;
    $(segment).lastChild.append(element);
  }
  for (const [element, from] of before) if (element.isConnected) move(element, from);
  $("count").textContent = held.length;
}

function animate(element, frames, duration) {
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  return element.animate(frames, {duration: calm ? 0 : duration, easing: "ease-in-out"});
}

function add(number, picture) {
  const element = make("li", $("memory"));
  const image = make("img", element);
  image.src = picture;
  image.alt = `latent ${number}`;
  make("span", element);
  latents.set(number, element);
  animate(element, {opacity: [0, 1]}, 400);
  return element;
}

function move(element, from) {
  const to = element.getBoundingClientRect();
  animate(element, {transform: [`translate(${from.x - to.x}px, ${from.y - to.y}px)`, "none"]}, 500);
}

function drop(number) {
  const element = latents.get(number);
  const {x, y, width} = element.getBoundingClientRect();
  latents.delete(number);
  element.className = "dropped";
  Object.assign(element.style, {left: `${x + scrollX}px`, top: `${y + scrollY}px`, width: `${width}px`});
  const fall = {transform: ["none", "translateY(60px) scale(.5)"], opacity: [1, 0]};
  animate(element, fall, 650).onfinish = () => element.remove();
}

// ---- surprisal, and the score

function showBars({bars, threshold}) {
  const most = Math.max(1.5 * threshold, ...bars.map(([surprisal]) => surprisal), 1e-6);
  $("bars").replaceChildren();
  for (const [surprisal, tested, kept] of bars) {
    const bar = make("i", $("bars"));
    bar.style.height = `${100 * surprisal / most}%`;
    bar.className = kept ? "kept" : tested ? "tested" : "";
  }
  if (threshold !== null) make("hr", $("bars")).style.bottom = `${100 * threshold / most}%`;
  const [surprisal, , kept] = bars.at(-1);
  $("bars").ariaLabel = `surprisal of the last chunk: ${surprisal.toFixed(3)}, ${kept ? "kept" : "not kept"}`;
}

function showScore(chunk) {
  $("judged").hidden = false;
  $("score").textContent = Object.entries(chunk.score).map(([name, count]) => `${count} ${name}`).join(", ");
  showHouses($("first"), chunk["at first"], chunk.heading);
  showHouses($("now"), chunk.now, chunk.heading);
  $("another").replaceChildren();
  chunk.now.forEach((house, sector) => {
    const isAnother = house && String(house) !== String(chunk["at first"][sector]);
    make("span", $("another"), isAnother ? "≠" : "");
  });
}

// a house a sector, null where none was read; roof and wall are names of colours
function showHouses(map, houses, heading) {
  map.replaceChildren();
  for (const house of houses) {
    const sector = make("span", map);
    if (!house) continue;
    make("u", sector).style.background = house[0];
    make("s", sector).style.background = house[1];
  }
  map.ariaLabel = houses.map(house => house ? house.join(" over ") : "not seen yet").join(", ");
  make("i", map).style.left = `${100 * heading}%`;
}

// ---- steering

async function steer(order) {
  const answer = await fetch("steer", {method: "POST", body: JSON.stringify(order)});
  $("notice").textContent = answer.ok ? "" : await answer.text();
}

function showSettings(chunk) {
  for (const [name, choices] of Object.entries(chunk.choices)) offer(name, choices);
  for (const button of document.querySelectorAll("[role=group] button")) {
    button.ariaPressed = String(chunk[button.parentNode.id]) === button.textContent;
  }
  const {prompt, seed, positions} = chunk;
  const fields = {prompt, seed, positions, "memory-preset": chunk.memory, tau: chunk.tau?.toFixed(3)};
  for (const [id, value] of Object.entries(fields)) if ($(id) !== document.activeElement) $(id).value = value;
  $("paused").ariaPressed = Boolean(chunk.paused);
  $("save").download = `live-${seed}.mp4`;
  pen.canvas.ariaLabel = `The video: ${prompt}`;
}

function offer(name, choices) {
  const home = $(name === "memory" ? "memory-preset" : name);
  if (home.children.length > 1) return;
  home.hidden = false;
  for (const choice of choices) {
    const element = make(home.tagName === "SELECT" ? "option" : "button", home, choice);
    if (element.tagName === "BUTTON") element.onclick = () => steer({[name]: choice});
  }
}

$("memory-preset").onchange = event => steer({memory: event.target.value});
$("positions").onchange = event => steer({positions: event.target.value});
$("tau").onchange = event => steer({tau: event.target.valueAsNumber});
$("paused").onclick = () => steer({paused: $("paused").ariaPressed === "false"});
$("restart").onclick = () => steer({seed: $("seed").valueAsNumber, paused: false});
document.forms[0].onsubmit = event => {
  event.preventDefault();
  steer({prompt: $("prompt").value});
};
