#include <algorithm>
#include <utility>

#include "felzenszwalb_internal.h"

namespace segclip::detail {
namespace {

constexpr int kDigitBits = 11;
constexpr int kBuckets = 1 << kDigitBits;

// ---- Step 3: edges in the order (weight, code)

using Histogram = std::array<uint32_t, kBuckets>;

template <typename Bits>
uint32_t digit(Bits bits, int shift) {
  return static_cast<uint32_t>(bits >> shift) & (kBuckets - 1);
}

void to_offsets(Histogram& histogram) {
  uint32_t total = 0;
  for (uint32_t& count : histogram) total += std::exchange(count, total);
}

// ---- float64: keys of 32 bits, and all 64 where these are not enough

// Full radix sort on all 64 bits of the weight, for images whose weights crowd together.
void sort_wide(const Image& image, Workspace<double>& ws) {
  const size_t edges = image.edges();
  WideRecord *from = ws.wide.at_least(edges), *to = ws.wide_spare.at_least(edges);
  WideRecord* end = from;
  for_each_edge(image, ws.weights.data(), [&](uint64_t bits, Code code) { *end++ = {bits, code}; });
  for (int shift = 0; shift < 64; shift += kDigitBits) {
    Histogram offsets{};
    for (size_t i = 0; i < edges; ++i) ++offsets[digit(from[i].bits, shift)];
    if (std::find(offsets.begin(), offsets.end(), edges) != offsets.end()) continue;  // one digit only
    to_offsets(offsets);
    for (size_t i = 0; i < edges; ++i) to[offsets[digit(from[i].bits, shift)]++] = from[i];
    std::swap(from, to);
  }
  Code* order = ws.order.data();
  for (size_t i = 0; i < edges; ++i) order[i] = from[i].code;
}

struct Split {  // number of edges of each kind
  size_t zero = 0, wide = 0, keyed = 0;
};

// Splits the edges: `records` gets (32-bit key << 32 | code) of those within 16 binades below the largest
// weight, sorted by the lower half of the upper 22 key bits; smaller non-zero ones go to `wide`; zeros,
// already in order, go to `order`. `high` counts the upper digit. Nothing is sorted if too many are wide.
Split make_records(const Image& image, Workspace<double>& ws, Histogram& high) {
  const double* weights = ws.weights.data();
  uint64_t largest = 0;
  for_each_edge(image, weights, [&](uint64_t bits, Code) { largest = std::max(largest, bits); });
  const uint64_t base = (std::max<uint64_t>(largest >> 52, 16) - 15) << 52;
  const auto key_of = [base](uint64_t bits) {
    return (bits - base) >> 24;
  };  // 4 bits of exponent, 28 of the rest
  Histogram low{};
  Split split;
  for_each_edge(image, weights, [&](uint64_t bits, Code) {
    if (bits >= base) {
      ++low[digit(key_of(bits), 10)];
      ++high[digit(key_of(bits), 21)];
      ++split.keyed;
    } else {
      ++(bits == 0 ? split.zero : split.wide);
    }
  });
  if (split.wide > image.edges() / 16) return split;
  to_offsets(low);
  Code* zero = ws.order.data();
  WideRecord* wide = ws.wide.at_least(split.wide);
  uint64_t* records = ws.records.at_least(split.keyed);
  for_each_edge(image, weights, [&](uint64_t bits, Code code) {
    if (bits >= base) {
      records[low[digit(key_of(bits), 10)]++] = key_of(bits) << 32 | code;
    } else if (bits == 0) {
      *zero++ = code;
    } else {
      *wide++ = {bits, code};
    }
  });
  return split;
}

// Insertion pass over records sorted by the upper 22 bits of their key. False when it moved more than
// `budget`.
bool fix_up(uint64_t* records, size_t count, const double* weights, int64_t pixels, int64_t budget) {
  const auto greater = [&](uint64_t a, uint64_t b) {
    const uint64_t key_a = a >> 32, key_b = b >> 32;
    if (key_a != key_b) return key_a > key_b;
    return weight_of(static_cast<Code>(a), weights, pixels) >
           weight_of(static_cast<Code>(b), weights, pixels);
  };
  for (size_t i = 1; i < count; ++i) {
    const uint64_t record = records[i];
    if (!greater(records[i - 1], record)) continue;
    size_t j = i;
    do {
      records[j] = records[j - 1];
      if (--budget < 0) return false;
    } while (--j > 0 && greater(records[j - 1], record));
    records[j] = record;
  }
  return true;
}

}  // namespace

// Two stable 11-bit passes and an insertion pass sort almost every image; else all bits are sorted.
void sort_edges(const Image& image, Workspace<double>& ws) {
  const size_t edges = image.edges();
  Code* order = ws.order.at_least(edges);
  Histogram high{};
  const Split split = make_records(image, ws, high);
  if (split.wide > edges / 16) return sort_wide(image, ws);
  to_offsets(high);
  const uint64_t* records = ws.records.data();
  uint64_t* sorted = ws.spare.at_least(split.keyed);
  for (size_t i = 0; i < split.keyed; ++i) sorted[high[records[i] >> 53]++] = records[i];
  if (!fix_up(sorted, split.keyed, ws.weights.data(), image.pixels, edges / 2)) return sort_wide(image, ws);
  WideRecord* wide = ws.wide.data();
  std::sort(wide, wide + split.wide, [](const WideRecord& a, const WideRecord& b) {
    return a.bits != b.bits ? a.bits < b.bits : a.code < b.code;
  });
  order += split.zero;
  for (size_t i = 0; i < split.wide; ++i) *order++ = wide[i].code;
  for (size_t i = 0; i < split.keyed; ++i) *order++ = static_cast<Code>(sorted[i]);
}

// ---- float32: the weight is the key

// Three stable passes over all 32 bits; the first one reads the weights, the last one writes the codes.
void sort_edges(const Image& image, Workspace<float>& ws) {
  const size_t edges = image.edges();
  const float* weights = ws.weights.data();
  uint64_t *first = ws.records.at_least(edges), *second = ws.spare.at_least(edges);
  Code* order = ws.order.at_least(edges);
  Histogram low{}, middle{}, high{};
  for_each_edge(image, weights, [&](uint32_t bits, Code) {
    ++low[digit(bits, 0)];
    ++middle[digit(bits, kDigitBits)];
    ++high[digit(bits, 2 * kDigitBits)];
  });
  to_offsets(low);
  to_offsets(middle);
  to_offsets(high);
  for_each_edge(image, weights, [&](uint32_t bits, Code code) {
    first[low[digit(bits, 0)]++] = uint64_t{bits} << 32 | code;
  });
  for (size_t i = 0; i < edges; ++i) second[middle[digit(first[i] >> 32, kDigitBits)]++] = first[i];
  for (size_t i = 0; i < edges; ++i)
    order[high[digit(second[i] >> 32, 2 * kDigitBits)]++] = static_cast<Code>(second[i]);
}

}  // namespace segclip::detail
