"""PCA: scikit-learn's numbers, train images alone, flat memory, and new photos that go the way of the stored ones."""
import pickle
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from caption_nb import features
from caption_nb.basics import FileLock, sha256_file
from caption_nb.data import CaptionData, DataError
from caption_nb.encoders import Encoder, make_encoder
from caption_nb.features import FeatureStore, StoreBusy, StoreError, _create, extract, view_names
from caption_nb.pca import (Moments, Pca, ProjectedEncoder, encoder_from_spec, fit_pca, ids_fingerprint, pca_spec, plot_explained,
                            principal_axes, project_store, reduced_path, reduced_store, stored_pca)

pytestmark = pytest.mark.usefixtures('one_thread')


def make_store(path: Path, rows: np.ndarray, views=('plain',), grid=None) -> FeatureStore:
    "A store of `rows` (N, V, L, D)"
    n, _, L, D = rows.shape
    encoder = dict(name='drawn', dim=D, weights='random', weights_sha256='0')
    _create(path, FeatureStore, dict(grid=grid or [1, L], dim=D, views=list(views), precision='fp32', batch_size=8, encoder=encoder, data='drawn',
                                     data_fingerprint='0'), (L, D), [f'{i}.jpg' for i in range(n)], [0]*n)
    with h5py.File(path, 'r+') as f: f['features'][:] = rows.reshape(-1, L, D)
    return FeatureStore(path)


def drawn(n: int, views: int, L: int, D: int, seed: int = 0) -> np.ndarray: # (n, V, L, D) float16
    "Rows with a few strong directions, all positive as after a ReLU"
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((D, D))*0.8**np.arange(D)[:, None]
    return np.maximum(rng.standard_normal((n, views, L, D)) @ mix + 1, 0).astype('f2')


class TrainOnly(FeatureStore):
    "Raises for every image but `allowed`"
    allowed: set = set()

    def read(self, ids, view=0):
        assert set(ids) <= self.allowed, f'{set(ids) - self.allowed} must not be read'
        return super().read(ids, view)


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp('store')/'a.h5', drawn(60, 2, 4, 24), ('plain', 'flip'))


def all_rows(store: FeatureStore, ids) -> np.ndarray: # (rows, D) float64
    return np.concatenate([store.read(ids, v).reshape(-1, store.dim) for v in range(len(store.views))]).astype('f8')


# ---- the numbers

@pytest.mark.parametrize('dim', [1, 2, 7, 23, 24])
@pytest.mark.parametrize('whiten', [False, True])
def test_it_is_scikit_learns(store, dim, whiten):
    peer = pytest.importorskip('sklearn.decomposition', reason='scikit-learn is the reference').PCA(dim, whiten=whiten, svd_solver='full')
    ids = store.ids[:40]
    rows = all_rows(store, ids)
    theirs, pca = peer.fit_transform(rows), fit_pca(store, ids, dim, whiten, quiet=True)
    ours, x = pca(torch.from_numpy(rows)).numpy(), torch.from_numpy(rows)
    signs = np.sign((pca.components.numpy()*peer.components_).sum(1))
    assert np.abs(ours*signs - theirs).max() < 1e-4 and np.abs(pca.components.numpy()*signs[:, None] - peer.components_).max() < 1e-4
    assert np.abs(pca.ratio.numpy() - peer.explained_variance_ratio_).max() < 1e-5 and np.abs(pca.mean.numpy() - peer.mean_).max() < 1e-5
    assert np.allclose(pca.variances, peer.explained_variance_, rtol=1e-4)
    assert np.abs(pca.inverse(pca(x)).numpy() - peer.inverse_transform(theirs)).max() < 1e-4
    assert pca.rows == len(rows) and pca.dim == dim and pca.dim_in == 24


def test_all_dimensions_lose_nothing(store):
    pca, x = fit_pca(store, store.ids, 24, quiet=True), torch.from_numpy(all_rows(store, store.ids)).float()
    assert (pca.inverse(pca(x)) - x).abs().max() < 1e-4 and pca.explained == pytest.approx(1)
    assert torch.allclose(pca.components @ pca.components.T, torch.eye(24), atol=1e-5)
    for dim in (1, 5, 24):   # the first of many are the only ones of few
        assert torch.equal(fit_pca(store, store.ids, dim, quiet=True).components, pca.components[:dim])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 3))
def test_blocks_do_not_matter(store, block, seed):
    whole, ids = fit_pca(store, store.ids, 6, quiet=True), list(np.random.default_rng(seed).permutation(store.ids))
    other = fit_pca(store, ids, 6, block=block, quiet=True)
    assert torch.allclose(other.spectrum, whole.spectrum, rtol=1e-5, atol=1e-6) and torch.allclose(other.components, whole.components, atol=1e-5)
    assert other.images == whole.images == ids_fingerprint(store.ids)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.sampled_from([0., 1e3, 1e7]))
def test_streaming_equals_memory_far_from_zero(sizes, shift):
    rows = np.random.default_rng(sum(sizes)).standard_normal((sum(sizes) + 2, 5)) + shift
    moments, at = Moments(5), 0
    for n in [*sizes, 2]: moments.add(rows[at:at + n]); at += n
    assert moments.n == len(rows) and np.allclose(moments.mean, rows.mean(0), rtol=1e-12)
    assert np.allclose(moments.scatter/(len(rows) - 1), np.cov((rows - shift).T), rtol=1e-6, atol=1e-6)


def test_signs_are_fixed(store):
    moments = Moments(24)
    moments.add(all_rows(store, store.ids))
    variances, axes = principal_axes(moments)
    assert (np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1) > 0).all() and (np.diff(variances) <= 0).all() and (variances >= 0).all()


def test_constant_features_stay_out(tmp_path):
    rows = drawn(30, 1, 2, 8)
    rows[..., 5:] = 3
    pca = fit_pca(make_store(tmp_path/'a.h5', rows), [f'{i}.jpg' for i in range(30)], 8, whiten=True, quiet=True)
    y = pca(torch.from_numpy(rows))
    assert (pca.spectrum[5:] < 1e-6).all() and (y[..., 5:] == 0).all() and y[..., :5].flatten(0, 2).std(0).sub(1).abs().max() < 1e-3
    assert (pca.inverse(y) - torch.from_numpy(rows).float()).abs().max() < 1e-2 and torch.isfinite(pca.inverse(y)).all()


def test_gradients_pass_and_autocast_costs_no_digits(store):
    pca, x = fit_pca(store, store.ids, 3, quiet=True), torch.randn(2, 4, 24, requires_grad=True)
    with torch.autocast('cpu', torch.bfloat16): y = pca(x)
    assert y.dtype == torch.float32 and torch.equal(y, pca(x))
    y.sum().backward()
    assert x.grad.abs().sum() > 0 and not list(pca.parameters())
    assert pca(torch.zeros(24)).shape == (3,) and pca(torch.zeros(0, 4, 24)).shape == (0, 4, 3)


# ---- what is read, and how much at once

def test_only_train_images_are_read(store):
    guarded = TrainOnly(store.path)
    guarded.allowed = set(store.ids[:25])
    assert fit_pca(guarded, store.ids[:25], 5, quiet=True).spec == fit_pca(store, store.ids[:25], 5, quiet=True).spec
    with pytest.raises(AssertionError, match='must not be read'): fit_pca(guarded, store.ids[:26], 5, quiet=True)


def test_memory_is_flat(tmp_path):
    stores, peaks = [make_store(tmp_path/f'{n}.h5', drawn(n, 1, 16, 32)) for n in (200, 2000)], []
    for work in (lambda s: fit_pca(s, s.ids, 8, block=1 << 15, quiet=True),):
        for s in (stores[0], *stores):   # the first warms up
            tracemalloc.start()
            work(s)
            peaks.append(tracemalloc.get_traced_memory()[1]); tracemalloc.stop()
    assert peaks[2] < peaks[1] + 400_000 < 2_000_000, peaks   # ids are 100 bytes each; the features 2 MB


# ---- bad input

@pytest.mark.parametrize('dim', [0, -1, 25, 2.0, True, None])
def test_impossible_dimensions(store, dim):
    with pytest.raises(ValueError, match=r'1 … 24 dimensions, not'): fit_pca(store, store.ids, dim, quiet=True)


def test_bad_requests_are_named(store, tmp_path):
    with pytest.raises(DataError, match=r'12 dimensions needs at least 12 rows; 1 train image × 4 cells × 2 views in .*a\.h5 make 8: take more'):
        fit_pca(store, store.ids[:1], 12, quiet=True)
    with pytest.raises(DataError, match=r'needs at least 2 rows; 0 train images'): fit_pca(store, [], 1, quiet=True)
    with pytest.raises(DataError, match=r'3\.jpg.* named twice'): fit_pca(store, [*store.ids[:9], '3.jpg'], 2, quiet=True)
    with pytest.raises(DataError, match=r'a\.h5 lacks 1 image: .*elsewhere\.jpg'): fit_pca(store, [*store.ids, 'elsewhere.jpg'], 2, quiet=True)
    with pytest.raises(DataError, match=r'same\.h5: all rows of the 9 images are the same'):
        same = make_store(tmp_path/'same.h5', np.ones((9, 1, 2, 4), 'f2'))
        fit_pca(same, same.ids, 2, quiet=True)
    rows = drawn(9, 1, 2, 4); rows[3, 0, 1, 2] = np.nan; rows[5, 0, 1, 2] = np.inf
    with pytest.raises(DataError, match=r"nan\.h5: the features of '3\.jpg', '5\.jpg' are not finite"):
        odd = make_store(tmp_path/'nan.h5', rows)
        fit_pca(odd, odd.ids, 2, quiet=True)
    pca = fit_pca(store, store.ids, 2, quiet=True)
    with pytest.raises(ValueError, match='rows of 24 numbers, got'): pca(torch.zeros(3, 23))
    with pytest.raises(ValueError, match='gives rows of 2 numbers, got'): pca.inverse(torch.zeros(3, 3))


# ---- files

def test_saved_and_loaded(store, tmp_path):
    pca = fit_pca(store, store.ids, 5, whiten=True, quiet=True)
    path = pca.save(tmp_path/'p.safetensors')
    again = Pca.load(path)
    assert again.spec == pca.spec and again.whiten and all(torch.equal(a, b) for a, b in zip(again.buffers(), pca.buffers()))
    assert torch.equal(again(torch.ones(3, 24)), pca(torch.ones(3, 24))) and pickle.loads(pickle.dumps(pca)).spec == pca.spec
    assert [p.name for p in tmp_path.iterdir()] == ['p.safetensors']
    whole = path.read_bytes()
    for at in (len(whole) - 3, len(whole)//2):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        with pytest.raises(StoreError, match=r'p\.safetensors is not what its record says: sha256 .*damaged'): Pca.load(path)
    path.write_bytes(whole[:-7])
    with pytest.raises(StoreError, match=r'p\.safetensors cannot be read as safetensors'): Pca.load(path)
    from safetensors.torch import save_file
    save_file({'a': torch.zeros(1)}, path)
    with pytest.raises(StoreError, match='is not a PCA'): Pca.load(path)
    save_file({'a': torch.zeros(1)}, path, {'format': 'caption_nb pca 1', 'spec': '{}'})
    with pytest.raises(StoreError, match="lacks 'mean'"): Pca.load(path)
    with pytest.raises(FileNotFoundError, match='should be a PCA'): Pca.load(tmp_path/'none')


def test_projected_store(store, tmp_path):
    pca = fit_pca(store, store.ids[:40], 5, quiet=True)
    out = project_store(store, pca, tmp_path/'p.h5', quiet=True)
    assert out.ids == store.ids and out.views == store.views and out.dim == 5 and out.grid == store.grid and out.attrs['data'] == 'drawn'
    for v in (0, 1):
        assert np.array_equal(out.read(out.ids, v), pca(torch.from_numpy(store.read(store.ids, v))).half().numpy())
    assert stored_pca(out).spec == stored_pca(out.path).spec == pca.spec == out.attrs['encoder']['pca']
    with h5py.File(out.path) as f: assert np.array_equal(f['pca_components'][:], pca.components)   # any HDF5 tool can read it
    assert project_store(store, pca, out.path, quiet=True).ids == out.ids
    with pytest.raises(StoreError, match=r'holds other features: encoder\.pca\.rows is 320, expected 480'):
        project_store(store, fit_pca(store, store.ids, 5, quiet=True), out.path, quiet=True)
    with pytest.raises(ValueError, match='projected before'): project_store(out, fit_pca(out, out.ids, 2, quiet=True), tmp_path/'q.h5', quiet=True)
    with pytest.raises(StoreError, match='there is no PCA in it'): stored_pca(store)
    with pytest.raises(FileNotFoundError, match='should be a store of projected'): stored_pca(tmp_path/'none.h5')
    (tmp_path/'odd.h5').write_text('x')
    with pytest.raises(StoreError, match='cannot be read as a feature store'): stored_pca(tmp_path/'odd.h5')


def test_too_large_for_half_precision_is_named(tmp_path):
    rows = np.zeros((9, 1, 1, 16), 'f2'); rows[4] = 60000
    store = make_store(tmp_path/'a.h5', rows)
    with pytest.raises(DataError, match=r"projected features of '4\.jpg' exceed half precision"): reduced_store(store, store.ids, 2, quiet=True)
    assert np.isfinite(reduced_store(store, store.ids, 2, whiten=True, quiet=True).read(store.ids)).all()


def test_killed_and_continued_with_its_own_pca(store, tmp_path, monkeypatch):
    monkeypatch.setattr('caption_nb.pca.BLOCK', 4*24*2*8)   # 8 images a batch
    whole = reduced_store(store, store.ids[:40], 5, tmp_path/'whole.h5', quiet=True)
    append, calls = features._Writer.append, []
    def killed(self, rows):
        calls.append(len(rows))
        if len(calls) > 3: raise KeyboardInterrupt
        append(self, rows)
    monkeypatch.setattr(features._Writer, 'append', killed)
    with pytest.raises(KeyboardInterrupt): reduced_store(store, store.ids[:40], 5, tmp_path/'p.h5', quiet=True)
    monkeypatch.setattr(features._Writer, 'append', append)
    with pytest.raises(StoreError, match='is not finished: 24 images'): FeatureStore(tmp_path/'p.h5')
    with pytest.raises(StoreError, match=r'another PCA: pca\.images is'): reduced_store(store, store.ids, 5, tmp_path/'p.h5', quiet=True)
    monkeypatch.setattr('caption_nb.pca.fit_pca', lambda *a, **k: pytest.fail('fitted again'))
    done = reduced_store(store, store.ids[:40], 5, tmp_path/'p.h5', quiet=True)
    assert sha256_file(done.path) == sha256_file(whole.path)
    assert reduced_store(store, store.ids[:40], 5, done.path, quiet=True).ids == store.ids   # there already
    given = reduced_store(store, [], 0, pca=stored_pca(done), quiet=True)   # a checkpoint's: nothing is fitted
    assert given.path == reduced_path(store, store.ids[:40], 5) and np.array_equal(given.read(given.ids), done.read(done.ids))
    given.path.unlink()


def test_the_name_says_what_decides(store):
    names = {reduced_path(store, ids, dim, white) for ids in (store.ids, store.ids[1:]) for dim in (3, 4) for white in (True, False)}
    assert len(names) == 8 and {p.parent for p in names} == {store.path.parent}
    assert reduced_path(store, store.ids[::-1], 3) == reduced_path(store, store.ids, 3)


# ---- a new photo goes the same way

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp('photos'), np.random.default_rng(0)
    ids = [f'{i:02d}.png' for i in range(30)]
    for id in ids: Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder/id)
    return CaptionData('noise', folder, {id: ['a caption'] for id in ids}, {'train': ids[:24], 'dev': ids[24:]}, layout='kaggle')


@pytest.fixture(scope='module')
def encoder():
    torch.manual_seed(0)
    return make_encoder('scene_cnn', 'random', image_size=32).freeze()


@pytest.mark.parametrize('whiten', [False, True])
def test_new_photos_are_where_the_store_has_them(photos, encoder, tmp_path, whiten):
    store = extract(photos, encoder, tmp_path/'a.h5', views=('plain', 'flip'), quiet=True)
    out = reduced_store(store, photos.ids('train'), 12, whiten=whiten, quiet=True)
    small = ProjectedEncoder(encoder, stored_pca(out))
    images = torch.stack([small.transform(photos.open(id)) for id in photos.ids('dev')])
    for v, view in enumerate((images, images.flip(3))):
        stored = torch.from_numpy(out.read(photos.ids('dev'), v)).float()
        assert (small.encode_batch(view) - stored).abs().max() < 2e-3*stored.abs().max()
        assert (small(small.normalise(view)) - stored).abs().max() < 1e-2*stored.abs().max()
    assert small.base.spec == encoder.spec and small.base.frozen and torch.equal(small.base.encode_batch(images), encoder.encode_batch(images))
    assert small.spec == out.attrs['encoder'] and small.dim == 12 and small.grid == encoder.grid == (2, 2)
    direct = extract(photos, small, tmp_path/'b.h5', views=('plain', 'flip'), quiet=True)   # without the large store
    assert np.abs(direct.read(out.ids).astype('f4') - out.read(out.ids).astype('f4')).max() < 2e-3*np.abs(out.read(out.ids)).max()
    FeatureStore(out.path, expect=dict(encoder=small.spec))
    with pytest.raises(StoreError, match=r'encoder\.dim is 12, expected 128'): FeatureStore(out.path, expect=dict(encoder=encoder.spec))
    with pytest.raises(StoreError, match=r'encoder\.pca is None'): FeatureStore(store.path, expect=dict(encoder=small.spec))


def test_rebuilt_from_a_checkpoint(photos, encoder, tmp_path):
    store = extract(photos, encoder, tmp_path/'a.h5', quiet=True)
    pca = fit_pca(store, photos.ids('train'), 6, quiet=True)
    small = ProjectedEncoder(encoder, pca)
    spec, state = small.spec, small.state_dict()
    again = encoder_from_spec(spec, state)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    assert isinstance(again, ProjectedEncoder) and not again.frozen and again.spec == spec
    assert torch.allclose(again.freeze().encode_batch(images), small.encode_batch(images), atol=1e-6)
    assert small.frozen and not any(p.requires_grad for p in again.parameters()) and not small.train().training
    assert type(encoder_from_spec(encoder.spec, encoder.state_dict())) is Encoder
    with pytest.raises(StoreError, match='sha256'): encoder_from_spec(spec, state | {'pca.mean': state['pca.mean'] + 1})
    with pytest.raises(StoreError, match="lacks 'mean'"): encoder_from_spec(spec, encoder.state_dict())
    with pytest.raises(ValueError, match='not expected: pca'): Encoder.from_spec(spec, state)   # an older reader says so too
    with pytest.raises(ValueError, match='projected before'): ProjectedEncoder(small, pca)
    assert encoder.dim == 128 and 'pca' not in encoder.spec and 'pca.mean' not in encoder.state_dict()   # left as it was


def test_an_encoder_that_learns(photos, encoder):
    torch.manual_seed(1)
    own = make_encoder('scene_cnn', 'random', image_size=32).train()
    pca = Pca(torch.zeros(128), torch.eye(128)[:4], torch.ones(128), 200, 'none')
    small = ProjectedEncoder(own, pca)
    assert small.training and not small.frozen
    small(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in own.parameters())


def test_any_timm_model(tmp_path):
    encoder = make_encoder('vit_tiny_patch16_224', 'random', image_size=64).freeze()
    pca = Pca(torch.zeros(encoder.dim), torch.eye(encoder.dim)[:10], torch.ones(encoder.dim), 200, 'none')
    small = ProjectedEncoder(encoder, pca)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(small.encode_batch(images), encoder.encode_batch(images).half().float()[..., :10])
    assert small.encode_batch(images, 'bf16').shape == (2, 16, 10)


def test_figure(store):
    ax = plot_explained(fit_pca(store, store.ids, 5, quiet=True)).axes[0]
    assert ax.get_xlabel() == 'components' and ax.get_ylabel() == 'explained variance (%)'
    share = ax.lines[0].get_ydata()
    assert len(share) == 25 and share[0] == 0 and share[-1] == pytest.approx(100, abs=1e-6) and (np.diff(share) >= 0).all()
    assert all(line.get_color() == 'k' for line in ax.lines) and '5 of 24' in ax.get_legend().texts[1].get_text()


def test_a_checkpoint_captions_new_photos(photos, encoder, tmp_path):
    from caption_nb.captioner import Captioner, CaptionModel, load_encoder, model_files
    from caption_nb.checkpoints import write_checkpoint
    from caption_nb.config import Config, make_decoder
    from caption_nb.text import Vocab
    store = reduced_store(extract(photos, encoder, tmp_path/'a.h5', quiet=True), photos.ids('train'), 6, quiet=True)
    config = Config(encoder='scene_cnn', min_freq=1, embed_dim=16, hidden_dim=16, attention_dim=8, device='cpu').validate()
    vocab, small = Vocab.build(['a red dot', 'a blue box'], min_freq=1), ProjectedEncoder(encoder, stored_pca(store))
    model = CaptionModel(small, make_decoder(config, vocab, small)).eval()
    write_checkpoint(tmp_path/'run', model_files(model, vocab, config))
    captioner = Captioner.load(tmp_path/'run', device='cpu')
    assert captioner.model.encoder.spec == small.spec == load_encoder(tmp_path/'run').spec and captioner.model.encoder.frozen
    images = captioner.images([photos.path(id) for id in photos.ids('dev')])
    stored = torch.from_numpy(store.read(photos.ids('dev'))).float()
    assert (captioner.model.encoder.encode_batch(images) - stored).abs().max() < 2e-3*stored.abs().max()
    assert isinstance(captioner.caption(photos.path(photos.ids('dev')[0])), str)
    assert captioner.explain(photos.path(photos.ids('dev')[0])).attention.shape[1:] == (2, 2)


def test_all_views_count_and_their_boxes_stay(photos, encoder, tmp_path):
    store = extract(photos, encoder, tmp_path/'a.h5', views=view_names(2, flip=True), quiet=True)
    out = reduced_store(store, photos.ids('train'), 5, quiet=True)
    assert out.views == store.views and np.array_equal(out.crop_boxes(), store.crop_boxes()) and out.attrs['crop_sides'] == store.attrs['crop_sides']
    pca = stored_pca(out)
    rows = np.concatenate([store.read(photos.ids('train'), v).reshape(-1, store.dim) for v in store.views]).astype('f8')
    assert pca.rows == len(rows) and np.allclose(pca.mean, rows.mean(0), atol=1e-6*np.abs(rows).max())
    for view in store.views:
        want = pca(torch.from_numpy(store.read(photos.ids('dev'), view))).half().numpy()
        assert np.array_equal(out.read(photos.ids('dev'), view), want)
    assert pca_spec(store) is None and pca_spec(out) == pca.spec == pca_spec(str(out.path))


def test_pca_of_another_machine_does_not_replace_the_one_that_is_there(photos, encoder, tmp_path):
    store = extract(photos, encoder, tmp_path/'a.h5', quiet=True)
    here = reduced_store(store, photos.ids('train'), 5, quiet=True)
    pca = stored_pca(here)
    other = Pca(pca.mean*(1 + 2**-20), pca.components, pca.spectrum, pca.rows, pca.images)
    there = reduced_store(store, [], 0, pca=other, quiet=True)
    assert there.path != here.path == reduced_path(store.path, photos.ids('train'), 5) and pca_spec(there) == other.spec
    assert reduced_store(store, [], 0, pca=other, quiet=True).path == there.path
    assert reduced_store(store, [], 0, pca=pca, quiet=True).path == here.path


def test_fitted_by_one_process_at_a_time(photos, encoder, tmp_path):
    store = extract(photos, encoder, tmp_path/'a.h5', quiet=True)
    path = reduced_path(store, photos.ids('train'), 5)
    with FileLock(path.with_name(path.name + '.fit.lock'), RuntimeError), pytest.raises(StoreBusy, match='is being fitted by process'):
        reduced_store(store, photos.ids('train'), 5, quiet=True)
    assert reduced_store(store, photos.ids('train'), 5, quiet=True).path == path
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(['a.h5', path.name])
