#include "felzenszwalb.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <thread>

#include "felzenszwalb_internal.h"

#ifdef __linux__
#include <sched.h>
#endif

namespace segclip {
namespace {

using namespace detail;

// ---- Step 4: merging

int32_t find(int32_t* parent, int32_t x) {
  while (parent[x] != x) x = parent[x] = parent[parent[x]];
  return x;
}

// Calls test(a, b, code) for every edge whose ends have different roots a and b, in the given order. Most
// edges are internal by their turn: a branch-free pass over a block first drops those whose ends share a
// grandparent, which saves the mispredicted branches that otherwise dominate. A stale parent only keeps too
// many.
template <typename Test>
void for_each_crossing(const Image& image, const std::vector<Code>& codes, Workspace& ws, Test test) {
  constexpr size_t kBlock = 512;
  std::array<Code, kBlock> kept;
  int32_t* parent = ws.parent.data();
  const auto first = image.first(), second = image.second();
  const auto ends = [&](Code code) {
    const auto pixel = static_cast<int32_t>(code & kPixelMask);
    return std::pair(pixel + first[code >> kPixelBits], pixel + second[code >> kPixelBits]);
  };
  for (size_t start = 0; start < codes.size(); start += kBlock) {
    size_t count = 0;
    for (size_t i = start; i < std::min(codes.size(), start + kBlock); ++i) {
      const auto [u, v] = ends(codes[i]);
      kept[count] = codes[i];
      count += parent[parent[u]] != parent[parent[v]];
    }
    for (size_t i = 0; i < count; ++i) {
      const auto [u, v] = ends(kept[i]);
      const int32_t a = find(parent, u), b = find(parent, v);
      if (a != b) test(a, b, kept[i]);
    }
  }
}

// Links the smaller component under the larger one; the labels do not depend on which root survives.
Component& link(Workspace& ws, int32_t a, int32_t b) {
  if (ws.component[a].size < ws.component[b].size) std::swap(a, b);
  ws.parent[b] = a;
  ws.component[a].size += ws.component[b].size;
  return ws.component[a];
}

void merge_edges(const Image& image, const FelzenszwalbParams& params, Workspace& ws) {
  const double k = params.scale / 255.0;
  ws.parent.resize(image.pixels);
  for (int64_t p = 0; p < image.pixels; ++p) ws.parent[p] = static_cast<int32_t>(p);
  ws.component.assign(image.pixels, {1, static_cast<float>(k)});
  ws.rejected.clear();
  for_each_crossing(image, ws.order, ws, [&](int32_t a, int32_t b, Code code) {
    const double w = weight_of(code, ws.weights, image.pixels);
    if (w < std::min(ws.component[a].threshold, ws.component[b].threshold)) {
      Component& merged = link(ws, a, b);
      merged.threshold = static_cast<float>(w + k / merged.size);
    } else {
      ws.rejected.push_back(code);
    }
  });
  for_each_crossing(image, ws.rejected, ws, [&](int32_t a, int32_t b, Code) {
    if (ws.component[a].size < params.min_size || ws.component[b].size < params.min_size) link(ws, a, b);
  });
}

void number_segments(const Image& image, Workspace& ws, int32_t* labels) {
  int32_t count = 0;
  for (Component& component : ws.component) component.size = -1;  // reused: label of the root
  for (int64_t p = 0; p < image.pixels; ++p) {
    int32_t& label = ws.component[find(ws.parent.data(), static_cast<int32_t>(p))].size;
    if (label < 0) label = count++;
    labels[p] = label;
  }
}

void segment_image(const Image& image, const FelzenszwalbParams& params, Workspace& ws, int32_t* labels) {
  weigh_edges(image, params.taps, ws);
  sort_edges(image, ws);
  merge_edges(image, params, ws);
  number_segments(image, ws, labels);
}

// ---- The batch

int usable_cores() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

int64_t element_size(PixelType type) {
  return type == PixelType::kUint8 ? 1 : type == PixelType::kFloat32 ? 4 : 8;
}

}  // namespace

void felzenszwalb(const ImageBatch& images, const FelzenszwalbParams& params, int threads, int32_t* labels) {
  const int64_t H = images.height, W = images.width;
  if (images.batch < 0 || H < 1 || W < 1 || images.channels < 1 || H > kMaxPixels / W)
    throw std::invalid_argument("felzenszwalb: image is empty or has more than 2^30 pixels");
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex guard;
  const auto work = [&] {
    thread_local Workspace ws;  // kept between calls on the caller's thread
    try {
      for (int64_t i = next++; i < images.batch; i = next++) {
        const char* data =
            static_cast<const char*>(images.data) + i * images.batch_stride * element_size(images.type);
        segment_image({data, images, H, W, images.channels, H * W}, params, ws, labels + i * H * W);
      }
    } catch (...) {
      next = images.batch;
      const std::lock_guard<std::mutex> lock(guard);
      if (!failure) failure = std::current_exception();
    }
    if (ws.bytes() > (size_t{64} << 20)) ws = Workspace();
  };
  const int64_t workers = std::min<int64_t>(threads > 0 ? threads : usable_cores(), images.batch);
  std::vector<std::thread> pool;
  pool.reserve(workers);
  try {
    for (int64_t i = 1; i < workers; ++i) pool.emplace_back(work);
  } catch (const std::exception&) {  // no more threads to be had: fewer do the same work
  }
  work();
  for (std::thread& thread : pool) thread.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace segclip
