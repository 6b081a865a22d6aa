"Loss, perplexity and top-k accuracy under teacher forcing: against a plain loop, word by word"
import math

import pytest
import torch
from torch import nn
from toy import Toy

from caption_nb.batches import CaptionBatches
from caption_nb.captioner import CaptionModel, TeacherForced, teacher_forced, teacher_forced_sums
from caption_nb.data import CaptionData
from caption_nb.decoding import evaluating
from caption_nb.text import Vocab

pytestmark = pytest.mark.usefixtures('one_thread')

VOCAB = Vocab([*Vocab.specials, *'abcdefgh'])
WORDS = 'a b c d e f g h zebra'.split()


class Grids:
    "Features of images, counted as they are read"
    views = ('plain',)

    def __init__(self, ids):
        self.found = {i: torch.randn(4, 3, generator=torch.Generator().manual_seed(n)).half() for n, i in enumerate(ids)}
        self.read_ids = []

    def read(self, ids, view=0):
        self.read_ids += ids
        return torch.stack([self.found[i] for i in ids])


@pytest.fixture
def dev():
    "Images with one to six captions of different lengths, some words unknown, one caption empty"
    g = torch.Generator().manual_seed(1)
    def say(n): return ' '.join(WORDS[i] for i in torch.randint(9, (n,), generator=g))
    captions = {f'{i}': [say(int(torch.randint(1, 60, (), generator=g))) for _ in range(1 + i % 6)] for i in range(11)}
    captions['3'].append('')
    return CaptionData('toy', '.', captions, dict(dev=list(captions), train=['0']))


def batches(data, size, source=None, **options):
    return CaptionBatches(data, VOCAB, 'dev', source or Grids(data.images), size, 1000, shuffle=False, max_words=None, **options)


def plain(decoder, data) -> tuple:
    "One caption after the other, one word after the other"
    nats, first, five, unknown, words, grids = 0., 0, 0, 0, 0, Grids(data.images)
    with torch.no_grad():
        for id in data.splits['dev']:
            for caption in data.captions[id]:
                memory, state, tokens = decoder.encode(grids.read([id]).float()), None, VOCAB.encode(caption)
                for now, then in zip(tokens, tokens[1:]):
                    logits, _, state = decoder.step(torch.tensor([now]), state, memory)
                    log_p = logits[0].log_softmax(-1)
                    best = log_p.argsort(descending=True).tolist()
                    nats -= log_p[then].item()
                    first, five, unknown, words = first + (best[0] == then), five + (then in best[:5]), unknown + (then == 3), words + 1
    return nats/words, first/words, five/words, unknown/words, words


@pytest.mark.parametrize('seed', range(3))
def test_equal_to_a_plain_loop_in_batches_of_any_size(dev, seed):
    decoder = Toy(len(VOCAB), seed=seed).float()
    model = CaptionModel(nn.Identity(), decoder)
    loss, first, five, unknown, words = plain(decoder, dev)
    for size in (1, 2, 5, 11, 64):
        t = teacher_forced(model, batches(dev, size))
        assert (t.top1, t.top5, t.unknown, t.words) == (first, five, unknown, words)
        assert t.loss == pytest.approx(loss, rel=1e-6) and t.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert 0 < t.unknown < .2 and 0 < t.top1 < t.top5 < 1
    assert words == sum(len(c.split()) + 1 for cs in dev.captions.values() for c in cs)


def test_shares_of_ranks_add_up(dev):
    model = CaptionModel(nn.Identity(), Toy(len(VOCAB)).float())
    whole = teacher_forced_sums(model, batches(dev, 4))
    parts = sum(teacher_forced_sums(model, batches(dev, 4, rank=r, ranks=3)) for r in range(3))
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)
    assert parts[1:].tolist() == whole[1:].tolist()


def test_images_are_read_once_and_the_model_is_left_as_it_was(dev):
    model, source = CaptionModel(nn.Dropout(.5), Toy(len(VOCAB)).float()), Grids(dev.images)
    model.train(); model.encoder.eval()
    teacher_forced(model, batches(dev, 3, source))
    assert source.read_ids == dev.splits['dev'] and model.decoder.calls == 4
    assert model.training and model.decoder.training and not model.encoder.training
    assert all(p.grad is None for p in model.parameters())


def test_dropout_is_off(dev):
    class Dropping(Toy):
        def encode(self, grid): return super().encode(nn.functional.dropout(grid, .5, self.training))
    model = CaptionModel(nn.Identity(), Dropping(len(VOCAB)).float()).train()
    assert teacher_forced(model, batches(dev, 3)) == teacher_forced(model, batches(dev, 3))


def test_a_model_that_says_nothing_foresees_nothing(dev):
    decoder = Toy(len(VOCAB), sharp=0.).float()
    t = teacher_forced(CaptionModel(nn.Identity(), decoder), batches(dev, 4))
    assert t.loss == pytest.approx(math.log(len(VOCAB))) and (t.top1, t.top5) == (0, 0)
    with evaluating(decoder): decoder.out.fill_(math.nan)
    t = teacher_forced(CaptionModel(nn.Identity(), decoder), batches(dev, 4))
    assert math.isnan(t.loss) and (t.top1, t.top5) == (0, 0)


def test_what_it_prints_and_refuses(dev):
    t = TeacherForced(2.5, math.exp(2.5), .4, .75, 1234, .02)
    assert str(t) == 'loss 2.5000 nats per word, perplexity 12.18, top-1 40.00%, top-5 75.00% of 1,234 words (2.00% <unk>)'
    with pytest.raises(ValueError, match='no captions to foresee'): teacher_forced(CaptionModel(nn.Identity(), Toy(len(VOCAB)).float()), [])
    assert TeacherForced.of(torch.tensor([1e6, 0, 0, 0, 1.], dtype=torch.float64)).perplexity == pytest.approx(math.exp(700))
