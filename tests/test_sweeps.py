"Sweeps: which tasks a page means, conditions, bad pages, and submitting once more"
import json
import math
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from caption_nb.config import DECODERS, Config
from caption_nb.runs import new_run, run_name
from caption_nb.sweeps import (FIELDS, LONGEST, Axis, Combinations, Condition, Range, SweepError, draw, match, read_sweep, read_yaml,
                               sweeps, task_names)

BASE = 'base: {data: scenes, encoder: scene_cnn, decoder: lstm}\n'


def page(folder: Path, text: str, name: str = 'sweep.yaml') -> Path:
    (folder/name).write_text(text, encoding='utf-8')
    return folder/name


def fault(folder: Path, text: str) -> str:
    with pytest.raises(SweepError) as e: read_sweep(page(folder, text))
    assert all(line.startswith(str(folder/'sweep.yaml')) for line in str(e.value).splitlines()), e.value
    return str(e.value).replace(str(folder/'sweep.yaml'), 'F')


# ---- which tasks --------------------------------------------------------------------------------------------------

VALUES = dict(lr=st.sampled_from([1e-4, 1e-3, 0.01]), epochs=st.integers(1, 4), seed=st.integers(0, 3), gate=st.booleans(),
              attention=st.sampled_from(['dot', 'additive_tanh']), ema=st.sampled_from([0., 0.9]))
CONDITIONS = ['epochs > 3', "gate and attention == 'dot'", 'lr >= 0.01 or seed == 2', 'not gate', 'seed % 2 == 1', "attention in ('dot',)"]


@settings(max_examples=60, deadline=None)
@given(st.fixed_dictionaries({}, optional={n: st.lists(v, min_size=1, max_size=3) for n, v in VALUES.items()}),
       st.lists(st.sampled_from(CONDITIONS), max_size=2, unique=True))
def test_count_is_product_less_dropped_and_doubled(tmp_path_factory, grid, drop):
    folder = tmp_path_factory.mktemp('grid')
    defaults = Config().to_dict()
    cells = [dict(zip(grid, row)) for row in product(*grid.values())]
    left = [c for c in cells if not any(eval(d, {}, defaults | c) for d in drop)]
    different = list({json.dumps(c, sort_keys=True): c for c in left}.values())
    path = page(folder, yaml.safe_dump(dict(base=dict(data='scenes'), grid=grid, drop=drop), sort_keys=False))
    if not different:
        with pytest.raises(SweepError, match='no tasks are left:') as e: read_sweep(path)
        assert all(d in str(e.value) for d in drop)
        return
    sweep = read_sweep(path)
    assert [{n: getattr(c, n) for n in grid} for c in sweep.configs] == different, 'in the order of the grid, the last field fastest'
    assert (len(sweep), sweep.dropped) == (len(different), len(cells) - len(left))
    assert ('which is run once' in ''.join(sweep.notes)) == (len(different) < len(left))
    names = [c.name for c in sweep.configs]
    assert len({run_name(c).lower() for c in sweep.configs}) == len(names) and max(map(len, names)) <= LONGEST
    assert len({c.hash() for c in sweep.configs}) == len(names)
    varying = {n for n in grid if len({c[n] for c in different}) > 1}
    assert set(sweep.varying) == varying and list(sweep.table().columns) == ['name', *sweep.varying]


def test_all_parts_together(tmp_path):
    sweep = read_sweep(page(tmp_path, BASE + '''
list:
  - {name: small, hidden_dim: 64}
  - {name: large, hidden_dim: 256, lr: 5e-4}
grid: {label_smoothing: [0.0, 0.1]}
random: {count: 3, fields: {weight_decay: {low: 1e-6, high: 1e-2, log: true}}}
seeds: 2
'''))
    assert len(sweep) == 2*2*3*2 and sweep.steps == ('train', 'compare')
    assert sweep.varying == ['hidden_dim', 'lr', 'label_smoothing', 'weight_decay', 'seed']
    assert [c.seed for c in sweep.configs[:4]] == [0, 1, 0, 1] and {c.lr for c in sweep.configs} == {1.2e-3, 5e-4}
    assert sweep.configs[0].name.startswith('small-label_smoothing=0-weight_decay=')
    assert len({c.weight_decay for c in sweep.configs}) == 3
    assert sweep.table().shape == (24, 6)


def test_nothing_varies(tmp_path):
    sweep = read_sweep(page(tmp_path, BASE, 'just one.yaml'))
    assert (sweep.name, len(sweep), sweep.configs[0].name, sweep.steps) == ('just-one', 1, 'just-one', ('train',))


def test_preset_beside_the_sweep(tmp_path, monkeypatch):
    page(tmp_path, 'data: scenes\nencoder: scene_cnn\nepochs: 3\n', 'mine.yaml')
    sweep = read_sweep(page(tmp_path, 'preset: mine.yaml\nbase: {lr: 1e-4}\nseeds: 2'))
    assert {(c.epochs, c.lr) for c in sweep.configs} == {(3, 1e-4)} and [c.name for c in sweep.configs] == ['seed=0', 'seed=1']


@pytest.mark.parametrize('text, steps', [
    ('base: {data: flickr8k}\nseeds: 2', ('extract', 'train', 'compare')), (BASE + 'seeds: 2', ('train', 'compare')),
    (BASE + 'scst: {epochs: 2}', ('train', 'scst')), (BASE + 'steps: [compare, train, evaluate]', ('train', 'evaluate', 'compare'))])
def test_steps(tmp_path, text, steps): assert read_sweep(page(tmp_path, text)).steps == steps


def test_scst_follows_with_its_own_fields(tmp_path):
    sweep = read_sweep(page(tmp_path, BASE + 'grid: {label_smoothing: [0.0, 0.1]}\nscst: {lr: 1e-5, epochs: 2}'))
    after = sweep.scst_config(sweep.configs[1], tmp_path/'run')
    assert (after.stage, after.lr, after.epochs, after.label_smoothing, after.from_run) == ('scst', 1e-5, 2, 0., str(tmp_path/'run'))
    assert after.name == 'label_smoothing=0.1-scst'


@pytest.mark.parametrize('name', sweeps())
def test_shipped_sweeps_read(name):
    sweep = read_sweep(name)
    assert sweep.name == name and len(sweep) >= 12 and sweeps()[name]
    assert not any(n.startswith('drops nothing') for n in sweep.notes)
    for c in sweep.configs: assert c.name.replace('=', '-') in run_name(c)
    by_limit = dict(scenes_decoders=2, learning_rate=4, attention=8)
    assert sweep.limit == by_limit[name]


def test_there_are_three_shipped_sweeps(): assert set(sweeps()) == {'scenes_decoders', 'learning_rate', 'attention'}


def test_fingerprint_knows_tasks_not_order(tmp_path):
    def of(text): return read_sweep(page(tmp_path, BASE + text)).fingerprint
    assert of('grid: {seed: [0, 1]}') == of('grid: {seed: [1, 0]}') == of('seeds: 2\nlimit: 3') != of('seeds: 3')
    assert of('seeds: 2') != of('seeds: 2\nsplit: test')


# ---- names --------------------------------------------------------------------------------------------------------

def test_names_are_safe_short_and_unique():
    texts = ['a b', 'a;b', 'a$(b)', 'A b', 'ä' * 300, '../../x', '', '-x', 'x' * 30 + '1', 'x' * 30 + '2', 'a\nb']
    axes = [Axis('grid.word_vectors', [dict(word_vectors=t) for t in texts]), Axis('grid.seed', [dict(seed=s) for s in range(2)])]
    tasks = [*Combinations(Config(decoder='lstm').to_dict(), axes).tasks.values()]
    names = task_names(tasks, axes, 'sweep')
    assert len(tasks) == 22 and len({n.lower() for n in names}) == 22
    assert all(len(n) <= LONGEST + 9 and not set(n) - set('abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.=-') for n in names)


def test_values_that_read_alike_get_different_names():
    axes = [Axis('grid.lr', [dict(lr=v) for v in (0.1, 0.1000000001)]), Axis('grid.finetune_from', [dict(finetune_from=v) for v in (-1, 1)])]
    tasks = [*Combinations(Config(decoder='lstm').to_dict(), axes).tasks.values()]
    assert len({n.replace('=', '-').replace('--', '-') for n in task_names(tasks, axes, 'x')}) == 4


# ---- draws --------------------------------------------------------------------------------------------------------

def test_draws_are_these_and_no_others():
    "Fixed once and for all: another Python, another machine, the same numbers"
    fields = dict(lr=Range(1e-4, 1e-2, log=True), dropout=Range(0, 0.5), beam=Range(1, 5, whole=True), warmup_steps=Range(10, 1000, True, True),
                  gate=[True, False])
    assert draw(fields, 3, 7) == [
        dict(lr=0.0002615, dropout=0.285756, beam=1, warmup_steps=654, gate=False),
        dict(lr=0.00262283, dropout=0.415909, beam=3, warmup_steps=11, gate=True),
        dict(lr=0.000923775, dropout=0.113436, beam=3, warmup_steps=261, gate=False)]


@settings(max_examples=100, deadline=None)
@given(st.floats(1e-6, 1e3), st.floats(1.001, 1e4), st.booleans(), st.floats(0, 1, exclude_max=True))
def test_draws_stay_in_their_range(low, factor, log, u):
    assert low <= Range(low, low*factor, log).at(u) <= low*factor
    whole = Range(math.ceil(low), math.ceil(low*factor) + 1, log, whole=True)
    assert type(whole.at(u)) is int and whole.low <= whole.at(u) <= whole.high


def test_logarithmic_draws_favour_no_decade():
    values = [d['lr'] for d in draw(dict(lr=Range(1e-4, 1e-1, log=True)), 3000, 0)]
    for low in (1e-4, 1e-3, 1e-2): assert abs(sum(low <= v < 10*low for v in values) - 1000) < 120


def test_more_draws_and_more_fields_leave_the_first_as_they_are(tmp_path):
    def of(count, more=''):
        text = BASE + f'random: {{count: {count}, seed: 3, fields: {{lr: {{low: 1e-4, high: 1e-2, log: true}}{more}}}}}'
        return [c.lr for c in read_sweep(page(tmp_path, text)).configs]
    assert of(9)[:5] == of(5) == of(5, ', hidden_dim: {low: 32, high: 512}')


# ---- conditions ---------------------------------------------------------------------------------------------------

NUMBERS = ('lr', 'epochs', 'seed', 'ema')
number = st.recursive(st.sampled_from(NUMBERS) | st.integers(0, 5).map(str) | st.sampled_from(['0.5', '1e-3', 'True']),
                      lambda inner: st.tuples(inner, st.sampled_from(['+', '-', '*', '/', '//', '%']), inner).map(lambda t: f'({t[0]} {t[1]} {t[2]})')
                      | inner.map(lambda n: f'-{n}'), max_leaves=4)
comparison = (st.tuples(number.map(lambda n: f'({n} + 0)'), st.sampled_from(['==', '!=', '<', '<=', '>', '>=']), number).map(' '.join)
              | st.tuples(number, st.sampled_from(['<', '<=']), number, st.sampled_from(['>', '<']), number).map(' '.join)
              | st.tuples(st.just('decoder'), st.sampled_from(['==', '!=', 'in', 'not in']), st.sampled_from(sorted(DECODERS)).map(repr)).map(' '.join)
              | st.lists(st.sampled_from(sorted(DECODERS)), max_size=3).map(lambda d: f'decoder not in {tuple(d)}')
              | st.lists(st.integers(0, 3), max_size=3).map(lambda d: f'seed in {d}') | st.just('gate') | st.just('"lstm" in decoder'))
condition = st.recursive(comparison, lambda inner: st.tuples(inner, st.sampled_from(['and', 'or']), inner).map(lambda t: f'({" ".join(t)})')
                         | inner.map(lambda c: f'not ({c})'), max_leaves=5)


@settings(max_examples=300, deadline=None)
@given(condition, st.fixed_dictionaries(dict(lr=st.sampled_from([1e-3, 0.5, 2.]), epochs=st.integers(1, 4), seed=st.integers(0, 3), gate=st.booleans(),
                                             ema=st.sampled_from([0., 0.9]), decoder=st.sampled_from(sorted(DECODERS)))))
def test_conditions_are_what_python_says(text, values):
    try: wanted = bool(eval(text, {'__builtins__': {}}, values))
    except ZeroDivisionError:
        with pytest.raises(SweepError, match='has no value for'): Condition(text).holds(values)
    else: assert Condition(text).holds(values) is wanted


@pytest.mark.parametrize('text, message', [
    ('__import__("os").system("true")', 'character 1: Call is not allowed'), ('lr.real > 1', 'character 1: Attribute is not allowed'),
    ('seed == 1 and [lr][0]', 'character 15: Subscript'), ('[x for x in (1,)]', 'ListComp'), ('lambda: 1', 'Lambda'), ('(seed := 3)', 'NamedExpr'),
    ('9**9**9**9 > lr', 'Pow is not allowed'), ('lr if gate else seed', 'IfExp'), ('f"{lr}" == "1"', 'JoinedStr'), ('seed << 9', 'LShift'),
    ('lr is None', 'Is is not allowed'), ('lr == None', 'lr is never None'), ('lr < None', 'None: only texts, numbers'), ("b'a' in data", 'only texts, numbers'), ('1j > 0', 'only texts'),
    ('(*[1],) == 2', 'Starred'), ('lr > 1; seed', 'character 7: invalid syntax'), ('lr = 1', 'invalid syntax'), ('', 'invalid syntax'),
    ('lrr > 1', "unknown field 'lrr': did you mean 'lr'?"), ('gate == false', "did you mean 'False'"), ('~seed', 'Invert'),
    ("decoder == 'ltsm'", "never 'ltsm': did you mean 'lstm'"), ("'dto' == attention", "never 'dto': did you mean 'dot'"),
    ("decoder in ('lstm', 'grü')", "never 'grü'"), ("epochs == '3'", 'it is a int'), ('gate == 1', 'it is a bool'), ('(' * 400 + '1' + ')' * 400, ''),
    ('not ' * 240 + 'gate and x', "unknown field 'x'"), ('lr > ' + '1 + ' * 400 + '1', 'longer than 1,000')])
def test_bad_conditions_are_refused_with_their_place(text, message):
    with pytest.raises(SweepError) as e: Condition(text)
    assert message in str(e.value) and str(e.value).startswith('`')


@pytest.mark.parametrize('text', ['decoder < 3', 'decoder + 1 > 2', "'a' * 999999999 == data", '1/seed > 2', 'seed in lr', '-decoder'])
def test_conditions_without_a_value_name_the_combination(text):
    with pytest.raises(SweepError, match='has no value for'): Condition(text).holds(Config().to_dict())


# ---- bad pages ----------------------------------------------------------------------------------------------------

BAD = [
    ('gird: {lr: [1]}', "F, line 2: unknown key 'gird': did you mean 'grid'?"), ('grid:\n  lrr: [1]', "F, line 3: grid: unknown field 'lrr': did you mean 'lr'?"),
    ('grid: {lr: 0.1}', 'F, line 2: grid.lr: expected a list, such as [0.1]'), ('grid: {lr: []}', 'grid.lr: no values, so there are no tasks'),
    ('list: []', 'list: no entries, so there are no tasks'), ('list: [lstm]', 'expected entries such as `- {decoder: lstm}`'),
    ('grid: {lr: [fast]}', "F, line 2: grid: lr='fast': expected float, got str"), ('grid: {epochs: [1e3]}', 'epochs=1000.0: expected int, got float'),
    ('grid: {gate: [maybe]}', "gate='maybe': expected bool"), ('grid: {dropout: [0.1, 1.5]}', 'dropout=1.5: must be at most 0.95'),
    ('grid: {decoder: [lstm, ltsm]}', "decoder is never 'ltsm': did you mean 'lstm'?"), ('grid: {schedule: [cosin]}', "did you mean 'cosine'?"),
    ('grid: {word_vectors: [no]}', 'expected str, got bool; put it in quotes'), ('grid: {lr: [0.1, [0.2]]}', 'expected float, got list'),
    ('grid: {runs_dir: [a]}', 'does not change what is trained; set it in base'), ('grid: {name: [a]}', 'runs are named after what varies'),
    ('list:\n  - decoder: gru\n  - resume: x', 'F, line 4: list: resume: a sweep makes new runs'), ('grid:', 'grid: expected fields and values, got nothing'),
    ('grid: [lr]', 'grid: expected fields and values'), ('seeds: three', "F, line 2: seeds: expected a whole number, got 'three'"),
    ('seeds: 0', 'seeds: 0: a number of seeds from 1 to 10,000'), ('seeds: 10001', 'seeds: 10001: a number of seeds from 1 to 10,000'),
    ('seeds: yes', 'expected a whole number, got True'), ('seeds: 2\ngrid: {seed: [1]}', 'seed varies in grid.seed and in seeds: leave one out'),
    ('random: {count: 3}', 'random.fields: nothing to draw'), ('random: {count: 0, fields: {lr: [1]}}', 'random.count: a number of draws from 1'),
    ('random: {count: 1000000000000, fields: {lr: [1]}}', 'random.count: a number of draws from 1'),
    ('random: {cuont: 3, fields: {lr: [1]}}', "random: unknown key 'cuont': did you mean 'count'?"),
    ('random: {count: 2, fields: {lr: {low: 1, hihg: 2}}}', "unknown key 'hihg': did you mean 'high'?"),
    ('random: {count: 2, fields: {lr: {low: 1}}}', 'random.fields.lr: high missing'),
    ('random: {count: 2, fields: {lr: {low: 2, high: 1}}}', 'low=2 must be less than high=1'),
    ('random: {count: 2, fields: {lr: {low: 0, high: 1, log: true}}}', 'with log: true it must be more than 0'),
    ('random: {count: 2, fields: {dropout: {low: 0, high: 2}}}', 'dropout=2.0: must be at most 0.95'),
    ('random: {count: 2, fields: {epochs: {low: 1.5, high: 3}}}', 'epochs=1.5: expected int, got float'),
    ('random: {count: 2, fields: {gate: {low: 0, high: 1}}}', 'random.fields.gate: is a bool: give a list of values'),
    ('random: {count: 2, fields: {lrr: [1]}}', "random.fields: unknown field 'lrr'"),
    ('drop: gate', 'drop: expected a list'), ('drop: [true]', 'expected a condition such as'), ('drop: [gaet]', "unknown field 'gaet': did you mean 'gate'"),
    ('drop: [decoder + 1 > 2]', 'has no value for decoder='), ('steps: [trian]', "no step 'trian': did you mean 'train'?"), ('steps: []', 'nothing to do'),
    ('steps: [train]\nscst: {epochs: 1}', 'has options, but is not among the steps'), ('scst: {from_run: x}', 'from_run: is set by the step itself'),
    ('scst: {hidden_dim: 3}', 'the model is that of the run it follows'), ('scst: {lrr: 3}', "scst: unknown field 'lrr'"),
    ('scst: {scst_samples: 1}', 'the baseline leave_one_out needs at least 2'), ('limit: -1', 'limit: -1'), ('split: tset', "did you mean 'test'"),
    ('name: a/b', 'name: \'a/b\' becomes part of a folder'), ('name: ../x', 'becomes part of'), ('preset: s1_convnext_lstn', "did you mean 's1_convnext_lstm'"),
    ('preset: no.yaml', 'there is no such file'), ('grid: {lr: [1], lr: [2]}', "F, line 2: the key 'lr' stands here twice"),
    ('grid: [', 'F, line 2: '), ('? [a]\n: b', 'unhashable'), ('grid: {lr: !!python/object/apply:os.getcwd []}', 'could not determine a constructor'),
    ('grid: {gate: [true, false]}', "gate=False: gate=False: the decoder lstm has no such option"), ('drop: [gate]', 'no tasks are left:\nF: 1 of 1'),
    ('drop_invalid: true\ngrid: {gate: [false]}', 'no tasks are left:\nF: cannot be, dropped: gate=False'), ('grid: {3: [1]}', "unknown field 3"),
    ('stesp: [train]\ngrid: {lrr: [1]}', "line 2: unknown key 'stesp'"), ('stesp: [train]\ngrid: {lrr: [1]}', "line 3: grid: unknown field 'lrr'")]


@pytest.mark.parametrize('text, message', BAD, ids=[f'{i}-{t[0][:24].splitlines()[0]}' for i, t in enumerate(BAD)])
def test_bad_pages_name_place_and_remedy(tmp_path, text, message): assert message in fault(tmp_path, BASE + text)


@pytest.mark.parametrize('content, message', [(b'', 'expected lines such as'), (b'- 1', 'expected lines such as'), (b'\xff\xfe\xff', 'is not UTF-8'),
                                              (b'a: \x07', 'is no YAML'), (b'[' * 5000, 'nested too deeply'), (b'1e-3', 'expected lines')])
def test_files_that_are_no_page(tmp_path, content, message):
    (tmp_path/'sweep.yaml').write_bytes(content)
    with pytest.raises(SweepError, match=message): read_sweep(tmp_path/'sweep.yaml')


def test_missing_files(tmp_path):
    with pytest.raises(SweepError, match='there is no such file'): read_sweep(tmp_path/'no.yaml')
    with pytest.raises(SweepError, match="did you mean 'attention'"): read_sweep('atention')


def test_too_many_tasks_are_counted_before_they_are_made(tmp_path):
    text = BASE + 'grid:\n  lr: [{}]\n  seed: [{}]\n'.format(', '.join(str(i/1000) for i in range(1, 138)), ', '.join(map(str, range(73))))
    assert fault(tmp_path, text) == 'F: 10,001 tasks (grid.lr 137 × grid.seed 73), at most 10,000: leave values out, or draw at random'
    assert '10,001 combinations' not in text
    left = fault(tmp_path, text + 'drop: ["epochs == 3"]')
    assert left == 'F: 10,001 tasks are left of 10,001 combinations, at most 10,000'
    many = ', '.join(str(i) for i in range(1000))
    grid = f'grid: {{seed: [{many}], warmup_steps: [{many}], patience: [{many}]}}\n'
    assert '1,000,000,000 tasks (grid.seed 1,000 × grid.warmup_steps 1,000 × grid.patience 1,000)' in fault(tmp_path, BASE + grid)
    assert '1,000,000,000 combinations, before any is dropped' in fault(tmp_path, BASE + grid + 'drop: ["seed > 0"]')


def test_conditions_make_a_large_grid_small(tmp_path):
    text = BASE + f'grid: {{seed: [{", ".join(map(str, range(300)))}], warmup_steps: [{", ".join(map(str, range(100)))}]}}\ndrop: ["seed != warmup_steps"]'
    sweep = read_sweep(page(tmp_path, text))
    assert (len(sweep), sweep.dropped) == (100, 29_900)


def test_invalid_combinations_are_dropped_on_request_and_listed(tmp_path):
    sweep = read_sweep(page(tmp_path, BASE + 'grid: {decoder: [lstm, gru, attention_lstm], gate: [true, false]}\ndrop_invalid: true'))
    assert (len(sweep), sweep.dropped) == (4, 2)
    assert [n for n in sweep.notes if 'cannot be, dropped: ' in n and 'the decoder gru has no such option' in n]


def test_twice_is_once_and_said(tmp_path):
    sweep = read_sweep(page(tmp_path, BASE + 'list: [{seed: 1}, {seed: 2}, {seed: 1}]'))
    assert [c.seed for c in sweep.configs] == [1, 2] and sweep.notes == ['1 of 3 combinations repeat another, which is run once']


def test_yaml_as_people_write_it(tmp_path):
    found = read_yaml(page(tmp_path, 'a: &x {lr: 1e-3, n: 1_000}\nb: {<<: *x, n: 2}\nc: [1E5, -1e-3, .5, 5., +3, 0, -0, 010, 0x1F, 1:30, 2024-01-01, "1e-3", ~, On]\n'))
    assert found['b'] == dict(lr=1e-3, n=2) and found['a']['n'] == 1000
    assert found['c'] == [1e5, -1e-3, .5, 5., 3, 0, 0, '010', '0x1F', '1:30', '2024-01-01', '1e-3', None, True]
    assert found.lines == dict(a=1, b=2, c=3)


# ---- once more ----------------------------------------------------------------------------------------------------

def submitted(sweep, folder: Path, status: dict[int, str]) -> dict:
    "A job.json as after submitting `sweep`; the status of its tasks by their number"
    tasks = []
    for i, config in enumerate(sweep.configs):
        run = new_run(config, folder)
        if i in status: (run/'status.json').write_text(json.dumps(dict(status=status[i], host='elsewhere', pid=1)))
        tasks.append(dict(run=str(run), scst=''))
    return dict(tasks=tasks)


def test_tasks_are_matched_by_what_they_train(tmp_path, monkeypatch):
    monkeypatch.setattr('caption_nb.runs.environment', dict)
    job = submitted(read_sweep(page(tmp_path, BASE + 'seeds: 6')), tmp_path/'runs', {0: 'done', 1: 'error', 2: 'running', 3: 'interrupted'})
    runs = [t['run'] for t in job['tasks']]
    again = read_sweep(page(tmp_path, BASE + 'name: other\ngrid: {seed: [7, 5, 3, 2, 1, 0]}'))     # 4 is gone, 7 is new, another order
    assert match(again.configs, job) == ['', runs[5], runs[3], runs[2], runs[1], runs[0]]


def test_folders_that_are_gone_or_broken_are_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr('caption_nb.runs.environment', dict)
    sweep = read_sweep(page(tmp_path, BASE + 'seeds: 3'))
    job = submitted(sweep, tmp_path/'runs', {})
    (Path(job['tasks'][0]['run'])/'config.json').unlink()
    (Path(job['tasks'][1]['run'])/'config.json').write_text('{')
    assert match(sweep.configs, job) == ['', '', job['tasks'][2]['run']]
    assert match(sweep.configs, {}) == ['']*3


def test_the_same_tasks_in_another_process(tmp_path):
    "No order of sets, no hash of texts decides anything"
    code = 'from caption_nb.sweeps import read_sweep; s = read_sweep("learning_rate"); print(s.fingerprint, [c.name for c in s.configs])'
    found = {subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env=dict(os.environ, PYTHONHASHSEED=seed)).stdout
             for seed in ('1', '2')}
    sweep = read_sweep('learning_rate')
    assert found == {f'{sweep.fingerprint} {[c.name for c in sweep.configs]}\n'}


def test_every_field_has_its_place(): assert set(FIELDS) == set(Config().to_dict())
