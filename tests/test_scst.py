"""Self-critical training against formulas written by hand, and against the exact gradient by enumeration."""
from itertools import product

import numpy as np
import pytest
import torch
from toy import END, PAD, START, Toy

from caption_nb.attention import AttentionDecoder
from caption_nb.metrics import CiderD, score_tokens
from caption_nb.recurrent import RecurrentDecoder
from caption_nb.scst import Reward, SelfCritical, leave_one_out
from caption_nb.text import Vocab
from caption_nb.transformer import TransformerDecoder

pytestmark = pytest.mark.usefixtures('one_thread')
REFERENCES = {'one': ['a red star', 'the red star is big', 'a star'], 'two': ['a blue ring'], 'three': ['the ring and the star', 'a ring'],
              'four': ['blue water', 'the sea is blue', 'a boat on the sea', 'water', 'a red boat']}
VOCAB = Vocab.build([c for cs in REFERENCES.values() for c in cs], min_freq=1)
V, D, L = len(VOCAB), 6, 4
SMALL = dict(embed_dim=8, hidden_dim=8)
DECODERS = dict(lstm=lambda **kw: RecurrentDecoder(V, D, **SMALL, **kw), attention=lambda **kw: AttentionDecoder(V, D, attention_dim=8, **SMALL, **kw),
                transformer=lambda **kw: TransformerDecoder(V, D, num_layers=1, heads=2, ffn_dim=16, encoder_layers=1, grid_shape=[2, 2],
                                                            **SMALL, **kw))


def make(name='lstm', **options):
    "A decoder with opinions, in training mode"
    torch.manual_seed(2)
    decoder = DECODERS[name](**options)
    with torch.no_grad():
        for p in decoder.parameters(): p.normal_(std=.5)
    return decoder.train()


def grids(n, seed=0): return torch.randn(n, L, D, generator=torch.Generator().manual_seed(seed))


def chance(seed=0): return torch.Generator().manual_seed(seed)


def gradients(loss, model):
    "Of all parameters, in double precision, end to end"
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten().double() for g, p in zip(found, model.parameters())])


# ---- the reward -------------------------------------------------------------------------------------------------

CAPTIONS = [['a', 'red', 'star'], ['a', 'red'], [], ['the', 'ring'], ['a', 'blue', 'ring'], ['the', 'red', 'star', 'is']]
IDS = ['one', 'one', 'one', 'three', 'two', 'one']
FINISHED = [True, False, True, True, False, False]


@pytest.mark.parametrize('end', [True, False])
def test_reward_is_cider_and_bleu(end):
    cider = CiderD(REFERENCES, 'ptb', '<end>' if end else None)(IDS, CAPTIONS, FINISHED)
    assert np.array_equal(Reward(REFERENCES, end=end)(IDS, CAPTIONS, FINISHED), cider)
    tail = ['<end>'] if end else []
    said = [c + tail if f else c for c, f in zip(CAPTIONS, FINISHED)]
    bleu = score_tokens(said, [[r.split() + tail for r in REFERENCES[i]] for i in IDS])[1]['Bleu_4']
    assert bleu.max() > .5
    np.testing.assert_allclose(Reward(REFERENCES, bleu=.5, end=end)(IDS, CAPTIONS, FINISHED), cider + .5*bleu, rtol=1e-12)


def test_end_makes_a_fragment_worth_less():
    said = [['a', 'boat', 'on', 'the', 'sea'], ['a', 'boat', 'on', 'the'], ['a', 'boat']]
    whole, fragment, _ = Reward(REFERENCES)(['four']*3, said)
    whole_without, fragment_without, _ = Reward(REFERENCES, end=False)(['four']*3, said)
    assert fragment/whole < .85*fragment_without/whole_without
    cut, ended = Reward(REFERENCES)(['four']*2, said[:1]*2, [False, True])
    assert cut < ended
    assert np.ptp(Reward(REFERENCES, end=False)(['four']*2, said[:1]*2, [False, True])) == 0


def test_signature_tells_all():
    a = SelfCritical(REFERENCES, VOCAB).signature
    assert all(x in a for x in ('CIDErD|', 'eos=yes', 'tok=ptb', '4 training images', 'samples=5', 'baseline=leave_one_out'))
    b = SelfCritical(REFERENCES, VOCAB, samples=3, baseline='greedy', bleu=.5, end=False).signature
    assert all(x in b for x in ('CIDErD+0.5*BLEU4|', 'eos=no', 'samples=3', 'baseline=greedy'))


# ---- baselines --------------------------------------------------------------------------------------------------

def test_leave_one_out():
    rewards = np.random.default_rng(0).random((4, 5))
    expected = [[np.delete(row, i).mean() for i in range(5)] for row in rewards]
    np.testing.assert_allclose(leave_one_out(rewards), expected)
    assert np.array_equal(leave_one_out(np.array([[1., 3.]])), [[3., 1.]])


@pytest.mark.parametrize('baseline', ['leave_one_out', 'greedy'])
def test_judge(baseline):
    scst = SelfCritical(REFERENCES, VOCAB, samples=2, baseline=baseline, max_len=4)
    said = ['a red star', 'a star', 'the ring', 'ring the ring a ring']
    tokens = torch.tensor([(VOCAB.encode(c)[1:] + [PAD]*4)[:4] for c in said])
    greedy = tokens[[1, 2]] if baseline == 'greedy' else None
    advantage, rewards = scst.judge(['one', 'three'], tokens, greedy)
    expected = CiderD(REFERENCES)(['one', 'one', 'three', 'three'], [c.split()[:4] for c in said], [True, True, True, False]).reshape(2, 2)
    assert np.array_equal(rewards, expected)
    against = expected[:, ::-1] if greedy is None else np.array([expected[:1, 1], expected[1:, 0]])
    np.testing.assert_allclose(advantage, expected - against, atol=1e-12)


def test_greedy_captions_are_greedy():
    from caption_nb.decoding import generate
    decoder, grid = make('attention'), grids(3)
    _, greedy = SelfCritical(REFERENCES, VOCAB, baseline='greedy', max_len=7).draw(decoder, grid, chance())
    found = generate(decoder, grid, 1, max_len=7, length_norm=0., banned=[VOCAB.unk_id])
    assert [VOCAB.decode(row) for row in greedy] == [VOCAB.decode(h[0].tokens) for h in found]
    assert decoder.training


# ---- the loss ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', DECODERS)
@pytest.mark.parametrize('baseline', ['leave_one_out', 'greedy'])
def test_loss_by_hand(name, baseline):
    "Row by row and word by word, with `step`"
    decoder, grid, ids = make(name, dropout=0.), grids(3), ['one', 'two', 'four']
    scst = SelfCritical(REFERENCES, VOCAB, samples=3, baseline=baseline, max_len=6)
    loss, stats = scst.loss(decoder, grid, ids, chance(1))
    drawn, greedy = scst.draw(decoder, grid, chance(1))
    advantage, rewards = scst.judge(ids, drawn.tokens, greedy)
    total, count = 0., 0
    for r, row in enumerate(drawn.tokens.tolist()):
        memory, state, last = decoder.encode(grid[r//3][None]), None, START
        for token in row:
            if token == PAD: break
            logits, _, state = decoder.step(torch.tensor([last]), state, memory)
            logits = logits[0].double()
            possible = [w for w in range(V) if w not in (PAD, START, VOCAB.unk_id)]
            total = total - advantage.flat[r]*(logits[token] - logits[possible].logsumexp(0))
            count, last = count + 1, token
    assert stats['tokens'] == count and stats['samples'] == 9 and stats['reward'] == pytest.approx(rewards.mean())
    assert loss.item() == pytest.approx((total/count).item(), abs=1e-5)
    torch.testing.assert_close(gradients(loss, decoder), gradients(total/count, decoder), atol=1e-5, rtol=1e-4)


class Tiny:
    "Every caption of at most three tokens out of two words, for a toy decoder in double precision"
    vocab = Vocab([*Vocab.specials, 'star', 'ring'])
    references = {'x': ['star ring', 'ring', 'star star ring'], 'y': ['the sea'], 'z': ['a boat']}

    def __init__(self, **options):
        self.decoder, self.grid = Toy(6, seed=1, sharp=.5), torch.randn(1, 4, 3, generator=chance(5), dtype=torch.float64)
        self.scst = SelfCritical(self.references, self.vocab, max_len=3, **options)
        words = [c for n in range(4) for c in product((4, 5), repeat=n)]
        self.every = torch.tensor([[*c, END, PAD, PAD][:3] for c in words])
        self.log_p = torch.stack([self.scst.log_probs(self.decoder, self.grid, c[None]).sum() for c in self.every])
        self.worth = torch.from_numpy(self.scst.reward(['x']*15, [[self.vocab.words[i] for i in c] for c in words], [len(c) < 3 for c in words]))

    def exact(self): return gradients((self.log_p.exp()*self.worth).sum(), self.decoder)


@pytest.mark.parametrize('options', [dict(), dict(samples=2), dict(baseline='greedy', samples=1), dict(bleu=2.), dict(end=False)], ids=str)
def test_unbiased(options):
    "The mean of many estimates is the gradient of the expected reward, within four standard errors in every parameter"
    tiny, estimates = Tiny(**options), []
    assert tiny.log_p.exp().sum().item() == pytest.approx(1)
    for seed in range(30):
        loss, stats = tiny.scst.loss(tiny.decoder, tiny.grid.expand(200, -1, -1), ['x']*200, chance(seed))
        estimates.append(-gradients(loss, tiny.decoder)*stats['tokens']/stats['samples'])
    estimates, exact = torch.stack(estimates), gradients((tiny.log_p.exp()*tiny.worth).sum(), tiny.decoder)
    error, chance_error = estimates.mean(0) - exact, estimates.std(0)/len(estimates)**.5
    assert exact.norm() > 20*chance_error.norm()/len(exact)**.5
    assert (error.abs() < 4*chance_error + 1e-12).float().mean() > .98
    assert error.norm() < .1*exact.norm()


def test_expected_estimate_is_exact():
    "For two samples an image, all 15 × 15 pairs weighted by their probability: no chance is left, and no bias"
    tiny = Tiny(samples=2)
    pairs = torch.tensor(list(product(range(15), repeat=2)))
    advantage, _ = tiny.scst.judge(['x']*225, tiny.every[pairs].flatten(0, 1))
    weight = tiny.log_p.exp().detach()[pairs].prod(1)
    mean = (weight[:, None]*torch.from_numpy(advantage)*tiny.log_p[pairs]).mean(1).sum()
    torch.testing.assert_close(gradients(mean, tiny.decoder), Tiny.exact(tiny := Tiny(samples=2)), atol=1e-12, rtol=1e-9)


def test_parts_make_the_whole():
    "What ranks and accumulated batches do: each part's mean times its tokens over all tokens"
    decoder, grid, ids = make(dropout=0.).double(), grids(4).double(), ['one', 'two', 'three', 'four']
    scst = SelfCritical(REFERENCES, VOCAB, samples=3, max_len=6)
    drawn, _ = scst.draw(decoder, grid, chance(3))
    def loss(rows, own):
        scst.draw = lambda *_: (type(drawn)(drawn.tokens[rows], drawn.logprobs[rows]), None)
        return scst.loss(decoder, own, [ids[i//3] for i in range(rows.start, rows.stop, 3)])
    whole, stats = loss(slice(0, 12), grid)
    parts = [loss(slice(0, 3), grid[:1]), loss(slice(3, 12), grid[1:]), loss(slice(0, 0), grid[:0])]
    assert sum(s['tokens'] for _, s in parts) == stats['tokens'] and sum(s['samples'] for _, s in parts) == 12
    total = sum(l*s['tokens']/stats['tokens'] for l, s in parts)
    assert total.item() == pytest.approx(whole.item(), rel=1e-12)
    torch.testing.assert_close(gradients(total, decoder), gradients(whole, decoder), atol=1e-12, rtol=1e-9)


def test_no_images():
    loss, stats = SelfCritical(REFERENCES, VOCAB).loss(make(), grids(0), [])
    loss.backward()
    assert loss.item() == stats['tokens'] == stats['samples'] == 0


@pytest.mark.parametrize('kind', ['always ends', 'never ends'])
def test_empty_and_endless_samples(kind):
    decoder = Toy(V, D, seed=0).train()
    with torch.no_grad(): decoder.out[:, END] = 0
    project = decoder.project
    decoder.project = lambda h: project(h) + (50. if kind == 'always ends' else -50.)*(torch.arange(V) == END)
    loss, stats = SelfCritical(REFERENCES, VOCAB, max_len=4).loss(decoder, grids(2).double(), ['one', 'two'], chance())
    assert (stats['words'], stats['finished']) == ((0, 1) if kind == 'always ends' else (4, 0))
    assert stats['tokens'] == (10 if kind == 'always ends' else 40)
    assert torch.isfinite(gradients(loss, decoder)).all()
    if kind == 'always ends': assert loss.item() == 0 and stats['spread'] == 0       # all equal: nothing to learn


def test_one_reference_and_one_image():
    for references in ({'two': ['a blue ring']}, {'two': ['']}, {'two': ['ring'], 'one': ['']}):
        loss, stats = SelfCritical(references, VOCAB, bleu=1.).loss(make(), grids(1), ['two'], chance())
        assert torch.isfinite(loss) and np.isfinite([stats['reward'], stats['baseline']]).all()


def test_nan_is_seen():
    decoder = make()
    with torch.no_grad(): decoder.output.bias.fill_(torch.nan)
    assert torch.isnan(SelfCritical(REFERENCES, VOCAB).loss(decoder, grids(2), ['one', 'two'])[0])


@pytest.mark.parametrize('name', DECODERS)
def test_samples_are_in_eval_mode_and_the_update_in_its_own(name):
    decoder, grid = make(name, dropout=.5), grids(2)
    scst = SelfCritical(REFERENCES, VOCAB, max_len=8)
    drawn, _ = scst.draw(decoder, grid, chance(7))
    again, _ = scst.draw(decoder.eval(), grid, chance(7))
    assert torch.equal(drawn.tokens, again.tokens) and torch.equal(drawn.logprobs, again.logprobs)
    assert not (drawn.tokens == VOCAB.unk_id).any()
    calm = [scst.log_probs(decoder, grid, drawn.tokens) for _ in range(2)]
    noisy = [scst.log_probs(decoder.train(), grid, drawn.tokens) for _ in range(2)]
    assert torch.equal(*calm) and not torch.equal(*noisy)


@pytest.mark.parametrize('baseline', ['leave_one_out', 'greedy'])
@pytest.mark.parametrize('own', [True, False])
def test_same_chance_same_bits(baseline, own):
    decoder, grid, found = make('attention', dropout=.5), grids(3), []
    for threaded in (True, False, True):
        scst = SelfCritical(REFERENCES, VOCAB, baseline=baseline, threaded=threaded)
        torch.manual_seed(5)
        loss, stats = scst.loss(decoder, grid, ['one', 'two', 'three'], chance(6) if own else None)
        found.append((loss.item(), gradients(loss, decoder), {k: v for k, v in stats.items() if 'seconds' not in k}, torch.get_rng_state()))
    for other in found[1:]:
        assert other[0] == found[0][0] and other[2] == found[0][2]
        assert torch.equal(other[1], found[0][1]) and torch.equal(other[3], found[0][3])


def test_gradient_reaches_the_encoder():
    decoder, grid = make('attention'), grids(2).requires_grad_()
    SelfCritical(REFERENCES, VOCAB).loss(decoder, grid, ['one', 'two'], chance())[0].backward()
    assert (grid.grad.flatten(1).norm(dim=1) > 0).all()


def test_unknown_words_where_they_may_come():
    decoder = make()
    with torch.no_grad(): decoder.output.bias[VOCAB.unk_id] = 20.
    open_, closed = (SelfCritical(REFERENCES, VOCAB, ban_unk=b, max_len=5) for b in (False, True))
    assert (open_.draw(decoder, grids(2), chance())[0].tokens == VOCAB.unk_id).float().mean() > .9
    assert not (closed.draw(decoder, grids(2), chance())[0].tokens == VOCAB.unk_id).any()
    assert torch.isfinite(open_.loss(decoder, grids(2), ['one', 'two'])[0]) and torch.isfinite(closed.loss(decoder, grids(2), ['one', 'two'])[0])


def test_low_precision():
    decoder = make('attention')
    with torch.autocast('cpu', torch.bfloat16):
        loss, _ = SelfCritical(REFERENCES, VOCAB).loss(decoder, grids(3), ['one', 'two', 'four'], chance())
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in decoder.parameters() if p.requires_grad and p.grad is not None)
    assert sum(p.grad is not None for p in decoder.parameters()) > 5       # weights cast while sampling are not what is trained on


def test_learns():
    "Fifty steps raise the mean reward of a decoder that knows nothing"
    torch.manual_seed(0)
    decoder, grid, ids = RecurrentDecoder(V, D, **SMALL, dropout=0.), grids(3), ['one', 'two', 'three']
    scst = SelfCritical(REFERENCES, VOCAB, samples=20, max_len=6)
    adam, rewards = torch.optim.Adam(decoder.parameters(), .03), []
    for _ in range(50):
        loss, stats = scst.loss(decoder, grid, ids)
        adam.zero_grad(); loss.backward(); adam.step()
        rewards.append(stats['reward'])
    assert np.mean(rewards[-5:]) > 2*np.mean(rewards[:5])


def test_bad_input():
    with pytest.raises(ValueError, match='needs at least 2'): SelfCritical(REFERENCES, VOCAB, samples=1)
    with pytest.raises(ValueError, match='needs at least 1'): SelfCritical(REFERENCES, VOCAB, samples=0, baseline='greedy')
    with pytest.raises(ValueError, match="did you mean 'greedy'"): SelfCritical(REFERENCES, VOCAB, baseline='greddy')
    with pytest.raises(ValueError, match='must not be negative'): SelfCritical(REFERENCES, VOCAB, bleu=-1.)
    with pytest.raises(ValueError, match='no references'): SelfCritical({}, VOCAB)
    scst = SelfCritical(REFERENCES, VOCAB)
    with pytest.raises(ValueError, match="no references for 'five'"): scst.loss(make(), grids(2), ['one', 'five'])
    with pytest.raises(ValueError, match='1 ids, but a grid of 2'): scst.loss(make(), grids(2), ['one'])
