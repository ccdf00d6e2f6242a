// Felzenszwalb superpixels on a GPU, stage 3: one block merges the edges of one image and numbers its
// segments.
//
// Exact, not approximate. Merging looks at the edges in order, and an edge may be taken out of turn as soon
// as no earlier one that is still waiting touches either of its components: nothing can change these before
// its turn. One warp holds the next 32 edges and does that, round after round, while the others prepare the
// next batch.
#pragma once

#include "felzenszwalb_device_sort.h"

namespace segclip::device {

SEGCLIP_DEVICE float threshold_of(double k, double internal, uint32_t size) {
  return static_cast<float>(internal + k / size);
}

template <typename Real, typename Parent>
SEGCLIP_DEVICE void start_components(Image<Real, Parent>& im) {
  const Team& team = im.block.all;
  team.for_each(0u, im.pixels, [&](uint32_t p) { im.component[p].size = 0; });
  team.for_each(0u, 1u << Shared<Real>::kClaimBits, [&](uint32_t i) { im.shared.claim[i] = kLanes; });
  team.once([&] {
    im.shared.plan = {0, 0, 0};
    im.shared.rest = 0;
  });
  team.sync();
  team.for_each(0u, im.pixels, [&](uint32_t p) {  // `labels` holds the forest of the zero edges
    const uint32_t root = root_of(im.labels, p);
    im.parent[p] = static_cast<Parent>(root);
    atomic_add(&im.component[root].size, 1u);
    if (root != p) {
      [[maybe_unused]] Block& block = im.block;
      SEGCLIP_TALLY(united, 1);
    }
  });
  team.sync();
  team.for_each(0u, im.pixels, [&](uint32_t p) {
    const uint32_t size = im.component[p].size;
    if (size > 0) im.component[p].threshold = threshold_of(im.problem.k, 0, size);
  });
  team.sync();
}

// ---- First pass

// What a lane of the merging warp knows of its edge.
template <typename Real>
struct Candidate {
  uint32_t item;  // place in the batch
  Code code;
  Real weight;
  uint32_t root_a, root_b;
  Component a, b;  // as they are in this round
  bool waiting;    // the roots differ and neither is final
  bool rejected;
};

// Tests an edge whose components no other lane touches in this round; true: merged.
template <typename Real, typename Parent>
SEGCLIP_DEVICE bool test_edge(Image<Real, Parent>& im, const Candidate<Real>& c) {
  const double weight = c.weight;
  const bool below_a = weight < c.a.threshold, below_b = weight < c.b.threshold;
  if (below_a && below_b) {  // the larger one stays the root; labels do not depend on it
    const bool keep_a = c.a.size > c.b.size || (c.a.size == c.b.size && c.root_a < c.root_b);
    const uint32_t kept = keep_a ? c.root_a : c.root_b, joined = keep_a ? c.root_b : c.root_a;
    const uint32_t size = c.a.size + c.b.size;
    store_parent(im.parent + joined, kept);
    block_store(im.component + kept, Component{size, threshold_of(im.problem.k, weight, size)});
    return true;
  }
  // Later edges weigh as much or more: the side that failed will never merge again in this pass.
  if (!below_a) block_store(im.component + c.root_a, Component{c.a.size, -1.0f});
  if (!below_b) block_store(im.component + c.root_b, Component{c.b.size, -1.0f});
  return false;
}

// Merges the batch that is ready, by one warp.
template <typename Real, typename Parent>
SEGCLIP_DEVICE void merge_batch(Image<Real, Parent>& im) {
  [[maybe_unused]] Block& block = im.block;
  const Warp warp = block.merging.warp();
  auto& shared = im.shared;
  const uint32_t count = shared.ready_count;
  const auto claim_of = [&](uint32_t root) {
    return &shared.claim[root * 2654435761u >> (32 - Shared<Real>::kClaimBits)];
  };

  uint32_t next = 0, held = 0;  // of the batch; lanes 0 .. held - 1 hold edges in order
  Lanes<Candidate<Real>> c;
  warp.each([&](int lane) { c[lane] = {}; });
  for (;;) {
    warp.each([&](int lane) {
      if (static_cast<uint32_t>(lane) >= held) c[lane].item = next + lane - held;
    });
    const uint32_t room = kLanes - held, added = count - next < room ? count - next : room;
    next += added;
    held += added;
    if (held == 0) return;

    Lanes<uint32_t> steps;
    warp.each([&](int lane) {
      Candidate<Real>& mine = c[lane];
      mine.waiting = mine.rejected = false;
      steps[lane] = 0;
      if (static_cast<uint32_t>(lane) >= held) return;
      mine.code = shared.ready[mine.item];
      mine.weight = im.weight_of(mine.code);  // on its way while the roots are looked for
      const Roots roots = roots_of<true>(im.parent, im.first(mine.code), im.second(mine.code));
      steps[lane] = roots.steps;
      if (roots.a == roots.b) return;
      mine.root_a = roots.a, mine.root_b = roots.b;
      mine.a = block_load(im.component + roots.a);
      mine.b = block_load(im.component + roots.b);
      mine.rejected = mine.a.threshold < 0 || mine.b.threshold < 0;
      mine.waiting = !mine.rejected;
    });
    // An edge goes ahead if it is the first one at both its roots. Roots that share a slot only cost time.
    warp.each([&](int lane) {
      if (!c[lane].waiting) return;
      atomic_min(claim_of(c[lane].root_a), static_cast<uint32_t>(lane));
      atomic_min(claim_of(c[lane].root_b), static_cast<uint32_t>(lane));
    });
    Lanes<bool> ahead;
    warp.each([&](int lane) {
      const uint32_t me = static_cast<uint32_t>(lane);
      ahead[lane] = c[lane].waiting && relaxed_load(claim_of(c[lane].root_a)) == me &&
                    relaxed_load(claim_of(c[lane].root_b)) == me;
    });
    warp.each([&](int lane) {
      if (!c[lane].waiting) return;
      relaxed_store(claim_of(c[lane].root_a), static_cast<uint32_t>(kLanes));
      relaxed_store(claim_of(c[lane].root_b), static_cast<uint32_t>(kLanes));
    });
    warp.each([&](int lane) {
      Candidate<Real>& mine = c[lane];
      if (!ahead[lane]) return;
      mine.waiting = false;
      mine.rejected = !test_edge(im, mine);
      if (!mine.rejected) {
        SEGCLIP_TALLY(merges, 1);
      }
    });

    Lanes<bool> rejected, waiting;
    warp.each([&](int lane) {
      rejected[lane] = c[lane].rejected;
      waiting[lane] = c[lane].waiting;
    });
    if (warp.ballot(rejected) != 0) {
      const Lanes<uint32_t> place = places(warp, &shared.rest, rejected);
      warp.each([&](int lane) {
        if (!rejected[lane]) return;
        im.rest[place[lane]] = c[lane].code;
        SEGCLIP_TALLY(rejected, 1);
      });
    }
    // Those that still wait move up to the first lanes.
    const uint32_t kept = warp.ballot(waiting);
    warp.each([&](int lane) {
      if (waiting[lane]) shared.stage[count_bits(kept & ((1u << lane) - 1))] = c[lane].item;
    });
    held = static_cast<uint32_t>(count_bits(kept));
    warp.each([&](int lane) {
      if (static_cast<uint32_t>(lane) < held) c[lane].item = shared.stage[lane];
    });
#ifndef __CUDACC__
    if (block.counts != nullptr) {
      uint32_t longest = 0;
      for (int lane = 0; lane < kLanes; ++lane) longest = steps[lane] > longest ? steps[lane] : longest;
      SEGCLIP_TALLY(rounds, 1);
      SEGCLIP_TALLY(round_steps, longest);
    }
#endif
  }
}

template <typename Real, typename Parent>
SEGCLIP_DEVICE void merge_edges(Image<Real, Parent>& im) {
  const Team& team = im.block.all;
  auto& shared = im.shared;
  if (im.block.prepares) prepare_batch(im);
  team.sync();
  while (shared.last == 0) {
    team.for_each(0u, shared.count, [&](uint32_t i) { shared.ready[i] = shared.code[i]; });
    team.once([&] { shared.ready_count = shared.count; });
    team.sync();
    if (im.block.merges) merge_batch(im);
    if (im.block.prepares) prepare_batch(im);
    team.sync();
  }
}

// ---- Second pass: segments below min_size join a neighbour, over the rejected edges in the same order.
//
// Round by round. A small segment's first edge is taken if the other segment is large, or has the same first
// edge; a small one that points to a small one with another first edge waits (taking it at once would be
// wrong).
template <typename Real, typename Parent>
SEGCLIP_DEVICE void join_small(Image<Real, Parent>& im) {
  [[maybe_unused]] Block& block = im.block;
  const Team& team = block.all;
  const Warp warp = team.warp();
  auto& shared = im.shared;
  using Bits = BitsOf<Real>;
  uint32_t* taken = im.labels;  // edges of this round
  Code *from = im.rest, *to = im.edges;
  const auto is_small = [&](uint32_t root) {
    return relaxed_load(&im.component[root].size) < im.problem.min_size;
  };
  const auto root = [&](uint32_t pixel) { return root_of(im.parent, pixel); };
  const auto bits = [&](Code e) { return bits_of(im.weight_of(e)); };
  // Every warp's lanes that hold an edge for which keep(e) is true add it to a list.
  const auto filter = [&](const Code* list, uint32_t count, Code* kept, uint32_t* kept_count, auto keep) {
    for (uint32_t start = team.rank * kLanes; start < count; start += static_cast<uint32_t>(team.threads())) {
      Lanes<bool> keeps;
      warp.each([&](int lane) { keeps[lane] = start + lane < count && keep(list[start + lane]); });
      const Lanes<uint32_t> place = places(warp, kept_count, keeps);
      warp.each([&](int lane) {
        if (keeps[lane]) kept[place[lane]] = list[start + lane];
      });
    }
    team.sync();
  };

  for (uint32_t count = shared.rest;;) {
    team.once([&] { shared.live = shared.executed = 0; });
    team.sync();
    filter(from, count, to, &shared.live, [&](Code e) {
      const uint32_t a = root(im.first(e)), b = root(im.second(e));
      SEGCLIP_TALLY(small_visits, 1);
      if (a == b || !(is_small(a) || is_small(b))) return false;
      for (const uint32_t side : {a, b}) {
        relaxed_store(im.least_weight + side, static_cast<Bits>(~Bits{0}));
        relaxed_store(im.least_code + side, kNoCode);
      }
      return true;
    });
    count = shared.live;
    if (count == 0) return;
    team.once([&] { SEGCLIP_TALLY(small_rounds, 1); });

    const auto each_small_side = [&](auto visit) {
      team.for_each(0u, count, [&](uint32_t i) {
        const Code e = to[i];
        for (const uint32_t side : {root(im.first(e)), root(im.second(e))})
          if (is_small(side)) visit(side, e);
      });
      team.sync();
    };
    each_small_side([&](uint32_t side, Code e) { atomic_min(im.least_weight + side, bits(e)); });
    each_small_side([&](uint32_t side, Code e) {
      if (relaxed_load(im.least_weight + side) == bits(e)) atomic_min(im.least_code + side, e);
    });
    filter(to, count, taken, &shared.executed, [&](Code e) {
      for (const uint32_t side : {root(im.first(e)), root(im.second(e))})
        if (is_small(side) && relaxed_load(im.least_code + side) != e) return false;
      return true;
    });
    // No small segment is in two of these edges, and a large one stays the root: no two lanes change the same
    // thing, but for the size of a large segment.
    team.for_each(0u, shared.executed, [&](uint32_t i) {
      const uint32_t a = root(im.first(taken[i])), b = root(im.second(taken[i]));
      const bool keep_a = is_small(a) ? is_small(b) && a < b : true;
      const uint32_t kept = keep_a ? a : b, joined = keep_a ? b : a;
      store_parent(im.parent + joined, kept);
      atomic_add(&im.component[kept].size, relaxed_load(&im.component[joined].size));
    });
    team.sync();
    Code* other = from;
    from = to;
    to = other;
  }
}

// ---- Labels: segments numbered by their first pixels.

template <typename Real, typename Parent>
SEGCLIP_DEVICE void number_segments(Image<Real, Parent>& im) {
  const Team& team = im.block.all;
  uint32_t* first = reinterpret_cast<uint32_t*>(im.least_weight);  // pixel of each root's segment
  uint32_t* number = im.least_code;
  team.for_each(0u, im.pixels, [&](uint32_t p) { first[p] = p; });
  team.sync();
  team.for_each(0u, im.pixels, [&](uint32_t p) {
    const uint32_t root = root_of(im.parent, p);
    im.labels[p] = root;
    if (p < relaxed_load(first + root)) atomic_min(first + root, p);
  });
  team.sync();
  scan(
      team, im.shared.partial, im.pixels, [&](uint32_t p) { return first[im.labels[p]] == p ? 1u : 0u; },
      [&](uint32_t p, uint32_t before) {
        if (first[im.labels[p]] == p) number[im.labels[p]] = before;
      });
  team.for_each(0u, im.pixels, [&](uint32_t p) { im.labels[p] = number[im.labels[p]]; });
}

// Labels of one image from its weights, by one block. `parents`: room for the forest, in shared memory or
// not.
template <typename Real, typename Parent>
SEGCLIP_DEVICE void segment(Block& block, const Problem<Real>& problem, int64_t image, Parent* parents) {
  Image<Real, Parent> im(block, problem, image, parents);
  if (im.header->invalid != 0) {  // holds NaN or infinity; raising would need to wait for the GPU
    block.all.for_each(0u, im.pixels, [&](uint32_t p) { im.labels[p] = ~0u; });
    return;
  }
  fill_bins(im);
  start_components(im);
  merge_edges(im);
  join_small(im);
  number_segments(im);
}

}  // namespace segclip::device
