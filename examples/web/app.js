// The page: photos in by four ways, what the worker finds in them drawn over them.
import { compressed } from "./segment.js";

const $ = (id) => document.getElementById(id);
const OPACITY = 0.45;
const state = {
  names: [],
  ids: [],
  found: null, // what the worker found last
  chosen: null, // the instance that is looked at
  stream: null, // of the camera
  last: null, // its last picture that was shown
  waiting: new Map(), // from the number of a photo to what resolves its promise
  number: 0,
};
const worker = new Worker("worker.js", { type: "module" });

const say = (text) => ($("status").textContent = text);
const megabytes = (bytes) => (bytes / 1e6).toFixed(0);

function setBusy(value) {
  // `value`: null when nothing is awaited, a share of 1, or undefined where no share is known.
  $("progress").hidden = value === null;
  if (value === undefined) $("progress").removeAttribute("value");
  else if (value !== null) $("progress").value = value;
}

const answers = {
  progress({ loaded, total }) {
    setBusy(total ? loaded / total : undefined);
    say(`Loading the model: ${megabytes(loaded)}${total ? ` of ${megabytes(total)}` : ""} MB`);
  },
  starting() {
    setBusy();
    say("Preparing the model …");
  },
  absent() {
    setBusy(null);
    $("model").disabled = false;
    say("There is no model.onnx beside this page. Open one that `sparseinst export` wrote.");
  },
  ready({ names, ids, threads }) {
    Object.assign(state, { names, ids });
    setBusy(null);
    for (const id of ["photo", "camera", "model"]) $(id).disabled = false;
    const slow = crossOriginIsolated ? "" : " The server does not isolate the page, so there is only one.";
    say(`Ready: ${names.length} classes, ${threads} thread${threads > 1 ? "s" : ""}.${slow}`);
  },
  computed({ id }) {
    state.waiting.get(id)?.computed?.();
  },
  found(message) {
    state.waiting.get(message.id)?.resolve(message);
  },
  error({ of, hasModel, message }) {
    setBusy(null);
    if (of === "model") {
      $("model").disabled = false;
      for (const id of ["photo", "camera"]) $(id).disabled = !hasModel;
    }
    for (const { reject } of state.waiting.values()) reject(new Error(message));
    say(message);
  },
};
worker.onmessage = ({ data }) => answers[data.kind](data);
worker.onerror = (event) => {
  setBusy(null);
  say(`The worker did not start: ${event.message ?? "run `npm install` in its folder"}`);
};

// Sends what a canvas can draw to the worker. Only objects of at least the score `lowest` get masks.
// `computed` is called when the network is through and masks are still to be made.
async function look(source, height, width, lowest = 0, computed = null) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(source, 0, 0, width, height);
  const { data } = context.getImageData(0, 0, width, height);
  const id = ++state.number;
  const found = await new Promise((resolve, reject) => {
    state.waiting.set(id, { resolve, reject, computed });
    worker.postMessage({ kind: "photo", id, lowest, photo: { height, width, data } }, [data.buffer]);
  }).finally(() => state.waiting.delete(id));
  found.instances.sort((a, b) => b.score - a.score);
  found.instances.forEach((instance, index) => (instance.colour = colourOf(index)));
  return { canvas, found };
}

function present({ canvas, found }) {
  for (const name of ["base", "overlay"]) Object.assign($(name), { height: found.height, width: found.width });
  $("base").getContext("2d").drawImage(canvas, 0, 0);
  Object.assign(state, { found, chosen: null });
  show();
}

async function openPhoto(file) {
  stopCamera();
  if ($("photo").disabled) return say("There is no model yet to look at the photo with.");
  setBusy();
  say(`Looking at ${file.name || "the photo"} …`);
  try {
    // Pixels as they are stored, but upright: no colour profile is applied.
    const options = { colorSpaceConversion: "none", premultiplyAlpha: "none", imageOrientation: "from-image" };
    const bitmap = await createImageBitmap(file, options).catch(() => {
      throw new Error(`${file.name || "The file"} cannot be read as an image.`);
    });
    const seen = await look(bitmap, bitmap.height, bitmap.width);
    bitmap.close();
    present(seen);
    const { ms } = seen.found;
    const total = ms.resize + ms.network + ms.masks;
    say(`${summary()} in ${(total / 1000).toFixed(2)} s (network ${(ms.network / 1000).toFixed(2)} s).`);
  } catch (error) {
    say(error.message);
  }
  setBusy(null);
}

async function startCamera() {
  const video = document.createElement("video");
  try {
    const wish = { facingMode: "environment", width: { ideal: 1280 } };
    state.stream = await navigator.mediaDevices.getUserMedia({ video: wish });
  } catch (error) {
    return say(`No camera: ${error.message ?? error}. Browsers offer it on https and on localhost only.`);
  }
  const stream = state.stream;
  $("status").ariaLive = "off"; // it changes with every picture
  $("camera").setAttribute("aria-pressed", "true");
  $("camera").textContent = "Stop the camera";
  Object.assign(video, { srcObject: stream, muted: true, playsInline: true });
  try {
    await video.play();
    let next;
    const lookAgain = () => {
      if (state.stream !== stream) return;
      // The next picture is taken while masks are made of this one, and resized while they are drawn:
      // no sooner, because it would lag, and would take a core from the network.
      next = look(video, video.videoHeight, video.videoWidth, Number($("score").value), lookAgain);
      next.catch(() => {}); // said once, by whichever is waited for
    };
    lookAgain();
    state.last = null;
    for (let start = performance.now(); ; ) {
      const seen = await next;
      if (state.stream !== stream) break;
      present((state.last = seen));
      const now = performance.now();
      say(`${summary()}; ${(1000 / (now - start)).toFixed(2)} images a second.`);
      start = now;
    }
  } catch (error) {
    stopCamera();
    say(error.message);
  }
}

function stopCamera() {
  state.stream?.getTracks().forEach((track) => track.stop());
  state.stream = null;
  $("status").ariaLive = "polite";
  $("camera").setAttribute("aria-pressed", "false");
  $("camera").textContent = "Camera";
}

// The last picture stays: with every object, for the slider and to be saved.
async function keepLastPicture() {
  stopCamera();
  if (!state.last) return;
  const { canvas, found } = state.last;
  const number = state.number + 1; // of this look: a photo that is opened meanwhile comes after it
  try {
    const seen = await look(canvas, found.height, found.width);
    if (state.number === number) present(seen);
  } catch (error) {
    say(error.message);
  }
}

// Hues a golden angle apart: neighbours in the list never look alike.
function colourOf(index) {
  const hue = (0.02 + (index * (Math.sqrt(5) - 1)) / 2) % 1;
  return [0, 2 / 3, 1 / 3].map((shift) => {
    const distance = Math.abs(((hue + shift) % 1) * 6 - 3) - 1;
    return Math.round(255 * Math.min(Math.max(distance, 0), 1));
  });
}

const shown = () => state.found.instances.filter(({ score }) => score >= Number($("score").value));

function summary() {
  const count = shown().length;
  return `${count} object${count === 1 ? "" : "s"}`;
}

function show() {
  if (!state.found) return;
  const instances = shown();
  $("result").hidden = false;
  $("save").disabled = false;
  $("picture").setAttribute("aria-label", `The photo with ${summary()}`);
  $("list").replaceChildren(
    ...instances.map((instance) => {
      const [swatch, name, score] = [0, 1, 2].map(() => document.createElement("span"));
      swatch.style.background = `rgb(${instance.colour})`;
      name.textContent = state.names[instance.label];
      score.textContent = instance.score.toFixed(2);
      const button = document.createElement("button");
      button.type = "button";
      button.setAttribute("aria-pressed", String(instance === state.chosen));
      button.append(swatch, name, score);
      button.onclick = () => {
        state.chosen = instance === state.chosen ? null : instance;
        for (const other of $("list").querySelectorAll("button")) other.setAttribute("aria-pressed", "false");
        button.setAttribute("aria-pressed", String(instance === state.chosen));
        paint(instances);
      };
      const item = document.createElement("li");
      item.append(button);
      return item;
    }),
  );
  paint(instances);
}

// Colours masks and outlines. Where they overlap the surest is seen, or the chosen one.
function paint(instances) {
  const { height, width } = state.found;
  const owner = new Uint16Array(height * width); // down the columns, as the runs go
  const order = [...instances].reverse();
  if (order.includes(state.chosen)) order.push(state.chosen);
  for (const instance of order) {
    let at = 0;
    instance.runs.forEach((run, i) => {
      if (i % 2) owner.fill(instances.indexOf(instance) + 1, at, at + run);
      at += run;
    });
  }
  const context = $("overlay").getContext("2d");
  const picture = context.createImageData(width, height);
  const pixels = new Uint32Array(picture.data.buffer);
  const colours = instances.map((instance) => {
    const share = state.chosen && instance !== state.chosen ? 0.25 : 1;
    return [OPACITY, 1].map((alpha) => new Uint32Array(Uint8Array.of(...instance.colour, 255 * alpha * share).buffer)[0]);
  });
  for (let x = 0; x < width; x++)
    for (let y = 0; y < height; y++) {
      const at = x * height + y;
      const here = owner[at];
      if (!here) continue;
      const isEdge =
        (y ? owner[at - 1] : 0) !== here ||
        (y + 1 < height ? owner[at + 1] : 0) !== here ||
        (x ? owner[at - height] : 0) !== here ||
        (x + 1 < width ? owner[at + height] : 0) !== here;
      pixels[y * width + x] = colours[here - 1][Number(isEdge)];
    }
  context.putImageData(picture, 0, 0);
}

// A COCO results file of everything that was found, whatever its score.
function save() {
  const { height, width, instances } = state.found;
  const entries = instances.map(({ label, score, runs }) => ({
    image_id: 1,
    category_id: state.ids[label],
    score,
    segmentation: { size: [height, width], counts: compressed(runs) },
  }));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(entries)], { type: "application/json" }));
  link.download = "results.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

function loadModel(source) {
  for (const id of ["photo", "camera", "model"]) $(id).disabled = true;
  stopCamera();
  setBusy();
  say("Loading the model …");
  worker.postMessage({ kind: "model", source });
}

function open(files) {
  const file = [...(files ?? [])][0];
  if (file) /\.onnx$/i.test(file.name) ? loadModel(file) : openPhoto(file);
}

for (const id of ["photo", "model"])
  $(id).onchange = ({ target }) => {
    open(target.files);
    target.value = ""; // the same file can be opened again
  };
$("camera").onclick = () => (state.stream ? keepLastPicture() : startCamera());
$("save").onclick = save;
$("score").oninput = () => {
  $("score-value").textContent = Number($("score").value).toFixed(2);
  show();
};
document.addEventListener("paste", ({ clipboardData }) => open(clipboardData.files));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.querySelector("main").classList.add("dropping");
});
document.addEventListener("dragleave", () => document.querySelector("main").classList.remove("dropping"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.querySelector("main").classList.remove("dropping");
  open(event.dataTransfer.files);
});
loadModel("model.onnx");
