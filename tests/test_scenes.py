"The embedded data set: the same for everybody, true boxes and captions, and the measure of grounding"
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from caption_nb.data import DataError, check, load_data
from caption_nb.scenes import COLOURS, FORMS, _inside, grounding, make_scenes, plot_scene
from caption_nb.text import tokenize

# of pixels and captions of the first eight scenes of seed 0: change it only together with `_version`
KNOWN = '9c6bd0fd9aeaf668af05878d4ed7a5255eaee6323ee1e24349dce990eb46ebbc'


@pytest.fixture(scope='module')
def scenes(tmp_path_factory): return make_scenes(tmp_path_factory.mktemp('scenes')/'s', num_images=300, quiet=True)


def digest(data, n=8):
    h = hashlib.sha256()
    for i in data.images[:n]:
        h.update(data.open(i).tobytes())
        h.update(json.dumps([data.captions[i], data.boxes[i]]).encode())
    return h.hexdigest()


# --- the same for everybody

def test_known_digest(scenes): assert digest(scenes) == KNOWN


def test_same_in_another_process(scenes, tmp_path):
    code = ('import sys; sys.path.insert(0, sys.argv[2]); from test_scenes import digest; from caption_nb.scenes import make_scenes;'
            'd = make_scenes(sys.argv[1], num_images=12, quiet=True); print(digest(d))')
    out = subprocess.run([sys.executable, '-c', code, tmp_path/'s', os.path.dirname(__file__)], capture_output=True, text=True,
                         env={**os.environ, 'PYTHONHASHSEED': '7'}, check=True)
    assert out.stdout.strip() == KNOWN   # also: image i does not depend on how many there are


def test_seeds_and_sizes_differ(scenes, tmp_path):
    other = make_scenes(tmp_path/'a', num_images=10, seed=1, quiet=True)
    assert digest(other) != digest(scenes) and other.captions != {i: scenes.captions[i] for i in other.captions}
    big = make_scenes(tmp_path/'b', num_images=10, size=128, quiet=True)
    assert big.open(big.images[0]).size == (128, 128)


def test_two_thousand_in_seconds(tmp_path):
    start = time.monotonic()
    data = make_scenes(tmp_path/'s', quiet=True)
    assert time.monotonic() - start < 30   # 2 s on an idle core
    assert {s: len(i) for s, i in data.splits.items()} == {'train': 1600, 'dev': 200, 'test': 200}
    assert load_data(tmp_path/'s').fingerprint == data.fingerprint and load_data(tmp_path/'s').layout == 'scenes'


# --- truth

def test_boxes_hold_all_of_their_shape(scenes):
    for i in scenes.images[:150]:
        pixels = np.asarray(scenes.open(i)).astype(int)
        covered = np.zeros(pixels.shape[:2], bool)
        for s in scenes.boxes[i]:
            x0, y0, x1, y1 = s['box']
            assert 0 <= x0 < x1 <= 112 and 0 <= y0 < y1 <= 112 and 18 <= min(x1 - x0, y1 - y0) <= max(x1 - x0, y1 - y0) <= 62
            near = (abs(pixels - np.array(COLOURS[s['colour']])) <= 14).all(-1)
            inside = np.zeros_like(near); inside[y0:y1, x0:x1] = True
            assert (near & inside).sum() >= 0.15*(x1 - x0)*(y1 - y0), (i, s)
            assert not (near & ~inside).any(), (i, s)   # colours differ within a scene, so none of it lies elsewhere
            edge = pixels[y0:y1, x0:x1].min(-1) < 195   # and the box is tight: paint, darker than any ground, is near each side
            assert edge[:2].any() and edge[-2:].any() and edge[:, :2].any() and edge[:, -2:].any(), (i, s)
            covered |= inside
        assert (pixels[~covered].min(-1) > 190).all()   # the rest is light ground


def test_shapes_keep_apart_and_a_grid_of_seven_finds_each(scenes):
    for i, shapes in scenes.boxes.items():
        for k, s in enumerate(shapes):
            assert _inside(s['box'], 112, 112, 7, 7).any()
            for t in shapes[:k]:
                a, b = s['box'], t['box']
                assert max(b[0] - a[2], a[0] - b[2], b[1] - a[3], a[1] - b[3]) >= 4


def test_captions_are_true(scenes):
    "Forms, colours, counts, and the direction of each relation between two named shapes"
    singular = {('crosses' if f == 'cross' else f + 's'): f for f in FORMS}
    for i, captions in scenes.captions.items():
        shapes = scenes.boxes[i]
        assert len(captions) == len(set(captions)) == 5
        for caption in captions:
            words = tokenize(caption)
            said = Counter(w for w in words if w in COLOURS)
            assert said == Counter(s['colour'] for s in shapes), caption
            forms = Counter(w for w in words if w in FORMS) + Counter({singular[w]: 2 for w in words if w in singular})
            assert forms == Counter(s['form'] for s in shapes), caption
            assert not any(a in ('a', 'an') and (b[0] in 'aeiou') != (a == 'an') for a, b in zip(words, words[1:])), caption
            assert caption[0].isupper() and caption.endswith('.')
            for size, names in (('small', {'small', 'little'}), ('large', {'large', 'big'})):
                if names & set(words): assert any(s['size'] == size for s in shapes), caption
            if len(shapes) == 2: check_relation(words, {s['colour']: s for s in shapes}, caption)


def check_relation(words, by_colour, caption):
    first, second = (by_colour[w] for w in words if w in by_colour)
    if 'with' in words: first, second = second, first      # 'a with b below it': b is below a
    (ax, ay), (bx, by) = (((s['box'][0] + s['box'][2])/2, (s['box'][1] + s['box'][3])/2) for s in (first, second))
    said = {'above': ay < by, 'over': ay < by, 'below': ay > by, 'under': ay > by, 'left': ax < bx, 'right': ax > bx}
    for word, true in said.items(): assert true or word not in words, caption


def test_vocabulary_and_variety(scenes):
    counts = Counter(w for cs in scenes.captions.values() for c in cs for w in tokenize(c))
    assert 40 <= len(counts) <= 70
    assert set(FORMS) | set(COLOURS) <= set(counts)
    assert Counter(len(b) for b in scenes.boxes.values()).keys() == {1, 2, 3}
    assert len({c for cs in scenes.captions.values() for c in cs}) > 0.9*5*len(scenes.images)


def test_reference_agreement(scenes):
    "One caption against the other four: high enough to be learnt, low enough to be varied"
    metrics = pytest.importorskip('caption_nb.metrics')
    hypotheses = {i: cs[0] for i, cs in scenes.captions.items()}
    cider = metrics.score(hypotheses, {i: cs[1:] for i, cs in scenes.captions.items()}).corpus['CIDEr']
    assert 2 < cider < 5


def test_check_is_content(scenes):
    report = check(scenes, quiet=True)
    assert report.ok and not report.remarks, str(report)


# --- the folder

def test_reuse_repair_and_resume(tmp_path, capfd):
    folder = tmp_path/'s'
    data = make_scenes(folder, num_images=30, quiet=True)
    times = {p: p.stat().st_mtime_ns for p in folder.rglob('*') if p.is_file()}
    make_scenes(folder, num_images=30)
    assert times == {p: p.stat().st_mtime_ns for p in times} and capfd.readouterr().err == ''
    bad = [data.path(i) for i in data.images[:4]]
    want = [p.read_bytes() for p in bad]
    bad[0].unlink()
    bad[1].write_bytes(want[1][:-9])
    flipped = bytearray(want[2]); flipped[len(flipped)//2] ^= 1; bad[2].write_bytes(flipped)
    Image.new('RGB', (9, 9)).save(bad[3])
    assert not check(load_data(folder, strict=False), quiet=True).ok
    with pytest.raises(FileNotFoundError, match='call make_scenes on this folder again'): load_data(folder)
    again = make_scenes(folder, num_images=30, quiet=True)
    assert [p.read_bytes() for p in bad] == want and again.fingerprint == data.fingerprint
    assert all(p.stat().st_mtime_ns == t for p, t in times.items() if p not in bad)


def test_killed_while_drawing(tmp_path):
    code = ('import sys; from caption_nb.scenes import make_scenes; print("go", flush=True);'
            'make_scenes(sys.argv[1], num_images=1000, quiet=True)')
    child = subprocess.Popen([sys.executable, '-c', code, tmp_path/'s'], stdout=subprocess.PIPE)
    child.stdout.readline()
    end = time.monotonic() + 30
    while not list((tmp_path/'s').glob('images/*.png')) and time.monotonic() < end: time.sleep(0.01)
    child.send_signal(signal.SIGKILL); child.wait(); child.stdout.close()
    assert 0 < len(list((tmp_path/'s').glob('images/*.png'))) < 1000
    data = make_scenes(tmp_path/'s', num_images=1000, quiet=True)
    assert check(data, quiet=True).ok and digest(data) == KNOWN


def test_other_folders_are_refused(tmp_path):
    make_scenes(tmp_path/'s', num_images=10, quiet=True)
    with pytest.raises(FileExistsError, match='holds other scenes .num_images=10 there, 20 wanted.; choose another folder'):
        make_scenes(tmp_path/'s', num_images=20)
    (tmp_path/'mine').mkdir(); (tmp_path/'mine'/'thesis.tex').write_text('x')
    with pytest.raises(FileExistsError, match='holds something else .thesis.tex.; choose an empty'): make_scenes(tmp_path/'mine')
    assert [p.name for p in (tmp_path/'mine').iterdir()] == ['thesis.tex']
    (tmp_path/'mine'/'scenes.json').write_text('{"images": []}')
    with pytest.raises(DataError, match='not made by make_scenes'): make_scenes(tmp_path/'mine')
    (tmp_path/'empty').mkdir()
    assert len(make_scenes(tmp_path/'empty', num_images=3, quiet=True).images) == 3
    with pytest.raises(ValueError, match='num_images=2: at least 3'): make_scenes(tmp_path/'x', num_images=2)
    with pytest.raises(ValueError, match='size=32: 64 to 512'): make_scenes(tmp_path/'x', size=32)


# --- grounding

def all_words(data): return {i: tokenize(cs[0]) for i, cs in data.captions.items()}


def test_grounding_of_oracle_uniform_and_random(scenes):
    words = all_words(scenes)
    def oracle(i, w): return _inside(next((s for s in scenes.boxes[i] if w in s['words']), scenes.boxes[i][0])['box'], 112, 112, 7, 7)
    best = grounding(scenes, words, {i: np.stack([oracle(i, w) for w in ws]).astype(float) for i, ws in words.items()})
    assert best.pointing == 1 and best.ratio > 8 and best.n > 800 and best.absent == 0 and best.ambiguous > 0
    flat = grounding(scenes, words, {i: np.full((len(ws), 7, 7), 1/49) for i, ws in words.items()})
    assert flat.pointing == pytest.approx(flat.chance) and flat.chance == best.chance and 0.05 < flat.chance < 0.15
    rng = np.random.default_rng(0)
    noise = grounding(scenes, words, {i: rng.random((len(ws) + 1, 7, 7)) for i, ws in words.items()})
    assert abs(noise.pointing - noise.chance) < 4*(noise.chance/noise.n)**.5
    assert set(best.per_word) == set(FORMS) | set(COLOURS) and sum(n for _, _, n in best.per_word.values()) == best.n
    opposite = grounding(scenes, words, {i: 1. - np.stack([oracle(i, w) for w in ws]) for i, ws in words.items()})
    assert opposite.pointing == 0


def test_grounding_counts_what_it_skips(scenes):
    import torch
    i = next(i for i, b in scenes.boxes.items() if len(b) == 2 and b[0]['form'] == b[1]['form'])
    a, b = scenes.boxes[i]
    absent = next(c for c in COLOURS if c not in (a['colour'], b['colour']))
    g = grounding(scenes, {i: ['a', a['colour'], a['form'], absent]}, {i: torch.rand(4, 14, 14)})
    assert (g.n, g.ambiguous, g.absent) == (1, 1, 1)
    silent = grounding(scenes, {i: ['a']}, {i: torch.rand(1, 7, 7)})
    assert (silent.n, silent.pointing, silent.ratio) == (0, 0, 0) and 'over 0 words' in str(silent)


def test_grounding_refuses_what_does_not_fit(scenes):
    i = scenes.images[0]
    with pytest.raises(ValueError, match='at least 2 words, got shape .1, 7, 7.'):
        grounding(scenes, {i: ['a', 'red']}, {i: np.ones((1, 7, 7))})
    with pytest.raises(ValueError, match='should be .words, rows, columns.'): grounding(scenes, {i: ['a']}, {i: np.ones((1, 49))})
    with pytest.raises(ValueError, match='not finite'): grounding(scenes, {i: ['a']}, {i: np.full((1, 7, 7), np.nan)})
    with pytest.raises(ValueError, match='tokenise it first'): grounding(scenes, {i: 'a red circle'}, {i: np.ones((3, 7, 7))})
    with pytest.raises(ValueError, match="no attention for '00000.png'"): grounding(scenes, {i: ['a']}, {})
    with pytest.raises(ValueError, match='no scene for'): grounding(scenes, {'x.png': ['a']}, {})
    with pytest.raises(ValueError, match='has no boxes'): grounding(type(scenes)('x', '.', {}, {}), {}, {})


def test_plot_scene(scenes, tmp_path):
    plot_scene(scenes, scenes.images[7]).savefig(tmp_path/'s.png')
    with pytest.raises(ValueError, match="did you mean '00007.png'"): plot_scene(scenes, '00007.jpg')


def test_runs_that_start_together_share_a_folder(tmp_path, monkeypatch):
    "Whoever finds pictures finds what they are, too"
    import caption_nb.scenes as module
    real, folder = module.atomic_write, tmp_path/'scenes'
    def write(path, content):
        assert not (folder/'images').exists()
        monkeypatch.undo()
        make_scenes(folder, 5, 64, quiet=True)   # another run, which is faster
        return real(path, content)
    monkeypatch.setattr(module, 'atomic_write', write)
    assert len(make_scenes(folder, 5, 64, quiet=True).images) == 5
