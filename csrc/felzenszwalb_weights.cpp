#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <type_traits>

#include "felzenszwalb_internal.h"

namespace segclip {
namespace detail {

// out[x] = center[x] * taps[0] + sum over j = radius .. 1 of (before[j][x] + after[j][x]) * taps[j], in this
// order. `out` overlaps none of the inputs.
template <typename Real>
[[gnu::always_inline]] inline void correlate_loop(Real* __restrict out, const Real* center,
                                                  const Real* const* before, const Real* const* after,
                                                  const Real* taps, int radius, int64_t count) {
  int j = radius;
  if (j < 4) {
    for (int64_t x = 0; x < count; ++x) out[x] = center[x] * taps[0];
  } else {  // the first four in one pass: a quarter of the traffic to `out`
    const Real *lo = before[j], *lo1 = before[j - 1], *lo2 = before[j - 2], *lo3 = before[j - 3];
    const Real *hi = after[j], *hi1 = after[j - 1], *hi2 = after[j - 2], *hi3 = after[j - 3];
    const Real tap0 = taps[0], tap = taps[j], tap1 = taps[j - 1], tap2 = taps[j - 2], tap3 = taps[j - 3];
    for (int64_t x = 0; x < count; ++x) {
      const Real far = (center[x] * tap0 + (lo[x] + hi[x]) * tap) + (lo1[x] + hi1[x]) * tap1;
      out[x] = (far + (lo2[x] + hi2[x]) * tap2) + (lo3[x] + hi3[x]) * tap3;
    }
    j -= 4;
  }
  for (; j >= 1; --j) {
    const Real *lo = before[j], *hi = after[j];
    for (int64_t x = 0; x < count; ++x) out[x] += (lo[x] + hi[x]) * taps[j];
  }
}

// out[x] = squared difference of a and b summed over up to 7 channels, first to last, then the square root.
template <typename Real>
[[gnu::always_inline]] inline void distances_loop(Real* __restrict out, const Real* a, const Real* b,
                                                  int64_t count, int64_t channels, int64_t plane) {
  if (channels == 3) {
    const Real *a1 = a + plane, *b1 = b + plane, *a2 = a1 + plane, *b2 = b1 + plane;
    for (int64_t x = 0; x < count; ++x) {
      const Real d = a[x] - b[x], d1 = a1[x] - b1[x], d2 = a2[x] - b2[x];
      out[x] = std::sqrt((d * d + d1 * d1) + d2 * d2);
    }
    return;
  }
  for (int64_t x = 0; x < count; ++x) {
    const Real d = a[x] - b[x];
    out[x] = d * d;
  }
  for (int64_t c = 1; c < channels; ++c) {
    const Real *ac = a + c * plane, *bc = b + c * plane;
    for (int64_t x = 0; x < count; ++x) {
      const Real d = ac[x] - bc[x];
      out[x] += d * d;
    }
  }
  for (int64_t x = 0; x < count; ++x) out[x] = std::sqrt(out[x]);
}

// Templates cannot be multiversioned.
#define SEGCLIP_HOT_LOOPS(Real)                                                                 \
  SEGCLIP_MULTIVERSION void correlate(Real* out, const Real* center, const Real* const* before, \
                                      const Real* const* after, const Real* taps, int radius,   \
                                      int64_t count) {                                          \
    correlate_loop(out, center, before, after, taps, radius, count);                            \
  }                                                                                             \
  SEGCLIP_MULTIVERSION void distances(Real* out, const Real* a, const Real* b, int64_t count,   \
                                      int64_t channels, int64_t plane) {                        \
    distances_loop(out, a, b, count, channels, plane);                                          \
  }
SEGCLIP_HOT_LOOPS(double)
SEGCLIP_HOT_LOOPS(float)

SEGCLIP_MULTIVERSION void round_row(float* __restrict out, const double* in, int64_t count) {
  for (int64_t x = 0; x < count; ++x) out[x] = static_cast<float>(in[x]);
}

namespace {

// ---- Step 1: channels as planes, blurred

template <typename T, typename Real>
void load_plane(const Image& image, int64_t channel, Real* out) {
  const ImageBatch& b = image.batch;
  const T* source = static_cast<const T*>(image.data) + channel * b.channel_stride;
  std::array<Real, 256> scaled;  // of every uint8
  for (int value = 0; value < 256; ++value)
    scaled[value] = static_cast<Real>(value) * static_cast<Real>(1.0 / 255);
  bool finite = true;
  for (int64_t y = 0; y < image.height; ++y) {
    const T* in = source + y * b.row_stride;
    for (int64_t x = 0; x < image.width; ++x) {
      const T value = in[x * b.column_stride];
      if constexpr (std::is_floating_point_v<T>) {
        *out = static_cast<Real>(value);
        finite &= *out - *out == 0;
      } else {
        *out = scaled[value];
      }
      ++out;
    }
  }
  if (!finite) throw std::domain_error("image: expected finite values, got NaN or infinity");
}

template <typename Real>
void load_channel(const Image& image, int64_t channel, Real* out) {
  switch (image.batch.type) {
    case PixelType::kUint8:
      return load_plane<uint8_t>(image, channel, out);
    case PixelType::kFloat32:
      return load_plane<float>(image, channel, out);
    case PixelType::kFloat64:
      return load_plane<double>(image, channel, out);
  }
}

// Index into 0 .. n-1 of position i in the border extension d c b a | a b c d | d c b a.
int64_t reflect(int64_t i, int64_t n) {
  i %= 2 * n;
  if (i < 0) i += 2 * n;
  return i < n ? i : 2 * n - 1 - i;
}

// Separable Gaussian of ws.plane: down the columns first, then along the rows, rounded to Real in between.
template <typename Real>
void blur_plane(const Image& image, int radius, Workspace<Real>& ws, Real* out) {
  const int64_t H = image.height, W = image.width;
  const Real *plane = ws.plane.data(), *taps = ws.taps.data();
  const Real **before = ws.before.at_least(radius + 1), **after = ws.after.at_least(radius + 1);
  Real* row = ws.row.at_least(W + 2 * radius) + radius;
  for (int64_t y = 0; y < H; ++y) {
    for (int j = 1; j <= radius; ++j) {
      before[j] = plane + reflect(y - j, H) * W;
      after[j] = plane + reflect(y + j, H) * W;
    }
    correlate(row, plane + y * W, before, after, taps, radius, W);
    for (int j = 1; j <= radius; ++j) {
      row[-j] = row[reflect(-j, W)];
      row[W - 1 + j] = row[reflect(W - 1 + j, W)];
      before[j] = row - j;
      after[j] = row + j;
    }
    correlate(out + y * W, row, before, after, taps, radius, W);
  }
}

template <typename Real>
void prepare_planes(const Image& image, const std::vector<double>& taps, Workspace<Real>& ws) {
  Real* planes = ws.planes.at_least(image.channels * image.pixels);
  std::copy(taps.begin(), taps.end(), ws.taps.at_least(taps.size()));
  for (int64_t c = 0; c < image.channels; ++c) {
    Real* out = planes + c * image.pixels;
    if (taps.empty()) {
      load_channel(image, c, out);
    } else {
      load_channel(image, c, ws.plane.at_least(image.pixels));
      blur_plane(image, static_cast<int>(taps.size()) - 1, ws, out);
    }
  }
}

// ---- Step 2: edge weights

// NumPy's pairwise sum: 8 accumulators per block of at most 128, halves of longer runs apart. Used from 8
// channels on.
template <typename Real>
Real pairwise_sum(const Real* x, int64_t n) {
  if (n < 8) {
    Real sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += x[i];
    return sum;
  }
  if (n > 128) {
    const int64_t half = n / 2 - n / 2 % 8;
    return pairwise_sum(x, half) + pairwise_sum(x + half, n - half);
  }
  Real r[8];
  for (int k = 0; k < 8; ++k) r[k] = x[k];
  int64_t i = 8;
  for (; i < n - n % 8; i += 8)
    for (int k = 0; k < 8; ++k) r[k] += x[i + k];
  Real sum = ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7]));
  for (; i < n; ++i) sum += x[i];
  return sum;
}

template <typename Real>
void distances_many_channels(Real* out, const Real* a, const Real* b, int64_t count, int64_t channels,
                             int64_t plane, Real* squares) {
  for (int64_t x = 0; x < count; ++x) {
    for (int64_t c = 0; c < channels; ++c) {
      const Real d = a[x + c * plane] - b[x + c * plane];
      squares[c] = d * d;
    }
    out[x] = std::sqrt(pairwise_sum(squares, channels));
  }
}

}  // namespace

template <typename Real>
void weigh_edges(const Image& image, const std::vector<double>& taps, Workspace<Real>& ws) {
  prepare_planes(image, taps, ws);
  Real* weights = ws.weights.at_least(4 * image.pixels);
  if constexpr (std::is_same_v<Real, double>) ws.rounded.at_least(4 * image.pixels);
  Real* squares = ws.row.at_least(image.channels);
  for (int64_t y = 0; y < image.height; ++y) {
    const Real* pixel = ws.planes.data() + y * image.width;
    for (int direction = 0; direction < 4; ++direction) {
      if (y >= image.rows(direction)) continue;
      const int64_t count = image.columns(direction);
      const Real* a = pixel + image.first()[direction];
      const Real* b = pixel + image.second()[direction];
      Real* out = weights + direction * image.pixels + y * image.width;
      if (image.channels < 8) {
        distances(out, a, b, count, image.channels, image.pixels);
      } else {
        distances_many_channels(out, a, b, count, image.channels, image.pixels, squares);
      }
      if constexpr (std::is_same_v<Real, double>) round_row(ws.rounded.data() + (out - weights), out, count);
    }
  }
}

template void weigh_edges(const Image&, const std::vector<double>&, Workspace<double>&);
template void weigh_edges(const Image&, const std::vector<double>&, Workspace<float>&);

}  // namespace detail

std::vector<double> gaussian_taps(double sigma) {
  if (!(sigma > 1e-15)) return {};
  const int radius = static_cast<int>(4.0 * sigma + 0.5);
  std::vector<double> all(2 * radius + 1);
  const double c = -0.5 / (sigma * sigma);
  for (int x = -radius; x <= radius; ++x) all[x + radius] = std::exp(c * (static_cast<double>(x) * x));
  const double sum = detail::pairwise_sum(all.data(), 2 * radius + 1);
  std::vector<double> taps(all.begin() + radius, all.end());
  for (double& tap : taps) tap /= sum;
  return taps;
}

}  // namespace segclip
