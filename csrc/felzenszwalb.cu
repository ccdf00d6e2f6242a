#include <algorithm>

#include "felzenszwalb_cuda.h"
#include "felzenszwalb_device_merge.h"
#include "launch.h"

namespace segclip {
namespace {

using namespace device;

constexpr int kThreads = 512;  // of the block that segments an image: one merging warp, 15 that prepare
constexpr int kMaxGridRows = 65535;

// Taps travel as arguments: no copy that could wait for the stream, and a CUDA graph can hold them.
struct Taps {
  static constexpr int kCount = 64;
  double value[kCount];
};

template <typename Real>
__global__ void write_taps(Real* out, Taps taps, int count) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < count) out[i] = static_cast<Real>(taps.value[i]);
}

enum class Stage { kClear, kBlurColumns, kBlurRows, kWeigh };

template <typename Real, Stage stage>
__global__ void elementwise(const Problem<Real> problem, uint32_t count) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;  // at most 2^31 by the limits
  if (i < count) {
    if constexpr (stage == Stage::kClear) clear_header(problem, blockIdx.y, i);
    if constexpr (stage == Stage::kBlurColumns) blur_columns(problem, blockIdx.y, i);
    if constexpr (stage == Stage::kBlurRows) blur_rows(problem, blockIdx.y, i);
    if constexpr (stage == Stage::kWeigh) weigh_edges(problem, blockIdx.y, i);
  }
}

template <typename Real, Stage stage>
void run_stage(const Problem<Real>& problem, uint32_t count, cudaStream_t stream) {
  constexpr uint32_t kBlock = 256;
  const dim3 grid((count + kBlock - 1) / kBlock, static_cast<unsigned>(problem.images.batch));
  elementwise<Real, stage><<<grid, kBlock, 0, stream>>>(problem, count);
}

template <typename Real, typename Parent>
__global__ void __launch_bounds__(kThreads, 2)
    segment_images(const Problem<Real> problem, size_t shared_bytes) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kLanes, 0);
  const int warps = kThreads / kLanes;
  Block block{{warp, warps, 0}, {0, 1, 2},   {warp - 1, warps - 1, 1}, warp == 0, warp > 0,
              shared,           shared_bytes};
  const int64_t image = blockIdx.x;
  Parent* parents;
  if constexpr (sizeof(Parent) == 2) {
    parents = reinterpret_cast<Parent*>(shared + sizeof(Shared<Real>));
  } else {
    parents = problem.template at<Parent>(image, problem.layout.parents);
  }
  segment(block, problem, image, parents);
}

template <typename Real, typename Parent>
void launch_segments(const Problem<Real>& problem, size_t shared_bytes, cudaStream_t stream) {
  const auto kernel = segment_images<Real, Parent>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes)),
        "felzenszwalb: cudaFuncSetAttribute");
  kernel<<<static_cast<unsigned>(problem.images.batch), kThreads, shared_bytes, stream>>>(problem,
                                                                                          shared_bytes);
}

template <typename Real>
void run(const ImageBatch& batch, const FelzenszwalbParams& params, int32_t* labels, void* workspace,
         size_t bytes, int device, cudaStream_t stream) {
  Problem<Real> problem(batch, params, labels, workspace);
  if (bytes < problem.layout.taps + problem.layout.slice)
    throw std::invalid_argument("felzenszwalb: the workspace has no room for one image");
  const auto room = static_cast<int64_t>((bytes - problem.layout.taps) / problem.layout.slice);
  const int64_t at_a_time = std::min<int64_t>({room, batch.batch, kMaxGridRows});

  int most_shared = 0;
  check(cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "felzenszwalb: cudaDeviceGetAttribute");
  const size_t small = sizeof(Shared<Real>), large = small + problem.pixels * sizeof(uint16_t);
  const bool parents_shared = problem.pixels <= 65536 && large <= static_cast<size_t>(most_shared);

  for (int first = 0; first <= problem.radius; first += Taps::kCount) {
    const int count = std::min(Taps::kCount, problem.radius + 1 - first);
    Taps taps{};
    std::copy_n(params.taps.begin() + first, count, taps.value);
    write_taps<<<1, Taps::kCount, 0, stream>>>(static_cast<Real*>(workspace) + first, taps, count);
  }
  const int64_t item = batch.type == PixelType::kUint8 ? 1 : batch.type == PixelType::kFloat32 ? 4 : 8;
  const uint32_t values = static_cast<uint32_t>(batch.channels) * problem.pixels;
  for (int64_t first = 0; first < batch.batch; first += at_a_time) {
    problem.images.data = static_cast<const char*>(batch.data) + first * batch.batch_stride * item;
    problem.images.batch = std::min(at_a_time, batch.batch - first);
    problem.labels = labels + first * int64_t{problem.pixels};
    run_stage<Real, Stage::kClear>(problem, 1, stream);
    run_stage<Real, Stage::kBlurColumns>(problem, values, stream);
    if (problem.radius >= 0) run_stage<Real, Stage::kBlurRows>(problem, values, stream);
    run_stage<Real, Stage::kWeigh>(problem, problem.pixels, stream);
    if (parents_shared) {
      launch_segments<Real, uint16_t>(problem, large, stream);
    } else {
      launch_segments<Real, uint32_t>(problem, small, stream);
    }
    check(cudaGetLastError(), "felzenszwalb: launch");
  }
}

void check_sizes(const ImageBatch& batch) {
  if (batch.batch < 0 || batch.height < 1 || batch.width < 1 || batch.channels < 1)
    throw std::invalid_argument("felzenszwalb: image is empty");
  if (batch.height > kMaxDevicePixels / batch.width || batch.channels > kMaxDeviceChannels)
    throw std::invalid_argument("felzenszwalb: more than 2^24 pixels or 128 channels on CUDA");
}

}  // namespace

size_t felzenszwalb_cuda_bytes(const ImageBatch& batch, const FelzenszwalbParams& params, int64_t images) {
  check_sizes(batch);
  const int radius = static_cast<int>(params.taps.size()) - 1;
  const auto layout = params.single_precision ? layout_of<float> : layout_of<double>;
  const Layout found = layout(batch.height, batch.width, batch.channels, radius);
  return found.taps + images * found.slice;
}

void felzenszwalb_cuda(const ImageBatch& batch, const FelzenszwalbParams& params, int32_t* labels,
                       void* workspace, size_t workspace_bytes, int device, void* stream) {
  check_sizes(batch);
  if (batch.batch == 0) return;
  const OnDevice scope(device);
  const auto run_as = params.single_precision ? run<float> : run<double>;
  run_as(batch, params, labels, workspace, workspace_bytes, device, static_cast<cudaStream_t>(stream));
}

}  // namespace segclip
