#include "felzenszwalb_emulated.h"

#include <exception>
#include <stdexcept>
#include <thread>
#include <vector>

#include "felzenszwalb_device_merge.h"

namespace segclip {
namespace {

using namespace device;

constexpr unsigned char kPoison = 0xA5;  // fresh memory holds anything

template <typename Real, typename Parent>
void run_block(const Problem<Real>& problem, int64_t image, const Emulation& emulation, Counts* counts) {
  const bool shared_parents = sizeof(Parent) == 2;
  const size_t words =
      (sizeof(Shared<Real>) + (shared_parents ? problem.pixels * sizeof(Parent) : 0) + 15) / 16;
  struct alignas(16) Word {
    unsigned char bytes[16];
  };
  std::vector<Word> shared(words);
  std::memset(shared.data(), kPoison, words * 16);
  auto* bytes = reinterpret_cast<unsigned char*>(shared.data());
  auto* parents = shared_parents ? reinterpret_cast<Parent*>(bytes + sizeof(Shared<Real>))
                                 : problem.template at<Parent>(image, problem.layout.parents);
  const int warps = emulation.warps, preparing = warps > 1 ? warps - 1 : 1;
  Barrier all(warps), one(1), others(preparing);
  const auto work = [&](int warp) {
    const bool reversed = emulation.reversed;
    Block block{{warp, warps, &all, reversed},
                {0, 1, &one, reversed},
                {warps > 1 ? warp - 1 : 0, preparing, &others, reversed},
                warp == 0,
                warp > 0 || warps == 1,
                bytes,
                words * 16,
                counts};
    segment(block, problem, image, parents);
  };
  std::vector<std::thread> pool;
  for (int warp = 1; warp < warps; ++warp) pool.emplace_back(work, warp);
  work(0);
  for (std::thread& thread : pool) thread.join();
}

template <typename Real>
void run(const ImageBatch& images, const FelzenszwalbParams& params, const Emulation& emulation,
         int32_t* labels, Counts* counts) {
  Problem<Real> problem(images, params, labels, nullptr);
  const size_t bytes = problem.layout.taps + images.batch * problem.layout.slice;
  struct alignas(256) Page {
    unsigned char bytes[256];
  };
  std::vector<Page> workspace(bytes / sizeof(Page));
  std::memset(workspace.data(), kPoison, bytes);
  problem.workspace = reinterpret_cast<unsigned char*>(workspace.data());
  for (int j = 0; j <= problem.radius; ++j) problem.taps()[j] = static_cast<Real>(params.taps[j]);

  const auto stage = [&](auto function, uint32_t count) {
    for (int64_t image = 0; image < images.batch; ++image)
      for (uint32_t i = 0; i < count; ++i) function(problem, image, emulation.reversed ? count - 1 - i : i);
  };
  stage(clear_header<Real>, 1);
  const uint32_t values = static_cast<uint32_t>(images.channels) * problem.pixels;
  stage(blur_columns<Real>, values);
  if (problem.radius >= 0) stage(blur_rows<Real>, values);
  stage(weigh_edges<Real>, problem.pixels);
  for (int64_t image = 0; image < images.batch; ++image) {
    Counts* own = counts ? counts + image : nullptr;
    if (emulation.parents_shared) {
      run_block<Real, uint16_t>(problem, image, emulation, own);
    } else {
      run_block<Real, uint32_t>(problem, image, emulation, own);
    }
  }
}

}  // namespace

void felzenszwalb_emulated(const ImageBatch& images, const FelzenszwalbParams& params,
                           const Emulation& emulation, int32_t* labels, device::Counts* counts) {
  if (images.height < 1 || images.width < 1 || images.channels < 1 ||
      images.height > kMaxDevicePixels / images.width || images.channels > kMaxDeviceChannels)
    throw std::invalid_argument("felzenszwalb: image is empty, or has more than 2^24 pixels or 128 channels");
  if (emulation.warps < 1 || emulation.warps > kMaxWarps)
    throw std::invalid_argument("felzenszwalb: expected 1 to 32 warps");
  if (emulation.parents_shared && images.height * images.width > 65536)
    throw std::invalid_argument("felzenszwalb: more than 65536 pixels do not fit in shared memory");
  if (images.batch == 0) return;
  if (params.single_precision) {
    run<float>(images, params, emulation, labels, counts);
  } else {
    run<double>(images, params, emulation, labels, counts);
  }
}

}  // namespace segclip
