// What the three stages of felzenszwalb share: planes and weights (felzenszwalb_weights.cpp), the order of
// the edges (felzenszwalb_sort.cpp), merging and the batch (felzenszwalb.cpp). Real is double or float.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

#include "felzenszwalb.h"

namespace segclip::detail {

using Code = uint32_t;  // an edge: direction << 30 | pixel; ascending codes are scikit-image's edge order
constexpr int kPixelBits = 30;
constexpr Code kPixelMask = (Code{1} << kPixelBits) - 1;

template <typename Real>
using BitsOf = std::conditional_t<sizeof(Real) == 8, uint64_t, uint32_t>;

struct Component {
  int32_t size;
  float threshold;  // Int(C) + k / |C|, rounded to float32 as scikit-image stores it
};

struct WideRecord {  // an edge with all bits of its weight
  uint64_t bits;
  Code code;
};

// Memory that is kept from image to image and never initialised; what it holds is lost when it grows.
template <typename T>
class Buffer {
 public:
  T* at_least(size_t count) {
    if (count > capacity_) {
      capacity_ = 0;
      data_.reset();  // before the new one is there: both may not fit
      data_.reset(new T[count]);
      capacity_ = count;
    }
    return data_.get();
  }
  T* data() const { return data_.get(); }
  size_t bytes() const { return capacity_ * sizeof(T); }

 private:
  std::unique_ptr<T[]> data_;
  size_t capacity_ = 0;
};

// Everything one image needs beside its pixels and labels; one thread at a time uses it.
template <typename Real>
struct Workspace {
  Buffer<Real> planes;                // (C, H, W), blurred
  Buffer<Real> plane;                 // (H, W), one channel before the blur
  Buffer<Real> row;                   // W + 2 radius, or one value per channel
  Buffer<Real> taps;                  // right half of the Gaussian
  Buffer<const Real*> before, after;  // rows or row positions the blur adds up
  Buffer<Real> weights;  // (4, H, W): right, down, down-right, up-right; cells without an edge are unused
  Buffer<uint64_t> records, spare;      // key << 32 | code
  Buffer<WideRecord> wide, wide_spare;  // float64 only: of edges whose key is not enough
  Buffer<Code> order;                   // sorted edges; those rejected by the first pass replace them
  Buffer<int32_t> parent;
  Buffer<Component> component;

  size_t bytes() const {  // of the large ones
    return planes.bytes() + plane.bytes() + weights.bytes() + records.bytes() + spare.bytes() + wide.bytes() +
           wide_spare.bytes() + order.bytes() + parent.bytes() + component.bytes();
  }
};

// One image: the view and its edges' geometry.
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
  size_t edges() const {
    size_t count = 0;
    for (int direction = 0; direction < 4; ++direction) count += rows(direction) * columns(direction);
    return count;
  }
};

// Weights are not negative, so their bits order as they do.
template <typename Real>
BitsOf<Real> bits_of(Real x) {
  BitsOf<Real> bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

template <typename Real>
Real weight_of(Code code, const Real* weights, int64_t pixels) {
  return weights[(code >> kPixelBits) * pixels + (code & kPixelMask)];
}

// Calls visit(bits of the weight, code) for every edge, codes ascending.
template <typename Real, typename Visit>
void for_each_edge(const Image& image, const Real* weights, Visit visit) {
  for (int direction = 0; direction < 4; ++direction) {
    const int64_t count = image.columns(direction);
    for (int64_t y = 0; y < image.rows(direction); ++y) {
      const int64_t start = y * image.width;
      const Real* w = weights + direction * image.pixels + start;
      const Code code = static_cast<Code>(direction) << kPixelBits | static_cast<Code>(start);
      for (int64_t x = 0; x < count; ++x) visit(bits_of(w[x]), code + static_cast<Code>(x));
    }
  }
}

// Fills ws.planes with the blurred channels, and ws.weights with the length of every edge.
template <typename Real>
void weigh_edges(const Image& image, const std::vector<double>& taps, Workspace<Real>& ws);

// Fills ws.order with all edges in the order (weight, code).
void sort_edges(const Image& image, Workspace<double>& ws);
void sort_edges(const Image& image, Workspace<float>& ws);

}  // namespace segclip::detail
