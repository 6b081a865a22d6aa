"""Peak memory of beam search with the attention LSTM at 196 regions, in MB above what is there before the search.

Ours shares an image's memory (its cells and keys) among its beams. The peer is the same search with the memory copied for each beam, as
most public code has it. Two series: 16, 32 and 64 images at width 5, where ours has to grow with the images, and widths 1, 5 and 10 at 64
images, where the peer grows with beam × features and ours with the beams' own states only. Each number is the peak of a process."""
from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

from bench.common import Result

PLAIN = dict(MALLOC_MMAP_THRESHOLD_='65536')                  # glibc gives back what is freed at once: peaks without its leftovers
SERIES = [(64, 5), (16, 5), (32, 5), (64, 1), (64, 10)]        # images, width


def reset_peak() -> bool:
    "Let the kernel forget this process's peak, so that it shows the peak from here on"
    try: Path('/proc/self/clear_refs').write_text('5')
    except OSError: return False
    return True


def peak() -> float:
    "Most memory that this process has had, MB"
    try: lines = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines())
    except OSError: lines = {}
    if 'VmHWM' in lines: return int(lines['VmHWM'].split()[0])/1000*1.024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(1e6 if sys.platform == 'darwin' else 1e3)*1.024


def child(images: int, width: int, copied: bool, vocab: int, D: int, dim: int, regions: int, words: int):
    "Search once, and print the growth of the peak, MB"
    import torch
    from caption_nb.attention import AttentionDecoder
    from caption_nb.decoding import generate

    class Copied(AttentionDecoder):
        "Gives every beam its own copy of the memory"
        def step(self, token, state, memory, attention=True):
            k = len(token)//len(memory['keys'])
            return super().step(token, state, {n: x.repeat_interleave(k, 0) for n, x in memory.items()}, attention)

    torch.manual_seed(0)
    decoder = (Copied if copied else AttentionDecoder)(vocab, D, embed_dim=dim, hidden_dim=dim, attention_dim=dim).eval()
    grid = torch.randn(images, regions, D)
    generate(decoder, grid[:1], width, 2)                       # what libraries set aside once
    reset_peak()
    before = peak()
    generate(decoder, grid, width, words, banned=[2])
    print(json.dumps(peak() - before))


def measure(*args) -> float:
    "The growth that a process of its own finds, MB"
    code = f'from bench.memory_beam import child; child{args}'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True,
                          env=os.environ | PLAIN, cwd=Path(__file__).resolve().parent.parent)
    return float(done.stdout.splitlines()[-1])


def run(quick: bool = False) -> list[Result]:
    "Both series; `ratio` is how many times the peer's peak is ours"
    results = []
    for images, width in SERIES[:1] if quick else SERIES:
        images, *sizes = (8, 200, 512, 64, 196, 3) if quick else (images, 9500, 2048, 512, 196, 6)
        ours, peer = (max(measure(images, width, copied, *sizes), .1) for copied in (False, True))
        named = dict(zip(('vocab', 'D', 'dim', 'regions', 'words'), sizes))
        named |= dict(images=images, width=width, MB_an_image=round(ours/images, 2), MB_of_features=round(images*196*sizes[1]*4e-6, 1))
        results.append(Result(f'beam {width}, {images} images × 196', ours, peer, peer/ours, 'MB, less is better', [peer/ours]*2, named))
    return results
