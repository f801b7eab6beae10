"use strict";
// Plays the chunks that the server publishes, shows what memory holds, and asks for what is clicked.

const RATE = 16;      // frames a second
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

function picture(chunk, content) {
  const image = new Image();
  image.src = `data:image/${chunk.kind};base64,${content}`;
  return image;
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
  chunk.picture = picture(chunk, chunk.strip);
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
    showMemory(shown);
    showBars(shown);
    if (shown.score) showScore(shown.score);
    $("speed").textContent = Math.round(shown.frames / shown.cost);
  }
  if (!shown) return;
  const frame = Math.min(shown.frames - 1, Math.floor(elapsed(shown) * RATE / 1000));
  if (frame === drawn) return;
  drawn = frame;
  const {width, height} = shown.picture, tall = height / shown.frames;
  if (pen.canvas.width !== width) [pen.canvas.width, pen.canvas.height] = [width, tall];
  document.body.className = shown.kind;
  pen.drawImage(shown.picture, 0, frame * tall, width, tall, 0, 0, width, tall);
  $("made").textContent = ((shown.made - shown.frames + frame + 1) / RATE).toFixed(2);
}
play();

// ---- what memory holds: an element a latent, which moves where its latent moves

const latents = new Map();
let newest = -1;  // of them
const second = number => Math.max(0, 4 * number - 3) / RATE;  // in which its frames begin

function showMemory(chunk) {
  const segments = ["sink", "slow", "fast"].flatMap((name, i) => Array(chunk.sizes[i]).fill($(name)));
  const before = new Map([...latents].map(([number, element]) => [element, element.getBoundingClientRect()]));
  const numbers = new Set(chunk.held.map(([number]) => number));
  const isAnother = Math.max(...numbers) < newest;  // another video has begun
  for (const number of latents.keys()) if (isAnother || !numbers.has(number)) drop(number);
  newest = Math.max(...numbers);
  chunk.held.forEach(([number, content], i) => {
    const element = latents.get(number) ?? add(number, picture(chunk, content));
    element.lastChild.textContent = `${(second(newest) - second(number)).toFixed(1)} s`;
    segments[i].lastElementChild.append(element);
  });
  for (const [element, from] of before) if (element.isConnected) move(element, from);
  $("count").textContent = numbers.size;
}

function animate(element, frames, duration) {
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  return element.animate(frames, {duration: calm ? 0 : duration, easing: "ease-in-out"});
}

function add(number, image) {
  const element = make("li", $("memory"));
  image.alt = `latent ${number}`;
  element.append(image);
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

function showBars({bars, rules, settings}) {
  const threshold = rules[settings.memory] === "surprisal" ? 1 - settings.tau : 0;
  const most = Math.max(1.5 * threshold, ...bars.map(([surprisal]) => surprisal), 1e-6);
  $("bars").replaceChildren();
  for (const [surprisal, tested, kept] of bars) {
    const bar = make("i", $("bars"));
    bar.style.height = `${100 * surprisal / most}%`;
    bar.className = kept ? "kept" : tested ? "tested" : "";
  }
  if (threshold) make("hr", $("bars")).style.bottom = `${100 * threshold / most}%`;
  const [surprisal, , kept] = bars.at(-1);
  $("bars").ariaLabel = `surprisal of the last chunk: ${surprisal.toFixed(3)}, ${kept ? "kept" : "not kept"}`;
}

function showScore({count, first, now, heading}) {
  $("steer").hidden = $("judged").hidden = false;
  const {returns, right, "not kept": lost, "kept but not used": unused} = count;
  $("score").textContent = `${returns} returns: ${right} right, ${returns - right} wrong ` +
    `(${lost} not kept, ${unused} kept but not used)`;
  showLandmarks($("first"), first, heading);
  showLandmarks($("now"), now, heading);
  $("another").replaceChildren();
  now.forEach((landmark, sector) => {
    const isAnother = landmark && String(landmark) !== String(first[sector]);
    make("span", $("another"), isAnother ? "≠" : "");
  });
}

// a landmark a sector, null where none was read; roof and wall are names of colours
function showLandmarks(map, landmarks, heading) {
  map.replaceChildren();
  for (const landmark of landmarks) {
    const sector = make("span", map);
    if (!landmark) continue;
    make("u", sector).style.background = landmark[0];
    make("s", sector).style.background = landmark[1];
  }
  map.ariaLabel = landmarks.map(landmark => landmark ? landmark.join(" over ") : "not seen yet").join(", ");
  // what the camera sees, also where it reaches over an end
  for (const turn of [-1, 0, 1]) make("i", map).style.left = `${100 * (heading + turn)}%`;
}

// ---- steering: what is clicked is asked for, and what was asked for in any tab is shown

let settings = null;  // as they were asked for last

async function ask(order) {
  Object.assign(settings, order);
  const answer = await fetch("steer", {method: "POST", body: JSON.stringify(order)});
  const isStrange = order.prompt && shown?.score && !CAPTION.test(order.prompt);
  $("notice").textContent = !answer.ok ? await answer.text() :
    isStrange ? "The tiny model knows captions as the buttons make them; other words tell it nothing." : "";
}

function showSettings(chunk) {
  settings = chunk.settings;
  const {prompt, seed, memory, positions, tau, paused} = settings;
  if (!$("preset").length) for (const name in chunk.rules) make("option", $("preset"), name);
  const fields = {prompt, seed, positions, preset: memory, tau: Number(tau.toFixed(3))};
  for (const [id, value] of Object.entries(fields)) if ($(id) !== document.activeElement) $(id).value = value;
  for (const button of document.querySelectorAll("[role=group] button")) {
    button.ariaPressed = chunk.score?.[button.parentNode.id] === button.value;
  }
  $("paused").ariaPressed = paused;
  $("save").download = `live-${seed}.mp4`;
  pen.canvas.ariaLabel = `The video: ${prompt}`;
}

$("preset").onchange = event => ask({memory: event.target.value});
$("positions").onchange = event => ask({positions: event.target.value});
$("tau").onchange = event => ask({tau: event.target.valueAsNumber});
$("paused").onclick = () => ask({paused: !settings.paused});
$("save").onclick = () => {
  $("notice").textContent = "The mp4 is being written. It is downloaded when it is whole.";
  setTimeout(() => { $("notice").textContent = ""; }, 20000);
};
$("restart").onclick = () => ask({video: settings.video + 1, seed: $("seed").valueAsNumber, paused: false});
document.forms[0].onsubmit = event => {
  event.preventDefault();
  ask({prompt: $("prompt").value});
};

// ---- captions of the small world, as world.GRAMMAR has them

const CAPTION = /^(Grass|Sand|Snow|Stone)\. The camera (.*)$/;
const MOTIONS = {
  turn: "turns SIDE from POINT, one turn in 12 seconds.",
  linger: "turns SIDE from POINT, lingering at compass points, one turn in 18 seconds.",
  aside: "looks from POINT 90 degrees to the SIDE and back, every 8 seconds.",
};

// the caption that was asked for last, with another ground or motion
function caption({ground, motion}) {
  const score = shown.score, {prompt} = settings;
  const [, sameGround, sameMotion] = prompt.match(CAPTION) ?? [];
  // from the compass point that is nearest to where the camera looks
  const point = ["north", "east", "south", "west"][Math.round(4 * score.heading) % 4];
  const side = / left/.test(prompt) ? "left" : "right";
  const another = MOTIONS[motion ?? "turn"].replace("SIDE", side).replace("POINT", point);
  return `${ground ?? sameGround ?? score.ground}. The camera ${!motion && sameMotion || another}`;
}

for (const button of document.querySelectorAll("[role=group] button")) {
  button.onclick = () => ask({prompt: caption({[button.parentNode.id]: button.value})});
}
