"""Attention decoders: the fast loop against a plain one under autograd, every option used, and what is refused."""
import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from caption_nb.attention import CELLS, SCORES, AttentionDecoder, make_plan
from caption_nb.decoder import check_decoder

pytestmark = pytest.mark.usefixtures('one_thread')


OPTIONS = dict(cell=st.sampled_from(list(CELLS)), attention=st.sampled_from(list(SCORES)), gate=st.booleans(), deep_output=st.booleans(),
               init=st.sampled_from(['mean', 'flat', 'zeros']), norm=st.booleans(), project_grid=st.sampled_from([0, 5]),
               vector_dim=st.sampled_from([0, 3]))
GRID = list(itertools.product(CELLS, SCORES))


def small(**options) -> AttentionDecoder:
    "A decoder with sizes that are all different, for grids of 5 cells with 6 numbers"
    sizes = dict(vocab_size=11, grid_dim=6, embed_dim=4, hidden_dim=7, attention_dim=8, heads=2, grid_cells=5)
    return AttentionDecoder(**{**sizes, **options})


def plain(d: AttentionDecoder, grid, tokens):
    "Logits and attention from the equations of the notebook, one row after the other"
    c, logits, attention = d.config, [], []
    A, _, _ = d.split
    H, k, heads = c['hidden_dim'], len(tokens)//len(grid), c['heads'] if c['attention'] == 'multihead' else 1
    for row, words in enumerate(tokens):
        a = d.project_grid(d.norm(grid[row//k]))                                            # (L, D)
        keys = F.linear(a, d.key.weight).split(A//heads, 1)
        values = F.linear(a, d.value.weight).split(A//heads, 1) if heads > 1 else [a]
        h = cell = torch.zeros(H).to(grid)
        if c['init'] != 'zeros':
            first = F.linear(a.mean(0) if c['init'] == 'mean' else a.flatten(), d.start.weight, d.start.bias)
            h, cell = first[:H], first[H:]
        for y in words:
            e = d.embedding(y)
            query, beta, s = F.linear(h, d.recur.weight, d.recur.bias).split(d.split)
            looks, seen = [], []
            for key, value, q in zip(keys, values, query.split(A//heads)):
                if c['attention'] == 'additive_tanh': scores = (key + q).tanh() @ d.energy.weight[0]
                elif c['attention'] == 'additive_relu': scores = (key + q).relu() @ d.energy.weight[0]
                else: scores = key @ q/(A//heads)**0.5
                looks.append(scores.softmax(0)); seen.append(looks[-1] @ value)
            view = torch.cat(seen)*(beta.sigmoid() if c['gate'] else 1)
            x = d.word(e) + F.linear(view, d.context.weight)
            if c['cell'] == 'rnn': h = (x + s).tanh()
            if c['cell'] == 'lstm':
                i, f, o, g = (x + s).split(H)
                cell = f.sigmoid()*cell + i.sigmoid()*g.tanh()
                h = o.sigmoid()*cell.tanh()
            if c['cell'] == 'gru':
                (xr, xz, xn), (sr, sz, sn) = x.split(H), s.split(H)
                z = (xz + sz).sigmoid()
                h = (1 - z)*(xn + (xr + sr).sigmoid()*sn).tanh() + z*h
            logits.append(d.output(h if d.deep is None else e + d.deep(torch.cat([h, view]))))
            attention.append(torch.stack(looks) if c['attention'] == 'multihead' else looks[0])
    return (torch.stack(x).unflatten(0, tuple(tokens.shape)) for x in (logits, attention))


def twins(**options) -> tuple[AttentionDecoder, AttentionDecoder]:
    "A fused and a scratch decoder with the same weights, in double precision"
    fused, scratch = (small(**options, impl=impl).double().eval() for impl in ('fused', 'scratch'))
    scratch.load_state_dict(fused.state_dict())
    return fused, scratch


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), captions=st.integers(1, 3), length=st.integers(1, 6), impl=st.sampled_from(['fused', 'scratch']), **OPTIONS)
def test_step_is_forward(seed, captions, length, **options):
    torch.manual_seed(seed)
    check_decoder(small(**options), torch.randn(3, 5, 6), captions=captions, length=length, tolerance=1e-5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 99), images=st.integers(1, 3), captions=st.integers(1, 3), **OPTIONS)
def test_forward_and_gradients_are_those_of_the_equations(seed, images, captions, **options):
    "The derivative by hand, and that of scratch, against autograd on the plain loop; captions of all lengths, none too"
    torch.manual_seed(seed)
    fused, scratch = twins(**options)
    grid, tokens = torch.randn(images, 5, 6).double().requires_grad_(), torch.randint(1, 11, (images*captions, 6))
    tokens[torch.arange(6) >= torch.randint(0, 7, (len(tokens), 1))] = 0
    real, heads = tokens != 0, (2,) if fused.config['attention'] == 'multihead' else ()
    weights = torch.randn(*tokens.shape, 11).double(), torch.randn(*tokens.shape, *heads, 5).double()
    def gradients(d, out):
        loss = sum((w*x)[real].sum() for w, x in zip(weights, out))
        return loss, *torch.autograd.grad(loss, [grid, *d.parameters()], allow_unused=True, materialize_grads=True)
    want = gradients(fused, plain(fused, grid, tokens))
    names = ['loss', 'grid', *dict(fused.named_parameters())]
    for d in (fused, scratch):
        for name, mine, theirs in zip(names, gradients(d, d(d.encode(grid), tokens)), want):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10, msg=lambda m: f'{d.config["impl"]}, {name}: {m}')


@pytest.mark.parametrize('impl', ['fused', 'scratch'])
@pytest.mark.parametrize('cell, attention', GRID)
def test_every_parameter_is_used(cell, attention, impl):
    "Whatever the options: no gradient is zero, nor what rounding leaves of one that cancels; each part of the stacked layer has its own"
    for gate, deep_output, init, more in itertools.product([True, False], [True, False], ['mean', 'flat', 'zeros'], [0, 3]):
        torch.manual_seed(0)
        d = small(cell=cell, attention=attention, impl=impl, gate=gate, deep_output=deep_output, init=init, vector_dim=more,
                  project_grid=more).double().eval()
        tokens = torch.tensor([[1, 5, 6, 7], [1, 8, 9, 0]])
        logits, look = d(d.encode(torch.randn(1, 5, 6).double()), tokens)
        logits[tokens > 0].logsumexp(-1).sum().backward()
        parts = {name: p.grad for name, p in d.named_parameters()}
        for name in ('recur.weight', 'recur.bias'):
            parts |= {f'{name}, {part}': x for part, x in zip(('query', 'gate', 'cell'), parts[name].split(d.split)) if len(x)}
        unused = [name for name, g in parts.items() if g is None or g.abs().max() < 1e-9]
        assert not unused, f'{d.config}: {unused}'


@pytest.mark.parametrize('cell, attention', GRID)
def test_the_image_changes_the_words(cell, attention):
    "Also without a first state from it"
    torch.manual_seed(0)
    d, tokens = small(cell=cell, attention=attention, init='zeros').eval(), torch.randint(1, 11, (1, 4))
    one, other = (d(d.encode(torch.randn(1, 5, 6)), tokens)[0] for _ in range(2))
    assert ((one - other).abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize('cell, attention', GRID)
def test_bf16_autocast_is_close_and_gives_float32_gradients(cell, attention):
    for impl in ('fused', 'scratch'):
        torch.manual_seed(0)
        d = AttentionDecoder(50, 32, cell, attention, 4, 32, 32, 32, impl=impl).eval()
        grid, tokens = torch.randn(3, 9, 32), torch.randint(1, 50, (6, 7))
        full, look = d(d.encode(grid), tokens)
        with torch.autocast('cpu', torch.bfloat16):
            low, low_look = d(d.encode(grid), tokens)
            step, _, state = d.step(tokens[:, 0], None, d.encode(grid))
        assert low.dtype == torch.bfloat16 and low_look.dtype == torch.float32 and {x.dtype for x in state.values()} == {torch.float32}
        torch.testing.assert_close(low.float(), full, rtol=0.1, atol=0.03)
        torch.testing.assert_close(low_look, look, rtol=0.1, atol=0.02)
        torch.testing.assert_close(step.float(), full[:, 0], rtol=0.1, atol=0.03)
        low.float().square().mean().backward()
        assert all(p.grad.dtype == torch.float32 for p in d.parameters())


@pytest.mark.parametrize('attention', SCORES)
def test_what_an_image_takes_does_not_grow_with_captions(attention):
    "Keys and values once an image, whole; no first state where it is zero"
    d = small(attention=attention, init='zeros', cell='gru')
    memory, heads = d.encode(torch.randn(2, 5, 6)), 2 if attention == 'multihead' else 1
    assert set(memory) == {'keys', 'values'} and memory['keys'].shape == (2, heads, 5, 8//heads)
    assert memory['values'].shape == (2, heads, 5, 4 if heads > 1 else 6)
    assert all(x.is_contiguous() for x in memory.values())
    for captions in (1, 3):
        logits, look, state = d.step(torch.ones(2*captions, dtype=torch.long), None, memory)
        assert look.shape == (2*captions, *[heads]*(heads > 1), 5) and set(state) == {'h'} and state['h'].shape == (2*captions, 7)


def test_first_states():
    grid = torch.randn(2, 5, 6)
    for cell in CELLS:
        d = small(cell=cell, init='flat', norm=False)
        state = torch.cat(list(d.first_state(d.encode(grid), 4).values()), 1)
        torch.testing.assert_close(state, d.start(grid.flatten(1)).repeat_interleave(2, 0))
        d = small(cell=cell, init='mean', norm=False)
        state = torch.cat(list(d.first_state(d.encode(grid), 4).values()), 1)
        torch.testing.assert_close(state, d.start(grid.mean(1)).repeat_interleave(2, 0))
        assert not any(x.any() for x in small(cell=cell, init='zeros').first_state(d.encode(grid), 4).values())
    with pytest.raises(ValueError, match='the grid has 4 cells, but this decoder was built for grid_cells=5'):
        small(init='flat').encode(grid[:, :4])


def test_pads_and_other_captions_change_nothing():
    torch.manual_seed(0)
    for d in twins():
        grid, tokens = torch.randn(2, 5, 6).double(), torch.randint(1, 11, (4, 3))
        logits, attention = d(d.encode(grid), tokens)
        longer = torch.cat([tokens, torch.zeros(4, 2, dtype=torch.long)], 1)
        again, look = d(d.encode(grid), longer)
        assert torch.equal(logits, again[:, :3]) and torch.equal(attention, look[:, :3])
        assert not look[:, 3:].any()


@pytest.mark.parametrize('attention', SCORES)
def test_only_the_attention_in_the_loss(attention):
    "The states' derivative may be missing"
    torch.manual_seed(0)
    d = small(attention=attention)
    tokens = torch.tensor([[1, 4, 5], [1, 6, 0]])
    _, look = d.hidden(d.encode(torch.randn(1, 5, 6)), tokens)
    d.loss_terms(look, tokens != 0)['doubly_stochastic'].backward()
    assert d.key.weight.grad.abs().sum() > 0 and d.output.weight.grad is None


@pytest.mark.parametrize('impl', ['fused', 'scratch'])
def test_no_words_at_all(impl):
    d = small(impl=impl)
    hidden, attention = d.hidden(d.encode(torch.randn(2, 5, 6)), torch.zeros(4, 3, dtype=torch.long))
    assert hidden.shape == (4, 3, 7) and not hidden.any() and not attention.any()
    hidden.sum().backward()
    hidden, attention = d.hidden(d.encode(torch.randn(0, 5, 6)), torch.zeros(0, 3, dtype=torch.long))
    assert hidden.shape == (0, 3, 7) and attention.shape == (0, 3, 5)


@pytest.mark.parametrize('cell, attention', GRID)
def test_step_can_be_differentiated(cell, attention):
    "Free-running training feeds the decoder its own words"
    torch.manual_seed(0)
    for d in twins(cell=cell, attention=attention):
        memory = d.encode(torch.randn(2, 5, 6).double())
        logits, _, state = d.step(torch.tensor([1, 1]), None, memory)
        logits, _, state = d.step(logits.argmax(1), state, memory)
        logits.square().sum().backward()
        assert all(p.grad.abs().max() > 1e-9 for p in d.parameters())


@pytest.mark.parametrize('attention', SCORES)
def test_extreme_keys_stay_finite(attention):
    torch.manual_seed(0)
    for impl in ('fused', 'scratch'):
        d = small(attention=attention, norm=False, impl=impl)
        logits, look = d(d.encode(torch.randn(2, 5, 6)*1e6), torch.randint(1, 11, (2, 4)))
        (logits.square().mean() + look.sum()).backward()
        assert logits.isfinite().all() and look.isfinite().all() and all(p.grad.isfinite().all() for p in d.parameters())


def test_half_precision_features_are_taken():
    d = small().eval()
    grid = torch.randn(2, 5, 6).half()
    assert d(d.encode(grid), torch.ones(2, 2, dtype=torch.long))[0].dtype == torch.float32


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
    end = 0
    for t, (now, places, at) in enumerate(plan.steps):
        assert now.start == end and now.stop - now.start == len(at) and (plan.time[now] == t).all()
        assert len(set(at.tolist())) == len(at) and int(at.max()) < places*(len(lengths)//k)
        assert torch.equal(at//places, plan.order[:len(at)]//k) and torch.equal(plan.row[now], plan.order[:len(at)])
        end = now.stop


@pytest.mark.parametrize('options, message', [
    (dict(cell='lsmt'), "unknown cell 'lsmt': did you mean 'lstm'"),
    (dict(attention='aditive_tanh'), "unknown attention 'aditive_tanh': did you mean 'additive_tanh'"),
    (dict(init='men'), "unknown init 'men': did you mean 'mean'"), (dict(impl='scrach'), "unknown impl 'scrach': did you mean 'scratch'"),
    (dict(attention='multihead', heads=3), 'attention_dim=8 cannot be split evenly among heads=3'),
    (dict(heads=0), 'heads must be at least 1, got 0'), (dict(init='flat', grid_cells=0), "init='flat' needs grid_cells"),
    (dict(dropout=1.), r'dropout must be in \[0, 1\), got 1.0'), (dict(hidden_dim=0), 'hidden_dim must be at least 1, got 0'),
    (dict(vocab_size=0), 'vocab_size must be at least 1'), (dict(grid_dim=-1), 'grid_dim must be at least 1'),
    (dict(doubly_stochastic=-1.), 'doubly_stochastic must not be negative'), (dict(vector_dim=-1), 'vector_dim must not be negative'),
    (dict(pad_id=11), 'pad_id 11 is not in the vocabulary of 11'), (dict(project_grid=-2), 'project_grid must not be negative')])
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message): small(**options)


def test_rows_that_do_not_fit_the_images():
    d = small()
    memory = d.encode(torch.randn(2, 5, 6))
    with pytest.raises(ValueError, match='5 rows cannot share the memories of 2 images'):
        d.hidden(memory, torch.ones(5, 2, dtype=torch.long))
    with pytest.raises(ValueError, match='3 rows cannot share the memories of 2 images'):
        d.step(torch.ones(3, dtype=torch.long), dict(h=torch.zeros(3, 7), c=torch.zeros(3, 7)), memory)


def test_config_is_json_and_complete():
    d = small(attention='multihead', gate=False)
    assert json.loads(json.dumps(d.config)) == d.config and d.config['attention'] == 'multihead'
