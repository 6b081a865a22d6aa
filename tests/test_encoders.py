"""Encoders: names, stages, weights from files, preprocessing, precision; the shared MobileNet where it is there."""
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from caption_nb import encoders
from caption_nb.encoders import Encoder, Preprocess, SceneCNN, compare_precision, import_timm, make_encoder, read_weights, weights_sha256

SMALL = dict(weights='random', image_size=64)


def uint8(n: int, size: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


# ---- names, stages, forms of features

@pytest.mark.parametrize('name, stage, grid, dim', [
    ('resnet18', -1, (2, 2), 512), ('resnet18', -2, (4, 4), 256), ('resnet18', 1, (16, 16), 64),
    ('mobilenetv2_050', -1, (2, 2), 1280), ('mobilenetv2_050', 4, (2, 2), 160),
    ('vit_tiny_patch16_224', -1, (4, 4), 192), ('vit_tiny_patch16_224', 5, (4, 4), 192),
    ('deit_tiny_distilled_patch16_224', -1, (4, 4), 192),   # two prefix tokens
    ('convnext_atto', -1, (2, 2), 320), ('scene_cnn', -1, (4, 4), 128)])
def test_grid_of_every_family(name, stage, grid, dim):
    encoder = make_encoder(name, stage=stage, **SMALL).freeze()
    out = encoder.encode_batch(uint8(2))
    assert (encoder.grid, encoder.dim, encoder.image_size) == (grid, dim, (64, 64))
    assert out.shape == (2, grid[0]*grid[1], dim) and out.dtype == torch.float32 and not out.is_inference()


def test_channels_last_networks_give_cells_in_reading_order():
    encoder = make_encoder('swin_tiny_patch4_window7_224', 'random').freeze()
    x = encoder.normalise(uint8(1, 224))
    with torch.no_grad(): exact = encoder.model.forward_features(x)   # (1, 7, 7, D)
    assert exact.shape[:3] == (1, 7, 7) and torch.equal(encoder(x)[0, 8], exact[0, 1, 1])


def test_class_token_is_dropped_and_cells_are_in_place():
    encoder = make_encoder('vit_tiny_patch16_224', **SMALL).freeze()
    x = encoder.normalise(uint8(1))
    with torch.no_grad(): assert torch.equal(encoder(x), encoder.model.forward_features(x)[:, 1:])


@pytest.mark.parametrize('name, stage', [('resnet18', -1), ('resnet18', -2), ('vit_tiny_patch16_224', -1), ('vit_tiny_patch16_224', -2),
                                         ('scene_cnn', -1)])
def test_pooled(name, stage):
    encoder = make_encoder(name, stage=stage, pool=True, **SMALL)
    assert encoder.grid == (1, 1) and encoder(torch.zeros(2, 3, 64, 64)).shape == (2, 1, encoder.dim)


def test_non_square_input():
    assert make_encoder('resnet18', 'random', image_size=(64, 128)).grid == (2, 4)
    assert make_encoder('vit_tiny_patch16_224', 'random', image_size=(32, 64)).grid == (2, 4)


@pytest.mark.parametrize('name, says', [('resnet_50', "did you mean 'resnet50"), ('scenecnn', "'scene_cnn'"),
                                        ('mobilnetv2_100', "'mobilenetv2_100'"), ('resnet18.a1_in2k', "did you mean 'a1_in1k'")])
def test_unknown_name_offers_the_nearest(name, says):
    with pytest.raises(ValueError, match=says): make_encoder(name)


@pytest.mark.parametrize('name', ['resnet18', 'scene_cnn'])
def test_unknown_stage_tells_which_there_are(name):
    with pytest.raises(ValueError, match='stage=9 of .* cannot be used'): make_encoder(name, stage=9, **SMALL)


def test_stage_error_lists_sizes():
    with pytest.raises(ValueError, match='stage 0: 64×32×32, stage 1: 64×16×16'): make_encoder('resnet18', stage=-9, **SMALL)


def test_argument_that_the_model_does_not_take():
    with pytest.raises(ValueError, match='vit_tiny_patch16_224 does not take .*pad_type'):
        make_encoder('vit_tiny_patch16_224', 'random', pad_type='same')


def test_offline_says_what_to_do(monkeypatch, tmp_path):
    import_timm()
    import huggingface_hub.constants as hub
    monkeypatch.setattr(hub, 'ENDPOINT', 'http://127.0.0.1:9')   # nobody listens
    monkeypatch.setattr(hub, 'HF_HUB_CACHE', str(tmp_path))
    before = hub.HF_HUB_OFFLINE
    with pytest.raises(ConnectionError, match='resnet18 are not on this machine.*give a file'): make_encoder('resnet18')
    assert hub.HF_HUB_OFFLINE == before


def test_import_timm_leaves_other_errors_alone(monkeypatch):
    def broken(name): raise RuntimeError('something else')
    monkeypatch.setattr(encoders.importlib, 'import_module', broken)
    with pytest.raises(RuntimeError, match='something else'): import_timm()


# ---- weights

@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    "A random ResNet with its classifier, as a file of each kind"
    folder, model = tmp_path_factory.mktemp('weights'), import_timm().create_model('resnet18')
    state = {k: v.clone() for k, v in model.state_dict().items()}
    save_file(state, folder/'a.safetensors')
    torch.save({'state_dict': {f'module.{k}': v for k, v in state.items()}, 'epoch': 3}, folder/'a.pth')
    return folder, state


def test_both_kinds_of_file_give_the_same_fingerprint(weights):
    folder, state = weights
    a, b = (make_encoder('resnet18', folder/f, image_size=64) for f in ('a.safetensors', 'a.pth'))
    assert a.spec['weights_sha256'] == b.spec['weights_sha256'] and torch.equal(a.model.conv1.weight, state['conv1.weight'])
    assert a.spec['weights'] == 'a.safetensors'   # no folder: it differs by machine
    assert make_encoder('resnet18', **SMALL).spec['weights_sha256'] != a.spec['weights_sha256']


def test_classifier_may_be_missing(weights, tmp_path):
    save_file({k: v for k, v in weights[1].items() if not k.startswith('fc.')}, tmp_path/'b.safetensors')
    assert make_encoder('resnet18', tmp_path/'b.safetensors', image_size=64).spec['weights_sha256'] == \
        make_encoder('resnet18', weights[0]/'a.pth', image_size=64).spec['weights_sha256']


def test_file_that_does_not_fit_names_tensors(weights, tmp_path):
    state = {**weights[1], 'extra.weight': torch.zeros(1), 'conv1.weight': torch.zeros(2, 3)}; del state['bn1.bias']
    save_file(state, tmp_path/'c.safetensors')
    with pytest.raises(ValueError, match=r'c.safetensors does not fit ResNet .*1 missing: bn1.bias; 1 not expected: extra.weight; '
                                         r'1 of another shape: conv1.weight \(2, 3\) instead of \(64, 3, 7, 7\)'):
        make_encoder('resnet18', tmp_path/'c.safetensors')
    with pytest.raises(ValueError, match='does not fit.*missing'): make_encoder('mobilenetv2_050', weights[0]/'a.pth')


def test_transformer_weights_of_another_size_are_converted(tmp_path):
    torch.save(import_timm().create_model('vit_tiny_patch16_224', img_size=96).state_dict(), tmp_path/'v.pth')
    assert make_encoder('vit_tiny_patch16_224', tmp_path/'v.pth', image_size=64).grid == (4, 4)


class Evil:
    def __reduce__(self): return (print, ('code ran',))


@pytest.mark.parametrize('make, error, says', [
    (lambda p: None, FileNotFoundError, 'does not exist'),
    (lambda p: p.write_bytes(b'not weights'), ValueError, 'cannot be read as weights'),
    (lambda p: torch.save({'a': Evil()}, p), ValueError, 'never loaded'),
    (lambda p: torch.save([1, 2], p), ValueError, 'no state dict'),
    (lambda p: torch.save({}, p), ValueError, 'no state dict')])
def test_bad_weights_files(make, error, says, tmp_path, capsys):
    make(tmp_path/'w.pth')
    with pytest.raises(error, match=says): make_encoder('scene_cnn', tmp_path/'w.pth')
    assert 'code ran' not in capsys.readouterr().out


def test_cut_off_safetensors(weights, tmp_path):
    (tmp_path/'cut.safetensors').write_bytes((weights[0]/'a.safetensors').read_bytes()[:1000])
    with pytest.raises(ValueError, match='cut.safetensors cannot be read'): read_weights(tmp_path/'cut.safetensors')


def test_fingerprint_sees_names_shapes_types_and_values():
    base = {'a': torch.zeros(2, 3)}
    others = [{'b': torch.zeros(2, 3)}, {'a': torch.zeros(3, 2)}, {'a': torch.zeros(2, 3, dtype=torch.int32)}, {'a': torch.ones(2, 3)}]
    assert len({weights_sha256(s) for s in [base, *others]}) == 5
    assert weights_sha256(base) == weights_sha256({'a': torch.zeros(3, 2).t(), 'n.num_batches_tracked': torch.tensor(1)})
    assert weights_sha256({'a': torch.zeros(2, 0, dtype=torch.bfloat16)})


# ---- preprocessing

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(['crop', 'squash', 'pad']), st.sampled_from([0.875, 1.]),
       st.sampled_from(['nearest', 'bilinear', 'bicubic', 'lanczos']))
def test_any_photo_gets_the_right_size(w, h, resize, crop_pct, interpolation):
    fill = (10, 200, 30) if resize == 'pad' else None
    out = Preprocess((32, 48), resize, crop_pct, interpolation, fill=fill)(Image.new('RGB', (w, h), (10, 200, 30)))
    assert out.shape == (3, 32, 48) and out.dtype == torch.uint8
    assert (out == torch.tensor([10, 200, 30], dtype=torch.uint8).view(3, 1, 1)).all()


def cubic_weights(n_in, n_out):
    "The matrix that resizes n_in numbers to n_out by Keys' cubic (a = -0.5), widened when it shrinks them (antialiased)"
    ratio = n_in/n_out
    wide = max(1., ratio)
    x = np.abs((np.arange(n_in)[None] + 0.5 - (np.arange(n_out)[:, None] + 0.5)*ratio)/wide)
    weights = np.where(x < 1, 1.5*x**3 - 2.5*x**2 + 1, np.where(x < 2, -0.5*x**3 + 2.5*x**2 - 4*x + 2, 0.))
    return weights/weights.sum(1, keepdims=True)


@settings(max_examples=30, deadline=None)
@given(st.integers(5, 90), st.integers(5, 90), st.sampled_from(['squash', 'pad']))
def test_pixels_are_the_formula(h, w, resize):
    photo = np.random.default_rng(h*100 + w).integers(80, 176, (h, w, 3), dtype=np.uint8)   # so that nothing overshoots and is cut off
    p = Preprocess((24, 36), resize, fill=(1, 2, 3) if resize == 'pad' else None)
    scale = min(24/h, 36/w)
    inner = (24, 36) if resize == 'squash' else (max(1, round(h*scale)), max(1, round(w*scale)))
    exact = np.einsum('oh,hwc->owc', cubic_weights(h, inner[0]), cubic_weights(w, inner[1]) @ photo.astype(float))
    want = np.full((24, 36, 3), (1, 2, 3), float)
    top, left = (24 - inner[0])//2, (36 - inner[1])//2
    want[top:top + inner[0], left:left + inner[1]] = exact
    if (h, w) == (24, 36): want = photo
    assert np.abs(p(Image.fromarray(photo)).permute(1, 2, 0).numpy() - want).max() < 1.5   # it rounds after each direction


def test_padding_keeps_the_whole_photo_and_is_recorded():
    photo = Image.new('RGB', (80, 40), (200, 0, 0))
    out = Preprocess((32, 32), 'pad', fill=(0, 0, 255))(photo)
    assert (out[0, 8:24] == 200).all() and (out[2, :8] == 255).all() and (out[2, 24:] == 255).all()
    assert Preprocess(resize='pad').fill == (124, 116, 104) and 'fill' not in Preprocess().record   # old records stay what they are
    encoder = make_encoder('scene_cnn', resize='pad', image_size=32)
    assert encoder.spec['fill'] == [128, 128, 128] and Encoder.from_spec(encoder.spec).preprocess == encoder.preprocess
    for kw in (dict(fill=(0, 0, 0)), dict(resize='pad', fill=(0, 0, 256)), dict(resize='pad', fill=(0.5, 0, 0))):
        with pytest.raises(ValueError, match='from 0 to 255'): Preprocess(**kw)


def test_crop_is_timms_own():
    timm = import_timm()
    from timm.data import create_transform
    noise = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    photo = Image.fromarray(noise).resize((180, 240), Image.Resampling.BICUBIC)
    cfg = timm.create_model('mobilenetv2_100').pretrained_cfg
    theirs = create_transform(cfg['input_size'], **{k: cfg[k] for k in ('mean', 'std', 'crop_pct', 'interpolation')})(photo)
    encoder = make_encoder('mobilenetv2_100', 'random')
    ours = encoder.normalise(encoder.transform(photo)[None])[0]
    assert (ours - theirs).abs().mean() < 0.04   # two grey levels: they resize, round, then cut at whole pixels; we do both at once


@pytest.mark.parametrize('resize', ['crop', 'squash', 'pad'])
def test_photo_of_the_right_size_is_untouched(resize):
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    encoder = make_encoder('mobilenetv2_050', 'random', resize=resize)
    assert np.array_equal(encoder.transform(Image.fromarray(pixels)).permute(1, 2, 0).numpy(), pixels)


def test_normalise_is_the_formula():
    p, x = Preprocess((8, 8), mean=(.1, .2, .3), std=(.4, .5, .6)), uint8(2, 8)
    exact = (x.double()/255 - torch.tensor(p.mean).view(3, 1, 1))/torch.tensor(p.std).view(3, 1, 1)
    torch.testing.assert_close(p.normalise(x).double(), exact, atol=1e-5, rtol=0)
    assert x.dtype == torch.uint8


@pytest.mark.parametrize('kw, says', [(dict(resize='sqash'), "did you mean 'squash'"), (dict(std=(0, 1, 1)), 'above 0'),
                                      (dict(mean=(1,)), '3 numbers')])
def test_bad_preprocessing(kw, says):
    with pytest.raises(ValueError, match=says): make_encoder('scene_cnn', **kw)


# ---- frozen, trained, rebuilt

def test_frozen_stays_frozen():
    encoder = make_encoder('scene_cnn').freeze().train()
    before = encoder.spec['weights_sha256']
    encoder(torch.randn(4, 3, 112, 112))
    assert not encoder.training and not encoder.model.training and encoder.spec['weights_sha256'] == before
    assert not any(p.requires_grad for p in encoder.parameters())


def test_joint_training_gets_gradients_and_changes_the_fingerprint():
    encoder = make_encoder('scene_cnn').train()
    before = encoder.spec['weights_sha256']
    encoder(encoder.normalise(uint8(2, 112))).square().mean().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    torch.optim.SGD(encoder.parameters(), 0.1).step()
    assert encoder.spec['weights_sha256'] != before


def test_encoding_does_not_disturb_training():
    encoder = make_encoder('scene_cnn').train()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    a, b = encoder.encode_batch(uint8(1, 112)), encoder.encode_batch(uint8(4, 112))
    assert encoder.training and all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    torch.testing.assert_close(a[0], b[0], atol=1e-5, rtol=1e-4)   # evaluation mode: neighbours in the batch do not matter


def test_frozen_features_may_be_learned_from():
    encoder, layer = make_encoder('scene_cnn').freeze(), torch.nn.Linear(128, 2)
    for grid in (encoder.encode_batch(uint8(2, 112)), encoder(encoder.normalise(uint8(2, 112)))): layer(grid).sum().backward()


@pytest.mark.parametrize('kw', [dict(name='scene_cnn', image_size=64), dict(name='vit_tiny_patch16_224', image_size=64, pool=True),
                                dict(name='resnet18', stage=-2, image_size=(64, 96), resize='squash'),
                                dict(name='mobilenetv2_050', image_size=64, pad_type='same', mean=(.5,)*3, std=(.5,)*3)])
def test_rebuilt_from_its_record(kw):
    encoder = make_encoder(weights='random', **kw).freeze()
    spec = json.loads(json.dumps(encoder.spec))
    again = Encoder.from_spec(spec, encoder.state_dict()).freeze()
    x = torch.randint(0, 256, (2, 3, *encoder.image_size), dtype=torch.uint8)
    assert again.spec == spec and torch.equal(again.encode_batch(x), encoder.encode_batch(x))


def test_rebuilding_checks_what_it_gets():
    encoder = make_encoder('scene_cnn')
    with pytest.raises(ValueError, match='stage, pool, size.* missing'): Encoder.from_spec({'name': 'scene_cnn'})
    state = encoder.state_dict(); state.popitem()
    with pytest.raises(ValueError, match='state_dict of scene_cnn does not fit'):
        Encoder.from_spec(encoder.spec, {k: v for k, v in encoder.state_dict().items() if 'last.1.bias' not in k})


@pytest.mark.parametrize('images, says', [(torch.zeros(1, 3, 112, 112), 'uint8'), (uint8(1, 64), r'got torch.uint8 \(1, 3, 64, 64\)')])
def test_wrong_input_is_told(images, says):
    with pytest.raises(ValueError, match=says): make_encoder('scene_cnn').encode_batch(images)


def test_misspelt_precision():
    with pytest.raises(ValueError, match="did you mean 'bf16'"): make_encoder('scene_cnn').encode_batch(uint8(1, 112), 'bf61')


def test_precision_report():
    found = compare_precision(make_encoder('scene_cnn').freeze(), uint8(4, 112), repeats=1)
    assert 0 < found['relative_error'] < 0.05 and found['cosine'] > 0.99 and found['fp32_images_per_s'] > 0


def test_scene_cnn_knows_where():
    cnn = SceneCNN().eval()
    with torch.no_grad(): out = cnn(torch.zeros(1, 3, 112, 112))
    inner = out[0, :, 2:5, 2:5].flatten(1).T   # away from the borders, only the coordinates differ
    assert len(torch.unique(inner, dim=0)) == 9


# ---- the shared network

@pytest.fixture(scope='module')
def real(mobilenet):
    return make_encoder('mobilenetv2_100', mobilenet, pad_type='same', mean=(.5,)*3, std=(.5,)*3).freeze()


def test_shared_weights_give_relu6_grids(real, flickr8k):
    photos = [Image.open(p) for p in sorted((flickr8k/'Images').glob('*.jpg'))[:3]]
    images = torch.stack([real.transform(p) for p in photos])
    assert np.array_equal(images[0].permute(1, 2, 0), np.array(photos[0].convert('RGB')))   # 224×224 already
    grid = real.encode_batch(images)
    assert grid.shape == (3, 49, 1280) and grid.min() == 0 and 0 < grid.max() <= 6
    assert 0.6 < (grid == 0).float().mean() < 0.95   # trained: most values are zero


def test_shared_weights_equal_timms_own_path(real, mobilenet):
    model = import_timm().create_model('mobilenetv2_100', pretrained=True, pad_type='same',
                                       pretrained_cfg_overlay=dict(file=str(mobilenet), mean=(.5,)*3, std=(.5,)*3)).eval()
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): exact = model.forward_features(x)
    torch.testing.assert_close(real(x), exact.flatten(2).transpose(1, 2), atol=1e-4, rtol=1e-4)
    assert 'classifier.weight' in load_file(mobilenet)   # in the file, ignored


# ---- folded normalisations

@pytest.mark.parametrize('name', ['resnet18', 'mobilenetv2_050', 'resnetv2_50', 'densenet121', 'regnetx_002', 'vit_tiny_patch16_224'])
def test_folding_changes_no_feature(name):
    encoder = make_encoder(name, **SMALL).freeze()
    generator = torch.Generator().manual_seed(0)
    for m in encoder.model.modules():   # as if trained
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, .2, generator=generator); m.running_var.uniform_(.5, 2, generator=generator)
            m.weight.data.uniform_(.5, 1.5, generator=generator); m.bias.data.normal_(0, .2, generator=generator)
    x = uint8(2)
    torch.testing.assert_close(encoder.encode_batch(x), encoder(encoder.normalise(x)), atol=1e-3, rtol=1e-4)


def test_folding_that_would_change_features_is_dropped():
    class Twice(SceneCNN):   # uses a convolution where the order of names does not say so
        def forward(self, x): return super().forward(x) + self.stages[2][0](self.stages[:2](x))[..., :7, :7]
    encoder = Encoder('scene_cnn', Twice(), Preprocess((112, 112))).freeze()
    for m in encoder.model.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.running_mean.fill_(1.)
    assert torch.equal(encoder.encode_batch(uint8(1, 112)), encoder(encoder.normalise(uint8(1, 112))))


def test_new_weights_after_freezing_are_seen():
    encoder, other = make_encoder('scene_cnn').freeze(), make_encoder('scene_cnn')
    before = encoder.encode_batch(uint8(1, 112)), encoder.spec['weights_sha256']
    encoder.load_state_dict(other.state_dict())
    assert encoder.spec['weights_sha256'] == other.spec['weights_sha256'] != before[1]
    torch.testing.assert_close(encoder.encode_batch(uint8(1, 112)), other.freeze().encode_batch(uint8(1, 112)))
    assert not any('fast' in k or 'cache' in k for k in encoder.state_dict())


# ---- fine-tuning

NETWORKS = [('mobilenetv2_050', 4), ('resnet18', 3), ('resnet18', 0), ('convnext_atto', 2), ('vit_tiny_patch16_224', 10),
            ('deit_tiny_distilled_patch16_224', 11), ('densenet121', 3), ('scene_cnn', 0)]
FIRST = {'mobilenetv2_050': 'blocks.5.', 'resnet18': 'layer3.', 'convnext_atto': 'stages.2.', 'vit_tiny_patch16_224': 'blocks.10.',
         'deit_tiny_distilled_patch16_224': 'blocks.11.'}


def learned(encoder) -> list[str]: return [n for n, p in encoder.model.named_parameters() if p.requires_grad]


def step(encoder, optimizer, seed: int = 0):
    "One step towards features of another photo"
    encoder.train()   # as a training loop does
    x = encoder.normalise(torch.randint(0, 256, (2, 3, *encoder.image_size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)))
    optimizer.zero_grad()
    (encoder(x) - 1).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize('name, stage, kind', [
    *((*n, {}) for n in NETWORKS), *((*NETWORKS[0], k) for k in (dict(foreach=False), dict(foreach=True), dict(fused=True)))])
def test_only_the_tail_learns(name, stage, kind):
    encoder = make_encoder(name, **SMALL).finetune(stage)
    names, before = learned(encoder), {n: t.clone() for n, t in encoder.state_dict().items()}
    first = FIRST.get(name, '') if stage else ''
    assert names and names[0].startswith(first), names[:2]
    assert encoder.finetuned == stage and not encoder.frozen and not encoder.training
    cached = encoder.encode_batch(uint8(2)), encoder.spec['weights_sha256']
    optimizer = torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], 1e-3, **kind)
    for i in range(3): step(encoder, optimizer, i)
    assert not any(m.training for m in encoder.modules())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in encoder.model.named_parameters()
               if n in names and not n.endswith(('k_bias', 'attn.qkv.bias')))   # keys' bias: softmax does not see it
    assert all((p.grad is not None) == (n in names) for n, p in encoder.model.named_parameters())
    moved = {n.removeprefix('model.') for n, t in encoder.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == set(names)   # to the bit: no frozen parameter, no running statistic, no counter
    if name == 'mobilenetv2_050': assert 'bn2.weight' in names and 'blocks.4.0.bn1.weight' not in names   # γ and β of the tail learn
    own = encoder(encoder.normalise(uint8(2)))
    torch.testing.assert_close(encoder.encode_batch(uint8(2)), own, atol=2e-4, rtol=2e-4)
    assert (own - cached[0]).abs().max() > 1e-3 and encoder.spec['weights_sha256'] != cached[1]   # what was remembered is forgotten


@pytest.mark.parametrize('name, stage', NETWORKS)
def test_gradients_of_the_tail_are_those_of_the_whole(name, stage):
    encoder = make_encoder(name, **SMALL).finetune(0)
    x = encoder.normalise(uint8(2))
    def gradients():
        encoder.zero_grad(set_to_none=True)
        encoder(x).square().mean().backward()
        return {n: p.grad.clone() for n, p in encoder.model.named_parameters() if p.grad is not None}
    whole, names = gradients(), learned(encoder.finetune(stage))
    tail = gradients()
    assert set(tail) == set(names) <= set(whole)
    for n in names: torch.testing.assert_close(tail[n], whole[n], atol=0, rtol=0)


def test_tails_are_nested_and_the_front_feeds_them():
    encoder = make_encoder('vit_tiny_patch16_224', **SMALL)
    tails = [set(learned(encoder.finetune(s))) for s in range(12)]
    assert all(a > b for a, b in zip(tails, tails[1:])) and {'cls_token', 'pos_embed'} <= tails[0] - tails[1]
    assert {n.split('.')[1] for n in tails[11] if n.startswith('blocks')} == {'11'} and 'norm.weight' in tails[11]
    assert tails[0] == {n for n, _ in encoder.model.named_parameters()}


@pytest.mark.parametrize('own, stage, names', [(2, 1, ('layer1.', 'layer2.')), (-2, 3, ('layer3.',)), (4, 4, ('layer4.',))])
def test_stages_after_the_features_do_not_learn(own, stage, names):
    encoder = make_encoder('resnet18', stage=own, **SMALL).finetune(stage)
    assert {n.split('.')[0] + '.' for n in learned(encoder)} == set(names)
    encoder(encoder.normalise(uint8(1))).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize('name, own, stage, says', [
    ('resnet18', -1, 5, r'stage=5 of resnet18 .* from 0 \(all of it\) to 4; stage 0: 64×32×32, .*stage 4: 512×2×2'),
    ('resnet18', 2, 3, r'from 0 \(all of it\) to 2'), ('resnet18', -2, 4, r'to 3'), ('resnet18', -1, -1, 'stage=-1'),
    ('scene_cnn', -1, 1, r'to 0; SceneCNN gives its last stage only'), ('vit_tiny_patch16_224', -1, 12, 'to 11')])
def test_stage_that_cannot_learn(name, own, stage, says):
    with pytest.raises(ValueError, match=says): make_encoder(name, stage=own, **SMALL).finetune(stage)


def test_learning_pauses_and_goes_on():
    encoder = make_encoder('mobilenetv2_050', **SMALL).finetune(3)
    optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], 0.05)
    x = uint8(2)
    encoder.frozen = True
    paused = encoder.encode_batch(x)
    assert not encoder.train()(encoder.normalise(x)).requires_grad and encoder.finetuned == 3
    encoder.frozen = False
    step(encoder, optimizer)
    learning = encoder.encode_batch(x)   # before, between and after: each asks the weights of its own time
    step(encoder, optimizer)
    encoder.frozen = True
    again = encoder.encode_batch(x)
    torch.testing.assert_close(again, encoder(encoder.normalise(x)), atol=1e-4, rtol=1e-4)
    assert min((a - b).abs().max() for a, b in ((paused, learning), (learning, again), (paused, again))) > 1e-4
    assert torch.equal(encoder.encode_batch(x), again)
    encoder.frozen = False
    with torch.no_grad(): encoder.model.blocks[5][0].bn1.running_mean += 1   # somebody else's doing: seen, too
    torch.testing.assert_close(encoder.encode_batch(x), encoder(encoder.normalise(x)), atol=1e-4, rtol=1e-4)


def test_folded_network_is_made_once_a_pause(monkeypatch):
    encoder, made = make_encoder('mobilenetv2_050', **SMALL).finetune(4), []
    fold = encoders._fold_norms
    monkeypatch.setattr(encoders, '_fold_norms', lambda m: (made.append(1), fold(m))[1])
    optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], 0.1, fused=True)   # which no tensor's version counts
    for n in (1, 2):
        encoder.frozen = True
        for _ in range(3): encoder.encode_batch(uint8(1)); encoder.spec
        assert len(made) == n
        encoder.frozen = False
        step(encoder, optimizer)
        encoder.encode_batch(uint8(1))
        assert len(made) == n   # while it learns, it is not worth while


def test_stochastic_depth_and_dropout_stay_off():
    timm = import_timm()
    model = timm.create_model('convnext_atto', num_classes=0, drop_path_rate=0.9)
    encoder = Encoder('convnext_atto', model, Preprocess((64, 64))).finetune(2).train()
    x = encoder.normalise(uint8(2))
    assert torch.equal(encoder(x), encoder(x))


def test_freezing_ends_it():
    encoder = make_encoder('resnet18', **SMALL).finetune(3).freeze()
    assert encoder.finetuned is None and not learned(encoder) and not encoder.train().training
    assert learned(encoder.finetune(4))[0].startswith('layer4') and not encoder.frozen


@pytest.mark.parametrize('name', ['convnext_atto', 'vit_tiny_patch16_224', 'mobilenetv2_050'])
def test_weights_that_come_are_not_drawn_before(name, tmp_path):
    encoder = make_encoder(name, **SMALL).freeze()
    x, file = uint8(2), tmp_path/'w.safetensors'
    save_file({n: t.contiguous() for n, t in encoder.model.state_dict().items()}, file)
    torch.manual_seed(0); before = torch.get_rng_state()
    for again in (Encoder.from_spec(encoder.spec, encoder.state_dict()), make_encoder(name, file, image_size=64)):
        assert torch.equal(again.freeze().encode_batch(x), encoder.encode_batch(x))
        assert again.spec['weights_sha256'] == encoder.spec['weights_sha256']
    assert torch.equal(torch.get_rng_state(), before) or name.startswith('vit')   # which draws its class token in another way
    bare = Encoder.from_spec(encoder.spec).freeze()   # without weights they are drawn
    assert torch.isfinite(bare.encode_batch(x)).all() and not torch.equal(torch.get_rng_state(), before)
