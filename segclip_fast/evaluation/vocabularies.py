"""Class lists of the three benchmark data sets, as the official evaluation prompts them, with thresholds.

Names are in the order of the ground-truth indices and go into the prompts as written here, so some differ
from the data sets' own ("table", not "diningtable"). Index 0 is the background, which gets no prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

BACKGROUND = "background"


@dataclass(frozen=True)
class Vocabulary:
    """A data set's classes and background thresholds.

    Attributes:
        names: one for each ground-truth index, the background first.
        threshold: of the released configuration; a region whose best score is lower is background.
        paper_threshold: the one printed in the paper.
    """

    names: tuple[str, ...]
    threshold: float
    paper_threshold: float

    @property
    def labels(self) -> tuple[str, ...]:
        """The names that get a prompt: all but the background."""
        return self.names[1:]


def _names(text: str) -> tuple[str, ...]:
    return (BACKGROUND, *(" ".join(name.split()) for name in text.split(",")))


VOC = Vocabulary(
    _names(
        """aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, table, dog, horse,
        motorbike, person, plant, sheep, sofa, train, monitor"""
    ),
    threshold=0.80,
    paper_threshold=0.75,
)

CONTEXT = Vocabulary(
    _names(
        """airplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building, bus,
        cabinet, car, cat, ceiling, chair, cloth, computer, cow, cup, curtain, dog, door, fence,
        floor, flower, food, grass, ground, horse, keyboard, light, motorbike, mountain, mouse,
        person, plate, platform, plant, road, rock, sheep, shelves, sidewalk, sign, sky, snow, sofa,
        table, track, train, tree, truck, monitor, wall, water, window, wood"""
    ),
    threshold=0.25,
    paper_threshold=0.25,
)

COCO_OBJECT = Vocabulary(
    _names(
        """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire
        hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear,
        zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports
        ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine
        glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot
        dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
        mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book,
        clock, vase, scissors, teddy bear, hair drier, toothbrush"""
    ),
    threshold=0.65,
    paper_threshold=0.65,
)

VOCABULARIES = {"voc": VOC, "context": CONTEXT, "coco_object": COCO_OBJECT}


def default_threshold(dataset: str, protocol: str) -> float:
    """Background threshold of a data set in a protocol; VOC's for sets that the release does not know."""
    vocabulary = VOCABULARIES.get(dataset, VOC)
    return vocabulary.paper_threshold if protocol == "paper" else vocabulary.threshold
