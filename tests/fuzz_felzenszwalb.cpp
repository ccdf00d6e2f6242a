// Random small images through felzenszwalb and through the CUDA implementation on the CPU, which must agree.
//
//   fuzz_felzenszwalb COUNT SEED WARPS    built with sanitizers by tests/test_sanitizers.py
//
// Prints the first differences and returns 1 if there are any.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "felzenszwalb_emulated.h"

using namespace segclip;

namespace {

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t below(int64_t n) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(n)); }
  double unit() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }
  bool one_in(int64_t n) { return below(n) == 0; }
  template <typename T, size_t N>
  T any(const T (&values)[N]) {
    return values[below(N)];
  }

 private:
  std::mt19937_64 engine_;
};

// A batch of images in a layout with gaps, transposed and mirrored axes, in memory of exactly the size it
// needs.
struct Images {
  ImageBatch view;
  std::vector<uint8_t> bytes;
  std::vector<float> floats;
  std::vector<double> doubles;
};

double pixel_value(Random& random, int kind) {
  switch (kind) {
    case 0:
      return 7;
    case 1:
      return static_cast<double>(random.below(2)) * 255;
    case 2:
      return static_cast<double>(random.below(4)) * 60;
    case 3:
      return static_cast<double>(random.below(256));
    default:
      return random.unit() * 255;
  }
}

void make_images(Random& random, Images& out) {
  ImageBatch& b = out.view;
  static const int64_t sides[] = {1, 1, 2, 3, 5, 8, 13, 17, 24};
  static const int64_t channels[] = {1, 1, 3, 3, 3, 2, 7, 8, 9, 17, 40};
  b.batch = random.one_in(8) ? random.below(4) : 1;
  b.height = random.any(sides), b.width = random.any(sides), b.channels = random.any(channels);
  if (random.one_in(4)) b.height += random.below(40);
  if (random.one_in(4)) b.width += random.below(40);
  static const PixelType types[] = {PixelType::kUint8, PixelType::kUint8, PixelType::kFloat32,
                                    PixelType::kFloat64};
  b.type = random.any(types);

  int64_t extent[4] = {b.batch, b.height, b.width, b.channels};
  int64_t* stride[4] = {&b.batch_stride, &b.row_stride, &b.column_stride, &b.channel_stride};
  int axes[4] = {0, 1, 2, 3};
  for (int i = 3; i > 0; --i) std::swap(axes[i], axes[random.below(i + 1)]);
  int64_t step = 1, origin = 0;
  for (const int axis : axes) {
    if (random.one_in(16)) step *= 2;  // gaps
    *stride[axis] = step;
    step *= extent[axis] > 0 ? extent[axis] : 1;
    if (random.one_in(4) && extent[axis] > 0) {  // mirrored
      origin += (extent[axis] - 1) * *stride[axis];
      *stride[axis] = -*stride[axis];
    }
  }
  const int kind = static_cast<int>(random.below(6));
  const double unit = random.one_in(8) ? 1e-9 : 1.0 / 255;
  const auto fill = [&](auto& values, double factor) {
    values.resize(static_cast<size_t>(step));
    for (auto& value : values)
      value = static_cast<std::decay_t<decltype(value)>>(pixel_value(random, kind) * factor);
    b.data = values.data() + origin;
  };
  if (b.type == PixelType::kUint8) fill(out.bytes, 1);
  if (b.type == PixelType::kFloat32) fill(out.floats, unit);
  if (b.type == PixelType::kFloat64) fill(out.doubles, unit);
}

FelzenszwalbParams make_params(Random& random) {
  static const double scales[] = {0, 1e-50, 1e-3, 1, 20, 100, 224, 1000, 5000};
  static const double sigmas[] = {0, 0, 0.3, 0.5, 0.8, 0.9, 2, 7};
  static const int64_t sizes[] = {0, 1, 2, 3, 5, 20, 224};
  FelzenszwalbParams params;
  params.scale = random.any(scales);
  params.taps = gaussian_taps(random.any(sigmas));
  params.min_size = random.any(sizes);
  params.single_precision = random.one_in(3);
  return params;
}

}  // namespace

int main(int count, char** values) {
  if (count != 4) {
    std::fprintf(stderr, "usage: %s COUNT SEED WARPS\n", values[0]);
    return 2;
  }
  const long images = std::atol(values[1]), seed = std::atol(values[2]);
  long different = 0;
  for (long i = 0; i < images; ++i) {
    Random random(static_cast<uint64_t>(seed) << 32 | static_cast<uint64_t>(i));
    Images made;
    make_images(random, made);
    const FelzenszwalbParams params = make_params(random);
    const ImageBatch& b = made.view;
    Emulation emulation;
    emulation.warps = std::atoi(values[3]);
    emulation.reversed = random.one_in(2);
    emulation.parents_shared = random.one_in(2);
    const size_t pixels = static_cast<size_t>(b.batch * b.height * b.width);
    std::vector<int32_t> expected(pixels), labels(pixels);
    std::vector<device::Counts> counts(static_cast<size_t>(b.batch));
    felzenszwalb(b, params, static_cast<int>(random.below(3)), expected.data());
    felzenszwalb_emulated(b, params, emulation, labels.data(), random.one_in(2) ? counts.data() : nullptr);
    if (labels != expected && ++different <= 5) {
      std::printf(
          "image %ld of seed %ld differs: %ld x %ld x %ld x %ld, scale %g, %zu taps, min_size %ld, %s\n", i,
          seed, static_cast<long>(b.batch), static_cast<long>(b.height), static_cast<long>(b.width),
          static_cast<long>(b.channels), params.scale, params.taps.size(), static_cast<long>(params.min_size),
          params.single_precision ? "float32" : "float64");
    }
  }
  std::printf("%ld of %ld images differ\n", different, images);
  return different > 0;
}
