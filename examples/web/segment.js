// From pixels to the network and from its masks back to pixels, equal to the package's
// (data/transforms.py, inference/masks.py) and of the same form as examples/cpp.
// Images are { height, width, rgb: Uint8Array [height, width, 3] }.

const PRECISION = 32 - 8 - 2; // bits behind the point of Pillow's weights
const HALF = 1 << (PRECISION - 1);
const TAPS = 3;
const EPSILON = 1e-6;

// The size a photo is resized to: detectron2's ResizeShortestEdge, unrounded until the end.
export function resizedSize({ height, width }, { shortest_side, longest_side, fixed_size }) {
  const rounded = (h, w) => ({ height: Math.max(Math.floor(h + 0.5), 1), width: Math.max(Math.floor(w + 0.5), 1) });
  let scale = shortest_side / Math.min(height, width);
  let [newHeight, newWidth] = height < width ? [shortest_side, scale * width] : [scale * height, shortest_side];
  if (Math.max(newHeight, newWidth) > longest_side) {
    scale = longest_side / Math.max(newHeight, newWidth);
    [newHeight, newWidth] = [newHeight * scale, newWidth * scale];
  }
  const size = rounded(newHeight, newWidth);
  if (fixed_size === null || (size.height <= fixed_size[0] && size.width <= fixed_size[1])) return size;
  scale = Math.min(fixed_size[0] / height, fixed_size[1] / width);
  return rounded(height * scale, width * scale);
}

// The size that the network gets.
export function paddedSize({ height, width }, { size_multiple, fixed_size }) {
  const up = (side) => Math.ceil(side / size_multiple) * size_multiple;
  const [paddedHeight, paddedWidth] = fixed_size ?? [up(height), up(width)];
  return { height: paddedHeight, width: paddedWidth };
}

// The image without its fourth channel.
export function withoutAlpha({ height, width, data }) {
  const rgb = new Uint8Array(height * width * 3);
  for (let from = 0, to = 0; to < rgb.length; from += 4) {
    rgb[to++] = data[from];
    rgb[to++] = data[from + 1];
    rgb[to++] = data[from + 2];
  }
  return { height, width, rgb };
}

// Pillow's weights of one axis as whole numbers: for each pixel of the result the first pixel of
// the source, and the weights of it and the following ones.
function resizeWeights(source, target) {
  const scale = source / target;
  const filterScale = Math.max(scale, 1);
  const most = Math.ceil(filterScale) * 2 + 1;
  const [first, end] = [new Int32Array(target), new Int32Array(target)];
  const weights = new Int32Array(target * most);
  for (let x = 0; x < target; x++) {
    const centre = (x + 0.5) * scale;
    first[x] = Math.max(Math.trunc(centre - filterScale + 0.5), 0);
    end[x] = Math.min(Math.trunc(centre + filterScale + 0.5), source);
    const exact = [];
    let total = 0;
    for (let i = 0; i < end[x] - first[x]; i++) {
      const distance = Math.abs((i + first[x] - centre + 0.5) * (1 / filterScale));
      exact.push(Math.max(1 - distance, 0));
      total += exact[i];
    }
    exact.forEach((weight, i) => (weights[x * most + i] = Math.trunc(0.5 + (weight / total) * 2 ** PRECISION)));
  }
  return { first, end, weights, most };
}

const rounded = (sum) => Math.min(Math.max(sum >> PRECISION, 0), 255);

function resizeWidth({ height, width, rgb }, newWidth) {
  const { first, end, weights, most } = resizeWeights(width, newWidth);
  const result = new Uint8Array(height * newWidth * 3);
  for (let y = 0, to = 0; y < height; y++)
    for (let x = 0; x < newWidth; x++) {
      let [red, green, blue] = [HALF, HALF, HALF];
      for (let from = 3 * (y * width + first[x]), i = x * most; from < 3 * (y * width + end[x]); i++) {
        red += weights[i] * rgb[from++];
        green += weights[i] * rgb[from++];
        blue += weights[i] * rgb[from++];
      }
      result[to++] = rounded(red);
      result[to++] = rounded(green);
      result[to++] = rounded(blue);
    }
  return { height, width: newWidth, rgb: result };
}

function resizeHeight({ height, width, rgb }, newHeight) {
  const { first, end, weights, most } = resizeWeights(height, newHeight);
  const length = width * 3;
  const result = new Uint8Array(newHeight * length);
  const sums = new Int32Array(length);
  for (let y = 0; y < newHeight; y++) {
    sums.fill(HALF);
    for (let source = first[y], i = y * most; source < end[y]; source++, i++)
      for (let x = 0, from = source * length; x < length; x++) sums[x] += weights[i] * rgb[from + x];
    for (let x = 0; x < length; x++) result[y * length + x] = rounded(sums[x]);
  }
  return { height: newHeight, width, rgb: result };
}

// Pillow's Image.resize(..., BILINEAR), equal to the bit: antialiased when it shrinks. A canvas
// resizes in another way.
export function resize(image, { height, width }) {
  const [fewerRows, fewerColumns] = [image.height - height, image.width - width];
  const rows = (from) => (from.height === height ? from : resizeHeight(from, height));
  const columns = (from) => (from.width === width ? from : resizeWidth(from, width));
  // Each pass rounds, so their order counts. This is Pillow's since 13; before, columns came first.
  return fewerRows > 0 && fewerRows > 2 * fewerColumns ? columns(rows(image)) : rows(columns(image));
}

// The image in the upper left corner of a larger one, black elsewhere.
export function pad(image, { height, width }) {
  const rgb = new Uint8Array(height * width * 3);
  const length = image.width * 3;
  for (let y = 0; y < image.height; y++)
    rgb.set(image.rgb.subarray(y * length, (y + 1) * length), y * width * 3);
  return { height, width, rgb };
}

// Bilinear with half-pixel centres: the two pixels that pixel `at` of `target` lies between.
function bilinearPair(source, target, at) {
  const position = Math.max((at + 0.5) * (source / target) - 0.5, 0);
  const lower = Math.min(Math.trunc(position), source - 1);
  return { index: [lower, Math.min(lower + 1, source - 1)], weight: [1 - (position - lower), position - lower] };
}

// The three pixels of the grid's axis that each pixel of the photo is made of: times the stride,
// crop to the valid part, resize to the photo's length. Each is bilinear, so they are one operator.
export function upsamplingTaps(grid, stride, valid, length) {
  const first = new Int32Array(length);
  const weights = new Float32Array(length * TAPS);
  for (let at = 0; at < length; at++) {
    const outer = bilinearPair(valid, length, at);
    const inner = outer.index.map((index) => bilinearPair(grid, grid * stride, index));
    first[at] = Math.min(inner[0].index[0], Math.max(grid - TAPS, 0));
    const exact = [0, 0, 0];
    for (let i = 0; i < 2; i++)
      for (let j = 0; j < 2; j++) exact[inner[i].index[j] - first[at]] += outer.weight[i] * inner[i].weight[j];
    weights.set(exact, at * TAPS);
  }
  return { first, weights };
}

// A mask of the grid at the photo's size, as COCO's run lengths down the columns (outside, inside,
// outside, ...), its number of pixels, and the mean probability over them.
export function upsample(values, grid, rows, columns, { mask_threshold, masks_are_logits }) {
  const [height, width] = [rows.first.length, columns.first.length];
  // Logits are cut where their probability would be; in float32, as the package compares.
  const cut = Math.fround(masks_are_logits ? Math.log(mask_threshold / (1 - mask_threshold)) : mask_threshold);
  // No pixel is larger than the largest that it is made of: most columns hold nothing, and are left out.
  const largest = new Float32Array(grid.width).fill(-Infinity);
  for (let y = 0, at = 0; y < grid.height; y++)
    for (let x = 0; x < grid.width; x++, at++) if (values[at] > largest[x]) largest[x] = values[at];
  // The other columns of the grid at the photo's height, one after the other; and the rows that hold something.
  const tall = new Float32Array(grid.width * height);
  let [top, bottom] = [height, 0];
  for (let x = 0; x < grid.width; x++) {
    if (!(Math.max(...largest.subarray(Math.max(x - TAPS + 1, 0), x + TAPS)) > cut)) continue;
    for (let y = 0; y < height; y++) {
      let sum = 0;
      for (let i = 0; i < TAPS; i++) // a grid of one or two rows has fewer than three
        sum += values[Math.min(rows.first[y] + i, grid.height - 1) * grid.width + x] * rows.weights[TAPS * y + i];
      tall[x * height + y] = sum;
      if (!(tall[x * height + y] > cut)) continue;
      top = Math.min(top, y);
      bottom = Math.max(bottom, y + 1);
    }
  }
  const runs = [0];
  let [isInside, area, total] = [false, 0, 0];
  const change = () => {
    isInside = !isInside;
    runs.push(0);
  };
  for (let x = 0; x < width; x++) {
    const [left, middle, right] = [0, 1, 2].map((i) => Math.min(columns.first[x] + i, grid.width - 1));
    const isEmpty = !(Math.max(largest[left], largest[middle], largest[right]) > cut) || top >= bottom;
    const [from, end] = isEmpty ? [height, height] : [top, bottom];
    if (from > 0 && isInside) change();
    runs[runs.length - 1] += from;
    const [a, b, c] = columns.weights.subarray(x * TAPS, x * TAPS + TAPS);
    for (let y = from; y < end; y++) {
      const value = Math.fround(
        tall[left * height + y] * a + tall[middle * height + y] * b + tall[right * height + y] * c,
      );
      if (value > cut !== isInside) change();
      runs[runs.length - 1]++;
      if (!isInside) continue;
      area++;
      total += masks_are_logits ? 1 / (1 + Math.exp(-value)) : value;
    }
    if (end < height && isInside) change();
    runs[runs.length - 1] += height - end;
  }
  return { runs: Uint32Array.from(runs), area, meanInside: total / (area + EPSILON) };
}

// Run lengths as pycocotools compresses them: five bits a letter, the sixth says that more follow;
// from the third run on differences.
export function compressed(runs) {
  const letters = [];
  runs.forEach((run, i) => {
    let rest = run - (i > 2 ? runs[i - 2] : 0);
    for (let more = true; more; ) {
      const five = rest & 31;
      rest >>= 5;
      more = five & 16 ? rest !== -1 : rest !== 0;
      letters.push(String.fromCharCode((more ? five | 32 : five) + 48));
    }
  });
  return letters.join("");
}
