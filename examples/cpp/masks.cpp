#include "masks.hpp"

#include <algorithm>
#include <array>
#include <cmath>

namespace {

constexpr int kTaps = 3;
constexpr float kEpsilon = 1e-6f;

struct Pair {
  std::array<int, 2> index;
  std::array<double, 2> weight;
};

// Bilinear with half-pixel centres: the two pixels that pixel `at` of `target` lies between.
Pair bilinear_pair(int source, int target, int at) {
  const double position = std::max((at + 0.5) * (double(source) / target) - 0.5, 0.0);
  const int lower = std::min(int(position), source - 1);
  return {{lower, std::min(lower + 1, source - 1)}, {1 - (position - lower), position - lower}};
}

}  // namespace

AxisTaps upsampling_taps(int grid, int stride, int valid, int length) {
  AxisTaps taps{std::vector<int>(length), std::vector<float>(size_t(length) * kTaps)};
  for (int at = 0; at < length; ++at) {
    const Pair outer = bilinear_pair(valid, length, at);
    std::array<double, kTaps> weights = {};
    int& first = taps.first[at];
    first = std::min(bilinear_pair(grid, grid * stride, outer.index[0]).index[0], std::max(grid - kTaps, 0));
    for (int i = 0; i < 2; ++i) {
      const Pair inner = bilinear_pair(grid, grid * stride, outer.index[i]);
      for (int j = 0; j < 2; ++j) weights[inner.index[j] - first] += outer.weight[i] * inner.weight[j];
    }
    std::copy(weights.begin(), weights.end(), &taps.weights[size_t(at) * kTaps]);
  }
  return taps;
}

Mask upsample(const float* values, Size grid, const AxisTaps& rows, const AxisTaps& columns,
              const Metadata& metadata) {
  const int height = int(rows.first.size()), width = int(columns.first.size());
  // Logits are cut where their probability would be.
  const float threshold = metadata.mask_threshold;
  const float cut = metadata.masks_are_logits ? std::log(threshold / (1 - threshold)) : threshold;
  // Every column of the grid at the photo's height, one after the other; and its largest value.
  std::vector<float> tall(size_t(grid.width) * height), most(grid.width);
  for (int x = 0; x < grid.width; ++x) {
    float* column = &tall[size_t(x) * height];
    for (int y = 0; y < height; ++y) {
      const float* weight = &rows.weights[size_t(y) * kTaps];
      float terms[kTaps];
      for (int i = 0; i < kTaps; ++i)  // a grid of one or two rows has fewer than three
        terms[i] = values[size_t(std::min(rows.first[y] + i, grid.height - 1)) * grid.width + x] * weight[i];
      column[y] = terms[0] + terms[1] + terms[2];
    }
    most[x] = *std::max_element(column, column + height);
  }
  Mask mask{{height, width}, {0}};
  bool was_inside = false;
  double total = 0;
  std::vector<float> made(height);
  for (int x = 0; x < width; ++x) {
    int index[kTaps];
    for (int i = 0; i < kTaps; ++i) index[i] = std::min(columns.first[x] + i, grid.width - 1);
    // No pixel is larger than the largest that it is made of: most columns hold nothing.
    if (!was_inside && std::max({most[index[0]], most[index[1]], most[index[2]]}) <= cut) {
      mask.runs.back() += uint32_t(height);
      continue;
    }
    const float* weight = &columns.weights[size_t(x) * kTaps];
    const float *left = &tall[size_t(index[0]) * height], *middle = &tall[size_t(index[1]) * height],
                *right = &tall[size_t(index[2]) * height];
    for (int y = 0; y < height; ++y)
      made[y] = left[y] * weight[0] + middle[y] * weight[1] + right[y] * weight[2];
    for (const float value : made) {
      const bool is_inside = value > cut;
      if (is_inside != was_inside) mask.runs.push_back(0);
      ++mask.runs.back();
      was_inside = is_inside;
      if (is_inside) total += metadata.masks_are_logits ? 1 / (1 + std::exp(-value)) : value;
    }
  }
  mask.mean_inside = float(total / (double(mask.area()) + kEpsilon));
  return mask;
}

int64_t Mask::area() const {
  int64_t result = 0;
  for (size_t i = 1; i < runs.size(); i += 2) result += runs[i];
  return result;
}

std::vector<uint8_t> Mask::pixels() const {
  std::vector<uint8_t> result(size_t(size.height) * size.width);
  int64_t at = 0;
  for (size_t i = 0; i < runs.size(); ++i)
    for (const int64_t end = at + runs[i]; at < end; ++at)
      if (i % 2) result[size_t(at % size.height) * size.width + size_t(at / size.height)] = 1;
  return result;
}

// Five bits a letter, the sixth says that more follow; from the third run on differences.
std::string Mask::counts() const {
  std::string result;
  for (size_t i = 0; i < runs.size(); ++i) {
    int64_t rest = int64_t(runs[i]) - (i > 2 ? int64_t(runs[i - 2]) : 0);
    for (bool more = true; more;) {
      int letter = rest & 0x1F;
      rest >>= 5;
      more = (letter & 0x10) ? rest != -1 : rest != 0;
      result += char((more ? letter | 0x20 : letter) + 48);
    }
  }
  return result;
}
