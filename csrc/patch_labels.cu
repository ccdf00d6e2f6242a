#include "launch.h"
#include "patch_labels_cuda.h"
#include "patch_labels_device.h"

namespace segclip {
namespace {

using namespace device;

constexpr int kThreads = 256;

template <typename Label>
__global__ void label_patches(const PatchProblem<Label> problem, int64_t patches) {
  const int64_t index = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kLanes;
  if (index < patches) label_patch(Warp{}, problem, index);  // the same for all lanes of a warp
}

template <typename Label>
void launch(const void* labels, int64_t batch, int64_t height, int64_t width, int64_t patch, bool mean,
            int64_t* out, cudaStream_t stream) {
  const PatchProblem<Label> problem{static_cast<const Label*>(labels), out,
                                    static_cast<uint32_t>(height),     static_cast<uint32_t>(width),
                                    static_cast<uint32_t>(patch),      mean};
  const int64_t patches = batch * (height / patch) * (width / patch), per_block = kThreads / kLanes;
  if (patches == 0) return;
  const auto blocks = static_cast<unsigned>((patches + per_block - 1) / per_block);
  label_patches<Label><<<blocks, kThreads, 0, stream>>>(problem, patches);
  check(cudaGetLastError(), "patch_labels: launch");
}

}  // namespace

void patch_labels_cuda(const void* labels, bool wide, int64_t batch, int64_t height, int64_t width,
                       int64_t patch, bool mean, int64_t* out, int device, void* stream) {
  const OnDevice scope(device);
  if (wide) {
    launch<int64_t>(labels, batch, height, width, patch, mean, out, static_cast<cudaStream_t>(stream));
  } else {
    launch<int32_t>(labels, batch, height, width, patch, mean, out, static_cast<cudaStream_t>(stream));
  }
}

}  // namespace segclip
