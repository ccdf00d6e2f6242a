// Felzenszwalb superpixels of images in GPU memory, one block of threads per image.
#pragma once

#include "felzenszwalb.h"

namespace segclip {

#ifdef SEGCLIP_WITH_CUDA

// Workspace of `images` images of these sizes, in bytes; fewer at a time do with less.
size_t felzenszwalb_cuda_bytes(const ImageBatch& batch, const FelzenszwalbParams& params, int64_t images);

// Like felzenszwalb, for images, labels and workspace (aligned to 256 bytes) in the memory of `device`, on
// `stream` (a cudaStream_t), without waiting for it. As many images run at a time as the workspace has room
// for. An image with NaN or infinity gets labels -1. Throws std::invalid_argument above 2^24 pixels or 128
// channels and for a workspace too small for one image, std::runtime_error for errors of CUDA.
void felzenszwalb_cuda(const ImageBatch& batch, const FelzenszwalbParams& params, int32_t* labels,
                       void* workspace, size_t workspace_bytes, int device, void* stream);

#endif

}  // namespace segclip
