// What a model file says of itself. onnxruntime-web does not tell the metadata of a file, so the
// few bytes of protobuf around them are read here. sparseinst_jax/runner/metadata.py describes the JSON.

const KEY = "sparseinst_jax";
const METADATA_PROPS = 14; // the field of ONNX's ModelProto
const MAX_BYTES = 1 << 22;
const MAX_SIDE = 1 << 14;

// Yields [field number, content] of each part of a message that has a length; others are passed over.
function* parts(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let scale = 1; ; scale *= 128) {
      if (at >= bytes.length || scale > 2 ** 49) throw new Error("not an ONNX file, or it is cut off");
      const byte = bytes[at++];
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
  };
  const wide = () => {
    for (let i = 0; i < 10; i++) if (bytes[at++] < 128) return; // up to 64 bits
    throw new Error("not an ONNX file, or it is cut off");
  };
  while (at < bytes.length) {
    const tag = varint();
    const kind = tag % 8;
    if (kind === 0) wide();
    else if (kind === 1) at += 8;
    else if (kind === 5) at += 4;
    else if (kind === 2) {
      const length = varint();
      if (at + length > bytes.length) throw new Error("not an ONNX file, or it is cut off");
      yield [Math.floor(tag / 8), bytes.subarray(at, at + length)];
      at += length;
    } else throw new Error("not an ONNX file, or it is cut off");
  }
}

// The metadata of a model file; throws an Error in words where there are none or they cannot be.
export function readMetadata(bytes) {
  const text = new TextDecoder("utf-8", { fatal: true });
  for (const [field, content] of parts(bytes)) {
    if (field !== METADATA_PROPS) continue;
    const entry = Object.fromEntries(parts(content)); // 1: key, 2: value
    if (entry[1] && text.decode(entry[1]) === KEY) return checked(text, entry[2] ?? new Uint8Array());
  }
  throw new Error("the file was not written by `sparseinst export`");
}

function checked(decoder, bytes) {
  if (bytes.length > MAX_BYTES) throw new Error("the model's metadata is too long");
  let found;
  try {
    found = JSON.parse(decoder.decode(bytes));
  } catch {
    throw new Error("the model's metadata is no JSON");
  }
  const isWhole = (value, most) => Number.isInteger(value) && value >= 1 && value <= most;
  const isBoolean = (value) => typeof value === "boolean";
  const rules = {
    schema: (value) => value === 1,
    class_names: (value) => Array.isArray(value) && value.length > 0 && value.every((n) => typeof n === "string"),
    category_ids: (value) =>
      value?.length === found.class_names?.length && value.every((id) => id === null || Number.isInteger(id)),
    resize: (value) => value === "pillow_bilinear",
    protocol: (value) => value === "original",
    shortest_side: (value) => isWhole(value, MAX_SIDE),
    longest_side: (value) => isWhole(value, MAX_SIDE),
    size_multiple: (value) => isWhole(value, MAX_SIDE),
    mask_stride: (value) => isWhole(value, 32),
    mask_threshold: (value) => value >= 0 && value <= 1,
    masks_are_logits: isBoolean,
    scores_at_original_size: isBoolean,
    fixed_size: (value) => value === null || (value?.length === 2 && value.every((side) => isWhole(side, MAX_SIDE))),
  };
  for (const [key, isValid] of Object.entries(rules))
    if (!isValid(found?.[key]))
      throw new Error(`this page cannot run the model: ${key} is ${JSON.stringify(found?.[key])?.slice(0, 100)}`);
  return found;
}
