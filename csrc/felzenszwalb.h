// Efficient graph-based image segmentation (Felzenszwalb and Huttenlocher, IJCV 2004).
//
// In float64 label for label equal to scikit-image's `felzenszwalb` when its argsort is stable: same order of
// floating-point operations, same rounding of the merge threshold, ties broken by the edge index. In float32
// the same operations in the same order up to the edge weights; merging is in float64 either way. Must be
// compiled without contraction into fused multiply-adds (-ffp-contract=off).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace segclip {

enum class PixelType { kUint8, kFloat32, kFloat64 };

// A batch of images in any layout; strides count elements and may be negative or zero.
struct ImageBatch {
  const void* data = nullptr;
  PixelType type = PixelType::kUint8;
  int64_t batch = 0, height = 0, width = 0, channels = 0;
  int64_t batch_stride = 0, row_stride = 0, column_stride = 0, channel_stride = 0;
};

struct FelzenszwalbParams {
  double scale = 1.0;             // larger: fewer, larger segments
  int64_t min_size = 20;          // smaller segments are joined to a neighbour
  std::vector<double> taps;       // right half of the Gaussian, taps[0] at the centre; empty: no blur
  bool single_precision = false;  // pixels, blur (with the taps rounded) and edge weights in float32
};

// Pixel count up to which an edge fits in 32 bits (2 for the direction, 30 for the pixel).
constexpr int64_t kMaxPixels = int64_t{1} << 30;

// Right half of the normalised Gaussian cut at 4 sigma; empty when sigma is (almost) zero.
std::vector<double> gaussian_taps(double sigma);

// Segments every image; labels is (batch, height, width), contiguous, numbered by first appearance in raster
// order. One image per thread; threads = 0 uses every core this process may run on. Throws
// std::invalid_argument for impossible sizes, std::domain_error for NaN or infinity (in float32 also for what
// does not fit) and std::bad_alloc; an exception in any thread is rethrown here.
void felzenszwalb(const ImageBatch& images, const FelzenszwalbParams& params, int threads, int32_t* labels);

}  // namespace segclip
