"""SPICE through its Java and CLIPScore through transformers: right where they are there, a reason where they are not."""
import json
import math
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from caption_nb import pretrained_metrics as pm
from caption_nb.pretrained_metrics import ClipScore, SpiceMissing, clip_score, find_spice, ref_clip_score, spice, spice_kinds

# ---- SPICE ------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path):
    "A folder with all the files that SPICE's manifest names, all of them empty"
    folder = tmp_path/'spice'
    (folder/'lib').mkdir(parents=True)
    with zipfile.ZipFile(folder/'spice-1.0.jar', 'w') as jar:
        jar.writestr('META-INF/MANIFEST.MF', 'Manifest-Version: 1.0\r\nClass-Path: lib/stanford-corenlp-3.6.0.jar lib/slf4j\r\n -api-1.7.12.jar'
                     ' lib/stanford-corenlp-3.6.0-models.jar\r\nMain-Class: edu.anu.spice.SpiceScorer\r\n')
    for name in ('stanford-corenlp-3.6.0', 'slf4j-api-1.7.12', 'stanford-corenlp-3.6.0-models'):
        zipfile.ZipFile(folder/'lib'/f'{name}.jar', 'w').close()
    return folder


@pytest.fixture
def java_that(tmp_path):
    "Makes a program that answers `-version` as Java does, and otherwise runs the given Python with its arguments in sys.argv"
    def make(code, version='11.0.2'):
        program = tmp_path/f'java{len(list(tmp_path.glob("java*")))}'
        program.write_text(f'#!{sys.executable}\nimport sys, json, time, os, subprocess\n'
                           f'if sys.argv[1] == "-version": sys.stderr.write(\'openjdk version "{version}" 2019\\n\'); sys.exit()\n{code}\n')
        program.chmod(0o755)
        return str(program)
    return make


HYPS, REFS = [['a', 'girl'], ['un', 'été', '犬'], []], [[['the', 'girl'], ['a', 'child']], [['dogs']], [['x']]]
SCORES = '''
rows = json.load(open(sys.argv[4]))
print('Parsing reference captions', file=sys.stderr, flush=True)
def tuples(f, c): return {'All': dict(f=f, pr=f, re=f, tp=1, fp=1, fn=1, numImages=1), 'Color': dict(f=c, pr=c, re=c, tp=0, fp=0, fn=0, numImages=1)}
out = [dict(image_id=r['image_id'], test_tuples=[], scores=tuples(len(r['test'].split())/4, len(r['refs'])/2 if len(r['refs']) > 1 else None)) for r in rows]
json.dump(out[::-1], open(sys.argv[sys.argv.index('-out') + 1], 'w'))
'''


def test_spice_reads_what_java_writes(home, java_that):
    score, kinds = spice(HYPS, REFS, home, java=java_that(SCORES), quiet=True)
    assert score.name == 'SPICE' and score.per_image.tolist() == [.5, .75, 0] and score.corpus == pytest.approx(1.25/3)
    assert kinds[0]['Color']['f'] == 1 and math.isnan(kinds[1]['Color']['f']) and kinds[2]['All']['tp'] == 1
    assert spice_kinds(kinds) == {'All': pytest.approx(1.25/3), 'Color': 1}


def test_spice_as_coco_caption_computes_it(home, java_that):
    "The same program, called by the original"
    original = pytest.importorskip('pycocoevalcap.spice.spice')
    java = java_that(SCORES)
    scorer = object.__new__(original.Spice)                 # its __init__ downloads
    folder = Path(java).parent/'bin'
    folder.mkdir()
    # the original gives `-jar -Xmx8G JAR IN`, we `-Xmx8G -jar JAR IN`: the same number of arguments before IN
    shutil.copy(java, folder/'java')
    before = set(Path(original.__file__).parent.iterdir())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PATH', f'{folder}:{os.environ["PATH"]}')
        mean, each = scorer.compute_score({i: [' '.join(r) for r in rs] for i, rs in enumerate(REFS)},
                                          {i: [' '.join(h)] for i, h in enumerate(HYPS)})
    for made in set(Path(original.__file__).parent.iterdir()) - before: shutil.rmtree(made)   # tmp and cache, inside the package
    score, kinds = spice(HYPS, REFS, home, java=java, quiet=True)
    assert score.corpus == pytest.approx(mean, abs=1e-12)
    np.testing.assert_equal(kinds, each)                    # nan where nan


def test_what_java_is_told(home, java_that, tmp_path):
    seen = tmp_path/'seen.json'
    java = java_that(f'json.dump([sys.argv[1:], json.load(open(sys.argv[4], encoding="ascii"))], open({str(seen)!r}, "w"))\n{SCORES}')
    spice(HYPS, REFS, home, memory='3G', cache=tmp_path/'new'/'cache', threads=2, java=java, quiet=True)
    arguments, rows = json.loads(seen.read_text())
    assert arguments[:3] == ['-Xmx3G', '-jar', str(home/'spice-1.0.jar')]
    assert arguments[4] == '-out' and arguments[6:] == ['-subset', '-silent', '-cache', str(tmp_path/'new'/'cache'), '-threads', '2']
    assert (tmp_path/'new'/'cache').is_dir()
    assert rows[1] == dict(image_id=1, test='un été 犬', refs=['dogs']) and rows[2]['test'] == ''
    assert not Path(arguments[3]).exists()                  # nothing is left behind
    spice(HYPS, REFS, home, java=java, quiet=True)
    assert '-cache' not in json.loads(seen.read_text())[0] and '-threads' not in json.loads(seen.read_text())[0]


def test_a_failure_shows_the_last_lines(home, java_that):
    many = 'for i in range(100): print("line", i, file=sys.stderr)\nprint("at edu.anu.spice.SpiceScorer", flush=True)\nsys.exit(1)'
    with pytest.raises(RuntimeError, match=r'java ended with 1; its last lines:\nline 89\n(.*\n)*at edu.anu.spice') as e:
        spice(HYPS, REFS, home, java=java_that(many), quiet=True)
    assert 'line 88' not in str(e.value)
    with pytest.raises(RuntimeError, match='memory="16G"'):
        spice(HYPS, REFS, home, java=java_that('print("java.lang.OutOfMemoryError: Java heap space"); sys.exit(1)'), quiet=True)
    with pytest.raises(RuntimeError, match='ended with 3.*\n.it said nothing'):
        spice(HYPS, REFS, home, java=java_that('sys.exit(3)'), quiet=True)


def alive(pid):
    try: return Path(f'/proc/{pid}/stat').read_text().split(')')[-1].split()[0] != 'Z'
    except OSError: return False


def test_a_run_that_hangs_is_ended_with_its_children(home, java_that, tmp_path):
    pids = tmp_path/'pids'
    hang = (f'child = subprocess.Popen(["sleep", "100"])\nopen({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")\n'
            'print("Parsing test captions", flush=True)\ntime.sleep(100)')
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r'stopped after timeout=2 s; its last lines:\nParsing test captions'):
        spice(HYPS, REFS, home, java=java_that(hang), timeout=2, quiet=True)
    assert time.monotonic() - start < 60
    for _ in range(100):
        if not any(map(alive, pids.read_text().split())): break
        time.sleep(.05)
    else: pytest.fail('Java or its child is still there')


def test_ctrl_c_ends_java(home, java_that, tmp_path, monkeypatch):
    pid = tmp_path/'pid'
    java = java_that(f'open({str(pid)!r}, "w").write(str(os.getpid()))\nprint("Parsing", flush=True)\ntime.sleep(100)')
    class Interrupted(pm.track):
        def __iter__(self):
            for item in self.items: yield item; raise KeyboardInterrupt
    monkeypatch.setattr(pm, 'track', Interrupted)
    with pytest.raises(KeyboardInterrupt): spice(HYPS, REFS, home, java=java, quiet=True)
    assert not alive(pid.read_text())


@pytest.mark.parametrize('code, said', [
    ('open(sys.argv[6], "w").write("[{")', 'no scores that can be read'),
    ('pass', 'no scores that can be read'),
    ('json.dump({"a": 1}, open(sys.argv[6], "w"))', 'no scores that can be read'),
    ('json.dump([dict(image_id=0, scores={"All": {"f": 1}})], open(sys.argv[6], "w"))', 'left out 2 of 3 images, number 1 first'),
    ('json.dump([dict(image_id=i, scores={}) for i in range(3)], open(sys.argv[6], "w"))', 'left out 3 of 3 images, number 0 first')])
def test_results_that_are_not_whole_are_errors(home, java_that, code, said):
    with pytest.raises(RuntimeError, match=said): spice(HYPS, REFS, home, java=java_that(code), quiet=True)


def test_nan_of_a_whole_image_stays_nan(home, java_that):
    "As the original's mean has it: never a number that stands for fewer images than it says"
    code = 'json.dump([dict(image_id=i, scores={"All": {"f": None if i else .5}}) for i in range(3)], open(sys.argv[6], "w"))'
    score, kinds = spice(HYPS, REFS, home, java=java_that(code), quiet=True)
    assert math.isnan(score.corpus) and score.per_image[0] == .5 and np.isnan(score.per_image[1:]).all()
    assert spice_kinds(kinds) == {'All': .5} and math.isnan(spice_kinds(kinds[1:])['All'])


def test_progress_shows_what_java_says(home, java_that, capsys):
    spice(HYPS, REFS, home, java=java_that(SCORES))
    assert 'SPICE: 1 messages' in (said := capsys.readouterr().err) and '| Parsing reference captions' in said


def test_everything_that_spice_lacks_is_said_at_once(home, tmp_path):
    (home/'lib'/'stanford-corenlp-3.6.0-models.jar').unlink()
    (home/'lib'/'slf4j-api-1.7.12.jar').write_bytes(b'PK cut off')
    with pytest.raises(SpiceMissing) as e: find_spice(home, java='java-of-nobody')
    for part in (f'{home} lacks lib/stanford-corenlp-3.6.0-models.jar.', 'fetch http://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip',
                 f'into {home/"lib"}', 'damaged files (lib/slf4j-api-1.7.12.jar)', "there is no 'java-of-nobody' program"): assert part in str(e.value)
    with pytest.raises(SpiceMissing, match='holds no spice-1.0.jar; pip install pycocoevalcap'): find_spice(tmp_path)
    with pytest.raises(SpiceMissing, match='holds no spice-1.0.jar'): find_spice(tmp_path/'none')


def test_where_spice_is_looked_for(home, java_that, monkeypatch):
    java = java_that('')
    assert find_spice(home, java) == home
    monkeypatch.setenv('CAPTION_NB_SPICE', str(home))
    assert find_spice(java=java) == home
    monkeypatch.delenv('CAPTION_NB_SPICE')
    monkeypatch.setattr(pm, 'find_spec', lambda name: None)
    with pytest.raises(SpiceMissing, match='there is none here. pip install pycocoevalcap'): find_spice(java=java)


@pytest.mark.parametrize('version, fine', [('1.8.0_412', True), ('11.0.2', True), ('14', True), ('15.0.1', False), ('17.0.15', False), ('21-ea', False)])
def test_java_without_javascript_is_refused_beforehand(home, java_that, version, fine):
    java = java_that('', version)
    if fine: assert find_spice(home, java) == home
    else:
        with pytest.raises(SpiceMissing, match=f'is Java {version.split(".")[0].split("-")[0]}, which lacks the JavaScript engine'): find_spice(home, java)


def test_this_java_has_javascript_or_is_refused(java, tmp_path):
    "What the check of the version says is true of the real Java here"
    if not shutil.which('jshell'): pytest.skip('no jshell beside java')
    code = 'System.out.println(new javax.script.ScriptEngineManager().getEngineByName("JavaScript") != null);\n/exit\n'
    (tmp_path/'ask').write_text(code)
    said = subprocess.run(['jshell', '-J-Duser.home=' + str(tmp_path), str(tmp_path/'ask')], capture_output=True, text=True, timeout=120).stdout
    assert ('true' in said) == (pm._java_problem(java) == '')


def test_the_real_package_lacks_the_parser():
    package = pytest.importorskip('pycocoevalcap')
    folder = Path(package.__file__ or list(package.__path__)[0] + '/x').parent/'spice'
    if (folder/'lib'/'stanford-corenlp-3.6.0.jar').exists(): pytest.skip('somebody has fetched CoreNLP')
    with pytest.raises(SpiceMissing, match='lacks lib/stanford-corenlp-3.6.0.jar and lib/stanford-corenlp-3.6.0-models.jar. Where there is internet'):
        find_spice()
    assert len(pm._jars(folder)) == 17


def test_bad_arguments_of_spice(home):
    with pytest.raises(ValueError, match='2 hypotheses, but references of 1'): spice([[], []], [[['a']]], home)
    with pytest.raises(ValueError, match='nothing to score'): spice([], [], home)
    with pytest.raises(ValueError, match='image 1 .* has no references'): spice([['a'], ['b']], [[['a']], []], home)
    with pytest.raises(ValueError, match="memory='lots'"): spice([['a']], [[['a']]], home, memory='lots')
    with pytest.raises(TypeError, match="not a string: 'a dog'"): spice(['a dog'], [[['a']]], home)
    with pytest.raises(TypeError, match="not a string: 'a dog'"): spice([['a']], [['a dog']], home)


# ---- CLIPScore: the formulas ------------------------------------------------------------------------------------

def unit(rows): return rows/np.linalg.norm(rows, axis=-1, keepdims=True)


def test_formulas_by_a_plain_loop():
    rng = np.random.default_rng(0)
    images, captions = unit(rng.normal(size=(40, 6))), unit(rng.normal(size=(40, 6)))
    references = [unit(rng.normal(size=(n, 6))) for n in rng.integers(1, 6, 40)]
    got = clip_score(images, captions)
    both = ref_clip_score(got, captions, references)
    for v, c, rs, s, r in zip(images, captions, references, got, both):
        expected = 2.5*max(sum(v*c), 0)
        near = max(max(sum(c*x) for x in rs), 0)
        assert s == pytest.approx(expected)
        assert r == pytest.approx(2/(1/expected + 1/near) if expected and near else 0)
    assert (got == 0).any() and (both == 0).any()


# ---- CLIPScore: a tiny model ------------------------------------------------------------------------------------

WORDS = 'a photo depicts dog cat runs on the beach red .'.split()


@pytest.fixture(scope='module')
def clip(tmp_path_factory, one_thread):
    "CLIP with a few thousand random weights and a tokenizer of eleven words, in a folder"
    pytest.importorskip('transformers')
    transformers = pm.import_transformers()
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    folder = tmp_path_factory.mktemp('models')/'tiny-clip'
    vocabulary = {w: i for i, w in enumerate(['<unk>', *WORDS, '<start>', '<end>'])}
    start, end = vocabulary['<start>'], vocabulary['<end>']
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token='<unk>'))
    inner.normalizer, inner.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single='<start> $A <end>', special_tokens=[('<start>', start), ('<end>', end)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token='<unk>', bos_token='<start>', eos_token='<end>', pad_token='<end>',
                                         model_max_length=12).save_pretrained(folder)
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.CLIPConfig(
        text_config=dict(**small, vocab_size=len(vocabulary), max_position_embeddings=12, bos_token_id=start, eos_token_id=end, pad_token_id=end),
        vision_config=dict(**small, image_size=16, patch_size=8), projection_dim=8)
    torch.manual_seed(0)
    transformers.CLIPModel(config).eval().save_pretrained(folder)
    processor = getattr(transformers, 'CLIPImageProcessorPil', transformers.CLIPImageProcessor)
    processor(size=dict(shortest_edge=16), crop_size=dict(height=16, width=16)).save_pretrained(folder)
    return folder


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Seven small photos: id → path"
    folder, rng = tmp_path_factory.mktemp('photos'), np.random.default_rng(0)
    for i in range(7): Image.fromarray(rng.integers(0, 255, (20 + i, 30, 3), dtype=np.uint8)).resize((40, 30 + i)).save(folder/f'{i}.png')
    return {f'{i}.png': folder/f'{i}.png' for i in range(7)}


CAPTIONS = {f'{i}.png': c for i, c in enumerate(('A dog runs.', 'a cat on the beach', '', 'the red dog', 'a dog runs.', 'zebra', 'red'))}
REFERENCES = {i: [c, 'a cat', 'the beach is red'][k % 3:] or ['a'] for k, (i, c) in enumerate(CAPTIONS.items())}


def score_of(clip, **options): return ClipScore(clip, device='cpu', quiet=True, **options)


def directly(clip, photos):
    "The plain formula, one image and one text at a time"
    import torch
    transformers = pm.import_transformers()
    model, tokenizer = transformers.CLIPModel.from_pretrained(clip).eval(), transformers.AutoTokenizer.from_pretrained(clip)
    config = json.loads((clip/'preprocessor_config.json').read_text()) if (clip/'preprocessor_config.json').exists() else \
        json.loads((clip/'processor_config.json').read_text())['image_processor']
    def vector(out):
        out = getattr(out, 'pooler_output', out)[0]
        return (out/out.norm()).numpy()
    def image(path):
        photo = Image.open(path).convert('RGB')
        scale = 16/min(photo.size)
        photo = photo.resize((int(photo.width*scale), int(photo.height*scale)), Image.BICUBIC)
        left, top = (photo.width - 16)//2, (photo.height - 16)//2
        x = (np.asarray(photo.crop((left, top, left + 16, top + 16)), np.float64)/255 - config['image_mean'])/config['image_std']
        return vector(model.get_image_features(pixel_values=torch.tensor(x).permute(2, 0, 1)[None].float()))
    def text(words): return vector(model.get_text_features(input_ids=tokenizer('A photo depicts ' + words, return_tensors='pt')['input_ids']))
    with torch.no_grad():
        first = {i: 2.5*max(float(image(photos[i]) @ text(c)), 0) for i, c in CAPTIONS.items()}
        near = {i: max(max(float(text(c) @ text(r)) for r in REFERENCES[i]), 0) for i, c in CAPTIONS.items()}
    return first, {i: 2*a*near[i]/(a + near[i]) if a + near[i] else 0 for i, a in first.items()}


def test_clip_score_is_the_plain_formula(clip, photos):
    first, both = directly(clip, photos)
    scores = score_of(clip)(CAPTIONS, photos, REFERENCES)
    np.testing.assert_allclose(scores.clip.per_image, list(first.values()), atol=2e-5)
    np.testing.assert_allclose(scores.ref_clip.per_image, list(both.values()), atol=2e-5)
    assert scores.clip.corpus == pytest.approx(np.mean(list(first.values())), abs=2e-5) and scores.cut == 0
    assert max(first.values()) > .01


def test_batch_size_does_not_matter(clip, photos):
    a, b = (score_of(clip, batch_size=n)(CAPTIONS, photos, REFERENCES) for n in (1, 5))
    np.testing.assert_allclose(a.clip.per_image, b.clip.per_image, atol=1e-6)
    np.testing.assert_allclose(a.ref_clip.per_image, b.ref_clip.per_image, atol=1e-6)


def test_images_are_embedded_once(clip, photos):
    scorer, opened = score_of(clip), []
    def load(id): opened.append(id); return Image.open(photos[id])
    images = scorer.embed_images(load, [*photos, *photos])
    assert opened == list(photos)
    again = scorer(CAPTIONS, images)
    assert again.ref_clip is None and len(opened) == len(photos)
    np.testing.assert_allclose(again.clip.per_image, scorer(CAPTIONS, photos).clip.per_image, atol=1e-6)
    some = dict(list(CAPTIONS.items())[3:5][::-1])                   # fewer, in another order
    np.testing.assert_allclose(scorer(some, images).clip.per_image, again.clip.per_image[[4, 3]], atol=1e-6)


def test_data_sets_are_images_too(clip, tmp_path):
    from caption_nb.scenes import make_scenes
    data = make_scenes(tmp_path/'scenes', num_images=10, size=64, quiet=True)
    captions = {i: cs[0] for i, cs in data.references('train').items()}
    scores = score_of(clip)(captions, data, data.references('train'))
    assert len(scores.clip.per_image) == len(captions) and (scores.ref_clip.per_image <= 2).all()


def test_equal_texts_are_embedded_once(clip, monkeypatch):
    scorer, seen = score_of(clip), []
    inner = scorer.tokenizer
    def counting(texts, **options): seen.extend(texts if 'padding' in options else []); return inner(texts, **options)
    monkeypatch.setattr(scorer, 'tokenizer', counting)
    rows, cut = scorer.embed_texts(['a dog', 'red', 'a dog'])
    assert sorted(seen) == ['A photo depicts a dog', 'A photo depicts red'] and not any(cut)
    np.testing.assert_array_equal(rows[0], rows[2])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)


def test_long_texts_are_cut_and_counted(clip, photos):
    scorer = score_of(clip)
    long = 'dog '*7                                          # 3 words of the prompt, start and end: exactly 12
    captions = {'0.png': long, '1.png': long + 'cat', '2.png': 'dog '*99}
    scores = scorer(captions, photos, {i: ['red', 'dog '*50] for i in captions})
    assert scores.cut == 2 + 3 and '5 texts were cut' in str(scores)
    rows, cut = scorer.embed_texts(list(captions.values()))
    assert cut == [False, True, True]
    np.testing.assert_allclose(rows, rows[[0, 0, 0]], atol=1e-6)   # what is over is dropped, the end stays


def test_names_say_model_weights_and_prompt(clip, photos, tmp_path):
    scorer = score_of(clip)
    scores = scorer(CAPTIONS, photos, REFERENCES)
    name, digits = scorer.name.split('@')
    assert name == 'tiny-clip' and len(digits) == 8 and int(digits, 16) >= 0
    assert scores.clip.name == f'CLIPScore({scorer.name})' and scores.ref_clip.name == f'RefCLIPScore({scorer.name})'
    other = score_of(clip, prompt='', precision='bf16')
    assert other.label == f"{scorer.name}, prompt='', bf16"
    np.testing.assert_allclose(score_of(clip, precision='bf16')(CAPTIONS, photos).clip.per_image, scores.clip.per_image, atol=.1)
    from safetensors.torch import load_file, save_file
    copy = shutil.copytree(clip, tmp_path/'tiny-clip')
    state = load_file(copy/'model.safetensors')
    state['visual_projection.weight'] += .5
    save_file(state, copy/'model.safetensors', {'format': 'pt'})
    changed = score_of(copy)
    assert changed.name.split('@')[0] == 'tiny-clip' and changed.name != scorer.name
    with pytest.raises(ValueError, match=f'embedded by {scorer.name}, the captions would be by {changed.name}'):
        changed(CAPTIONS, scorer.embed_images(photos, CAPTIONS))


def test_images_that_cannot_be_read_are_named(clip, photos, tmp_path):
    scorer = score_of(clip)
    cut = tmp_path/'cut.png'
    cut.write_bytes(photos['0.png'].read_bytes()[:300])
    with pytest.raises(ValueError, match=f"image 'x' cannot be read .{cut}: truncated"): scorer({'x': 'a dog'}, {'x': cut})
    with pytest.raises(ValueError, match="image 'x' cannot be read .*missing"): scorer({'x': 'a dog'}, {'x': tmp_path/'none.png'})
    with pytest.raises(ValueError, match=r"no image for 'y' \(of 1 images\)"): scorer({'y': 'a dog'}, {'x': cut})
    with pytest.raises(ValueError, match="image 'y' cannot be read"): scorer({'y': 'a dog'}, lambda id: {}[id])


def test_bad_arguments_of_clip(clip, photos):
    scorer = score_of(clip)
    images = scorer.embed_images(photos, ['0.png'])
    with pytest.raises(ValueError, match='nothing to score'): scorer({}, images)
    with pytest.raises(ValueError, match="image '1.png' is not among the 1 that were embedded"): scorer({'1.png': 'a'}, images)
    with pytest.raises(TypeError, match="hypothesis for '0.png' must be one string, not list"): scorer({'0.png': ['a']}, images)
    for refs in ({}, {'0.png': 'a dog'}, {'0.png': []}):
        with pytest.raises(ValueError, match="'0.png' needs a list of one or more references"): scorer({'0.png': 'a'}, images, refs)
    with pytest.raises(ValueError, match="precision='bf61' is not known: did you mean 'bf16'"): score_of(clip, precision='bf61')


def test_what_is_no_image_text_model_is_named(clip, tmp_path):
    transformers = pm.import_transformers()
    with pytest.raises(FileNotFoundError, match='holds no config.json'): score_of(tmp_path)
    with pytest.raises(FileNotFoundError, match='is no folder of a model'): score_of(tmp_path/'none')
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    text = shutil.copytree(clip, tmp_path/'bert')
    transformers.BertModel(transformers.BertConfig(vocab_size=14, **small)).save_pretrained(text)
    with pytest.raises(ValueError, match=r"bert is a 'bert' model, which does not embed both"): score_of(text)
    broken = shutil.copytree(clip, tmp_path/'broken')
    (broken/'model.safetensors').write_bytes(b'cut off')
    with pytest.raises(ValueError, match=r'broken cannot be loaded \('): score_of(broken)
    from safetensors.torch import load_file, save_file
    part = shutil.copytree(clip, tmp_path/'part')
    state = load_file(part/'model.safetensors')
    del state['text_projection.weight']
    save_file(state, part/'model.safetensors', {'format': 'pt'})
    with pytest.raises(ValueError, match='1 weights are not in its files, text_projection.weight first'): score_of(part)


def test_siglip_sees_its_padding(clip, photos, tmp_path):
    "Texts of SigLIP are padded to the full length, as in its training: a batch's longest text must not matter"
    transformers = pm.import_transformers()
    import torch
    folder = shutil.copytree(clip, tmp_path/'tiny-siglip')
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    transformers.SiglipModel(transformers.SiglipConfig(text_config=dict(**small, vocab_size=14, max_position_embeddings=12, projection_size=16),
                                                       vision_config=dict(**small, image_size=16, patch_size=8))).save_pretrained(folder)
    a, b = (score_of(folder, batch_size=n)(CAPTIONS, photos, REFERENCES) for n in (1, 32))
    np.testing.assert_allclose(a.ref_clip.per_image, b.ref_clip.per_image, atol=1e-6)
    model, tokenizer = transformers.SiglipModel.from_pretrained(folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer('A photo depicts red', padding='max_length', max_length=12, return_tensors='pt')['input_ids']
    with torch.no_grad(): out = model.get_text_features(input_ids=ids)
    out = getattr(out, 'pooler_output', out)[0]
    np.testing.assert_allclose(score_of(folder).embed_texts(['red'])[0][0], out/out.norm(), atol=1e-6)
    assert a.clip.name.startswith('CLIPScore(tiny-siglip@')


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with pytest.raises(ImportError, match=r"pip install 'caption-nb\[clip\]'"): ClipScore()
    assert 'clip_requirements = transformers>=' in (ROOT/'settings.ini').read_text()


def test_module_needs_neither_torch_nor_transformers():
    code = 'import sys, caption_nb.pretrained_metrics; print([m for m in ("torch", "transformers", "pycocoevalcap") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
