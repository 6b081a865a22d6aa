"""Training throughput of a device, and how much of what its matrix units can do is used.

Meant for a GPU; on a CPU it takes small sizes and says so. A step is loss, backward, clipping and AdamW (with the scaler in fp16) on a batch
that is on the device already; `bench training_loop` tells what the loop around it costs. 'ours' is captions/s, 'peer' the captions/s of a
device that does nothing but the step's matrix products at its measured ceiling, and the ratio is the share of the ceiling that is reached.

The multiply-adds are counted by torch's FLOP counter on a few images of the same batch, forward and backward. The ceiling is the best of
a few large square matrix products at the same precision, the median of its repeats. A batch that does not fit is left out, with a note."""
from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.common import Result
from bench.train_attention import our_loss, random_captions
from caption_nb.attention import AttentionDecoder
from caption_nb.decoder import Decoder
from caption_nb.optimizers import make_scaler
from caption_nb.ranks import choose_device
from caption_nb.training import autocast
from caption_nb.transformer import TransformerDecoder

DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    "Of each call of `work`, until the device is done with it"
    def done():
        if device.type == 'cuda': torch.cuda.synchronize(device)
        if device.type == 'mps': torch.mps.synchronize()
        return time.perf_counter()
    times = []
    for _ in range(repeats):
        start = done()
        work()
        times.append(done() - start)
    return times


def matrix_ceiling(device: torch.device, precision: str, sizes: tuple[int, ...], repeats: int = 10) -> float:
    "Floating-point operations a second in large square matrix products"
    best = 0.
    for n in sizes:
        try:
            a, b = (torch.randn(n, n, device=device, dtype=DTYPES[precision]) for _ in range(2))
            work = lambda: torch.mm(a, b)
            seconds(work, device, 3)   # warm-up: kernels are chosen, clocks rise
            best = max(best, 2*n**3/statistics.median(seconds(work, device, repeats)))
        except torch.OutOfMemoryError: break
    return best


@dataclass
class Sizes:
    "Of model and data"
    vocab: int; D: int; dim: int; regions: int; captions: int = 5


def make_decoders(s: Sizes) -> dict[str, Decoder]:
    heads = 8 if s.dim % 8 == 0 else 1
    return {'attention LSTM': AttentionDecoder(s.vocab, s.D, embed_dim=s.dim, hidden_dim=s.dim, attention_dim=s.dim),
            'Transformer, 3 layers': TransformerDecoder(s.vocab, s.D, hidden_dim=s.dim, num_layers=3, heads=heads, ffn_dim=4*s.dim)}


def flops_per_caption(decoder: Decoder, s: Sizes, tokens: torch.Tensor, images: int = 4) -> float:
    "Two for each multiply-add of forward and backward, counted on the CPU"
    few = tokens[:images*s.captions]
    with FlopCounterMode(display=False) as counter: our_loss(decoder, torch.randn(images, s.regions, s.D), few).backward()
    decoder.zero_grad(set_to_none=True)
    return counter.get_total_flops()/len(few)


def training_step(decoder: Decoder, grid: torch.Tensor, tokens: torch.Tensor, precision: str) -> Callable[[], None]:
    "One step, ready to be timed; it waits for nothing"
    parameters, scaler = list(decoder.parameters()), make_scaler(precision, grid.device)
    adam = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0., fused=grid.device.type in ('cpu', 'cuda'))
    def step():
        with autocast(grid.device, precision): loss = our_loss(decoder, grid, tokens)
        scaler.scale(loss).backward()
        scaler.unscale_(adam)
        nn.utils.clip_grad_norm_(parameters, 5.)
        scaler.step(adam)
        scaler.update()
        adam.zero_grad(set_to_none=True)
    return step


def measure(name: str, decoder: Decoder, s: Sizes, images: int, precision: str, device: torch.device, ceiling: float, rounds: int) -> Result | None:
    "A row; None if the batch does not fit"
    tokens = random_captions(images*s.captions, s.vocab)
    flops = flops_per_caption(decoder.cpu(), s, tokens)
    if device.type == 'cuda':
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        step = training_step(decoder.to(device).train(), torch.randn(images, s.regions, s.D).relu().to(device), tokens.to(device), precision)
        seconds(step, device, 2)
        times = seconds(step, device, rounds)
    except torch.OutOfMemoryError:
        print(f'{name}, {images} images, {precision}: does not fit', file=sys.stderr)
        return None
    rate, most = len(tokens)/statistics.median(times), ceiling/flops
    sizes = dict(device=describe(device), images=images, captions=s.captions, regions=s.regions, D=s.D, dim=s.dim, vocab=s.vocab, rounds=rounds,
                 million_multiply_adds_per_caption=round(flops/2e6, 1), TFLOPs=round(rate*flops/1e12, 4), ceiling_TFLOPs=round(ceiling/1e12, 3),
                 share_percent=round(100*rate/most, 1), step_ms=round(1000*statistics.median(times), 2))
    if device.type == 'cuda': sizes |= dict(peak_MB=round(torch.cuda.max_memory_allocated(device)/1e6))
    return Result(f'{name}, {images} images, {precision}', rate, most, rate/most, 'captions/s', [len(tokens)/max(times)/most, len(tokens)/min(times)/most],
                  sizes)


def describe(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{device.type}, {torch.get_num_threads()} threads'


def run(quick: bool = False) -> list[Result]:
    "Both decoders at every precision that the device is made for, with ever larger batches"
    device = torch.device(choose_device('auto'))
    gpu = device.type == 'cuda'
    s = Sizes(300, 64, 32, 49) if quick else Sizes(9500, 2048, 512, 49) if gpu else Sizes(2540, 1280, 256, 49)
    batches, squares, rounds = ((4,), (256,), 2) if quick else ((32, 128, 512), (4096, 8192), 20) if gpu else ((8,), (1024, 2048), 5)
    precisions = ['fp32', *(['bf16'] if not gpu or torch.cuda.is_bf16_supported() else []), *(['fp16'] if gpu else [])]
    if not gpu: print(f'no CUDA device: this is {describe(device)}, at small sizes', file=sys.stderr)
    results = []
    for precision in precisions:
        ceiling = matrix_ceiling(device, precision, squares, 3 if quick else 10)
        for name in make_decoders(s):
            for images in batches:
                torch.manual_seed(0)
                row = measure(name, make_decoders(s)[name], s, images, precision, device, ceiling, rounds)
                if row: results.append(row)
    return results
