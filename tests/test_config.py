"Configuration: faults that are named, decoders as their table says, round trips"
import dataclasses
import math

import pytest

from caption_nb.config import DECODERS, LATER_FIELDS, Config, ConfigError, DecoderOptions, config_help, make_decoder
from caption_nb.encoders import make_encoder
from caption_nb.text import Vocab
from caption_nb.training import demo_config


@pytest.mark.parametrize('values, message', [
    (dict(epoch=3), "unknown field 'epoch': did you mean 'epochs'"),
    (dict(epochs='3'), "epochs='3': expected int, got str"),
    (dict(epochs=True), 'epochs=True: expected int, got bool'),
    (dict(epochs=3.0), 'epochs=3.0: expected int, got float'),
    (dict(gate=1), 'gate=1: expected bool, got int'),
    (dict(data=None), 'data=None: expected str, got NoneType'),
    (dict(schedule='cosin'), "schedule='cosin': did you mean 'cosine'"),
    (dict(decoder='atention_lstm'), "did you mean 'attention_lstm'"),
    (dict(device='cdua'), "did you mean 'cuda'"),
    (dict(dropout=1.5), 'dropout=1.5: must be at most 0.95'),
    (dict(lr=-1.0), 'lr=-1.0: must be at least 0'), (dict(lr=0.0), 'lr=0.0: must be more than 0'), (dict(lr=math.nan), 'lr is not a number'),
    (dict(encoder_mean='red'), "encoder_mean='red': expected numbers such as"), (dict(encoder_std='1,2'), "one number or three"),
    (dict(encoder='scene_cnn', features='a.h5'), 'trained jointly'), (dict(crop=0.2), 'crop=0.2: the encoder mobilenetv2_100 is frozen'),
        (dict(encoder='scene_cnn', finetune_from=2), 'learns as a whole anyway'), (dict(finetune_from=3, encoder_start=11), 'less than epochs=11'),
        (dict(finetune_from=3, encoder_start=2, decoder_start=1), 'nothing would learn in the first 1 epochs'),
        (dict(compile=True), 'not the loops of attention_lstm'), (dict(stage='scst'), 'name a run trained with cross-entropy'), (dict(stage='scst', from_run='a', label_smoothing=0.1), 'belongs to cross-entropy'),
        (dict(stage='scst', from_run='a', scst_samples=1), 'leave_one_out needs at least 2'), (dict(optimizer='adma'), "did you mean 'adam'"),
        (dict(schedule='cosin'), "did you mean 'cosine'"),
    (dict(pca=-1), 'pca=-1: must be at least 0'), (dict(pca_whiten=True), 'there is no PCA; say with pca how many'),
        (dict(encoder='scene_cnn', pca=8), 'pca=8: the encoder scene_cnn learns from the start, there are no features to fit a PCA on; leave it out'),
        (dict(finetune_from=3, pca=8), 'leave it out, or let it learn later with encoder_start'),
        (dict(encoder='scene_cnn', feature_crops=2), 'feature_crops=2: the encoder scene_cnn learns from pixels, whose parts crop takes'),
        (dict(finetune_from=3, encoder_start=2, feature_crops=2), 'learns from pixels'),
    (dict(encoder_resize='sqash'), "encoder_resize='sqash': did you mean 'squash'"),
        (dict(encoder='given', encoder_resize='pad'), "encoder_resize='pad': the features came with the data set"),
    (dict(epochs=0, beam=0), 'epochs=0: must be at least 1\nbeam=0: must be at least 1')])
def test_config_faults_are_named(values, message):
    with pytest.raises(ConfigError) as e: Config.from_dict(values)
    assert message in str(e.value)


def test_option_of_another_decoder_is_refused():
    Config.from_dict(dict(decoder='lstm', embed_dim=7))
    with pytest.raises(ConfigError, match='attention_dim=7: the decoder lstm has no such option'):
        Config.from_dict(dict(decoder='lstm', attention_dim=7))


@pytest.mark.parametrize('values, message', [
    (dict(decoder='transformer', hidden_dim=100), 'heads=8: do not divide hidden_dim=100'),
    (dict(attention='multihead', attention_dim=30), 'heads=8: do not divide attention_dim=30'),
    (dict(attention='multihed'), "did you mean 'multihead'"), (dict(decoder='lstm', init_state='zeros'), 'the photo would not enter at all'),
    (dict(dropout=-.5), 'dropout=-0.5: must be -1, or at least 0'), (dict(freeze_vectors=True), 'no word_vectors to freeze'),
    (dict(min_len=20), 'min_len=20: must be less than max_len=20')])
def test_impossible_decoders_are_refused(values, message):
    with pytest.raises(ConfigError) as e: Config.from_dict(values)
    assert message in str(e.value)


def test_config_round_trip_hash_and_help(tmp_path):
    c = Config.from_dict(dict(lr=1, encoder_mean='0.5'))
    (tmp_path/'config.json').write_text(c.to_json())
    assert Config.load(tmp_path/'config.json') == c and type(c.lr) is float
    assert c.hash() == dataclasses.replace(c, name='x', runs_dir='y').hash() != dataclasses.replace(c, seed=1).hash()
    (tmp_path/'config.json').write_text('{"epoch": 1}')
    with pytest.raises(ConfigError, match="config.json: unknown field 'epoch'"): Config.load(tmp_path/'config.json')
    assert len(config_help()) == len(dataclasses.fields(Config))
    assert all(h.text and '=' not in h.text for h in config_help())   # papermill cannot see a parameter whose comment has a =
    assert {c for c in demo_config().changed()} >= {'encoder', 'name'}


def test_hash_outlives_new_fields():
    assert Config().hash() == 'b03547b3'   # as it was before LATER_FIELDS: a sweep begun then is the same sweep now
    assert Config(seed=1, decoder='lstm').hash() == 'a36f6f10'
    assert LATER_FIELDS <= set(Config().to_dict())
    others = [Config(**{name: {'': 'pad', 0: 3, False: True}[getattr(Config(), name)]}).hash() for name in sorted(LATER_FIELDS)]
    assert len({Config().hash(), *others}) == len(LATER_FIELDS) + 1


def test_every_decoder_is_built_as_its_table_says():
    encoder, vocab = make_encoder('scene_cnn', 'random'), Vocab.build(['a red circle'], min_freq=1)
    for name, kind in DECODERS.items():
        assert set(kind.options) <= set(DecoderOptions.__dataclass_fields__) and set(kind.usual) <= set(kind.options)
        c = Config.from_dict(dict(decoder=name, hidden_dim=16, embed_dim=8) | ({} if name == 'transformer' else dict(init_state='flat')))
        decoder = make_decoder(c, vocab, encoder)
        assert type(decoder) is kind.make and decoder.config['hidden_dim'] == 16 and decoder.config['dropout'] == kind.usual['dropout']
        assert make_decoder(dataclasses.replace(c, dropout=0.), vocab, encoder).config['dropout'] == 0
