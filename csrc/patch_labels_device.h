// One label per square patch on a GPU: a warp per patch. Same source on the CPU for tests (see parallel.h).
#pragma once

#include <cstdint>

#include "parallel.h"

namespace segclip::device {

using namespace parallel;

template <typename Label>
struct PatchProblem {
  const Label* labels;  // (B, H, W), contiguous
  int64_t* out;         // (B, H / patch, W / patch)
  uint32_t height, width, patch;
  bool mean;
};

// The most frequent label, the smallest of several; or the mean of the labels cut towards zero. `index`
// counts the patches of the batch.
template <typename Label>
SEGCLIP_DEVICE void label_patch(const Warp& warp, const PatchProblem<Label>& p, int64_t index) {
  const uint32_t columns = p.width / p.patch, per_image = p.height / p.patch * columns,
                 size = p.patch * p.patch;
  const uint32_t cell = static_cast<uint32_t>(index % per_image);
  const int64_t row = index / per_image * p.height + cell / columns * p.patch;
  const Label* corner = p.labels + row * p.width + cell % columns * p.patch;
  const auto at = [&](uint32_t i) { return corner[int64_t{i / p.patch} * p.width + i % p.patch]; };

  Lanes<Label> least;
  Lanes<int64_t> part;
  warp.each([&](int lane) {
    least[lane] = corner[0];
    part[lane] = 0;
    for (uint32_t i = lane; i < size; i += kLanes) {
      const Label label = at(i);
      if (label < least[lane]) least[lane] = label;
      part[lane] += label;
    }
  });
  if (p.mean) {
    const int64_t sum = warp.sum(part);
    warp.each([&](int lane) {
      if (lane == 0) p.out[index] = sum / static_cast<int64_t>(size);
    });
    return;
  }
  // Distinct labels in rising order, each counted while the next one is looked for. Most patches have one to
  // three.
  Label label = warp.minimum(least), best = label;
  int64_t most = 0, seen = 0;
  for (;;) {
    Lanes<int64_t> count;
    Lanes<Label> next;  // smallest above `label`; `label` itself: none
    warp.each([&](int lane) {
      count[lane] = 0;
      next[lane] = label;
      for (uint32_t i = lane; i < size; i += kLanes) {
        const Label other = at(i);
        count[lane] += other == label;
        if (other > label && (next[lane] == label || other < next[lane])) next[lane] = other;
      }
    });
    const int64_t found = warp.sum(count);
    if (found > most) {
      most = found;
      best = label;
    }
    seen += found;
    if (size - seen <= most) break;  // the others together are no more
    Lanes<bool> any;
    warp.each([&](int lane) { any[lane] = next[lane] != label; });
    const int some = lowest_bit(warp.ballot(any));
    const Label fallback = warp.of_lane(next, some);
    warp.each([&](int lane) {
      if (!any[lane]) next[lane] = fallback;
    });
    label = warp.minimum(next);
  }
  warp.each([&](int lane) {
    if (lane == 0) p.out[index] = static_cast<int64_t>(best);
  });
}

}  // namespace segclip::device
