// A model file in a runtime: network_openvino.cpp or network_onnxruntime.cpp, as CMake was told.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "image.hpp"

// What the network finds in one image: D candidates, of N masks.
struct Selection {
  std::vector<float> scores;
  std::vector<int64_t> labels, mask_index;  // [D]
  std::vector<bool> is_kept;
  Size grid;                 // of a mask, over the padded image
  std::vector<float> masks;  // [N, grid.height, grid.width]: probabilities or logits
};

struct Options {
  int threads = 0;           // 0: as the runtime chooses
  bool is_bfloat16 = false;  // faster on CPUs that have it; other scores and masks
};

class Network {
 public:
  // Throws std::exception where the file is no model, or has other inputs and outputs.
  Network(const std::string& path, const Options& options);
  ~Network();

  // The JSON that the package stored in the file.
  std::string metadata() const;

  // `padded`: a multiple of 32 high and wide; `valid`: the part of it that holds the photo.
  Selection run(const Image& padded, Size valid);

 private:
  struct State;
  std::unique_ptr<State> state_;
};
