#include <algorithm>

#include "felzenszwalb_internal.h"

namespace segclip::detail {
namespace {

constexpr int kDigitBits = 11;
constexpr int kBuckets = 1 << kDigitBits;

// ---- Step 3: edges in the order (weight, code)

using Histogram = std::array<uint32_t, kBuckets>;

void to_offsets(Histogram& histogram) {
  uint32_t total = 0;
  for (uint32_t& count : histogram) total += std::exchange(count, total);
}

// Full radix sort on all 64 bits of the weight, for images whose weights crowd together.
void sort_wide(const Image& image, Workspace& ws) {
  ws.wide.clear();
  for_each_edge(image, ws.weights, [&](uint64_t bits, Code code) { ws.wide.emplace_back(bits, code); });
  ws.wide_spare.resize(ws.wide.size());
  for (int shift = 0; shift < 64; shift += kDigitBits) {
    Histogram offsets{};
    for (const auto& edge : ws.wide) ++offsets[edge.first >> shift & (kBuckets - 1)];
    if (std::find(offsets.begin(), offsets.end(), ws.wide.size()) != offsets.end())
      continue;  // one digit only
    to_offsets(offsets);
    for (const auto& edge : ws.wide) ws.wide_spare[offsets[edge.first >> shift & (kBuckets - 1)]++] = edge;
    ws.wide.swap(ws.wide_spare);
  }
  ws.order.clear();
  for (const auto& edge : ws.wide) ws.order.push_back(edge.second);
}

// Splits the edges: `records` gets (32-bit key << 32 | code) of those within 16 binades below the largest
// weight, in code order; smaller non-zero ones go to `wide`; zeros, already in order, go to `order`.
void make_records(const Image& image, Workspace& ws, Histogram& low, Histogram& high) {
  uint64_t largest = 0;
  for_each_edge(image, ws.weights, [&](uint64_t bits, Code) { largest = std::max(largest, bits); });
  const uint64_t base = (std::max<uint64_t>(largest >> 52, 16) - 15) << 52;
  ws.order.clear();
  ws.wide.clear();
  ws.records.resize(4 * image.pixels);
  uint64_t* out = ws.records.data();
  for_each_edge(image, ws.weights, [&](uint64_t bits, Code code) {
    if (bits >= base) {
      const uint64_t key = (bits - base) >> 24;  // 4 bits of exponent, 28 of the fraction
      ++low[key >> 10 & (kBuckets - 1)];
      ++high[key >> 21];
      *out++ = key << 32 | code;
    } else if (bits == 0) {
      ws.order.push_back(code);
    } else {
      ws.wide.emplace_back(bits, code);
    }
  });
  ws.records.resize(out - ws.records.data());
}

void scatter(const std::vector<uint64_t>& from, std::vector<uint64_t>& to, int shift, Histogram& offsets) {
  to.resize(from.size());
  for (const uint64_t record : from) to[offsets[record >> shift & (kBuckets - 1)]++] = record;
}

// Insertion pass over records sorted by the upper 22 bits of their key. False when it moved more than
// `budget`.
bool fix_up(std::vector<uint64_t>& records, const std::vector<double>& weights, int64_t pixels,
            int64_t budget) {
  const auto greater = [&](uint64_t a, uint64_t b) {
    const uint64_t key_a = a >> 32, key_b = b >> 32;
    if (key_a != key_b) return key_a > key_b;
    return weight_of(static_cast<Code>(a), weights, pixels) >
           weight_of(static_cast<Code>(b), weights, pixels);
  };
  for (size_t i = 1; i < records.size(); ++i) {
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
void sort_edges(const Image& image, Workspace& ws) {
  Histogram low{}, high{};
  make_records(image, ws, low, high);
  const int64_t edges = static_cast<int64_t>(ws.records.size() + ws.order.size() + ws.wide.size());
  if (static_cast<int64_t>(ws.wide.size()) > edges / 16) return sort_wide(image, ws);
  to_offsets(low);
  to_offsets(high);
  scatter(ws.records, ws.spare, 42, low);
  scatter(ws.spare, ws.records, 53, high);
  if (!fix_up(ws.records, ws.weights, image.pixels, edges / 2)) return sort_wide(image, ws);
  std::sort(ws.wide.begin(), ws.wide.end());
  for (const auto& edge : ws.wide) ws.order.push_back(edge.second);
  for (const uint64_t record : ws.records) ws.order.push_back(static_cast<Code>(record));
}

}  // namespace segclip::detail
