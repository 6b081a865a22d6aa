"Figures, animations and pages of `caption_nb.views`: what they hold, what they refuse, and that they need no display"
import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from caption_nb import views
from caption_nb.views import (animate_attention, best_and_worst, caption_items, caption_page, photo_array, plot_attention, plot_captions,
                              plot_curves, plot_strip, read_metrics, save, save_page, show_animation, upsample_attention, word_boxes)

WORDS = 'a red circle above a blue square'.split()


@pytest.fixture
def photo():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (60, 90, 3), dtype=np.uint8))


def maps(words, gh=7, gw=7, seed=0):
    return np.random.default_rng(seed).dirichlet(np.ones(gh*gw), len(words)).reshape(-1, gh, gw)


def panels(fig): return [ax for ax in fig.axes if ax.get_label() != 'scale']


def texts(fig): return [t.get_text() for ax in fig.axes for t in ax.texts] + [t.get_text() for t in fig.texts]


# ---------------------------------------------------------------------- the attention figure
@pytest.mark.parametrize('n, columns', [(0, 5), (1, 5), (4, 5), (5, 5), (20, 5), (7, 1), (33, 8)])
@pytest.mark.parametrize('smooth', [True, False])
def test_one_panel_for_the_photo_and_one_for_each_word(photo, n, columns, smooth):
    words = [f'word{i}' for i in range(n)]
    fig = plot_attention(photo, words, maps(words) if n else np.zeros((0, 7, 7)), smooth=smooth, columns=columns)
    assert len(panels(fig)) == n + 1
    assert [t for t in texts(fig) if t.startswith('word')] == words
    assert fig._repr_png_().startswith(b'\x89PNG')


def test_panels_do_not_overlap_and_stay_inside(photo):
    fig = plot_attention(photo, WORDS*3, maps(WORDS*3), columns=4, title='A title')
    boxes = [ax.get_position() for ax in fig.axes]
    assert all(0 <= b.x0 and b.x1 <= 1 and 0 <= b.y0 and b.y1 <= 1 for b in boxes)
    for i, a in enumerate(boxes):
        for b in boxes[i + 1:]: assert a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 or b.y1 <= a.y0


@pytest.mark.parametrize('size', [(300, 60), (60, 300), (224, 224)])
@pytest.mark.parametrize('n', [1, 2, 6])
def test_texts_stay_inside_the_figure_and_off_the_panels(size, n):
    fig = plot_attention(Image.new('RGB', size), ['dog']*n, maps(['dog']*n), shared=True)
    renderer, whole = fig.canvas.get_renderer(), fig.bbox
    note, = fig.texts
    extent = note.get_window_extent(renderer)
    assert whole.x0 <= extent.x0 and extent.x1 <= whole.x1 and whole.y0 <= extent.y0
    assert extent.y1 <= min(ax.get_window_extent().y0 for ax in panels(fig))


def test_tensors_and_arrays_give_the_same_figure(photo):
    torch = pytest.importorskip('torch')
    a = maps(WORDS).astype(np.float32)
    image = torch.tensor(np.asarray(photo)).permute(2, 0, 1)
    ours = [plot_attention(image, WORDS, torch.tensor(a, requires_grad=True)), plot_attention(photo, WORDS, a)]
    assert ours[0]._repr_png_() == ours[1]._repr_png_()
    plot_attention(photo, WORDS, torch.tensor(a).bfloat16())


def test_photo_may_be_a_file_and_large(tmp_path, photo):
    photo.resize((2400, 1600)).save(tmp_path/'photo.jpg')
    fig = plot_attention(tmp_path/'photo.jpg', WORDS[:2], maps(WORDS[:2]), boxes=[None, [1200, 800, 2400, 1600]])
    image = panels(fig)[0].images[0]
    assert max(image.get_array().shape) <= 320                  # reduced …
    assert image.get_extent() == [0, 2400, 1600, 0]             # … but boxes are in the photo's own pixels
    assert {p.get_width() for p in panels(fig)[2].patches} == {1200}


def test_a_dollar_is_a_dollar(photo):
    fig = plot_attention(photo, ['$5', '$', 'x_1^{', 'a\nb'], maps('abcd'), title='$\\frac{')
    fig._repr_png_()    # mathematics would fail to parse here
    assert 'a b' in texts(fig)


def test_scale_note_says_what_is_true(photo):
    def note(*a, **kw): return plot_attention(photo, *a, **kw).texts[-1].get_text().replace('\n', ' ').replace('\u00a0', ' ')
    a = maps(WORDS)
    assert 'each map sums to 1' in note(WORDS, a) and 'own peak' in note(WORDS, a)
    assert 'sums to 1' not in note(WORDS, a*3)
    assert f'one scale, white = {a.max():.2f}' in note(WORDS, a, shared=True, smooth=False)
    assert 'uniform = 0.020' in note(WORDS, a)


def test_shared_scale_keeps_the_order_of_brightness():
    grey, a = Image.new('RGB', (70, 70), 'grey'), np.stack([np.full((7, 7), 1/49), np.eye(49)[24].reshape(7, 7)])
    def brightness(shared):
        fig = plot_attention(grey, ['all', 'one'], a, shared=shared, smooth=False)
        return [ax.images[0].get_array().max() for ax in panels(fig)[1:]]
    own, same = brightness(False), brightness(True)
    assert own[0] == own[1] == same[1] > same[0]


@pytest.mark.parametrize('words, attention, says', [
    (WORDS, maps(WORDS[1:]), ['7 words', '6 attention maps']),
    (WORDS[1:], maps(WORDS), ['6 words', '7 attention maps']),
    (WORDS, maps(WORDS).reshape(7, 49), ['(7, 49)', 'reshape']),
    (WORDS, maps(WORDS)[:, None], ['(7, 1, 7, 7)', 'heads']),
    ('a red circle', maps('abc'), ["'a red circle'", 'split()']),
    (['a', 'b'], -maps('ab'), ["'a'", 'negative']),
    (['a', 'b'], maps('ab')*[[[1]], [[np.nan]]], ["'b'", 'non-finite']),
    (['a'], np.zeros((1, 0, 7)), ['(1, 0, 7)', 'empty grid']),
])
@pytest.mark.parametrize('draw', [plot_attention, lambda *a: animate_attention(*a, 'never.gif')])
def test_what_does_not_fit_is_refused(photo, draw, words, attention, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as e: draw(photo, words, attention)
    for text in says: assert text in str(e.value)
    assert not list(tmp_path.iterdir())


def test_boxes_must_fit_the_words(photo):
    with pytest.raises(ValueError, match='7 words but 2 boxes'): plot_attention(photo, WORDS, maps(WORDS), boxes=[None, None])


def test_word_boxes_follow_the_rule_of_grounding(tmp_path):
    scenes = pytest.importorskip('caption_nb.scenes')
    data = scenes.make_scenes(tmp_path/'scenes', num_images=30, quiet=True)
    for id in data.images:
        words = data.captions[id][0].lower().strip('.').split()
        found = word_boxes(words, data.boxes[id])
        inside = [views._numpy(scenes._inside(b or [0, 0, 1, 1], 112, 112, 14, 14)) for b in found]
        score = scenes.grounding(data, {id: words}, {id: np.stack(inside).astype(float)})
        content = [w for w in words if w in scenes.FORMS or w in scenes.COLOURS]
        assert score.n == len([b for b in found if b]) and score.n + score.ambiguous == len(content)
        assert score.pointing == 1 or not score.n


# ---------------------------------------------------------------------- photos and maps
@pytest.mark.parametrize('image, says', [
    (np.zeros((5, 5)), r'\(5, 5\)'), (np.zeros((2, 3, 5, 5)), r'\(2, 3, 5, 5\)'), (np.full((3, 5, 5), 2.), 'undo the normalisation'),
    (np.full((3, 5, 5), np.nan), 'undo the normalisation')])
def test_what_is_no_image_is_refused(image, says):
    with pytest.raises(ValueError, match=says): photo_array(image)


def test_modes_become_rgb():
    for mode in ('L', 'RGBA', 'P', '1', 'CMYK'): assert photo_array(Image.new(mode, (9, 5))).shape == (5, 9, 3)
    assert photo_array(np.ones((3, 4, 5))).max() == 255


@settings(max_examples=40, deadline=None)
@given(gh=st.integers(1, 16), gw=st.integers(1, 16), h=st.integers(1, 90), w=st.integers(1, 90), smooth=st.booleans())
@example(gh=1, gw=16, h=1, w=1, smooth=True)     # many cells a pixel
def test_maps_keep_their_level_at_any_size(gh, gw, h, w, smooth):
    a = np.full((2, gh, gw), 1/(gh*gw))
    np.testing.assert_allclose(upsample_attention(a, (h, w), smooth), np.full((2, h, w), 1/(gh*gw)), rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(y=st.integers(0, 6), x=st.integers(0, 6), smooth=st.booleans())
def test_light_falls_on_the_cell_that_has_the_weight(y, x, smooth):
    a = np.zeros((1, 7, 7)); a[0, y, x] = 1
    up = upsample_attention(a, (140, 210), smooth)[0]
    py, px = np.unravel_index(up.argmax(), up.shape)
    assert (py//20, px//30) == (y, x) and up.min() >= 0
    assert up[y*20:y*20 + 20, x*30:x*30 + 30].sum() > up.sum()/2   # smoothing spreads it, but most of it stays


def test_left_stays_left_and_up_stays_up():
    a = np.zeros((1, 4, 4)); a[0, 0, 3] = 1
    up = upsample_attention(a, (40, 80))[0]
    assert up[:20, 40:].sum() > 0.95*up.sum()


# ---------------------------------------------------------------------- animation
def test_a_frame_for_the_photo_and_one_for_each_word(photo, tmp_path):
    path = animate_attention(photo, WORDS, maps(WORDS), tmp_path/'new'/'folder'/'words.gif')
    with Image.open(path) as gif:
        assert gif.n_frames == len(WORDS) + 1 and gif.info['loop'] == 0
        sizes, durations = set(), []
        for i in range(gif.n_frames): gif.seek(i); sizes.add(gif.size); durations.append(gif.info['duration'])
    assert len(sizes) == 1 and durations == [700]*len(WORDS) + [2100]
    assert [p.name for p in path.parent.iterdir()] == ['words.gif']


@pytest.mark.parametrize('words', [['same']*6, ['x'*300], ['', ' ', 'a\nb'], ['Hund', 'läuft', 'über', 'Straße', '狗', '<b>'], ['w']*60])
def test_odd_captions_animate_too(words, tmp_path):
    a = np.full((len(words), 3, 3), 1/9)   # the light never moves: every frame must still be there
    path = animate_attention(Image.new('RGB', (50, 50), 'white'), words, a, tmp_path/'a.gif', width=120)
    with Image.open(path) as gif: assert gif.n_frames == len(words) + 1


def test_no_words_give_the_photo(photo, tmp_path):
    with Image.open(animate_attention(photo, [], np.zeros((0, 7, 7)), tmp_path/'a.gif')) as gif: assert gif.n_frames == 1


def test_animation_is_repeatable_and_whole_or_not_there(photo, tmp_path, monkeypatch):
    path = animate_attention(photo, WORDS, maps(WORDS), tmp_path/'a.gif')
    before = path.read_bytes()
    assert animate_attention(photo, WORDS, maps(WORDS), path).read_bytes() == before
    def full(*a): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError): animate_attention(photo, WORDS[::-1], maps(WORDS), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['a.gif']


def test_animation_names_its_kind(photo, tmp_path):
    with pytest.raises(ValueError, match=r"\.gif, got 'a.mp4'"): animate_attention(photo, WORDS, maps(WORDS), tmp_path/'a.mp4')


def test_shown_animation_is_embedded_and_escaped(photo, tmp_path):
    path = animate_attention(photo, WORDS, maps(WORDS), tmp_path/'a.gif', width=100)
    shown = show_animation(path, alt='"><script>alert(1)</script>').data
    assert shown.startswith('<img src="data:image/gif;base64,R0lGOD') and '<script' not in shown


# ---------------------------------------------------------------------- curves
LINES = [dict(step=s, epoch=s//20, loss=3 - s/50, lr=1e-3, captions_per_second=900., seconds=s/9) for s in range(10, 101, 10)] + \
        [dict(step=s, epoch=s//20, dev=dict(Bleu_4=s/400, CIDEr=s/100, ROUGE_L=.3)) for s in range(20, 101, 20)]


def test_curves_from_file_and_from_list_are_the_same(tmp_path):
    path = tmp_path/'metrics.jsonl'
    path.write_text(''.join(json.dumps(line) + '\n' for line in LINES))
    assert plot_curves(path)._repr_png_() == plot_curves(LINES)._repr_png_() == plot_curves(str(path))._repr_png_()


def test_curves_label_every_axis():
    fig = plot_curves(LINES, title='costs $5')
    assert len(fig.axes) == 4 and all(ax.get_xlabel() and ax.get_ylabel() for ax in fig.axes)
    legend = [t.get_text() for t in fig.axes[1].get_legend().get_texts()]
    assert legend == ['CIDEr-D', 'ROUGE-L', 'BLEU-4']   # as the lines end, from above
    lines = [(li.get_linestyle(), str(li.get_marker())) for li in fig.axes[1].get_legend().get_lines()]
    assert len({marker for _, marker in lines}) == 3    # told apart without colour
    assert fig.axes[1].get_title() == 'best: epoch 5, CIDEr-D 1.000'


def test_an_unfinished_last_line_waits(tmp_path):
    path = tmp_path/'metrics.jsonl'
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [dict(step=1, loss=2.)]
    path.write_text('')
    assert read_metrics(path) == []


@pytest.mark.parametrize('text, says', [('{"step": 1}\nnonsense\n{"step": 2}\n', 'line 2'), ('[1]\n', 'line 1'),
                                        ('{"loss": 1}\n', 'no step')])
def test_a_bad_line_is_named(tmp_path, text, says):
    (tmp_path/'metrics.jsonl').write_text(text)
    with pytest.raises(ValueError, match=says): read_metrics(tmp_path/'metrics.jsonl')


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='metrics.jsonl'): plot_curves(tmp_path/'metrics.jsonl')


def test_a_resumed_run_has_each_step_once():
    rows = read_metrics([dict(step=1, loss=9.), dict(step=2, loss=8.), dict(step=2, dev=dict(CIDEr=1.)), dict(step=2, loss=7.)])
    assert rows == [dict(step=1, loss=9.), dict(step=2, loss=7.), dict(step=2, dev=dict(CIDEr=1.))]


NAN = float('nan')


@pytest.mark.parametrize('rows, shown', [
    ([], 1), (LINES[:1], 3), (LINES[-1:], 1), ([dict(step=0, loss=None)], 1), ([dict(step=1, loss=NAN)], 1),
    ([dict(step=s, loss=NAN if s % 3 else 1.) for s in range(40)], 1), ([dict(step=1, dev=dict(other=.5))], 1),
    ([dict(step=1, lr=0., encoder_lr=NAN)], 1), ([dict(step=1, dev_loss=2.), dict(step=2, loss=1.)], 1)])
def test_curves_of_few_or_bad_values(rows, shown):
    fig = plot_curves(rows)
    fig._repr_png_()
    assert len(fig.axes) == shown


FULL = [dict(line, encoder_lr=line['lr']/10, memory_MB=800. + line['step'], of=100) if 'loss' in line else
        dict(line, dev_loss=2. - line['step']/90, best=line['step'] in (20, 60)) for line in LINES]


def test_what_there_is_gets_a_panel_and_nothing_else():
    def labels(rows): return [ax.get_ylabel() for ax in plot_curves(rows).axes]
    loss, rate, dev, speed, memory = names = ['train loss (nats per word)', 'learning rate', 'dev score', 'captions per second', 'memory (MB)']
    assert labels(FULL) == names and labels(LINES) == [loss, dev, rate, speed]
    assert labels([dict(step=1, reward=.5, baseline=.4, lr=1e-5)]) == ['reward (CIDEr-D)', rate]
    fig = plot_curves(FULL)
    assert [t.get_text() for t in fig.axes[0].get_legend().get_texts()] == ['train', 'dev']
    assert [t.get_text() for t in fig.axes[1].get_legend().get_texts()] == ['decoder', 'encoder']
    assert len({line.get_linestyle() for line in fig.axes[1].lines}) == 2     # told apart without colour


def test_the_best_is_the_one_that_the_run_marked():
    assert plot_curves(FULL).axes[2].get_title() == 'best: epoch 3, CIDEr-D 0.600'
    assert views.best_evaluation(LINES)['step'] == 100 and views.best_evaluation(LINES[:9]) is None


@pytest.mark.parametrize('rate, scale', [
    (lambda s: 1e-3*min(1, s/80)*(1 + np.cos(np.pi*s/1000))/2, 'linear'), (lambda s: 1e-3, 'linear'), (lambda s: 1e-3*.5**(s//300), 'linear'),
    (lambda s: 1e-3*.1**(s//300), 'log'), (lambda s: 1e-2*.99**s, 'log')])
def test_the_rates_scale_follows_its_decades(rate, scale):
    assert plot_curves([dict(step=s, lr=float(rate(s))) for s in range(1, 1001, 5)]).axes[0].get_yscale() == scale


def test_a_resume_leaves_no_mark():
    assert plot_curves(FULL + [dict(step=50, changed=dict(epochs=[5, 6]))])._repr_png_() == plot_curves(FULL)._repr_png_()


def test_curves_of_a_long_run_are_small_and_quick():
    rng = np.random.default_rng(0)
    rows = [dict(FULL[0], step=s, loss=3 + rng.normal(), captions_per_second=900*rng.random(), memory_MB=700*rng.random(), encoder_lr=1e-5)
            for s in range(5000)] + [dict(FULL[-1], step=50*s, epoch=s, dev_loss=rng.random()) for s in range(1, 100)]
    assert len(plot_curves(rows, 'a long one')._repr_png_()) < 60_000


# ---------------------------------------------------------------------- captions over epochs
def said(*captions, id='a.jpg', **more):
    return [dict(step=10*e, epoch=e, dev=dict(CIDEr=1.), references={id: c, **more}) for e, c in enumerate(captions, 1)]


def test_history_of_captions():
    rows = said('a dog', 'a dog', 'a cat', 'a dog')
    assert views.caption_history(rows + [dict(step=12, loss=3.)]) == {'a.jpg': [(1, 2, 'a dog'), (3, 3, 'a cat'), (4, 4, 'a dog')]}
    assert views.caption_history([]) == {} and views.caption_history(said('a', id='b.jpg') + said('b', 'c')[1:]) == {'a.jpg': [(2, 2, 'c')]}


@given(st.lists(st.sampled_from('abc'), max_size=8), st.lists(st.sampled_from('abc'), max_size=8))
def test_only_words_that_were_not_there_are_new(before, words):
    new = views._new_words(before, words)
    kept = iter(before)
    assert len(new) == len(words) and all(w in kept for w, n in zip(words, new) if not n)    # a subsequence of what was there
    assert not any(views._new_words(words, words))


@pytest.mark.parametrize('n, images, most', [(1, 1, 5), (4, 6, 5), (9, 3, 2), (2, 2, 1)])
def test_a_strip_shows_first_and_last_and_fits(photo, n, images, most):
    many = [f'a dog number {e} ' + 'runs very fast over the green grass '*3 for e in range(30)]
    ids = {f'{i} $x$.jpg': photo for i in range(images)}
    rows = [dict(row, references=dict.fromkeys(ids, row['references']['a.jpg'])) for row in said(*many)]
    fig = plot_strip(rows, ids, n=n, most=most, title='costs $5')
    assert len(fig.axes) == min(n, images)
    shown = texts(fig)
    assert shown.count('30') == min(n, images) and ('1' in shown) == (most > 1)
    assert sum(t == 'number' for t in shown) == min(n, images)*most
    fig.canvas.draw()
    page = fig.bbox
    for t in fig.texts:
        box = t.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= page.x1 + 1 and box.y0 >= -1 and box.y1 <= page.y1 + 1, t.get_text()
    bold = {t.get_text() for t in fig.texts if t.get_weight() == 'bold'}
    assert not bold & {'dog', 'grass'} and (most == 1 or '29' in bold)


def test_a_strip_reads_photos_of_all_kinds(photo, tmp_path):
    photo.save(tmp_path/'a.jpg')
    rows = said('a dog', '', id='p', q='x', r='y '*3)
    (tmp_path/'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    fig = plot_strip(tmp_path/'metrics.jsonl', dict(p=tmp_path/'a.jpg', q=photo, r=np.asarray(photo)))
    assert len(fig.axes) == 3 and '(empty)' in texts(fig)
    with pytest.raises(ValueError, match="no photo for 'q': did you mean 'q1'"): plot_strip(rows, dict(p=photo, q1=photo, r=photo))
    assert texts(plot_strip(LINES, {})) == ['nothing to show yet']


# ---------------------------------------------------------------------- captions
def items(photo, n, **kw):
    return [dict(image=photo, caption=f'caption {i}', references=[f'reference {i} {j}' for j in range(5)], scores=dict(CIDEr=i/2),
                 id=f'{i}.jpg', **kw) for i in range(n)]


@pytest.mark.parametrize('n, columns', [(1, 4), (4, 4), (9, 4), (3, 1)])
def test_a_page_has_every_photo_and_text(photo, n, columns):
    fig = plot_captions(items(photo, n), columns=columns, title='Page')
    said = texts(fig)
    assert len(fig.axes) == n
    for i in range(n): assert {f'caption {i}', f'{i}.jpg', f'· reference {i} 4', f'CIDEr-D {i/2:.2f}'} <= set(said)


def test_long_captions_stay_in_their_column(photo):
    long = dict(image=photo, caption='WWW MMM '*30, references=['www mmm wide words '*9]*7, id='x'*99)
    fig = plot_captions([long, long], columns=2)
    renderer = fig.canvas.get_renderer()
    width = fig.axes[0].get_window_extent().width
    for ax in fig.axes:
        for t in ax.texts:
            assert t.get_window_extent(renderer).width <= width*1.03
            assert t.get_window_extent(renderer).y0 >= 0
    assert '… and 2 more' in texts(fig)


@pytest.mark.parametrize('item, says', [(dict(caption='x'), "no 'image'"), (dict(image=1), "no 'caption'"),
                                        (dict(image=1, caption='', referenes=[]), "'references'"),
                                        (dict(image=1, caption='', references='a dog'), 'must be a list')])
@pytest.mark.parametrize('show', [plot_captions, caption_page])
def test_items_are_checked(item, says, show):
    with pytest.raises(ValueError, match=says): show([item])


def test_an_empty_page_is_refused():
    with pytest.raises(ValueError, match='items is empty'): plot_captions([])


@settings(max_examples=60, deadline=None)
@given(scores=st.lists(st.floats(0, 10), max_size=12), n=st.integers(0, 7))
def test_best_and_worst_share_no_image(scores, n):
    per = {f'{i:02d}': dict(CIDEr=s) for i, s in enumerate(scores)}
    best, worst = best_and_worst(per, {id: '' for id in per}, n)
    assert len(best) <= n and len(worst) <= n and len(best) + len(worst) == min(2*n, len(scores))
    assert not {r.id for r in best} & {r.id for r in worst}
    if best and worst: assert min(r.score for r in best) >= max(r.score for r in worst)
    assert [r.score for r in best] == sorted((r.score for r in best), reverse=True)
    assert [r.score for r in worst] == sorted(r.score for r in worst)


def test_best_and_worst_name_what_is_missing():
    with pytest.raises(ValueError, match="did you mean 'CIDEr'"): best_and_worst({'a': dict(CIDEr=1)}, {'a': ''}, key='CIDEr-D')
    with pytest.raises(ValueError, match='b has scores but no caption'): best_and_worst({'b': dict(CIDEr=1)}, {'a': ''})


def test_items_of_real_data(flickr8k, tmp_path):
    from caption_nb.data import load_data
    data = load_data(flickr8k)
    ids = data.splits['dev'][:3]
    mine = caption_items(data, {id: 'a dog' for id in ids}, per_image={ids[0]: dict(CIDEr=.5, Bleu_1=.1)})
    assert mine[0]['scores'] == dict(CIDEr=.5) and len(mine[1]['references']) == 5
    assert len(plot_captions(mine).axes) == 3
    with pytest.raises(ValueError, match='no caption for'): caption_items(data, {ids[0]: ''}, ids)
    page = save_page(mine, tmp_path/'page.html', embed=False).read_text()
    assert ids[0] in page and 'base64' not in page


# ---------------------------------------------------------------------- pages and files
NASTY = '"><script>alert(1)</script><img src=x onerror=alert(2)> & \' </figcaption>'


def test_every_text_of_a_page_is_escaped(photo):
    page = caption_page([dict(image=photo, caption=NASTY, references=[NASTY], id=NASTY, scores={NASTY: 1.})], title=NASTY)
    assert '<script' not in page and 'src=x' not in page.replace('&lt;img src=x', '') and page.count('</figcaption>') == 1
    assert "default-src 'none'" in page


def test_a_page_runs_no_script(photo, tmp_path, chromium):
    owns = NASTY.replace('alert(1)', 'document.title="owned"').replace('alert(2)', 'document.title="owned"')
    path = save_page([dict(image=photo, caption=owns, id=owns)], tmp_path/'page.html', title='safe')
    command = [chromium, '--headless', '--no-sandbox', '--disable-gpu', f'--user-data-dir={tmp_path}/profile', '--dump-dom', path.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=90).stdout
    assert '<title>safe</title>' in shown and shown.count('<figure>') == 1 and shown.count('<img') == 1


def test_linked_photos_are_relative_and_quoted(photo, tmp_path):
    (tmp_path/'pictures').mkdir()
    name = 'a dog #1?"<.png'
    photo.save(tmp_path/'pictures'/name)
    page = save_page([dict(image=tmp_path/'pictures'/name, caption='a dog')], tmp_path/'run'/'page.html', embed=False).read_text()
    assert 'src="./../pictures/a%20dog%20%231%3F%22%3C.png"' in page
    with pytest.raises(ValueError, match='only a file can be linked, got Image'):
        save_page(items(photo, 1), tmp_path/'page.html', embed=False)


@pytest.mark.parametrize('kind', ['png', 'svg', 'pdf'])
def test_saving_again_changes_nothing(photo, kind, tmp_path):
    def file(name): return save(plot_attention(photo, WORDS[:2], maps(WORDS[:2])), tmp_path/name/f'figure.{kind}')
    assert file('one').read_bytes() == file('two').read_bytes()


def test_unknown_kinds_are_refused(photo, tmp_path):
    fig = plot_captions(items(photo, 1))
    with pytest.raises(ValueError, match="did you mean 'png'"): save(fig, tmp_path/'a.pngg')
    with pytest.raises(ValueError, match='no suffix'): save(fig, tmp_path/'figure')
    assert not list(tmp_path.iterdir())


def test_figures_are_freed(photo):
    fig = plot_attention(photo, WORDS, maps(WORDS))
    fig._repr_png_()
    gone = weakref.ref(fig)
    del fig; gc.collect()
    assert gone() is None
    import matplotlib.pyplot as plt
    plot_curves(LINES), plot_captions(items(photo, 2))
    assert not plt.get_fignums()


def test_works_without_a_display_and_imports_no_plotting():
    code = ('import sys, caption_nb.views as v; assert not {"matplotlib", "seaborn", "torch"} & set(sys.modules), "imported too early";'
            'import numpy as np; v.plot_attention(np.zeros((3, 8, 8)), ["a"], np.ones((1, 2, 2))/4)._repr_png_();'
            'v.plot_curves([])._repr_png_()')
    env = {k: v for k, v in os.environ.items() if k not in ('DISPLAY', 'MPLBACKEND')}
    where = Path(views.__file__).parents[1]
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env, cwd=where, timeout=120)
    assert done.returncode == 0, done.stderr
