// Felzenszwalb superpixels on a GPU, stage 2: the edges of one image in the order (weight, code), a batch at
// a time.
//
// All edges are thrown into bins of like weight. From then on a batch is the next few whole bins: edges that
// can no longer merge anything are left out, what survives (about a quarter) is ordered in shared memory. A
// bin larger than a batch, as of equal weights, is ordered as a whole in global memory and then taken in
// parts.
#pragma once

#include "felzenszwalb_device.h"

namespace segclip::device {

// One image as the warps of its block see it.
template <typename Real, typename Parent>
struct Image {
  Block& block;
  const Problem<Real>& problem;
  Shared<Real>& shared;
  Parent* parent;      // of each pixel, itself if it is a root; in shared memory where that is large enough
  const Real* weight;  // (4, H, W)
  Header<Real>* header;
  Code *edges, *rest;          // in bins; rejected ones
  Component* component;        // of each root
  uint32_t* bins;              // ends of the bins in `edges`
  BitsOf<Real>* least_weight;  // of each small segment's edges, in the second pass
  Code* least_code;
  uint32_t* labels;  // the output; scratch until the end
  uint32_t pixels, width;

  SEGCLIP_DEVICE Image(Block& b, const Problem<Real>& p, int64_t image, Parent* parents)
      : block(b),
        problem(p),
        shared(*reinterpret_cast<Shared<Real>*>(b.shared)),
        parent(parents),
        weight(p.weights(image)),
        header(p.header(image)),
        edges(p.template at<Code>(image, p.layout.edges)),
        rest(p.template at<Code>(image, p.layout.rest)),
        component(p.template at<Component>(image, p.layout.components)),
        bins(p.template at<uint32_t>(image, p.layout.bins)),
        least_weight(p.template at<BitsOf<Real>>(image, p.layout.planes)),
        least_code(reinterpret_cast<Code*>(least_weight + p.pixels)),
        labels(reinterpret_cast<uint32_t*>(p.labels) + image * int64_t{p.pixels}),
        pixels(p.pixels),
        width(static_cast<uint32_t>(p.width)) {}

  SEGCLIP_DEVICE uint32_t first(Code e) const { return (e & kPixelMask) + first_of(e >> kPixelBits); }
  SEGCLIP_DEVICE uint32_t second(Code e) const {
    return (e & kPixelMask) + second_of(e >> kPixelBits, width);
  }
  SEGCLIP_DEVICE Real weight_of(Code e) const {
    return weight[static_cast<size_t>(e >> kPixelBits) * pixels + (e & kPixelMask)];
  }
};

// The forest lies in shared memory with 16 bits for a pixel, or in global memory with 32.
SEGCLIP_DEVICE uint32_t load_parent(const uint16_t* parent) { return relaxed_load(parent); }
SEGCLIP_DEVICE uint32_t load_parent(const uint32_t* parent) { return block_load(parent); }
SEGCLIP_DEVICE void store_parent(uint16_t* parent, uint32_t up) {
  relaxed_store(parent, static_cast<uint16_t>(up));
}
SEGCLIP_DEVICE void store_parent(uint32_t* parent, uint32_t up) { block_store(parent, up); }

struct Roots {
  uint32_t a, b;
  uint32_t steps;  // one after the other
};

// Roots of x and y in a forest that others may be changing: then possibly those of some time before. The two
// ways up are gone side by side. If `shortens`, every pixel on them is moved up to its grandparent.
template <bool shortens, typename Parent>
SEGCLIP_DEVICE Roots roots_of(Parent* parent, uint32_t x, uint32_t y) {
  uint32_t up_x = load_parent(parent + x), up_y = load_parent(parent + y), steps = 1;
  while (up_x != x || up_y != y) {
    const uint32_t above_x = load_parent(parent + up_x), above_y = load_parent(parent + up_y);
    if (shortens && above_x != up_x) store_parent(parent + x, above_x);
    if (shortens && above_y != up_y) store_parent(parent + y, above_y);
    x = up_x, up_x = above_x;
    y = up_y, up_y = above_y;
    ++steps;
  }
  return {x, y, steps};
}

template <typename Parent>
SEGCLIP_DEVICE uint32_t root_of(Parent* parent, uint32_t x) {
  for (uint32_t up = load_parent(parent + x); up != x;) {
    const uint32_t above = load_parent(parent + up);
    if (above != up) store_parent(parent + x, above);
    x = up, up = above;
  }
  return x;
}

// Joins the sets of x and y in a forest whose roots are the smallest members; many threads may do this at
// once.
SEGCLIP_DEVICE void unite(uint32_t* parent, uint32_t x, uint32_t y) {
  for (;;) {
    const Roots roots = roots_of<true>(parent, x, y);
    x = roots.a, y = roots.b;
    if (x == y) return;
    if (x < y) {
      const uint32_t other = x;
      x = y;
      y = other;
    }
    const uint32_t found = atomic_replace(parent + x, x, y);
    if (found == x) return;
    x = found;  // x is no root any more: go on from its parent, which is smaller, so that this ends
  }
}

// Places at the end of a list of *count items for the lanes that keep theirs.
SEGCLIP_DEVICE Lanes<uint32_t> places(const Warp& warp, uint32_t* count, const Lanes<bool>& keep) {
  const uint32_t kept = warp.ballot(keep);
  Lanes<uint32_t> place;
  warp.each([&](int lane) {
    place[lane] = 0;
    if (lane == 0 && kept != 0) place[lane] = atomic_add(count, static_cast<uint32_t>(count_bits(kept)));
  });
  const uint32_t start = warp.of_lane(place, 0);
  warp.each([&](int lane) { place[lane] = start + count_bits(kept & ((1u << lane) - 1)); });
  return place;
}

// put(i, sum of get(j) over j < i) for every i < count, by the whole team; get is called twice for each i.
template <typename Get, typename Put>
SEGCLIP_DEVICE void scan(const Team& team, uint32_t* partial, uint32_t count, Get get, Put put) {
  const uint32_t part =
      (count + static_cast<uint32_t>(team.threads()) - 1) / static_cast<uint32_t>(team.threads()) * kLanes;
  const uint64_t unclipped = uint64_t{part} * team.rank;
  const uint32_t start = unclipped < count ? static_cast<uint32_t>(unclipped) : count;
  const uint32_t stop = count - start > part ? start + part : count;
  const Warp warp = team.warp();
  const auto load = [&](uint32_t i, Lanes<uint32_t>& x) {
    warp.each([&](int lane) { x[lane] = i + lane < stop ? get(i + lane) : 0; });
  };
  uint32_t sum = 0;
  Lanes<uint32_t> x;
  for (uint32_t i = start; i < stop; i += kLanes) {
    load(i, x);
    sum += warp.exclusive_sum(x);
  }
  warp.each([&](int lane) {
    if (lane == 0) partial[team.rank] = sum;
  });
  team.sync();
  uint32_t before = 0;
  for (int i = 0; i < team.rank; ++i) before += partial[i];
  for (uint32_t i = start; i < stop; i += kLanes) {
    load(i, x);
    const uint32_t all = warp.exclusive_sum(x);
    warp.each([&](int lane) {
      if (i + lane < stop) put(i + lane, before + x[lane]);
    });
    before += all;
  }
  team.sync();
}

// Orders `count` items by a bitonic network in which every comparison puts the smaller item first, so that
// lengths other than powers of two need no padding. order(i, j) does that for items i < j. Returns the number
// of steps.
template <typename Order>
SEGCLIP_DEVICE uint32_t sort_network(const Team& team, uint32_t count, Order order) {
  uint32_t steps = 0;
  for (uint32_t half = 1; half < count; half *= 2) {
    const uint32_t pairs = (count + 2 * half - 1) / (2 * half) * half;
    team.for_each(0u, pairs,
                  [&](uint32_t t) {  // two runs of `half`: first with last, second with second last, ...
                    const uint32_t run = t / half * 2 * half, i = t % half, j = run + 2 * half - 1 - i;
                    if (j < count) order(run + i, j);
                  });
    team.sync();
    for (uint32_t step = half / 2; step > 0; step /= 2, ++steps) {
      team.for_each(0u, pairs, [&](uint32_t t) {
        const uint32_t i = t / step * 2 * step + t % step;
        if (i + step < count) order(i, i + step);
      });
      team.sync();
    }
    ++steps;
  }
  return steps;
}

// ---- Bins

// Bin of a weight: 16 binades below the largest one in equal steps of the bits, all smaller ones in bin 0.
template <typename Real>
SEGCLIP_DEVICE uint32_t bin_of(Real weight, BitsOf<Real> largest, int bin_bits) {
  const int step_bits = bin_bits - 4;  // of the fraction
  const int drop = Format<Real>::kFraction - step_bits;
  const BitsOf<Real> top = largest >> Format<Real>::kFraction;
  const BitsOf<Real> base = (top < kExponents ? 0 : top - (kExponents - 1)) << step_bits;
  const BitsOf<Real> key = bits_of(weight) >> drop;
  return key <= base ? 0 : static_cast<uint32_t>(key - base);
}

// Merges over edges of weight zero do not depend on their order and always happen, provided that no threshold
// rounds to zero: then these edges are united at once. They would keep the merging warp busy for long in flat
// areas.
template <typename Real, typename Parent>
SEGCLIP_DEVICE bool unites_zeros(const Image<Real, Parent>& im) {
  return static_cast<float>(im.problem.k / im.pixels) > 0;
}

// Fills `edges` bin by bin and `bins`; unites the ends of edges of weight zero in `labels`.
template <typename Real, typename Parent>
SEGCLIP_DEVICE void fill_bins(Image<Real, Parent>& im) {
  const Team& team = im.block.all;
  const uint32_t bins = 1u << im.problem.layout.bin_bits;
  auto* free = reinterpret_cast<unsigned char*>(im.shared.weight);
  const bool fits = bins * sizeof(uint32_t) <= im.block.shared_bytes - (free - im.block.shared);
  uint32_t* count = fits ? reinterpret_cast<uint32_t*>(free) : im.bins;
  const bool unites = unites_zeros(im);
  team.for_each(0u, bins, [&](uint32_t i) { count[i] = 0; });
  team.for_each(0u, im.pixels, [&](uint32_t i) { im.labels[i] = i; });
  team.sync();

  const BitsOf<Real> largest = im.header->largest;
  const auto bin = [&](Real w) { return bin_of(w, largest, im.problem.layout.bin_bits); };
  const auto each_edge = [&](auto visit) {
    team.for_each(0u, im.pixels, [&](uint32_t i) {
      Real w[4];  // all on their way before the first one is used
      for (Code direction = 0; direction < 4; ++direction)
        w[direction] = im.weight_of(direction << kPixelBits | i);
      for (Code direction = 0; direction < 4; ++direction)
        if (!(w[direction] < 0)) visit(direction << kPixelBits | i, w[direction]);
    });
    team.sync();
  };
  each_edge([&](Code e, Real w) {
    if (w == 0 && unites) {
      unite(im.labels, im.first(e), im.second(e));
    } else {
      atomic_add(&count[bin(w)], 1u);
    }
  });
  scan(
      team, im.shared.partial, bins, [&](uint32_t i) { return count[i]; },
      [&](uint32_t i, uint32_t before) { count[i] = before; });
  each_edge([&](Code e, Real w) {  // in any order inside a bin; counts end as the bins' ends
    if (w != 0 || !unites) im.edges[atomic_add(&count[bin(w)], 1u)] = e;
  });
  if (fits) team.for_each(0u, bins, [&](uint32_t i) { im.bins[i] = count[i]; });
  team.sync();
}

// ---- Batches

// Where the next batch ends if it is made of whole bins; moves `bin` on. Equal to `begin` if not even one bin
// fits.
template <typename Real, typename Parent>
SEGCLIP_DEVICE uint32_t end_of_bins(const Image<Real, Parent>& im, const Warp& warp, uint32_t begin,
                                    uint32_t& bin) {
  const uint32_t bins = 1u << im.problem.layout.bin_bits;
  for (;;) {
    Lanes<bool> beyond;
    warp.each([&](int lane) {
      beyond[lane] = bin + lane >= bins || im.bins[bin + lane] - begin > Shared<Real>::kBatch;
    });
    const uint32_t stop = warp.ballot(beyond);
    bin += stop ? lowest_bit(stop) : kLanes;
    if (stop) return bin == 0 ? 0 : im.bins[bin - 1];
  }
}

// Makes the next batch, by the preparing team, while the merging warp changes the forest: a root of some time
// ago only lets through more edges than necessary. Edges of a final component go to `rest`.
template <typename Real, typename Parent>
SEGCLIP_DEVICE void prepare_batch(Image<Real, Parent>& im) {
  [[maybe_unused]] Block& block = im.block;
  const Team& team = block.preparing;
  const Warp warp = team.warp();
  auto& shared = im.shared;
  Plan plan = shared.plan;  // every warp comes to the same conclusions from it
  const uint32_t begin = plan.edge;
  if (begin == plan.ordered) {
    plan.ordered = end_of_bins(im, warp, begin, plan.bin);
    if (plan.ordered == begin && plan.bin < 1u << im.problem.layout.bin_bits) {
      plan.ordered = im.bins[plan.bin++];
      sort_network(team, plan.ordered - begin, [&](uint32_t i, uint32_t j) {
        const Code a = im.edges[begin + i], b = im.edges[begin + j];
        const Real wa = im.weight_of(a), wb = im.weight_of(b);
        SEGCLIP_TALLY(large_exchanges, 1);
        if (wb < wa || (wb == wa && b < a)) {
          im.edges[begin + i] = b;
          im.edges[begin + j] = a;
        }
      });
    }
  }
  constexpr uint32_t kBatch = Shared<Real>::kBatch;
  const uint32_t end = plan.ordered - begin > kBatch ? begin + kBatch : plan.ordered;
  plan.edge = end;
  team.sync();  // all have read the plan
  team.once([&] {
    shared.plan = plan;
    shared.count = 0;
    shared.last = end == begin;
    SEGCLIP_TALLY(batches, 1);
    SEGCLIP_TALLY(edges, end - begin);
  });
  team.sync();

  for (uint32_t start = begin + team.rank * kLanes; start < end;
       start += static_cast<uint32_t>(team.threads())) {
    Lanes<bool> survives, settled;
    Lanes<Code> code;
    warp.each([&](int lane) {
      survives[lane] = settled[lane] = false;
      code[lane] = kNoCode;
      if (start + lane >= end) return;
      code[lane] = im.edges[start + lane];
      const Roots roots = roots_of<false>(im.parent, im.first(code[lane]), im.second(code[lane]));
      SEGCLIP_TALLY(filter_steps, roots.steps);
      if (roots.a == roots.b) return;
      const Component a = block_load(im.component + roots.a), b = block_load(im.component + roots.b);
      settled[lane] = a.threshold < 0 || b.threshold < 0;
      survives[lane] = !settled[lane];
    });
    const Lanes<uint32_t> place = places(warp, &shared.count, survives);
    const Lanes<uint32_t> rest_place = places(warp, &shared.rest, settled);
    warp.each([&](int lane) {
      if (survives[lane]) {
        shared.code[place[lane]] = code[lane];
        shared.weight[place[lane]] = im.weight_of(code[lane]);
      }
      if (settled[lane]) im.rest[rest_place[lane]] = code[lane];
    });
  }
  team.sync();
  const uint32_t count = shared.count;
  [[maybe_unused]] const uint32_t steps = sort_network(team, count, [&](uint32_t i, uint32_t j) {
    const Code a = shared.code[i], b = shared.code[j];
    const Real wa = shared.weight[i], wb = shared.weight[j];
    SEGCLIP_TALLY(exchanges, 1);
    if (wb < wa || (wb == wa && b < a)) {
      shared.code[i] = b;
      shared.code[j] = a;
      shared.weight[i] = wb;
      shared.weight[j] = wa;
    }
  });
  team.once([&] {
    SEGCLIP_TALLY(survivors, count);
    SEGCLIP_TALLY(stages, steps);
  });
}

}  // namespace segclip::device
