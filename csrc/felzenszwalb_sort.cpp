#include <algorithm>
#include <utility>

#include "felzenszwalb_internal.h"

// Under ThreadSanitizer the portable loop runs, so that the tests see both.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__SANITIZE_THREAD__)
#define SEGCLIP_AVX512 __attribute__((target("avx512f,avx512vl,popcnt")))
#include <immintrin.h>
#endif

namespace segclip::detail {
namespace {

// ---- Step 3a: the edges of a level

// What is looked at of one row of edges of one direction.
struct Row {
  const float* weights;                // rounded
  const int32_t *parent_a, *parent_b;  // of the ends
  int64_t count;
  Code code;  // of the first one
};

SEGCLIP_MULTIVERSION void mask_row(const Row& row, Level level, uint8_t* __restrict mask) {
  const float* weights = row.weights;
  const int32_t *a = row.parent_a, *b = row.parent_b;
  const int64_t count = row.count;
  const uint32_t first = level.first, extent = level.last - level.first;
  for (int64_t x = 0; x < count; ++x) mask[x] = (bits_of(weights[x]) - first <= extent) & (a[x] != b[x]);
}

// Appends the edges of the row that belong to the level to `out`. The mask has room for whole words of 64.
Record* take_row(const Row& row, Level level, uint8_t* mask, Record* out) {
  mask_row(row, level, mask);
  std::fill(mask + row.count, mask + (row.count + 63) / 64 * 64, uint8_t{0});
  for (int64_t start = 0; start < row.count; start += 64) {
    uint64_t bits = 0;
    for (int byte = 0; byte < 8; ++byte) {
      uint64_t cells;
      std::memcpy(&cells, mask + start + 8 * byte, 8);
      bits |= (cells * 0x0102040810204080u >> 56) << 8 * byte;  // eight bytes 0 or 1 to eight bits
    }
    for (; bits != 0; bits &= bits - 1) {
      const int64_t x = start + __builtin_ctzll(bits);
      *out++ = Record{bits_of(row.weights[x])} << 32 | (row.code + static_cast<Code>(x));
    }
  }
  return out;
}

#ifdef SEGCLIP_AVX512
// The same with AVX-512, which can store some lanes side by side. Writes up to 7 records too many.
SEGCLIP_AVX512 Record* take_row_avx512(const Row& row, Level level, Record* out) {
  const __m256i first = _mm256_set1_epi32(static_cast<int>(level.first));
  const __m256i extent = _mm256_set1_epi32(static_cast<int>(level.last - level.first));
  __m512i codes = _mm512_add_epi64(_mm512_set1_epi64(row.code), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
  for (int64_t x = 0; x < row.count; x += 8) {
    const auto lanes = static_cast<__mmask8>(row.count - x >= 8 ? 0xff : (1 << (row.count - x)) - 1);
    const __m256i keys = _mm256_castps_si256(_mm256_maskz_loadu_ps(lanes, row.weights + x));
    const __m256i a = _mm256_maskz_loadu_epi32(lanes, row.parent_a + x);
    const __m256i b = _mm256_maskz_loadu_epi32(lanes, row.parent_b + x);
    const __mmask8 crossing = _mm256_mask_cmpneq_epi32_mask(lanes, a, b);
    const __mmask8 taken = _mm256_mask_cmple_epu32_mask(crossing, _mm256_sub_epi32(keys, first), extent);
    const __m512i wide = _mm512_maskz_cvtepu32_epi64(lanes, keys);
    const __m512i records = _mm512_or_si512(_mm512_maskz_slli_epi64(lanes, wide, 32), codes);
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi64(taken, records));
    out += __builtin_popcount(taken);
    codes = _mm512_add_epi64(codes, _mm512_set1_epi64(8));
  }
  return out;
}

bool has_avx512() {
  static const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl");
  return has;
}
#endif

// ---- Step 3b: their order (weight, code)

constexpr int kDigitBits = 12;

template <int kBits>
using Histogram = std::array<uint32_t, size_t{1} << kBits>;

template <int kBits>
void to_offsets(Histogram<kBits>& histogram) {
  uint32_t total = 0;
  for (uint32_t& count : histogram) total += std::exchange(count, total);
}

// Stable radix sort of from[0 .. count) by the lower `bits` bits of value(record), into `from` or `to`.
template <typename Value>
WideRecord* radix_sort(WideRecord* from, WideRecord* to, size_t count, int bits, Value value) {
  constexpr int kBits = 11;
  for (int shift = 0; shift < bits; shift += kBits) {
    const auto digit = [&](const WideRecord& record) { return value(record) >> shift & ((1 << kBits) - 1); };
    Histogram<kBits> offsets{};
    for (size_t i = 0; i < count; ++i) ++offsets[digit(from[i])];
    if (std::find(offsets.begin(), offsets.end(), count) != offsets.end()) continue;  // one digit only
    to_offsets<kBits>(offsets);
    for (size_t i = 0; i < count; ++i) to[offsets[digit(from[i])]++] = from[i];
    std::swap(from, to);
  }
  return from;
}

// Sorts by all bits of the weight, then by the code, for levels whose weights crowd together.
template <typename Real>
void sort_wide(const Image& image, Workspace<Real>& ws, size_t count) {
  Record* records = ws.records.data();
  WideRecord *from = ws.wide.at_least(count), *to = ws.wide_spare.at_least(count);
  for (size_t i = 0; i < count; ++i) {
    const auto code = static_cast<Code>(records[i]);
    from[i] = {bits_of(weight_of(code, ws.weights.data(), image.pixels)), code};
  }
  WideRecord* by_code = radix_sort(from, to, count, 32, [](const WideRecord& r) { return r.code; });
  const auto bits = [](const WideRecord& r) { return r.bits; };
  const WideRecord* sorted = radix_sort(by_code, by_code == from ? to : from, count, 8 * sizeof(Real), bits);
  for (size_t i = 0; i < count; ++i) records[i] = sorted[i].code;  // the key is not needed any more
}

// Whether any of records[first .. last) has not a larger key than the one before it.
SEGCLIP_MULTIVERSION bool any_not_larger(const Record* records, size_t first, size_t last) {
  uint64_t found = 0;
  for (size_t i = first; i < last; ++i)
    found |= static_cast<int64_t>(records[i - 1] >> 32) >= static_cast<int64_t>(records[i] >> 32);
  return found != 0;
}

// Insertion pass over records in order but for the lower bits of their keys, and those of weights with the
// same key. False when it moved more than `budget`.
template <typename Real>
bool fix_up(Record* records, size_t count, const Real* weights, int64_t pixels, size_t budget) {
  const auto after = [&](Record a, Record b) {
    const uint64_t key_a = a >> 32, key_b = b >> 32;
    if (sizeof(Real) == 4 || key_a != key_b) return key_a > key_b;
    return bits_of(weight_of(static_cast<Code>(a), weights, pixels)) >
           bits_of(weight_of(static_cast<Code>(b), weights, pixels));
  };
  for (size_t start = 1; start < count; start += 64) {
    const size_t end = std::min(count, start + 64);
    if (!any_not_larger(records, start, end)) continue;
    for (size_t i = start; i < end; ++i) {
      const Record record = records[i];
      if (!after(records[i - 1], record)) continue;
      size_t j = i;
      for (; j > 0 && after(records[j - 1], record) && budget > 0; --j, --budget) records[j] = records[j - 1];
      records[j] = record;
      if (budget == 0) return false;
    }
  }
  return true;
}

// Sorts ws.records. Two stable passes over 24 bits of the key and an insertion pass for the rest sort almost
// every level; else all bits are sorted.
template <typename Real>
void sort_level(const Image& image, Level level, Workspace<Real>& ws, size_t count) {
  Record *records = ws.records.data(), *spare = ws.spare.at_least(count);
  uint32_t extent = level.last - level.first;
  if (level.last == kLastKey) {  // no edge is that heavy
    extent = 0;
    for (size_t i = 0; i < count; ++i)
      extent = std::max(extent, static_cast<uint32_t>(records[i] >> 32) - level.first);
  }
  int unsorted = 0;  // bits
  while (extent >> unsorted >> 2 * kDigitBits != 0) ++unsorted;
  const auto low = [&](Record r) { return ((r >> 32) - level.first) >> unsorted & ((1u << kDigitBits) - 1); };
  const auto high = [&](Record r) { return ((r >> 32) - level.first) >> (unsorted + kDigitBits); };
  Histogram<kDigitBits> lows{}, highs{};
  for (size_t i = 0; i < count; ++i) {
    ++lows[low(records[i])];
    ++highs[high(records[i])];
  }
  to_offsets<kDigitBits>(lows);
  to_offsets<kDigitBits>(highs);
  for (size_t i = 0; i < count; ++i) spare[lows[low(records[i])]++] = records[i];
  for (size_t i = 0; i < count; ++i) records[highs[high(spare[i])]++] = spare[i];
  if (sizeof(Real) == 4 && unsorted == 0) return;
  if (!fix_up(records, count, ws.weights.data(), image.pixels, count / 2)) sort_wide(image, ws, count);
}

}  // namespace

template <typename Real>
std::array<uint32_t, kLevels> level_ends(const Image& image, const Workspace<Real>& ws) {
  constexpr uint32_t kSamples = 256;
  std::array<uint32_t, kLevels> ends;
  ends.fill(kLastKey);
  if (image.height < 32 || image.width < 32) return ends;
  std::array<uint32_t, kSamples> keys;
  for (uint32_t i = 0; i < kSamples; ++i) {  // spread evenly: fractions of i / 1.3247 and i / 1.3247^2
    const uint64_t y = (uint64_t{i * 3242174889u} * (image.height - 1)) >> 32;
    const uint64_t x = (uint64_t{i * 2447445414u} * (image.width - 1)) >> 32;
    keys[i] = bits_of(rounded_weights(ws)[i % 4 * image.pixels + y * image.width + x]);
  }
  std::sort(keys.begin(), keys.end());
  for (uint32_t level = 1; level < kLevels; ++level) ends[level - 1] = keys[kSamples * level / kLevels];
  return ends;
}

template <typename Real>
size_t take_level(const Image& image, Level level, Workspace<Real>& ws) {
  Record* records = ws.records.at_least(image.edges() + 7);
  Record* end = records;
  uint8_t* mask = ws.mask.at_least((image.width + 63) / 64 * 64);
  const int32_t* parent = ws.parent.data();
  for (int direction = 0; direction < 4; ++direction) {
    for (int64_t y = 0; y < image.rows(direction); ++y) {
      const int64_t start = y * image.width;
      const Row row{rounded_weights(ws) + direction * image.pixels + start,
                    parent + start + image.first()[direction], parent + start + image.second()[direction],
                    image.columns(direction),
                    static_cast<Code>(direction) << kPixelBits | static_cast<Code>(start)};
#ifdef SEGCLIP_AVX512
      if (has_avx512()) {
        end = take_row_avx512(row, level, end);
        continue;
      }
#endif
      end = take_row(row, level, mask, end);
    }
  }
  sort_level(image, level, ws, end - records);
  return end - records;
}

template std::array<uint32_t, kLevels> level_ends(const Image&, const Workspace<double>&);
template std::array<uint32_t, kLevels> level_ends(const Image&, const Workspace<float>&);
template size_t take_level(const Image&, Level, Workspace<double>&);
template size_t take_level(const Image&, Level, Workspace<float>&);

}  // namespace segclip::detail
