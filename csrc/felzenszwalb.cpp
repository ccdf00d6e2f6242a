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

int32_t root_of(const int32_t* parent, int32_t x) {
  while (parent[x] != x) x = parent[x];
  return x;
}

// Calls test(a, b, code) for every one of `count` edges whose ends have different roots a and b, in the given
// order. Most edges are internal by their turn: a branch-free pass over a block first drops those whose ends
// share a grandparent, which saves the mispredicted branches that otherwise dominate. A stale parent only
// keeps too many, and that pass brings the pixels it touches closer to their root.
template <typename Edge, typename Test>
void for_each_crossing(const Image& image, const Edge* edges, size_t count, int32_t* parent, Test test) {
  constexpr size_t kBlock = 256;
  struct Crossing {
    int32_t a, b;
    Code code;
  };
  std::array<Crossing, kBlock> kept;
  const auto first = image.first(), second = image.second();
  for (size_t start = 0; start < count; start += kBlock) {
    size_t crossing = 0;
    for (size_t i = start; i < std::min(count, start + kBlock); ++i) {
      const auto code = static_cast<Code>(edges[i]);
      const auto pixel = static_cast<int32_t>(code & kPixelMask);
      const int32_t u = pixel + first[code >> kPixelBits], v = pixel + second[code >> kPixelBits];
      const int32_t a = parent[parent[u]], b = parent[parent[v]];
      parent[u] = a;
      parent[v] = b;
      kept[crossing] = {a, b, code};
      crossing += a != b;
    }
    for (size_t i = 0; i < crossing; ++i) {
      const int32_t a = root_of(parent, kept[i].a), b = root_of(parent, kept[i].b);
      if (a != b) test(a, b, kept[i].code);
    }
  }
}

// Links the smaller component under the larger one, without a branch; the labels do not depend on which root
// survives.
Component& link(int32_t* parent, Component* component, int32_t a, int32_t b) {
  const int32_t size_a = component[a].size, size_b = component[b].size;
  const int32_t root = size_a < size_b ? b : a, child = a ^ b ^ root;
  parent[child] = root;
  component[root].size = size_a + size_b;
  return component[root];
}

// Takes the edges level by level. Those inside a component when their level's turn comes, two fifths of a
// photograph's, are never sorted.
template <typename Real>
void merge_edges(const Image& image, const FelzenszwalbParams& params, Workspace<Real>& ws) {
  const double k = params.scale / 255.0;
  const Real* weights = ws.weights.data();
  const int64_t pixels = image.pixels, min_size = params.min_size;
  int32_t* parent = ws.parent.at_least(pixels);
  Component* component = ws.component.at_least(pixels);
  for (int64_t p = 0; p < pixels; ++p) parent[p] = static_cast<int32_t>(p);
  std::fill_n(component, pixels, Component{1, static_cast<float>(k)});
  Code *rejected = ws.rejected.at_least(image.edges()), *end = rejected;
  uint64_t first_key = 0;
  for (const uint32_t last_key : level_ends(image, ws)) {
    if (last_key < first_key) continue;  // many edges of one weight
    if (first_key > 0)                   // flatter trees: fewer edges seem to cross
      for (int64_t p = 0; p < pixels; ++p) parent[p] = parent[parent[parent[p]]];
    const size_t count = take_level(image, {static_cast<uint32_t>(first_key), last_key}, ws);
    for_each_crossing(image, ws.records.data(), count, parent, [=, &end](int32_t a, int32_t b, Code code) {
      const double w = weight_of(code, weights, pixels);
      if (w < std::min(component[a].threshold, component[b].threshold)) {
        Component& merged = link(parent, component, a, b);
        merged.threshold = static_cast<float>(w + k / merged.size);
      } else {
        *end++ = code;
      }
    });
    first_key = uint64_t{last_key} + 1;
  }
  for_each_crossing(image, rejected, end - rejected, parent, [=](int32_t a, int32_t b, Code) {
    if (component[a].size < min_size || component[b].size < min_size) link(parent, component, a, b);
  });
}

template <typename Real>
void number_segments(const Image& image, Workspace<Real>& ws, int32_t* labels) {
  int32_t *parent = ws.parent.data(), count = 0;
  Component* component = ws.component.data();
  for (int64_t p = 0; p < image.pixels; ++p) component[p].size = -1;  // reused: label of the root
  for (int64_t p = 0; p < image.pixels; ++p) {
    int32_t& label = component[parent[p] = root_of(parent, parent[p])].size;
    if (label < 0) label = count++;
    labels[p] = label;
  }
}

template <typename Real>
void segment_image(const Image& image, const FelzenszwalbParams& params, Workspace<Real>& ws,
                   int32_t* labels) {
  weigh_edges(image, params.taps, ws);
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
