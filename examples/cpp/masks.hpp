// Masks from the network's grid to the size of the photo, and what is kept of them: run lengths.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "image.hpp"
#include "metadata.hpp"

// The pixels of each row (or column) of the photo lean on three neighbouring ones of the grid.
struct AxisTaps {
  std::vector<int> first;
  std::vector<float> weights;  // [length, 3]
};

// Times the stride, crop to the valid part, resize to the photo's length: each is bilinear, so
// the three are one operator. See sparseinst_jax/inference/masks.py.
AxisTaps upsampling_taps(int grid, int stride, int valid, int length);

// A mask as COCO's run lengths, down the columns: outside, inside, outside, ...
struct Mask {
  Size size;
  std::vector<uint32_t> runs;
  float mean_inside = 0;  // of the probability, over the mask's pixels

  int64_t area() const;
  std::vector<uint8_t> pixels() const;  // [height, width] of 0 and 1
  std::string counts() const;           // as pycocotools compresses the runs
};

// A mask [grid.height, grid.width] of the padded image, at the photo's size.
Mask upsample(const float* grid_values, Size grid, const AxisTaps& rows, const AxisTaps& columns,
              const Metadata& metadata);
