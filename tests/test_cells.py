"""Recurrent cells and attention: sizes, gradients against finite differences and torch's own modules, masks, precision, edges."""
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck
from torch.nn import functional as F

from caption_nb.cells import (AdditiveAttention, GRUCell, LSTMCell, MultiHeadAttention, RNNCell, additive_attention, additive_scores,
                              additive_scores_backward, attend, gru_cell, gru_cell_backward, linear, lstm_cell, lstm_cell_backward,
                              merge_heads, rnn_cell, rnn_cell_backward, scaled_dot_attention, softmax, softmax_backward, split_heads,
                              swap_gates)

pytestmark = pytest.mark.usefixtures('one_thread')
CELLS = {RNNCell: nn.RNNCell, LSTMCell: nn.LSTMCell, GRUCell: nn.GRUCell}
kinds = pytest.mark.parametrize('kind', CELLS, ids=lambda k: k.__name__)
scores = pytest.mark.parametrize('score', ['tanh', 'relu'])
few = settings(max_examples=8, deadline=None)
some = settings(max_examples=20, deadline=None)
size = st.integers(1, 4)
seeds = st.integers(0, 10**6)


def normal(*shape, grad=True, dtype=torch.float64): return torch.randn(*shape, dtype=dtype, requires_grad=grad)


def flat(tree): return [tree] if isinstance(tree, torch.Tensor) else [x for b in tree if b is not None for x in flat(b)]


def outcome(f, inputs, parameters=()):
    "Outputs, and the gradients of a fixed random loss by everything that wants one"
    outputs = flat(f(*inputs))
    noise = torch.Generator().manual_seed(0)
    loss = sum((y*torch.randn(y.shape, dtype=torch.float64, generator=noise)).sum() for y in outputs)
    wanted = [x for x in [*flat(inputs), *parameters] if x.requires_grad]
    return [*outputs, *torch.autograd.grad(loss, wanted)]


def assert_same(ours, theirs, tolerance=1e-12):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def twins(kind, input_dim, hidden_dim):
    "Our cell and torch's with the same weights"
    ours, theirs = kind(input_dim, hidden_dim).double(), CELLS[kind](input_dim, hidden_dim).double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def state_of(kind, *shape, **options):
    return (normal(*shape, **options), normal(*shape, **options)) if kind is LSTMCell else normal(*shape, **options)


def plain_additive(query, keys, v, values, score, mask=None):
    e = getattr(torch, score)(query[..., :, None, :] + keys[..., None, :, :]) @ v
    if mask is not None: e = e.masked_fill(~mask, -torch.inf)
    return e.softmax(-1) @ values, e.softmax(-1)


def plain_dot(q, k, v, mask=None):
    e = q @ k.transpose(-2, -1)/q.shape[-1]**0.5
    if mask is not None: e = e.masked_fill(~mask, -torch.inf)
    return e.softmax(-1) @ v, e.softmax(-1)


def some_mask(*shape):
    "Random, but at least one cell in each row may be seen"
    mask = torch.rand(shape) > 0.5
    mask[..., 0] |= ~mask.any(-1)
    return mask


# ---- linear -----------------------------------------------------------------------------------------------------

@few
@given(lead=st.lists(st.integers(0, 3), max_size=3), inputs=size, outputs=size, bias=st.booleans(), seed=seeds)
def test_linear_is_torchs(lead, inputs, outputs, bias, seed):
    torch.manual_seed(seed)
    x, weight, b = normal(*lead, inputs), normal(outputs, inputs), normal(outputs) if bias else None
    assert_same(outcome(linear, (x, weight, b)), outcome(F.linear, (x, weight, b)))
    if 0 not in lead: assert gradcheck(linear, (x, weight, b))


# ---- cells ------------------------------------------------------------------------------------------------------

@kinds
@some
@given(rows=st.integers(0, 4), inputs=size, hidden=size, state=st.booleans(), seed=seeds)
def test_cell_is_torchs(kind, rows, inputs, hidden, state, seed):
    torch.manual_seed(seed)
    ours, theirs = twins(kind, inputs, hidden)
    given_ = (normal(rows, inputs), state_of(kind, rows, hidden) if state else None)
    assert_same(outcome(ours, given_, ours.parameters()), outcome(theirs, given_, theirs.parameters()))


@kinds
@few
@given(rows=st.integers(1, 3), inputs=size, hidden=size, seed=seeds)
def test_cell_gradcheck(kind, rows, inputs, hidden, seed):
    torch.manual_seed(seed)
    cell, x, state = kind(inputs, hidden).double(), normal(rows, inputs), flat(state_of(kind, rows, hidden))
    f = lambda x, *rest: cell(x, tuple(rest[:2]) if kind is LSTMCell else rest[0])
    assert gradcheck(f, (x, *state, *cell.parameters()))


@few
@given(rows=st.integers(1, 3), hidden=size, seed=seeds)
def test_functional_pieces(rows, hidden, seed):
    "The backward pieces, as a fast loop calls them, against autograd through the equations"
    torch.manual_seed(seed)
    H = hidden
    gates, c, dh, dc = normal(rows, 4*H), normal(rows, H), normal(rows, H, grad=False), normal(rows, H, grad=False)
    i, f, o, g = (*gates[:, :3*H].sigmoid().chunk(3, 1), gates[:, 3*H:].tanh())
    new = f*c + i*g
    h = o*new.tanh()
    ours = lstm_cell(gates.detach(), c.detach())
    assert_same(ours, [h, new, torch.cat([i, f, o], 1), g])
    dgates, dbefore = torch.autograd.grad((h*dh + new*dc).sum(), (gates, c))
    difo, dg, dlast = lstm_cell_backward(dh, dc, *ours[2:], ours[1], c.detach())
    assert_same([torch.cat([difo, dg], 1), dlast], [dgates, dbefore])

    x, s, h = normal(rows, 3*H), normal(rows, 3*H), normal(rows, H)
    r, z = (x + s)[:, :2*H].sigmoid().chunk(2, 1)
    n = (x[:, 2*H:] + r*s[:, 2*H:]).tanh()
    new = (1 - z)*n + z*h
    ours = gru_cell(x.detach(), s.detach(), h.detach())
    assert_same(ours, [new, torch.cat([r, z], 1), n])
    assert_same(gru_cell_backward(dh, *ours[1:], s.detach(), h.detach()), torch.autograd.grad((new*dh).sum(), (x, s, h)))

    a = normal(rows, H)
    assert_same([rnn_cell_backward(dh, rnn_cell(a.detach()))], torch.autograd.grad((a.tanh()*dh).sum(), a))


@kinds
def test_same_seed_same_weights(kind):
    torch.manual_seed(3)
    ours = kind(5, 7).state_dict()
    torch.manual_seed(3)
    theirs = CELLS[kind](5, 7).state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)


@kinds
@pytest.mark.parametrize('lead', [(), (2, 3), (2, 0), (1,)], ids=str)
def test_leading_dimensions(kind, lead):
    cell = kind(4, 5).double()
    x, state = normal(*lead, 4, grad=False), state_of(kind, *lead, 5, grad=False)
    one = [s.reshape(-1, 5) for s in flat(state)]
    expected = flat(cell(x.reshape(-1, 4), tuple(one) if kind is LSTMCell else one[0]))
    assert_same(flat(cell(x, state)), [y.reshape(*lead, 5) for y in expected])


@kinds
def test_strided_inputs(kind):
    cell, x, h = kind(4, 5).double(), normal(4, 3), normal(5)
    def strided(x, h):
        s = h.expand(3, 5)
        return cell(x.t(), (s, s) if kind is LSTMCell else s)
    def whole(x, h):
        s = h.expand(3, 5).clone()
        return cell(x.t().contiguous(), (s, s) if kind is LSTMCell else s)
    assert_same(outcome(strided, (x, h), cell.parameters()), outcome(whole, (x, h), cell.parameters()))


@kinds
@pytest.mark.parametrize('name', ['x', 'state', 'weight_ih', 'weight_hh', 'bias_ih', 'bias_hh'])
def test_gradient_for_one_alone(kind, name):
    ours, theirs = twins(kind, 4, 5)
    for cell in (ours, theirs):
        for key, p in cell.named_parameters(): p.requires_grad_(key == name)
    given_ = (normal(3, 4, grad=name == 'x'), state_of(kind, 3, 5, grad=name == 'state'))
    assert_same(outcome(ours, given_, ours.parameters()), outcome(theirs, given_, theirs.parameters()))


@kinds
def test_sequence_is_torchs_layer(kind):
    "Through time, with a loss on all states"
    torch.manual_seed(0)
    cell, layer = kind(4, 5), {RNNCell: nn.RNN, LSTMCell: nn.LSTM, GRUCell: nn.GRU}[kind](4, 5, batch_first=True)
    layer.load_state_dict({f'{k}_l0': v for k, v in cell.state_dict().items()})
    cell, layer, x = cell.double(), layer.double(), normal(3, 9, 4)
    def loop(x):
        state, found = None, []
        for t in range(9):
            state = cell(x[:, t], state)
            found.append(flat(state)[0])
        return torch.stack(found, 1)
    assert_same(outcome(loop, (x,), cell.parameters()), outcome(lambda x: layer(x)[0], (x,), layer.parameters()))


@kinds
@pytest.mark.parametrize('large', [1e2, 1e4, 1e30])
def test_large_values(kind, large):
    "Saturated gates are exact, and have no gradient, but never one that is not a number"
    torch.manual_seed(0)
    cell = kind(4, 5)
    x, state = (large*torch.randn(6, 4)).requires_grad_(), state_of(kind, 6, 5, dtype=torch.float32)
    found = outcome(cell, (x, state), cell.parameters())
    outputs = found[:2 if kind is LSTMCell else 1]
    assert all(torch.isfinite(y).all() for y in found)
    assert outputs[0].abs().max() <= max(1, flat(state)[0].abs().max())


def test_carousel():
    "A cell that forgets nothing and takes nothing in hands its state and the error through unchanged"
    on, off, c = torch.full((2, 3), 60.), torch.full((2, 3), -60.), torch.randn(2, 3)
    _, after, ifo, g = lstm_cell(torch.cat([off, on, on, on], 1), c)
    assert torch.equal(after, c)
    error = torch.randn(2, 3)
    assert torch.equal(lstm_cell_backward(torch.zeros(2, 3), error, ifo, g, after, c)[2], error)
    wide = torch.cat([off, on, off], 1)
    new, rz, n = gru_cell(wide, torch.zeros(2, 9), c)
    assert torch.equal(new, c)
    assert torch.equal(gru_cell_backward(error, rz, n, torch.zeros(2, 9), c)[2], error)


def test_swap_gates_is_its_own_inverse():
    x = torch.randn(3, 8)
    assert torch.equal(swap_gates(swap_gates(x)), x)
    assert torch.equal(swap_gates(x.T, dim=0).T, swap_gates(x))
    theirs = nn.LSTMCell(4, 2)
    h, c, a = torch.randn(3, 2), torch.randn(3, 2), torch.randn(3, 4)
    gates = F.linear(a, theirs.weight_ih, theirs.bias_ih) + F.linear(h, theirs.weight_hh, theirs.bias_hh)
    torch.testing.assert_close(lstm_cell(swap_gates(gates), c)[:2], theirs(a, (h, c)))


@kinds
def test_cell_says_what_does_not_fit(kind):
    cell = kind(4, 5)
    with pytest.raises(ValueError, match='inputs of 3 numbers, the weights want 4'): cell(torch.zeros(2, 3))
    for shape in ((1, 5), (2, 4), (5,)):
        with pytest.raises(ValueError, match='a state of shape'): cell(torch.zeros(2, 4), state_of(kind, *shape, dtype=torch.float32))
    for sizes in ((0, 5), (4, 0), (-1, 2)):
        with pytest.raises(ValueError, match='at least 1'): kind(*sizes)


@kinds
def test_cell_copies(kind):
    cell, x = kind(4, 5), torch.randn(2, 4)
    assert_same(flat(copy.deepcopy(cell)(x)), flat(cell(x)))
    assert f'{kind.__name__}(4, 5)' == repr(cell)


# ---- softmax and looking ----------------------------------------------------------------------------------------

@some
@given(lead=st.lists(st.integers(0, 3), max_size=2), cells=size, masked=st.booleans(), seed=seeds)
def test_softmax_is_torchs(lead, cells, masked, seed):
    torch.manual_seed(seed)
    e, mask = normal(*lead, cells), some_mask(*lead, cells) if masked else None
    theirs = lambda e: (e if mask is None else e.masked_fill(~mask, -torch.inf)).softmax(-1)
    assert_same([softmax(e, mask)], [theirs(e)])
    dweights = torch.randn(*lead, cells, dtype=torch.float64)
    assert_same([softmax_backward(dweights, softmax(e.detach(), mask))], torch.autograd.grad((theirs(e)*dweights).sum(), e))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_softmax_of_large_scores(dtype):
    large = torch.finfo(dtype).max
    e = torch.tensor([[large, -large, 0], [-large, -large, -large], [1e4, 1e4, -1e4], [0, -torch.inf, -torch.inf]], dtype=dtype)
    expected = torch.tensor([[1, 0, 0], [1/3, 1/3, 1/3], [.5, .5, 0], [1, 0, 0]], dtype=dtype)
    torch.testing.assert_close(softmax(e), expected)


def test_nothing_to_see():
    "A row without cells looks at none, learns nothing and disturbs nobody"
    e, values = normal(2, 3), normal(3, 4)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    out, weights = attend(e, values, mask)
    assert weights[1].eq(0).all() and out[1].eq(0).all()
    de, dvalues = torch.autograd.grad(out.sum() + weights.square().sum(), (e, values))
    assert de[1].eq(0).all() and de[:, 2].eq(0).all() and dvalues[2].eq(0).all()
    assert torch.isfinite(de).all() and torch.isfinite(dvalues).all()


def test_nan_is_not_hidden():
    e = torch.tensor([[0., torch.nan], [0., 1.]])
    assert softmax(e)[0].isnan().all() and softmax(e)[1].isfinite().all()
    assert softmax(e, torch.tensor([True, False]))[0].tolist() == [1, 0]   # unless nobody may look at it


@some
@given(cells=st.integers(1, 6), seed=seeds, data=st.data())
def test_all_but_one_hidden(cells, seed, data):
    "Then that one is seen, whatever the scores, and by every attention"
    torch.manual_seed(seed)
    one = data.draw(st.integers(0, cells - 1))
    mask = (torch.arange(cells) == one).expand(3, cells)
    q, k, v = 100*normal(2, 3, 4), 100*normal(2, cells, 4), normal(2, cells, 4)
    module, heads = AdditiveAttention(4, 4, 5).double(), MultiHeadAttention(4, 2).double()
    for out, weights in (scaled_dot_attention(q, k, v, mask), additive_attention(q, k, normal(4), v, mask=mask), module(q, k, v, mask)):
        assert torch.equal(weights, mask.double().expand(2, 3, cells))
        assert torch.equal(out, v[:, one:one + 1].expand_as(out))
        dq, = torch.autograd.grad(out.sum() + weights.sum(), q, retain_graph=True)
        assert dq.eq(0).all()
    assert torch.equal(heads(q, k, v, mask)[1], mask.double().expand(2, 2, 3, cells))


def test_masks_are_bools():
    for mask in (torch.ones(2, 3), torch.ones(2, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match='a mask is of bools'): softmax(torch.zeros(2, 3), mask)


def test_dropout_of_weights():
    torch.manual_seed(0)
    e, values = normal(2, 3, 40), normal(2, 40, 4)
    def f(e, values):
        torch.manual_seed(1)
        return attend(e, values, None, 0.25)
    assert gradcheck(f, (e, values))
    out, weights = f(e, torch.eye(40, dtype=torch.float64).expand(2, 40, 40))           # the mean shows the weights used
    torch.testing.assert_close(weights, e.softmax(-1))                                  # what is shown is before dropout
    kept = out != 0
    torch.testing.assert_close(out[kept], weights[kept]/0.75)
    assert 0.6 < kept.double().mean() < 0.9


# ---- scores -----------------------------------------------------------------------------------------------------

@some
@given(lead=st.lists(st.integers(0, 2), max_size=3), T=size, L=size, d=size, D=size, masked=st.booleans(), seed=seeds)
def test_scaled_dot_is_torchs(lead, T, L, d, D, masked, seed):
    torch.manual_seed(seed)
    q, k, v = normal(*lead, T, d), normal(*lead, L, d), normal(*lead, L, D)
    mask = some_mask(*lead, T, L) if masked else None
    assert_same(outcome(lambda *x: scaled_dot_attention(*x, mask), (q, k, v)), outcome(lambda *x: plain_dot(*x, mask), (q, k, v)))
    if 0 not in lead: assert_same([scaled_dot_attention(q, k, v, mask)[0]], [F.scaled_dot_product_attention(q, k, v, mask)])


@scores
@some
@given(lead=st.lists(st.integers(0, 2), max_size=2), T=size, L=size, A=size, D=size, masked=st.booleans(), seed=seeds)
def test_additive_is_its_equation(score, lead, T, L, A, D, masked, seed):
    torch.manual_seed(seed)
    given_ = normal(*lead, T, A), normal(*lead, L, A), normal(A), normal(*lead, L, D)
    mask = some_mask(*lead, T, L) if masked else None
    assert_same(outcome(lambda *x: additive_attention(*x, score, mask), given_), outcome(lambda *x: plain_additive(*x, score, mask), given_))


@few
@given(T=st.integers(1, 3), L=st.integers(1, 3), d=st.integers(1, 3), seed=seeds)
def test_attention_gradcheck(T, L, d, seed):
    "By means and weights together"
    torch.manual_seed(seed)
    q, k, v, w, mask = normal(2, T, d), normal(2, L, d), normal(2, L, 2), normal(d), some_mask(2, T, L)
    assert gradcheck(lambda *x: scaled_dot_attention(*x, mask), (q, k, v))
    for score in ('tanh', 'relu'): assert gradcheck(lambda q, k, w, v: additive_attention(q, k, w, v, score, mask), (q, k, w, v))


@pytest.mark.parametrize('attention', ['dot', 'tanh', 'relu'])
def test_shared_memory(attention):
    "Keys and values, or queries, that broadcast: the derivative is the sum over the copies"
    w = normal(4)
    def ours(q, k, v, mask): return scaled_dot_attention(q, k, v, mask) if attention == 'dot' else additive_attention(q, k, w, v, attention, mask)
    def theirs(q, k, v, mask): return plain_dot(q, k, v, mask) if attention == 'dot' else plain_additive(q, k, w, v, attention, mask)
    shapes = [((2, 3, 1, 4), (2, 1, 5, 4), (2, 1, 5, 6)), ((3, 4), (2, 5, 4), (5, 6)), ((2, 3, 4), (5, 4), (2, 5, 6))]
    for q, k, v in shapes:
        given_ = normal(*q), normal(*k), normal(*v)
        for mask in (None, some_mask(5), some_mask(2, 1, 1, 5)):
            if mask is not None and mask.ndim == 4 and len(q) < 4: mask = some_mask(2, 1, 5)   # more images than the scores have
            assert_same(outcome(lambda *x: ours(*x, mask), given_), outcome(lambda *x: theirs(*x, mask), given_))


@pytest.mark.parametrize('attention', ['dot', 'tanh', 'relu'])
def test_only_the_weights_or_only_the_mean(attention):
    q, k, v, w = normal(2, 3, 4), normal(2, 5, 4), normal(2, 5, 6), normal(4)
    ours = scaled_dot_attention(q, k, v) if attention == 'dot' else additive_attention(q, k, w, v, attention)
    theirs = plain_dot(q, k, v) if attention == 'dot' else plain_additive(q, k, w, v, attention)
    for mine, other in zip(ours, theirs):
        mine, other = (torch.autograd.grad(y.square().sum(), (q, k), retain_graph=True) for y in (mine, other))
        assert_same(mine, other)


@scores
def test_additive_pieces(score):
    q, k, v, de = normal(2, 3, 4), normal(2, 5, 4), normal(4), normal(2, 3, 5, grad=False)
    e, active = additive_scores(q, k, v, score)
    expected = torch.autograd.grad((e*de).sum(), (q, k, v))
    assert_same(additive_scores_backward(de, active.detach(), v.detach(), score), expected)


def test_large_features():
    "Scores of any size: one cell is seen, nothing overflows"
    torch.manual_seed(0)
    for large in (1e3, 1e6, 1e15):
        q, k, v = (large*torch.randn(2, 3, 4)).requires_grad_(), (large*torch.randn(2, 5, 4)).requires_grad_(), torch.randn(2, 5, 6)
        for attention in (scaled_dot_attention, lambda q, k, v: additive_attention(q, k, torch.randn(4), v),
                          lambda q, k, v: additive_attention(q, k, torch.randn(4), v, 'relu')):
            found = outcome(attention, (q, k, v))
            assert all(torch.isfinite(x).all() for x in found)
            torch.testing.assert_close(found[1].sum(-1), torch.ones(2, 3))


def test_additive_module():
    torch.manual_seed(0)
    module, query, keys, values = AdditiveAttention(4, 3, 6, 'relu').double(), normal(2, 3, 3), normal(2, 5, 4), normal(2, 5, 7)
    def plain(query, keys, values=None):
        e = module.energy((module.query(query)[:, :, None] + module.key(keys)[:, None]).relu())[..., 0]
        return e.softmax(-1) @ (keys if values is None else values), e.softmax(-1)
    for given_ in ((query, keys, values), (query, keys)):
        assert_same(outcome(module, given_, module.parameters()), outcome(plain, given_, module.parameters()))
    assert all(p.grad is not None for p in module.parameters() if module(query, keys)[0].square().sum().backward() is None)


def test_additive_refuses():
    for make in (lambda s: AdditiveAttention(4, 4, 4, s), lambda s: additive_scores(*normal(3, 1, 2, 4)[:2], normal(4), s)):
        with pytest.raises(ValueError, match="unknown score 'rellu': did you mean 'relu'"): make('rellu')
    with pytest.raises(ValueError, match='at least 1, got 4, 0 and 2'): AdditiveAttention(4, 0, 2)


# ---- heads ------------------------------------------------------------------------------------------------------

def both_heads(dim, heads):
    ours, theirs = MultiHeadAttention(dim, heads).double(), nn.MultiheadAttention(dim, heads, batch_first=True).double()
    with torch.no_grad():
        for p in ours.parameters(): p.add_(0.1*torch.randn_like(p))   # biases are zero at first
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@some
@given(rows=st.integers(1, 3), T=size, L=size, heads=st.integers(1, 3), width=st.integers(1, 3),
       mask=st.sampled_from(['none', 'queries', 'rows']), seed=seeds)
def test_heads_are_torchs(rows, T, L, heads, width, mask, seed):
    torch.manual_seed(seed)
    E = heads*width
    ours, theirs = both_heads(E, heads)
    given_ = normal(rows, T, E), normal(rows, L, E), normal(rows, L, E)
    seen = {'none': None, 'queries': some_mask(T, L), 'rows': some_mask(rows, T, L)}[mask]
    hidden = None if seen is None else ~seen if mask == 'queries' else ~seen.repeat_interleave(heads, 0)
    assert_same(outcome(lambda *x: ours(*x, seen), given_, ours.parameters()),
                outcome(lambda *x: theirs(*x, attn_mask=hidden, average_attn_weights=False), given_, theirs.parameters()))


def test_heads_gradcheck():
    torch.manual_seed(0)
    module, given_ = both_heads(4, 2)[0], (normal(2, 2, 4), normal(2, 3, 4), normal(2, 3, 4))
    mask = some_mask(2, 2, 3)
    assert gradcheck(lambda q, k, v, *_: module(q, k, v, mask), (*given_, *module.parameters()))
    assert gradcheck(lambda x: module(x, x, x), given_[0])


def test_heads_start_as_torchs():
    torch.manual_seed(5)
    ours = MultiHeadAttention(6, 3).state_dict()
    torch.manual_seed(5)
    theirs = nn.MultiheadAttention(6, 3).state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize('lead', [(), (0,), (2, 3)], ids=str)
def test_heads_with_any_leading_dimensions(lead):
    torch.manual_seed(0)
    module, x, y = both_heads(6, 2)[0], normal(*lead, 3, 6), normal(*lead, 5, 6)
    mask = some_mask(*lead, 3, 5)
    out, weights = module(x, y, y, mask)
    assert out.shape == (*lead, 3, 6) and weights.shape == (*lead, 2, 3, 5)
    one = module(x.reshape(-1, 3, 6), y.reshape(-1, 5, 6), y.reshape(-1, 5, 6), mask.reshape(-1, 3, 5))
    assert_same([out, weights], [one[0].reshape(out.shape), one[1].reshape(weights.shape)])
    grads = torch.autograd.grad(out.sum() + weights.sum(), [*module.parameters()])
    assert all(torch.isfinite(g).all() for g in grads)


def test_pads_do_not_matter():
    "A mask (N, 1, L) over padded keys gives what the keys without pads give"
    torch.manual_seed(0)
    module, q, k = both_heads(6, 3)[0], normal(2, 4, 6), normal(2, 5, 6)
    seen = torch.arange(5) < torch.tensor([[3], [5]])
    short = module(q[:1], k[:1, :3], k[:1, :3])
    both = module(q, k, k, seen[:, None])
    assert_same([both[0][:1], both[1][:1, ..., :3]], short)
    assert both[1][0, ..., 3:].eq(0).all()


def test_heads_drop_out_in_training_only():
    torch.manual_seed(0)
    module, x = MultiHeadAttention(8, 2, dropout=0.5), torch.randn(2, 6, 8)
    training = module(x, x, x)
    module.eval()
    still = module(x, x, x)
    assert not torch.allclose(training[0], still[0])
    assert_same([training[1]], [still[1]])
    assert_same(module(x, x, x), still)


def test_heads_refuse():
    for dim, heads in ((10, 4), (4, 8), (4, 0), (0, 2)):
        with pytest.raises(ValueError, match=f'{dim} numbers .* {heads} heads'): MultiHeadAttention(dim, heads)
    for p in (-0.1, 1.):
        with pytest.raises(ValueError, match='dropout must be in'): MultiHeadAttention(4, 2, p)
    with pytest.raises(ValueError, match='inputs of 3 numbers, the weights want 4'): MultiHeadAttention(4, 2)(*torch.zeros(3, 1, 2, 3))


@few
@given(lead=st.lists(st.integers(0, 3), max_size=2), T=size, heads=size, d=size)
def test_split_and_merge(lead, T, heads, d):
    x = torch.randn(*lead, T, heads*d)
    assert split_heads(x, heads).shape == (*lead, heads, T, d)
    assert torch.equal(merge_heads(split_heads(x, heads)), x)


# ---- precision --------------------------------------------------------------------------------------------------

@kinds
@pytest.mark.parametrize('inside', [False, True], ids=['backward outside', 'backward inside'])
def test_cell_under_autocast(kind, inside):
    torch.manual_seed(0)
    cell, x = kind(8, 8), torch.randn(4, 6, 8)
    def run():
        state = None
        for t in range(6): state = cell(x[:, t], state)
        return flat(state)
    exact = run()
    expected = torch.autograd.grad(sum(s.sum() for s in exact), [*cell.parameters()])
    with torch.autocast('cpu', torch.bfloat16):
        found = run()
        if inside: grads = torch.autograd.grad(sum(s.sum() for s in found), [*cell.parameters()])
    if not inside: grads = torch.autograd.grad(sum(s.sum() for s in found), [*cell.parameters()])
    for a, b in zip([*found, *grads], [*exact, *expected]):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05*max(1, b.abs().max().item()))


@pytest.mark.parametrize('inside', [False, True], ids=['backward outside', 'backward inside'])
@pytest.mark.parametrize('make', [lambda: MultiHeadAttention(8, 2), lambda: AdditiveAttention(8, 8, 8), lambda: AdditiveAttention(8, 8, 8, 'relu')],
                         ids=['heads', 'tanh', 'relu'])
def test_attention_under_autocast(make, inside):
    torch.manual_seed(0)
    module, q, k, mask = make(), torch.randn(3, 2, 8), torch.randn(3, 5, 8), some_mask(2, 5)
    def loss(out, weights): return (out.float().square().sum() + weights.square().sum())
    exact = module(q, k, k, mask)
    expected = torch.autograd.grad(loss(*exact), [*module.parameters()])
    with torch.autocast('cpu', torch.bfloat16):
        out, weights = module(q, k, k, mask)
        if inside: grads = torch.autograd.grad(loss(out, weights), [*module.parameters()])
    if not inside: grads = torch.autograd.grad(loss(out, weights), [*module.parameters()])
    assert out.dtype == torch.bfloat16 and weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    for a, b in zip([out.float(), weights, *grads], [*exact, *expected]):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.05*max(1, b.abs().max().item()))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_modules_in_one_precision(dtype):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 8, dtype=dtype)
    for kind in CELLS:
        cell = kind(8, 8).to(dtype)
        found = flat(cell(x[:, 1], cell(x[:, 0])))
        assert all(y.dtype == dtype for y in [*found, *torch.autograd.grad(sum(y.sum() for y in found), [*cell.parameters()])])
    for module in (MultiHeadAttention(8, 2).to(dtype), AdditiveAttention(8, 8, 8).to(dtype)):
        out, weights = module(x, x, x)
        assert out.dtype == dtype and weights.dtype == torch.promote_types(dtype, torch.float32)
        assert all(g.dtype == dtype for g in torch.autograd.grad(out.sum() + weights.square().sum(), [*module.parameters()]))


def test_double_precision_is_left_alone_by_autocast():
    cell, attention, x = LSTMCell(4, 4).double(), MultiHeadAttention(4, 2).double(), normal(2, 3, 4)
    plain = [*cell(x[:, 0]), *attention(x, x, x)]
    with torch.autocast('cpu', torch.bfloat16): assert_same([*cell(x[:, 0]), *attention(x, x, x)], plain)


# ---- autograd ---------------------------------------------------------------------------------------------------

def test_second_derivatives_are_refused():
    x = normal(2, 3, 4)
    cells = [lambda x, cell=kind(4, 4).double(): flat(cell(x[:, 0]))[0] for kind in CELLS]
    others = [lambda x: attend(x, x.transpose(1, 2))[0], lambda x: scaled_dot_attention(x, x, x)[0], lambda x: additive_attention(x, x, x[0, 0], x)[0]]
    for f in (*cells, *others):
        first, = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match='once_differentiable'): first.sum().backward()


def test_no_graph_without_gradients():
    cell, attention, x = GRUCell(4, 4), MultiHeadAttention(4, 2), torch.randn(2, 3, 4)
    with torch.no_grad(): assert not cell(x[:, 0]).requires_grad and not attention(x, x, x)[0].requires_grad
    with torch.inference_mode(): cell(x[:, 0]), attention(x, x, x)
    for module in (cell, attention): module.requires_grad_(False)
    assert not cell(x[:, 0]).requires_grad and not attention(x, x, x)[1].requires_grad


@kinds
def test_same_curve(kind):
    "Training from the same seed goes the same way"
    def curve(make):
        torch.manual_seed(0)
        model, out = make(6, 8), nn.Linear(8, 3)
        optimizer, losses = torch.optim.Adam([*model.parameters(), *out.parameters()], lr=0.02), []
        for _ in range(15):
            state, x = None, torch.randn(4, 5, 6)
            for t in range(5): state = model(x[:, t], state)
            loss = F.cross_entropy(out(flat(state)[0]), x[:, 0, :3].argmax(1))
            optimizer.zero_grad(); loss.backward(); optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses)
    torch.testing.assert_close(curve(kind), curve(CELLS[kind]), rtol=1e-4, atol=1e-5)
