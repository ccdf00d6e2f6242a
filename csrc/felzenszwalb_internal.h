// What the three stages of felzenszwalb share: planes and weights (felzenszwalb_weights.cpp), the order of
// the edges (felzenszwalb_sort.cpp), merging and the batch (felzenszwalb.cpp).
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "felzenszwalb.h"

namespace segclip::detail {

using Code = uint32_t;  // an edge: direction << 30 | pixel; ascending codes are scikit-image's edge order
constexpr int kPixelBits = 30;
constexpr Code kPixelMask = (Code{1} << kPixelBits) - 1;

struct Component {
  int32_t size;
  float threshold;  // Int(C) + k / |C|, rounded to float32 as scikit-image stores it
};

struct Workspace {
  std::vector<double> planes;  // (C, H, W), blurred
  std::vector<double> plane;   // (H, W), one channel before the blur
  std::vector<double> row;     // W + 2 radius
  std::vector<const double*> before, after;
  std::vector<double>
      weights;  // (4, H, W): right, down, down-right, up-right; cells without an edge are unused
  std::vector<uint64_t> records, spare;
  std::vector<std::pair<uint64_t, Code>> wide, wide_spare;
  std::vector<Code> order, rejected;
  std::vector<int32_t> parent;
  std::vector<Component> component;

  size_t bytes() const {  // of the large ones
    return 8 * (planes.capacity() + plane.capacity() + weights.capacity() + records.capacity() +
                spare.capacity() + component.capacity()) +
           16 * (wide.capacity() + wide_spare.capacity()) +
           4 * (order.capacity() + rejected.capacity() + parent.capacity());
  }
};

// One image: the view, its edges' geometry and where its labels go.
struct Image {
  const void* data;
  const ImageBatch& batch;
  int64_t height, width, channels, pixels;

  // Edges of direction d from pixel p join p + first(d) and p + second(d).
  std::array<int32_t, 4> first() const { return {0, 0, 0, 1}; }
  std::array<int32_t, 4> second() const {
    const auto w = static_cast<int32_t>(width);
    return {1, w, w + 1, w};
  }
  int64_t rows(int direction) const { return direction == 0 ? height : height - 1; }
  int64_t columns(int direction) const { return direction == 1 ? width : width - 1; }
};

inline uint64_t bits_of(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline double weight_of(Code code, const std::vector<double>& weights, int64_t pixels) {
  return weights[(code >> kPixelBits) * pixels + (code & kPixelMask)];
}

template <typename Visit>
void for_each_edge(const Image& image, const std::vector<double>& weights, Visit visit) {
  for (int direction = 0; direction < 4; ++direction) {
    const int64_t count = image.columns(direction);
    for (int64_t y = 0; y < image.rows(direction); ++y) {
      const int64_t start = y * image.width;
      const double* w = weights.data() + direction * image.pixels + start;
      const Code code = static_cast<Code>(direction) << kPixelBits | static_cast<Code>(start);
      for (int64_t x = 0; x < count; ++x) visit(bits_of(w[x]), code + static_cast<Code>(x));
    }
  }
}

// Fills ws.planes with the channels as float64, blurred, and ws.weights with the length of every edge.
void weigh_edges(const Image& image, const std::vector<double>& taps, Workspace& ws);

// Fills ws.order with the edges in the order (weight, code).
void sort_edges(const Image& image, Workspace& ws);

}  // namespace segclip::detail
