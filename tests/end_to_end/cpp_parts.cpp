// The parts of examples/cpp that must equal the package's, one at a time, for test_cpp.py.
#include <cstdio>
#include <iostream>
#include <iterator>
#include <string>

#include "masks.hpp"

int main(int count, char** values) try {
  const std::string part = count > 1 ? values[1] : "";
  if (part == "read" && count == 4) {  // PHOTO PICTURE
    write_png(values[3], read_image(values[2]));
  } else if (part == "resize" && count == 6) {  // PHOTO HEIGHT WIDTH PICTURE
    write_png(values[5], resize(read_image(values[2]), {std::stoi(values[3]), std::stoi(values[4])}));
  } else if (part == "taps" && count == 6) {  // GRID STRIDE VALID LENGTH
    const AxisTaps taps = upsampling_taps(std::stoi(values[2]), std::stoi(values[3]), std::stoi(values[4]),
                                          std::stoi(values[5]));
    for (size_t i = 0; i < taps.first.size(); ++i)
      std::printf("%d %.9g %.9g %.9g\n", taps.first[i], taps.weights[3 * i], taps.weights[3 * i + 1],
                  taps.weights[3 * i + 2]);
  } else if (part == "masks" && count == 11) {  // GRID (two lengths) STRIDE VALID SIZE (two each) THRESHOLD ARE_LOGITS; the grid on standard input
    const auto size = [&](int at) { return Size{std::stoi(values[at]), std::stoi(values[at + 1])}; };
    const Size grid = size(2), valid = size(5), photo = size(7);
    Metadata metadata = {};
    metadata.mask_threshold = std::stof(values[9]);
    metadata.masks_are_logits = std::stoi(values[10]);
    const int stride = std::stoi(values[4]);
    const AxisTaps rows = upsampling_taps(grid.height, stride, valid.height, photo.height);
    const AxisTaps columns = upsampling_taps(grid.width, stride, valid.width, photo.width);
    const std::vector<float> mask(std::istream_iterator<float>(std::cin), {});
    if (mask.size() != size_t(grid.height) * grid.width) return 2;
    const Mask made = upsample(mask.data(), grid, rows, columns, metadata);
    std::printf("%s %lld %.9g\n", made.counts().c_str(), static_cast<long long>(made.area()), made.mean_inside);
  } else if (part == "sizes" && count == 4) {  // HEIGHT WIDTH; the JSON on standard input
    const Metadata metadata = read_metadata({std::istreambuf_iterator<char>(std::cin), {}});
    const Size resized = metadata.resized({std::stoi(values[2]), std::stoi(values[3])});
    const Size padded = metadata.padded(resized);
    std::printf("%d %d %d %d\n", resized.height, resized.width, padded.height, padded.width);
  } else if (part == "metadata") {  // the JSON on standard input
    const std::string text(std::istreambuf_iterator<char>(std::cin), {});
    const Metadata metadata = read_metadata(text);
    for (const auto& name : metadata.class_names) std::cout << quoted(name) << '\n';
  } else {
    return 2;
  }
  return 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
