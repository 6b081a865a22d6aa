"""Learning-rate schedules: against formulas, against torch's schedulers, and the accidents they are there to prevent."""
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from caption_nb.config import Config
from caption_nb.schedules import SCHEDULES, Schedule, cosine_decay, exponential_decay, noam, one_cycle, plot_schedule, step_decay

SIZES = dict(epochs=st.integers(1, 12), per_epoch=st.integers(1, 40))


def make(name='cosine', epochs=10, per_epoch=40, **fields):
    config = Config(schedule=name, epochs=epochs, **fields)
    return Schedule(config, epochs*per_epoch, per_epoch)


def torch_rates(scheduler, steps, every=1, **options) -> list[float]:
    "The rates of `scheduler` if it is stepped after every `every` steps"
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')   # no optimizer.step here
        rule, rates = scheduler(optimizer, **options), []
        for step in range(steps):
            rates.append(optimizer.param_groups[0]['lr'])
            if (step + 1) % every == 0 and step + 1 < steps: rule.step()
    return rates


def old_factor(step, steps, warmup, schedule):
    "What training used before there were more schedules: runs begun with it go on"
    warmup = min(warmup, steps//4)
    if step < warmup: return (step + 1)/(warmup + 1)
    return 1. if schedule != 'cosine' else 0.5*(1 + math.cos(math.pi*(step - warmup)/max(1, steps - warmup)))


@given(**SIZES, warmup=st.integers(0, 200))
@settings(max_examples=60, deadline=None)
def test_runs_begun_before_keep_their_rates(epochs, per_epoch, warmup):
    for name in ('cosine', 'constant', 'plateau'):
        f = make(name, epochs, per_epoch, warmup_steps=warmup)
        assert [f(t) for t in range(f.steps + 1)] == [old_factor(t, f.steps, warmup, name) for t in range(f.steps + 1)]   # same bits


# ---- torch's, at every step -------------------------------------------------------------------------------------

@given(**SIZES, warmup=st.integers(0, 100), floor=st.floats(0, 1), ends=st.integers(0, 8))
@settings(max_examples=40, deadline=None)
def test_cosine_is_torchs_from_the_warmup_on(epochs, per_epoch, warmup, floor, ends):
    f = make('cosine', epochs, per_epoch, warmup_steps=warmup, lr_floor=floor, cosine_epochs=ends)
    W, end = min(warmup, f.steps//4), ends*per_epoch or f.steps
    if end <= W: return
    truth = torch_rates(lr_scheduler.CosineAnnealingLR, end - W + 1, T_max=end - W, eta_min=floor)
    assert [f(t) for t in range(W, end + 1)] == pytest.approx(truth, abs=1e-9)
    assert all(f(t) == floor for t in range(end, f.steps))   # and stays there


@given(**SIZES, every=st.integers(1, 5), factor=st.floats(.05, 1))
@settings(max_examples=40, deadline=None)
def test_step_is_torchs(epochs, per_epoch, every, factor):
    f = make('step', epochs, per_epoch, warmup_steps=0, decay_factor=factor, decay_epochs=every)
    per_step = torch_rates(lr_scheduler.StepLR, f.steps, step_size=every*per_epoch, gamma=factor)
    in_epochs = torch_rates(lr_scheduler.StepLR, f.steps, every=per_epoch, step_size=every, gamma=factor)
    mine = [f(t) for t in range(f.steps)]
    assert mine == pytest.approx(per_step, rel=1e-9) and mine == pytest.approx(in_epochs, rel=1e-9)


@given(**SIZES, warmup=st.integers(0, 100), every=st.integers(1, 5), factor=st.floats(.05, 1))
@settings(max_examples=40, deadline=None)
def test_exponential_is_torchs_from_the_warmup_on(epochs, per_epoch, warmup, every, factor):
    f = make('exponential', epochs, per_epoch, warmup_steps=warmup, decay_factor=factor, decay_epochs=every)
    W, period = f.warmup(), every*per_epoch
    truth = torch_rates(lr_scheduler.ExponentialLR, f.steps - W, gamma=factor**(1/period))
    assert [f(t) for t in range(W, f.steps)] == pytest.approx(truth, rel=1e-9)


@given(**SIZES, peak=st.floats(.05, .95), warmup=st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_one_cycle_is_torchs(epochs, per_epoch, peak, warmup):
    f = make('onecycle', epochs, per_epoch, peak=peak, warmup_steps=warmup)
    if peak*f.steps <= 1 + 1e-6: return   # torch divides by zero there
    truth = torch_rates(lr_scheduler.OneCycleLR, f.steps, max_lr=1., total_steps=f.steps, pct_start=peak, cycle_momentum=False)
    assert [f(t) for t in range(f.steps)] == pytest.approx(truth, abs=1e-9)


@given(**SIZES, warmup=st.integers(0, 100), width=st.sampled_from([64, 512]))
@settings(max_examples=40, deadline=None)
def test_noam_is_the_papers(epochs, per_epoch, warmup, width):
    f = make('noam', epochs, per_epoch, warmup_steps=warmup)
    W = max(1, min(warmup, f.steps//4))
    def paper(step): return width**-.5*min((step + 1)**-.5, (step + 1)*W**-1.5)
    truth = torch_rates(lr_scheduler.LambdaLR, f.steps, lr_lambda=paper)
    scale = (width*W)**.5
    assert [f(t) for t in range(f.steps)] == pytest.approx([scale*r for r in truth], rel=1e-9)
    assert f(W - 1) == 1 == max(f(t) for t in range(f.steps))


# ---- what holds for all -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', SCHEDULES)
@given(**SIZES, warmup=st.integers(0, 100), floor=st.floats(0, 1), start=st.integers(0, 11))
@settings(max_examples=30, deadline=None)
def test_every_curve_stays_in_bounds(name, epochs, per_epoch, warmup, floor, start):
    f = make(name, epochs, per_epoch, warmup_steps=warmup, lr_floor=floor)
    begin = min(start, epochs - 1)*per_epoch
    rates, late = [f(t) for t in range(f.steps)], [f(t, begin) for t in range(f.steps)]
    assert all(0 < r <= 1 for r in rates)
    top = rates.index(max(rates))
    if name == 'step': top = f.warmup()   # epochs that end in a long warm-up count too
    else: assert all(a <= b for a, b in zip(rates[:top], rates[1:top + 1])) and (rates[top] == 1 or name == 'onecycle')
    fall = rates[top:]
    assert all(a >= b for a, b in zip(fall, fall[1:])) and (min(fall) >= floor*(1 - 1e-12) or name in ('constant', 'plateau'))
    assert late[:begin] == [0.]*begin and all(0 < r <= 1 for r in late[begin:])
    if not begin: assert late == rates
    else:   # its own rise, then the curve all share
        own = min(warmup, (f.steps - begin)//4)
        assert late[begin:begin + own] == [f.curve(begin + i)*((i + 1)/(own + 1)) for i in range(own)]
        assert late[begin + own:] == [f.curve(t) for t in range(begin + own, f.steps)]


@pytest.mark.parametrize('name', SCHEDULES)
def test_a_later_start_does_not_restart_the_curve(name):
    f = make(name, warmup_steps=20)
    assert [f(t, 200) for t in range(220, 400)] == [f(t) for t in range(220, 400)]


@pytest.mark.parametrize('name', SCHEDULES)
def test_resuming_anywhere_keeps_the_curve(name):
    whole = [make(name)(t) for t in range(400)]
    for at in (1, 79, 200, 399):
        assert [make(name)(t) for t in range(at, 400)] == whole[at:]   # the same bits, in any order
    assert make(name)(200) == whole[200]


@pytest.mark.parametrize('name', ['constant', 'plateau', 'step', 'exponential', 'noam'])
def test_more_epochs_continue_the_curve(name):
    assert [make(name, epochs=20)(t) for t in range(400)] == [make(name)(t) for t in range(400)]


def test_a_config_is_not_needed():
    names = ('warmup_steps', 'lr_floor', 'cosine_epochs', 'decay_factor', 'decay_epochs', 'peak')
    like = SimpleNamespace(schedule='cosine', **{n: getattr(Config(), n) for n in names})
    assert Schedule(like, 100, 10)(50) == make(epochs=10, per_epoch=10)(50)


def test_a_misspelt_schedule_is_refused():
    with pytest.raises(ValueError, match="unknown schedule 'one_cycle': did you mean 'onecycle'"):
        Schedule(SimpleNamespace(schedule='one_cycle'), 100, 10)


def test_tiny_runs_divide_by_nothing():
    for n in range(1, 9):
        for name in SCHEDULES:
            for warmup in (0, 1, 80): assert all(0 < make(name, 1, n, warmup_steps=warmup, peak=.01)(t) <= 1 for t in range(n))
    assert cosine_decay(5, 5, 5) == 1 and cosine_decay(6, 5, 5) == 0 and noam(0, 0) == 1 and 0 < one_cycle(0, 1, .99) <= 1


def test_floors():
    assert step_decay(10**6, 10, .5, .25) == exponential_decay(10**6, 0, 10, .5, .25) == noam(10**6, 10, .25) == .25
    assert one_cycle(99, 100, .3, .25) == .25 and one_cycle(0, 100, .3, .25) == 1/25   # the rise may begin below
    assert noam(0, 100, .25) == .01


# ---- accidents of others ----------------------------------------------------------------------------------------

def test_one_cycle_goes_through_its_cycle():
    "Stepped once an epoch over steps_per_epoch*epochs steps, as it has been seen, the rate hardly leaves 1/25"
    epochs, per_epoch = 10, 50
    wrong = torch_rates(lr_scheduler.OneCycleLR, 500, every=per_epoch, max_lr=1., total_steps=500, pct_start=.3, cycle_momentum=False)
    f = make('onecycle', epochs, per_epoch)
    assert max(wrong) < .06
    assert f(149) == pytest.approx(1) and f(499) == pytest.approx(1/25e4) and f(0) == pytest.approx(1/25)


def test_the_cosine_follows_the_epochs():
    "With T_max left at 20 and 30 epochs the rate has been seen to rise again in the last ten"
    wrong = torch_rates(lr_scheduler.CosineAnnealingLR, 300, every=10, T_max=20)
    assert wrong[-1] > 10*min(wrong) and wrong[-1] > .4
    f = make('cosine', 30, 10, warmup_steps=0)
    assert f(299) == min(f(t) for t in range(300)) < 1e-4 and f(150) == pytest.approx(.5)
    short = make('cosine', 30, 10, warmup_steps=0, cosine_epochs=20)
    assert all(short(t) == 0 for t in range(200, 300)) and short(199) > 0


# ---- the picture ------------------------------------------------------------------------------------------------

def test_figure_of_one_part():
    fig = plot_schedule(Config(lr=2e-3, epochs=4), 400, 100)
    ax, = fig.axes
    x, y = ax.lines[0].get_data()
    f = Schedule(Config(epochs=4), 400, 100)
    assert list(y) == [2e-3*f(t) for t in range(400)] and x[-1] == 3.99
    assert 'epoch' in ax.get_xlabel() and 'learning rate' in ax.get_ylabel() and 'decoder' in ax.get_title() and '0.002' in ax.get_title()


@pytest.mark.parametrize('name', SCHEDULES)
def test_figure_of_two_parts(name):
    config = Config(schedule=name, epochs=8, finetune_from=0, encoder_start=2, encoder_lr=1e-5)
    fig = plot_schedule(config, 8*10_000, 10_000)
    fig.canvas.draw()
    decoder, encoder = fig.axes
    x, y = encoder.lines[0].get_data()
    assert len(x) <= 4001 and max(y) <= 1e-5 and all(r == 0 for e, r in zip(x, y) if e < 2) and all(r > 0 for e, r in zip(x, y) if e >= 2)
    assert 'encoder' in encoder.get_title() and decoder.get_ylim()[1] > 1e-3 > encoder.get_ylim()[1]


def test_figure_of_a_jointly_trained_encoder():
    assert len(plot_schedule(Config(encoder='scene_cnn'), 110, 10).axes) == 2
