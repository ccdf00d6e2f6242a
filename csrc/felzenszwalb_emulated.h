// The CUDA implementation of felzenszwalb run on the CPU: for tests, sanitizers and counts, not for speed.
#pragma once

#include "felzenszwalb_device.h"

namespace segclip {

struct Emulation {
  int warps = 1;               // of a block; each is a thread
  bool reversed = false;       // lanes run from the last to the first
  bool parents_shared = true;  // as on a GPU with room in shared memory; needs at most 2^16 pixels
};

// Like felzenszwalb. An image with NaN or infinity gets labels -1. `counts`: null, or one for each image.
void felzenszwalb_emulated(const ImageBatch& images, const FelzenszwalbParams& params,
                           const Emulation& emulation, int32_t* labels, device::Counts* counts);

}  // namespace segclip
