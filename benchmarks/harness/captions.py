"""Captions for the benchmarks, written for them, and what CLIP's tokenizer makes of them.

The ids are stored because the tokenizer's package may be missing where the benchmarks run; a test compares.
"""

CAPTIONS = (
    "A dog.",
    "A woman in a red coat walks two small dogs along the beach.",
    "Fresh bread on a wooden table.",
    "An old steam train crosses a stone bridge high above the river while passengers wave from the windows.",
    "The kitchen has white cabinets, a black stove and a round table with four chairs.",
    "Two cats asleep on a sofa.",
    "A man rides a bicycle down a narrow street between tall brick buildings on a rainy evening.",
    "Boats in the harbour at sunset.",
    "A group of children in yellow helmets listens to a firefighter who explains how the ladder of the truck "
    "is raised and lowered.",
    "Snow covers the roof of a small red cabin at the edge of the forest.",
    "A plate of pasta with tomato sauce, basil and grated cheese next to a glass of water.",
    "A horse grazes in a green field.",
    "A surfer in a wetsuit carries his board towards the waves as gulls circle over the empty beach.",
    "A bus stops at the corner of a busy street full of people with umbrellas.",
    "A close-up of a bee on a purple flower.",
    "An elderly couple sits on a bench under a large oak tree and feeds the pigeons that have gathered "
    "around their feet in the park.",
)

# fmt: off
# model.tokenize(CAPTIONS, 32) without the padding: 49406 starts, 49407 ends, no more than 32 in all.
TOKENS: tuple[tuple[int, ...], ...] = (
    (49406, 320, 1929, 269, 49407),
    (49406, 320, 2308, 530, 320, 736, 7356, 8192, 1237, 2442, 3255, 2528, 518, 2117, 269, 49407),
    (49406, 2975, 5066, 525, 320, 9057, 2175, 269, 49407),
    (49406, 550, 896, 6972, 3231, 20473, 320, 2441, 2465, 1400, 4348, 518, 2473, 1519, 12781, 4535,
     633, 518, 5437, 269, 49407),
    (49406, 518, 4485, 791, 1579, 33083, 267, 320, 1449, 21423, 537, 320, 2522, 2175, 593, 2721,
     12033, 269, 49407),
    (49406, 1237, 3989, 10749, 525, 320, 15723, 269, 49407),
    (49406, 320, 786, 11308, 320, 11652, 1136, 320, 16652, 2012, 1957, 7771, 9518, 8866, 525, 320,
     10222, 2285, 269, 49407),
    (49406, 10080, 530, 518, 10011, 536, 3424, 269, 49407),
    (49406, 320, 1771, 539, 2153, 530, 4481, 21843, 25912, 531, 320, 20498, 822, 6655, 829, 518,
     16637, 539, 518, 4629, 533, 6027, 537, 34968, 269, 49407),
    (49406, 2583, 7745, 518, 6449, 539, 320, 2442, 736, 14178, 536, 518, 5461, 539, 518, 4167, 269,
     49407),
    (49406, 320, 5135, 539, 10441, 593, 9867, 5520, 267, 14936, 537, 709, 943, 4108, 1131, 531, 320,
     3313, 539, 1573, 269, 49407),
    (49406, 320, 4558, 782, 4073, 530, 320, 1901, 1570, 269, 49407),
    (49406, 320, 24925, 530, 320, 12406, 3940, 17982, 787, 1972, 4447, 518, 7882, 601, 37501, 7117,
     962, 518, 7893, 2117, 269, 49407),
    (49406, 320, 2840, 9822, 536, 518, 5253, 539, 320, 4354, 2012, 1476, 539, 1047, 593, 42782, 269,
     49407),
    (49406, 320, 2660, 268, 705, 539, 320, 5028, 525, 320, 5496, 4055, 269, 49407),
    (49406, 550, 15455, 3377, 12726, 525, 320, 8771, 1798, 320, 3638, 7221, 2677, 537, 21788, 518,
     32910, 682, 720, 14646, 1630, 911, 4804, 530, 518, 1452, 269, 49407),
)
# fmt: on
