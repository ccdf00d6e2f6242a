#include <cmath>
#include <type_traits>

#include "felzenszwalb_internal.h"

// The two hot floating-point loops are compiled twice and chosen at load time. Neither version contracts
// a*b+c, so both give the same bits.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__)
#define SEGCLIP_MULTIVERSION __attribute__((target_clones("default", "avx2")))
#else
#define SEGCLIP_MULTIVERSION
#endif

namespace segclip {
namespace detail {

// out[x] = center[x] * taps[0] + sum over j = radius .. 1 of (before[j][x] + after[j][x]) * taps[j], in this
// order. `out` overlaps none of the inputs.
SEGCLIP_MULTIVERSION void correlate(double* __restrict out, const double* center, const double* const* before,
                                    const double* const* after, const double* taps, int radius,
                                    int64_t count) {
  for (int64_t x = 0; x < count; ++x) out[x] = center[x] * taps[0];
  int j = radius;
  for (; j >= 2; j -= 2) {  // two taps a pass: half the traffic to `out`
    const double *lo = before[j], *hi = after[j], *lo2 = before[j - 1], *hi2 = after[j - 1];
    const double tap = taps[j], tap2 = taps[j - 1];
    for (int64_t x = 0; x < count; ++x) out[x] = (out[x] + (lo[x] + hi[x]) * tap) + (lo2[x] + hi2[x]) * tap2;
  }
  if (j == 1) {
    const double *lo = before[1], *hi = after[1];
    for (int64_t x = 0; x < count; ++x) out[x] += (lo[x] + hi[x]) * taps[1];
  }
}

// out[x] = squared difference of a and b summed over up to 7 channels, first to last, then the square root.
SEGCLIP_MULTIVERSION void distances(double* out, const double* a, const double* b, int64_t count,
                                    int64_t channels, int64_t plane) {
  for (int64_t x = 0; x < count; ++x) {
    const double d = a[x] - b[x];
    out[x] = d * d;
  }
  for (int64_t c = 1; c < channels; ++c) {
    const double *ac = a + c * plane, *bc = b + c * plane;
    for (int64_t x = 0; x < count; ++x) {
      const double d = ac[x] - bc[x];
      out[x] += d * d;
    }
  }
  for (int64_t x = 0; x < count; ++x) out[x] = std::sqrt(out[x]);
}

namespace {

// ---- Step 1: channels as float64 planes, blurred

template <typename T>
void load_plane(const Image& image, int64_t channel, double* out) {
  const ImageBatch& b = image.batch;
  const T* source = static_cast<const T*>(image.data) + channel * b.channel_stride;
  const double unit = std::is_same_v<T, uint8_t> ? 1.0 / 255 : 1.0;
  for (int64_t y = 0; y < image.height; ++y) {
    const T* in = source + y * b.row_stride;
    for (int64_t x = 0; x < image.width; ++x) *out++ = static_cast<double>(in[x * b.column_stride]) * unit;
  }
}

void load_channel(const Image& image, int64_t channel, double* out) {
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

// Separable Gaussian: down the columns first, then along the rows, float64 in between.
void blur_plane(const Image& image, const std::vector<double>& taps, Workspace& ws, double* out) {
  const int64_t H = image.height, W = image.width;
  const int radius = static_cast<int>(taps.size()) - 1;
  ws.row.resize(W + 2 * radius);
  ws.before.resize(radius + 1);
  ws.after.resize(radius + 1);
  double* row = ws.row.data() + radius;
  for (int64_t y = 0; y < H; ++y) {
    for (int j = 1; j <= radius; ++j) {
      ws.before[j] = ws.plane.data() + reflect(y - j, H) * W;
      ws.after[j] = ws.plane.data() + reflect(y + j, H) * W;
    }
    correlate(row, ws.plane.data() + y * W, ws.before.data(), ws.after.data(), taps.data(), radius, W);
    for (int j = 1; j <= radius; ++j) {
      row[-j] = row[reflect(-j, W)];
      row[W - 1 + j] = row[reflect(W - 1 + j, W)];
      ws.before[j] = row - j;
      ws.after[j] = row + j;
    }
    correlate(out + y * W, row, ws.before.data(), ws.after.data(), taps.data(), radius, W);
  }
}

void prepare_planes(const Image& image, const std::vector<double>& taps, Workspace& ws) {
  ws.planes.resize(image.channels * image.pixels);
  for (int64_t c = 0; c < image.channels; ++c) {
    double* out = ws.planes.data() + c * image.pixels;
    if (taps.empty()) {
      load_channel(image, c, out);
    } else {
      ws.plane.resize(image.pixels);
      load_channel(image, c, ws.plane.data());
      blur_plane(image, taps, ws, out);
    }
  }
}

// ---- Step 2: edge weights

// NumPy's pairwise sum: 8 accumulators per block of at most 128, halves of longer runs apart. Used from 8
// channels on.
double pairwise_sum(const double* x, int64_t n) {
  if (n < 8) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; ++i) sum += x[i];
    return sum;
  }
  if (n > 128) {
    const int64_t half = n / 2 - n / 2 % 8;
    return pairwise_sum(x, half) + pairwise_sum(x + half, n - half);
  }
  double r[8];
  for (int k = 0; k < 8; ++k) r[k] = x[k];
  int64_t i = 8;
  for (; i < n - n % 8; i += 8)
    for (int k = 0; k < 8; ++k) r[k] += x[i + k];
  double sum = ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7]));
  for (; i < n; ++i) sum += x[i];
  return sum;
}

void distances_many_channels(double* out, const double* a, const double* b, int64_t count, int64_t channels,
                             int64_t plane, std::vector<double>& squares) {
  squares.resize(channels);
  for (int64_t x = 0; x < count; ++x) {
    for (int64_t c = 0; c < channels; ++c) {
      const double d = a[x + c * plane] - b[x + c * plane];
      squares[c] = d * d;
    }
    out[x] = std::sqrt(pairwise_sum(squares.data(), channels));
  }
}

}  // namespace

void weigh_edges(const Image& image, const std::vector<double>& taps, Workspace& ws) {
  prepare_planes(image, taps, ws);
  ws.weights.resize(4 * image.pixels);
  for (int direction = 0; direction < 4; ++direction) {
    const int64_t count = image.columns(direction);
    for (int64_t y = 0; y < image.rows(direction); ++y) {
      const double* pixel = ws.planes.data() + y * image.width;
      const double* a = pixel + image.first()[direction];
      const double* b = pixel + image.second()[direction];
      double* out = ws.weights.data() + direction * image.pixels + y * image.width;
      if (image.channels < 8) {
        distances(out, a, b, count, image.channels, image.pixels);
      } else {
        distances_many_channels(out, a, b, count, image.channels, image.pixels, ws.row);
      }
    }
  }
}

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
