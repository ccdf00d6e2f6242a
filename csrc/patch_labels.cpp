#include "patch_labels.h"

#include <algorithm>
#include <future>
#include <vector>

namespace segclip {
namespace {

constexpr int64_t kImagesPerThread = 16;  // about 1 ms of work: less is not worth starting a thread

// Counts labels in a hash table, and knows the most frequent one, the smallest of several.
class Majority {
 public:
  // `count` more pixels of this label.
  void add(int64_t label, int64_t count) {
    Slot* slot = find(label);
    if (slot->patch != patch_) {
      if (2 * ++used_ > slots_.size()) {
        grow();
        slot = find(label);
      }
      *slot = {label, 0, patch_};
    }
    slot->count += count;
    if (slot->count > best_.count || (slot->count == best_.count && label < best_.label)) best_ = *slot;
  }

  // The answer; ready for the next patch afterwards.
  int64_t take() {
    const int64_t label = best_.label;
    best_ = {};
    used_ = 0;
    ++patch_;
    return label;
  }

 private:
  struct Slot {
    int64_t label = 0, count = 0;
    uint64_t patch = 0;  // in use if it is the present one, so that nothing needs to be cleared
  };

  Slot* find(int64_t label) {
    const size_t mask = slots_.size() - 1;
    const uint64_t hash = static_cast<uint64_t>(label) * 0x9E3779B97F4A7C15u;  // 2^64 / golden ratio
    size_t i = hash >> 32 & mask;
    while (slots_[i].patch == patch_ && slots_[i].label != label) i = (i + 1) & mask;
    return &slots_[i];
  }

  void grow() {
    std::vector<Slot> old(2 * slots_.size());
    old.swap(slots_);
    for (const Slot& slot : old)
      if (slot.patch == patch_) *find(slot.label) = slot;
  }

  std::vector<Slot> slots_ = std::vector<Slot>(64);  // a power of two
  size_t used_ = 0;
  uint64_t patch_ = 1;
  Slot best_;
};

template <typename Label>
int64_t majority(const Label* corner, const LabelBatch<Label>& labels, int64_t patch, Majority& votes) {
  int64_t last = *corner, run = 0;
  for (int64_t y = 0; y < patch; ++y) {
    const Label* row = corner + y * labels.row_stride;
    for (int64_t x = 0; x < patch; ++x) {
      const int64_t label = row[x * labels.column_stride];
      if (label != last) {
        votes.add(last, run);
        last = label;
        run = 0;
      }
      ++run;
    }
  }
  votes.add(last, run);
  return votes.take();
}

template <typename Label>
int64_t mean_of(const Label* corner, const LabelBatch<Label>& labels, int64_t patch) {
  uint64_t sum = 0;  // unsigned: wraps around as PyTorch's sum does
  for (int64_t y = 0; y < patch; ++y)
    for (int64_t x = 0; x < patch; ++x)
      sum += static_cast<uint64_t>(corner[y * labels.row_stride + x * labels.column_stride]);
  return static_cast<int64_t>(sum) / (patch * patch);
}

}  // namespace

template <typename Label>
void patch_labels(const LabelBatch<Label>& labels, int64_t patch, bool mean, int threads, int64_t* out) {
  const int64_t rows = labels.height / patch, columns = labels.width / patch;
  const auto work = [&](int64_t begin, int64_t end) {
    Majority votes;
    int64_t* result = out + begin * rows * columns;
    for (int64_t image = begin; image < end; ++image)
      for (int64_t y = 0; y < rows; ++y)
        for (int64_t x = 0; x < columns; ++x) {
          const Label* corner = labels.data + image * labels.batch_stride + y * patch * labels.row_stride +
                                x * patch * labels.column_stride;
          *result++ = mean ? mean_of(corner, labels, patch) : majority(corner, labels, patch, votes);
        }
  };
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, labels.batch / kImagesPerThread));
  const auto start = [&](int64_t part) { return labels.batch * part / parts; };
  std::vector<std::future<void>> others;  // where no thread is to be had, `get` does the work
  for (int64_t part = 1; part < parts; ++part)
    others.push_back(std::async(work, start(part), start(part + 1)));
  work(0, start(1));
  for (std::future<void>& other : others) other.get();
}

template void patch_labels(const LabelBatch<int32_t>&, int64_t, bool, int, int64_t*);
template void patch_labels(const LabelBatch<int64_t>&, int64_t, bool, int, int64_t*);

}  // namespace segclip
