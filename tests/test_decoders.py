"""What all decoders share: the protocol and the test of it, and small tools."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from caption_nb.attention import AttentionDecoder
from caption_nb.decoder import Decoder, WordEmbedding, check_decoder, doubly_stochastic, dropout, rows_per_image, take

pytestmark = pytest.mark.usefixtures('one_thread')

SIZES = dict(embed_dim=4, hidden_dim=4, attention_dim=4)


def test_doubly_stochastic_counts_real_steps_and_real_captions():
    d = AttentionDecoder(11, 6, **SIZES, doubly_stochastic=2.0)
    attention, mask = torch.full((2, 3, 4), 0.25), torch.tensor([[True, True, False], [False]*3])
    assert d.loss_terms(attention, mask)['doubly_stochastic'].item() == pytest.approx(2*0.25)
    assert AttentionDecoder(11, 6, **SIZES, doubly_stochastic=0.).loss_terms(attention, mask) == {}
    assert d.loss_terms(attention, torch.zeros_like(mask))['doubly_stochastic'].item() == 0
    assert d.loss_terms(None, mask) == {}


def test_doubly_stochastic_is_the_mean_over_heads():
    attention, mask = torch.rand(3, 4, 2, 5).softmax(-1), torch.tensor([[True]*4, [True]*2 + [False]*2, [False]*4])
    each = [doubly_stochastic(attention[:, :, head], mask) for head in range(2)]
    torch.testing.assert_close(doubly_stochastic(attention, mask), sum(each)/2)


@pytest.mark.parametrize('vector_dim', [0, 3])
def test_padding_row_of_the_embedding_never_learns(vector_dim):
    embedding = WordEmbedding(11, 4, vector_dim)
    with torch.no_grad(): embedding.vectors.weight[0].zero_()
    embedding(torch.tensor([[1, 4, 0]])).square().sum().backward()
    gradient = embedding.vectors.weight.grad
    assert not embedding(torch.tensor([0])).any() and not gradient[0].any() and gradient[[1, 4]].all()


def test_rows_per_image():
    assert rows_per_image(dict(x=torch.zeros(2, 1)), 6) == 3 and rows_per_image(dict(x=torch.zeros(0, 1)), 0) == 1
    with pytest.raises(ValueError, match='5 rows cannot share the memories of 2 images'): rows_per_image(dict(x=torch.zeros(2, 1)), 5)


def test_take_keeps_names_and_order():
    got = take(dict(a=torch.arange(3), b=torch.eye(3)), torch.tensor([2, 0, 0]))
    assert got['a'].tolist() == [2, 0, 0] and got['b'].shape == (3, 3)


@settings(max_examples=20, deadline=None)
@given(p=st.floats(0, 0.95), seed=st.integers(0, 9))
def test_dropout(p, seed):
    torch.manual_seed(seed)
    x = torch.ones(401, 257, requires_grad=True)                        # not a multiple of eight
    y = dropout(x, p)
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=0.01)
    assert y.mean().item() == pytest.approx(1, abs=0.06)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    torch.manual_seed(seed)
    assert torch.equal(dropout(x, p), y)                                # the seed decides
    assert dropout(x, p, training=False) is x and dropout(torch.empty(0, 3), 0.5).shape == (0, 3)


def test_check_decoder_finds_faults():
    class Stateless(AttentionDecoder):
        "Forgets its state"
        def step(self, token, state, memory, attention=True): return super().step(token, None, memory, attention)
    class Talkative(AttentionDecoder):
        "Gives attention that nobody wants"
        def step(self, token, state, memory, attention=True): return super().step(token, state, memory)
    class Secretive(AttentionDecoder):
        "Has an argument that a checkpoint would not know"
        def __init__(self, vocab_size=11, grid_dim=6, trick=0): super().__init__(vocab_size, grid_dim, **SIZES)
    with pytest.raises(AssertionError, match='Stateless fails "step = forward"'): check_decoder(Stateless(11, 6, **SIZES))
    with pytest.raises(AssertionError, match='attention came although it was not wanted'): check_decoder(Talkative(11, 6, **SIZES))
    with pytest.raises(AssertionError, match="config lacks .*'trick'"): check_decoder(Secretive())
    d = AttentionDecoder(11, 6, **SIZES).train()
    check_decoder(d)
    assert d.training                                                   # the mode is given back


def test_the_bare_protocol_says_what_is_missing():
    d = Decoder(5, 3)
    for call in (lambda: d.encode(None), lambda: d({}, None), lambda: d.project(None), lambda: d.step(None, None, None)):
        with pytest.raises(NotImplementedError): call()
    assert d.loss_terms(None, None) == {}
