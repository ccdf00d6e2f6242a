// Felzenszwalb superpixels on a GPU, stage 1: memory, planes and edge weights. The stages that follow are the
// order of the edges (felzenszwalb_device_sort.h) and merging (felzenszwalb_device_merge.h); felzenszwalb.cu
// launches them, felzenszwalb_emulated.cpp runs the same code on the CPU.
//
// Gives the labels of felzenszwalb.h bit for bit: same operations in the same order, no contraction
// (-fmad=false).
#pragma once

#include <cmath>

#include "felzenszwalb.h"
#include "parallel.h"

namespace segclip::device {

using namespace parallel;

using Code = uint32_t;  // an edge: direction << 30 | pixel; ascending codes are scikit-image's edge order
constexpr int kPixelBits = 30;
constexpr Code kPixelMask = (Code{1} << kPixelBits) - 1;
constexpr Code kNoCode = ~Code{0};  // above every edge: direction 3 starts at pixel 0 .. N - 2

constexpr int64_t kMaxDevicePixels = int64_t{1} << 24, kMaxDeviceChannels = 128;  // of one image
constexpr int kMinBinBits = 6, kMaxBinBits = 20;
constexpr int kExponents = 16;  // binades below the largest weight that bins tell apart

template <typename Real>
struct Format;
template <>
struct Format<double> {
  using Bits = uint64_t;
  static constexpr int kFraction = 52;
};
template <>
struct Format<float> {
  using Bits = uint32_t;
  static constexpr int kFraction = 23;
};
template <typename Real>
using BitsOf = typename Format<Real>::Bits;

// Weights are not negative, so their bits order as they do.
template <typename Real>
SEGCLIP_DEVICE BitsOf<Real> bits_of(Real x) {
  BitsOf<Real> bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

struct alignas(8) Component {
  uint32_t size;
  float threshold;  // Int(C) + k / |C| in float32; negative: final, an edge was rejected for its sake
};

template <typename Real>
struct Header {
  BitsOf<Real> largest;  // weight of the image
  uint32_t invalid;      // 1: holds NaN or infinity
};

// Where things lie in the workspace, in bytes: the taps, then one slice for each image.
struct Layout {
  size_t taps = 0, slice = 0;
  size_t header = 0, planes = 0, weights = 0, edges = 0, rest = 0, components = 0, parents = 0, bins = 0;
  int bin_bits = 0;
};

template <typename Real>
Layout layout_of(int64_t height, int64_t width, int64_t channels, int radius) {
  const size_t pixels = static_cast<size_t>(height) * width;
  const auto round_up = [](size_t bytes) { return (bytes + 255) / 256 * 256; };
  Layout layout;
  layout.taps = round_up((radius + 1) * sizeof(Real));
  layout.bin_bits = kMinBinBits;
  while (layout.bin_bits < kMaxBinBits && (pixels * 4 >> layout.bin_bits) > 24) ++layout.bin_bits;
  const auto add = [&](size_t& offset, size_t bytes) {
    offset = layout.slice;
    layout.slice += round_up(bytes);
  };
  const size_t image = channels * pixels * sizeof(Real), minima = pixels * (sizeof(Real) + sizeof(Code));
  const size_t weights = 4 * pixels * sizeof(Real);
  add(layout.header, sizeof(Header<Real>));
  add(layout.planes, image > minima ? image : minima);     // later the minima of the second pass
  add(layout.weights, image > weights ? image : weights);  // before that the planes blurred along one axis
  add(layout.edges, 4 * pixels * sizeof(Code));
  add(layout.rest, 4 * pixels * sizeof(Code));
  add(layout.components, pixels * sizeof(Component));
  add(layout.parents, pixels * sizeof(uint32_t));
  add(layout.bins, (size_t{1} << layout.bin_bits) * sizeof(uint32_t));
  return layout;
}

// What every stage is given, by value.
template <typename Real>
struct Problem {
  ImageBatch images;
  uint32_t pixels = 0;  // of one image
  int height = 0, width = 0;
  double k = 0;  // scale / 255
  uint32_t min_size = 0;
  int radius = -1;  // of the blur; -1: none
  int32_t* labels = nullptr;
  unsigned char* workspace = nullptr;
  Layout layout;

  // Of the batch that was given; data, batch and labels may still be moved on to a part of it.
  Problem(const ImageBatch& batch, const FelzenszwalbParams& params, int32_t* out, void* memory)
      : images(batch),
        pixels(static_cast<uint32_t>(batch.height * batch.width)),
        height(static_cast<int>(batch.height)),
        width(static_cast<int>(batch.width)),
        k(params.scale / 255.0),
        min_size(static_cast<uint32_t>(params.min_size)),
        radius(static_cast<int>(params.taps.size()) - 1),
        labels(out),
        workspace(static_cast<unsigned char*>(memory)),
        layout(layout_of<Real>(batch.height, batch.width, batch.channels, radius)) {}

  template <typename T>
  SEGCLIP_DEVICE T* at(int64_t image, size_t offset) const {
    return reinterpret_cast<T*>(workspace + layout.taps + image * layout.slice + offset);
  }
  SEGCLIP_DEVICE Real* taps() const { return reinterpret_cast<Real*>(workspace); }
  SEGCLIP_DEVICE Header<Real>* header(int64_t image) const { return at<Header<Real>>(image, layout.header); }
  SEGCLIP_DEVICE Real* planes(int64_t image) const { return at<Real>(image, layout.planes); }
  SEGCLIP_DEVICE Real* half_blurred(int64_t image) const { return at<Real>(image, layout.weights); }
  SEGCLIP_DEVICE Real* weights(int64_t image) const { return at<Real>(image, layout.weights); }
};

template <typename Real>
SEGCLIP_DEVICE Real load_pixel(const Problem<Real>& p, int64_t image, uint32_t channel, int y, int x) {
  const ImageBatch& b = p.images;
  const int64_t at =
      image * b.batch_stride + channel * b.channel_stride + y * b.row_stride + x * b.column_stride;
  switch (b.type) {
    case PixelType::kUint8:
      return static_cast<Real>(static_cast<const uint8_t*>(b.data)[at]) * static_cast<Real>(1.0 / 255);
    case PixelType::kFloat32:
      return static_cast<Real>(static_cast<const float*>(b.data)[at]);
    case PixelType::kFloat64:
      break;
  }
  return static_cast<Real>(static_cast<const double*>(b.data)[at]);
}

// Index into 0 .. n-1 of position i in the border extension d c b a | a b c d | d c b a.
SEGCLIP_DEVICE int reflect(int i, int n) {
  if (i >= 0 && i < n) return i;
  i %= 2 * n;
  if (i < 0) i += 2 * n;
  return i < n ? i : 2 * n - 1 - i;
}

// value(0) taps[0] + sum over j = radius .. 1 of (value(-j) + value(j)) taps[j], in this order.
template <typename Real, typename Value>
SEGCLIP_DEVICE Real correlate(const Problem<Real>& p, Value value) {
  const Real* taps = p.taps();
  Real sum = value(0) * taps[0];
  for (int j = p.radius; j >= 1; --j) sum += (value(-j) + value(j)) * taps[j];
  return sum;
}

// ---- Elementwise stages; each runs over all images and 0 <= index < its count before the next one starts.
// Counts fit in 32 bits (2^24 pixels of 128 channels), whose division costs a GPU a fraction of that of 64
// bits.

template <typename Real>
SEGCLIP_DEVICE void clear_header(const Problem<Real>& p, int64_t image, uint32_t /* index < 1 */) {
  *p.header(image) = Header<Real>{};
}

// index < channels * pixels: the plane, down the columns blurred if there is a blur.
template <typename Real>
SEGCLIP_DEVICE void blur_columns(const Problem<Real>& p, int64_t image, uint32_t index) {
  const uint32_t channel = index / p.pixels, pixel = index % p.pixels;
  const int y = static_cast<int>(pixel / p.width), x = static_cast<int>(pixel % p.width);
  const Real here = load_pixel(p, image, channel, y, x);
  if (!(here - here == 0)) relaxed_store(&p.header(image)->invalid, 1u);  // NaN or infinity
  if (p.radius < 0) {
    p.planes(image)[index] = here;
    return;
  }
  p.half_blurred(image)[index] =
      correlate(p, [&](int j) { return load_pixel(p, image, channel, reflect(y + j, p.height), x); });
}

// index < channels * pixels, only if there is a blur: along the rows.
template <typename Real>
SEGCLIP_DEVICE void blur_rows(const Problem<Real>& p, int64_t image, uint32_t index) {
  const int x = static_cast<int>(index % p.width);
  const Real* row = p.half_blurred(image) + (index - x);
  p.planes(image)[index] = correlate(p, [&](int j) { return row[reflect(x + j, p.width)]; });
}

// Distance of two pixels over the channels, summed in NumPy's order: one after the other below 8 channels,
// else in 8 accumulators, which is all there is to it up to 128 channels.
template <typename Real>
SEGCLIP_DEVICE Real distance(const Real* a, const Real* b, uint32_t channels, uint32_t plane) {
  const auto square = [&](uint32_t c) {
    const Real d = a[size_t{c} * plane] - b[size_t{c} * plane];
    return d * d;
  };
  Real sum;
  uint32_t c;
  if (channels < 8) {
    sum = square(0);
    c = 1;
  } else {
    Real r[8];
    for (uint32_t i = 0; i < 8; ++i) r[i] = square(i);
    for (c = 8; c < channels - channels % 8; c += 8)
      for (uint32_t i = 0; i < 8; ++i) r[i] += square(c + i);
    sum = ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7]));
  }
  for (; c < channels; ++c) sum += square(c);
  return std::sqrt(sum);
}

// Edges of direction d from pixel p join p + first(d) and p + second(d): right, down, down-right, up-right.
SEGCLIP_DEVICE uint32_t first_of(uint32_t direction) { return direction == 3; }
SEGCLIP_DEVICE uint32_t second_of(uint32_t direction, uint32_t width) {
  return direction == 0 ? 1 : direction == 2 ? width + 1 : width;
}

// index < pixels: the weights (4, H, W) of its edges; -1 where the border leaves none.
template <typename Real>
SEGCLIP_DEVICE void weigh_edges(const Problem<Real>& p, int64_t image, uint32_t index) {
  const uint32_t width = p.width, height = p.height, channels = static_cast<uint32_t>(p.images.channels);
  const uint32_t y = index / width, x = index % width;
  const Real* here = p.planes(image) + index;
  BitsOf<Real>* largest = &p.header(image)->largest;
  for (uint32_t direction = 0; direction < 4; ++direction) {
    const bool inside = (direction == 0 || y + 1 < height) && (direction == 1 || x + 1 < width);
    Real weight = -1;
    if (inside) {
      weight = distance(here + first_of(direction), here + second_of(direction, width), channels, p.pixels);
      if (bits_of(weight) > relaxed_load(largest)) atomic_max(largest, bits_of(weight));
    }
    p.weights(image)[size_t{direction} * p.pixels + index] = weight;
  }
}

// ---- A block works on one image.

struct Counts {                  // of one image, on the CPU only
  uint64_t edges = 0;            // in bins
  uint64_t united = 0;           // of weight zero
  uint64_t batches = 0;          // of at most kBatch edges
  uint64_t filter_steps = 0;     // loads of a parent while filtering
  uint64_t survivors = 0;        // edges ordered and given to the merging warp
  uint64_t exchanges = 0;        // comparisons of the sorting network in shared memory
  uint64_t stages = 0;           // its steps, a barrier after each
  uint64_t large_exchanges = 0;  // the same in global memory
  uint64_t rounds = 0;           // of the merging warp
  uint64_t round_steps = 0;      // steps to the roots on the longest way of each round
  uint64_t merges = 0, rejected = 0, rest = 0;
  uint64_t small_rounds = 0, small_visits = 0;  // of the second pass
};

struct Block {
  Team all, merging, preparing;  // of a block with one warp the same
  bool merges, prepares;         // which of them this warp is in
  unsigned char* shared;
  size_t shared_bytes;
  Counts* counts = nullptr;
};

struct Plan {  // how far the edges have been taken
  uint32_t edge, bin;
  uint32_t ordered;  // end of a bin larger than a batch whose edges are in order; else equal to `edge`
};

// Shared memory of a block; the parents follow it where they fit. With 224 x 224 pixels two blocks have room
// on a multiprocessor with 228 KB.
template <typename Real>
struct Shared {
  static constexpr uint32_t kBatch = sizeof(Real) == 8 ? 832 : 1120;  // edges that are prepared at a time
  static constexpr int kClaimBits = 8;
  uint32_t claim[1 << kClaimBits];
  uint32_t stage[kLanes];
  uint32_t partial[kMaxWarps];
  Plan plan;
  uint32_t count, ready_count;  // edges in the next batch, and in the one that is being merged
  uint32_t last;                // no edges are left
  uint32_t rest, live, executed;
  Real weight[kBatch];  // from here on to the end, with the parents: before there are any, counts of the bins
  Code code[kBatch];
  Code ready[kBatch];
};

}  // namespace segclip::device
