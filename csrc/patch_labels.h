// One superpixel label per square patch.
#pragma once

#include <cstdint>

namespace segclip {

// A batch of label maps in any layout; strides count elements and may be negative or zero. height and width
// are multiples of the patch.
template <typename Label>
struct LabelBatch {
  const Label* data = nullptr;
  int64_t batch = 0, height = 0, width = 0;
  int64_t batch_stride = 0, row_stride = 0, column_stride = 0;
};

// out (batch, height / patch, width / patch), contiguous: the most frequent label of each patch, the smallest
// of several; or, if `mean`, the sum of its labels divided by their number, cut towards zero. Uses up to
// `threads` threads, one per 16 images. For int32_t and int64_t.
template <typename Label>
void patch_labels(const LabelBatch<Label>& labels, int64_t patch, bool mean, int threads, int64_t* out);

}  // namespace segclip
