// The network, away from the page, so that the page stays usable while it computes.
import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";
import { readMetadata } from "./model_file.js";
import { pad, paddedSize, resize, resizedSize, upsample, upsamplingTaps, withoutAlpha } from "./segment.js";

// Threads need a page that is isolated from others: see the headers of serve.mjs.
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency || 1, 8) : 1;
let session, metadata;

async function download(response) {
  const total = Number(response.headers.get("Content-Length")) || 0;
  const chunks = [];
  let loaded = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) return new Uint8Array(await new Blob(chunks).arrayBuffer());
    chunks.push(value);
    loaded += value.length;
    postMessage({ kind: "progress", loaded, total });
  }
}

// From an address of the page's own server, or from a file of the user's.
async function load(source) {
  let bytes;
  if (source instanceof Blob) {
    bytes = new Uint8Array(await source.arrayBuffer());
  } else {
    const response = await fetch(source);
    if (response.status === 404) return postMessage({ kind: "absent" });
    if (!response.ok) throw new Error(`${source}: the server answers ${response.status}`);
    bytes = await download(response);
  }
  const found = readMetadata(bytes);
  await session?.release();
  session = undefined;
  postMessage({ kind: "starting" });
  session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  metadata = found;
  const { class_names: names, category_ids: ids } = metadata;
  postMessage({ kind: "ready", names, ids, threads: ort.env.wasm.numThreads });
}

async function find(id, photo, lowest) {
  const started = performance.now();
  const valid = resizedSize(photo, metadata);
  const padded = pad(resize(withoutAlpha(photo), valid), paddedSize(valid, metadata));
  const resized = performance.now();
  const output = await session.run({
    images: new ort.Tensor("uint8", padded.rgb, [1, padded.height, padded.width, 3]),
    valid_size: new ort.Tensor("int64", BigInt64Array.of(BigInt(valid.height), BigInt(valid.width)), [1, 2]),
  });
  const computed = performance.now();
  postMessage({ kind: "computed", id });
  const masks = output.mask_probs ?? output.mask_logits;
  const grid = { height: masks.dims[2], width: masks.dims[3] };
  const rows = upsamplingTaps(grid.height, metadata.mask_stride, valid.height, photo.height);
  const columns = upsamplingTaps(grid.width, metadata.mask_stride, valid.width, photo.width);
  const instances = [];
  output.scores.data.forEach((score, candidate) => {
    const label = Number(output.labels.data[candidate]);
    // A score only falls when it is taken at the original size.
    if (!output.is_kept.data[candidate] || score < lowest || metadata.category_ids[label] === null) return;
    const query = Number(output.query_index?.data[candidate] ?? candidate);
    const cells = grid.height * grid.width;
    const values = masks.data.subarray(query * cells, (query + 1) * cells);
    const { runs, area, meanInside } = upsample(values, grid, rows, columns, metadata);
    if (area) instances.push({ label, score: metadata.scores_at_original_size ? score * meanInside : score, runs, area });
  });
  const ms = { resize: resized - started, network: computed - resized, masks: performance.now() - computed };
  postMessage({ kind: "found", id, height: photo.height, width: photo.width, instances, ms });
}

let queue = Promise.resolve(); // one thing after the other
onmessage = ({ data }) => {
  queue = queue
    .then(() => (data.kind === "model" ? load(data.source) : find(data.id, data.photo, data.lowest)))
    .catch((error) => postMessage({ kind: "error", of: data.kind, hasModel: Boolean(session), message: error.message }));
};
