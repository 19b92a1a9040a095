// The parts of examples/web that must equal the package's, for test_web.py: JSON in, JSON out.
import { readMetadata } from "../../examples/web/model_file.js";
import * as segment from "../../examples/web/segment.js";

let text = "";
for await (const chunk of process.stdin.setEncoding("utf8")) text += chunk;
const bytes = (base64) => new Uint8Array(Buffer.from(base64, "base64"));

const parts = {
  resize({ height, width, rgba, size: [newHeight, newWidth] }) {
    const image = segment.withoutAlpha({ height, width, data: bytes(rgba) });
    return Buffer.from(segment.resize(image, { height: newHeight, width: newWidth }).rgb).toString("base64");
  },
  sizes({ sizes, metadata }) {
    return sizes.map(([height, width]) => {
      const resized = segment.resizedSize({ height, width }, metadata);
      const padded = segment.paddedSize(resized, metadata);
      return [resized.height, resized.width, padded.height, padded.width];
    });
  },
  taps({ arguments: values }) {
    const { first, weights } = segment.upsamplingTaps(...values);
    return { first: [...first], weights: [...weights] };
  },
  masks({ values, grid: [height, width], stride, valid, size, metadata }) {
    const rows = segment.upsamplingTaps(height, stride, valid[0], size[0]);
    const columns = segment.upsamplingTaps(width, stride, valid[1], size[1]);
    const made = segment.upsample(Float32Array.from(values), { height, width }, rows, columns, metadata);
    return { counts: segment.compressed(made.runs), area: made.area, mean: made.meanInside };
  },
  metadata({ files }) {
    return files.map((file) => {
      try {
        return readMetadata(bytes(file));
      } catch (error) {
        return error.message;
      }
    });
  },
};
const task = JSON.parse(text);
process.stdout.write(JSON.stringify(parts[task.part](task)));
