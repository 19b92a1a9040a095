// What a model file says of itself: sparseinst_jax/runner/metadata.py describes every key.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "image.hpp"

struct Metadata {
  std::vector<std::string> class_names;
  std::vector<std::optional<int64_t>> category_ids;  // none: a class that is left out
  int shortest_side, longest_side, size_multiple, num_masks, mask_stride;
  std::optional<Size> fixed_size;
  float mask_threshold;
  bool masks_are_logits, scores_at_original_size;

  // The size that a photo is resized to, and the one it is padded to.
  Size resized(Size photo) const;
  Size padded(Size resized) const;
};

// Reads the JSON. Throws std::runtime_error where it is none, or says what cannot be.
Metadata read_metadata(const std::string& json);

// A text in JSON's quotes.
std::string quoted(const std::string& text);
