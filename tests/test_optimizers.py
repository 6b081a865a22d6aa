"""Optimisers, groups, clipping, averaging and scaling: what they do, and that a resumed one goes on with the same bits."""
import io
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from caption_nb.config import Config
from caption_nb.optimizers import Ema, clip_gradients, learned_names, load_optimizer, make_optimizer, make_scaler, parameter_groups

pytestmark = pytest.mark.usefixtures('one_thread')
RULES = ('sgd', 'rmsprop', 'adam', 'adamw', 'lion')
DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU'))]


class Model(nn.Module):
    "Encoder, concepts and decoder, small"
    def __init__(self, concepts=False, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)).eval()
        self.encoder.frozen = False
        self.concepts = nn.Linear(8, 3) if concepts else None
        self.decoder = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))

    def forward(self, x):
        with torch.set_grad_enabled(not self.encoder.frozen): grid = self.encoder(x)
        return self.decoder(grid).square().mean() + (self.concepts(grid).square().mean() if self.concepts else 0.)


def train(model, optimizer, steps, pause=0, scaler=None, device='cpu'):
    "`pause`: steps in which the encoder does not learn"
    for i in steps:
        model.encoder.frozen = i < pause
        loss = model(torch.randn(5, 6, generator=torch.Generator().manual_seed(i)).to(device))
        if scaler is None: loss.backward()
        else: scaler.scale(loss).backward(); scaler.unscale_(optimizer)
        clip_gradients(model.parameters(), norm=1.)
        if scaler is None: optimizer.step()
        else: scaler.step(optimizer); scaler.update()
        optimizer.zero_grad(set_to_none=True)
    return model


def through_a_file(**state):
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), map_location='cpu', weights_only=True)


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# ---- groups -----------------------------------------------------------------------------------------------------

def old_groups(model, encoder_lr, lr, weight_decay):
    "What training used before: optimisers saved with it go on"
    groups = []
    for rate, parts in ((encoder_lr, (model.encoder, model.concepts)), (lr, (model.decoder,))):
        learned = [p for part in parts if part for p in part.parameters() if p.requires_grad]
        groups += [dict(params=ps, lr=rate, highest=rate, weight_decay=decay) for ps, decay in
                   (([p for p in learned if p.ndim > 1], weight_decay), ([p for p in learned if p.ndim < 2], 0.)) if ps]
    return groups


@pytest.mark.parametrize('concepts', [False, True])
@pytest.mark.parametrize('frozen', ['nothing', 'encoder', 'first stage', 'words'])
def test_groups_are_those_of_runs_begun_before(concepts, frozen):
    model = Model(concepts)
    for part in dict(nothing=[], encoder=[model.encoder], words=[model.decoder[1]], **{'first stage': [model.encoder[0]]})[frozen]:
        part.requires_grad_(False)
    config = Config(lr=2e-3, encoder_lr=3e-4, weight_decay=.1, encoder_start=2)
    mine, old = parameter_groups(config, model), old_groups(model, 3e-4, 2e-3, .1)
    assert [[id(p) for p in g['params']] for g in mine] == [[id(p) for p in g['params']] for g in old]
    assert [(g['lr'], g['highest'], g['weight_decay']) for g in mine] == [(g['lr'], g['highest'], g['weight_decay']) for g in old]
    assert all((g['part'], g['start']) == (('encoder', 2) if g['highest'] == 3e-4 else ('decoder', 0)) for g in mine)
    assert sum(len(g['params']) for g in mine) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize('concepts', [False, True])
def test_a_state_saved_before_goes_on(concepts):
    "Groups without `start` and `part`, AdamW with torch's defaults"
    whole, model = Model(concepts), Model(concepts)
    train(whole, make_optimizer(Config(), whole), range(6))
    old = torch.optim.AdamW(old_groups(model, 1e-3, 1.2e-3, 0.), fused=True)
    train(model, old, range(3))
    state = through_a_file(model=model.state_dict(), optimizer=old.state_dict())
    resumed = Model(concepts, seed=9)
    resumed.load_state_dict(state['model'])
    optimizer = make_optimizer(Config(), resumed)
    load_optimizer(optimizer, state['optimizer'])
    assert all({'start', 'part', 'highest'} <= g.keys() for g in optimizer.param_groups)
    assert same(train(resumed, optimizer, range(3, 6)), whole)


def test_nothing_learns():
    model = Model().requires_grad_(False)
    with pytest.raises(ValueError, match='nothing in the model learns'): make_optimizer(Config(), model)


def test_a_misspelt_optimizer():
    config = SimpleNamespace(**(Config().to_dict() | dict(optimizer='adamv')))
    with pytest.raises(ValueError, match="unknown optimizer 'adamv': did you mean 'adam"): make_optimizer(config, Model())


# ---- each rule, against its formula ------------------------------------------------------------------------------

def formula(name, w, grads, lr, decay, momentum, b1, b2):
    "In double precision, as in the table of the notebook"
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t, g in enumerate(grads, 1):
        if name in ('sgd', 'rmsprop', 'adam'): g = g + decay*w
        if name in ('adamw', 'lion'): w = w*(1 - lr*decay)
        if name == 'sgd': m = momentum*m + g; w = w - lr*m
        elif name == 'rmsprop': v = b2*v + (1 - b2)*g**2; m = momentum*m + g/(v.sqrt() + 1e-8); w = w - lr*m
        elif name == 'lion': w = w - lr*(b1*m + (1 - b1)*g).sign(); m = b2*m + (1 - b2)*g
        else:
            m, v = b1*m + (1 - b1)*g, b2*v + (1 - b2)*g**2
            w = w - lr*(m/(1 - b1**t))/((v/(1 - b2**t)).sqrt() + 1e-8)
    return w


@pytest.mark.parametrize('name', RULES)
@given(lr=st.floats(1e-4, .1), decay=st.floats(0, 1), momentum=st.floats(0, .95), b1=st.floats(0, .95), b2=st.floats(.5, .999),
       seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_a_rule_is_its_formula(name, lr, decay, momentum, b1, b2, seed):
    g = torch.Generator().manual_seed(seed)
    start, grads = torch.randn(3, 4, generator=g), [torch.randn(3, 4, generator=g) for _ in range(6)]
    layer = nn.Linear(4, 3, bias=False)
    with torch.no_grad(): layer.weight.copy_(start)
    config = Config(optimizer=name, lr=lr, weight_decay=decay, momentum=momentum, beta1=b1, beta2=b2)
    optimizer = make_optimizer(config, SimpleNamespace(encoder=nn.Module(), concepts=None, decoder=layer))
    for grad in grads:
        layer.weight.grad = grad.clone()
        optimizer.step()
    truth = formula(name, start.double(), [x.double() for x in grads], lr, decay, momentum, b1, b2)
    assert (layer.weight.double() - truth).abs().max() <= 2e-5*(1 + truth.abs().max())


@pytest.mark.parametrize('name', ['adam', 'adamw'])
def test_the_fused_kernel_is_as_exact(name):
    def errors(fused):
        out = []
        for dtype in (torch.float32, torch.float64):
            g = torch.Generator().manual_seed(0)
            layer = nn.Linear(40, 30, bias=False, dtype=dtype)
            with torch.no_grad(): layer.weight.copy_(torch.randn(30, 40, generator=g))
            model = SimpleNamespace(encoder=nn.Module(), concepts=None, decoder=layer)
            optimizer = make_optimizer(Config(optimizer=name, lr=1e-3, weight_decay=.01), model)
            assert optimizer.defaults['fused']
            for group in optimizer.param_groups: group['fused'] = fused and dtype == torch.float32
            for _ in range(150):
                layer.weight.grad = (torch.randn(30, 40, generator=g)*10**torch.randn(30, 40, generator=g)).to(dtype)
                optimizer.step()
            out.append(layer.weight.detach().double())
        return (out[0] - out[1]).abs()
    fused, plain = errors(True), errors(False)
    assert fused.max() <= 1.01*plain.max() and fused.mean() <= 1.01*plain.mean()


def test_biases_and_norms_do_not_decay():
    for name in RULES:
        model = Model()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer = make_optimizer(Config(optimizer=name, weight_decay=.5, lr=.01, encoder_lr=.01), model)
        for p in model.parameters(): p.grad = torch.zeros_like(p)
        optimizer.step()
        for n, p in model.named_parameters():
            assert torch.equal(p, before[n]) == (p.ndim < 2), (name, n)


# ---- the same bits ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name', RULES)
@pytest.mark.parametrize('at', [1, 3, 5])
def test_a_resumed_optimizer_takes_the_same_steps(name, at, device):
    "The encoder is paused for 4 steps: before, it never had a gradient, only its concepts had"
    config = Config(optimizer=name, lr=.01, encoder_lr=.003, weight_decay=.1)
    def new(seed):
        model = Model(True, seed).to(device)
        return model, make_optimizer(config, model)
    whole, optimizer = new(0)
    train(whole, optimizer, range(8), 4, device=device)
    first, optimizer = new(0)
    train(first, optimizer, range(at), 4, device=device)
    state = through_a_file(model=first.state_dict(), optimizer=optimizer.state_dict())
    resumed, optimizer = new(5)
    resumed.load_state_dict(state['model'])
    load_optimizer(optimizer, state['optimizer'])
    assert same(train(resumed, optimizer, range(at, 8), 4, device=device), whole)
    assert not same(whole, Model(True).to(device))


@pytest.mark.parametrize('name', RULES)
def test_a_state_of_another_device_is_read(name):
    "A GPU's kernel wants its step count on the GPU, others want it on the CPU: the group of the file must not decide"
    config = Config(optimizer=name, lr=.01)
    model = Model()
    optimizer = make_optimizer(config, model)
    train(model, optimizer, range(3))
    state = through_a_file(optimizer=optimizer.state_dict())['optimizer']
    for group in state['param_groups']: group.update(fused=None, foreach=True)   # as if written elsewhere
    other = make_optimizer(config, model)
    load_optimizer(other, state)
    assert [g.get('fused') for g in other.param_groups] == [g.get('fused') for g in optimizer.param_groups]
    for p in model.parameters():
        assert all(torch.equal(a, b) for a, b in zip(optimizer.state[p].values(), other.state[p].values(), strict=True))
    if torch.cuda.is_available():
        gpu = Model().cuda()
        optimizer = make_optimizer(config, gpu)
        load_optimizer(optimizer, state)
        train(gpu, optimizer, range(3, 5), device='cuda')


def test_settings_are_the_configurations():
    model = Model()
    optimizer = make_optimizer(Config(lr=.1, weight_decay=.2, beta2=.9), model)
    train(model, optimizer, range(2))
    state = through_a_file(optimizer=optimizer.state_dict())['optimizer']
    now = make_optimizer(Config(lr=.01, weight_decay=.3, beta2=.99), model)
    before = {p: optimizer.state[p]['exp_avg'].clone() for p in model.parameters()}
    load_optimizer(now, state)
    g = now.param_groups[2]
    assert (g['lr'], g['highest'], g['weight_decay'], g['betas']) == (.01, .01, .3, (.9, .99))
    assert all(torch.equal(now.state[p]['exp_avg'], before[p]) for p in model.parameters())
    assert state['param_groups'][2]['lr'] == .1   # what was given stays as it was


def test_a_state_of_another_model_is_refused():
    state = make_optimizer(Config(), Model()).state_dict()
    for other in (Model(True), Model()):
        if other.concepts is None: other.encoder.requires_grad_(False)
        with pytest.raises(ValueError, match='groups of'): load_optimizer(make_optimizer(Config(), other), state)


# ---- clipping ---------------------------------------------------------------------------------------------------

def gradients(*values):
    out = [nn.Parameter(torch.zeros(len(v))) for v in values]
    for p, v in zip(out, values): p.grad = torch.tensor(v)
    return out


SOME = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=5)


@given(SOME, SOME, st.sampled_from([0., .5, 3., 1e6]), st.sampled_from([0., .1, 2., 1e6]))
@settings(max_examples=80, deadline=None)
def test_clipping_keeps_both_limits(a, b, norm, value):
    ps = gradients(a, b)
    before = torch.tensor([*a, *b], dtype=torch.float64)
    found = clip_gradients(iter(ps), norm, value)   # an iterator can be walked once
    after = torch.cat([p.grad for p in ps]).double()
    assert found.item() == pytest.approx(before.norm().item(), rel=1e-5, abs=1e-30)
    truth = before.clamp(-value, value) if value else before
    if norm: truth = truth*min(1., norm/(truth.norm().item() + 1e-6))
    assert torch.allclose(after, truth, rtol=1e-4, atol=1e-6)
    if value: assert after.abs().max() <= value*(1 + 1e-6)
    if norm: assert after.norm() <= norm*(1 + 1e-5)


def test_norm_clipping_is_torchs_to_the_bit():
    mine, theirs = ([nn.Parameter(torch.zeros(50, 7)) for _ in range(4)] for _ in range(2))
    for a, b in zip(mine, theirs): a.grad = torch.randn(50, 7); b.grad = a.grad.clone()
    for limit in (1., 0.):   # 0: torch is asked for an infinite norm, as training did
        assert torch.equal(clip_gradients(mine, limit), nn.utils.clip_grad_norm_(theirs, limit or math.inf))
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(mine, theirs))


def test_an_infinite_gradient():
    p, = gradients([math.inf, 1., -math.inf])
    assert clip_gradients([p], value=5.) == math.inf and p.grad.tolist() == [5., 1., -5.]
    p, = gradients([math.inf, 1.])
    assert clip_gradients([p]) == math.inf and p.grad.tolist() == [math.inf, 1.]   # nothing is asked for, nothing is touched
    p, = gradients([math.nan, 1.])
    assert math.isnan(clip_gradients([p], 5., 5.))


def test_no_gradients_at_all():
    for limits in ((), (1.,), (0., 1.), (1., 1.)):
        assert clip_gradients([nn.Parameter(torch.zeros(2))], *limits) == clip_gradients([], *limits) == 0


# ---- averaging --------------------------------------------------------------------------------------------------

class OldEma:
    "What training used before"
    def __init__(self, model, decay):
        self.model, self.decay = model, decay
        self.average = {n: t.detach().clone() for n, t in self.learned()}

    def learned(self):
        own = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        encoder = getattr(self.model, 'encoder', None)
        return own + ([] if getattr(encoder, 'frozen', False) else [(n, b) for n, b in self.model.named_buffers() if b.is_floating_point()])

    @torch.no_grad()
    def update(self, step):
        weight = 1 - min(self.decay, (1 + step)/(10 + step))
        for name, t in self.learned(): self.average[name].lerp_(t, weight)


@pytest.mark.parametrize('frozen', [False, True])
@pytest.mark.parametrize('decay', [0., .9, .9999])
def test_the_average_is_what_it_was(frozen, decay):
    model = Model()
    model.encoder.requires_grad_(not frozen).frozen = frozen
    optimizer, old, new = make_optimizer(Config(lr=.05, encoder_lr=.05), model), OldEma(model, decay), Ema(model, decay)
    for step in range(1, 20):
        train(model, optimizer, [step], pause=math.inf if frozen else 0)
        old.update(step); new.update(step)
    assert list(old.average) == list(new.average)   # the order too
    assert all(torch.equal(old.average[n], new.average[n]) for n in old.average)   # the same bits


def test_the_model_wears_the_average_only_inside():
    model = Model()
    ema = Ema(model, .5)
    train(model, make_optimizer(Config(lr=.05), model), range(3))
    ema.update(100)
    mine = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(KeyError), ema.applied():
        assert torch.equal(model.decoder[1].weight, ema.average['decoder.1.weight'])
        assert not torch.equal(model.decoder[1].weight, mine['decoder.1.weight'])
        raise KeyError
    assert all(torch.equal(t, mine[n]) for n, t in model.state_dict().items())
    assert torch.is_grad_enabled()


def test_an_encoder_that_starts_later_is_averaged_from_the_start():
    model = Model()
    model.encoder.frozen = True   # paused: its parameters have gradients later
    names = learned_names(model)
    assert 'encoder.0.weight' in names and not [n for n in names if 'running' in n]
    ema, optimizer = Ema(model, .9), make_optimizer(Config(lr=.05, encoder_lr=.05), model)
    first = model.encoder[0].weight.detach().clone()
    for step in range(1, 9):
        train(model, optimizer, [step], pause=5)
        ema.update(step)
        if step == 4: assert torch.allclose(ema.average['encoder.0.weight'], first)
    average = ema.average['encoder.0.weight']
    assert not torch.allclose(average, first) and not torch.allclose(average, model.encoder[0].weight)
    assert set(ema.average) == set(names)   # no name came or went when the encoder woke up


def test_names_can_be_given():
    model = Model()
    ema = Ema(model, .5, names=['decoder.1.weight', 'encoder.1.running_mean'])
    assert list(ema.average) == ['decoder.1.weight', 'encoder.1.running_mean']
    Ema(model, .5, names=[]).update(1)
    with pytest.raises(ValueError, match="no weight 'decoder.1.wight' to average: did you mean 'decoder.1.weight'"):
        Ema(model, .5, ['decoder.1.wight'])


def test_an_average_from_a_checkpoint_goes_on():
    model = Model()
    optimizer, whole = make_optimizer(Config(lr=.05), model), Ema(model, .9)
    for step in range(1, 4): train(model, optimizer, [step]); whole.update(step)
    resumed = Ema(model, .9)
    saved = through_a_file(average=whole.average)['average']
    resumed.average = dict(reversed(saved.items()))   # in any order
    for step in range(4, 8): train(model, optimizer, [step]); whole.update(step); resumed.update(step)
    assert all(torch.equal(whole.average[n], resumed.average[n]) for n in whole.average)


# ---- half precision ---------------------------------------------------------------------------------------------

def test_only_half_precision_is_scaled():
    for precision in ('fp32', 'bf16'):
        scaler = make_scaler(precision, 'cpu')
        loss = torch.tensor(2.)
        assert not scaler.is_enabled() and scaler.scale(loss) is loss and scaler.state_dict() == {}
        scaler.load_state_dict({})
    assert make_scaler('fp16', torch.device('cpu')).is_enabled()


@pytest.mark.parametrize('name', RULES)
def test_scaled_steps_are_the_plain_ones(name):
    "A power of two changes no bit of a gradient"
    config = Config(optimizer=name, lr=.01, encoder_lr=.01)
    plain, scaled = Model(), Model()
    train(plain, make_optimizer(config, plain), range(5))
    assert same(train(scaled, make_optimizer(config, scaled), range(5), scaler=make_scaler('fp16', 'cpu')), plain)


@pytest.mark.parametrize('name', RULES)
def test_an_overflowing_step_changes_nothing_and_is_resumed(name):
    config = Config(optimizer=name, lr=.01, encoder_lr=.01)
    def overflow(model, optimizer, scaler):
        scaler.scale(model(torch.full((5, 6), math.inf)).nan_to_num(0.) + model.decoder[1].weight.sum()*math.inf).backward()
        scaler.unscale_(optimizer)
        clip_gradients(model.parameters(), norm=1.)
        scaler.step(optimizer); scaler.update(); optimizer.zero_grad(set_to_none=True)
    model, scaler = Model(), make_scaler('fp16', 'cpu')
    optimizer = make_optimizer(config, model)
    train(model, optimizer, range(2), scaler=scaler)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    memory = {p: {k: v.clone() for k, v in optimizer.state[p].items()} for p in model.parameters()}
    overflow(model, optimizer, scaler)
    assert scaler.get_scale() == 2**15
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    for p in model.parameters(): assert all(torch.equal(v, memory[p][k]) for k, v in optimizer.state[p].items())
    state = through_a_file(model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
    resumed, other = Model(seed=3), make_scaler('fp16', 'cpu')
    resumed.load_state_dict(state['model'])
    again = make_optimizer(config, resumed)
    load_optimizer(again, state['optimizer']); other.load_state_dict(state['scaler'])
    assert same(train(model, optimizer, range(2, 5), scaler=scaler), train(resumed, again, range(2, 5), scaler=other))
    assert other.state_dict() == scaler.state_dict()
