// One source, two back ends: what a block of CUDA threads can do, in terms that a CPU can do as well.
//
// Device code is written one warp at a time. `Lanes<T>` is a variable that each of the 32 lanes has its own
// copy of, `Warp::each` runs a piece of code in every lane. On a GPU, Lanes is a register and `each` is no
// loop. Compiled by a C++ compiler, a warp is a thread of the CPU that loops over its lanes, shared memory is
// an allocation, and atomics and barriers are the CPU's, so that sanitizers see what the GPU would do.
//
// A piece of code given to `each` or `for_each` must not read what another lane writes in the same piece,
// except through the relaxed accesses below. On the CPU the order of the lanes can be reversed to show such
// mistakes.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SEGCLIP_DEVICE __device__ __forceinline__
#else
#define SEGCLIP_DEVICE inline
#include <condition_variable>
#include <mutex>
#endif

namespace segclip::parallel {

constexpr int kLanes = 32;
constexpr int kMaxWarps = 32;  // of a block

#ifdef __CUDACC__

template <typename T>
struct Lanes {
  T value;
  SEGCLIP_DEVICE T& operator[](int) { return value; }
  SEGCLIP_DEVICE const T& operator[](int) const { return value; }
};

// ---- Memory that other threads use at the same time; nothing is ordered but by barriers.

template <typename T>
SEGCLIP_DEVICE T relaxed_load(const T* p) {
  return *static_cast<const volatile T*>(p);
}

template <typename T>
SEGCLIP_DEVICE void relaxed_store(T* p, T value) {
  *static_cast<volatile T*>(p) = value;
}

// The same for 4 or 8 bytes of global memory that only this block uses at the time: served by the cache of
// its multiprocessor.
template <typename T>
SEGCLIP_DEVICE T block_load(const T* p) {
  T value;
  if constexpr (sizeof(T) == 4) {
    unsigned bits;
    asm volatile("ld.relaxed.cta.global.u32 %0, [%1];"
                 : "=r"(bits)
                 : "l"(__cvta_generic_to_global(p))
                 : "memory");
    memcpy(&value, &bits, sizeof value);
  } else {
    static_assert(sizeof(T) == 8, "one access");
    unsigned long long bits;
    asm volatile("ld.relaxed.cta.global.u64 %0, [%1];"
                 : "=l"(bits)
                 : "l"(__cvta_generic_to_global(p))
                 : "memory");
    memcpy(&value, &bits, sizeof value);
  }
  return value;
}

template <typename T>
SEGCLIP_DEVICE void block_store(T* p, T value) {
  if constexpr (sizeof(T) == 4) {
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    asm volatile("st.relaxed.cta.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "r"(bits)
                 : "memory");
  } else {
    static_assert(sizeof(T) == 8, "one access");
    unsigned long long bits;
    memcpy(&bits, &value, sizeof bits);
    asm volatile("st.relaxed.cta.global.u64 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "l"(bits)
                 : "memory");
  }
}

// The 64-bit atomics of CUDA are declared for unsigned long long alone.
template <typename T>
struct Native {
  using type = T;
};
template <>
struct Native<uint64_t> {
  using type = unsigned long long;
};
template <typename T>
using NativeOf = typename Native<T>::type;

template <typename T>
SEGCLIP_DEVICE T atomic_add(T* p, T value) {
  return atomicAdd(reinterpret_cast<NativeOf<T>*>(p), static_cast<NativeOf<T>>(value));
}

template <typename T>
SEGCLIP_DEVICE void atomic_min(T* p, T value) {
  atomicMin(reinterpret_cast<NativeOf<T>*>(p), static_cast<NativeOf<T>>(value));
}

template <typename T>
SEGCLIP_DEVICE void atomic_max(T* p, T value) {
  atomicMax(reinterpret_cast<NativeOf<T>*>(p), static_cast<NativeOf<T>>(value));
}

// Writes `desired` if *p is `expected`; returns what it was.
SEGCLIP_DEVICE uint32_t atomic_replace(uint32_t* p, uint32_t expected, uint32_t desired) {
  return atomicCAS(p, expected, desired);
}

SEGCLIP_DEVICE int count_bits(uint32_t x) { return __popc(x); }
SEGCLIP_DEVICE int lowest_bit(uint32_t x) { return __ffs(static_cast<int>(x)) - 1; }  // x != 0

struct Warp {
  SEGCLIP_DEVICE static int lane() { return static_cast<int>(threadIdx.x) % kLanes; }

  template <typename F>
  SEGCLIP_DEVICE void each(F f) const {
    f(lane());
    __syncwarp();
  }

  // Bit i is lane i's.
  SEGCLIP_DEVICE uint32_t ballot(const Lanes<bool>& x) const { return __ballot_sync(~0u, x.value); }

  // Replaces the values by the sums of those of lower lanes; returns the sum of all.
  SEGCLIP_DEVICE uint32_t exclusive_sum(Lanes<uint32_t>& x) const {
    const uint32_t own = x.value;
    uint32_t sum = own;
    for (int step = 1; step < kLanes; step *= 2) {
      const uint32_t lower = __shfl_up_sync(~0u, sum, step);
      if (lane() >= step) sum += lower;
    }
    x.value = sum - own;
    return __shfl_sync(~0u, sum, kLanes - 1);
  }

  template <typename T>
  SEGCLIP_DEVICE T minimum(const Lanes<T>& x) const {
    T least = x.value;
    for (int step = kLanes / 2; step > 0; step /= 2) {
      const T other = __shfl_xor_sync(~0u, least, step);
      if (other < least) least = other;
    }
    return least;
  }

  template <typename T>
  SEGCLIP_DEVICE T sum(const Lanes<T>& x) const {
    T all = x.value;
    for (int step = kLanes / 2; step > 0; step /= 2) all += __shfl_xor_sync(~0u, all, step);
    return all;
  }

  template <typename T>
  SEGCLIP_DEVICE T of_lane(const Lanes<T>& x, int source) const {
    return __shfl_sync(~0u, x.value, source);
  }
};

// Some or all warps of a block, as one of them sees it.
struct Team {
  int rank, warps;  // this warp's place in the team, and its size
  int barrier;      // hardware barrier; teams that wait at the same time use different ones

  SEGCLIP_DEVICE Warp warp() const { return {}; }
  SEGCLIP_DEVICE int64_t threads() const { return int64_t{warps} * kLanes; }

  // All warps of the team arrive before any leaves; what they wrote before is visible after.
  SEGCLIP_DEVICE void sync() const {
    asm volatile("barrier.sync %0, %1;" ::"r"(barrier), "r"(warps * kLanes) : "memory");
  }

  // f(i) for first <= i < last, spread over the team; no barrier after.
  template <typename Int, typename F>
  SEGCLIP_DEVICE void for_each(Int first, Int last, F f) const {
    for (int64_t i = int64_t{first} + rank * kLanes + Warp::lane(); i < int64_t{last}; i += threads())
      f(static_cast<Int>(i));
    __syncwarp();
  }

  // The warp of rank 0 alone: one lane of it.
  template <typename F>
  SEGCLIP_DEVICE void once(F f) const {
    if (rank == 0 && Warp::lane() == 0) f();
    __syncwarp();
  }
};

#define SEGCLIP_TALLY(field, amount)

#else  // ---- the CPU

template <typename T>
struct Lanes {
  T values[kLanes];
  T& operator[](int lane) { return values[lane]; }
  const T& operator[](int lane) const { return values[lane]; }
};

template <typename T>
T relaxed_load(const T* p) {
  T value;
  __atomic_load(p, &value, __ATOMIC_RELAXED);
  return value;
}

template <typename T>
void relaxed_store(T* p, T value) {
  __atomic_store(p, &value, __ATOMIC_RELAXED);
}

template <typename T>
T block_load(const T* p) {
  static_assert(sizeof(T) == alignof(T) && sizeof(T) >= 4, "one access");
  return relaxed_load(p);
}

template <typename T>
void block_store(T* p, T value) {
  relaxed_store(p, value);
}

template <typename T>
T atomic_add(T* p, T value) {
  return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
}

template <typename T>
void atomic_min(T* p, T value) {
  T old = relaxed_load(p);
  while (value < old &&
         !__atomic_compare_exchange(p, &old, &value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

template <typename T>
void atomic_max(T* p, T value) {
  T old = relaxed_load(p);
  while (old < value &&
         !__atomic_compare_exchange(p, &old, &value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

inline uint32_t atomic_replace(uint32_t* p, uint32_t expected, uint32_t desired) {
  __atomic_compare_exchange_n(p, &expected, desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;  // holds what was found if that was something else
}

inline int count_bits(uint32_t x) { return __builtin_popcount(x); }
inline int lowest_bit(uint32_t x) { return __builtin_ctz(x); }  // x != 0

struct Warp {
  bool reversed = false;  // run the lanes from the last to the first

  template <typename F>
  void each(F f) const {
    for (int i = 0; i < kLanes; ++i) f(reversed ? kLanes - 1 - i : i);
  }

  uint32_t ballot(const Lanes<bool>& x) const {
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(x[i]) << i;
    return bits;
  }

  uint32_t exclusive_sum(Lanes<uint32_t>& x) const {
    uint32_t sum = 0;
    for (int i = 0; i < kLanes; ++i) {
      const uint32_t own = x[i];
      x[i] = sum;
      sum += own;
    }
    return sum;
  }

  template <typename T>
  T minimum(const Lanes<T>& x) const {
    T least = x[0];
    for (int i = 1; i < kLanes; ++i)
      if (x[i] < least) least = x[i];
    return least;
  }

  template <typename T>
  T sum(const Lanes<T>& x) const {
    T all = 0;
    for (int i = 0; i < kLanes; ++i) all += x[i];
    return all;
  }

  template <typename T>
  T of_lane(const Lanes<T>& x, int source) const {
    return x[source];
  }
};

class Barrier {
 public:
  explicit Barrier(int warps) : warps_(warps) {}

  void wait() {
    if (warps_ == 1) return;
    std::unique_lock<std::mutex> lock(mutex_);
    const uint64_t turn = turn_;
    if (++arrived_ == warps_) {
      arrived_ = 0;
      ++turn_;
      all_here_.notify_all();
    } else {
      all_here_.wait(lock, [&] { return turn_ != turn; });
    }
  }

 private:
  const int warps_;
  int arrived_ = 0;
  uint64_t turn_ = 0;
  std::mutex mutex_;
  std::condition_variable all_here_;
};

struct Team {
  int rank, warps;
  Barrier* barrier;
  bool reversed = false;

  Warp warp() const { return {reversed}; }
  int64_t threads() const { return int64_t{warps} * kLanes; }
  void sync() const { barrier->wait(); }

  template <typename Int, typename F>
  void for_each(Int first, Int last, F f) const {
    for (int64_t start = int64_t{first} + rank * kLanes; start < int64_t{last}; start += threads())
      warp().each([&](int lane) {
        if (start + lane < int64_t{last}) f(static_cast<Int>(start + lane));
      });
  }

  template <typename F>
  void once(F f) const {
    if (rank == 0) f();
  }
};

// Adds to a counter of `block`; nothing on a GPU.
#define SEGCLIP_TALLY(field, amount)                                                                         \
  (block.counts ? (void)::segclip::parallel::atomic_add(&block.counts->field, static_cast<uint64_t>(amount)) \
                : (void)0)

#endif

}  // namespace segclip::parallel
