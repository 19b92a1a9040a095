// Find the objects of photos with a model that `sparseinst export` wrote: names, scores and masks.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <stdexcept>

#include "masks.hpp"
#include "network.hpp"

namespace {

const char* kUsage =
    "usage: segment MODEL.onnx PHOTO... [--output FOLDER] [--json FILE] [--score 0.4]\n"
    "                                   [--threads N] [--bfloat16]\n"
    "  prints the name, score, size and colour of each object\n"
    "  --output    also draws the masks on each photo: FOLDER/PHOTO.png\n"
    "  --json      also writes a COCO results file, with every object whatever its score;\n"
    "              image_id is 1 for the first photo, 2 for the second\n"
    "  --score     the lowest score that is printed and drawn\n"
    "  --threads   of the network\n"
    "  --bfloat16  OpenVINO on CPUs that have it: faster, other scores and masks\n";

struct Arguments {
  std::string model, output, json;
  std::vector<std::string> photos;
  float score = 0.4f;
  Options options;
};

struct Instance {
  size_t label;
  float score;
  Mask mask;
};

Arguments parse(int count, char** values) {
  Arguments result;
  for (int i = 1; i < count; ++i) {
    const std::string word = values[i];
    const auto next = [&] {
      if (++i == count) throw std::invalid_argument(word + " needs a value");
      return std::string(values[i]);
    };
    const auto number = [&](double least, double most) {
      const std::string text = next();
      char* end = nullptr;
      const double value = std::strtod(text.c_str(), &end);
      if (text.empty() || *end || !(value >= least && value <= most))
        throw std::invalid_argument(word + ": expected a number of " + std::to_string(least) + " to " +
                                    std::to_string(most) + ", got " + text);
      return value;
    };
    if (word == "--output") result.output = next();
    else if (word == "--json") result.json = next();
    else if (word == "--score") result.score = float(number(0, 1));
    else if (word == "--threads") result.options.threads = int(number(1, 1024));
    else if (word == "--bfloat16") result.options.is_bfloat16 = true;
    else if (word.rfind("--", 0) == 0) throw std::invalid_argument("unknown option " + word);
    else if (result.model.empty()) result.model = word;
    else result.photos.push_back(word);
  }
  if (result.photos.empty()) throw std::invalid_argument("expected a model and at least one photo");
  return result;
}

// The way of sparseinst_jax/inference/predictor.py: resize, pad, network, kept masks to photo size.
std::vector<Instance> find_instances(const Image& photo, Network& network, const Metadata& metadata) {
  const Size valid = metadata.resized(photo.size), padded = metadata.padded(valid);
  const Selection found = network.run(pad(resize(photo, valid), padded), valid);
  const auto taps = [&](int grid, int its_valid, int length) {
    return upsampling_taps(grid, metadata.mask_stride, its_valid, length);
  };
  const AxisTaps rows = taps(found.grid.height, valid.height, photo.size.height);
  const AxisTaps columns = taps(found.grid.width, valid.width, photo.size.width);
  const size_t cells = size_t(found.grid.height) * found.grid.width;
  std::vector<Instance> instances;
  for (size_t i = 0; i < found.scores.size(); ++i) {
    const size_t label = size_t(found.labels[i]), mask_index = size_t(found.mask_index[i]);
    if (!cells || label >= metadata.class_names.size() || mask_index >= found.masks.size() / cells)
      throw std::runtime_error("the model names a class or a mask that it does not have");
    if (!found.is_kept[i] || !metadata.category_ids[label]) continue;
    Mask mask = upsample(&found.masks[mask_index * cells], found.grid, rows, columns, metadata);
    if (!mask.area()) continue;
    const float factor = metadata.scores_at_original_size ? mask.mean_inside : 1;
    instances.push_back({label, found.scores[i] * factor, std::move(mask)});
  }
  return instances;
}

struct Colour {
  uint8_t red, green, blue;
};

// Hues a golden angle apart: neighbours in the list never look alike.
Colour colour_of(size_t index) {
  const double hue = std::fmod(0.02 + double(index) * (std::sqrt(5.0) - 1) / 2, 1);
  const auto part = [&](double shift) {
    const double distance = std::abs(std::fmod(hue + shift, 1) * 6 - 3) - 1;
    return uint8_t(std::lround(255 * std::clamp(distance, 0.0, 1.0)));
  };
  return {part(0), part(2 / 3.), part(1 / 3.)};
}

// Colours masks and outlines; where they overlap the surest, which comes first, is seen.
Image draw(Image picture, const std::vector<Instance>& instances) {
  const auto [height, width] = picture.size;
  std::vector<bool> is_filled(size_t(height) * width);
  for (size_t i = 0; i < instances.size(); ++i) {
    const std::vector<uint8_t> pixels = instances[i].mask.pixels();
    const auto [red, green, blue] = colour_of(i);
    const auto inside = [&, h = height, w = width](int y, int x) {
      return y >= 0 && y < h && x >= 0 && x < w && pixels[size_t(y) * w + x];
    };
    for (int y = 0; y < height; ++y)
      for (int x = 0; x < width; ++x) {
        const size_t at = size_t(y) * width + x;
        if (!pixels[at] || is_filled[at]) continue;
        is_filled[at] = true;
        const bool is_edge = !inside(y - 1, x) || !inside(y + 1, x) || !inside(y, x - 1) || !inside(y, x + 1);
        const double opacity = is_edge ? 1 : 0.45;
        uint8_t* pixel = picture.row(y) + 3 * x;
        for (const uint8_t part : {red, green, blue}) {
          *pixel = uint8_t(std::lround((1 - opacity) * *pixel + opacity * part));
          ++pixel;
        }
      }
  }
  return picture;
}

void print(const Metadata& metadata, const std::vector<Instance>& instances) {
  for (size_t i = 0; i < instances.size(); ++i) {
    const auto& [label, score, mask] = instances[i];
    const auto [red, green, blue] = colour_of(i);
    std::printf("  %-20s %.4f  %8lld pixels  #%02x%02x%02x\n", metadata.class_names[label].c_str(),
                score, static_cast<long long>(mask.area()), red, green, blue);
  }
}

void append_json(std::string& json, size_t image_id, const Metadata& metadata, const Instance& instance) {
  const auto& [label, score, mask] = instance;
  char number[32];
  std::snprintf(number, sizeof number, "%.9g", score);
  json += json.empty() ? "[" : ",\n ";
  json += "{\"image_id\": " + std::to_string(image_id) +
          ", \"category_id\": " + std::to_string(*metadata.category_ids[label]) +
          ", \"score\": " + number + ", \"segmentation\": {\"size\": [" + std::to_string(mask.size.height) +
          ", " + std::to_string(mask.size.width) + "], \"counts\": " + quoted(mask.counts()) + "}}";
}

Network open_network(const std::string& path, const Options& options) {
  if (!std::filesystem::is_regular_file(path)) throw std::runtime_error("there is no file " + path);
  try {
    return Network(path, options);
  } catch (const std::exception& error) {
    throw std::runtime_error("model " + path + " cannot be opened: " + error.what());
  }
}

int run(const Arguments& arguments) {
  Network network = open_network(arguments.model, arguments.options);
  const Metadata metadata = read_metadata(network.metadata());
  if (!arguments.output.empty()) std::filesystem::create_directories(arguments.output);
  std::string json;
  for (size_t i = 0; i < arguments.photos.size(); ++i) {
    const std::string& path = arguments.photos[i];
    const Image photo = read_image(path);
    const auto start = std::chrono::steady_clock::now();
    std::vector<Instance> instances = find_instances(photo, network, metadata);
    const std::chrono::duration<double, std::milli> passed = std::chrono::steady_clock::now() - start;
    for (const Instance& instance : instances) append_json(json, i + 1, metadata, instance);

    const auto is_shown = [&](const Instance& instance) { return instance.score >= arguments.score; };
    instances.erase(std::stable_partition(instances.begin(), instances.end(), is_shown), instances.end());
    std::stable_sort(instances.begin(), instances.end(),
                     [](const Instance& a, const Instance& b) { return a.score > b.score; });
    std::printf("%s: %zu objects of score %g or more, %.0f ms\n", path.c_str(), instances.size(),
                arguments.score, passed.count());
    print(metadata, instances);
    if (arguments.output.empty()) continue;
    const auto name = std::filesystem::path(path).stem().string() + ".png";
    write_png((std::filesystem::path(arguments.output) / name).string(), draw(photo, instances));
  }
  if (!arguments.json.empty()) {
    std::ofstream file(arguments.json);
    file << (json.empty() ? "[" : json) << "]\n";
    if (!file.flush()) throw std::runtime_error(arguments.json + " cannot be written");
  }
  return 0;
}

}  // namespace

int main(int count, char** values) {
  try {
    return run(parse(count, values));
  } catch (const std::invalid_argument& error) {
    std::cerr << error.what() << '\n' << kUsage;
    return 2;
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
