// What the three stages of felzenszwalb share: planes and weights (felzenszwalb_weights.cpp), levels of edges
// in order (felzenszwalb_sort.cpp), merging and the batch (felzenszwalb.cpp). Real is double or float.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "felzenszwalb.h"

// The hot loops are compiled several times and chosen at load time. No version contracts a*b+c, so all give
// the same bits.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__)
#define SEGCLIP_MULTIVERSION __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define SEGCLIP_MULTIVERSION
#endif

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

// An edge: key << 32 | code.
using Record = uint64_t;

struct WideRecord {  // an edge with all bits of its weight
  uint64_t bits;
  Code code;
};

constexpr uint32_t kLastKey = ~uint32_t{0};
constexpr int kLevels = 5;  // more would leave fewer edges to sort, but each looks at all of them

// The edges whose keys are first .. last. Levels are merged one after the other, lightest first.
struct Level {
  uint32_t first, last;
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
  Buffer<Real> weights;   // (4, H, W): right, down, down-right, up-right; cells without an edge are unused
  Buffer<float> rounded;  // the same in float32, in float64 only
  Buffer<uint8_t> mask;   // of one row of edges: 1 where the level takes it
  Buffer<Record> records, spare;        // edges of one level
  Buffer<WideRecord> wide, wide_spare;  // of a level whose keys are not enough
  Buffer<Code> rejected;                // by the first pass, in order
  Buffer<int32_t> parent;
  Buffer<Component> component;

  size_t bytes() const {  // of the large ones
    return planes.bytes() + plane.bytes() + weights.bytes() + rounded.bytes() + records.bytes() +
           spare.bytes() + wide.bytes() + wide_spare.bytes() + rejected.bytes() + parent.bytes() +
           component.bytes();
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

// The weights rounded to float32. Their bits are the edges' keys, which order no two edges the wrong way
// round.
inline const float* rounded_weights(const Workspace<double>& ws) { return ws.rounded.data(); }
inline const float* rounded_weights(const Workspace<float>& ws) { return ws.weights.data(); }

// Fills ws.planes with the blurred channels, and ws.weights with the length of every edge.
template <typename Real>
void weigh_edges(const Image& image, const std::vector<double>& taps, Workspace<Real>& ws);

// Last keys of the levels, ascending, so that each has about as many edges. Any ends give the same result.
template <typename Real>
std::array<uint32_t, kLevels> level_ends(const Image& image, const Workspace<Real>& ws);

// Fills ws.records with those edges of the level whose ends have different parents, in the order (weight,
// code), and returns their number.
template <typename Real>
size_t take_level(const Image& image, Level level, Workspace<Real>& ws);

}  // namespace segclip::detail
