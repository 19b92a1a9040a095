#include "image.hpp"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <csetjmp>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>

#include <jpeglib.h>
#include <jerror.h>
#include <png.h>

namespace {

constexpr int64_t kMaxPixels = 178956970;  // Pillow's limit: a file of a kilobyte can claim any size
using File = std::unique_ptr<FILE, int (*)(FILE*)>;

File open_file(const std::string& path, const char* mode) {
  File file(std::fopen(path.c_str(), mode), std::fclose);
  if (!file) throw std::runtime_error(path + ": " + std::strerror(errno));
  return file;
}

Image of_size(uint32_t height, uint32_t width) {
  if (int64_t(height) * width > kMaxPixels)
    throw std::runtime_error("it claims " + std::to_string(width) + " x " + std::to_string(height) +
                             " pixels, expected " + std::to_string(kMaxPixels) + " in all or fewer");
  return Image({int(height), int(width)});
}

// The orientation, 1 to 8, in EXIF data: a TIFF header, then entries of 12 bytes.
int orientation_of(const uint8_t* exif, size_t length) {
  if (length < 8) return 1;
  const bool little = exif[0] == 'I';
  const auto number = [&](size_t at, size_t bytes) {
    uint32_t value = 0;
    for (size_t i = 0; i < bytes; ++i) value = value << 8 | exif[at + (little ? bytes - 1 - i : i)];
    return value;
  };
  const size_t first = number(4, 4);
  if (first + 2 > length) return 1;
  for (size_t i = 0, count = number(first, 2); i < count; ++i) {
    const size_t entry = first + 2 + 12 * i;
    if (entry + 12 > length) return 1;
    if (number(entry, 2) != 0x0112) continue;
    const uint32_t value = number(entry + 8, 2);
    return number(entry + 2, 2) == 3 && value <= 8 ? std::max(value, 1u) : 1;
  }
  return 1;
}

Image turned(const Image& image, int orientation) {
  if (orientation == 1) return image;
  const auto [h, w] = image.size;
  const bool swaps = orientation >= 5;
  Image result(swaps ? Size{w, h} : image.size);
  const bool from_right = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
  const bool from_below = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
  for (int y = 0; y < result.size.height; ++y)
    for (int x = 0; x < result.size.width; ++x) {
      const int source_y = swaps ? x : y, source_x = swaps ? y : x;
      std::memcpy(result.row(y) + 3 * x,
                  image.row(from_below ? h - 1 - source_y : source_y) +
                      3 * (from_right ? w - 1 - source_x : source_x),
                  3);
    }
  return result;
}

// libjpeg and libpng report errors to a function that must not return: it jumps back to the reader.
// What the reader makes lies beside the place it jumps to, where no register can lose it.
struct JpegReading {
  jpeg_error_mgr errors;
  std::jmp_buf back;
  char message[JMSG_LENGTH_MAX];
  Image image;
  int orientation = 1;
};

Image read_jpeg(FILE* file) {
  jpeg_decompress_struct jpeg = {};
  const std::unique_ptr<jpeg_decompress_struct, void (*)(jpeg_decompress_struct*)> guard(
      &jpeg, jpeg_destroy_decompress);
  JpegReading reading;
  jpeg.err = jpeg_std_error(&reading.errors);
  jpeg.client_data = &reading;
  reading.errors.error_exit = [](j_common_ptr common) {
    auto* its_reading = static_cast<JpegReading*>(common->client_data);
    common->err->format_message(common, its_reading->message);
    std::longjmp(its_reading->back, 1);
  };
  reading.errors.emit_message = [](j_common_ptr common, int level) {
    const bool is_cut_off = level < 0 && common->err->msg_code == JWRN_JPEG_EOF;
    if (is_cut_off) common->err->error_exit(common);  // like Pillow; libjpeg would fill up with grey
  };
  if (setjmp(reading.back)) throw std::runtime_error(reading.message);
  jpeg_create_decompress(&jpeg);
  jpeg_stdio_src(&jpeg, file);
  jpeg_save_markers(&jpeg, JPEG_APP0 + 1, 0xFFFF);
  jpeg_read_header(&jpeg, TRUE);
  if (jpeg.num_components == 4)
    throw std::runtime_error("it has the four colours of print (CMYK); save it as RGB");
  jpeg.out_color_space = JCS_RGB;
  reading.image = of_size(jpeg.image_height, jpeg.image_width);
  for (auto marker = jpeg.marker_list; marker; marker = marker->next)
    if (marker->data_length > 6 && !std::memcmp(marker->data, "Exif\0\0", 6))
      reading.orientation = orientation_of(marker->data + 6, marker->data_length - 6);
  jpeg_start_decompress(&jpeg);
  while (jpeg.output_scanline < jpeg.output_height) {
    JSAMPROW row = reading.image.row(int(jpeg.output_scanline));
    jpeg_read_scanlines(&jpeg, &row, 1);
  }
  return turned(reading.image, reading.orientation);
}

struct PngReading {
  png_structp png = nullptr;
  png_infop info = nullptr;
  std::jmp_buf back;
  std::string message;
  Image image;

  ~PngReading() { png_destroy_read_struct(&png, &info, nullptr); }
};

Image read_png(FILE* file) {
  PngReading reading;
  const auto fail = [](png_structp png, png_const_charp message) {
    auto* its_reading = static_cast<PngReading*>(png_get_error_ptr(png));
    its_reading->message = message;
    std::longjmp(its_reading->back, 1);
  };
  png_structp png = reading.png = png_create_read_struct(
      PNG_LIBPNG_VER_STRING, &reading, fail, [](png_structp, png_const_charp) {});
  png_infop info = reading.info = png_create_info_struct(png);
  if (setjmp(reading.back)) throw std::runtime_error(reading.message);
  png_init_io(png, file);
  png_read_info(png, info);
  reading.image = of_size(png_get_image_height(png, info), png_get_image_width(png, info));
  png_set_expand(png);
  png_set_strip_16(png);
  png_set_gray_to_rgb(png);
  png_set_strip_alpha(png);
  const int passes = png_set_interlace_handling(png);
  png_read_update_info(png, info);
  for (int pass = 0; pass < passes; ++pass)
    for (int y = 0; y < reading.image.size.height; ++y)
      png_read_row(png, reading.image.row(y), nullptr);
  png_read_end(png, info);
  png_bytep exif = nullptr;
  png_uint_32 length = 0;
  const bool has_exif = png_get_eXIf_1(png, info, &length, &exif);
  return turned(reading.image, has_exif ? orientation_of(exif, length) : 1);
}

// Pillow's weights of one axis, as whole numbers: for each pixel of the result the first pixel of
// the source, and the weights of it and the following ones.
constexpr int kPrecision = 32 - 8 - 2;  // bits behind the point

struct Weights {
  int first;
  std::vector<int32_t> weights;
};

std::vector<Weights> resize_weights(int source, int target) {
  const double scale = double(source) / target, filter_scale = std::max(scale, 1.0);
  std::vector<Weights> result(target);
  for (int x = 0; x < target; ++x) {
    const double centre = (x + 0.5) * scale;
    const int first = std::max(int(centre - filter_scale + 0.5), 0);
    const int end = std::min(int(centre + filter_scale + 0.5), source);
    std::vector<double> exact(end - first);
    double total = 0;
    for (int i = 0; i < end - first; ++i) {
      const double distance = std::abs((i + first - centre + 0.5) * (1.0 / filter_scale));
      total += exact[i] = std::max(1.0 - distance, 0.0);
    }
    result[x].first = first;
    for (double weight : exact)
      result[x].weights.push_back(int32_t(0.5 + weight / total * (1 << kPrecision)));
  }
  return result;
}

uint8_t rounded(int32_t sum) { return uint8_t(std::clamp(sum >> kPrecision, 0, 255)); }

Image resize_width(const Image& image, int width) {
  const auto weights = resize_weights(image.size.width, width);
  Image result({image.size.height, width});
  for (int y = 0; y < image.size.height; ++y)
    for (int x = 0; x < width; ++x) {
      const uint8_t* source = image.row(y) + 3 * weights[x].first;
      int32_t red = 1 << (kPrecision - 1), green = red, blue = red;
      for (int32_t weight : weights[x].weights) {
        red += weight * source[0], green += weight * source[1], blue += weight * source[2];
        source += 3;
      }
      uint8_t* made = result.row(y) + 3 * x;
      made[0] = rounded(red), made[1] = rounded(green), made[2] = rounded(blue);
    }
  return result;
}

Image resize_height(const Image& image, int height) {
  const auto weights = resize_weights(image.size.height, height);
  Image result({height, image.size.width});
  std::vector<int32_t> sums(size_t(image.size.width) * 3);
  for (int y = 0; y < height; ++y) {
    std::fill(sums.begin(), sums.end(), 1 << (kPrecision - 1));
    int source = weights[y].first;
    for (int32_t weight : weights[y].weights) {
      const uint8_t* row = image.row(source++);
      for (size_t i = 0; i < sums.size(); ++i) sums[i] += weight * row[i];
    }
    std::transform(sums.begin(), sums.end(), result.row(y), rounded);
  }
  return result;
}

}  // namespace

Image read_image(const std::string& path) {
  const File file = open_file(path, "rb");
  uint8_t head[8] = {};
  const size_t length = std::fread(head, 1, sizeof head, file.get());
  std::rewind(file.get());
  try {
    if (length >= 3 && !std::memcmp(head, "\xff\xd8\xff", 3)) return read_jpeg(file.get());
    if (length == 8 && !png_sig_cmp(head, 0, 8)) return read_png(file.get());
    throw std::runtime_error("it is neither JPEG nor PNG; convert it");
  } catch (const std::runtime_error& error) {
    throw std::runtime_error("image " + path + " cannot be read: " + error.what());
  }
}

Image resize(const Image& image, Size size) {
  const int fewer_rows = image.size.height - size.height, fewer_columns = image.size.width - size.width;
  // Each pass rounds, so their order counts. This is Pillow's since 13; before, columns came first.
  const bool rows_first = fewer_rows > 0 && fewer_rows > 2 * fewer_columns;
  Image result = image;
  for (const bool is_rows : {rows_first, !rows_first}) {
    if (is_rows && result.size.height != size.height) result = resize_height(result, size.height);
    if (!is_rows && result.size.width != size.width) result = resize_width(result, size.width);
  }
  return result;
}

Image pad(const Image& image, Size size) {
  Image result(size);
  for (int y = 0; y < image.size.height; ++y)
    std::memcpy(result.row(y), image.row(y), size_t(image.size.width) * 3);
  return result;
}

void write_png(const std::string& path, const Image& image) {
  png_image png = {};
  png.version = PNG_IMAGE_VERSION;
  png.width = png_uint_32(image.size.width);
  png.height = png_uint_32(image.size.height);
  png.format = PNG_FORMAT_RGB;
  if (!png_image_write_to_file(&png, path.c_str(), 0, image.rgb.data(), 0, nullptr))
    throw std::runtime_error(path + " cannot be written: " + png.message);
}
