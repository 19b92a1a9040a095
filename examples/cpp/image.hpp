// Photos in, pictures out: RGB, 8 bits, as Pillow reads, resizes and writes them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

struct Size {
  int height = 0, width = 0;
};

struct Image {
  Size size;
  std::vector<uint8_t> rgb;  // [height, width, 3]

  Image() = default;
  explicit Image(Size s) : size(s), rgb(size_t(s.height) * s.width * 3) {}
  uint8_t* row(int y) { return rgb.data() + size_t(y) * size.width * 3; }
  const uint8_t* row(int y) const { return rgb.data() + size_t(y) * size.width * 3; }
};

// A JPEG or PNG file, turned by its EXIF orientation; transparency is dropped, grey becomes RGB and
// 16 bits keep the upper eight. Throws std::runtime_error, with the path, where it cannot be read.
Image read_image(const std::string& path);

// Pillow's Image.resize(..., BILINEAR), equal to the bit: antialiased when it shrinks. OpenCV's and
// the runtimes' own resizes are other functions, with other results.
Image resize(const Image& image, Size size);

// The image in the upper left corner of a larger one, black elsewhere.
Image pad(const Image& image, Size size);

void write_png(const std::string& path, const Image& image);
