#include "felzenszwalb.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <utility>

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

// Calls test(a, b, code) for every one of `count` edges whose ends have different roots a and b, in the given
// order. Most edges are internal by their turn: a branch-free pass over a block first drops those whose ends
// share a grandparent, which saves the mispredicted branches that otherwise dominate. A stale parent only
// keeps too many. A block is read before its edges are tested, so that `test` may overwrite codes whose turn
// has come.
template <typename Test>
void for_each_crossing(const Image& image, const Code* codes, size_t count, int32_t* parent, Test test) {
  constexpr size_t kBlock = 512;
  std::array<Code, kBlock> kept;
  const auto first = image.first(), second = image.second();
  const auto ends = [&](Code code) {
    const auto pixel = static_cast<int32_t>(code & kPixelMask);
    return std::pair(pixel + first[code >> kPixelBits], pixel + second[code >> kPixelBits]);
  };
  for (size_t start = 0; start < count; start += kBlock) {
    size_t crossing = 0;
    for (size_t i = start; i < std::min(count, start + kBlock); ++i) {
      const auto [u, v] = ends(codes[i]);
      kept[crossing] = codes[i];
      crossing += parent[parent[u]] != parent[parent[v]];
    }
    for (size_t i = 0; i < crossing; ++i) {
      const auto [u, v] = ends(kept[i]);
      const int32_t a = find(parent, u), b = find(parent, v);
      if (a != b) test(a, b, kept[i]);
    }
  }
}

// Links the smaller component under the larger one; the labels do not depend on which root survives.
Component& link(int32_t* parent, Component* component, int32_t a, int32_t b) {
  if (component[a].size < component[b].size) std::swap(a, b);
  parent[b] = a;
  component[a].size += component[b].size;
  return component[a];
}

template <typename Real>
void merge_edges(const Image& image, const FelzenszwalbParams& params, Workspace<Real>& ws) {
  const double k = params.scale / 255.0;
  int32_t* parent = ws.parent.at_least(image.pixels);
  Component* component = ws.component.at_least(image.pixels);
  for (int64_t p = 0; p < image.pixels; ++p) parent[p] = static_cast<int32_t>(p);
  std::fill_n(component, image.pixels, Component{1, static_cast<float>(k)});
  Code* order = ws.order.data();
  Code* rejected = order;  // never ahead of the edges already read
  for_each_crossing(image, order, image.edges(), parent, [&](int32_t a, int32_t b, Code code) {
    const double w = weight_of(code, ws.weights.data(), image.pixels);
    if (w < std::min(component[a].threshold, component[b].threshold)) {
      Component& merged = link(parent, component, a, b);
      merged.threshold = static_cast<float>(w + k / merged.size);
    } else {
      *rejected++ = code;
    }
  });
  for_each_crossing(image, order, rejected - order, parent, [&](int32_t a, int32_t b, Code) {
    if (component[a].size < params.min_size || component[b].size < params.min_size)
      link(parent, component, a, b);
  });
}

template <typename Real>
void number_segments(const Image& image, Workspace<Real>& ws, int32_t* labels) {
  int32_t *parent = ws.parent.data(), count = 0;
  Component* component = ws.component.data();
  for (int64_t p = 0; p < image.pixels; ++p) component[p].size = -1;  // reused: label of the root
  for (int64_t p = 0; p < image.pixels; ++p) {
    int32_t& label = component[find(parent, static_cast<int32_t>(p))].size;
    if (label < 0) label = count++;
    labels[p] = label;
  }
}

template <typename Real>
void segment_image(const Image& image, const FelzenszwalbParams& params, Workspace<Real>& ws,
                   int32_t* labels) {
  weigh_edges(image, params.taps, ws);
  sort_edges(image, ws);
  merge_edges(image, params, ws);
  number_segments(image, ws, labels);
}

// ---- The batch

constexpr size_t kKeptBytes = size_t{256} << 20;  // of workspaces kept by a thread between its calls

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

template <typename Real>
void segment_batch(const ImageBatch& images, const FelzenszwalbParams& params, int64_t workers,
                   int32_t* labels) {
  const int64_t H = images.height, W = images.width;
  // One for each worker. They belong to the calling thread: its next call finds them, no lock is needed, and
  // a process forked meanwhile has none to wait for.
  thread_local std::vector<Workspace<Real>> kept;
  std::vector<Workspace<Real>>& workspaces = kept;  // in a worker, `kept` would be its own
  if (static_cast<int64_t>(workspaces.size()) < workers) workspaces.resize(workers);
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex guard;
  const auto work = [&](int64_t worker) {
    try {
      for (int64_t i = next++; i < images.batch; i = next++) {
        const char* data =
            static_cast<const char*>(images.data) + i * images.batch_stride * element_size(images.type);
        segment_image({data, images, H, W, images.channels, H * W}, params, workspaces[worker],
                      labels + i * H * W);
      }
    } catch (...) {
      next = images.batch;
      const std::lock_guard<std::mutex> lock(guard);
      if (!failure) failure = std::current_exception();
    }
  };
  std::vector<std::thread> pool;
  if (workers > 1) pool.reserve(workers - 1);
  try {
    for (int64_t i = 1; i < workers; ++i) pool.emplace_back(work, i);
  } catch (const std::exception&) {  // no more threads to be had: fewer do the same work
  }
  work(0);
  for (std::thread& thread : pool) thread.join();
  size_t bytes = 0;
  for (Workspace<Real>& workspace : workspaces)
    if ((bytes += workspace.bytes()) > kKeptBytes) workspace = {};
  if (failure) std::rethrow_exception(failure);
}

}  // namespace

void felzenszwalb(const ImageBatch& images, const FelzenszwalbParams& params, int threads, int32_t* labels) {
  if (images.batch < 0 || images.height < 1 || images.width < 1 || images.channels < 1 ||
      images.height > kMaxPixels / images.width)
    throw std::invalid_argument("felzenszwalb: image is empty or has more than 2^30 pixels");
  const int64_t workers = std::min<int64_t>(threads > 0 ? threads : usable_cores(), images.batch);
  const auto segment = params.single_precision ? segment_batch<float> : segment_batch<double>;
  segment(images, params, workers, labels);
}

}  // namespace segclip
