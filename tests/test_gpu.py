"""Training on a GPU. What needs one is skipped without it, saying so; the same is tested on a CPU with bf16 and fp16, and on a fake device
that refuses, as a GPU does, to mix its tensors with the CPU's."""
import copy
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, need
from fake_device import Away, fake_device, move

from caption_nb.attention import AttentionDecoder
from caption_nb.basics import read_json_lines
from caption_nb.batches import Batch
from caption_nb.captioner import Captioner, CaptionModel, caption_images
from caption_nb.config import Config
from caption_nb.decoding import generate
from caption_nb.encoders import make_encoder
from caption_nb.ensemble import Ensemble
from caption_nb.optimizers import Ema, clip_gradients, make_optimizer
from caption_nb.recurrent import RecurrentDecoder
from caption_nb.sampling import sample
from caption_nb.scst import SelfCritical
from caption_nb.text import Vocab
from caption_nb.training import Machine, Trainer
from caption_nb.transformer import TransformerDecoder

pytestmark = pytest.mark.usefixtures('one_thread')

V, D, L, B, K = 30, 16, 6, 3, 2
DECODERS = {'attention LSTM': lambda **k: AttentionDecoder(V, D, embed_dim=16, hidden_dim=16, attention_dim=16, **k),
            'attention GRU, multihead': lambda **k: AttentionDecoder(V, D, cell='gru', attention='multihead', heads=2, embed_dim=16, hidden_dim=16,
                                                                     attention_dim=16, deep_output=True, **k),
            'LSTM': lambda **k: RecurrentDecoder(V, D, cell='lstm', embed_dim=16, hidden_dim=16, **k),
            'GRU, token': lambda **k: RecurrentDecoder(V, D, cell='gru', image='token', embed_dim=16, hidden_dim=16, num_layers=2, **k),
            'Transformer': lambda **k: TransformerDecoder(V, D, hidden_dim=16, num_layers=2, heads=4, ffn_dim=32, **k),
            'Transformer, encoder': lambda **k: TransformerDecoder(V, D, hidden_dim=16, num_layers=1, heads=2, ffn_dim=32, encoder_layers=1,
                                                                   positions='learned', pre_norm=False, grid_shape=[2, 3], **k)}


@pytest.fixture(scope='module')
def cache(tmp_path_factory) -> Path: return tmp_path_factory.mktemp('cache')


@pytest.fixture
def cuda(monkeypatch) -> torch.device:
    "The GPU, and deterministic matrix products should a test want them"
    need('cuda', torch.cuda.is_available(), 'no CUDA device here: this test computes on a GPU')
    monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    return torch.device('cuda', 0)


def tiny(cache, **changes) -> Config:
    "A run of seconds, with everything random that there is"
    return Config.from_dict(dict(encoder='scene_cnn', num_images=30, image_size=64, min_freq=1, embed_dim=32, hidden_dim=32, attention_dim=16,
                                 dropout=.2, lr=5e-3, images_per_batch=4, captions_per_image=2, epochs=2, log_every=2, warmup_steps=2, max_len=12,
                                 beam=2, ema=.9, flip=True, crop=.1, colour=.1, sampling_ratio=.2, threads=1, device='cpu', precision='fp32',
                                 cache_dir=str(cache)) | changes)


def weights(run: Path, name='last') -> bytes: return (run/'checkpoints'/name/'model.safetensors').read_bytes()


def losses(run: Path) -> list: return [(r['step'], r['loss']) for r in read_json_lines(run/'metrics.jsonl') if 'loss' in r]


def random_batch() -> Batch:
    "Captions of several lengths, one image with one caption less"
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, V, (B*K, 9), generator=rng)
    lengths = torch.tensor([9, 5, 7, 0, 4, 8])
    tokens[:, 0] = 1
    at = torch.arange(9)
    tokens[at == lengths[:, None] - 1], tokens[at >= lengths[:, None]] = 2, 0
    return Batch([f'{i}.jpg' for i in range(B)], torch.randn(B, L, D, generator=rng).relu(), tokens, lengths)


def resumed_like_uninterrupted(config: Config, folder: Path, monkeypatch):
    "An interrupt in mid-epoch, and the same bits in the end"
    whole, halves, step, interrupts = folder/'whole', folder/'halves', Trainer.train_step, {3}
    Trainer(config, whole, quiet=True).fit()
    def interrupted(self, batches):
        step(self, batches)
        if self.step in interrupts: interrupts.discard(self.step); signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(Trainer, 'train_step', interrupted)
    with pytest.raises(KeyboardInterrupt): Trainer(config, halves, quiet=True).fit()
    Trainer(config, halves, quiet=True).fit()
    assert losses(halves) == losses(whole) and weights(halves) == weights(whole) and weights(halves, 'best') == weights(whole, 'best')
    return whole


# On every machine: half precision on the CPU

@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_half_precision_is_resumed_bit_for_bit(precision, cache, tmp_path, monkeypatch):
    "fp16 has a scaler, whose state is part of the run"
    run = resumed_like_uninterrupted(tiny(cache, precision=precision, accumulate=2), tmp_path, monkeypatch)
    state = torch.load(run/'checkpoints'/'last'/'training.pt', weights_only=True)
    assert state['machine']['precision'] == precision and bool(state['scaler']) == (precision == 'fp16')
    seen = losses(run)
    assert all(math.isfinite(x) for _, x in seen) and seen[-1][1] < seen[0][1]
    captioner = Captioner.load(run)
    assert all(p.dtype == torch.float32 for p in captioner.model.parameters())


def test_half_precision_learns_what_full_precision_learns(cache, tmp_path):
    curves = {}
    for precision in ('fp32', 'bf16'):
        Trainer(tiny(cache, precision=precision, ema=0., sampling_ratio=0.), tmp_path/precision, quiet=True).fit()
        curves[precision] = [x for _, x in losses(tmp_path/precision)]
    assert curves['bf16'] == pytest.approx(curves['fp32'], rel=.05) and curves['bf16'] != curves['fp32']


def test_scaler_leaves_out_a_step_that_overflows(cache, tmp_path):
    "Gradients of fp16 that are not finite change nothing, and the scale goes down"
    trainer = Trainer(tiny(cache, precision='fp16'), tmp_path/'run', quiet=True).prepare()
    trainer._use(Machine(1, 'fp16', {}))
    batch, before = trainer._sample_batch(), {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.tick, handle = 0., trainer.model.decoder.output.weight.register_hook(lambda g: g*math.inf)
    scale = trainer.scaler.get_scale()
    trainer.train_step([batch])
    assert trainer.scaler.get_scale() < scale and all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())
    handle.remove()
    trainer.train_step([batch])
    assert not torch.equal(trainer.model.decoder.output.weight, before['decoder.output.weight'])


# On every machine: a device that is not the CPU

@pytest.mark.parametrize('name', DECODERS)
def test_decoders_stay_on_their_device(name):
    "Loss, gradients, search, samples: nothing is left on the CPU, and the numbers are the CPU's"
    torch.manual_seed(0)
    decoder, batch = DECODERS[name](dropout=0.), random_batch()
    model = CaptionModel(make_encoder('scene_cnn', image_size=64), decoder)
    want, _ = model.loss(batch)
    want.backward()
    gradients = {n: p.grad.clone() for n, p in model.decoder.named_parameters()}
    with torch.no_grad(): captions = generate(model.decoder, batch.images, 3, 8, attention=True)
    move(model)
    with fake_device() as device:
        there = batch.to(device)
        loss, _ = model.loss(there)
        loss.backward()
        assert isinstance(loss, Away) and loss.item() == pytest.approx(want.item(), rel=1e-6)
        for n, p in model.decoder.named_parameters(): torch.testing.assert_close(p.grad.here, gradients[n], rtol=1e-4, atol=1e-6)
        found = generate(model.decoder, there.images, 3, 8, attention=True)
        assert [[h.tokens for h in own] for own in found] == [[h.tokens for h in own] for own in captions]
        hard = dict(max_len=8, min_len=3, no_repeat=2, bad_endings=(5, 6), banned=(3,))
        assert len(generate(model.decoder, there.images, 2, groups=2, diversity=.5, **hard)) == B
        assert len(generate(model.decoder, there.images, 2, forced=[7, [8, 9]], max_len=8)) == B
        assert len(sample(model.decoder, there.images, 2, max_len=6, top_k=5)) == B
        assert len(generate(Ensemble([model.decoder, model.decoder]), [there.images]*2, 2, 5)) == B


@pytest.mark.parametrize('optimizer', ['sgd', 'rmsprop', 'adamw', 'lion'])
def test_steps_stay_on_their_device(optimizer):
    "Pixels through an encoder that learns, concepts, scheduled sampling, clipping, optimiser, moving average"
    torch.manual_seed(0)
    config = Config.from_dict(dict(encoder='scene_cnn', optimizer=optimizer))
    model = CaptionModel(make_encoder('scene_cnn', image_size=64), AttentionDecoder(V, 128, embed_dim=16, hidden_dim=16, attention_dim=16), 1., .1)
    batch = dataclasses.replace(random_batch(), images=torch.randint(0, 256, (B, 3, 64, 64), dtype=torch.uint8))
    move(model)
    with fake_device() as device:
        adam, ema, there = make_optimizer(config, model), Ema(model, .9), batch.to(device)
        parameters, before = list(model.parameters()), model.decoder.output.weight.here.clone()
        for step in (1, 2):
            parts = model.parts(there, .1, 0, .5)
            sum(parts.values()).backward()
            norm = clip_gradients(parameters, 1., .5)
            adam.step()
            adam.zero_grad(set_to_none=True)
            ema.update(step)
        assert isinstance(norm, Away) and math.isfinite(norm.item()) and set(parts) == {'words', 'doubly_stochastic', 'concepts'}
        assert not torch.equal(model.decoder.output.weight.here, before)
        with ema.applied(): assert torch.isfinite(model.grid(there.images).here).all()


@pytest.mark.parametrize('stage', ['xe', 'scst'])
def test_training_loop_stays_on_its_device(stage, cache, tmp_path):
    "Steps with accumulation, the log, dev loss and captions, the moving average, a checkpoint: as on a CPU, and all of it on the CPU again"
    config = tiny(cache, sampling_ratio=0., dropout=0., accumulate=2, dev_loss=True, epochs=1)
    Trainer(config, tmp_path/'xe', quiet=True).fit()
    if stage == 'scst': config = dataclasses.replace(config, stage='scst', from_run=str(tmp_path/'xe'), scst_samples=2)
    trainer = Trainer(config, tmp_path/'run', quiet=True).prepare()
    move(trainer.model)
    with fake_device() as trainer.device:
        trainer._prepare_learning()
        rows = trainer.fit()
    assert isinstance(next(trainer.model.parameters()), Away) and all(math.isfinite(r.get('loss', r.get('reward', 0.))) for r in rows)
    if stage == 'xe': assert [r['loss'] for r in rows if 'loss' in r] == pytest.approx([x for _, x in losses(tmp_path/'xe')], rel=1e-4)
    assert Captioner.load(trainer.run).caption(trainer.data.path(trainer.data.ids('dev')[0])) == rows[-1]['references'][trainer.data.ids('dev')[0]]


def test_self_critical_step_stays_on_its_device():
    vocab = Vocab([*Vocab.specials, *(f'w{i}' for i in range(V - 4))])
    batch, decoder = random_batch(), move(DECODERS['attention LSTM']())
    references = {id: [[f'w{i}' for i in range(n, n + 5)] for n in range(2)] for id in batch.ids}
    for baseline in ('leave_one_out', 'greedy'):
        critic = SelfCritical(references, vocab, samples=2, baseline=baseline, max_len=6)
        with fake_device() as device:
            loss, _ = critic.loss(decoder, batch.images.to(device), batch.ids)
            loss.backward()
            assert isinstance(loss, Away) and isinstance(decoder.output.weight.grad, Away)


def test_dev_captions_are_written_on_the_device(cache):
    "`caption_images` takes photos and features from the CPU to where the decoder is"
    from caption_nb.batches import ImageSource
    vocab = Vocab([*Vocab.specials, *(f'w{i}' for i in range(V - 4))])
    ids = [f'{i}.jpg' for i in range(B)]
    source = ImageSource(ids, torch.randint(0, 256, (B, 3, 64, 64), dtype=torch.uint8))
    model = CaptionModel(make_encoder('scene_cnn', image_size=64), AttentionDecoder(V, 128, embed_dim=16, hidden_dim=16, attention_dim=16)).eval()
    config = tiny(cache)
    want = {id: h.tokens for id, h in caption_images(model, vocab, ids, source, config).items()}
    move(model)
    with fake_device(): assert {id: h.tokens for id, h in caption_images(model, vocab, ids, source, config).items()} == want


def test_the_fake_device_refuses_what_a_gpu_refuses():
    with fake_device() as device:
        there, here = torch.ones(3, device=device), torch.ones(3)
        assert isinstance(there + 1, Away) and (there*torch.tensor(2.)).sum().item() == 6. and there.cpu().sum() == 3
        for mixed in (lambda: there + here, lambda: torch.cat([there, here]), lambda: there[torch.tensor([0])], lambda: torch.where(here > 0, there, 0.)):
            with pytest.raises(RuntimeError, match='two devices'): mixed()


def test_throughput_benchmark_runs_without_a_gpu():
    done = subprocess.run([sys.executable, '-m', 'bench', 'gpu_training', '--quick', '--json'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert row['unit'] == 'captions/s' and 0 < row['ratio'] and row['sizes']['million_multiply_adds_per_caption'] > 0
    if not torch.cuda.is_available(): assert 'no CUDA device' in done.stderr


def test_multiply_adds_are_counted():
    "Against the sizes: what every word costs, and what every image"
    from bench.gpu_training import Sizes, flops_per_caption
    s = Sizes(vocab=500, D=64, dim=32, regions=49, captions=1)
    tokens = torch.randint(4, 500, (4, 12)); tokens[:, 0], tokens[:, -1] = 1, 2
    decoder = AttentionDecoder(s.vocab, s.D, embed_dim=32, hidden_dim=32, attention_dim=32, dropout=0.)
    d, words = s.dim, 11
    word = d*(d + s.D + 4*d) + s.D*4*d + d*4*d + d*s.vocab + s.regions*(d + s.D)
    forward = words*word + s.regions*s.D*d + s.D*2*d
    assert flops_per_caption(decoder, s, tokens)/2 == pytest.approx(3*forward, rel=.1)   # backward is twice the forward


# On a GPU

@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'fp16'])
def test_training_on_a_gpu(precision, cuda, cache, tmp_path):
    "It learns; the record knows the GPU's memory; and the checkpoint captions the same on a CPU"
    trainer = Trainer(tiny(cache, device='cuda', precision=precision), tmp_path/'run', quiet=True)
    rows = [r for r in trainer.fit() if 'loss' in r]
    assert trainer.machine.precision == precision and trainer.scaler.is_enabled() == (precision == 'fp16')
    assert rows[-1]['loss'] < rows[0]['loss'] and rows[-1]['memory_MB'] > 0 and next(trainer.model.parameters()).is_cuda
    assert 'cuda_peak_MB' in trainer.meter.memory()
    paths = [trainer.data.path(id) for id in trainer.data.ids('dev')]
    here, there = (Captioner.load(trainer.run, device).caption(paths) for device in ('cpu', 'cuda'))
    assert here == there
    trainer.evaluate('dev')
    assert (trainer.run/'results.json').is_file()


def test_auto_chooses_the_gpu_and_half_precision(cuda, cache, tmp_path):
    trainer = Trainer(tiny(cache, device='auto', precision='auto', epochs=1), tmp_path/'run', quiet=True)
    trainer.fit()
    assert trainer.device.type == 'cuda' and trainer.machine.precision == ('bf16' if torch.cuda.is_bf16_supported() else 'fp16')


@pytest.mark.parametrize('changes', [dict(), dict(precision='bf16'), dict(precision='fp16', accumulate=2), dict(decoder='transformer', attention_dim=512),
                                     dict(decoder='lstm', attention_dim=512)], ids=lambda c: '-'.join(map(str, c.values())) or 'fp32')
def test_gpu_run_is_resumed_bit_for_bit(changes, cuda, cache, tmp_path, monkeypatch):
    resumed_like_uninterrupted(tiny(cache, device='cuda', deterministic=True, **changes), tmp_path, monkeypatch)


def test_gpu_run_goes_on_on_a_cpu(cuda, cache, tmp_path):
    Trainer(tiny(cache, device='cuda', epochs=1), tmp_path/'run', quiet=True).fit()
    there = Trainer(tiny(cache, device='cpu'), tmp_path/'run', quiet=True).prepare()
    assert there.epoch == 1 and not next(there.model.parameters()).is_cuda
    there.fit()
    assert there.epoch == 2


@pytest.mark.parametrize('name', DECODERS)
def test_gpu_computes_what_the_cpu_computes(name, cuda):
    "Loss and gradients, by the kernels of the GPU (scaled dot products, cuDNN); captions word for word"
    torch.manual_seed(0)
    decoder, batch = DECODERS[name](dropout=0.), random_batch()
    model = CaptionModel(make_encoder('scene_cnn', image_size=64), decoder)
    twin, there = copy.deepcopy(model).to(cuda), batch.to(cuda)
    (want, _), (loss, _) = model.loss(batch), twin.loss(there)
    want.backward(), loss.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-4)
    for (n, p), q in zip(model.decoder.named_parameters(), twin.decoder.parameters()):
        torch.testing.assert_close(q.grad.cpu(), p.grad, rtol=1e-3, atol=1e-5, msg=lambda text: f'{n}: {text}')
    here, other = (generate(m.decoder, b.images, 3, 8) for m, b in ((model, batch), (twin, there)))
    assert [[h.tokens for h in own] for own in here] == [[h.tokens for h in own] for own in other]


def test_self_critical_training_on_a_gpu(cuda, cache, tmp_path):
    base = tiny(cache, device='cuda', sampling_ratio=0., ema=0.)
    Trainer(base, tmp_path/'xe', quiet=True).fit()
    trainer = Trainer(dataclasses.replace(base, stage='scst', from_run=str(tmp_path/'xe'), epochs=1), tmp_path/'scst', quiet=True)
    assert all(math.isfinite(r['reward']) for r in trainer.fit() if 'reward' in r)


def test_diagnostics_on_a_gpu(cuda, cache, tmp_path):
    from caption_nb.diagnostics import find_lr, overfit_batch
    trainer = Trainer(tiny(cache, device='cuda', precision='bf16'), tmp_path/'run', quiet=True).prepare()
    before = torch.cuda.get_rng_state()
    assert overfit_batch(trainer, steps=10, quiet=True).losses and find_lr(trainer, steps=10, quiet=True).rates
    assert torch.equal(before, torch.cuda.get_rng_state())


def test_compiled_training_on_a_gpu(cuda, cache, tmp_path):
    rows = Trainer(tiny(cache, device='cuda', compile=True, epochs=1), tmp_path/'run', quiet=True).fit()
    assert all(math.isfinite(r['loss']) for r in rows if 'loss' in r)


def test_out_of_memory_says_what_to_lower(cuda, cache, tmp_path, monkeypatch):
    trainer = Trainer(tiny(cache, device='cuda'), tmp_path/'run', quiet=True).prepare()
    def hungry(*args, **kwargs): return torch.empty(1 << 50, device=cuda)
    monkeypatch.setattr(trainer.model, 'parts', hungry)
    with pytest.raises(MemoryError, match='images_per_batch'): trainer.fit()
