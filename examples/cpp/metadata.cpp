#include "metadata.hpp"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <variant>

namespace {

constexpr size_t kMaxBytes = 1 << 22;
constexpr int kMaxDepth = 32, kMaxSide = 1 << 14, kMaxMasks = 1 << 16;

struct Json;
using Array = std::vector<Json>;
using Object = std::map<std::string, Json>;
struct Json {
  std::variant<std::nullptr_t, bool, double, std::string, Array, Object> value = nullptr;
};

// Reads one JSON text, of bounded length and depth.
class Parser {
 public:
  explicit Parser(const std::string& text) : at_(text.c_str()), end_(at_ + text.size()) {}

  Json document() {
    Json result = value(0);
    space();
    if (at_ != end_) fail();
    return result;
  }

 private:
  [[noreturn]] static void fail() { throw std::runtime_error("the model's metadata is no JSON"); }
  void space() { at_ += std::strspn(at_, " \t\r\n"); }
  bool takes(char wanted) { return space(), *at_ == wanted ? (++at_, true) : false; }
  void take(char wanted) {
    if (!takes(wanted)) fail();
  }
  void word(const char* wanted) {
    if (std::strncmp(at_, wanted, std::strlen(wanted))) fail();
    at_ += std::strlen(wanted);
  }

  Json value(int depth) {
    if (depth > kMaxDepth) fail();
    space();
    switch (*at_) {
      case '{': return {object(depth)};
      case '[': return {array(depth)};
      case '"': return {string()};
      case 't': return word("true"), Json{true};
      case 'f': return word("false"), Json{false};
      case 'n': return word("null"), Json{nullptr};
      default: return {number()};
    }
  }

  Object object(int depth) {
    Object result;
    take('{');
    if (takes('}')) return result;
    do {
      space();
      const std::string key = string();
      take(':');
      result[key] = value(depth + 1);
    } while (takes(','));
    take('}');
    return result;
  }

  Array array(int depth) {
    Array result;
    take('[');
    if (takes(']')) return result;
    do result.push_back(value(depth + 1));
    while (takes(','));
    take(']');
    return result;
  }

  double number() {
    const size_t length = std::strspn(at_, "+-.0123456789eE");
    char* stop = nullptr;
    const double result = std::strtod(at_, &stop);
    if (!length || stop != at_ + length) fail();
    at_ = stop;
    return result;
  }

  std::string string() {
    std::string result;
    take('"');
    for (; *at_ != '"'; ++at_) {
      if (static_cast<unsigned char>(*at_) < 0x20) fail();  // the end, too
      if (*at_ != '\\') {
        result += *at_;
        continue;
      }
      static const std::string escapes = "\"\\/bfnrt", meant = "\"\\/\b\f\n\r\t";
      if (*++at_ == 'u')
        utf8(code_point(), result);
      else if (const size_t i = *at_ ? escapes.find(*at_) : std::string::npos; i != std::string::npos)
        result += meant[i];
      else
        fail();
    }
    ++at_;
    return result;
  }

  uint32_t hexadecimal() {  // the four digits after "u"; ends on the last
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
      const char* digits = "0123456789abcdef";
      const char* digit = *++at_ ? std::strchr(digits, std::tolower(static_cast<unsigned char>(*at_))) : nullptr;
      if (!digit) fail();
      result = result << 4 | uint32_t(digit - digits);
    }
    return result;
  }

  uint32_t code_point() {
    const uint32_t first = hexadecimal();
    if (first < 0xD800 || first > 0xDBFF) return first;
    if (*++at_ != '\\' || *++at_ != 'u') fail();
    return 0x10000 + ((first & 0x3FF) << 10 | (hexadecimal() & 0x3FF));
  }

  static void utf8(uint32_t code, std::string& to) {
    if (code < 0x80) {
      to += char(code);
      return;
    }
    const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    to += char((0xFF00 >> (more + 1) & 0xFF) | code >> 6 * more);
    for (int i = more - 1; i >= 0; --i) to += char(0x80 | (code >> 6 * i & 0x3F));
  }

  const char* at_;
  const char* end_;
};

const Json& member(const Object& object, const std::string& key) {
  const auto found = object.find(key);
  if (found == object.end()) throw std::runtime_error("the model's metadata lacks \"" + key + '"');
  return found->second;
}

[[noreturn]] void refuse(const std::string& key, const std::string& expected) {
  throw std::runtime_error("the model's metadata: expected " + expected + " as \"" + key + '"');
}

template <typename T>
const T& get(const Object& object, const std::string& key, const char* expected) {
  const T* value = std::get_if<T>(&member(object, key).value);
  if (!value) refuse(key, expected);
  return *value;
}

double number(const Json& json, const std::string& key, double least, double most, bool whole) {
  const double* value = std::get_if<double>(&json.value);
  if (!value || !(*value >= least && *value <= most) || (whole && *value != std::floor(*value)))
    refuse(key, "a number of " + std::to_string(least) + " to " + std::to_string(most));
  return *value;
}

}  // namespace

Metadata read_metadata(const std::string& text) {
  if (text.size() > kMaxBytes) throw std::runtime_error("the model's metadata is too long");
  const Json json = Parser(text).document();
  const Object* object = std::get_if<Object>(&json.value);
  if (!object) throw std::runtime_error("the model's metadata is no JSON object");
  const auto whole = [&](const char* key, int least, int most) {
    return int(number(member(*object, key), key, least, most, true));
  };
  if (whole("schema", 0, kMaxSide) != 1)
    throw std::runtime_error("the model's metadata has a schema this program does not know; "
                             "export it with the package's version that the program came with");
  if (get<std::string>(*object, "resize", "a text") != "pillow_bilinear" ||
      get<std::string>(*object, "protocol", "a text") != "original")
    throw std::runtime_error("the model follows the test procedure of another implementation, "
                             "which this program does not; export it with eval.protocol=original");
  Metadata result;
  for (const Json& name : get<Array>(*object, "class_names", "a list")) {
    const auto* value = std::get_if<std::string>(&name.value);
    if (!value) refuse("class_names", "a list of texts");
    result.class_names.push_back(*value);
  }
  for (const Json& id : get<Array>(*object, "category_ids", "a list")) {
    result.category_ids.emplace_back();
    const bool is_left_out = std::holds_alternative<std::nullptr_t>(id.value);
    if (!is_left_out) result.category_ids.back() = number(id, "category_ids", -0x1p53, 0x1p53, true);
  }
  if (result.class_names.empty() || result.class_names.size() != result.category_ids.size())
    refuse("class_names", "as many names as category_ids");
  result.shortest_side = whole("shortest_side", 1, kMaxSide);
  result.longest_side = whole("longest_side", 1, kMaxSide);
  result.size_multiple = whole("size_multiple", 1, kMaxSide);
  result.num_masks = whole("num_masks", 1, kMaxMasks);
  result.mask_stride = whole("mask_stride", 1, 32);
  result.mask_threshold = float(number(member(*object, "mask_threshold"), "mask_threshold", 0, 1, false));
  result.masks_are_logits = get<bool>(*object, "masks_are_logits", "true or false");
  result.scores_at_original_size = get<bool>(*object, "scores_at_original_size", "true or false");
  if (const auto* sides = std::get_if<Array>(&member(*object, "fixed_size").value)) {
    if (sides->size() != 2) refuse("fixed_size", "two lengths");
    result.fixed_size = Size{int(number((*sides)[0], "fixed_size", 1, kMaxSide, true)),
                             int(number((*sides)[1], "fixed_size", 1, kMaxSide, true))};
  }
  return result;
}

// detectron2's ResizeShortestEdge: both sides stay unrounded until the end.
Size Metadata::resized(Size photo) const {
  double scale = double(shortest_side) / std::min(photo.height, photo.width);
  double height = scale * photo.height, width = scale * photo.width;
  (photo.height < photo.width ? height : width) = shortest_side;
  if (std::max(height, width) > longest_side) {
    scale = longest_side / std::max(height, width);
    height *= scale, width *= scale;
  }
  const auto rounded = [&] { return Size{std::max(int(height + 0.5), 1), std::max(int(width + 0.5), 1)}; };
  const Size size = rounded();
  if (!fixed_size || (size.height <= fixed_size->height && size.width <= fixed_size->width)) return size;
  scale = std::min(double(fixed_size->height) / photo.height, double(fixed_size->width) / photo.width);
  height = photo.height * scale, width = photo.width * scale;
  return rounded();
}

Size Metadata::padded(Size size) const {
  const auto up = [this](int side) { return (side + size_multiple - 1) / size_multiple * size_multiple; };
  return fixed_size ? *fixed_size : Size{up(size.height), up(size.width)};
}

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char letter : text) {
    char escape[8] = {letter};
    if (static_cast<unsigned char>(letter) < 0x20)
      std::snprintf(escape, sizeof escape, "\\u%04x", letter);
    else if (letter == '"' || letter == '\\')
      std::snprintf(escape, sizeof escape, "\\%c", letter);
    result += escape;
  }
  return result + '"';
}
