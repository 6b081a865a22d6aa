"""Decoders: the protocol, the attention LSTM against a plain loop under autograd, and what is refused."""
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from caption_nb.attention import AttentionLSTM, make_plan
from caption_nb.decoder import Decoder, check_decoder, dropout, rows_per_image, take

pytestmark = pytest.mark.usefixtures('one_thread')


OPTIONS = dict(score=st.sampled_from(['tanh', 'relu']), gate=st.booleans(), deep_output=st.booleans(), norm=st.booleans(),
               project_grid=st.sampled_from([0, 5]))


def small(**options) -> AttentionLSTM:
    "A decoder with sizes that are all different"
    return AttentionLSTM(**{**dict(vocab_size=11, grid_dim=6, embed_dim=4, hidden_dim=7, attention_dim=3), **options})


def plain(d: AttentionLSTM, grid, tokens):
    "Logits and attention of the attention LSTM, from its equations, one row after the other"
    A, G, H4 = d.split
    H, k, logits, attention = H4//4, len(tokens)//len(grid), [], []
    for row, words in enumerate(tokens):
        a = d.project_grid(d.norm(grid[row//k]))                                            # (L, D)
        h, c = F.linear(a.mean(0), d.start.weight, d.start.bias).split(H)
        for y in words:
            e = d.embedding(y)
            query, beta, gates = F.linear(h, d.recur.weight, d.recur.bias).split([A, G, H4])
            z = F.linear(a, d.key.weight) + query
            alpha = ((z.tanh() if d.score == 'tanh' else z.relu()) @ d.energy.weight[0]).softmax(0)
            view = alpha @ a
            if G: view = view*beta.sigmoid()
            i, f, o, g = (gates + F.linear(e, d.word.weight) + F.linear(view, d.context.weight)).split(H)
            c = f.sigmoid()*c + i.sigmoid()*g.tanh()
            h = o.sigmoid()*c.tanh()
            out = h if d.deep is None else e + d.deep(torch.cat([h, view]))
            logits.append(d.output(out)); attention.append(alpha)
    shape = (*tokens.shape, -1)
    return torch.stack(logits).view(shape), torch.stack(attention).view(shape)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), captions=st.integers(1, 3), length=st.integers(1, 6), **OPTIONS)
def test_step_is_forward(seed, captions, length, **options):
    torch.manual_seed(seed)
    check_decoder(small(**options), captions=captions, length=length, tolerance=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), images=st.integers(1, 3), captions=st.integers(1, 3), **OPTIONS)
def test_forward_and_gradients_are_those_of_the_equations(seed, images, captions, **options):
    "The derivative by hand against autograd on the plain loop, captions of all lengths (none of any words too)"
    torch.manual_seed(seed)
    d = small(**options).double().eval()
    grid, tokens = torch.randn(images, 5, 6).double().requires_grad_(), torch.randint(1, 11, (images*captions, 6))
    lengths = torch.randint(0, 7, (len(tokens),))
    tokens[torch.arange(6) >= lengths[:, None]] = 0
    real = tokens != 0
    weights = torch.randn(*tokens.shape, 11).double(), torch.randn(*tokens.shape, 5).double()
    gradients = []
    for logits, attention in (d(d.encode(grid), tokens), plain(d, grid, tokens)):
        loss = sum((w*x)[real].sum() for w, x in zip(weights, (logits, attention)))
        gradients.append((loss, *torch.autograd.grad(loss, [grid, *d.parameters()], allow_unused=True)))
    names = ['loss', 'grid', *dict(d.named_parameters())]
    for name, mine, theirs in zip(names, *gradients):
        if mine is None or theirs is None: assert (mine is None or not mine.any()) and (theirs is None or not theirs.any()), name
        else: torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10, msg=lambda m: f'{name}: {m}')


def test_pads_and_other_captions_change_nothing():
    torch.manual_seed(0)
    d = small().double().eval()
    grid, tokens = torch.randn(2, 5, 6).double(), torch.randint(1, 11, (4, 3))
    logits, attention = d(d.encode(grid), tokens)
    longer = torch.cat([tokens, torch.zeros(4, 2, dtype=torch.long)], 1)
    again, look = d(d.encode(grid), longer)
    assert torch.equal(logits, again[:, :3]) and torch.equal(attention, look[:, :3])
    assert not look[:, 3:].any()


def test_only_the_attention_in_the_loss():
    "The states' derivative may be missing"
    torch.manual_seed(0)
    d = small()
    tokens = torch.tensor([[1, 4, 5], [1, 6, 0]])
    _, attention = d.hidden(d.encode(torch.randn(1, 5, 6)), tokens)
    d.loss_terms(attention, tokens != 0)['doubly_stochastic'].backward()
    assert d.key.weight.grad.abs().sum() > 0 and d.output.weight.grad is None


def test_no_words_at_all():
    d = small()
    hidden, attention = d.hidden(d.encode(torch.randn(2, 5, 6)), torch.zeros(4, 3, dtype=torch.long))
    assert hidden.shape == (4, 3, 7) and not hidden.any() and not attention.any()
    hidden.sum().backward()
    hidden, attention = d.hidden(d.encode(torch.randn(0, 5, 6)), torch.zeros(0, 3, dtype=torch.long))
    assert hidden.shape == (0, 3, 7) and attention.shape == (0, 3, 5)


def test_bf16_autocast_is_close_and_gives_float32_gradients():
    torch.manual_seed(0)
    d = AttentionLSTM(50, 32, 32, 32, 32).eval()
    grid, tokens = torch.randn(3, 9, 32), torch.randint(1, 50, (6, 7))
    full, look = d(d.encode(grid), tokens)
    with torch.autocast('cpu', torch.bfloat16):
        low, low_look = d(d.encode(grid), tokens)
        step, step_look, state = d.step(tokens[:, 0], None, d.encode(grid))
    assert low.dtype == torch.bfloat16 and low_look.dtype == torch.float32 and state['c'].dtype == torch.float32
    torch.testing.assert_close(low.float(), full, rtol=0.1, atol=0.03)
    torch.testing.assert_close(low_look, look, rtol=0.1, atol=0.02)
    torch.testing.assert_close(step.float(), full[:, 0], rtol=0.1, atol=0.03)
    low.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in d.parameters() if p.grad is not None)


def test_step_can_be_differentiated():
    "Free-running training feeds the decoder its own words"
    d = small()
    memory = d.encode(torch.randn(2, 5, 6))
    logits, _, state = d.step(torch.tensor([1, 1]), None, memory)
    logits, _, state = d.step(logits.argmax(1), state, memory)
    logits.sum().backward()
    assert d.key.weight.grad.abs().sum() > 0


def test_extreme_keys_stay_finite():
    d = small(norm=False).eval()
    logits, attention = d(d.encode(torch.randn(2, 5, 6)*1e6), torch.randint(1, 11, (2, 4)))
    assert logits.isfinite().all() and attention.isfinite().all()


def test_half_precision_features_are_taken():
    d = small().eval()
    grid = torch.randn(2, 5, 6).half()
    assert d(d.encode(grid), torch.ones(2, 2, dtype=torch.long))[0].dtype == torch.float32


def test_doubly_stochastic_counts_real_steps_and_real_captions():
    d = small(doubly_stochastic=2.0)
    attention, mask = torch.full((2, 3, 4), 0.25), torch.tensor([[True, True, False], [False]*3])
    assert d.loss_terms(attention, mask)['doubly_stochastic'].item() == pytest.approx(2*0.25)
    assert small(doubly_stochastic=0.).loss_terms(attention, mask) == {}
    assert d.loss_terms(attention, torch.zeros_like(mask))['doubly_stochastic'].item() == 0


def test_padding_row_of_the_embedding_never_learns():
    d = small()
    h, _ = d.hidden(d.encode(torch.randn(1, 5, 6)), torch.tensor([[1, 4, 0]]))
    h.sum().backward()
    assert not d.embedding.weight[0].any() and not d.embedding.weight.grad[0].any()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=4).flatmap(lambda a: st.tuples(st.just(a), st.integers(1, 3))))
def test_plan(case):
    "Every real word is visited once, in the order of time, by rows that are alive"
    lengths, k = case[0]*case[1], case[1]
    tokens = torch.zeros(len(lengths), 6, dtype=torch.long)
    for row, n in enumerate(lengths): tokens[row, :n] = 3
    plan = make_plan(tokens, k)
    assert sorted(zip(plan.row.tolist(), plan.time.tolist())) == [(r, t) for r, n in enumerate(lengths) for t in range(n)]
    assert plan.time.tolist() == sorted(plan.time.tolist())
    for t, n in enumerate(plan.counts):
        at = plan.at(t)
        assert len(set(at.tolist())) == n and int(at.max()) < plan.places[t]*(len(lengths)//k)
        assert torch.equal(at//plan.places[t], plan.order[:n]//k)


@pytest.mark.parametrize('options, message', [
    (dict(score='tnah'), "unknown score 'tnah': did you mean 'tanh'"), (dict(dropout=1.), r'dropout must be in \[0, 1\), got 1.0'),
    (dict(hidden_dim=0), 'hidden_dim must be at least 1, got 0'), (dict(vocab_size=0), 'vocab_size must be at least 1'),
    (dict(grid_dim=-1), 'grid_dim must be at least 1'), (dict(doubly_stochastic=-1.), 'doubly_stochastic must not be negative'),
    (dict(pad_id=11), 'pad_id 11 is not in the vocabulary of 11'), (dict(project_grid=-2), 'project_grid must not be negative')])
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message): small(**options)


def test_rows_that_do_not_fit_the_images():
    d = small()
    with pytest.raises(ValueError, match='5 rows cannot share the memories of 2 images'):
        d.hidden(d.encode(torch.randn(2, 5, 6)), torch.ones(5, 2, dtype=torch.long))
    assert rows_per_image(dict(x=torch.zeros(0, 1)), 0) == 1


def test_config_is_json_and_complete():
    d = small(score='relu', gate=False)
    assert json.loads(json.dumps(d.config)) == d.config and d.config['score'] == 'relu'


def test_take_keeps_names_and_order():
    got = take(dict(a=torch.arange(3), b=torch.eye(3)), torch.tensor([2, 0, 0]))
    assert got['a'].tolist() == [2, 0, 0] and got['b'].shape == (3, 3)


@settings(max_examples=20, deadline=None)
@given(p=st.floats(0, 0.95), seed=st.integers(0, 9))
def test_dropout(p, seed):
    torch.manual_seed(seed)
    x = torch.ones(401, 257, requires_grad=True)                        # not a multiple of eight
    y = dropout(x, p)
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=0.01)
    assert y.mean().item() == pytest.approx(1, abs=0.06)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    torch.manual_seed(seed)
    assert torch.equal(dropout(x, p), y)                                # the seed decides
    assert dropout(x, p, training=False) is x and dropout(torch.empty(0, 3), 0.5).shape == (0, 3)


def test_check_decoder_finds_faults():
    class Stateless(AttentionLSTM):
        "Forgets its state"
        def step(self, token, state, memory): return super().step(token, None, memory)
    class Secretive(AttentionLSTM):
        "Has an argument that a checkpoint would not know"
        def __init__(self, vocab_size=11, grid_dim=6, trick=0): super().__init__(vocab_size, grid_dim, 4, 4, 4)
    with pytest.raises(AssertionError, match='Stateless fails "step = forward"'): check_decoder(Stateless(11, 6, 4, 4, 4))
    with pytest.raises(AssertionError, match="config lacks .*'trick'"): check_decoder(Secretive())
    d = small().train()
    check_decoder(d)
    assert d.training                                                   # the mode is given back


def test_the_bare_protocol_says_what_is_missing():
    d = Decoder(5, 3)
    for call in (lambda: d.encode(None), lambda: d({}, None), lambda: d.project(None), lambda: d.step(None, None, None)):
        with pytest.raises(NotImplementedError): call()
    assert d.loss_terms(None, None) == {}
