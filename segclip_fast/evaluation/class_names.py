"""Class names of the segmentation data sets as their label maps number them, next to the prompts' names.

The lists that `vocabularies` already holds are taken from there; only what differs is said here. The
background is not in these lists.
"""

from __future__ import annotations

from .vocabularies import COCO_OBJECT, CONTEXT, VOC


def _names(text: str) -> tuple[str, ...]:
    return tuple(" ".join(name.split()) for name in text.split(","))


def _renamed(prompts: tuple[str, ...], names: dict[str, str]) -> tuple[str, ...]:
    """The data set's own names where the prompts use others."""
    return tuple(names.get(prompt, prompt) for prompt in prompts)


VOC_CLASSES = _renamed(VOC.labels, {"table": "diningtable", "plant": "pottedplant", "monitor": "tvmonitor"})

CONTEXT_CLASSES = _renamed(
    CONTEXT.labels, {"airplane": "aeroplane", "plant": "pottedplant", "monitor": "tvmonitor"}
)

COCO_OBJECT_CLASSES = tuple(" ".join(name.split()) for name in COCO_OBJECT.labels)

# The pixel maps of COCO-Stuff hold the category id minus one, 0 to 181: 91 things, then 91 stuff classes.
# These eleven things were never annotated, so 171 classes are left.
COCO_IDS = 182
COCO_THING_IDS = 91
COCO_UNUSED_IDS = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)

COCO_STUFF_CLASSES = (
    *COCO_OBJECT_CLASSES,
    *_names(
        """banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard, carpet,
        ceiling-other, ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff,
        dirt, door-stuff, fence, floor-marble, floor-other, floor-stone, floor-tile, floor-wood,
        flower, fog, food-other, fruit, furniture-other, grass, gravel, ground-other, hill, house,
        leaves, light, mat, metal, mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement,
        pillow, plant-other, plastic, platform, playingfield, railing, railroad, river, road, rock,
        roof, rug, salad, sand, sea, shelf, sky-other, skyscraper, snow, solid-other, stairs, stone,
        straw, structural-other, table, tent, textile-other, towel, tree, vegetable, wall-brick,
        wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood, water-other,
        waterdrops, window-blind, window-other, wood"""
    ),
)

# One of each class's synonyms in objectInfo150.txt, as mmseg and the papers after it use them.
ADE20K_CLASSES = _names(
    """wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk,
    person, earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf,
    house, sea, mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub,
    railing, cushion, base, box, column, signboard, chest of drawers, counter, sand, sink,
    skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow,
    screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill,
    bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade
    machine, hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth,
    television receiver, airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman,
    bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything,
    swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food,
    step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket,
    sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate,
    monitor, bulletin board, shower, radiator, glass, clock, flag"""
)

CITYSCAPES_CLASSES = _names(
    """road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain,
    sky, person, rider, car, truck, bus, train, motorcycle, bicycle"""
)
