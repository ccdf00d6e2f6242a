// One label per patch, for label maps in GPU memory.
#pragma once

#include <cstdint>

namespace segclip {

#ifdef SEGCLIP_WITH_CUDA
// labels: (batch, height, width) contiguous, int64 if `wide` else int32; out: (batch, height / patch, width /
// patch) int64. Sides divisible by patch and below 2^31, at most 2^31 - 1 values in a patch. Does not wait
// for `stream`.
void patch_labels_cuda(const void* labels, bool wide, int64_t batch, int64_t height, int64_t width,
                       int64_t patch, bool mean, int64_t* out, int device, void* stream);
#endif

}  // namespace segclip
