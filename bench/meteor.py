"""METEOR of 1,000 images with five references: ours against the Java program, both warm, on the same words.

The JVM is started and warmed up before anything is timed, and the statistics of every image have to be equal to the last digit."""
from __future__ import annotations

import random

import numpy as np

from bench.common import Result, compare

_WHO = 'man,guy,woman,lady,boy,girl,child,kid,person,dog,puppy,cat,horse,group of people,couple of kids,crowd,surfer,skateboarder'.split(',')
_LOOKS = 'young,small,little,large,big,brown,black and white,red,blue,smiling,old,wet,blond,white,yellow'.split(',')
_DOES = ('runs,is running,running,jumps,is jumping,jumping over,walks,stands,standing,is sitting,sits,plays with a ball,is playing,climbs,'
         'rides a bike,riding a bicycle,looks at the camera,holding a stick,in a shirt,wearing a hat').split(',')
_WHERE = ('on the beach,in the water,in front of a building,before a house,through the grass,on a field,down the street,near the ocean,'
          'by the sea,next to a tree,over the snow,on a mountain,on a hill,across the road,with a ball in its mouth,while others watch').split(',')


def captions(images: int, seed: int = 0) -> tuple[list, list]:
    "Captions like those people write, of 10.6 words on average; those of an image share what they tell of, in other words"
    rng = random.Random(seed)
    def caption(parts):
        who, looks, does, where, second = (p if rng.random() < .6 else rng.choice(of) for p, of in zip(parts, (_WHO, _LOOKS, _DOES, _WHERE, _WHERE)))
        article, end = rng.choice(['a', 'a', 'the', 'one']), f' {second}' if rng.random() < .4 else ''
        return f'{article} {looks + " " if rng.random() < .7 else ""}{who} {does} {where}{end}'.split()
    hypotheses, references = [], []
    for _ in range(images):
        parts = [rng.choice(of) for of in (_WHO, _LOOKS, _DOES, _WHERE, _WHERE)]
        hypotheses.append(caption(parts)); references.append([caption(parts) for _ in range(5)])
    return hypotheses, references


def run(quick: bool = False) -> list[Result]:
    "The statistics of all images, once with each"
    from caption_nb.meteor import JavaMeteor, Meteor
    images = 200 if quick else 1000
    hypotheses, references = captions(images)
    meteor = Meteor()
    with JavaMeteor() as java:
        def ours(): return meteor.statistics(hypotheses, references)
        def peer(): return java.statistics(hypotheses, references)
        differ = (ours() != peer()).any(1)
        assert not differ.any(), f'the statistics of {differ.sum()} images differ: {hypotheses[np.argmax(differ)]}'
        return [compare('METEOR 1.5, against a warm JVM', ours, peer, images, 'images/s', rounds=3 if quick else 10, warmup=3,
                        sizes=dict(images=images, references=5, words=float(np.mean([len(c) for r in references for c in r]))))]
